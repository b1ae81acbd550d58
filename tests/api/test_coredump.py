"""A core dump over the API: as Cloud Hypervisor's clients ask for it, and each way in which there is none."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.api.rig import BLOCK, BOOT, BUSY, MakeMachine, Rig, machine
from tests.coredump.elf import Core
from tests.peers.processes import wait_until
from vhost_user.errors import HostError
from vhost_user.units import GIB, MIB
from virtio_mem.api.server import MAX_CONNECTIONS, MAX_LONG
from virtio_mem.control import Hooks
from virtio_mem.protocol import RequestType

PATH = "/api/v1/vm.coredump"


def kinds(rig: Rig) -> list[str]:
    with rig.control.events.subscribe(after=0) as events:
        return [event.kind for event in iter(lambda: events.get(0), None)]


def test_a_machine_that_runs_is_dumped_and_goes_on(rig: Rig, tmp_path: Path) -> None:
    rig.follow()
    assert rig.request(RequestType.UNPLUG, 3) is rig.request(RequestType.PLUG, 3)
    rig.request(RequestType.UNPLUG, 5, 2)
    answer = rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/core"})
    assert (answer.status, answer.body) == (204, b"")
    assert Core(tmp_path / "core").ranges == [
        (0, BOOT),
        (4 * GIB, 5 * BLOCK),
        (4 * GIB + 7 * BLOCK, 256 * MIB - 7 * BLOCK),
    ]
    assert not rig.control.paused
    assert kinds(rig)[-3:] == ["paused", "dumped", "resumed"]


def test_one_that_is_paused_stays_so(rig: Rig, tmp_path: Path) -> None:
    rig.control.pause()
    assert rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/core"}).status == 204
    assert rig.request(RequestType.PLUG) is BUSY
    assert kinds(rig) == ["paused", "dumped", "refused"]
    again = rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/core"})
    assert (again.status, again.json["field"], again.json["limit"]) == (400, "file", "is there already")
    assert rig.control.paused


def test_one_without_a_device_that_is_paused_stays_so(tmp_path: Path) -> None:
    with machine(tmp_path, "--memory size=64M,shared=on") as rig:
        rig.control.pause()
        assert rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/core"}).status == 204
        assert rig.control.paused
    assert Core(tmp_path / "core").ranges == [(0, BOOT)]


def test_what_fails_is_told_and_the_machine_goes_on(make_machine: MakeMachine, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        called.append(path)
        raise HostError("qemu", "dump-guest-memory", "QEMU has ended")

    called: list[object] = []
    hooks = Hooks(pause=lambda: called.append("stop"), resume=lambda: called.append("cont"), coredump=fail)
    rig = make_machine(hooks=hooks)
    answer = rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/core"})
    assert (answer.status, answer.json["field"], answer.json["limit"]) == (500, "qemu", "QEMU has ended")
    assert called == ["stop", tmp_path / "core", "cont"]
    assert not rig.control.paused
    assert "dumped" not in kinds(rig)


def test_the_process_that_follows_one_that_was_killed_meanwhile_has_it_go_on(
    make_machine: MakeMachine, tmp_path: Path
) -> None:
    """It finds so by what was saved before the dump began."""
    saved: list[bytes] = []
    meanwhile: list[bytes] = []
    rig = make_machine(hooks=Hooks(coredump=lambda _: meanwhile.append(saved[-1])), save=saved.append)
    assert rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/core"}).status == 204

    def found(state: bytes) -> tuple[bool, bool]:
        rig.control.load(state)
        return rig.control.paused, rig.control.goes_on

    assert found(meanwhile[0]) == (True, True)
    rig.control.resume()
    assert found(saved[-1]) == (False, False)
    rig.control.pause()
    assert found(saved[-1]) == (True, False)


def test_a_machine_that_something_else_has_stopped_stays_so(make_machine: MakeMachine, tmp_path: Path) -> None:
    called: list[object] = []
    hooks = Hooks(running=lambda: False, resume=lambda: called.append("cont"), coredump=called.append)
    rig = make_machine(hooks=hooks)
    assert rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/core"}).status == 204
    assert called == [tmp_path / "core"]
    assert not rig.control.paused


def test_a_pause_that_fails_leaves_no_dump(make_machine: MakeMachine, tmp_path: Path) -> None:
    def fail() -> None:
        raise HostError("qemu", "stop", "QEMU would not")

    called: list[object] = []
    rig = make_machine(hooks=Hooks(pause=fail, resume=lambda: called.append("cont"), coredump=called.append))
    assert rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/core"}).status == 500
    assert called == []


def test_where_nobody_can_it_is_refused_and_nothing_stops(make_machine: MakeMachine, tmp_path: Path) -> None:
    rig = make_machine(hooks=Hooks(pause=lambda: pytest.fail("it was paused")))
    answer = rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/core"})
    assert (answer.status, answer.json["field"]) == (400, "vm.coredump")
    assert not (tmp_path / "core").exists()


@pytest.mark.parametrize("body", [None, [], {}, {"destination_url": "file:///x", "more": 1}, {"path": "/x"}])
def test_a_body_that_cannot_be(rig: Rig, body: object) -> None:
    assert rig.ask("PUT", PATH, b"" if body is None else json.dumps(body).encode()).status == 400
    assert kinds(rig) == []


def test_a_place_that_is_none_is_the_clients_mistake(rig: Rig, tmp_path: Path) -> None:
    answer = rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/no/where"})
    assert (answer.status, answer.json["field"]) == (400, "file")
    assert rig.ask("PUT", PATH, {"destination_url": "file:///"}).status == 400
    assert rig.ask("PUT", PATH, {"destination_url": f"file://{tmp_path}/{'x' * 256}"}).status == 500
    assert not rig.control.paused


def test_those_that_wait_for_their_turn_leave_room_for_others(make_machine: MakeMachine, tmp_path: Path) -> None:
    def last(_: Path) -> None:
        assert over.wait(20)

    over = threading.Event()
    rig = make_machine(hooks=Hooks(coredump=last))
    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        body = {"destination_url": f"file://{tmp_path}/core"}
        asked = [pool.submit(rig.ask, "PUT", PATH, body) for _ in range(MAX_CONNECTIONS)]
        try:
            wait_until(lambda: sum(answer.done() for answer in asked) >= MAX_CONNECTIONS - MAX_LONG, "some are refused")
            assert rig.get("/api/v1/vm.info").status == 200
        finally:
            over.set()
    assert sorted(answer.result().status for answer in asked) == [204] * MAX_LONG + [503] * (MAX_CONNECTIONS - MAX_LONG)
