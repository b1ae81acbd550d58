"""The naive model, as exact as this project's device: where the standard leaves a choice, this is our answer."""

from __future__ import annotations

from dataclasses import dataclass

from virtio_mem.conformance.model import BUSY, Model
from virtio_mem.protocol import BlockState, Request, ResponseType

SLACK = 256 << 20


@dataclass
class ModelDevice(Model):
    """The model with a usable region that follows the target as ours does."""

    whole_region: bool = False

    def __post_init__(self) -> None:
        self.usable_region_size = self.usable()

    def usable(self) -> int:
        if self.whole_region:
            return self.region_size
        if self.requested_size == 0:
            return 0
        return min(self.requested_size + max(SLACK, self.block_size), self.region_size)

    def answer(self, request: Request) -> tuple[ResponseType, BlockState | None]:
        """The right response to a request, and the state that an ACK to STATE carries."""
        expectation = self.expect(request)
        assert expectation.depended <= expectation.allowed
        answer = BUSY if BUSY in expectation.depended and self.hindered else min(expectation.depended)
        self.apply(request, answer)
        if self.may_shrink:
            self.usable_region_size, self.may_shrink = self.usable(), False
        return answer, expectation.state

    def resize(self, requested_size: int) -> None:
        super().resize(requested_size)
        self.usable_region_size = max(self.usable_region_size, self.usable())

    def reset_machine(self) -> bool:
        """Whether everything was unplugged."""
        if self.paused or self.host_refuses:
            return False
        self.plugged.clear()
        self.usable_region_size, self.may_shrink = self.usable(), False
        return True
