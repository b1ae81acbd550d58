"""Our device as a target that can do little: what other kinds of target must get a verdict on is tried with it."""

from __future__ import annotations

from virtio_mem.conformance.check import FINE
from virtio_mem.conformance.target import Capability, Subject, Target, Wish
from virtio_mem.conformance.targets.behind_ring import RingTarget


class Bare(Target):
    """Our device behind a split ring, as a target of `kind` that has just `capabilities`, and takes no wishes.

    `requested_size` in bytes is the target at start, on 64 small blocks.
    """

    many = FINE

    def __init__(self, kind: str, capabilities: Capability, requested_size: int = 0) -> None:
        self.kind, self.name, self.version, self.capabilities = kind, kind, "1", capabilities
        self._inner = RingTarget("split", "anonymous")
        self._wish = Wish(region_size=64 << 16, block_size=1 << 16, requested_size=requested_size)

    def start(self, wish: Wish) -> Subject:
        if Capability.WISH in self.capabilities:
            return self._inner.start(wish)
        return self._inner.start(self._wish)

    def close(self) -> None:
        self._inner.close()
