"""A request that was granted, and whose answer its driver did not get: it comes again, and is answered ACK.

So it is for the next process, and so for the same one, where it is the ring that broke or that owes an answer.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.backend.rig import DATA, Ram
from tests.iotlb.rig import FEATURES, PAGE, Behind
from tests.peers.processes import wait_until
from tests.rings.answerer import PythonAnswerer, VuAnswer
from tests.serve.rig import (
    ADDR,
    BLOCK_SIZE,
    FORMS,
    NB_BLOCKS,
    RING_SIZE,
    UNPLUGGED_INACCESSIBLE,
    Guest,
    guest,
    request_for,
    zone,
)
from vhost_user.backend import Endpoint, Server
from vhost_user.backend.batches import RingBatches
from vhost_user.connection import Connection
from vhost_user.errors import FieldError, HostError
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.message import VIRTIO_F_IOMMU_PLATFORM
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import Effect, EffectType
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, RequestType, Response, ResponseType
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_memfd
from virtio_mem.serve.intent import ChainKey, Chains
from virtio_mem.serve.state import DeviceState, state_size
from virtio_mem.serve.trace import TracedDevice
from virtio_mem.serve.trace_file import TraceFile
from virtio_mem.serve.words import Words
from virtio_mem.service import Section

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType
ACK, NACK, BUSY, ERROR = ResponseType
ZONE = zone()


class Translated(MemDevice):
    """Behind an IOMMU."""

    def __init__(self, state: OwnedFd) -> None:
        super().__init__(ZONE, state.fileno())
        self.features |= VIRTIO_F_IOMMU_PLATFORM


class AtOnce:
    """A listener that does something as soon as memory comes: after the record, before the answer."""

    def __init__(self, device: MemDevice, act: Callable[[], object]) -> None:
        self._device, self._act = device, act
        device.service.listeners.append(self)

    def plugged(self, section: Section) -> None:
        del section
        self._device.service.listeners.remove(self)
        self._act()

    def unplugging(self, section: Section) -> None:
        del section


@pytest.fixture
def state() -> Iterator[OwnedFd]:
    with state_memfd("test", state_size(ZONE.geometry)) as fd:
        yield fd


@contextmanager
def served(device: MemDevice) -> Iterator[tuple[Server, Connection]]:
    """The device in a server's thread, and the way to it."""
    try:
        with Server() as server:
            ours, theirs = socket.socketpair()
            device.endpoint = server.serve(theirs, device)
            with server.in_thread():
                yield server, Connection(ours)
    finally:
        device.close()


def wait_for_end(device: MemDevice) -> Endpoint:
    """Until the session has ended."""
    endpoint = device.endpoint
    assert endpoint is not None
    wait_until(lambda: not endpoint.connected, "the session has ended")
    return endpoint


def connect_again(device: MemDevice, server: Server) -> Connection:
    """Another connection, once the one before is gone."""
    endpoint = wait_for_end(device)
    ours, theirs = socket.socketpair()
    server.loop.call_soon(lambda: endpoint.serve(theirs))
    return Connection(ours)


def answers(device: MemDevice) -> dict[tuple[str, str], int]:
    return dict(device.service.answers)


def before_give(device: MemDevice, act: Callable[[], None], turn: int = 1) -> None:
    """Do something once, between the decision on what the ring has next, or the record of it, and its answer; or where
    requests are answered one behind the other, at that `turn`."""
    turns = iter(range(1, turn + 1))
    give, answering = device._give, device.device.answering

    def look() -> None:
        if next(turns, None) == turn:
            act()

    def act_and_give(batches: RingBatches, end: int) -> None:
        look()
        give(batches, end)

    def answer_and_act(*arguments: int) -> int:
        answered: int = VuAnswer(answering()[0])(*arguments)
        if answered:
            look()
        return answered

    device._give = act_and_give  # type: ignore[method-assign]
    core = PythonAnswerer(answer_and_act, answering()[1])
    device.device.answering = lambda: core.address  # type: ignore[method-assign]
    device._batches = None


