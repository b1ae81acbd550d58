"""The guest-request virtqueue: takes requests off the ring, has them served, and puts the responses back.

A chain that can't hold a request, or has no room for a response, is returned with length 0 and counted; the queue
goes on. What the ring itself finds malformed never gets here: it is returned and counted there.
"""

from __future__ import annotations

from collections import Counter
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
        self.malformed: Counter[str] = Counter()

    def process(self) -> Progress:
        """Serve what is available, at most one ringful, so that no guest can keep the host busy for ever.

        Raises RingBroken where the ring can't be read on; it then needs a device reset.
        """
        queue, budget, more = self.queue, self.queue.size, True
        queue.disable_notifications()
        while budget and more:
            chain = queue.pop()
            if chain is None:
                more = queue.enable_notifications()
                if more:
                    queue.disable_notifications()
                continue
            queue.push(chain, self._serve(chain))
            budget -= 1
        return Progress(queue.should_notify(), more)

    def _serve(self, chain: Chain) -> int:
        """Serve the request in `chain`; returns how many bytes were written to it."""
        if chain.readable < REQUEST_SIZE:
            self.malformed["request shorter than 24 bytes"] += 1
            return 0
        if chain.writable < RESPONSE_SIZE:
            self.malformed["no room for a response of 10 bytes"] += 1
            return 0
        try:
            request = Request.decode(chain.read(0, REQUEST_SIZE))
            chain.write(self.service.request(request).encode())
        except PeerError:
            self.malformed["buffer left memory while in use"] += 1
            return 0
        return RESPONSE_SIZE
