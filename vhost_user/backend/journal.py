"""A session as the messages that make it: what has to be kept, so that another process can go on with it.

A back end that may be killed at any moment has somebody outside keep what its front end said (vhost_user/supervisor).
That is no log. It is an entry for each thing that a session has one of, in a canonical order, and a message changes few
of them: SET_VRING_NUM replaces an entry, REM_MEM_REG removes one, GET_VRING_BASE replaces a base and removes a kick. So
it is as large as the session's state, however long that lives, and telling it to a fresh session is a list of messages
in an order in which each is allowed. Translations of an IOMMU are not in it: rings ask again for what they miss.

What is not in the front end's messages is what a ring has in flight. That is in an inflight area, as
vhost_user/inflight has it: the front end's, where it shares one, or else a private one of the ring, made when it is
started. A private area's descriptor is part of the journal, in an entry of the ring's.

The order of writes. "Kept" means that the keeper has it, by one packet that it gets as a whole or not at all.

    1. a message comes, and is kept with its descriptors as the current one
    2. the session does what it says. A ring that starts makes a new area for itself, and its queue; that ring is not
       served yet, and the driver is called, which at worst finds nothing
    3. what it changed is kept, the message is not the current one any more, and its reply is kept: all by one packet
    4. the reply is sent, as a whole; a ring that was started is served from here on
    5. the next message is read

and for each request of a ring, at any time from 4 on:

    a. the chain is taken, and noted in the area: see inflight/
    b. the device does what it asks for
    c. the chain goes back, as inflight/ has it, and the driver is called

A process that is killed leaves the session as it was kept, and the next one does: tell the journal to a session of its
own, replies swallowed and rings held; take each running ring over from its area; serve every ring once, which begins
with what was in flight; then handle the current message, if there is one. Where the death was:

    before 2            the message is handled for the first time
    between 2 and 3     the message is handled again, by a session that is as if it never was. A ring that it started
                        was not served, and its area is forgotten with it: it is started again, at the base that was
                        told. A ring that it stopped runs again, with nothing in flight that is not in its area, and
                        is stopped again, further on if the driver was faster. Memory that it took away is still the
                        front end's, which has no answer yet
    between 3 and 4     the session is as after the message, and the keeper sends the reply
    between a and c     the chain is taken again, before any other
    after a used entry  its driver may not have been called: a ring that is taken over calls it once for nothing
    before a kick was   each ring is served once without one
      looked at

A ring that broke breaks again, or runs again if what broke it is mended, such as memory that it lay in and that was not
shared for a while.

So a message is handled at least once, with its effect kept once; a driver sees a request come back exactly once; and a
device may see a request twice, as under inflight/.

Two things are not carried over, and a session that is in the middle of one ends: postcopy, whose faults are told by the
addresses of one process, and a transfer of the device's state. The device's own state is the device's to keep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from vhost_user.backend.areas import Areas
from vhost_user.backend.session import Session
from vhost_user.backend.vring import Vring
from vhost_user.connection import Received
from vhost_user.errors import PeerError
from vhost_user.message import (
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    SingleMemoryRegion,
    VringFd,
    VringState,
    encode_message,
)
from vhost_user.owned_fd import OwnedFd

log = logging.getLogger(__name__)

F = FrontendRequest


class Rank(IntEnum):
    """The kinds of entries, in the order in which they are told.

    Addresses before sizes, since a ring with a size checks its address at once; and kicks last, since they start rings.
    """

    PROTOCOL_FEATURES = 1
    OWNER = 2
    FEATURES = 3
    CHANNEL = 4
    MTU = 5
    LOG = 6
    TABLE = 7
    REGION = 8
    INFLIGHT = 9
    ADDRESS = 10
    SIZE = 11
    BASE = 12
    CALL = 13
    ERR = 14
    ENABLED = 15
    AREA = 16
    KICK = 17
    STATUS = 18
    NOT_CARRIED = 19
    """No message, but what the session is in the middle of."""


Key = tuple[Rank, int]

_MAY_LAPSE = {Rank.INFLIGHT, Rank.SIZE, Rank.BASE}
"""What a front end may have said before SET_FEATURES that can't be true after it; no ring starts with it."""

