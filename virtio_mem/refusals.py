"""What the host refuses is logged, and fills no log: a guest can have it refused as often as it likes."""

from __future__ import annotations

import logging

from vhost_user.errors import FieldError, HostError
from virtio_mem.device import Effect

log = logging.getLogger(__name__)


class RefusalLog:
    """Logs refusals. One line of a kind is enough until something else has happened, and for a poll: a guest that is
    refused one thing, and granted another, can go on with that."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._granted = False

    def granted(self) -> None:
        """Something else happened than what was refused."""
        self._granted = True

    def polled(self) -> None:
        """A poll, at which what is refused from now on is told aloud, if something else happened."""
        if self._granted:
            self.begin()

    def begin(self) -> None:
        """Another guest comes: what it is refused is told aloud."""
        self._granted = False
        self._told.clear()

    def refused(self, who: str, effect: Effect, error: Exception) -> None:
        """Log that `effect` was refused, behind `who`."""
        kind = f"{effect.type.value} {error.field if isinstance(error, FieldError) else type(error).__name__}"
        level = logging.DEBUG if kind in self._told else logging.WARNING
        self._told.add(kind)
        unexpected = None if isinstance(error, HostError) else error
        text = "%s%s of %d bytes at %#x refused: %s"
        log.log(level, text, who, effect.type.value, effect.size, effect.offset, error, exc_info=unexpected)
