"""Messages in random order to a session, which is rebuilt after each from what was kept: the same session comes out."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests import counts
from tests.backend.devices import Echo
from vhost_user.backend.journal import Journal, Rank
from vhost_user.backend.loop import EventLoop
from vhost_user.backend.session import Session
from vhost_user.connection import Received
from vhost_user.errors import FieldError, PeerError
from vhost_user.inflight import InflightBuffer
from vhost_user.message import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    PHASE_STOPPED,
    U64,
    VIRTIO_F_IOMMU_PLATFORM,
    DeviceState,
    FrontendRequest,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    SingleMemoryRegion,
    TransferDirection,
    VringAddr,
    VringFd,
    VringState,
)
from vhost_user.message.payload import Payload
from vhost_user.owned_fd import OwnedFd
from vhost_user.supervisor import kept
from vhost_user.supervisor.handed import fields_of
from vhost_user.supervisor.packets import KEY, MAX_PACKET, Kind, encode
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress

F = FrontendRequest
PAGE = 0x1000
REGION = 16 * PAGE
USER = 1 << 32
RINGS = 2

Made = tuple[FrontendRequest, Payload | None, list[OwnedFd]]


def memfd(size: int) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("memory", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), size)
    return fd


def eventfd() -> OwnedFd:
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))


def region(number: int) -> MemoryRegion:
    at = number * REGION
    return MemoryRegion(GuestAddress(at), ByteCount(REGION), UserAddress(USER + at), HostOffset(0))


BASIC = F_PROTOCOL_FEATURES | 1 << 32
KINDS = [[0, BASIC, BASIC | F_LOG_ALL], [BASIC | 1 << 34], [BASIC | VIRTIO_F_IOMMU_PLATFORM]]
"""What a front end may ack, one way or another: a split ring, a packed one, or one behind an IOMMU."""


class Messages:
    """Messages that a front end may send, some of them at the wrong moment."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.features = KINDS[0]
        self.front_ends_end, self.back_ends_end = socket.socketpair()

    def first(self) -> list[Made]:
        """For a new session."""
        self.features = self.rng.choice(KINDS)
        features = U64(self.rng.choice(self.features))
        return [(F.SET_PROTOCOL_FEATURES, U64(self.protocol_features()), []), (F.SET_FEATURES, features, [])]

    def close(self) -> None:
        self.front_ends_end.close()
        self.back_ends_end.close()

    def next(self) -> Made:
        rng, ring = self.rng, self.rng.randrange(RINGS)
        at = USER + rng.randrange(4) * REGION + ring * 4 * PAGE
        places = UserAddress(at), UserAddress(at + PAGE), UserAddress(at + 2 * PAGE)
        choices: list[Callable[[], Made]] = [
            lambda: (F.SET_OWNER, None, []),
            lambda: (F.SET_PROTOCOL_FEATURES, U64(self.protocol_features()), []),
            lambda: (F.SET_FEATURES, U64(rng.choice(self.features)), []),
            lambda: (F.SET_BACKEND_REQ_FD, None, [OwnedFd.duplicate_of(self.back_ends_end.fileno())]),
            lambda: (F.SET_LOG_BASE, Log(ByteCount(PAGE), HostOffset(0)), [memfd(PAGE)]),
            lambda: (F.NET_SET_MTU, U64(1500), []),
            self.table,
            lambda: (F.ADD_MEM_REG, SingleMemoryRegion(region(rng.randrange(4))), [memfd(REGION)]),
            lambda: (F.REM_MEM_REG, SingleMemoryRegion(region(rng.randrange(4))), []),
            self.inflight,
            lambda: (F.SET_VRING_ADDR, VringAddr(ring, 0, *places, GuestAddress(0)), []),
            lambda: (F.SET_VRING_NUM, VringState(ring, rng.choice([8, 8, 16])), []),
            lambda: (F.SET_VRING_BASE, VringState(ring, 0x80008000 if self.packed else 0), []),
            lambda: (F.SET_VRING_CALL, *self.event(ring)),
            lambda: (F.SET_VRING_ERR, *self.event(ring)),
            lambda: (F.SET_VRING_ENABLE, VringState(ring, rng.randrange(2)), []),
            lambda: (F.SET_VRING_KICK, *self.event(ring)),
            lambda: (F.SET_VRING_KICK, *self.event(ring)),
            lambda: (F.GET_VRING_BASE, VringState(ring, 0), []),
            lambda: (F.SET_STATUS, U64(rng.choice([0, 1, 15])), []),
            lambda: (F.RESET_DEVICE, None, []),
            lambda: (F.GET_STATUS, None, []),
        ]
        weights = [1, 0.2, 0.5] + [1] * (len(choices) - 5) + [0.5, 0.2]
        return rng.choices(choices, weights)[0]()

    def protocol_features(self) -> int:
        usual = ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIGURE_MEM_SLOTS
        usual |= ProtocolFeature.LOG_SHMFD | ProtocolFeature.STATUS | ProtocolFeature.INFLIGHT_SHMFD
        usual |= ProtocolFeature.RESET_DEVICE | ProtocolFeature.MTU
        return int(usual)

    @property
    def packed(self) -> bool:
        return bool(self.features[0] & 1 << 34)

    def event(self, ring: int) -> tuple[VringFd, list[OwnedFd]]:
        if self.rng.random() < 0.2:
            return VringFd(ring, no_fd=True), []
        return VringFd(ring), [eventfd()]

    def table(self) -> Made:
        numbers = self.rng.sample(range(4), self.rng.randrange(5))
        return F.SET_MEM_TABLE, MemoryTable(tuple(map(region, numbers))), [memfd(REGION) for _ in numbers]

    def inflight(self) -> Made:
        new = InflightBuffer.create(RINGS, 16, packed=self.packed)
        return F.SET_INFLIGHT_FD, Inflight(ByteCount(new.mmap_size), HostOffset(0), RINGS, 16), [new.fd]


