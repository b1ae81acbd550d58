"""The event stream: Server-Sent Events, as the HTML standard's section of that name has them.

A reader that comes back names the last event that it has (`Last-Event-ID`), and gets what came since, as far as it is
still known. One that is too slow loses events. Either gets a `lost` event that says how many it lacks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator

from virtio_mem.api.body import refuse
from virtio_mem.api.message import ApiRequest
from virtio_mem.events import Event, Events

HEARTBEAT_SECONDS = 15.0
"""A comment is sent after so long a silence, so that both sides see that the other one is there."""

_LOOK_SECONDS = 1.0
"""How often a silent stream looks whether its reader has gone."""

_MAX_ID_DIGITS = 18


def last_event_id(request: ApiRequest) -> int | None:
    """The event that a reader had last, if it says so."""
    value = request.headers.get("last-event-id")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= _MAX_ID_DIGITS):
        raise refuse("Last-Event-ID", value, "must be the id of an event")
    return int(value)


def event_stream(events: Events, after: int | None, gone: Callable[[], bool]) -> Generator[bytes]:
    """The events from now on, or after `after`, as the bytes of a stream, until there are no more or `gone()`."""
    subscription = events.subscribe(after=after)

    def stream() -> Generator[bytes]:
        with subscription:
            yield b""
            yield b": connected\n\n"
            silent_since = time.monotonic()
            while not events.closed and not gone():
                event = subscription.get(_LOOK_SECONDS)
                if event is not None:
                    yield _encode(event)
                elif time.monotonic() - silent_since >= HEARTBEAT_SECONDS:
                    yield b": still here\n\n"
                else:
                    continue
                silent_since = time.monotonic()

    pieces = stream()
    next(pieces)  # closed before it began, it would not close what it holds: a reader may be gone before the first byte
    return pieces


def _encode(event: Event) -> bytes:
    number = f"id: {event.id}\n" if event.id else ""
    return f"{number}event: {event.kind}\ndata: {json.dumps(event.as_dict())}\n\n".encode()
