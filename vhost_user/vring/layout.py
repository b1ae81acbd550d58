"""Where a ring's three parts lie in guest memory, and what the standard asks of their sizes and addresses.

"Split Virtqueues", and "Structure Size and Alignment" of "Packed Virtqueues". A layout's fields are the arguments of
the queue that lies there: `SplitQueue(memory, **vars(layout))`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from vhost_user.errors import PeerError
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress, align_up, is_power_of_two

MAX_QUEUE_SIZE = 32768
"""2**15. Free-running 16-bit indices can then tell a full ring from an empty one."""


class Area(NamedTuple):
    """One part of a ring: where it starts, how many bytes it has, what its address is a multiple of."""

    address: GuestAddress
    size: int
    alignment: int


class Part(NamedTuple):
    """What a part of a ring of n entries needs: `fixed + each * n` bytes, aligned."""

    fixed: int
    each: int
    alignment: int


@dataclass(frozen=True)
class Layout:
    """A ring of `size` entries. Raises PeerError for a size that its format doesn't allow."""

    parts: ClassVar[dict[str, Part]]

    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_QUEUE_SIZE:
            raise PeerError("size", self.size, f"has to be 1 to {MAX_QUEUE_SIZE} entries")

    @classmethod
    def place(cls, size: int, at: GuestAddress) -> Self:
        """The three parts one after the other, in as few bytes from `at` on as their alignment allows; see `end`."""
        addresses, next_address = {}, int(at)
        for name, part in cls.parts.items():
            addresses[name] = align_up(next_address, part.alignment)
            next_address = addresses[name] + part.fixed + part.each * size
        return cls(size, **addresses)

    @property
    def areas(self) -> dict[str, Area]:
        """The three parts by name: descriptors, what else the driver writes, what else the device writes."""
        return {
            name: Area(getattr(self, name), part.fixed + part.each * self.size, part.alignment)
            for name, part in self.parts.items()
        }

    @property
    def end(self) -> int:
        """The address behind the last byte of the highest part."""
        return max(area.address + area.size for area in self.areas.values())

    def check_alignment(self) -> None:
        """Raise PeerError for a part that is not aligned."""
        for name, (address, _, alignment) in self.areas.items():
            if address % alignment:
                raise PeerError(name, f"{address:#x}", f"has to be a multiple of {alignment}")

    def check(self, memory: GuestMemory) -> None:
        """Raise PeerError for a part that is not aligned, or not within one region of `memory`."""
        self.check_alignment()
        for name, (address, size, alignment) in self.areas.items():
            if not memory.contiguous(address, size, alignment):
                limit = f"all {size} bytes have to lie in one region, at a multiple of {alignment} in host memory too"
                raise PeerError(name, f"{address:#x}", limit)


@dataclass(frozen=True)
class SplitLayout(Layout):
    """Descriptor table, available ring and used ring; the size is a power of two."""

    # The rings: flags and idx in front, the other side's event index behind.
    parts: ClassVar[dict[str, Part]] = {"desc": Part(0, 16, 16), "avail": Part(6, 2, 2), "used": Part(6, 8, 4)}

    desc: GuestAddress
    avail: GuestAddress
    used: GuestAddress

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_power_of_two(self.size):
            raise PeerError("size", self.size, "has to be a power of two, as the queue is a split one")


@dataclass(frozen=True)
class PackedLayout(Layout):
    """Descriptor ring, driver event suppression and device event suppression; any size."""

    parts: ClassVar[dict[str, Part]] = {"desc": Part(0, 16, 16), "driver": Part(4, 0, 4), "device": Part(4, 0, 4)}

    desc: GuestAddress
    driver: GuestAddress
    device: GuestAddress
