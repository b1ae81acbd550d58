"""Descriptors that are taken for something else than they are, and writes to what is the driver's."""

from __future__ import annotations

import struct

from tests.conformance.wrong.fault import fault
from tests.conformance.wrong.rings import Picky, memory_of
from vhost_user.chain import Chain
from vhost_user.units import GuestAddress
from vhost_user.vring.driver import DESCRIPTOR, INDIRECT, NEXT, WRITE
from virtio_mem.protocol import RESPONSE_SIZE, Request
from virtio_mem.request_queue import GuestRequestQueue, Progress, read_request, write_response

USED_AND_AVAIL = 1 << 15 | 1 << 7


class _Reader(Picky):
    """Looks at the ring itself, at what the standard says has no meaning. `position` counts what was taken so far."""

    position = 0

    def _serve(self, chain: Chain) -> None:
        super()._serve(chain)
        self.position += chain.slots if self.packed else 1

    @property
    def packed(self) -> bool:
        return "driver" in self.queue.layout.areas

    def area(self, name: str, offset: int = 0) -> GuestAddress:
        """An address in one of the ring's parts."""
        return GuestAddress(self.queue.layout.areas[name].address + offset)

    def descriptor(self, chain: Chain) -> tuple[int, int, int]:
        """Address, length and flags of a chain's first descriptor."""
        at = self.position % self.queue.size if self.packed else chain.id
        raw = memory_of(self).read(self.area("desc", DESCRIPTOR.size * at), DESCRIPTOR.size)
        address, length, third, fourth = DESCRIPTOR.unpack(raw)
        return address, length, fourth if self.packed else third

    def table(self, chain: Chain) -> list[tuple[int, int]]:
        """Id and flags of each entry of a packed ring's indirect table; [] where there is none."""
        address, length, flags = self.descriptor(chain)
        if not flags & INDIRECT:
            return []
        raw = memory_of(self).read(GuestAddress(address), length)
        return [(id_, flags) for _, _, id_, flags in DESCRIPTOR.iter_unpack(raw)]


class _WritesToRequest(GuestRequestQueue):
    """What a request said is cleared when it is answered."""

    def _serve(self, chain: Chain) -> None:
        ranges = chain.readable_ranges
        super()._serve(chain)
        for address, size in ranges:
            memory_of(self).write(address, bytes(size))


@fault("RING-CHAIN-3")
class ClearsRequests(_WritesToRequest):
    """A request that was answered is cleared."""


@fault("RING-PACKED-15", ring="packed")
class ClearsRequestsOfAPackedRing(_WritesToRequest):
    """A request that was answered is cleared."""


@fault("RING-SPLIT-6")
class MarksDescriptors(_Reader):
    """In the table's last entry, which is the first to be used, the device keeps a note of its own."""

    def likes(self, chain: Chain) -> bool:
        memory_of(self).write(self.area("desc", DESCRIPTOR.size * self.queue.size - 2), b"\x77\x77")
        return True


class _WantsRoomUntouched(Picky):
    """A chain whose room begins with a zero is taken for one that was answered already."""

    def likes(self, chain: Chain) -> bool:
        address, _ = chain.writable_ranges[0]
        return memory_of(self).load16(address) & 0xFF != 0


@fault("RING-CHAIN-4")
class RoomMustNotBeZero(_WantsRoomUntouched):
    """A chain whose room begins with a zero is taken for one that was answered already."""


@fault("RING-PACKED-16", ring="packed")
class PackedRoomMustNotBeZero(_WantsRoomUntouched):
    """A chain whose room begins with a zero is taken for one that was answered already."""


class _NoWritableTable(_Reader):
    """A table that the device may write is none that it reads."""

    def likes(self, chain: Chain) -> bool:
        _, _, flags = self.descriptor(chain)
        return not (flags & INDIRECT and flags & WRITE)


@fault("RING-INDIRECT-1")
class IndirectTableMustBeReadable(_NoWritableTable):
    """A chain whose descriptor for the indirect table has the write flag comes back unanswered."""


@fault("RING-PACKED-9", ring="packed")
class PackedTableMustBeReadable(_NoWritableTable):
    """A chain whose descriptor for the indirect table has the write flag comes back unanswered."""