class World:
    """A session, and the journal that somebody keeps of it."""

    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop
        self.kept = kept.Journal()
        self.session, self.journal = self.begin()
        self.refused = 0

    def begin(self) -> tuple[Session, Journal]:
        session = Session(Echo(), self.loop)
        return session, Journal(session)

    def send(self, made: Made) -> bool:
        """Whether the session is still there."""
        request, payload, fds = made
        body = b"" if payload is None else payload.encode()
        current = [fd.duplicate() for fd in fds]
        try:
            self.journal.follow(received := Received(int(request), 1 | 8, body, fds))
            self.session.handle(received)
        except FieldError:
            for fd in current:
                fd.close()
            return False
        changes = self.journal.changes()
        new = [fd for change in changes for fd in change.new]
        fields = list(fields_of(changes))
        assert len(encode(Kind.DONE, fields)) < MAX_PACKET
        self.kept.apply(fields, current, new)
        return True

    def rebuilt(self) -> tuple[Session, Journal]:
        """Another session, from what is kept."""
        session, journal = self.begin()
        session.rings.held = True
        for raw, entry in self.kept:
            rank, index = KEY.unpack(raw)
            try:
                journal.replay((Rank(rank), index), entry.data, [fd.duplicate() for fd in entry.fds])
            except FieldError:
                session.close()
                journal.close()
                raise
        session.rings.release()
        return session, journal

    def close(self) -> None:
        self.session.close()
        self.journal.close()
        self.kept.close()


@contextmanager
def world(loop: EventLoop) -> Iterator[World]:
    made = World(loop)
    try:
        yield made
    finally:
        made.close()


