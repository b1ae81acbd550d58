"""What every attack begins with: a connection, negotiation, memory, rings, and odd descriptors; all closed afterwards.

The good part of an attack may fail: a daemon is free to refuse a ring size, or to close since it saw enough. An attack
that does not get as far as what it is about is neither passed nor failed, and is reported as "not reached".
"""

from __future__ import annotations

import os
import random
import select
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from vhost_user.attack.canary import GUEST, Canary
from vhost_user.attack.line import Line
from vhost_user.attack.ring import AREA, HostileRing
from vhost_user.attack.theme import Outcome, Reaction
from vhost_user.errors import Disconnected, FieldError, TimedOut
from vhost_user.message import (
    F_PROTOCOL_FEATURES,
    U64,
    FrontendRequest,
    MemoryTable,
    ProtocolFeature,
    VringState,
)
from vhost_user.owned_fd import OwnedFd

F = FrontendRequest

VERSION_1 = 1 << 32

OF_THE_DEVICE = (1 << 24) - 1
"""Feature bits that a kind of device has for itself; virtio 1.3, 2.2 "Feature Bits"."""

HARMLESS = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
)
"""What is acked where it is offered, and an attack names nothing else: bits that oblige us to nothing."""

_OF_NETWORK_DEVICES = ProtocolFeature.RARP | ProtocolFeature.MTU
"""Who offers one of these has rings of one direction each."""

RINGS_AT_MOST = 2
"""Rings that are started: a network device uses two, a file system's first one is a special one."""


@dataclass(frozen=True)
class Offer:
    """What the daemon offers, as the first good front end found it. It serves none that doesn't ack `insists`, which is
    none of ours to make use of."""

    features: int
    protocol: ProtocolFeature
    rings: int
    slots: int
    insists: int = 0

    def has(self, needs: ProtocolFeature, virtio: int) -> bool:
        """Whether all of these are offered."""
        return self.protocol & needs == needs and self.features & virtio == virtio


class NotReached(Exception):  # noqa: N818
    """What the attack needs could not be had. The message says what."""


class _Closable(Protocol):
    def close(self) -> None: ...


