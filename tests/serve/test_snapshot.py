"""A service is saved and restored: into a new daemon and new memory, each block's state and content the same."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from tests import counts
from tests.api.rig import Client
from tests.peers.processes import wait_until
from tests.serve.killed import Bomb
from tests.serve.rig import BLOCK_SIZE, FORMS, NB_BLOCKS, Guest, guest, zone
from tests.serve.supervised import Supervised, supervised
from tests.serve.test_steps import steps
from vhost_user.errors import UsageError
from vhost_user.frontend import Frontend
from virtio_mem.cli import main
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.protocol import BlockState, RequestType, ResponseType
from virtio_mem.serve import snapshot as snapshots
from virtio_mem.serve.files import state_file
from virtio_mem.serve.plan import ServePlan
from virtio_mem.serve.state import DeviceState, is_blank, state_size
from virtio_mem.serve.words import Words
from virtio_mem.snapshot import content
from virtio_mem.snapshot.content import Range

saved = import_module("virtio_mem.snapshot.save")  # the package has a function of that name

PLAN = ServePlan(zones=(zone(),), api=True, options="--zone as in the test")
NO_API = ServePlan(zones=(zone(),))


@contextmanager
def front_end(service: Supervised, machine: Guest) -> Iterator[Frontend]:
    with Frontend.connect(str(service.sockets["mem0"]), features=machine.features, timeout=20) as frontend:
        machine.start(frontend)
        yield frontend


def put(service: Supervised, path: str, body: object = None) -> int:
    return Client(str(service.api_socket)).ask("PUT", f"/api/v1/{path}", body).status


def save(service: Supervised, directory: Path) -> int:
    return put(service, "vm.snapshot", {"destination_url": f"file://{directory}"})


@pytest.fixture
def snapshot(tmp_path: Path, rng: random.Random) -> Path:
    """Of a service whose guest has plugged some blocks, and written to them; `plugged` beside it says which."""
    with guest() as machine, supervised(PLAN, tmp_path) as service, front_end(service, machine) as frontend:
        for block in rng.sample(range(NB_BLOCKS), 9):
            assert machine.ask(frontend, RequestType.PLUG, block) is ResponseType.ACK
        assert save(service, tmp_path / "snapshot") == 400, "it is not paused"
        assert put(service, "vm.pause") == 204
        assert machine.ask(frontend, RequestType.UNPLUG_ALL) is ResponseType.BUSY
        assert save(service, tmp_path / "snapshot") == 204
        assert save(service, tmp_path / "snapshot") == 400, "it is there already"
        for block, pattern in machine.plugged.items():
            (tmp_path / f"plugged-{block}").write_bytes(pattern)
    return tmp_path / "snapshot"


def remember(machine: Guest, snapshot: Path) -> None:
    """A new guest that knows what the old one knew."""
    machine.plugged = {
        int(path.name.removeprefix("plugged-")): path.read_bytes() for path in snapshot.parent.glob("plugged-*")
    }


@pytest.mark.parametrize("form", FORMS[: counts.RINGS_TRIED_AT_LENGTH])
@pytest.mark.parametrize("deaths", [0, 3])
def test_a_new_daemon_and_new_memory_are_as_the_old_ones(
    form: str, deaths: int, snapshot: Path, tmp_path: Path
) -> None:
    with guest(form) as machine, supervised(PLAN, tmp_path, snapshot) as service:
        for _ in range(deaths):
            service.replace_worker()
        with front_end(service, machine) as frontend:
            remember(machine, snapshot)
            assert len(machine.plugged) == 9
            machine.check(frontend)
            assert machine.ask(frontend, RequestType.UNPLUG_ALL) is ResponseType.BUSY
            service.replace_worker()
            assert put(service, "vm.resume") == 204
            for block in range(NB_BLOCKS):
                machine.send_typed(frontend, RequestType.STATE, block)
                expected = BlockState.PLUGGED if block in machine.plugged else BlockState.UNPLUGGED
                assert machine.wait(frontend).state is expected
            machine.check(frontend)
            # Written once: a worker that comes later leaves what the guest writes meanwhile.
            block = next(iter(machine.plugged))
            assert machine.ask(frontend, RequestType.UNPLUG, block) is ResponseType.ACK
            service.replace_worker()
            machine.check(frontend)


@contextmanager
def on_file(path: Path) -> Iterator[Guest]:
    machine = Guest(fd=os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    try:
        yield machine
    finally:
        machine.close()


def test_a_file_of_the_front_ends_is_known_again(tmp_path: Path) -> None:
    """It has the content: another one, whatever is in it, is as good as no memory."""
    here, there, saved_to = tmp_path / "here", tmp_path / "there", tmp_path / "saved"
    with on_file(here) as machine, supervised(PLAN, tmp_path) as service, front_end(service, machine) as frontend:
        assert machine.ask(frontend, RequestType.PLUG, 3) is ResponseType.ACK
        assert put(service, "vm.pause") == 204
        assert save(service, saved_to) == 204
        plugged = machine.plugged
    assert not (saved_to / "mem0.hotplug").exists()
    there.write_bytes(here.read_bytes())
    with supervised(PLAN, tmp_path, saved_to) as service:
        assert put(service, "vm.resume") == 204
        for path, answer in ((there, ResponseType.BUSY), (here, ResponseType.ACK)):
            with on_file(path) as machine, front_end(service, machine) as frontend:
                machine.plugged = dict(plugged)
                assert machine.config(frontend).plugged_size == BLOCK_SIZE
                assert machine.ask(frontend, RequestType.PLUG, 5) is answer
                if answer is ResponseType.ACK:
                    machine.check(frontend)


def test_a_machine_that_is_reset_before_its_file_is_there_leaves_nothing_of_it(tmp_path: Path) -> None:
    """It has the content of the old machine; another file is its own."""
    here, there, saved_to = tmp_path / "here", tmp_path / "there", tmp_path / "saved"
    with on_file(here) as machine, supervised(PLAN, tmp_path) as service, front_end(service, machine) as frontend:
        assert machine.ask(frontend, RequestType.PLUG, 3) is ResponseType.ACK
        assert put(service, "vm.pause") == 204
        assert save(service, saved_to) == 204
    there.write_bytes(here.read_bytes())
    for path, held in ((there, BLOCK_SIZE), (here, 0)):
        with supervised(PLAN, tmp_path, saved_to) as service:
            assert put(service, "vm.resume") == 204
            assert put(service, "system-reset") == 204
            with on_file(path) as machine, front_end(service, machine) as frontend:
                assert machine.config(frontend).plugged_size == 0
                assert (machine.held(3) > 0) == (held > 0)


def test_memory_that_the_front_end_does_not_have_is_waited_for(snapshot: Path, tmp_path: Path) -> None:
    with guest() as machine, supervised(PLAN, tmp_path, snapshot) as service:
        with Frontend.connect(str(service.sockets["mem0"]), features=machine.features, timeout=20) as frontend:
            frontend.regions.share(machine.regions[:1])
            assert machine.held(0, NB_BLOCKS) == 0
        with front_end(service, machine) as frontend:
            remember(machine, snapshot)
            machine.check(frontend)


def test_a_machine_that_is_reset_before_its_memory_is_there_begins_empty(snapshot: Path, tmp_path: Path) -> None:
    with supervised(PLAN, tmp_path, snapshot) as service:
        assert put(service, "vm.resume") == 204
        assert put(service, "system-reset") == 204
        for _ in range(2):  # what is plugged in the first memory is nothing that the snapshot is to be written over
            with guest() as machine, front_end(service, machine) as frontend:
                assert machine.ask(frontend, RequestType.UNPLUG_ALL) is ResponseType.ACK
                for block in range(NB_BLOCKS):
                    assert machine.ask(frontend, RequestType.PLUG, block) is ResponseType.ACK
                machine.check(frontend)


def test_the_state_directory_has_it_from_then_on(snapshot: Path, tmp_path: Path) -> None:
    states = tmp_path / "states"
    states.mkdir()
    plan = ServePlan(zones=(zone(),), state_dir=str(states))
    with guest() as machine, supervised(plan, tmp_path, snapshot) as service, front_end(service, machine) as frontend:
        remember(machine, snapshot)
        machine.check(frontend)
    with guest() as machine, supervised(plan, tmp_path) as service, front_end(service, machine) as frontend:
        assert machine.config(frontend).plugged_size == 9 * BLOCK_SIZE


def test_the_device_answers_while_its_memory_is_saved(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with the front end gone, and another's memory in the place of what is saved."""
    saving, go_on = tmp_path / "saving", tmp_path / "go-on"
    write_content: Callable[[HostMemory, Iterable[Range], int], str] = saved.write_content

    def slow(memory: HostMemory, ranges: Iterable[Range], fd: int) -> str:
        saving.touch()
        wait_until(go_on.exists, "it may go on")
        return write_content(memory, ranges, fd)

    monkeypatch.setattr(saved, "write_content", slow)
    copy = tmp_path / "copy"
    with (
        guest() as machine,
        guest() as other,
        supervised(PLAN, tmp_path, snapshot) as service,
        front_end(service, machine) as frontend,
        ThreadPoolExecutor() as pool,
    ):
        remember(machine, snapshot)
        machine.check(frontend)
        status = pool.submit(save, service, copy)
        try:
            wait_until(saving.exists, "it is saved")
            machine.check(frontend)
            assert machine.ask(frontend, RequestType.UNPLUG_ALL) is ResponseType.BUSY
            frontend.close()
            with front_end(service, other) as successor:
                assert other.config(successor).plugged_size == 9 * BLOCK_SIZE
        finally:
            go_on.touch()
        assert status.result(20) == 204
    for name in ("mem0.hotplug", "mem0.blocks", "snapshot.json"):
        assert (copy / name).read_bytes() == (snapshot / name).read_bytes()