def state_of(session: Session) -> dict[str, Any]:
    """What a front end can tell by."""
    negotiated = session.negotiated
    regions = negotiated.memory.guest_memory.regions
    return {
        "features": (negotiated.features, negotiated.features_set, negotiated.protocol_features, negotiated.owned),
        "status": negotiated.status,
        "structures": (negotiated.log is None, negotiated.inflight is None, session.channel is None),
        "memory": sorted((region.guest_address, region.size, region.user_address) for region in regions),
        "rings": [
            (
                vring.size,
                vring.address,
                vring.base,
                vring.enabled,
                vring.started or vring.broken is not None,
                vring.broken is None,
                vring.polled,
                [event is None for event in (vring.kick, vring.call, vring.err)],
                None if vring.queue is None or vring.broken else vring.queue.state(),
            )
            for vring in session.rings.vrings
        ],
    }


def test_a_session_is_rebuilt_as_it_was(rng: random.Random, figure: Callable[[str, object], None]) -> None:
    messages = Messages(rng)
    loop = EventLoop()
    left = counts.JOURNALLED_MESSAGES
    started = 0
    while left:
        with world(loop) as one:
            assert all(map(one.send, messages.first()))
            ending = left - messages.rng.randrange(200)
            while left > max(ending, 0) and one.send(messages.next()):
                left -= 1
                expected = state_of(one.session)
                session, journal = one.rebuilt()
                found = state_of(session)
                for number, vring in enumerate(one.session.rings.vrings):
                    if vring.broken is not None:
                        # It breaks again, unless what broke it is mended.
                        assert session.rings[number].started or session.rings[number].broken
                        expected["rings"][number] = found["rings"][number] = "broken"
                assert found == expected
                started += session.rings.any_started
                session.close()
                journal.close()
                loop.run_once(0)
    loop.close()
    messages.close()
    figure("sessions that were rebuilt", counts.JOURNALLED_MESSAGES)
    figure("of these, with a ring that ran", started)


def test_what_can_not_be_any_more_is_not_told() -> None:
    """Said before SET_FEATURES: a size that no split ring has, and a buffer for split rings, not packed ones."""
    with ExitStack() as stack:
        loop = EventLoop()
        stack.callback(loop.close)
        one = stack.enter_context(world(loop))
        messages = Messages(random.Random(0))
        stack.callback(messages.close)
        assert one.send((F.SET_PROTOCOL_FEATURES, U64(messages.protocol_features()), []))
        assert one.send((F.SET_VRING_NUM, VringState(0, 12), []))
        assert one.send((F.SET_FEATURES, U64(BASIC), []))
        assert one.send(messages.inflight())
        assert one.send((F.SET_VRING_NUM, VringState(1, 8), []))
        session, journal = one.rebuilt()
        assert [vring.size for vring in session.rings.vrings] == [0, 8]
        assert session.negotiated.inflight is not None
        session.close()
        journal.close()
        assert one.send((F.SET_FEATURES, U64(BASIC | 1 << 34), []))
        session, journal = one.rebuilt()
        assert [vring.size for vring in session.rings.vrings] == [12, 8]
        assert session.negotiated.inflight is None
        session.close()
        journal.close()


def test_postcopy_and_transfers_are_not_carried_over() -> None:
    with ExitStack() as stack:
        loop = EventLoop()
        stack.callback(loop.close)
        one = stack.enter_context(world(loop))
        protocol_features = ProtocolFeature.REPLY_ACK | ProtocolFeature.DEVICE_STATE
        assert one.send((F.SET_PROTOCOL_FEATURES, U64(int(protocol_features)), []))
        assert one.send((F.SET_FEATURES, U64(BASIC), []))
        reading, writing = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, reading)
        save = DeviceState(TransferDirection.SAVE, PHASE_STOPPED)
        assert one.send((F.SET_DEVICE_STATE_FD, save, [OwnedFd(writing)]))
        with pytest.raises(PeerError, match="transfer"):
            one.rebuilt()
        loop.run_once(1)
        assert os.read(reading, 100)
        assert one.send((F.CHECK_DEVICE_STATE, None, []))
        session, journal = one.rebuilt()
        session.close()
        journal.close()