POSTCOPY, TRANSFER = (Rank.NOT_CARRIED, 0), (Rank.NOT_CARRIED, 1)


class FdOf(NamedTuple):
    """A descriptor of an entry: the `number`-th of those of entry `key`, which is replaced or removed by the same
    message; of the current message, where that is None."""

    key: Key | None
    number: int


class Change(NamedTuple):
    """An entry as it is from now on; without data, it is none any more. `new` are descriptors that nobody had."""

    key: Key
    data: bytes = b""
    fds: tuple[FdOf, ...] = ()
    new: tuple[OwnedFd, ...] = ()


class Journal:
    """Follows `session`, which is fresh: what each message changes of its journal."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._areas = Areas()
        self._changes: list[Change] = []
        self._message, self._fds = b"", 0
        self._table: list[MemoryRegion] = []
        self._regions: set[int] = set()
        self._enables: set[int] = set()
        session.accepted = self._accepted
        session.rings.serves_later = True
        for vring in session.rings.vrings:
            vring.open_area = self._areas.open
        self._rules: Mapping[FrontendRequest, Callable[[Any], None]] = {
            F.SET_PROTOCOL_FEATURES: lambda _: self._keep(Rank.PROTOCOL_FEATURES),
            F.SET_OWNER: lambda _: self._keep(Rank.OWNER),
            F.SET_FEATURES: self._set_features,
            F.SET_BACKEND_REQ_FD: lambda _: self._keep(Rank.CHANNEL),
            F.NET_SET_MTU: lambda _: self._keep(Rank.MTU),
            F.SET_LOG_BASE: lambda _: self._keep(Rank.LOG),
            F.SET_MEM_TABLE: self._set_mem_table,
            F.ADD_MEM_REG: self._add_mem_reg,
            F.REM_MEM_REG: self._rem_mem_reg,
            F.SET_INFLIGHT_FD: lambda _: self._keep(Rank.INFLIGHT),
            F.SET_VRING_ADDR: lambda payload: self._keep(Rank.ADDRESS, payload.index),
            F.SET_VRING_NUM: lambda payload: self._keep(Rank.SIZE, payload.index),
            F.SET_VRING_BASE: lambda payload: self._keep(Rank.BASE, payload.index),
            F.SET_VRING_CALL: lambda payload: self._keep_event(Rank.CALL, payload),
            F.SET_VRING_ERR: lambda payload: self._keep_event(Rank.ERR, payload),
            F.SET_VRING_ENABLE: lambda payload: self._enabled(self._session.rings[payload.index]),
            F.SET_VRING_KICK: self._set_vring_kick,
            F.GET_VRING_BASE: lambda payload: self._stopped(self._session.rings[payload.index]),
            F.RESET_DEVICE: self._reset_device,
            F.SET_STATUS: self._set_status,
            F.POSTCOPY_ADVISE: lambda _: self._change(POSTCOPY, b"postcopy"),
            F.POSTCOPY_END: lambda _: self._change(POSTCOPY),
            F.SET_DEVICE_STATE_FD: self._set_device_state_fd,
            F.CHECK_DEVICE_STATE: lambda _: self._change(TRANSFER),
        }

    def follow(self, received: Received) -> None:
        """This message is handled next."""
        assert not self._changes
        self._areas.forget_made()
        self._message = encode_message(received.request, received.body)
        self._fds = len(received.fds)

    def changes(self) -> list[Change]:
        """What the message changed, once. The new descriptors are the caller's."""
        changes, self._changes = self._changes, []
        return changes

    def replay(self, key: Key, data: bytes, fds: list[OwnedFd]) -> None:
        """Have the session, whose rings are held, do what an entry says. Takes the descriptors over.

        PeerError where it can't, which is where a front end did things in an order that makes no sense.
        """
        rank, index = key
        if rank == Rank.NOT_CARRIED:
            raise PeerError(
                "session", data.decode(), "has to be in no middle that dies with a process", "begin it again"
            )
        if rank == Rank.AREA:
            self._areas.take_over(index, fds[0])
            return
        received = Received.of(data, fds)
        self.follow(received)
        try:
            self._session.handle(received)
        except PeerError as error:
            if rank not in _MAY_LAPSE:
                raise
            log.info("not told again: %s", error)
        for change in self.changes():
            for fd in change.new:
                fd.close()

    def close(self) -> None:
        """The session is closed."""
        self._areas.close()

    # What messages change.

    def _accepted(self, request: FrontendRequest, payload: Any) -> None:
        if (rule := self._rules.get(request)) is not None:
            rule(payload)

    def _change(self, key: Key, data: bytes = b"", fds: tuple[FdOf, ...] = (), new: tuple[OwnedFd, ...] = ()) -> None:
        self._changes.append(Change(key, data, fds, new))

    def _keep(self, rank: Rank, index: int = 0) -> None:
        """The message itself, in place of what was kept under its key."""
        self._change((rank, index), self._message, tuple(FdOf(None, number) for number in range(self._fds)))

    def _set_features(self, _: object) -> None:
        self._keep(Rank.FEATURES)
        for vring in self._session.rings.vrings:
            self._enabled(vring)

    def _enabled(self, vring: Vring) -> None:
        """A ring is disabled at first, or enabled by what was negotiated: else there is an entry."""
        key = (Rank.ENABLED, vring.index)
        if vring.enabled and not self._session.negotiated.starts_enabled:
            self._enables.add(vring.index)
            self._change(key, encode_message(F.SET_VRING_ENABLE, VringState(vring.index, 1).encode()))
        elif vring.index in self._enables:
            self._enables.remove(vring.index)
            self._change(key)

    def _keep_event(self, rank: Rank, payload: VringFd) -> None:
        if self._fds:
            self._keep(rank, payload.index)
        else:
            self._change((rank, payload.index))

    # Memory.

    def _set_mem_table(self, payload: MemoryTable) -> None:
        if not payload.regions and self._session.negotiated.postcopy:
            return
        self._table = list(payload.regions)
        for guest in self._regions:
            self._change((Rank.REGION, guest))
        self._regions.clear()
        self._keep(Rank.TABLE)

    def _add_mem_reg(self, payload: SingleMemoryRegion) -> None:
        self._regions.add(payload.region.guest_address)
        self._keep(Rank.REGION, payload.region.guest_address)

    def _rem_mem_reg(self, payload: SingleMemoryRegion) -> None:
        guest = payload.region.guest_address
        if guest in self._regions:
            self._regions.remove(guest)
            self._change((Rank.REGION, guest))
            return
        table = (Rank.TABLE, 0)
        left = [number for number, region in enumerate(self._table) if region.guest_address != guest]
        self._table = [self._table[number] for number in left]
        data = encode_message(F.SET_MEM_TABLE, MemoryTable(tuple(self._table)).encode()) if left else b""
        self._change(table, data, tuple(FdOf(table, number) for number in left))

    # Rings.

    def _set_vring_kick(self, payload: VringFd) -> None:
        self._keep(Rank.KICK, payload.index)
        if (area := self._areas.made(payload.index)) is not None:
            self._change((Rank.AREA, payload.index), b"area", new=(area,))

    def _stopped(self, vring: Vring) -> None:
        self._change((Rank.KICK, vring.index))
        self._change((Rank.AREA, vring.index))
        base = b""
        if vring.base is not None:
            base = encode_message(F.SET_VRING_BASE, VringState(vring.index, vring.base).encode())
        self._change((Rank.BASE, vring.index), base)

    def _reset_device(self, _: object) -> None:
        for vring in self._session.rings.vrings:
            self._stopped(vring)
            self._enabled(vring)
        self._change((Rank.STATUS, 0))

    # The device.

    def _set_status(self, payload: Any) -> None:
        if payload.value:
            self._keep(Rank.STATUS)
            return
        self._change((Rank.STATUS, 0))
        for vring in self._session.rings.vrings:
            if not vring.started:  # of which the broken ones were, until now
                self._stopped(vring)

    def _set_device_state_fd(self, _: object) -> None:
        self._change(TRANSFER, b"a transfer of the device's state" if self._session.structures.transferring else b"")
