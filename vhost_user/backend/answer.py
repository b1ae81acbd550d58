"""What a handler of a message is, and what it can answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vhost_user.owned_fd import OwnedFd


class Answer(NamedTuple):
    """A reply to send: its payload, and descriptors that are closed once it is sent."""

    payload: bytes
    fds: tuple[OwnedFd, ...] = ()


class Deferred:
    """A reply that is not known yet. The front end's next message is not looked at before it is sent."""

    def __init__(self) -> None:
        self._answer: Answer | None = None
        self._then: Callable[[Answer], None] | None = None

    def resolve(self, answer: Answer) -> None:
        """The reply is `answer`: whoever waits for it gets it now, or as soon as it waits."""
        self._answer = answer
        if self._then is not None:
            self._then(answer)

    def when_known(self, then: Callable[[Answer], None]) -> None:
        """Have `then` called with the reply, at once if it is known."""
        self._then = then
        if self._answer is not None:
            then(self._answer)


Handler = Callable[[Any, list[OwnedFd]], Answer | Deferred | None]
"""Gets the decoded payload and the message's descriptors, of which it takes what it keeps; the rest is closed.

Returns the message's own reply, or None for a message that has none. PeerError or HostError refuses, and nothing has
changed."""
