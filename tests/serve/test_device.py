"""The device behind a vhost-user socket: what a front end and its driver can do to it, and what they can't."""

from __future__ import annotations

import mmap
import os
import random
import select
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests import counts
from tests.device.model import ModelDevice
from tests.host import HugePagePool
from tests.peers.processes import wait_until
from tests.serve.rig import ADDR, BLOCK_SIZE, FORMS, NB_BLOCKS, UNPLUGGED_INACCESSIBLE, Guest, guest, zone
from vhost_user.backend import Server
from vhost_user.connection import Connection
from vhost_user.errors import Refused
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.mapping import Mapping
from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset
from virtio_mem.control import Control, ControlledZone
from virtio_mem.operation import State
from virtio_mem.protocol import BlockState, Request, RequestType, Response, ResponseType
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_memfd
from virtio_mem.serve.plan import ServedZone
from virtio_mem.serve.state import state_size

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType
ACK, NACK, BUSY, ERROR = ResponseType


@dataclass
class Served:
    """A device in a server's thread."""

    device: MemDevice
    server: Server
    stack: ExitStack

    def connect(self, features: int) -> Frontend:
        """Another front end; the one before is gone, or the server would not look for one."""
        wait_until(lambda: self.device.endpoint is None or not self.device.endpoint.connected, "nobody is connected")
        ours, theirs = socket.socketpair()
        connected = []

        def serve() -> None:
            if self.device.endpoint is None:
                self.device.endpoint = self.server.serve(theirs, self.device)
            else:
                self.device.endpoint.serve(theirs)
            connected.append(True)

        self.server.loop.call_soon(serve)
        wait_until(lambda: connected, "the server has taken the connection")
        return self.stack.enter_context(Frontend(Connection(ours), features=features))

    def start(self, machine: Guest) -> Frontend:
        """The same, with the guest's memory shared and its ring started."""
        frontend = self.connect(machine.features)
        machine.start(frontend)
        return frontend


@contextmanager
def served(what: ServedZone) -> Iterator[Served]:
    with (
        state_memfd("test", state_size(what.geometry)) as fd,
        ExitStack() as last,
        Server() as server,
    ):
        device = MemDevice(what, fd.fileno())
        last.callback(device.close)
        with server.in_thread(), ExitStack() as stack:
            yield Served(device, server, stack)


