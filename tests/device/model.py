"""A naive virtio-mem device: the standard's rules over a set of addresses, written for reading, not for speed.

It shares no code with the device under test beyond the names of types and states.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from virtio_mem.protocol import BlockState, Request, RequestType, ResponseType

SLACK = 256 << 20


@dataclass
class ModelDevice:
    """Every plugged block is its guest address in `plugged`."""

    addr: int
    region_size: int
    block_size: int
    requested_size: int
    whole_region: bool = False
    paused: bool = False
    host_refuses: bool = False
    plugged: set[int] = field(default_factory=set)
    usable_region_size: int = 0

    def __post_init__(self) -> None:
        self.usable_region_size = self.usable()

    def usable(self) -> int:
        if self.whole_region:
            return self.region_size
        if self.requested_size == 0:
            return 0
        slack = max(SLACK, self.block_size)
        return min(self.requested_size + slack, self.region_size)

    @property
    def plugged_size(self) -> int:
        return len(self.plugged) * self.block_size

    def answer(self, request: Request) -> tuple[ResponseType, BlockState | None]:
        """The right response to a request, and the state that an ACK to STATE carries."""
        if request.type == RequestType.UNPLUG_ALL:
            return self.unplug_all(), None
        if request.type not in (RequestType.PLUG, RequestType.UNPLUG, RequestType.STATE):
            return ResponseType.ERROR, None
        blocks = [request.addr + n * self.block_size for n in range(request.nb_blocks)]
        usable = range(self.addr, self.addr + self.usable_region_size, self.block_size)
        if not blocks or blocks[0] not in usable or blocks[-1] not in usable:
            return ResponseType.ERROR, None
        count = sum(block in self.plugged for block in blocks)
        if request.type == RequestType.STATE:
            if count == len(blocks):
                return ResponseType.ACK, BlockState.PLUGGED
            return ResponseType.ACK, BlockState.MIXED if count else BlockState.UNPLUGGED
        if request.type == RequestType.PLUG:
            return self.plug(blocks, count), None
        return self.unplug(blocks, count), None

    def plug(self, blocks: list[int], already: int) -> ResponseType:
        if already:
            return ResponseType.ERROR
        if (len(self.plugged) + len(blocks)) * self.block_size > self.requested_size:
            return ResponseType.NACK
        if self.paused or self.host_refuses:
            return ResponseType.BUSY
        self.plugged.update(blocks)
        return ResponseType.ACK

    def unplug(self, blocks: list[int], plugged: int) -> ResponseType:
        if plugged < len(blocks):
            return ResponseType.ERROR
        if self.paused or self.host_refuses:
            return ResponseType.BUSY
        self.plugged.difference_update(blocks)
        return ResponseType.ACK

    def unplug_all(self) -> ResponseType:
        if self.paused or self.host_refuses:
            return ResponseType.BUSY
        self.plugged.clear()
        self.usable_region_size = self.usable()
        return ResponseType.ACK

    def resize(self, requested_size: int) -> None:
        self.requested_size = requested_size
        self.usable_region_size = max(self.usable_region_size, self.usable())

    def system_reset(self) -> bool:
        """Whether everything was unplugged."""
        if self.paused or self.host_refuses:
            return False
        self.plugged.clear()
        self.usable_region_size = self.usable()
        return True
