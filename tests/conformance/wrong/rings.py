"""Requests that are fine, on a ring that is not served as it should be, and chains that carry no request."""

from __future__ import annotations

from typing import ClassVar
from weakref import WeakSet

from tests.conformance.wrong.fault import fault
from vhost_user.chain import Chain
from vhost_user.errors import PeerError
from vhost_user.memory import GuestMemory
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, RequestType
from virtio_mem.request_queue import GuestRequestQueue, Progress, read_request, write_response
from virtio_mem.service import DeviceService


def memory_of(queue: GuestRequestQueue) -> GuestMemory:
    """The guest's, where a queue's ring is."""
    memory = vars(queue.queue)["_memory"]
    assert isinstance(memory, GuestMemory)
    return memory


class Picky(GuestRequestQueue):
    """Gives back with length 0, and unanswered, each chain that it does not like."""

    def likes(self, chain: Chain) -> bool:
        raise NotImplementedError

    def _serve(self, chain: Chain) -> None:
        if self.likes(chain):
            super()._serve(chain)
        else:
            self.queue.push(chain, 0)


@fault("MEM-PLUG-1", source="Cloud Hypervisor before 82d426162, Dragonball")
class LongRequestIsRefused(Picky):
    """A request must have 24 bytes exactly."""

    def likes(self, chain: Chain) -> bool:
        return bool(chain.readable == REQUEST_SIZE)


@fault("RING-CHAIN-1", source="Cloud Hypervisor, Firecracker and Dragonball, which look at the head's length")
class SplitRequestIsRefused(Picky):
    """The first descriptor must hold all of a request."""

    def likes(self, chain: Chain) -> bool:
        return all(size >= REQUEST_SIZE for _, size in chain.readable_ranges[:1])


@fault("RING-CHAIN-1")
class SplitRoomIsRefused(Picky):
    """One descriptor must have room for all of an answer."""

    def likes(self, chain: Chain) -> bool:
        return all(size >= RESPONSE_SIZE for _, size in chain.writable_ranges[:1])


@fault("RING-CHAIN-1")
class LargeRoomIsRefused(Picky):
    """The room for an answer must have 10 bytes exactly."""

    def likes(self, chain: Chain) -> bool:
        return bool(chain.writable == RESPONSE_SIZE)


@fault("DEP-UNKNOWN-1", source="Dragonball, and Firecracker in effect")
class UnknownTypeIsUnanswered(Picky):
    """A request of unknown type comes back without an answer: the driver reads what was there before."""

    def likes(self, chain: Chain) -> bool:
        try:
            return read_request(chain).type in list(RequestType)
        except PeerError:
            return True


@fault("DEP-UNKNOWN-1", source="Firecracker, process_mem_queue")
class UnknownTypeIsKept(Picky):
    """A request of unknown type never comes back."""

    def _serve(self, chain: Chain) -> None:
        if self.likes(chain):
            super()._serve(chain)

    def likes(self, chain: Chain) -> bool:
        return chain.readable < REQUEST_SIZE or read_request(chain).type in list(RequestType)


@fault("DEP-CHAIN-1", source="Cloud Hypervisor before 6a1fe123c")
class ShortChainIsTheEnd(GuestRequestQueue):
    """A chain that can't carry a request ends the device's thread, for good."""

    ended: ClassVar[WeakSet[DeviceService]] = WeakSet()

    def _serve(self, chain: Chain) -> None:
        try:
            read_request(chain)
        except PeerError:
            self.ended.add(self.service)
        if self.service not in self.ended:
            super()._serve(chain)


@fault("RING-SPLIT-7")
class LengthIsAlwaysNothing(GuestRequestQueue):
    """The used length is 0, whatever was written."""

    def _serve(self, chain: Chain) -> None:
        write_response(chain, self.service.request(read_request(chain)))
        self.queue.push(chain, 0)


