"""What became of a resize, in words, and as an exit status."""

from __future__ import annotations

from typing import Any

from virtio_mem.picture.sizes import human_size

REACHED = 0
STALLED = 3
REFUSED = 4
SUPERSEDED = 5

STATUS = {
    "reached": REACHED,
    "running": STALLED,
    "stalled": STALLED,
    "refused": REFUSED,
    "superseded": SUPERSEDED,
}
"""By an operation's state, when nobody waits for it any longer."""

FINAL = ("reached", "superseded")
"""Nothing comes after these; from the others the guest may go on, when its driver or the host come round."""


def outcome(operation: dict[str, Any]) -> str:
    """An operation's target and the server's verdict: `1.5 GiB: stalled for 12 s: the guest refuses 3 blocks`."""
    target, size = human_size(operation["target"]), human_size(operation["plugged"])
    now = f", {size} now" if operation["state"] not in FINAL else ""
    return f"{target}: {operation['verdict']}{now}"
