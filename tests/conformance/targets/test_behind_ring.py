"""Our device behind a ring; and queues that are wrong."""

from __future__ import annotations

import dataclasses

import pytest

from tests.conformance.targets import play
from tests.conformance.wrong import FAULTS
from vhost_user.chain import Chain as DeviceChain
from vhost_user.errors import UsageError
from vhost_user.units import GuestAddress
from virtio_mem.conformance.target import Chain, TargetFailure
from virtio_mem.conformance.targets.behind_ring import FORMS, RingTarget
from virtio_mem.conformance.targets.in_process import OURS
from virtio_mem.protocol import BlockState, Feature, RequestType
from virtio_mem.request_queue import GuestRequestQueue, Progress


@pytest.mark.parametrize("form", FORMS)
def test_both_forms(form: str) -> None:
    play.play(RingTarget(form))


def test_another_backing() -> None:
    play.play(RingTarget("split", "anonymous"))


def test_a_form_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="moebius: has to be one of split, packed"):
        RingTarget("moebius")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extra", [0, Feature.EVENT_IDX, Feature.INDIRECT_DESC])
def test_rings_with_each_feature(form: str, extra: int) -> None:
    packed = int(Feature.RING_PACKED) if form == "packed" else 0
    with RingTarget(form) as target:
        subject = target.start(play.WISH)
        assert subject.offered_features & Feature.RING_PACKED == packed
        assert subject.begin(play.DEVICE_FEATURES | packed | extra)
        play.requests(subject)
        many = [Chain(play.request(subject, RequestType.STATE))] * 30
        for _ in range(10):
            assert {play.response(used).type.name for used in subject.submit(many)} == {"ACK"}


def test_a_packed_ring_is_refused_where_it_is_not_offered() -> None:
    with RingTarget("split") as target:
        subject = target.start(play.WISH)
        assert not subject.begin(play.DEVICE_FEATURES | Feature.RING_PACKED)
        play.begin(subject)


@pytest.mark.parametrize("form", FORMS)
def test_an_indirect_table_is_one_to_the_device(form: str) -> None:
    """A device that was not told of such tables gives the chain back as malformed."""
    packed = int(Feature.RING_PACKED) if form == "packed" else 0
    with RingTarget(form) as target:
        subject = target.start(play.WISH)
        lengths = []
        for indirect in (0, Feature.INDIRECT_DESC):
            assert subject.begin(play.DEVICE_FEATURES | packed | indirect)
            (used,) = subject.submit([Chain(play.request(subject, RequestType.STATE), indirect=True)])
            lengths.append(used.length)
        assert lengths == [0, 10]


def test_more_than_the_ring_holds() -> None:
    with RingTarget() as target:
        subject = target.start(play.WISH)
        play.begin(subject)
        with pytest.raises(UsageError):
            subject.submit([Chain(bytes(24))] * 33)
    with RingTarget() as target:
        subject = target.start(play.WISH)
        play.begin(subject)
        with pytest.raises(UsageError, match="bytes of buffers"):
            subject.submit([Chain(bytes(24), room=(2 << 20,))])


class _KeepsOne(GuestRequestQueue):
    def process(self) -> Progress:
        self.queue.pop()
        return super().process()


class _Silent(GuestRequestQueue):
    def process(self) -> Progress:
        return super().process()._replace(notify=False)


class _Raises(GuestRequestQueue):
    def process(self) -> Progress:
        if self.queue.pop():
            raise KeyError("lost")
        return Progress(notify=False, more=False)


class _Scribbles(GuestRequestQueue):
    """Breaks the ring by an index that can't be."""

    def process(self) -> Progress:
        layout = self.queue.layout
        self.queue._memory.store16(layout.avail + 2, 1000)  # type: ignore[attr-defined]
        return super().process()


class _WritesToTheRequest(GuestRequestQueue):
    def _serve(self, chain: DeviceChain) -> None:
        address, _ = chain.readable_ranges[0]
        chain._memory.write(GuestAddress(address + 2), b"\1")
        super()._serve(chain)


class _WritesTooMuch(GuestRequestQueue):
    def _serve(self, chain: DeviceChain) -> None:
        address, size = chain.writable_ranges[-1]
        chain._memory.write(GuestAddress(address + size), bytes(6))
        super()._serve(chain)


@pytest.mark.parametrize(
    ("queue", "what"),
    [
        (_WritesToTheRequest, "the device wrote to a buffer that it may only read, at byte 2"),
        (_WritesTooMuch, "the device wrote behind the room for an answer, at byte 0"),
        (_KeepsOne, "1 of 3 buffers did not come back"),
        (_Silent, "all buffers came back, and no interrupt did"),
        (_Raises, "the device raised KeyError: 'lost'"),
        (_Scribbles, "3 of 3 buffers did not come back, and the device needs a reset"),
    ],
)
def test_a_queue_that_is_wrong(queue: type[GuestRequestQueue], what: str) -> None:
    with RingTarget(parts=dataclasses.replace(OURS, make_queue=queue)) as target:
        subject = target.start(play.WISH)
        play.begin(subject)
        chains = [Chain(play.request(subject, RequestType.STATE))] * 3
        with pytest.raises(TargetFailure) as failure:
            subject.submit(chains)
        assert failure.value.what == what


def test_a_length_without_its_write_flag_is_taken_and_told() -> None:
    with FAULTS["no-write-flag"].target() as target:
        subject = target.start(play.WISH)
        assert subject.begin(play.DEVICE_FEATURES | Feature.RING_PACKED)
        good, short = subject.submit([Chain(play.request(subject, RequestType.STATE)), Chain(bytes(23), (23,))])
        assert (good.length, good.flagged) == (10, False)
        assert play.response(good).state is BlockState.UNPLUGGED
        assert (short.length, short.flagged) == (0, True)