def test_memory_that_is_truncated_while_it_is_restored(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs the front end its memory, and no worker. The next one gets all."""
    populate = content.populate

    def truncated(memory: HostMemory, wanted: Range) -> None:
        populate(memory, wanted)
        if wanted.size == content.CHUNK and os.fstat(memory.backing.fd).st_ino == inode:
            os.ftruncate(memory.backing.fd, 0)

    monkeypatch.setattr(content, "populate", truncated)
    with guest() as machine, guest() as other:
        inode = os.fstat(machine.fd).st_ino
        with supervised(PLAN, tmp_path, snapshot) as service:
            worker = service.worker()
            with front_end(service, machine) as frontend:
                assert put(service, "vm.resume") == 204
                assert machine.ask(frontend, RequestType.UNPLUG_ALL) is ResponseType.BUSY
            with front_end(service, other) as frontend:
                remember(other, snapshot)
                other.check(frontend)
            assert service.worker() == worker


@pytest.mark.parametrize("name", ["snapshot.json", "mem0.hotplug", "mem0.blocks"])
def test_a_snapshot_that_was_cut_is_refused_before_anybody_listens(
    name: str, snapshot: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    os.truncate(snapshot / name, (snapshot / name).stat().st_size // 2)
    status = _serve(tmp_path, snapshot, f"hotplug_size={NB_BLOCKS * BLOCK_SIZE}")
    assert status == 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_snapshot_of_another_zone_is_refused(
    snapshot: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _serve(tmp_path, snapshot, f"hotplug_size={2 * NB_BLOCKS * BLOCK_SIZE}") == 2
    said = capfd.readouterr().err
    assert "size=33554432: has to be 67108864, as --zone says; give the same --zone options\n" in said
    assert _serve(tmp_path, snapshot, f"hotplug_size={NB_BLOCKS * BLOCK_SIZE},guest_numa_id=1") == 2
    assert "node_id=None: has to be 1, as the options say; give the options that it was" in capfd.readouterr().err


def _serve(tmp_path: Path, snapshot: Path, more: str) -> int:
    """The command's status: it must refuse."""
    option = f"id=mem0,socket={tmp_path / 'mem0.sock'},addr=4G,{more}"
    return main(["serve", "--zone", option, "--restore", str(snapshot)])


def prepare(snapshot: Path, plan: ServePlan) -> None:
    """As `serve --restore` does, and no more."""
    for prepared in snapshots.prepare(snapshot, plan):
        prepared.state.close()
        if prepared.content is not None:
            prepared.content.close()


def test_a_state_directory_with_states_is_refused(snapshot: Path, tmp_path: Path) -> None:
    plan = ServePlan(zones=(zone(),), state_dir=str(tmp_path))
    prepare(snapshot, plan)
    with closing(in_directory(tmp_path)) as state:
        state.restored()
    before = (tmp_path / "mem0.state").read_bytes()
    with pytest.raises(UsageError, match="has a state of the zone"):
        prepare(snapshot, plan)
    assert (tmp_path / "mem0.state").read_bytes() == before


def in_directory(directory: Path) -> DeviceState:
    with state_file(directory, "mem0", state_size(zone().geometry)) as fd:
        return DeviceState(fd.fileno(), zone().geometry, requested_size=0)


def test_a_service_that_ends_before_memory_is_there_restores_when_it_is_told_to_again(
    snapshot: Path, tmp_path: Path
) -> None:
    states = tmp_path / "states"
    states.mkdir()
    plan = ServePlan(zones=(zone(),), state_dir=str(states))
    for _ in range(2):
        with supervised(plan, tmp_path, snapshot) as service:
            service.replace_worker()
        with closing(in_directory(states)) as state:
            assert state.unrestored
            assert state.device.plugged_size == 9 * BLOCK_SIZE
    with guest() as machine:
        with supervised(plan, tmp_path, snapshot) as service, front_end(service, machine) as frontend:
            remember(machine, snapshot)
            machine.check(frontend)
        with supervised(plan, tmp_path) as service, front_end(service, machine) as frontend:
            machine.check(frontend)


def test_plugged_blocks_without_their_content_are_not_served(
    snapshot: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    states = tmp_path / "states"
    states.mkdir()
    prepare(snapshot, ServePlan(zones=(zone(),), state_dir=str(states)))
    before = (states / "mem0.state").read_bytes()
    option = f"id=mem0,socket={tmp_path / 'mem0.sock'},addr=4G,hotplug_size={NB_BLOCKS * BLOCK_SIZE}"
    assert main(["serve", "--zone", option, "--state-dir", str(states)]) == 2
    assert "zone mem0 content=missing: has still to be restored" in capfd.readouterr().err
    assert (states / "mem0.state").read_bytes() == before


def test_a_machine_that_was_reset_before_its_memory_was_there_is_served_without_the_snapshot(
    snapshot: Path, tmp_path: Path
) -> None:
    states = tmp_path / "states"
    states.mkdir()
    plan = replace(PLAN, state_dir=str(states))
    with supervised(plan, tmp_path, snapshot) as service:
        assert put(service, "vm.resume") == 204
        assert put(service, "system-reset") == 204
    for plugged in ({}, {3: b""}):
        with guest() as machine, supervised(plan, tmp_path) as service, front_end(service, machine) as frontend:
            assert machine.config(frontend).plugged_size == len(plugged) * BLOCK_SIZE
            assert machine.ask(frontend, RequestType.UNPLUG_ALL) is ResponseType.ACK
            assert machine.ask(frontend, RequestType.PLUG, 3) is ResponseType.ACK


@pytest.mark.parametrize("first", [0, 1])
def test_one_zone_is_restored_and_the_other_is_not(first: int, snapshot: Path, tmp_path: Path) -> None:
    """Each has a VMM of its own, and the service ends between them. Then the second is, and the first stays."""
    states = tmp_path / "states"
    states.mkdir()
    plan = ServePlan(zones=(zone(), replace(zone(), id="mem1")), state_dir=str(states), api=True)
    both = of_two_zones(snapshot, tmp_path / "both")
    with guest() as machine, guest() as other:
        for run, each in enumerate((machine, other)):
            with supervised(plan, tmp_path, both) as service:
                path = service.sockets[f"mem{first ^ run}"]
                with Frontend.connect(str(path), features=each.features, timeout=20) as frontend:
                    each.start(frontend)
                    remember(each, snapshot)
                    each.check(frontend)
                    if run == 0:
                        assert put(service, "vm.resume") == 204
                        assert each.ask(frontend, RequestType.UNPLUG_ALL) is ResponseType.ACK
        with supervised(plan, tmp_path) as service:
            for run, each in enumerate((machine, other)):
                path = service.sockets[f"mem{first ^ run}"]
                with Frontend.connect(str(path), features=each.features, timeout=20) as frontend:
                    each.start(frontend)
                    each.check(frontend)


def test_killed_while_states_are_made(snapshot: Path, tmp_path: Path, rng: random.Random) -> None:
    """There is none yet, or one that says that its content is missing."""
    for at in steps(rng):
        states = tmp_path / f"states-{at}"
        states.mkdir()
        plan = ServePlan(zones=(zone(),), state_dir=str(states))
        pid = os.fork()
        if pid == 0:
            try:
                Bomb(at).before(Words, "__setitem__")
                prepare(snapshot, plan)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        with state_file(states, "mem0", state_size(zone().geometry)) as file:
            blank = is_blank(file.fileno())
        if not blank:
            with closing(in_directory(states)) as state:
                assert state.unrestored
                assert state.device.paused
                assert state.device.plugged_size == 9 * BLOCK_SIZE
        prepare(snapshot, plan)
        if not os.WIFSIGNALED(status):
            break
        assert blank
    assert at > 20


def test_nothing_is_made_beside_what_is_refused(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not for a moment, in which it may be killed, and be taken for begun by the next one."""
    states, both = tmp_path / "states", of_two_zones(snapshot, tmp_path / "both")
    states.mkdir()
    prepare(snapshot, ServePlan(zones=(zone(),), state_dir=str(states)))
    with closing(in_directory(states)) as state:
        state.restored()
    (states / "mem0.state").rename(states / "mem1.state")
    plan = ServePlan(zones=(zone(), replace(zone(), id="mem1")), state_dir=str(states))
    monkeypatch.setattr(snapshots, "make_blank", lambda _: pytest.fail("a state was made"))
    with pytest.raises(UsageError, match="has a state of the zone mem1"):
        prepare(both, plan)
    assert [path.name for path in states.iterdir()] == ["mem1.state"]


def of_two_zones(snapshot: Path, both: Path) -> Path:
    """A snapshot of two zones, each of which is as that of the one."""
    shutil.copytree(snapshot, both)
    manifest = json.loads((both / "snapshot.json").read_text())
    manifest["zones"].append(manifest["zones"][0] | {"id": "mem1"})
    (both / "snapshot.json").write_text(json.dumps(manifest))
    for part in ("blocks", "hotplug"):
        shutil.copy(both / f"mem0.{part}", both / f"mem1.{part}")
    return both


def test_what_is_refused_leaves_no_state(snapshot: Path, tmp_path: Path) -> None:
    """Of no zone, whichever is wrong, and whenever that is found."""
    states, both = tmp_path / "states", of_two_zones(snapshot, tmp_path / "both")
    states.mkdir()
    plan = ServePlan(zones=(zone(), replace(zone(), id="mem1")), state_dir=str(states))
    content, good = both / "mem1.hotplug", (both / "mem1.hotplug").read_bytes()
    content.write_bytes(good[::-1])
    with pytest.raises(UsageError, match="zone mem1 content"):
        prepare(both, plan)
    assert list(states.iterdir()) == []
    content.write_bytes(good)
    (states / "mem1.state").write_bytes(b"another's")
    with pytest.raises(UsageError, match="zone mem1 state size"):
        prepare(both, plan)
    assert [path.name for path in states.iterdir()] == ["mem1.state"]
    (states / "mem1.state").unlink()
    prepare(both, plan)
    assert sorted(path.name for path in states.iterdir()) == ["mem0.state", "mem1.state"]