class Attacker:
    """One hostile front end against the daemon at `path`, connected; closes all that it made at the end of a `with`.

    `rng` makes what is random. `timeout` and `patience` are in seconds: how long an answer may take, and how long to
    wait where none is likely.
    """

    def __init__(self, path: str, offer: Offer, rng: random.Random, *, timeout: float, patience: float = 0.1) -> None:
        self.path = path
        self.offer = offer
        self.rng = rng
        self.timeout = timeout
        self.patience = patience
        self.canaries: list[Canary] = []
        self._stack = ExitStack()
        self._memory = ExitStack()
        try:
            self.line = self.open_line()
        except OSError as error:
            raise NotReached(f"connect: {error.strerror}") from error

    def open_line(self, timeout: float | None = None) -> Line:
        """One connection more. OSError where none can be had."""
        line = Line(self.path, self.timeout if timeout is None else timeout)
        self._stack.callback(line.close)
        return line

    def keep(self, thing: _Closable) -> None:
        """Close `thing` at the end."""
        self._stack.callback(thing.close)

    def vanish(self) -> None:
        """Close everything but our memory, which the daemon may spoil even now."""
        self._stack.close()

    def spoiled(self) -> str:
        """What became of our memory; empty where all is as it should be."""
        return "; ".join(filter(None, (canary.spoiled() for canary in self.canaries)))

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._memory.close()

    @contextmanager
    def reaching(self, what: str) -> Iterator[None]:
        """A block that has to succeed for the attack to begin: NotReached where it does not."""
        try:
            yield
        except FieldError as error:
            if isinstance(error, Disconnected):
                reason = "the daemon closed"
            else:
                reason = "no answer" if isinstance(error, TimedOut) else str(error)
            raise NotReached(f"{what}: {reason}") from error

    # The good part.

    def negotiate(
        self,
        protocol: ProtocolFeature = HARMLESS,
        *,
        virtio: int = 0,
        line: Line | None = None,
        set_features: bool = True,
    ) -> Line:
        """Agree on what is offered of these, and take the device over."""
        line = line or self.line
        with self.reaching("negotiation"):
            offered = line.ask_number(F.GET_FEATURES)
            if offered & F_PROTOCOL_FEATURES:
                acked = ProtocolFeature(line.ask_number(F.GET_PROTOCOL_FEATURES)) & protocol
                line.send(F.SET_PROTOCOL_FEATURES, U64(int(acked)))
                line.acked = acked
            line.tell(F.SET_OWNER)
            if set_features:
                wanted = VERSION_1 | F_PROTOCOL_FEATURES | self.offer.insists | virtio
                line.tell(F.SET_FEATURES, U64(offered & wanted))
            line.answers()
        return line

    def canary(self, guest: int = GUEST, **more: int) -> Canary:
        """Memory of ours, compared after the attack with what it should be."""
        canary = Canary(guest=guest, **more)
        self._memory.callback(canary.close)
        self.canaries.append(canary)
        return canary

    def share(self, *canaries: Canary) -> Canary:
        """Make a memory table of these, or of a new one; the first of them."""
        shared = canaries or (self.canary(),)
        table = MemoryTable(tuple(canary.region() for canary in shared))
        with self.reaching("memory table"):
            self.line.tell(F.SET_MEM_TABLE, table, [canary.fd for canary in shared])
            self.line.answers()
        return shared[0]

    def negotiated_memory(self, protocol: ProtocolFeature = HARMLESS, *, virtio: int = 0) -> Canary:
        """Negotiation, and one region."""
        self.negotiate(protocol, virtio=virtio)
        return self.share()

    def ring(self, canary: Canary, index: int = 0, at: int | None = None) -> HostileRing:
        """Ring `index`, its parts placed in the window of `canary`, empty. The daemon hears nothing of it."""
        one_way = bool(self.offer.protocol & _OF_NETWORK_DEVICES)
        ring = HostileRing(canary, index, AREA * index if at is None else at, one_way=one_way)
        self.keep(ring)
        return ring

    def start(self, *rings: HostileRing, base: int = 0) -> None:
        """Have the daemon serve these rings from `base` on."""
        line = self.line
        with self.reaching("starting a ring"):
            for ring in rings:
                line.tell(F.SET_VRING_NUM, VringState(ring.index, ring.size))
                line.tell(F.SET_VRING_BASE, VringState(ring.index, base))
                line.tell(F.SET_VRING_ADDR, ring.addresses())
                line.tell(F.SET_VRING_CALL, U64(ring.index), [ring.call])
                line.tell(F.SET_VRING_KICK, U64(ring.index), [ring.kick])
            for ring in rings:
                if self.offer.features & F_PROTOCOL_FEATURES:
                    line.tell(F.SET_VRING_ENABLE, VringState(ring.index, 1))
            line.answers()

    def running(self, protocol: ProtocolFeature = HARMLESS, *, virtio: int = 0) -> tuple[Canary, list[HostileRing]]:
        """Negotiation, one region, and the device's first rings, running and empty."""
        canary = self.negotiated_memory(protocol, virtio=virtio)
        rings = [self.ring(canary, index) for index in range(min(self.offer.rings, RINGS_AT_MOST))]
        self.start(*rings)
        return canary, rings

    # What follows what was put into a ring.

    def kick(self, *rings: HostileRing) -> Outcome:
        """Kick the rings, give the daemon a moment, and stop them: what it did in all."""
        line = self.line
        poll = select.poll()
        poll.register(line.sock, select.POLLIN)
        for ring in rings:
            ring.signal()
            poll.register(ring.call, select.POLLIN)
        poll.poll(self.patience * 1000)
        try:
            line.answers()
            for ring in rings:
                line.ask(F.GET_VRING_BASE, VringState(ring.index, 0))
        except Disconnected:
            return Outcome(Reaction.CLOSED)
        except TimedOut:
            return Outcome(Reaction.SILENT, "no answer to GET_VRING_BASE")
        except FieldError as error:
            return Outcome(Reaction.REFUSED, str(error))
        used = sum(ring.used() for ring in rings)
        return Outcome(Reaction.IGNORED, f"{used} chains came back, the rings stopped")

    # Descriptors that should not be where they are sent.

    def odd_fd(self, kind: str) -> int:
        """A descriptor of the kind that ODD_FDS names, closed at the end."""
        fd = _ODD_FDS[kind](self)
        self._stack.callback(os.close, fd)
        return fd

    def file(self, size: int = 1 << 16) -> int:
        """A regular file's descriptor, unlinked, of zeros, closed at the end."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the rest
        self.keep(file)
        file.truncate(size)
        return file.fileno()

    def pipe(self) -> tuple[OwnedFd, OwnedFd]:
        """The reading and the writing end of a pipe, closed at the end if they are not before."""
        reading, writing = (OwnedFd(fd) for fd in os.pipe2(os.O_CLOEXEC))
        self.keep(reading)
        self.keep(writing)
        return reading, writing

    def pair(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
        """Two connected sockets, closed at the end."""
        ends = socket.socketpair(socket.AF_UNIX, kind)
        for end in ends:
            self.keep(end)
        return ends


def _broken_pipe(reading: bool) -> int:
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.close(ends[1 if reading else 0])
    return ends[0 if reading else 1]


def _full_eventfd(_: Attacker) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(fd, 2**64 - 2)
    return fd


def _epoll(_: Attacker) -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


def _full_pipe(attacker: Attacker) -> int:
    writing = attacker.pipe()[1].fileno()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writing, True)
    return os.dup(writing)


_ODD_FDS: dict[str, Callable[[Attacker], int]] = {
    "file": lambda attacker: os.dup(attacker.file()),
    "directory": lambda _: os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
    "path": lambda _: os.open("/", os.O_PATH | os.O_CLOEXEC),
    "zero": lambda _: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC),
    "null": lambda _: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
    "full-device": lambda _: os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC),
    "epoll": _epoll,
    "pidfd": lambda _: os.pidfd_open(os.getpid()),
    "the-connection": lambda attacker: os.dup(attacker.line.sock.fileno()),
    "broken-pipe": lambda _: _broken_pipe(reading=True),
    "unread-pipe": lambda _: _broken_pipe(reading=False),
    "full-eventfd": _full_eventfd,
    "full-pipe": _full_pipe,
    "eventfd": lambda _: os.eventfd(0, os.EFD_CLOEXEC),
    "socket": lambda attacker: os.dup(attacker.pair()[0].fileno()),
    "datagram-socket": lambda attacker: os.dup(attacker.pair(socket.SOCK_DGRAM)[0].fileno()),
    "pipe": lambda attacker: os.dup(attacker.pipe()[0].fileno()),
}

ODD_FDS = tuple(_ODD_FDS)
"""Kinds of descriptors: what a daemon may find where it expects an eventfd, memory or a socket."""
