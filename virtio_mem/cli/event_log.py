"""Events for people: what came many times in a row is one entry that counts.

A guest that plugs 2 MiB blocks makes thousands of events a second; "plugged 512 MiB in 256 requests" is what one wants
to read of them. What is new is found among the zone's last few entries, since kinds alternate (unplugged, freed).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from vhost_user.units import U64_MAX
from virtio_mem.picture.sizes import human_size
from virtio_mem.picture.spans import Role

ENTRIES_KEPT = 64
_LOOK_BACK = 3
_TOGETHER = 2.0
"""Seconds: what comes later than that after an entry's last event is an entry of its own."""

_LATEST = 1 << 40
"""Unix seconds beyond which a time is none: some 35,000 years."""

_MERGED = ("plugged", "unplugged", "freed", "refused", "lost")


@dataclass
class Entry:
    """`count` events of one kind; `time` is the last one's in Unix seconds, `size` the sum of theirs in bytes, or of
    how many were lost."""

    time: float
    zone: str
    kind: str
    text: str
    count: int = 1
    size: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def role(self) -> Role:
        """Whether it is good news."""
        return {
            "reached": Role.GOOD,
            "refused": Role.BAD,
            "stalled": Role.BAD,
            "lost": Role.BAD,
            "touched": Role.BAD,
        }.get(self.kind, Role.TEXT)

    def as_dict(self) -> dict[str, Any]:
        """The entry as plain data; `last` is its last event."""
        return asdict(self)


class EventLog:
    """The last entries; thread-safe."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque(maxlen=ENTRIES_KEPT)
        self._lock = threading.Lock()

    def add(self, event: dict[str, Any]) -> None:
        """Take in an event as the API has it. What it lacks is made up; it is for reading only."""
        kind, zone = str(event.get("kind")), str(event.get("zone") or "")
        time, size = _number(event, "time", _LATEST), _number(event, "count" if kind == "lost" else "size")
        with self._lock:
            entry = self._alike(kind, zone, event, time)
            if entry is None:
                entry = Entry(time, zone, kind, "")
                self._entries.append(entry)
            else:
                entry.count += 1
            entry.time, entry.size, entry.last = time, entry.size + int(size), event
            entry.text = _TEXTS.get(kind, _plain)(entry)

    def _alike(self, kind: str, zone: str, event: dict[str, Any], time: float) -> Entry | None:
        """The entry that an event goes with."""
        if kind not in _MERGED:
            return None
        for entry in list(self._entries)[-_LOOK_BACK:]:
            same = (entry.kind, entry.zone) == (kind, zone) and _why(entry.last) == _why(event)
            if same and time - entry.time < _TOGETHER:
                return entry
        return None

    def last(self, count: int) -> list[Entry]:
        """The last entries, the newest last."""
        with self._lock:
            return list(self._entries)[-count:] if count else []

    def taken(self) -> list[Entry]:
        """The entries since this was called last. They are taken out: what comes later begins new ones."""
        with self._lock:
            taken = list(self._entries)
            self._entries.clear()
            return taken


def _number(event: dict[str, Any], name: str, most: int = U64_MAX) -> float:
    value = event.get(name)
    return value if isinstance(value, (int, float)) and 0 <= value <= most else 0


def _why(event: dict[str, Any]) -> tuple[object, ...]:
    return event.get("request"), event.get("answer"), event.get("reason"), event.get("count", 0) is None


def _plain(entry: Entry) -> str:
    return entry.kind


def _moved(entry: Entry) -> str:
    requests = "" if entry.count == 1 else f" in {entry.count:,} requests"
    return f"{entry.kind} {human_size(entry.size)}{requests}"


def _freed(entry: Entry) -> str:
    held = _number(entry.last, "held")
    return f"{human_size(entry.size)} back with the host" + (f", which still holds {human_size(held)}" if held else "")


def _refused(entry: Entry) -> str:
    times = "" if entry.count == 1 else f" {entry.count:,} times"
    return f"{entry.last.get('request')} answered {entry.last.get('answer')}{times}: {entry.last.get('reason')}"


def _lost(entry: Entry) -> str:
    if entry.last.get("count") is None:
        return "events may be lost: another process answers"
    return f"{entry.size:,} events lost: more came than are kept"


_TEXTS: dict[str, Callable[[Entry], str]] = {
    "plugged": _moved,
    "unplugged": _moved,
    "freed": _freed,
    "refused": _refused,
    "requested": lambda entry: f"{human_size(_number(entry.last, 'target'))} requested",
    "reached": lambda entry: str(entry.last.get("verdict")),
    "stalled": lambda entry: str(entry.last.get("verdict")),
    "superseded": lambda entry: str(entry.last.get("verdict")),
    "saved": lambda entry: f"snapshot saved in {entry.last.get('directory')}",
    "dumped": lambda entry: f"core dump in {entry.last.get('file')}",
    "system-reset": lambda _: "system reset",
    "connected": lambda _: "front end connected",
    "disconnected": lambda _: "front end disconnected",
    "lost": _lost,
    "touched": lambda entry: f"the host holds {human_size(entry.size)} for unplugged blocks",
}
