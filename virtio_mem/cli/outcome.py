"""What became of a resize, in words, and as an exit status."""

from __future__ import annotations

from typing import Any

from virtio_mem.picture.sizes import human_size, human_time

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
    """An operation's state, its target, and why: `1.5 GiB: stalled for 12 s: the guest refuses 3 blocks`."""
    state, reason = str(operation.get("state")), operation.get("reason")
    seconds, stalled = operation.get("seconds") or 0, operation.get("stalled_for") or 0
    match state:
        case "reached":
            text = f"reached after {human_time(seconds)}"
        case "running":
            text = f"running for {human_time(seconds)}, {human_size(operation.get('plugged') or 0)} now"
        case "stalled":
            text = f"stalled for {human_time(stalled)}"
        case _:
            text = state
    words = f"{human_size(operation.get('target') or 0)}: {text}"
    if not reason or str(reason).startswith(state):
        return f"{human_size(operation.get('target') or 0)}: {reason}" if reason else words
    return f"{words}: {reason}"