class Losing:
    """A guest whose ring's memory is gone just before an answer is to be there, and is there again afterwards."""

    def __init__(self, machine: Guest, make: Callable[[], MemDevice], stack: ExitStack) -> None:
        self.machine = machine
        self._make, self._stack = make, stack
        self._content: list[bytes] = []
        self._way: Connection | None = None
        self.device = make()
        self._server, way = stack.enter_context(served(self.device))
        self.frontend = Frontend(way, features=machine.features)
        self.frontend.track_inflight(1, RING_SIZE)
        machine.start(self.frontend)
        machine.until_asleep(self.frontend)

    def next_process(self) -> None:
        """What is in it: another device with the state of the one before."""
        self.device = self._make()
        self._server, self._way = self._stack.enter_context(served(self.device))

    def lose(self, turn: int = 1) -> None:
        """The next answer can't be given, or the one at that turn, and the session ends."""
        before_give(self.device, self._truncate, turn)

    def _truncate(self) -> None:
        self._content.append(os.pread(self.machine.ram.fd, self.machine.ram.region.size, 0))
        os.ftruncate(self.machine.ram.fd, 0)

    def come_again(self) -> None:
        """After an answer was lost, and its session. Another one may be before the next session is set up."""
        if self._way is None:
            wait_for_end(self.device)
        os.ftruncate(self.machine.ram.fd, self.machine.ram.region.size)
        os.pwrite(self.machine.ram.fd, self._content.pop(), 0)
        with suppress(FieldError):
            self.frontend.reconnect(self._way or connect_again(self.device, self._server))
        self._way = None


WAYS = pytest.mark.parametrize("prefault", [True, False], ids=["step by step", "at once"])


@pytest.mark.parametrize("form", FORMS)
@WAYS
@pytest.mark.parametrize("lost_again", ["never", "here", "in the next process"])
def test_a_ring_whose_memory_is_gone_for_a_while(form: str, prefault: bool, lost_again: str, state: OwnedFd) -> None:
    with guest(form) as machine, ExitStack() as stack:
        here = Losing(machine, lambda: MemDevice(zone(prefault=prefault), state.fileno()), stack)
        here.lose()
        machine.send_typed(here.frontend, PLUG, 2, 3)
        if lost_again != "never":
            wait_for_end(here.device)
            if lost_again == "in the next process":
                here.next_process()
            here.lose()
            here.come_again()
        here.come_again()
        assert machine.took(PLUG, 2, 3, machine.wait(here.frontend)) is ACK
        machine.check(here.frontend, prefault=prefault)
        assert answers(here.device) == {("PLUG", "ACK"): 1}
        assert machine.ask(here.frontend, PLUG, 2) is ERROR, "which is no second answer to the same request"
        assert here.device.state.intent is None
        here.frontend.close()


@pytest.mark.parametrize("form", FORMS)
@WAYS
def test_a_plug_is_done_with_when_what_comes_behind_it_is_lost(form: str, prefault: bool, state: OwnedFd) -> None:
    """Another driver's first request may be in the same place of its ring: its blocks are plugged already."""
    with guest(form) as machine, ExitStack() as stack:
        here = Losing(machine, lambda: MemDevice(zone(prefault=prefault), state.fileno()), stack)
        here.lose(turn=2)
        with here.device.service.lock:  # both are taken from the ring together
            for type_ in (PLUG, STATE):
                machine.send_typed(here.frontend, type_, 2, 3)
        wait_for_end(here.device)
        assert here.device.state.intent is None
        with (
            guest(form) as another,
            Frontend(connect_again(here.device, here._server), features=machine.features) as way,
        ):
            another.start(way)
            assert another.ask(way, PLUG, 2, 3) is ERROR
        here.frontend.close()


