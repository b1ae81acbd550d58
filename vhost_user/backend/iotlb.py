"""What a session does behind an IOMMU: it asks for the translations that its rings miss, and takes those that come.

A ring that meets an address without a translation stops there, with nothing consumed, and the front end is asked for
it on the back-end channel. Nothing waits for the answer: that is an IOTLB_MSG on the main socket, if it ever comes. A
question that is not a good one gets none, by the document, and so the ring may stand still for good, as its driver
wanted it; other rings go on.

Each miss is asked for once: again only if the driver kicks, since it may have mapped the memory meanwhile, if the front
end gives another channel, or after a while if it didn't read the one it has. So neither side can make the other one
busy without an end by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vhost_user.backend.answer import Answer, Handler
from vhost_user.backend.channel import BackendChannel
from vhost_user.backend.loop import Call, EventLoop
from vhost_user.backend.negotiated import Negotiated
from vhost_user.backend.rings import RingHandlers
from vhost_user.backend.vring import Vring
from vhost_user.errors import PeerError
from vhost_user.message import U64, BackendRequest, FrontendRequest, Iotlb, IotlbPermission, IotlbType
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, GuestAddress, UserAddress

log = logging.getLogger(__name__)

ASK_AGAIN_INTERVAL = 0.1
"""Seconds after which a question is put again that the channel had no room for."""


class IotlbHandlers:
    """The handler of IOTLB_MSG, and the questions that lead to it."""

    def __init__(self, loop: EventLoop, negotiated: Negotiated, rings: RingHandlers) -> None:
        self._loop = loop
        self._negotiated = negotiated
        self._rings = rings
        self._channel: BackendChannel | None = None
        self._timer: Call | None = None
        self._retrying = False
        for vring in rings.vrings:
            vring.on_miss = self._ask
        self.table: Mapping[FrontendRequest, Handler] = {FrontendRequest.IOTLB_MSG: self._iotlb_msg}

    def use(self, channel: BackendChannel | None) -> None:
        """Ask on this channel from now on, also for what was asked before."""
        self._channel = channel
        for vring in self._rings.vrings:
            vring.asked = None
        self._ask_again()

    # Answers.

    def _iotlb_msg(self, payload: Iotlb, _: list[OwnedFd]) -> Answer:
        try:
            self._take(payload)
        except PeerError as error:
            log.warning("IOTLB_MSG refused: %s", error)
            return Answer(U64(1).encode())
        return Answer(U64(0).encode())

    def _take(self, payload: Iotlb) -> None:
        iotlb = self._negotiated.iotlb
        if payload.type is IotlbType.UPDATE:
            iotlb.update(payload.iova, payload.size, payload.user_address, payload.perm)
            self._notice(payload)
        elif payload.type is IotlbType.INVALIDATE:
            iotlb.invalidate(payload.iova, payload.size)
        else:
            raise PeerError("type", payload.type.name, "has to be UPDATE or INVALIDATE from a front end")

    def _notice(self, entry: Iotlb) -> None:
        """Have the rings that asked for what has come look at it; once for all entries that are read in one go."""
        for vring in self._rings.vrings:
            asked = vring.asked
            if asked is None or asked.access & ~entry.perm or not 0 <= asked.address - entry.iova < entry.size:
                continue
            vring.asked = None
            if not self._retrying:
                self._retrying = True
                self._loop.call_soon(self._retry)

    def _retry(self) -> None:
        self._retrying = False
        for vring in self._rings.vrings:
            if vring.miss is not None and vring.asked is None:
                self._rings.go_on(vring)

    # Questions.

    def _ask(self, vring: Vring) -> None:
        miss = vring.miss
        if miss is None or miss == vring.asked or self._channel is None:
            return
        permission = IotlbPermission(miss.access)
        question = Iotlb(GuestAddress(miss.address), ByteCount(0), UserAddress(0), permission, IotlbType.MISS)
        try:
            sent = self._channel.send(BackendRequest.IOTLB_MSG, question.encode())
        except PeerError as error:
            log.info("back-end channel: %s", error)
            self._channel = None
            return
        if sent:
            vring.asked = miss
        elif self._timer is None:
            self._timer = self._loop.call_later(ASK_AGAIN_INTERVAL, self._ask_again)

    def _ask_again(self) -> None:
        self._timer = None
        for vring in self._rings.vrings:
            if vring.started and vring.broken is None:
                self._ask(vring)

    def close(self) -> None:
        """Ask for nothing any more, and forget the translations."""
        self._channel = None
        if self._timer is not None:
            self._timer.cancel()
        self._negotiated.iotlb.clear()
