"""Every path, as it answers when it is used as it should be, and each way to use it otherwise."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import virtio_mem.api
from tests.api.rig import ACK, BLOCK, BOOT, BUSY, REGION, MakeMachine, Rig
from tests.device.helpers import make_device
from tests.device.test_service import Script, ScriptedMemory
from vhost_user.errors import HostError
from vhost_user.units import GIB, MIB, ByteCount, HostOffset
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.control import Control, ControlledZone, Hooks
from virtio_mem.control.info import ZoneBlocks
from virtio_mem.hostmem import backing
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.operation import STALL_SECONDS
from virtio_mem.protocol import RequestType
from virtio_mem.service import DeviceService

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType


def test_ping(rig: Rig) -> None:
    answer = rig.get("/api/v1/vmm.ping").json
    assert answer["pid"] == os.getpid()
    assert answer["version"] == answer["build_version"]


def test_info_has_cloud_hypervisors_memory_and_ours(rig: Rig) -> None:
    rig.follow()
    info = rig.get("/api/v1/vm.info").json
    memory = info["config"]["memory"]
    assert (memory["size"], memory["hotplug_size"], memory["hotplugged_size"]) == (BOOT, REGION, 256 * MIB)
    assert (memory["hotplug_method"], memory["shared"], memory["thp"]) == ("VirtioMem", True, True)
    assert "zones" not in memory
    assert (info["state"], info["memory_actual_size"]) == ("Running", BOOT + 256 * MIB)
    (zone,) = info["zones"]
    assert (zone["boot_size"], zone["requested_size"], zone["plugged_size"]) == (BOOT, 256 * MIB, 256 * MIB)
    assert zone["answers"] == {"PLUG ACK": 1}
    assert zone["held"] == 0, "nothing was touched"
    assert zone["connected"]
    assert zone["operation"] is None


def test_what_lies_in_very_many_pieces_is_counted_in_part(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "MOST_PIECES", 4)
    rig.follow()
    memory = rig.service().memory
    assert isinstance(memory, HostMemory)
    for pieces, told in ((4, (4 * 4096, False)), (5, (4 * 4096, True))):
        with memory.view(HostOffset(0), ByteCount(MIB)) as view:
            for piece in range(pieces):
                view[piece * 3 * 4096] = 1
        (zone,) = rig.get("/api/v1/vm.info").json["zones"]
        assert (zone["held"], zone["held_more"]) == told
        assert memory.held() == pieces * 4096


def test_info_of_zones(zones: Rig) -> None:
    info = zones.get("/api/v1/vm.info").json
    memory = info["config"]["memory"]
    assert memory["size"] == 0
    assert [(zone["id"], zone["size"], zone["hotplug_size"]) for zone in memory["zones"]] == [
        ("a", BOOT, 512 * MIB),
        ("b", BOOT, GIB),
    ]
    assert [(zone["id"], zone["guest_numa_id"]) for zone in info["zones"]] == [("a", 0), ("b", 3)]
    number = zones.resize(BOOT + 128 * MIB, "a")
    again = zones.get("/api/v1/vm.info").json
    assert again["config"]["memory"]["zones"][0]["hotplugged_size"] == 128 * MIB
    assert again["zones"][0]["operation"]["id"] == number


def test_a_machine_without_front_end_is_created_and_a_paused_one_paused(make_machine: MakeMachine) -> None:
    rig = make_machine(connected=lambda: False)
    assert rig.get("/api/v1/vm.info").json["state"] == "Created"
    rig.ask("PUT", "/api/v1/vm.pause")
    assert rig.get("/api/v1/vm.info").json["state"] == "Paused"


def test_a_zone_without_a_device(make_machine: MakeMachine) -> None:
    rig = make_machine("--memory size=64M,shared=on")
    (zone,) = rig.get("/api/v1/vm.info").json["zones"]
    assert (zone["hotplug_size"], zone["addr"], zone["held"]) == (0, None, 0)
    assert rig.get("/api/v1/zones/mem0/blocks").json["plugged"] == []
    counts = rig.get("/api/v1/zones/mem0/blocks?cells=9").json
    assert (counts["nb_blocks"], counts["nb_runs"], counts["cells"]) == (0, 0, [])
    assert rig.get("/api/v1/vm.counters").json == {}
    assert rig.operation(rig.resize(BOOT))["state"] == "reached"
    refusal = rig.ask("PUT", "/api/v1/vm.resize", {"desired_ram": BOOT + BLOCK})
    assert refusal.status == 400
    assert "the zone has no virtio-mem device" in str(refusal.json)
    assert rig.get("/metrics").status == 200


def test_counters(rig: Rig) -> None:
    rig.request(PLUG, 0, 4)
    rig.request(UNPLUG, 1)
    assert rig.get("/api/v1/vm.counters").json == {
        "mem0": {
            "plug_ack": 1,
            "unplug_ack": 1,
            "failed_undos": 0,
            "unplugged_bytes": BLOCK,
            "unreturned_bytes": 0,
            "unrequested_bytes": BLOCK,
        }
    }


def test_blocks_are_runs(rig: Rig) -> None:
    for first, count in ((0, 3), (5, 1), (100, 20)):
        assert rig.request(PLUG, first, count) is ACK
    assert rig.get("/api/v1/zones/mem0/blocks").json == {
        "block_size": BLOCK,
        "nb_blocks": 512,
        "usable_blocks": 256,
        "requested_blocks": 128,
        "plugged": [[0, 3], [5, 1], [100, 20]],
    }
    assert rig.get("/api/v1/zones/nosuch/blocks").status == 404


@pytest.mark.parametrize(
    ("most", "per_cell", "cells"),
    [
        (1, 512, [24]),
        (2, 256, [24, 0]),
        (7, 128, [24, 0, 0, 0]),
        (8, 64, [4, 20, 0, 0, 0, 0, 0, 0]),
        (9, 64, [4, 20, 0, 0, 0, 0, 0, 0]),
        (512, 1, [1, 1, 1, 0, 0, 1, *[0] * 94, *[1] * 20, *[0] * 392]),
        (65536, 1, [1, 1, 1, 0, 0, 1, *[0] * 94, *[1] * 20, *[0] * 392]),
    ],
)
def test_blocks_are_counted(rig: Rig, most: int, per_cell: int, cells: list[int]) -> None:
    for first, count in ((0, 3), (5, 1), (100, 20)):
        assert rig.request(PLUG, first, count) is ACK
    assert rig.get(f"/api/v1/zones/mem0/blocks?cells={most}").json == {
        "block_size": BLOCK,
        "nb_blocks": 512,
        "usable_blocks": 256,
        "requested_blocks": 128,
        "nb_runs": 3,
        "per_cell": per_cell,
        "cells": cells,
    }
    assert rig.get(f"/api/v1/zones/nosuch/blocks?cells={most}").status == 404


@given(nb_blocks=st.integers(1, 300), most=st.integers(1, 400), data=st.data())
def test_counts_are_those_of_the_runs(nb_blocks: int, most: int, data: st.DataObject) -> None:
    device = make_device(region=nb_blocks * BLOCK, requested=0, block=BLOCK)
    for block in data.draw(st.sets(st.integers(0, nb_blocks - 1))):
        device.blocks.plug(Run(BlockIndex(block), 1))
    service = DeviceService(device, ScriptedMemory(Script()))
    blocks = ZoneBlocks(ControlledZone(id="a", service=service))
    runs = blocks.plugged_runs()
    per_cell, counts = blocks.counts(most)
    assert len(list(runs)) == len(runs)
    assert len(counts) == -(-nb_blocks // per_cell) <= most
    assert per_cell == 1 or -(-nb_blocks // (per_cell // 2)) > most
    plugged = {block for first, count in runs for block in range(first, first + count)}
    cells = range(0, nb_blocks, per_cell)
    assert counts == [len(plugged.intersection(range(first, first + per_cell))) for first in cells]


def test_pause_and_resume(make_machine: MakeMachine) -> None:
    called: list[str] = []
    hooks = Hooks(pause=lambda: called.append("pause"), resume=lambda: called.append("resume"))
    rig = make_machine(hooks=hooks)
    for _ in range(2):
        assert rig.ask("PUT", "/api/v1/vm.pause").status == 204
    assert rig.request(PLUG) is BUSY
    refused = rig.ask("PUT", "/api/v1/system-reset")
    assert (refused.status, refused.json["field"]) == (503, "system-reset")
    rig.notices.clear()
    assert rig.ask("PUT", "/api/v1/vm.resume").status == 204
    assert rig.notices == ["mem0"], "who was told BUSY is asked to try again"
    assert rig.request(PLUG) is ACK
    assert called == ["pause", "pause", "resume"]


def test_a_machine_without_a_device_is_paused_as_well(make_machine: MakeMachine) -> None:
    """It says so, and so does the process that takes its place."""
    rig = make_machine("--memory size=64M,shared=on")
    assert rig.ask("PUT", "/api/v1/vm.pause").status == 204
    assert rig.get("/api/v1/vm.info").json["state"] == "Paused"
    with Control.from_manager(rig.manager) as successor:
        successor.load(rig.control.dump())
        assert successor.paused
    assert rig.ask("PUT", "/api/v1/vm.resume").status == 204
    assert rig.get("/api/v1/vm.info").json["state"] == "Running"


def test_a_pause_that_fails_is_told_and_pauses_nothing(make_machine: MakeMachine) -> None:
    def refuse() -> None:
        raise HostError("qmp", "stop", "QEMU would not")

    rig = make_machine(hooks=Hooks(pause=refuse))
    answer = rig.ask("PUT", "/api/v1/vm.pause")
    assert (answer.status, answer.json["field"], answer.json["limit"]) == (500, "qmp", "QEMU would not")
    assert not rig.control.paused


def test_system_reset_unplugs_everything(zones: Rig) -> None:
    zones.follow("b")
    assert zones.ask("PUT", "/api/v1/system-reset").status == 204
    assert zones.service("b").device.plugged_size == 0
    assert zones.notices[-2:] == ["a", "b"]


def test_a_resume_that_fails_is_told_and_resumes_nothing(make_machine: MakeMachine) -> None:
    def fail() -> None:
        raise HostError("qemu", "cont", "QEMU refused")

    rig = make_machine(hooks=Hooks(resume=fail))
    assert rig.ask("PUT", "/api/v1/vm.resume").status == 500
    assert not rig.control.paused, "it was not before"
    rig.control.pause()
    with rig.control.events.subscribe() as events:
        assert rig.ask("PUT", "/api/v1/vm.resume").status == 500
        assert events.get(0) is None
    assert rig.get("/api/v1/vm.info").json["state"] == "Paused"
    assert rig.request(RequestType.PLUG) is BUSY


def test_a_resume_waits_for_the_pause_before_it(make_machine: MakeMachine) -> None:
    stopping, stopped, done = threading.Event(), threading.Event(), []

    def stop() -> None:
        stopping.set()
        stopped.wait(10)
        done.append("stop")

    rig = make_machine(hooks=Hooks(pause=stop, resume=lambda: done.append("continue")))
    pause, resume = threading.Thread(target=rig.control.pause), threading.Thread(target=rig.control.resume)
    pause.start()
    assert stopping.wait(10)
    resume.start()
    resume.join(0.1)
    stopped.set()
    pause.join()
    resume.join()
    assert (done, rig.control.paused) == (["stop", "continue"], False)


def test_a_paused_machine_is_not_reset(make_machine: MakeMachine) -> None:
    resets: list[bool] = []

    def reset() -> bool:
        resets.append(True)
        return True

    rig = make_machine(hooks=Hooks(system_reset=reset))
    rig.control.pause()
    answer = rig.ask("PUT", "/api/v1/system-reset")
    assert (answer.status, answer.json["remedy"], resets) == (503, "resume it first", [])
    rig.control.resume()
    assert (rig.ask("PUT", "/api/v1/system-reset").status, resets) == (204, [True])


def test_a_resize_is_an_operation(rig: Rig) -> None:
    rig.follow()
    number = rig.resize(BOOT + 512 * MIB)
    assert rig.notices == ["mem0"]
    running = rig.operation(number)
    assert (running["state"], running["target"], running["plugged"]) == ("running", BOOT + 512 * MIB, BOOT + 256 * MIB)
    assert rig.resize(BOOT + 512 * MIB) == number, "the same target is the same operation"
    rig.follow()
    reached = rig.operation(number)
    assert (reached["state"], reached["plugged"]) == ("reached", BOOT + 512 * MIB)
    assert reached["verdict"].startswith("reached 576 MiB in 0.")
    again = rig.resize(BOOT + 512 * MIB)
    assert again > number
    assert rig.operation(again)["state"] == "reached", "what is there already is success"
    first, second = rig.resize(BOOT), rig.resize(BOOT + 2 * BLOCK)
    assert [entry["state"] for entry in rig.get("/api/v1/operations").json] == [
        "reached",
        "reached",
        "superseded",
        "running",
    ]
    assert rig.operation(first)["reason"] == f"by operation {second}"


def test_waiting_for_an_operation(rig: Rig) -> None:
    number = rig.resize(BOOT + 2 * BLOCK)
    start = time.monotonic()
    assert rig.get(f"/api/v1/operations/{number}?wait=0.2").json["state"] == "running"
    assert 0.2 <= time.monotonic() - start < 10
    connection = rig.connect()
    connection.request("GET", f"/api/v1/operations/{number}?wait=60")
    rig.follow()
    assert json.loads(connection.getresponse().read())["state"] == "reached"
    connection.close()
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("number", ["0", "99", "x", "1" * 40, "-1", "1.0", "\u0661"])
def test_an_operation_that_is_not_known(rig: Rig, number: str) -> None:
    answer = rig.get(f"/api/v1/operations/{number.encode().hex('%') if not number.isascii() else number}")
    assert answer.status == 404


@pytest.mark.parametrize("wait", ["", "x", "-1", "301", "1e9", "nan", "inf", "1_0", " 1", "1" * 50, "0x1"])
def test_a_time_to_wait_that_cannot_be(rig: Rig, wait: str) -> None:
    number = rig.resize(BOOT)
    answer = rig.get(f"/api/v1/operations/{number}?wait={wait.replace(' ', '%20')}")
    assert (answer.status, answer.json["field"] in ("wait", "query")) == (400, True)


@pytest.mark.parametrize("query", ["wait=1&wait=1", "waits=1", "wait=1&x", "%ff=1", "=", "&&&", "a=1&" * 20])
def test_a_query_that_cannot_be(rig: Rig, query: str) -> None:
    assert rig.get(f"/api/v1/operations/{rig.resize(BOOT)}?{query}").status == 400
    assert rig.get(f"/api/v1/vmm.ping?{query}").status == 400


def test_unknown_paths_and_methods(rig: Rig) -> None:
    for path in ("/", "/api", "/api/v1", "/api/v1/vm.boot", "/api/v1/vm.info/", "//api/v1/vm.info", "/metrics/x"):
        answer = rig.get(path)
        assert (answer.status, answer.json["field"]) == (404, "path")
    for method, path, allowed in (("PUT", "vm.info", "GET"), ("GET", "vm.resize", "PUT"), ("POST", "vm.resize", "PUT")):
        answer = rig.ask(method, f"/api/v1/{path}")
        assert (answer.status, answer.headers["Allow"]) == (405, allowed)
    head = rig.ask("HEAD", "/api/v1/vm.info")
    assert (head.status, head.body) == (405, b"")


def test_a_body_where_none_belongs(rig: Rig) -> None:
    assert rig.ask("PUT", "/api/v1/vm.pause", {}).status == 400
    assert rig.ask("GET", "/api/v1/vm.info", b" ").status == 400
    assert not rig.control.paused


def test_what_ch_remote_sends_and_reads(rig: Rig) -> None:
    """api_client/src/lib.rs of Cloud Hypervisor v53.0: no User-Agent, and a list of texts where it fails."""
    sent = json.dumps({"desired_vcpus": None, "desired_ram": BOOT, "desired_balloon": None}).encode()
    head = f"PUT /api/v1/vm.resize HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nContent-Length: {len(sent)}\r\n\r\n"
    with rig.raw() as sock:
        sock.sendall(head.encode())
        sock.sendall(sent)
        received = sock.recv(4096)
        assert received.startswith(b"HTTP/1.1 204 No Content\r\n")
        assert b"Content-Length: " not in received, "it would wait for a body"
        sock.sendall(head.replace(f": {len(sent)}", ": 2").encode() + b"{}")
        received = sock.recv(4096)
    head_of_error, _, body = received.partition(b"\r\n\r\n")
    assert head_of_error.startswith(b"HTTP/1.1 400 ")
    assert f"Content-Length: {len(body)}".encode() in head_of_error
    assert json.loads(body)[0].startswith("desired_ram=None: must be given")


def test_who_asked_what_is_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        number = rig.resize(BOOT + BLOCK)
        rig.get("/api/v1/vm.info")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "virtio_mem.api.routes"]
    assert line == (
        f'PUT /api/v1/vm.resize {{"desired_ram": {BOOT + BLOCK}}} by pid {os.getpid()} uid {os.geteuid()}: '
        f"204, operation {number}"
    )


def test_what_is_logged_is_one_line_and_nothing_that_a_terminal_obeys(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert rig.ask("PUT", "/api/v1/vm.resize", b'{"a": 1,\r\n"\x1b[2J": "\xc3\xa4"}').status == 400
    (line,) = [record.getMessage() for record in caplog.records if record.name == "virtio_mem.api.routes"]
    assert line.startswith(r'PUT /api/v1/vm.resize {"a": 1,\r\n"\x1b[2J": "\xc3\xa4"} by pid ')


def test_a_mistake_of_ours_is_a_500_and_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: float) -> Any:
        raise ZeroDivisionError

    rig.control.info = fail  # type: ignore[method-assign, assignment]
    answer = rig.get("/api/v1/vm.info")
    assert (answer.status, answer.json["limit"]) == (500, "a mistake of this program: see its log")
    assert "failed" in caplog.text


def test_metrics(rig: Rig) -> None:
    rig.follow()
    rig.request(STATE, 10_000)
    answer = rig.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    lines = answer.body.decode().splitlines()
    for line in (
        'virtio_mem_plugged_bytes{zone="mem0"} 2.68435456e+08',
        'virtio_mem_requests_total{answer="ACK",request="PLUG",zone="mem0"} 1.0',
        'virtio_mem_requests_total{answer="ERROR",request="STATE",zone="mem0"} 1.0',
        'virtio_mem_connected{zone="mem0"} 1.0',
        "virtio_mem_events_dropped_total 0.0",
    ):
        assert line in lines


def test_without_the_package_metrics_are_501(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(virtio_mem.api, "metrics", raising=False)
    monkeypatch.setitem(sys.modules, "virtio_mem.api.metrics", None)
    answer = rig.get("/metrics")
    assert (answer.status, answer.json["remedy"]) == (501, "pip install prometheus-client")


def test_without_h11_the_error_says_what_to_install() -> None:
    program = "import sys; sys.modules['h11'] = None; import virtio_mem.api.server"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install h11" in done.stderr


def test_stalled_operations_are_judged_by_the_poll(rig: Rig) -> None:
    number = rig.resize(BOOT + BLOCK)
    operation = rig.control.operations._operations[number]
    operation.moved -= STALL_SECONDS
    rig.control.poll(time.monotonic())
    assert rig.operation(number)["verdict"] == "stalled for 10 s: the guest asks for nothing: is its driver loaded?"
