"""Two drivers over a session: one that behaves as Linux's does, and one as Windows's (viomem).

A device may keep every clause and still be of no use to a driver that exists. So these go through whole scenarios, in
`checks.drivers`. Linux's manner is `virtio_mem.guest.memory_driver`, here on a session, in a guest that uses what it
has. Windows's is learnt from viomem's source:

- At start, where memory is plugged, it asks with STATE which, halving each range that is MIXED.
- At each notice it reads the configuration space once, and makes one attempt: the longest free run, cut to what is
  missing, in one PLUG; or the longest plugged run, cut to what is too much, in as many UNPLUGs as it could free pieces.
- It tells no refusal from another. Whatever was not granted is tried again at the next notice, and not before: a device
  that answers BUSY and gives no notice later has lost it.
"""

from __future__ import annotations

from collections.abc import Iterator

from vhost_user.errors import PeerError
from virtio_mem.blocks import BlockIndex, BlockMap, Run, Runs
from virtio_mem.conformance.check import Violation, expect
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability
from virtio_mem.conformance.words import Answer
from virtio_mem.guest.memory_driver import MEMORY_BLOCK_SIZE, GuestRange, MemoryDriver
from virtio_mem.protocol import BlockState, ConfigSpace, Request, RequestType, Response, ResponseType

LINUX = "DEP-DRIVER-1"
"""The rule that a device breaks with which such a driver can't do."""

MOST_BLOCKS = 0xFFFF
"""What a request can name."""


class SessionPort:
    """A session as the Linux-like driver would have its device."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def config(self) -> ConfigSpace:
        """Read the configuration space."""
        return self.session.config()

    def request(self, request: Request) -> Response:
        """Send it. A response that has no meaning is the end of any driver: Violation."""
        answer = self.session.ask(request.type, request.addr, request.nb_blocks)
        if answer.type is None:
            raise Violation(LINUX, str(answer), "a response")
        return Response(answer.type)


class UsedMemory:
    """What a guest does with the memory that its driver brings: it writes to it, and looks before it gives it away."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._can = session.can(Capability.CONTENT)
        self._written: dict[int, int] = {}
        self._writes = 0
        self.pinned = False
        """While it is, the guest can't do without what it has."""

    def take(self, memory: GuestRange) -> None:
        """Write to the first and the last block of what was plugged."""
        for block in self._ends(memory):
            self._writes += 1
            self.session.fill(block, 1, self._writes)
            self._written[block] = self._writes

    def give(self, memory: GuestRange) -> bool:
        """Whether the range can be unplugged. Violation where it does not hold what was written."""
        if self.pinned:
            return False
        first, nb_blocks = self._run(memory)
        self.check(first, nb_blocks)
        for block in range(first, first + nb_blocks):
            self._written.pop(block, None)
        return True

    def check(self, first: int, nb_blocks: int) -> None:
        """Violation where plugged memory has lost what was written to it."""
        for block, seed in list(self._written.items()):
            if first <= block < first + nb_blocks:
                what = f"block {block} lost what the guest wrote"
                expect(LINUX, self.session.same(block, 1, seed), what, "what the guest wrote")

    def _run(self, memory: GuestRange) -> tuple[int, int]:
        offset = memory.addr - self.session.addr(0)
        return offset // self.session.block_size, memory.size // self.session.block_size

    def _ends(self, memory: GuestRange) -> list[int]:
        first, nb_blocks = self._run(memory)
        return sorted({first, first + nb_blocks - 1}) if self._can else []


def memory_block_size(session: Session) -> int:
    """Bytes in what Linux adds and takes away in one piece; less than the real ones where the region is small."""
    eighth = max(1, session.first_config.region_size // 8)
    return max(session.block_size, min(MEMORY_BLOCK_SIZE, 1 << eighth.bit_length() - 1))


def linux_driver(session: Session) -> tuple[MemoryDriver, UsedMemory]:
    """The driver and its guest; the session has begun."""
    memory, port, size = UsedMemory(session), SessionPort(session), memory_block_size(session)
    return MemoryDriver(port, online=memory.take, offline=memory.give, memory_block_size=size), memory


class WindowsDriver:
    """viomem's manner; the session has begun. `pieces` is into how many a run falls that it takes from Windows.

    PeerError for a device that it would not start on: block_size 0, or a STATE that is refused.
    """

    def __init__(self, session: Session, pieces: int = 1) -> None:
        self.session = session
        self.pieces = pieces
        self.busy = False
        """Whether the last attempt ended by BUSY."""
        config = session.config()
        if not config.block_size:
            raise PeerError("block_size", 0, "at least 1")
        self.blocks = BlockMap(config.region_size // config.block_size)
        if config.plugged_size:
            usable = min(config.region_size, config.usable_region_size) // config.block_size
            for run in self._plugged_in(0, usable):
                self.blocks.plug(run)

    @property
    def plugged_size(self) -> int:
        """Bytes that it believes plugged."""
        return self.blocks.plugged * self.session.block_size

    def wake(self) -> bool:
        """What it does at a notice; whether the target is reached then."""
        config, self.busy = self.session.config(), False
        missing = (config.requested_size - config.plugged_size) // self.session.block_size
        if missing > 0:
            self._add(missing)
        elif missing < 0:
            self._remove(-missing)
        return self.plugged_size == config.requested_size

    def _add(self, missing: int) -> None:
        run = _longest(self.blocks.unplugged_runs(Run(BlockIndex(0), len(self.blocks))), missing)
        if run is not None and self._granted(self.session.plug(*run)):
            self.blocks.plug(run)

    def _remove(self, surplus: int) -> None:
        run = _longest(self.blocks.plugged_runs(), surplus)
        if run is None:
            return
        piece = max(1, run.nb_blocks // self.pieces)
        for first in range(run.first, run.first + run.nb_blocks, piece):
            part = Run(BlockIndex(first), min(piece, run.first + run.nb_blocks - first))
            if self._granted(self.session.unplug(*part)):
                self.blocks.unplug(part)

    def _granted(self, answer: Answer) -> bool:
        self.busy |= answer.type is ResponseType.BUSY
        return answer.type is ResponseType.ACK

    def _plugged_in(self, first: int, nb_blocks: int) -> Iterator[Run]:
        """Which blocks of a range are plugged, by halving it."""
        if not nb_blocks:
            return
        half = nb_blocks // 2
        if nb_blocks <= MOST_BLOCKS:
            answer = self.session.ask(RequestType.STATE, self.session.addr(first), nb_blocks)
            if answer.state is None:
                raise PeerError("STATE", str(answer), "an ACK for blocks of the usable region")
            if answer.state is BlockState.UNPLUGGED:
                return
            if answer.state is BlockState.PLUGGED:
                yield Run(BlockIndex(first), nb_blocks)
                return
            if not half:
                raise PeerError("STATE", "MIXED for one block", "PLUGGED or UNPLUGGED")
        yield from self._plugged_in(first, half)
        yield from self._plugged_in(first + half, nb_blocks - half)


def _longest(runs: Runs, most: int) -> Run | None:
    """The beginning of the longest run, the lowest of equals."""
    longest = max(runs, key=lambda run: run.nb_blocks, default=None)
    return longest and Run(longest.first, min(longest.nb_blocks, most, MOST_BLOCKS))
