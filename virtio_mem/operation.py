"""One resize as an operation: an id, a target, progress, and what came of it.

A resize is a wish: the guest may follow at once, later, in part, or never. So each one is an operation that can be
looked at and waited for, and its state says what is known:

    running     blocks come or go, or did so lately, or it was only just asked for
    reached     the target was met; the end, whatever the guest does afterwards
    superseded  another resize of the zone took its place; the end
    stalled     the target came no nearer for STALL_SECONDS: the guest refuses, or nobody is there
    refused     the same, and the device's last word to the guest was BUSY: the host refuses, with its reason

The last two are a verdict, not an end: once the target comes nearer the operation is running again, and it can still be
reached. A guest that plugs a block and gives it back, time and again, comes no nearer: Linux does so every minute or
five where it has no memory left to manage what it has plugged.

Times are of CLOCK_MONOTONIC, which all processes since the host's start share: so operations that one process saved go
on in the next one.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from vhost_user.units import U64_MAX
from virtio_mem.picture.sizes import human_size

STALL_SECONDS = 10.0
"""How long no block may come or go before a resize counts as stalled. Linux's driver answers a change notice within
milliseconds, takes at most some seconds to offline 128 MiB, and waits 5 s between the first of its retries."""

RATE_SECONDS = 5.0
"""What a rate is an average of: the last so many seconds."""

_SAMPLE_SECONDS = 0.1


class State(StrEnum):
    """Where an operation stands."""

    RUNNING = "running"
    REACHED = "reached"
    SUPERSEDED = "superseded"
    STALLED = "stalled"
    REFUSED = "refused"


ENDED = frozenset({State.REACHED, State.SUPERSEDED})
"""States that no operation leaves."""


class ZoneView(NamedTuple):
    """What a zone is like when its operation is judged: `plugged` and `target` are its bytes in all."""

    plugged: int
    target: int
    connected: bool
    paused: bool


@dataclass(slots=True)
class Operation:
    """One resize. Sizes are the zone's bytes in all; `created` is in Unix seconds, the other times are monotonic."""

    id: int
    zone: str
    target: int
    block_size: int
    before: int
    plugged: int
    created: float
    began: float
    moved: float
    ended: float | None = None
    state: State = State.RUNNING
    reason: str = ""
    asked: bool = False
    busy: str = ""
    error: str = ""
    nearest: int = -1
    """How near to the target it came, in bytes, since the guest last began anew; -1 where nothing was seen yet."""
    gave_back: bool = False
    """Whether the guest went away from the target since then."""
    samples: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=64))

    @property
    def blocks_left(self) -> int:
        """Blocks that are still to come or to go."""
        return abs(self.target - self.plugged) // self.block_size

    def as_dict(self, now: float) -> dict[str, Any]:
        """The operation as plain data; see the OpenAPI document for the units."""
        standing = self.state in (State.STALLED, State.REFUSED)
        stalled_for = round(now - self.moved, 3) if standing else None
        seconds = round((now if self.ended is None else self.ended) - self.began, 3)
        return {
            "id": self.id,
            "zone": self.zone,
            "target": self.target,
            "before": self.before,
            "plugged": self.plugged,
            "state": str(self.state),
            "reason": self.reason,
            "verdict": self._verdict(seconds, stalled_for),
            "created": round(self.created, 3),
            "seconds": seconds,
            "rate": self._rate(now, seconds),
            "stalled_for": stalled_for,
        }

    def _verdict(self, seconds: float, stalled_for: float | None) -> str:
        if self.state is State.STALLED:
            return f"stalled for {stalled_for:.0f} s: {self.reason}"
        if self.state is State.REFUSED:
            return f"refused for {stalled_for:.0f} s: {self.reason}"
        if self.state is State.SUPERSEDED:
            return f"superseded after {seconds:.1f} s: {self.reason}"
        if self.state is State.REACHED:
            return f"reached {human_size(self.target)} in {seconds:.1f} s"
        return f"running for {seconds:.0f} s"

    def _rate(self, now: float, seconds: float) -> int:
        """Bytes a second: lately while it runs, on average once it has ended."""
        if self.ended is not None:
            return int(abs(self.plugged - self.before) / max(seconds, 0.001))
        recent = [sample for sample in self.samples if sample[0] >= now - RATE_SECONDS]
        if not recent or now <= recent[0][0]:
            return 0
        return int(abs(self.plugged - recent[0][1]) / (now - recent[0][0]))

    def note(self, plugged: int, now: float, *, anew: bool = False) -> bool:
        """Blocks came or went: `plugged` is what there is now. Whether the target came nearer, or the guest begins
        `anew`, as after UNPLUG ALL."""
        before, left = abs(self.target - self.plugged), abs(self.target - plugged)
        nearer = anew or left < (before if self.nearest < 0 else self.nearest)
        self.plugged = plugged
        self.asked, self.busy, self.error = True, "", ""
        if nearer:
            self.moved, self.nearest, self.gave_back = now, left, False
        elif left > before:
            self.gave_back = True
        if self.samples and now - self.samples[-1][0] < _SAMPLE_SECONDS and len(self.samples) > 1:
            self.samples[-1] = (self.samples[-1][0], plugged)
        else:
            self.samples.append((now, plugged))
        return nearer

    def judge(self, view: ZoneView, now: float) -> tuple[State, str]:
        """The state that goes with what there is now, and why."""
        if view.target != self.target:
            return State.SUPERSEDED, f"by a resize to {human_size(view.target)}, elsewhere"
        if view.plugged == self.target:
            return State.REACHED, ""
        if now - self.moved < STALL_SECONDS:
            return State.RUNNING, ""
        if view.paused:
            return State.REFUSED, "the device is paused"
        if not view.connected:
            return State.STALLED, "no guest is connected"
        if self.busy:
            return State.REFUSED, f"the host refuses: {self.busy}"
        if not self.asked:
            return State.STALLED, "the guest asks for nothing: is its driver loaded?"
        left = self.blocks_left
        if self.gave_back and not self.error:
            why = "has it memory left to manage more? Linux needs a 64th of what is plugged"
            return State.STALLED, f"the guest plugs blocks and gives them back, {left} are missing: {why}"
        error = f"; its last request was an error: {self.error}" if self.error else ""
        return State.STALLED, f"the guest refuses {left} {'block' if left == 1 else 'blocks'}{error}"

    def save(self) -> dict[str, Any]:
        """The operation as plain data that `parse()` reads."""
        return {name: getattr(self, name) for name in _SAVED}

    @classmethod
    def parse(cls, saved: dict[str, Any], now: float) -> Operation:
        """What `save()` made; ValueError, TypeError or KeyError for what can't be an operation.

        No time in it is later than `now`.
        """
        values: dict[str, Any] = {name: int(saved[name]) for name in _NUMBERS}
        if not 0 <= min(values.values()) <= max(values.values()) <= U64_MAX or not values["id"] * values["block_size"]:
            raise ValueError(f"numbers {values}")
        values |= {name: str(saved[name]) for name in _TEXTS}
        values |= {name: _time(saved[name], now) for name in ("began", "moved")}
        values["created"] = _time(saved["created"], math.inf)
        values["ended"] = None if saved["ended"] is None else _time(saved["ended"], now)
        values["state"], values["asked"] = State(saved["state"]), bool(saved["asked"])
        if (values["state"] in ENDED) != (values["ended"] is not None):
            raise ValueError(f"state {values['state']} with an end of {values['ended']}")
        operation = cls(**values)
        operation.samples.append((now, operation.plugged))
        return operation


_NUMBERS = ("id", "target", "block_size", "before", "plugged")
_TEXTS = ("zone", "reason", "busy", "error")
_SAVED = (*_NUMBERS, *_TEXTS, "created", "began", "moved", "ended", "state", "asked")


def _time(value: object, latest: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"time {value}")
    return min(float(value), latest)
