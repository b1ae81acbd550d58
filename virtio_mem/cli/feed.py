"""What `watch` knows: a sample of every zone once in a while, and the events in between.

A server may be killed and another one take its place at the same socket. As long as somebody listens there, or did so
moments ago, the feed is `reconnecting`; it is `gone` when nobody has listened for `GRACE` seconds.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vhost_user.errors import FieldError, HostError, PeerError
from virtio_mem.cli.event_log import EventLog
from virtio_mem.client import Client, NoServer

GRACE = 1.5
"""Seconds without a listening socket after which the server counts as gone. A service that is restarted is back within
one; one whose supervisor lives never stops listening."""

POLL_PATIENCE = 1.0
RETRY = 0.2
"""Seconds: for an answer, and between two tries to connect."""

LOOK_AGAIN = 0.5
"""Seconds between two looks for a server that did not answer, at most."""


class Sample(NamedTuple):
    """One zone at one moment: what `vm.info` says of it, and answers a second since the sample before, by request and
    answer (`PLUG ACK`)."""

    zone: dict[str, Any]
    rates: dict[str, float]


@dataclass
class Feed:
    """Asks `client`. `poll()` is called by one thread; another one, started by `listen()`, takes events in."""

    client: Client
    samples: dict[str, Sample] = field(default_factory=dict)
    log: EventLog = field(default_factory=EventLog)
    trouble: str = ""
    gone: bool = False
    news: threading.Event = field(default_factory=threading.Event)
    _answers: dict[str, dict[str, int]] = field(default_factory=dict)
    _asked: float = 0.0
    _missing_since: float | None = None

    @property
    def reconnecting(self) -> bool:
        """Whether the samples are old because the server did not answer the last question."""
        return bool(self.trouble)

    def start(self) -> None:
        """The first sample. Raises as `Client` does: a server that was never there is not waited for."""
        self._take()

    def poll(self) -> None:
        """Take a sample, or find out that there is no server."""
        try:
            self._take()
        except NoServer as error:
            self.trouble = _why(error)
            now = time.monotonic()
            self._missing_since = now if self._missing_since is None else self._missing_since
            self.gone = now - self._missing_since > GRACE
        except (HostError, PeerError) as error:
            self.trouble = _why(error)
            self._missing_since = None  # somebody listens

    def until_next(self, interval: float) -> float:
        """Seconds to wait before the next look, where looks are so far apart: less while there is no answer."""
        return min(interval, LOOK_AGAIN) if self.reconnecting else interval

    def _take(self) -> None:
        info = self.client.info()
        now = time.monotonic()
        samples = {}
        for zone in info["zones"]:
            name, answers = zone["id"], zone["answers"] or {}
            samples[name] = Sample(zone, self._rates(name, answers, now - self._asked))
            self._answers[name] = answers
        self.samples, self._asked, self._missing_since, self.trouble = samples, now, None, ""

    def _rates(self, name: str, answers: dict[str, int], seconds: float) -> dict[str, float]:
        """Counts start again at 0 in a server that takes another one's place."""
        before = self._answers.get(name)
        if before is None or seconds <= 0 or self.reconnecting:
            return {}
        grown = {key: count - before.get(key, 0) for key, count in answers.items()}
        return {key: count / seconds for key, count in sorted(grown.items()) if count > 0}

    # Events.

    def listen(self) -> None:
        """Take events in, those first that the server still knows, in a thread that lasts as long as the process."""
        threading.Thread(target=self._listen, name="events", daemon=True).start()

    def _listen(self) -> None:
        after = 0
        while not self.gone:
            try:
                for event in self.client.events(after=after):
                    number = event.get("id")
                    after = number if type(number) is int and number > 0 else after
                    self.log.add(event)
                    self.news.set()
            except FieldError:
                pass  # poll() tells of it
            time.sleep(RETRY)


def _why(error: FieldError) -> str:
    return f"{error.field}: {error.limit}"