@fault("RING-SPLIT-7")
class LengthIsThatOfTheRoom(GuestRequestQueue):
    """The used length is that of the room, whatever was written."""

    def _serve(self, chain: Chain) -> None:
        write_response(chain, self.service.request(read_request(chain)))
        self.queue.push(chain, chain.writable)


@fault("RING-SPLIT-7")
class AnswersAreMixedUp(GuestRequestQueue):
    """Of several requests that are there at once, each one gets the answer of the one before."""

    def process(self) -> Progress:
        chains = list(iter(self.queue.pop, None))
        answers = [self.service.request(read_request(chain)) for chain in chains]
        for chain, answer in zip(chains, answers[-1:] + answers[:-1], strict=True):
            self.queue.push(chain, write_response(chain, answer))
        return Progress(self.queue.should_notify(), self.queue.enable_notifications())


@fault("RING-SPLIT-9")
class AnswerBeginsLate(GuestRequestQueue):
    """Where there is more room than an answer takes, the answer lies at its end."""

    def _serve(self, chain: Chain) -> None:
        response = self.service.request(read_request(chain))
        chain.write(response.encode(), chain.writable - RESPONSE_SIZE)
        self.queue.push(chain, RESPONSE_SIZE)


@fault("RING-INDIRECT-2")
class IndirectTableIsRefused(Picky):
    """INDIRECT_DESC is on offer, and a chain in an indirect table comes back unanswered."""

    def likes(self, chain: Chain) -> bool:
        return chain.visited == len(chain.readable_ranges) + len(chain.writable_ranges)


@fault("RING-PACKED-5", ring="packed")
class LengthOfAPackedRingIsNothing(GuestRequestQueue):
    """The used length is 0, whatever was written."""

    def _serve(self, chain: Chain) -> None:
        write_response(chain, self.service.request(read_request(chain)))
        self.queue.push(chain, 0)


@fault("RING-PACKED-6", ring="packed")
class EndOfThePackedRoom(GuestRequestQueue):
    """The answer lies at the end of its room."""

    def _serve(self, chain: Chain) -> None:
        response = self.service.request(read_request(chain))
        chain.write(response.encode(), chain.writable - RESPONSE_SIZE)
        self.queue.push(chain, chain.writable)


@fault("RING-PACKED-3", ring="packed")
class OnceRoundThePackedRing(Picky):
    """After the first time round, chains come back unanswered."""

    served = 0

    def likes(self, chain: Chain) -> bool:
        self.served += chain.slots
        return self.served <= self.queue.size


@fault("RING-PACKED-4", ring="packed")
class OnceRoundAndNoFurther(Picky):
    """After the first time round, chains stay where they are."""

    served = 0

    def _serve(self, chain: Chain) -> None:
        if self.likes(chain):
            super()._serve(chain)

    def likes(self, chain: Chain) -> bool:
        self.served += chain.slots
        return self.served <= self.queue.size


class _Silent(GuestRequestQueue):
    """Sends no used buffer notification after as many chains at once as `from_` or more."""

    from_ = 1
    served = 0

    def _serve(self, chain: Chain) -> None:
        self.served += 1
        super()._serve(chain)

    def process(self) -> Progress:
        self.served = 0
        progress = super().process()
        return progress if self.served < self.from_ else progress._replace(notify=False)


@fault("RING-NOTIFY-3")
class NoInterrupts(_Silent):
    """The driver is never told that its buffers were used."""


@fault("RING-NOTIFY-5")
class NoInterruptForABatch(_Silent):
    """The driver is told that a buffer was used, and not that several were."""

    from_ = 2


@fault("RING-PACKED-10", ring="packed")
class NoInterruptsOfAPackedRing(_Silent):
    """The driver is never told that its buffers were used."""


@fault("RING-PACKED-11", ring="packed")
class NoInterruptForAPackedBatch(_Silent):
    """The driver is told that a buffer was used, and not that several were."""

    from_ = 2