@fault("RING-PACKED-7", ring="packed")
class TableOfNextFlags(_Reader):
    """A next flag in an indirect table is taken for an error."""

    def likes(self, chain: Chain) -> bool:
        return not any(flags & NEXT for _, flags in self.table(chain))


@fault("RING-PACKED-8", ring="packed")
class TableOfIds(_Reader):
    """An id in an indirect table is taken for an error."""

    def likes(self, chain: Chain) -> bool:
        return not any(id_ for id_, _ in self.table(chain))


@fault("RING-SPLIT-2")
class HalfATable(_Reader):
    """Of the descriptor table the first entries are not found."""

    def likes(self, chain: Chain) -> bool:
        return bool(chain.id >= self.queue.size // 2)


@fault("RING-SPLIT-3")
class HalfAnAvailableRing(_Reader):
    """Of the available ring the last entries are not found."""

    def likes(self, chain: Chain) -> bool:
        return self.position % self.queue.size < self.queue.size // 2


@fault("RING-SPLIT-4")
class LengthBeforeId(_Reader):
    """In the last entries of the used ring the length comes first."""

    def _serve(self, chain: Chain) -> None:
        at = self.position % self.queue.size
        super()._serve(chain)
        if at >= self.queue.size // 2:
            element, memory = self.area("used", 4 + 8 * at), memory_of(self)
            memory.write(element, memory.read(GuestAddress(element + 4), 4) + memory.read(element, 4))

    def likes(self, chain: Chain) -> bool:
        return True


@fault("RING-PACKED-2", ring="packed")
class HalfAPackedRing(_Reader):
    """Chains in the second half of the ring are not found."""

    def likes(self, chain: Chain) -> bool:
        return self.position % self.queue.size < self.queue.size // 2


@fault("RING-PACKED-5", ring="packed", source="QEMU, virtqueue_packed_fill_desc")
class NoWriteFlag(_Reader):
    """A used descriptor has its length, and not the flag without which that has no meaning."""

    def _serve(self, chain: Chain) -> None:
        flags = self.area("desc", DESCRIPTOR.size * (self.position % self.queue.size) + 14)
        super()._serve(chain)
        memory_of(self).store16(flags, memory_of(self).load16(flags) & ~WRITE)

    def likes(self, chain: Chain) -> bool:
        return True


@fault("RING-PACKED-12", ring="packed")
class LastComesFirst(GuestRequestQueue):
    """Of requests that are there at once the last one is carried out first."""

    def process(self) -> Progress:
        chains = list(iter(self.queue.pop, None))
        answers = [self.service.request(read_request(chain)) for chain in reversed(chains)]
        for chain, answer in zip(chains, reversed(answers), strict=True):
            self.queue.push(chain, write_response(chain, answer))
        return Progress(self.queue.should_notify(), self.queue.enable_notifications())


@fault("RING-PACKED-19", ring="packed")
class PiecesBackwards(GuestRequestQueue):
    """The pieces of a request are put together from the last to the first."""

    def _serve(self, chain: Chain) -> None:
        pieces = [memory_of(self).read(*piece) for piece in reversed(chain.readable_ranges)]
        response = self.service.request(Request.decode(b"".join(pieces)))
        chain.write(response.encode())
        self.queue.push(chain, RESPONSE_SIZE)


class _Scribbles(_Reader):
    """Writes to the descriptor behind or before the next one when there is nothing to do."""

    served = 0

    def likes(self, chain: Chain) -> bool:
        self.served += 1
        return True

    def process(self) -> Progress:
        self.served = 0
        progress = super().process()
        if not self.served:
            self.scribble()
        return progress

    def scribble(self) -> None:
        raise NotImplementedError


@fault("RING-PACKED-17", ring="packed")
class ZeroesAreAChain(_Scribbles):
    """A ring of zeroes is taken for one with a chain, which is used at once."""

    def scribble(self) -> None:
        if not self.position:
            memory_of(self).write(self.area("desc"), struct.pack("<QIHH", 0, 0, 0, USED_AND_AVAIL))


@fault("RING-PACKED-18", ring="packed")
class UsedAgain(_Scribbles):
    """What was used is counted once more when there is nothing else to do."""

    def scribble(self) -> None:
        if self.position:
            length = self.area("desc", DESCRIPTOR.size * ((self.position - 1) % self.queue.size) + 8)
            memory = memory_of(self)
            memory.store32(length, memory.load32(length) ^ 1)
