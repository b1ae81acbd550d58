"""What a device in service tells whoever keeps its state, and in which order.

For each request that the host has to act for: `opening`, the host acts, `granted`, the device changes, `changed`, the
driver is answered, `done`. A process that ends between two of them leaves a record of how far it came, so that the next
one can finish what it can't undo, and undo the rest. Where the host refuses, all is undone, and then `done` is said.
"""

from __future__ import annotations

from typing import Protocol

from virtio_mem.device import Effect


class Keeper(Protocol):
    """Somebody who keeps the device's state where it outlives the process. Called under the service's lock."""

    def opening(self, effect: Effect) -> None:
        """The host is about to act, and the device still is as before."""

    def granted(self, effect: Effect) -> None:
        """The host has acted, and the device is about to change."""

    def changed(self) -> None:
        """The device is another one than before: its sizes, its blocks, whether it is paused."""

    def done(self) -> None:
        """What was opened has come to its end: refused with all as before, or answered. Whoever answers a `request()`
        that was granted says so, once its driver has the answer."""


class KeepsNothing:
    """Where the state may go with the process."""

    def opening(self, effect: Effect) -> None:
        """Nothing."""

    def granted(self, effect: Effect) -> None:
        """Nothing."""

    def changed(self) -> None:
        """Nothing."""

    def done(self) -> None:
        """Nothing."""