class Hears:
    """What is told of requests, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[Request, Response]] = []

    def answered(self, request: Request, response: Response) -> None:
        self.told.append((request, response._replace(reason="")))

    def discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
        pass


PREFAULT = pytest.mark.parametrize("prefault", [True, False], ids=["prefault", "no prefault"])
"""Without, a PLUG is answered by the C core."""


@PREFAULT
@pytest.mark.parametrize("heard", [False, True], ids=["unheard", "heard"])
@pytest.mark.parametrize("form", FORMS)
def test_random_requests_agree_with_the_model(form: str, heard: bool, prefault: bool, rng: random.Random) -> None:
    model = ModelDevice(ADDR, NB_BLOCKS * BLOCK_SIZE, BLOCK_SIZE, 8 * BLOCK_SIZE)
    asked: list[tuple[Request, Response]] = []
    with guest(form) as machine, served(zone(hotplugged=8, prefault=prefault)) as here:
        frontend, hears = here.start(machine), Hears()
        if heard:
            with here.device.service.lock:
                here.device.service.observers.append(hears)
        for _ in range(counts.SERVED_REQUESTS):
            if rng.random() < 0.05:
                target = rng.randrange(NB_BLOCKS + 1) * BLOCK_SIZE
                here.device.service.resize(target)
                model.resize(target)
            type_ = rng.choice((0, 0, 0, 1, 1, 1, 2, 3, rng.randrange(1 << 16)))
            addr = ADDR + rng.randrange(-1, NB_BLOCKS + 1) * BLOCK_SIZE + rng.choice((0,) * 9 + (4096,))
            request = Request(type_, GuestAddress(addr), rng.choice((1, 1, 2, 3, rng.randrange(1 << 16))))
            machine.send(request, frontend)
            response = machine.wait(frontend)
            expected, state = model.answer(request)
            assert response.type is expected, request
            assert state is None or response.state is state, request
            asked.append((request, response))
        assert machine.config(frontend).plugged_size == model.plugged_size
        assert hears.told == (asked if heard else [])
        assert here.device.service.answers == Counter(map(_named, asked))
        assert here.device.state.intent is None


def _named(asked: tuple[Request, Response]) -> tuple[str, str]:
    request, response = asked
    return RequestType(request.type).name if request.type in list(RequestType) else "unknown", response.type.name


def _are(what: Sized, number: int) -> bool:
    return len(what) == number


@PREFAULT
@pytest.mark.parametrize("form", FORMS)
def test_the_driver_is_called_before_who_only_wants_to_know(form: str, prefault: bool) -> None:
    with guest(form) as machine, served(zone(prefault=prefault)) as here:
        frontend = here.start(machine)
        called: list[tuple[str, bool]] = []

        class Looks:
            """Whether the call is there; the driver takes none meanwhile."""

            def answered(self, request: Request, response: Response) -> None:
                self._look(f"{RequestType(request.type).name} {response.type.name}")

            def discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
                self._look(f"{unplugged} discarded, {kept} kept")

            def _look(self, what: str) -> None:
                called.append((what, bool(select.select([frontend.vring(0).call], [], [], 0)[0])))

        with here.device.service.lock:
            here.device.service.observers.append(Looks())
        for type_, told in (
            (PLUG, ["PLUG ACK"]),
            (STATE, ["STATE ACK"]),
            (PLUG, ["PLUG ERROR"]),
            (UNPLUG, [f"{2 * BLOCK_SIZE} discarded, 0 kept", "UNPLUG ACK"]),
        ):
            called.clear()
            machine.driver.enable_interrupts()
            machine.send_typed(frontend, type_, 3, 2)
            wait_until(partial(_are, called, len(told)), f"{told} is told")
            assert called == [(what, True) for what in told]
            assert frontend.vring(0).call.take()
            assert machine.receive() is not None
        assert here.device.service.answers["PLUG", "ERROR"] == 1


@pytest.mark.parametrize("form", FORMS)
def test_what_is_told_of_requests_that_come_together_is_true_of_each(form: str) -> None:
    with guest(form) as machine, served(zone(hotplugged=0)) as here:
        service = here.device.service
        with Control([ControlledZone(id="mem0", service=service, notify=here.device.notify)]) as control:
            frontend = here.start(machine)
            operation = control.resize_zone("mem0", 2 * BLOCK_SIZE)
            machine.driver.enable_interrupts()
            with service.lock:  # all are there before the device looks
                for type_, nb_blocks in ((PLUG, 2), (UNPLUG, 1), (STATE, 1), (UNPLUG_ALL, 0), (PLUG, 1)):
                    machine.send_typed(frontend, type_, 0, nb_blocks)
            assert [machine.wait(frontend).type for _ in range(5)] == [ACK] * 5
            found = []
            with service.lock, control.events.subscribe(after=0) as subscription:  # the last is told by now
                while event := subscription.get(0):
                    told = event.as_dict()
                    found.append((told["kind"], told.get("size"), told.get("plugged")))
            assert found == [
                ("requested", None, 0),
                ("plugged", 2 * BLOCK_SIZE, 2 * BLOCK_SIZE),
                ("reached", None, 2 * BLOCK_SIZE),
                ("freed", BLOCK_SIZE, None),
                ("unplugged", BLOCK_SIZE, BLOCK_SIZE),
                ("freed", BLOCK_SIZE, None),
                ("unplugged", BLOCK_SIZE, 0),
                ("plugged", BLOCK_SIZE, BLOCK_SIZE),
            ]
            assert (operation.state, operation.plugged) == (State.REACHED, 2 * BLOCK_SIZE)


def test_what_a_driver_and_its_vmm_do_leaves_blocks_alone() -> None:
    with guest() as machine, served(zone()) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 2, 6) is ACK
        frontend.status = 15
        frontend.status = 0
        machine.check(frontend)
        base = frontend.vring(0).stop()
        machine.check(frontend)
        frontend.vring(0).start(machine.layout, base)
        assert machine.ask(frontend, PLUG, 9) is ACK
        frontend.reset_device()
        machine.check(frontend)
        frontend.close()
        with guest() as another:
            second = here.start(another)
            config = another.config(second)
            assert config.plugged_size == 7 * BLOCK_SIZE, "what another front end's guest had"
            assert another.ask(second, PLUG, 2) is ERROR
            assert another.ask(second, UNPLUG_ALL) is ACK
            assert another.ask(second, PLUG, 2) is ACK
            another.check(second)


def test_new_memory_is_what_counts() -> None:
    with guest() as machine, guest() as moved, served(zone()) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0, 4) is ACK
        frontend.regions.remove(machine.regions[1])
        assert machine.ask(frontend, UNPLUG, 0) is BUSY
        assert machine.ask(frontend, PLUG, 8) is BUSY
        frontend.regions.add(moved.regions[1])
        assert machine.ask(frontend, PLUG, 8) is ACK
        assert (moved.held(8), moved.held(0)) == (BLOCK_SIZE, 0)
        assert machine.ask(frontend, UNPLUG, 8) is ACK
        assert moved.held(8) == 0


def test_a_driver_hears_when_memory_comes() -> None:
    with guest() as machine, served(zone()) as here:
        frontend = here.connect(machine.features)
        frontend.regions.share(machine.regions[:1])
        frontend.vring(0).start(machine.layout, 0)
        assert machine.ask(frontend, PLUG, 0) is BUSY
        here.device.poll(1e6)
        assert frontend.channel is not None
        before = frontend.channel.config_changes
        frontend.regions.add(machine.regions[1])

        def told() -> bool:
            frontend.requests.confirm()
            frontend.serve_channel()
            return frontend.channel is not None and frontend.channel.config_changes > before

        wait_until(told, "a change notice comes")
        assert machine.ask(frontend, PLUG, 0) is ACK
        machine.check(frontend)


def test_a_resize_is_told() -> None:
    with guest() as machine, served(zone(hotplugged=0)) as here:
        frontend = here.start(machine)
        assert frontend.channel is not None
        assert machine.ask(frontend, PLUG, 0) is ERROR, "nothing is usable"
        here.device.service.resize(4 * BLOCK_SIZE)
        here.device.notify()

        def told() -> bool:
            frontend.requests.confirm()
            frontend.serve_channel()
            return frontend.channel is not None and frontend.channel.config_changes > 0

        wait_until(told, "a change notice comes")
        assert machine.config(frontend).requested_size == 4 * BLOCK_SIZE
        assert machine.ask(frontend, PLUG, 0, 4) is ACK


def test_a_system_reset_takes_everything() -> None:
    with guest() as machine, served(zone()) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 3, 5) is ACK
        assert here.device.service.system_reset()
        machine.plugged.clear()
        machine.check(frontend)
        assert machine.ask(frontend, PLUG, 3, 5) is ACK
        frontend.close()
        wait_until(lambda: not here.device.memory.connected, "the front end is gone")
        assert here.device.service.system_reset(), "nobody is there to refuse"
        assert here.device.device.plugged_size == 0


@pytest.mark.parametrize("between", [0, 1])
def test_memory_that_comes_again_after_a_system_reset_is_given_back(between: int) -> None:
    """Also where somebody came in between who shared none of it; what another front end has is its own."""
    with guest() as machine, guest() as another, served(zone()) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 3, 5) is ACK
        frontend.close()
        wait_until(lambda: not here.device.memory.connected, "the front end is gone")
        assert here.device.service.system_reset()
        assert machine.held(3, 5) == 5 * BLOCK_SIZE
        for _ in range(between):
            here.connect(machine.features).close()
        again = Guest(fd=os.dup(machine.fd))
        frontend = here.start(again)
        again.check(frontend)
        frontend.close()
        wait_until(lambda: not here.device.memory.connected, "the front end is gone")
        assert here.device.service.system_reset()
        os.pwrite(another.fd, b"theirs", 7 * BLOCK_SIZE)
        frontend = here.start(another)
        assert os.pread(another.fd, 6, 7 * BLOCK_SIZE) == b"theirs"
        frontend.close()
        again.close()


def test_regions_that_adjoin_in_one_file_are_one() -> None:
    half = ByteCount(NB_BLOCKS // 2 * BLOCK_SIZE)
    with guest() as machine, served(zone()) as here:
        frontend = here.connect(machine.features)
        low = SharedRegion(ADDR, half, machine.fd)
        high = SharedRegion(GuestAddress(ADDR + half), half, machine.fd, HostOffset(half))
        frontend.regions.share([machine.ram.region, low, high])
        frontend.vring(0).start(machine.layout, 0)
        assert machine.ask(frontend, PLUG, NB_BLOCKS // 2 - 2, 4) is ACK
        machine.check(frontend)
        assert machine.ask(frontend, UNPLUG, NB_BLOCKS // 2 - 1, 2) is ACK
        machine.check(frontend)


def test_regions_of_two_files_or_with_a_gap_are_refused() -> None:
    half = ByteCount(NB_BLOCKS // 2 * BLOCK_SIZE)
    with guest() as machine, guest() as other, served(zone()) as here:
        low = SharedRegion(ADDR, half, machine.fd)
        for high in (
            [SharedRegion(GuestAddress(ADDR + half), half, other.fd)],
            [SharedRegion(GuestAddress(ADDR + half), half, machine.fd)],
            [],
        ):
            frontend = here.connect(machine.features)
            frontend.regions.share([machine.ram.region, low, *high])
            frontend.vring(0).start(machine.layout, 0)
            assert machine.ask(frontend, PLUG, 0) is BUSY
            frontend.close()
            with guest() as fresh:  # a driver's ring of its own
                machine.driver, machine.ram, fresh.driver, fresh.ram = (
                    fresh.driver,
                    fresh.ram,
                    machine.driver,
                    machine.ram,
                )


def test_many_regions_cost_few_descriptors() -> None:
    with guest() as machine, served(zone()) as here:
        before = len(list(Path("/proc/self/fd").iterdir()))
        frontend = here.connect(machine.features)
        frontend.regions.share([machine.ram.region])
        for page in range(200):
            frontend.regions.add(SharedRegion(GuestAddress(ADDR + page * 8192), ByteCount(4096), machine.fd))
        assert len(list(Path("/proc/self/fd").iterdir())) - before < 60
        frontend.vring(0).start(machine.layout, 0)
        assert machine.ask(frontend, PLUG, 0) is BUSY


def test_a_file_that_is_cut_short_is_a_busy_device() -> None:
    with guest() as machine, served(zone()) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0, 2) is ACK
        os.ftruncate(machine.fd, 2 * BLOCK_SIZE)
        assert machine.ask(frontend, PLUG, 4) is BUSY
        assert machine.ask(frontend, UNPLUG, 0) is ACK
        os.ftruncate(machine.fd, machine.size)
        assert machine.ask(frontend, PLUG, 4) is ACK


def test_features_that_a_driver_must_have() -> None:
    with guest() as machine, served(zone()) as here:
        with pytest.raises(Refused):
            here.connect(machine.features & ~UNPLUGGED_INACCESSIBLE)
        here.start(machine)


def test_a_chain_that_holds_no_request_goes_back_empty() -> None:
    with guest() as machine, served(zone()) as here:
        frontend = here.start(machine)
        at = 0x180000
        for readable, writable in (
            ([(at, 23)], [(at, 10)]),
            ([(at, 24)], [(at, 9)]),
            ([], [(at, 64)]),
            ([(at, 64)], []),
        ):
            machine.driver.add(readable, writable)
            frontend.vring(0).kick.signal()
            wait_until(machine.driver.enable_interrupts, "it comes back")
            used = machine.driver.get_used()
            assert used is not None
            assert used[1] == 0
        assert machine.ask(frontend, STATE, 0) is ACK


def test_without_prefault_nothing_is_held_until_it_is_touched() -> None:
    with guest() as machine, served(zone(prefault=False)) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0, 4) is ACK
        machine.check(frontend, prefault=False)
        assert machine.ask(frontend, UNPLUG, 1) is ACK
        machine.check(frontend, prefault=False)


def test_what_is_populated_is_not_resident_here() -> None:
    with guest() as machine, served(zone()) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0, NB_BLOCKS) is ACK
        (region,) = here.device.memory.require(HostOffset(0), BLOCK_SIZE).regions
        with open("/proc/self/smaps") as smaps:
            text = smaps.read()
        part = text[text.index(f"{region.mapping.address:x}-") :]
        assert int(part.split("Rss:")[1].split()[0]) == 0


def test_a_zone_may_have_half_of_the_address_space() -> None:
    """Whoever has it mapped twice has none left: 47 bits are 128 TiB, and a half has room once."""
    size = ByteCount(64 << 40)
    with guest() as machine, served(zone(size // BLOCK_SIZE)) as here:
        os.ftruncate(machine.fd, size)
        machine.size = size
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 3) is ACK
        assert machine.held(3) == BLOCK_SIZE
        machine.send_typed(frontend, PLUG, size // BLOCK_SIZE - 1)
        assert machine.wait(frontend).type is ACK
        assert machine.held(size // BLOCK_SIZE - 1) == BLOCK_SIZE
        assert machine.ask(frontend, UNPLUG_ALL) is ACK
        assert os.fstat(machine.fd).st_blocks == 0


@pytest.mark.needs_hugetlb
def test_huge_pages_run_out_and_come_back(hugepages: Callable[[int, int], HugePagePool]) -> None:
    hugepages(2 * MIB, 4)
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    machine = Guest(fd=fd)
    with served(zone(prefault=False)) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0, 3) is ACK
        assert machine.ask(frontend, PLUG, 4, 3) is BUSY
        assert os.fstat(fd).st_blocks * 512 == 3 * BLOCK_SIZE
        here.device.poll(1e6)
        assert here.device.device.owes_notice, "there is no use in trying again"
        assert machine.ask(frontend, UNPLUG, 0, 2) is ACK
        assert os.fstat(fd).st_blocks * 512 == BLOCK_SIZE
        here.device.poll(2e6)
        assert not here.device.device.owes_notice, "the driver was told to"
        assert machine.ask(frontend, PLUG, 4, 3) is ACK
        assert here.device.device.blocks.plugged == 4
    machine.close()


@pytest.mark.needs_hugetlb
def test_huge_pages_that_the_front_end_reserved_are_for_it(hugepages: Callable[[int, int], HugePagePool]) -> None:
    hugepages(2 * MIB, NB_BLOCKS)
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    machine = Guest(fd=fd)
    with Mapping(machine.size, mmap.MAP_SHARED, fd), served(zone(prefault=False)) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0, NB_BLOCKS) is ACK
        machine.check(frontend)
    machine.close()


def test_state_requests_tell(rng: random.Random) -> None:
    with guest() as machine, served(zone()) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 4, 4) is ACK
        for block, nb_blocks, state in (
            (4, 4, BlockState.PLUGGED),
            (8, 2, BlockState.UNPLUGGED),
            (3, 2, BlockState.MIXED),
        ):
            machine.send_typed(frontend, STATE, block, nb_blocks)
            assert machine.wait(frontend).state is state
