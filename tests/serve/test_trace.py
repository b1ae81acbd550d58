"""`serve --trace`: what a guest asked is in the file once, whatever was killed, and another device can be asked it."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import counts
from tests.conformance.wrong import FAULTS
from tests.peers.processes import wait_until
from tests.serve.killed import Bomb, prepare, world
from tests.serve.rig import ADDR, BLOCK_SIZE, NB_BLOCKS, UNPLUGGED_INACCESSIBLE, Guest, guest, request_for, zone
from tests.serve.supervised import Supervised, supervised
from tests.serve.test_daemon import refused, zone_text
from tests.serve.test_device import served
from tests.serve.test_kills import Killer, random_request
from tests.serve.test_steps import MOVES, dies_in_a_system_reset
from vhost_user.errors import Refused, UsageError
from vhost_user.frontend import Frontend
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.client import Client
from virtio_mem.conformance.replay import Replay, parse_script, replay
from virtio_mem.conformance.target import Target
from virtio_mem.conformance.targets.behind_ring import RingTarget
from virtio_mem.conformance.targets.ours import OurTarget
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.protocol import Request, RequestType, Response, ResponseType
from virtio_mem.serve.files import check_traces, state_memfd
from virtio_mem.serve.intent import ChainKey, Chains
from virtio_mem.serve.plan import ServedZone, ServePlan
from virtio_mem.serve.state import state_size
from virtio_mem.serve.trace import Trace, TracedDevice
from virtio_mem.serve.trace_file import TraceFile
from virtio_mem.service import DeviceService

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType
ACK, NACK, BUSY, ERROR = ResponseType

MakeDevice = Callable[[ServedZone, int], TracedDevice]

STRIDE = 20 // counts.TRACED_STEPS_KILLED_OF_20


def calls(path: Path) -> list[str]:
    """What a reader of the file's sessions gets, in whole lines."""
    text = path.read_text()
    assert text.endswith("\n")
    return [line.partition("#")[0].rstrip() for line in text.splitlines() if not line.startswith("#")]


def requests(path: Path) -> list[str]:
    return [line for line in calls(path) if line.startswith(("plug", "unplug", "state"))]


def words_of(request: Request) -> str:
    if request.type == UNPLUG_ALL:
        return "unplug_all"
    word = {PLUG: "plug", UNPLUG: "unplug", STATE: "state"}[RequestType(request.type)]
    return f"{word} {(request.addr - ADDR) // BLOCK_SIZE} {request.nb_blocks}"


def replayed(path: Path, target: Target) -> list[Replay]:
    with target:
        return [replay(target, script) for script in parse_script(path.read_text())]


def agrees(path: Path, target: Target) -> None:
    """The device gives every answer that is in the file."""
    for again in replayed(path, target):
        assert again.failure == ""
        assert [(one.step, one.now) for one in again.differences] == []
        assert again.replayed


