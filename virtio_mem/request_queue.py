"""The guest-request virtqueue: takes requests off the ring, has them served, and puts the responses back.

A chain that can't hold a request, or has no room for a response, is returned with length 0 and counted; the queue
goes on. What the ring itself finds malformed never gets here: it is returned and counted there.
"""

from __future__ import annotations

from typing import NamedTuple

from vhost_user.chain import Chain
from vhost_user.errors import PeerError
from vhost_user.vring import DeviceQueue
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Request
from virtio_mem.service import DeviceService


class Progress(NamedTuple):
    """What a call of `process()` came to: whether the driver wants an interrupt, and whether requests are left."""

    notify: bool
    more: bool


class GuestRequestQueue:
    """Serves one ring for one device."""

    def __init__(self, service: DeviceService, queue: DeviceQueue) -> None:
        self.service = service
        self.queue = queue

    def process(self) -> Progress:
        """Serve what is available, at most one ringful, so that no guest can keep the host busy for ever.

        Raises PeerError (RingBroken) where the ring can't be read on; it then needs a device reset.
        """
        queue, budget, more = self.queue, self.queue.size, True
        queue.disable_notifications()
        while budget and more:
            budget -= 1
            chain = queue.pop()
            if chain is not None:
                self._serve(chain)
                continue
            more = queue.enable_notifications()
            if more:
                queue.disable_notifications()
        return Progress(queue.should_notify(), more)

    def _serve(self, chain: Chain) -> None:
        if chain.readable < REQUEST_SIZE:
            self.queue.reject(chain, "request_too_short")
        elif chain.writable < RESPONSE_SIZE:
            self.queue.reject(chain, "no_room_for_response")
        else:
            self._answer(chain)

    def _answer(self, chain: Chain) -> None:
        try:
            request = Request.decode(chain.read(0, REQUEST_SIZE))
        except PeerError:
            self.queue.reject(chain, "memory_gone")
            return
        response = self.service.request(request).encode()
        try:
            chain.write(response)
        except PeerError:
            self.queue.reject(chain, "memory_gone")
        else:
            self.queue.push(chain, RESPONSE_SIZE)