def test_an_answer_that_was_lost_is_in_the_trace_once(state: OwnedFd, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with guest() as machine, ExitStack() as stack:
        here = Losing(machine, lambda: TracedDevice(ZONE, state.fileno(), TraceFile(path, b"", lambda _: None)), stack)
        here.lose()
        machine.send_typed(here.frontend, PLUG, 2, 3)
        here.come_again()
        assert machine.wait(here.frontend).type is ACK
        assert machine.ask(here.frontend, PLUG, 2) is ERROR
        here.frontend.close()
    lines = path.read_text().splitlines()
    assert [line.partition("  #")[0] for line in lines if line.startswith("plug")] == [
        "plug 2 3 -> ACK",
        "plug 2 1 -> ERROR",
    ]


class Pages:
    """A guest behind an IOMMU, its ring and its requests."""

    def __init__(self, connection: Connection, machine: Guest, form: str) -> None:
        self.ram = Ram()
        self.frontend = Frontend(connection, features=FEATURES[form] | UNPLUGGED_INACCESSIBLE)
        zone = SharedRegion(ADDR, machine.size, machine.fd, user_address=UserAddress(1 << 45))
        self.frontend.regions.share([self.ram.region, zone])
        self.frontend.track_inflight(1, RING_SIZE)
        self.behind = Behind(self.frontend, self.ram)
        self.ring = self.behind.ready()

    def send(self, block: int, nb_blocks: int = 1) -> GuestAddress:
        """Where its answer will be."""
        request = GuestAddress(DATA + block * 0x1000)
        answer = GuestAddress(request + 64)
        self.behind.memory.write(request, request_for(PLUG, block, nb_blocks).encode())
        self.ring.driver.add([(request, REQUEST_SIZE)], [(answer, RESPONSE_SIZE)])
        self.ring.vring.kick.signal()
        return answer

    def answered(self, answer: GuestAddress) -> ResponseType:
        """Look after the channel until it is there."""
        self.behind.until(lambda: self.ring.driver.get_used() is not None)
        return Response.decode(self.behind.memory.read(answer, RESPONSE_SIZE)).type

    def close(self) -> None:
        self.frontend.close()
        self.behind.memory.replace(())
        self.ram.close()


@contextmanager
def owed(form: str, device: MemDevice) -> Iterator[tuple[Server, Pages, GuestAddress]]:
    """A PLUG that was granted, and whose answer the ring owes: it lost its translation meanwhile."""
    with guest() as machine, served(device) as (server, connection):
        here = Pages(connection, machine, form)

        def lose_ring() -> None:
            assert device.endpoint is not None
            assert device.endpoint.link is not None
            device.endpoint.link.session.negotiated.iotlb.invalidate(GuestAddress(0), ByteCount(2 * PAGE))

        AtOnce(device, lose_ring)
        answer = here.send(2, 3)
        here.behind.until(lambda: bool(answers(device)))
        with device.service.lock:  # it is given back under it
            assert device.state.intent is not None
        try:
            yield server, here, answer
        finally:
            here.close()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_owed_behind_an_iommu_is_given_back(form: str, state: OwnedFd) -> None:
    device = Translated(state)
    with owed(form, device) as (_, here, answer):
        assert here.answered(answer) is ACK
        assert here.answered(here.send(5)) is ACK
        assert here.answered(here.send(5)) is ERROR
        assert answers(device) == {("PLUG", "ACK"): 2, ("PLUG", "ERROR"): 1}
        assert device.state.intent is None


@pytest.mark.parametrize("form", FORMS)
def test_what_is_owed_behind_an_iommu_comes_again_to_a_ring_that_is_started_again(form: str, state: OwnedFd) -> None:
    device = Translated(state)
    with owed(form, device) as (_, here, answer):
        here.ring.vring.start(here.ring.layout, here.ring.vring.stop())
        assert here.answered(answer) is ACK
        assert answers(device) == {("PLUG", "ACK"): 1}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_owed_behind_an_iommu_comes_again_to_the_next_process(form: str, state: OwnedFd) -> None:
    """Which has the state as this one left it."""
    before = Translated(state)
    with owed(form, before) as (_, here, answer), served(Translated(state)) as (_, connection):
        here.frontend.reconnect(connection)
        assert here.answered(answer) is ACK


# A system reset that is refused.


def opened(state: OwnedFd, *, granted: bool, head: int = 0) -> None:
    """What a process leaves that is killed within a PLUG of the blocks 2 to 4."""
    before = DeviceState(state.fileno(), ZONE.geometry, requested_size=ZONE.hotplugged_size)
    before.serving = Chains.of(ChainKey(head, 0, request_for(PLUG, 2, 3)))
    before.opening(PLUGGED)
    if granted:
        before.granted(PLUGGED)
    before.close()


def test_after_a_system_reset_that_is_refused_what_was_opened_is_still_given_back(state: OwnedFd) -> None:
    opened(state, granted=False)
    device = MemDevice(ZONE, state.fileno())
    with guest() as machine, served(device) as (_, connection):
        os.pwrite(machine.fd, bytes(3 * BLOCK_SIZE), 2 * BLOCK_SIZE)
        with Frontend(connection, features=machine.features) as frontend:
            assert not device.service.system_reset(), "there is no memory to give back"
            assert machine.held(2, 3) == 3 * BLOCK_SIZE
            machine.start(frontend)
            machine.check(frontend)
            assert device.state.intent is None


@pytest.mark.parametrize("form", FORMS)
def test_after_a_system_reset_that_is_refused_what_was_granted_is_still_answered(
    form: str, state: OwnedFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise HostError("discard", "all", "refused")

    device = Translated(state)
    with owed(form, device) as (_, here, answer):
        with monkeypatch.context() as patch:
            patch.setattr(device.memory, "discard", refuse)
            assert not device.service.system_reset()
        here.ring.vring.start(here.ring.layout, here.ring.vring.stop())
        assert here.answered(answer) is ACK


@pytest.mark.parametrize("granted", [False, True], ids=["open", "granted"])
def test_the_record_outlives_a_refusal_for_the_next_process_too(granted: bool, state: OwnedFd) -> None:
    opened(state, granted=granted)
    require_that_it_outlives(state)


def test_so_does_the_record_of_another_system_reset(state: OwnedFd) -> None:
    before = DeviceState(state.fileno(), ZONE.geometry, requested_size=ZONE.hotplugged_size)
    before.opening(RESET)
    before.close()
    require_that_it_outlives(state)


def test_a_system_reset_that_is_granted_leaves_nothing_of_the_record_before_it(state: OwnedFd) -> None:
    opened(state, granted=True)
    found = DeviceState(state.fileno(), ZONE.geometry, requested_size=ZONE.hotplugged_size)
    found.opening(RESET)
    found.granted(RESET)
    found.done()
    found.opening(PLUGGED)  # which is refused
    found.done()
    assert found.intent is None
    found.close()
    again = DeviceState(state.fileno(), ZONE.geometry, requested_size=ZONE.hotplugged_size)
    assert again.intent is None
    again.close()


@pytest.mark.parametrize("reset", [False, True], ids=["no reset", "reset"])
def test_what_was_granted_before_a_system_reset_is_served_afresh(state: OwnedFd, reset: bool) -> None:
    """The chain is in the ring still, and its blocks are unplugged: ACK has to mean that they are plugged."""
    opened(state, granted=True, head=RING_SIZE - 2)
    found = MemDevice(ZONE, state.fileno())
    if reset:
        for step in (found.state.opening, found.state.granted):
            step(RESET)
        found.device.finish(RESET.type, RESET.run)
        found.state.changed()
        found.state.done()
    found.close()
    device = MemDevice(ZONE, state.fileno())
    assert device.device.plugged_size == (0 if reset else 3 * BLOCK_SIZE)
    with (
        guest() as machine,
        served(device) as (_, connection),
        Frontend(connection, features=machine.features) as frontend,
    ):
        machine.start(frontend)
        assert machine.ask(frontend, PLUG, 2, 3) is ACK
        assert device.device.plugged_size == 3 * BLOCK_SIZE


@pytest.mark.parametrize("granted", [False, True], ids=["open", "granted"])
@pytest.mark.parametrize("reset_granted", [False, True], ids=["reset-refused", "reset-granted"])
def test_killed_at_each_step_of_a_system_reset_over_a_record(
    granted: bool, reset_granted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is the record, or the reset that is to be finished; nothing is there only after a reset was granted."""
    left = []
    for steps in itertools.count():
        with state_memfd("test", state_size(ZONE.geometry)) as state:
            opened(state, granted=granted)
            found = DeviceState(state.fileno(), ZONE.geometry, requested_size=ZONE.hotplugged_size)
            before = found.intent
            with monkeypatch.context() as patch:
                killed = killed_after(patch, steps)
                with suppress(KeyboardInterrupt):
                    found.opening(RESET)
                    if reset_granted:
                        found.granted(RESET)
                    found.done()
            found.close()
            again = DeviceState(state.fileno(), ZONE.geometry, requested_size=ZONE.hotplugged_size)
            left.append(again.interrupted)
            again.close()
        if not killed():
            break
    assert left.pop() == (None if reset_granted else before)
    began = next(step for step, intent in enumerate(left) if intent != before)
    assert began > 0
    assert {intent and intent.type for intent in left[began:]} == {EffectType.SYSTEM_RESET}


def killed_after(patch: pytest.MonkeyPatch, steps: int) -> Callable[[], bool]:
    """After so many stores to a state there are no more. Whether there was one more to come."""
    stores = 0

    def before(method: Callable[..., None]) -> Callable[..., None]:
        def count(*arguments: object) -> None:
            nonlocal stores
            stores += 1
            if stores > steps:
                raise KeyboardInterrupt
            method(*arguments)

        return count

    for name in ("__setitem__", "put"):
        patch.setattr(Words, name, before(getattr(Words, name)))
    return lambda: stores > steps


PLUGGED = Effect(EffectType.PLUG, Run(BlockIndex(2), 3), HostOffset(2 * BLOCK_SIZE), ByteCount(3 * BLOCK_SIZE))
RESET = Effect(EffectType.SYSTEM_RESET, Run(BlockIndex(0), NB_BLOCKS), HostOffset(0), ZONE.hotplug_size)


def require_that_it_outlives(state: OwnedFd) -> None:
    left = []
    for _ in range(2):
        found = DeviceState(state.fileno(), ZONE.geometry, requested_size=ZONE.hotplugged_size)
        left.append(found.intent)
        found.opening(RESET)
        found.done()
        found.done()
        assert found.intent == left[0]
        found.close()
    assert left[0] is not None
    assert left[0] == left[1]
