"""What became of requests: counted, and told to who wants to know."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

from vhost_user.units import ByteCount
from virtio_mem.device import VirtioMemDevice
from virtio_mem.protocol import REQUEST_SIZE, Request, RequestType, Response, ResponseType
from virtio_mem.verdict import VERDICTS

log = logging.getLogger(__name__)

_COUNTED = {
    key: ("unknown" if verdict.type is None else verdict.type.name, verdict.response.type.name)
    for key, verdict in VERDICTS.items()
}
_ERRORS = {
    key: (_COUNTED[key][0], verdict.response.reason)
    for key, verdict in VERDICTS.items()
    if verdict.response.type is ResponseType.ERROR
}
_NAMES: dict[int, str] = {type_.value: type_.name for type_ in RequestType}


MOST_BYTES = 2**63 - 1
"""Where counters of bytes stay, as clients are promised integers of 64 bits: a guest that plugs and unplugs tebibytes,
and touches none of them, gets there within minutes."""


class ServiceObserver(Protocol):
    """Somebody who wants to know what comes of requests, and can't refuse them. It comes and goes under the service's
    lock, and both are called under it; what they raise is logged, and keeps no request from being answered."""

    def answered(self, request: Request, response: Response) -> None:
        """`request` is answered by `response`, which its driver may have or not have yet. The device is as it says, or
        as those left it that were served together with it: see `DeviceService.serve`."""

    def discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
        """`unplugged` bytes were given back, of which the host still holds `kept`; None where it can't tell."""


class Tally:
    """How often each request of `device` got each answer, by their names; and the observers."""

    def __init__(self, device: VirtioMemDevice) -> None:
        self._device = device
        self._answers: Counter[tuple[str, str]] = Counter()
        self._errors: Counter[tuple[str, str]] = Counter()
        """What was answered ERROR, by request and reason, since that was logged."""
        self._logged: set[tuple[str, str]] = set()
        self.observers: list[ServiceObserver] = []
        self.unplugged_bytes = 0
        """What was unplugged, up to MOST_BYTES."""
        self.unreturned_bytes = 0
        """What the host still held of it right afterwards; the same."""
        self.unrequested_bytes = 0
        """What was unplugged although nobody had asked for it; the same."""
        self._held: list[Callable[[], None]] | None = None

    def hold(self) -> None:
        """Keep what is to be counted and told from now on until `release()`, or until this is called again: before more
        is served, or who is told would see what that left. Nobody else has the service's lock meanwhile."""
        self.release()
        self._held = []

    def release(self) -> None:
        """Count and tell what was kept, in order."""
        held, self._held = self._held, None
        for each in held or ():
            each()

    @property
    def answers(self) -> Counter[tuple[str, str]]:
        """The counts as they are now."""
        self._take_counts()
        return self._answers

    def _take_counts(self) -> None:
        for verdict, count in self._device.take_answered().items():
            self._count(verdict, count)

    def _count(self, verdict: int, count: int) -> None:
        self._answers[_COUNTED[verdict]] += count
        if error := _ERRORS.get(verdict):
            self._errors[error] += count

    def log_errors(self, who: str) -> None:
        """Log what was answered ERROR since the last call, behind `who`: Linux gives its device up for good then.

        Each kind is told aloud once, until `expect_errors()`: a guest can make as many as it likes.
        """
        self._take_counts()
        for (name, reason), count in self._errors.items():
            level = logging.DEBUG if (name, reason) in self._logged else logging.WARNING
            text = "%s%s answered ERROR %d times: %s; Linux gives a device up that says so"
            log.log(level, text, who, name, count, reason)
        self._logged.update(self._errors)
        self._errors.clear()

    def expect_errors(self) -> None:
        """Another guest comes: what it does wrong is told aloud again."""
        self._logged.clear()

    @property
    def looks_at_each(self) -> bool:
        """Whether somebody wants to know of each request."""
        return bool(self.observers) or log.isEnabledFor(logging.DEBUG)

    def answered(self, request: Request, response: Response) -> None:
        """`request` is about to be answered."""
        if self._held is not None:
            self._held.append(partial(self.answered, request, response))
            return
        name = _NAMES.get(request.type, "unknown")
        self._answers[name, response.type.name] += 1
        if response.type is ResponseType.ERROR:
            self._errors[name, response.reason] += 1
        if response.type is not ResponseType.ACK:
            log.debug("%s %#x+%d: %s: %s", name, request.addr, request.nb_blocks, response.type.name, response.reason)
        for observer in self.observers:
            _tell(partial(observer.answered, request, response))

    def answered_all(self, requests: memoryview, verdicts: bytes) -> None:
        """The first of `requests`, which stay as they are until they are counted, are about to be answered as their
        verdicts say; see `Decision`."""
        if self._held is not None:
            self._held.append(partial(self.answered_all, requests, verdicts))
            return
        if self.looks_at_each:
            for at, verdict in enumerate(verdicts):
                self.answered(Request.decode(requests[REQUEST_SIZE * at :]), VERDICTS[verdict].response)
            return
        left = verdicts
        while left:
            first = left[:1]
            count = left.count(first)
            self._count(left[0], count)
            left = left.replace(first, b"") if count < len(left) else b""

    def discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
        """Memory was given back. It is counted at once, and told when the rest is: counts of bytes are saved with the
        blocks, before a driver is answered."""
        self.unplugged_bytes = min(self.unplugged_bytes + unplugged, MOST_BYTES)
        self.unreturned_bytes = min(self.unreturned_bytes + (kept or 0), MOST_BYTES)
        if self._held is None:
            self._tell_discarded(unplugged, kept)
        else:
            self._held.append(partial(self._tell_discarded, unplugged, kept))

    def unrequested(self, size: ByteCount) -> None:
        """Of what is unplugged now, `size` bytes were not asked for."""
        self.unrequested_bytes = min(self.unrequested_bytes + size, MOST_BYTES)

    def _tell_discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
        for observer in self.observers:
            _tell(partial(observer.discarded, unplugged, kept))


def _tell(observe: Callable[[], None]) -> None:
    try:
        observe()
    except Exception:
        log.exception("an observer failed")
