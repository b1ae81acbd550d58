"""The front end's side of the back-end channel: what the back end asks on its own account.

A notice that the configuration changed is counted and kept for the caller. A request of any other kind is refused,
unless the caller gave a handler for it: a front end that says yes to what it doesn't do would be believed.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress

from vhost_user.connection import Connection
from vhost_user.errors import Disconnected, FieldError, HostError, PeerError
from vhost_user.message import (
    U64,
    BackendRequest,
    Payload,
    ProtocolFeature,
    Reply,
    decode_payload,
    name_of,
    spec_of,
)
from vhost_user.owned_fd import OwnedFd

log = logging.getLogger(__name__)

ChannelHandler = Callable[[Payload, list[OwnedFd]], bool]
"""Gets a request's payload and descriptors, takes what it keeps, and says whether the request was granted."""

_MESSAGES_AT_ONCE = 64
"""A back end that sends without end doesn't keep the caller longer than that."""


class FrontendChannel:
    """Makes both ends: ours is served by `serve()`, and `theirs` is for the back end, to be closed once it is sent.

    HostError where no descriptor is left for them.
    """

    def __init__(self, acked: ProtocolFeature, handlers: Mapping[BackendRequest, ChannelHandler]) -> None:
        try:
            ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            remedy = "raise the limit on open files"
            raise HostError.from_os_error("back-end channel", "new", "socketpair", error, remedy) from error
        self.config_changes = 0
        self.refused = 0
        self._acked = acked
        self._handlers = handlers
        self._connection = Connection(ours, "back-end channel")

    def fileno(self) -> int:
        """For a selector: `serve()` when it can be read."""
        return self._connection.fileno()

    def serve(self) -> None:
        """Take the requests that have come. Raises Disconnected at the end, PeerError where a rule is broken."""
        for _ in range(_MESSAGES_AT_ONCE):
            received = self._connection.receive_now()
            if received is None:
                return
            with received:
                if received.reply:
                    raise PeerError("flags", f"{received.flags:#x}", "has to be a request, and no reply")
                spec = spec_of(received.request, self._acked, backend_channel=True)
                try:
                    granted = self._grant(received.request, received.body, received.fds)
                except FieldError as error:
                    log.warning("back-end channel: %s", error)
                    granted = False
            self.refused += not granted
            acked = received.need_reply and ProtocolFeature.REPLY_ACK in self._acked
            if acked or spec.reply is Reply.ALWAYS:
                answer = U64(0 if granted else 1).encode()
                with suppress(Disconnected):  # who is gone hears no answer, and may have said more before
                    self._connection.send(received.request, answer, reply=True, timeout=0)

    def _grant(self, number: int, body: bytes, fds: list[OwnedFd]) -> bool:
        spec = spec_of(number, self._acked, backend_channel=True)
        payload = decode_payload(spec, body, len(fds))
        request = BackendRequest(number)
        needs = spec.needs | spec.needs_for_fds if fds else spec.needs
        if lacking := needs & ~self._acked:
            raise PeerError(
                name_of(number, backend_channel=True), "sent", f"needs {lacking.name}, which was not negotiated"
            )
        if request is BackendRequest.CONFIG_CHANGE_MSG:
            self.config_changes += 1
            return True
        handler = self._handlers.get(request)
        return handler is not None and handler(payload, fds)

    def close(self) -> None:
        """Close both ends."""
        self._connection.close()
        self.theirs.close()