def connect(service: Supervised, machine: Guest) -> Frontend:
    return Frontend.connect(str(service.sockets["mem0"]), features=machine.features, timeout=20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mem0.trace"


@pytest.fixture
def traced(path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeDevice:
    """Makes devices that go on with one trace."""

    def make(what: ServedZone, state_fd: int) -> TracedDevice:
        kept = path.with_suffix(".kept")

        def keep(data: bytes) -> None:
            kept.write_bytes(data)

        return TracedDevice(what, state_fd, TraceFile(path, kept.read_bytes() if kept.exists() else b"", keep))

    for module in ("tests.serve.killed", "tests.serve.test_steps", "tests.serve.test_device"):
        monkeypatch.setattr(f"{module}.MemDevice", make)
    return make


def test_a_session_is_written_down_and_another_device_agrees(path: Path, tmp_path: Path) -> None:
    plan = ServePlan(zones=(zone(hotplugged=8),), api=True, trace=str(tmp_path / "{zone}.trace"))
    with guest() as machine, supervised(plan, tmp_path) as service, connect(service, machine) as frontend:
        machine.start(frontend)
        api = Client(service.api_socket)
        assert machine.ask(frontend, PLUG, 0, 4) is ACK
        assert machine.ask(frontend, PLUG, 3, 2) is ERROR
        service.replace_worker()
        assert machine.ask(frontend, PLUG, 4, 5) is NACK
        assert machine.ask(frontend, STATE, 2, 4) is ACK
        api.resize_zone("mem0", 12 * BLOCK_SIZE)
        assert machine.ask(frontend, PLUG, 4, 5) is ACK
        api.pause()
        service.replace_worker()
        assert machine.ask(frontend, UNPLUG, 0) is BUSY
        api.resume()
        machine.send(request_for(PLUG)._replace(type=77, addr=123), frontend)  # type: ignore[arg-type]
        assert machine.wait(frontend).type is ERROR
        base = frontend.vring(0).stop()
        frontend.status = 0
        service.replace_worker()
        frontend.status = 15
        frontend.vring(0).start(machine.layout, base)
        assert machine.ask(frontend, UNPLUG, 1, 2) is ACK
        api.system_reset()
        assert machine.ask(frontend, UNPLUG_ALL) is ACK
    lines = calls(path)
    sizes = {"region_size": NB_BLOCKS, "block_size": 1, "requested_size": 8}
    assert lines[0] == f"wish {' '.join(f'{name}={n * BLOCK_SIZE}' for name, n in sizes.items())} node_id=none"
    assert [line for line in lines[1:] if not line.startswith("begin")] == [
        "plug 0 4 -> ACK",
        "plug 3 2 -> ERROR",
        "plug 4 5 -> NACK",
        "state 2 4 -> ACK MIXED",
        f"target {12 * BLOCK_SIZE} -> done",
        "plug 4 5 -> ACK",
        "pause on -> done",
        "unplug 0 1 -> BUSY",
        "pause off -> done",
        "ask 77 b-2048+0x7b 1 -> ERROR",
        "device_reset -> done",
        "unplug 1 2 -> ACK",
        "system_reset -> done",
        "unplug_all -> ACK",
        "device_reset -> done",
    ]
    assert [line for line in lines if line.startswith("begin")] == [f"begin -> agreed {machine.features:#x}"] * 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    agrees(path, OurTarget())
    agrees(path, RingTarget("packed"))


@pytest.mark.parametrize("at", range(11, 22, 3))
def test_a_trace_that_begins_with_requests_that_were_granted_together(
    path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """By a process that wrote none, and was killed before the last of them was answered."""
    asked = [(4, 2), (6, 1), (1, 3)]

    def send() -> None:
        for each in asked:
            here.machine.send_typed(here.frontend, PLUG, *each)

    def traced(what: ServedZone, state_fd: int) -> TracedDevice:
        return TracedDevice(what, state_fd, TraceFile(path, b"", lambda _: None))

    with world("split") as here:
        here.next_backend(Bomb(at).arm, send)
        answers = here.answers_until_death(len(asked))
        assert len(answers) < len(asked), "it was killed"
        monkeypatch.setattr("tests.serve.killed.MemDevice", traced)
        here.next_backend()
        answers += here.answers_until_death(len(asked) - len(answers))
        assert [here.machine.took(PLUG, *each, answer) for each, answer in zip(asked, answers, strict=True)] == [
            ACK
        ] * 3
        assert here.machine.ask(here.frontend, STATE, 1, 6) is ACK
    agrees(path, OurTarget())


def test_a_device_that_answers_otherwise_differs_at_its_line(path: Path, traced: MakeDevice) -> None:
    with guest() as machine, served(zone(hotplugged=8)) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0, 8) is ACK
        assert machine.ask(frontend, PLUG, 8) is NACK
        assert machine.ask(frontend, PLUG, 7, 2) is ERROR
    (number,) = (number for number, line in enumerate(path.read_text().splitlines(), 1) if "ERROR" in line)
    (again,) = replayed(path, FAULTS["target-before-blocks"].target())
    assert [(one.step.number, one.step.answer, one.now) for one in again.differences] == [(number, "ERROR", "NACK")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What guests ask from here on."""
    sent: list[Request] = []
    send = Guest.send

    def sending(machine: Guest, request: Request, frontend: Frontend) -> None:
        sent.append(request)
        send(machine, request, frontend)

    monkeypatch.setattr(Guest, "send", sending)
    return sent


@pytest.fixture
def traced_steps(traced: MakeDevice, monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> Iterator[int]:
    """The steps at which devices that write a trace are killed: what is written is one, too."""
    del traced
    arm_others = Bomb.arm

    def arm(bomb: Bomb) -> None:
        arm_others(bomb)
        bomb.before(TraceFile, "write")

    monkeypatch.setattr(Bomb, "arm", arm)
    return itertools.count(rng.randrange(1, STRIDE + 1), STRIDE)


@pytest.mark.parametrize("type_", [*MOVES, STATE], ids=lambda type_: type_.name)
def test_killed_at_each_step_of_a_request(
    type_: RequestType, path: Path, traced_steps: Iterator[int], asked: list[Request]
) -> None:
    block, nb_blocks = MOVES.get(type_, (0, 8))
    block += 4 if type_ is PLUG else 0
    with world("split") as here:
        machine, frontend = here.machine, here.frontend
        for at in traced_steps:
            prepare(machine, frontend)
            here.next_backend(Bomb(at).arm)
            machine.send(request_for(type_, block, nb_blocks), frontend)
            survived = here.answered()
            here.next_backend()
            assert machine.took(type_, block, nb_blocks, machine.wait(frontend)) is ACK
            if survived:
                break
    assert [line.removesuffix(" PLUGGED") for line in requests(path)] == [f"{words_of(one)} -> ACK" for one in asked]
    agrees(path, OurTarget())


def test_killed_at_each_step_of_a_system_reset(path: Path, traced_steps: Iterator[int], asked: list[Request]) -> None:
    with world("split") as here:
        machine, frontend = here.machine, here.frontend
        for at in traced_steps:
            told = dies_in_a_system_reset(here, at)
            for each in range(NB_BLOCKS):
                assert machine.ask(frontend, STATE, each) is ACK
            if told:
                break
    assert len(requests(path)) == len(asked)
    agrees(path, OurTarget())


def test_workers_are_killed_at_moments_that_nobody_chose(
    path: Path, tmp_path: Path, rng: random.Random, asked: list[Request]
) -> None:
    plan = ServePlan(zones=(zone(),), trace=str(path))
    with guest() as machine, supervised(plan, tmp_path) as service, connect(service, machine) as frontend:
        machine.start(frontend)
        killer = Killer(service, rng)
        while killer.kills < counts.TRACED_KILLS:
            type_, block, nb_blocks = random_request(machine, rng)
            machine.send_typed(frontend, type_, block, nb_blocks)
            killer.perhaps()
            assert machine.took(type_, block, nb_blocks, machine.wait(frontend, 20)) is ACK
    assert [line.partition(" -> ")[0] for line in requests(path)] == list(map(words_of, asked))
    agrees(path, RingTarget())


@pytest.mark.parametrize(
    ("type_", "granted", "line"),
    [
        (EffectType.PLUG, False, []),
        (EffectType.PLUG, True, ["plug 2 4 -> ACK"]),
        (EffectType.UNPLUG, False, ["unplug 2 4 -> ACK"]),
        (EffectType.SYSTEM_RESET, False, ["system_reset -> done"]),
    ],
)
def test_a_request_that_never_comes_again(
    type_: EffectType, granted: bool, line: list[str], path: Path, traced: MakeDevice
) -> None:
    """Its front end went with the process that had it in hand, and blocks change all the same."""
    first, nb_blocks = (0, NB_BLOCKS) if type_ is EffectType.SYSTEM_RESET else (2, 4)
    run = Run(BlockIndex(first), nb_blocks)
    with state_memfd("test", state_size(zone().geometry)) as fd:
        device = traced(zone(), fd.fileno())
        effect = Effect(type_, run, HostOffset(first * BLOCK_SIZE), ByteCount(nb_blocks * BLOCK_SIZE))
        chain = ChainKey(3, 7, request_for(PLUG if type_ is EffectType.PLUG else UNPLUG, first, nb_blocks))
        device.state.serving = Chains.of(chain) if type_ is not EffectType.SYSTEM_RESET else None
        device.state.opening(effect)
        if granted:
            device.state.granted(effect)
        device.close()
        for _ in range(3):
            traced(zone(), fd.fileno()).close()
    assert calls(path)[1:] == line


def test_the_same_answer_at_the_same_place_of_the_ring(path: Path) -> None:
    """Once more from the next process it is the same one. After that, or after a reset, it is another."""
    chain, answer, kept = ChainKey(0, 0, request_for(STATE)), Response(ACK), [b""]
    device = VirtioMemDevice(zone().geometry)

    def another() -> Trace:
        made = Trace(TraceFile(path, kept[-1], kept.append), device.geometry)
        made.start(device, None, "mem0")
        return made

    for moves in ("ba", "aa", "rba", "r", "ba"):
        trace = another()
        for move in moves:
            if move == "b":
                trace.begin(1, anew=False)
            elif move == "r":
                trace.device_reset()
            else:
                trace.answered(chain, answer, by_host=False)
        trace.close()
    words = {"begin": "b", "device_reset": "r", "state": "a"}
    assert "".join(words[line.split()[0]] for line in calls(path)[1:]) == "ba" + "a" + "rba" + "r" + "ba"


def test_what_the_host_did_last_is_made_up_for(path: Path, traced: MakeDevice) -> None:
    """A process was killed after the device had changed, and before that was written down."""
    with state_memfd("test", state_size(zone().geometry)) as state:
        for paused, requested_size in ((True, 4 * BLOCK_SIZE), (False, 4 * BLOCK_SIZE), (False, 0)):
            device = traced(zone(), state.fileno())
            (DeviceService.pause if paused else DeviceService.resume)(device.service)
            DeviceService.resize(device.service, requested_size)
            device.close()
        traced(zone(), state.fileno()).close()
        traced(zone(), state.fileno()).close()
    assert calls(path)[1:] == [
        f"target {4 * BLOCK_SIZE} -> done",
        "pause on -> done",
        "pause off -> done",
        "target 0 -> done",
    ]


def test_what_goes_back_empty_and_what_the_host_refuses(path: Path, traced: MakeDevice) -> None:
    with guest() as machine, served(zone()) as here:
        frontend = here.connect(machine.features)
        frontend.regions.share(machine.regions[:1])
        frontend.vring(0).start(machine.layout, 0)
        assert machine.ask(frontend, PLUG, 0) is BUSY, "the region is not shared yet"
        for readable, writable in ((23, 10), (64, 0), (0, 64)):
            parts = [[(0x180000, size)] if size else [] for size in (readable, writable)]
            machine.driver.add(*parts)
            frontend.vring(0).kick.signal()
            wait_until(machine.driver.enable_interrupts, "it comes back")
            assert machine.driver.get_used() is not None
        here.device.service.system_reset()
        with pytest.raises(UsageError):
            here.device.service.resize(1)
        frontend.regions.add(machine.regions[1])
        assert machine.ask(frontend, PLUG, 0) is ACK
    assert [line for line in calls(path)[1:] if not line.startswith("begin")] == [
        "refuse on -> done",
        "plug 0 1 -> BUSY",
        "refuse off -> done",
        f"chain hex={'00' * 23} readable=23 -> 0 bytes: {'a5' * 10}",
        "chain 0 b-2048 0 room= -> 0 bytes:",
        f"chain hex= readable= -> 0 bytes: {'a5' * 10}",
        "refuse on -> done",
        "system_reset -> done",
        "refuse off -> done",
        "target 1 -> refused: requested_size=1: must be a multiple of block_size, 2M; the nearest are 0 and 2097152",
        "plug 0 1 -> ACK",
        "device_reset -> done",
    ]
    agrees(path, RingTarget())


def test_a_driver_that_is_refused(path: Path, traced: MakeDevice) -> None:
    with guest() as machine, served(zone()) as here, pytest.raises(Refused):
        here.connect(machine.features & ~UNPLUGGED_INACCESSIBLE)
    (call,) = calls(path)[1:]
    assert call.startswith("begin 0x")
    assert " -> refused 0x" in call


def test_a_device_that_is_not_new_is_made_by_the_first_lines(path: Path, tmp_path: Path) -> None:
    """The file was renamed, and the service started anew with what it has in its directory."""
    plan = ServePlan(zones=(zone(),), api=True, trace=str(path), state_dir=str(tmp_path))
    with guest() as machine:
        with supervised(plan, tmp_path) as service, connect(service, machine) as frontend:
            machine.start(frontend)
            api = Client(service.api_socket)
            assert machine.ask(frontend, PLUG, 2, 6) is ACK
            assert machine.ask(frontend, UNPLUG, 4, 1) is ACK
            api.resize_zone("mem0", 2 * BLOCK_SIZE)
            path.rename(path.with_suffix(".1"))
            service.replace_worker()
            wait_until(path.exists, "the next worker has begun another file")
            assert machine.ask(frontend, STATE, 0, 4) is ACK
            api.pause()
        for socket in tmp_path.glob("*.sock"):
            socket.unlink()
        with guest() as another, supervised(plan, tmp_path) as service, connect(service, another) as frontend:
            another.start(frontend)
            assert another.ask(frontend, STATE, 2, 2) is ACK
            assert another.ask(frontend, UNPLUG, 2) is BUSY
    first, *others = path.read_text().split("# virtio-mem trace")[1:]
    (again,) = others
    assert "\nbegin\nplug 2 2\nplug 5 3\ndevice_reset -> done\ntarget 4194304 -> done\nbegin -> agreed" in first
    assert "\ntarget 4194304 -> done\npause on -> done\nbegin -> agreed" in again
    agrees(path.with_suffix(".1"), OurTarget())
    agrees(path, OurTarget())


def test_a_file_that_can_not_be_written_to_any_more_ends_the_trace_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a disk that is full."""
    file = os.memfd_create("trace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    plan = ServePlan(zones=(zone(),), trace=f"/proc/{os.getpid()}/fd/{file}")
    with guest() as machine, supervised(plan, tmp_path) as service, connect(service, machine) as frontend:
        machine.start(frontend)
        assert machine.ask(frontend, PLUG, 0) is ACK
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        for block in range(1, 4):
            assert machine.ask(frontend, PLUG, block) is ACK
        service.replace_worker()
        assert machine.ask(frontend, PLUG, 4) is ACK
        machine.check(frontend)
    with open(file, encoding="utf-8") as written:
        assert written.read().splitlines()[-1].startswith("plug 0 1 -> ACK")
    assert capfd.readouterr().err.count("the trace") == 1


def test_a_line_that_was_cut_off_is_written_again(path: Path, traced: MakeDevice) -> None:
    with guest() as machine, served(zone()) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0, 8) is ACK
        kept = path.with_suffix(".kept").read_bytes()
    whole = path.read_text()
    at = whole.index("\nplug ") + 1
    for rest in ("pl", "plug 0 8 -> ACK  # used 0 head 0\nrefuse on -> done\nplug 8"):
        path.write_text(whole[:at] + rest)
        written = TraceFile(path, kept, lambda _: None)
        assert path.read_text() == whole[:at] + rest[: rest.rfind("\n") + 1]
        assert written.tail is not None
        assert (written.tail.refuses, bool(written.tail.asked)) == ("refuse" in rest, "used" in rest)
        written.close()


@pytest.mark.parametrize(
    ("trace", "zones", "message"),
    [
        ("nowhere/trace", ["mem0"], "can't be opened to be written to: No such file or directory"),
        (".", ["mem0"], "can't be opened to be written to: Is a directory"),
        ("trace", ["mem0", "mem1"], "needs {zone} in it, as there are several zones"),
        ("notes", ["mem0"], "is something else than a trace"),
        ("pipe", ["mem0"], "is something else than a trace"),
    ],
)
def test_a_file_that_can_not_be_one(trace: str, zones: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("buy milk\n")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError) as refusal:
        check_traces(str(tmp_path / trace), zones)
    assert (refusal.value.field, refusal.value.limit) == ("--trace", message)
    assert (tmp_path / "notes").read_text() == "buy milk\n"


def test_a_name_of_a_zone_can_be_any(tmp_path: Path) -> None:
    check_traces(str(tmp_path / "a {zone}"), ["../b", "%2e%2e%2fb"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a %252e%252e%252fb", "a %2e%2e%2fb"]


def test_it_is_refused_before_anything_listens(tmp_path: Path) -> None:
    status, said = refused(["--zone", zone_text(tmp_path), "--trace", str(tmp_path)])
    assert (status, "Traceback" in said) == (2, False)
    assert said.startswith(f"virtio-mem serve: --trace={tmp_path}: ")
    assert not list(tmp_path.iterdir())
