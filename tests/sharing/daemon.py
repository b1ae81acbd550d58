"""A daemon that only keeps the list of its regions, and can be told to refuse, to close, to be silent, or to vanish."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from vhost_user.connection import Connection
from vhost_user.errors import Disconnected
from vhost_user.frontend import Frontend
from vhost_user.message import (
    F_PROTOCOL_FEATURES,
    U64,
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Reply,
    SingleMemoryRegion,
    decode_payload,
    spec_of,
)

GET_FEATURES, ADD, REM, TABLE = (
    FrontendRequest.GET_FEATURES,
    FrontendRequest.ADD_MEM_REG,
    FrontendRequest.REM_MEM_REG,
    FrontendRequest.SET_MEM_TABLE,
)
LONG = 60.0


class FakeDaemon:
    """Serves its end of a socket pair in a thread. `slots` of None: whole tables only.

    `refuses` are requests acknowledged by 1, `closes_after` those acknowledged by 0 and then by the end, as
    libvhost-user does; `babbles_after` are answered by something else, and `silent_after` by nothing, the socket
    staying open until `end()`. `chances` is how many such requests are granted before.
    """

    def __init__(self, slots: int | None = 509) -> None:
        self.slots = slots
        self.regions: dict[int, MemoryRegion] = {}
        self.refuses: set[FrontendRequest] = set()
        self.closes_after: set[FrontendRequest] = set()
        self.babbles_after: set[FrontendRequest] = set()
        self.silent_after: set[FrontendRequest] = set()
        self.chances = 0
        self.ending = False
        """Whether it has acknowledged something, and closes its end for that, at once or in a moment."""
        self.requests: list[FrontendRequest] = []
        self._acked = ProtocolFeature.NONE
        self._awake = threading.Event()
        self._thread: threading.Thread | None = None
        self._sock: socket.socket | None = None

    def behave(self) -> None:
        """Refuse nothing any more."""
        for mood in (self.refuses, self.closes_after, self.babbles_after, self.silent_after):
            mood.clear()
        self.chances = 0

    def start(self) -> Connection:
        """Come (back); the front end's end of the connection."""
        self.end()
        self._awake.clear()
        self.ending = False
        self._acked = ProtocolFeature.NONE
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock = mine
        self._thread = threading.Thread(target=self._serve, args=(Connection(mine),), daemon=True)
        self._thread.start()
        return Connection(theirs, "fake")

    def frontend(self, timeout: float = 5.0) -> Frontend:
        return Frontend(self.start(), features=0, timeout=timeout)

    def end(self) -> None:
        """Vanish; what it had, it has no more."""
        if self._sock is not None and self._thread is not None:
            self._awake.set()
            self._shut_down()
            self._thread.join()
            self._sock = self._thread = None

    def _shut_down(self) -> None:
        assert self._sock is not None
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _serve(self, connection: Connection) -> None:
        with connection, suppress(Disconnected):
            while self._serve_one(connection):
                pass
        self.regions.clear()

    def _serve_one(self, connection: Connection) -> bool:
        with connection.receive(LONG) as received:
            request = FrontendRequest(received.request)
            self.requests.append(request)
            spec = spec_of(request, self._acked)
            payload = decode_payload(spec, received.body, len(received.fds))
        mood = next((mood for mood in self._moods if request in mood), None)
        if mood is not None and self.chances:
            self.chances -= 1
            mood = None
        if mood is self.silent_after:
            self._awake.wait(LONG)
            return False
        if mood is self.babbles_after:
            connection.send(FrontendRequest.GET_CONFIG, bytes(8), reply=True, timeout=LONG)
            self._awake.wait(LONG)
            return False
        answer = int(mood is self.refuses) if mood is not None else self._take(request, payload)
        self.ending = mood is self.closes_after
        if spec.reply is Reply.ALWAYS or received.need_reply:
            connection.send(request, U64(answer).encode(), reply=True, timeout=LONG)
        if mood is self.closes_after:
            self._shut_down()  # at once, as by the end of a process: closing takes a moment
            return False
        return True

    @property
    def _moods(self) -> tuple[set[FrontendRequest], ...]:
        return self.refuses, self.closes_after, self.babbles_after, self.silent_after

    def _take(self, request: FrontendRequest, payload: Payload) -> int:
        match payload:
            case SingleMemoryRegion(region) if request is ADD:
                assert region.guest_address not in self.regions
                assert self.slots is not None
                assert len(self.regions) < self.slots
                self.regions[region.guest_address] = region
            case SingleMemoryRegion(region):
                assert self.regions.pop(region.guest_address).size == region.size
            case MemoryTable(regions):
                self.regions = {region.guest_address: region for region in regions}
            case U64(value) if request is FrontendRequest.SET_PROTOCOL_FEATURES:
                self._acked = ProtocolFeature(value)
            case _:
                return self._number(request)
        return 0

    def _number(self, request: FrontendRequest) -> int:
        features = ProtocolFeature.REPLY_ACK
        if self.slots is not None:
            features |= ProtocolFeature.CONFIGURE_MEM_SLOTS
        return {
            FrontendRequest.GET_FEATURES: F_PROTOCOL_FEATURES,
            FrontendRequest.GET_PROTOCOL_FEATURES: int(features),
            FrontendRequest.GET_MAX_MEM_SLOTS: self.slots or 0,
        }.get(request, 0)
