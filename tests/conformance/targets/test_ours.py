"""Our device without a ring, on each backing; and with parts that are wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from tests import host
from tests.conformance.targets import play
from vhost_user.errors import HostError, UsageError
from vhost_user.units import MIB, ByteCount, HostOffset
from virtio_mem.conformance.target import Capability, Chain, Subject, TargetFailure, Used, Wish
from virtio_mem.conformance.targets.behind_ring import RingTarget
from virtio_mem.conformance.targets.in_process import OURS, Parts
from virtio_mem.conformance.targets.ours import OurTarget
from virtio_mem.device import Effect, VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.protocol import BlockState, Feature, Request, RequestType, Response, ResponseType
from virtio_mem.region_memory import RegionMemory
from virtio_mem.service import DeviceService


@pytest.mark.parametrize("backing", ["anonymous", "memfd", "file", "private-file"])
def test_each_backing(backing: str) -> None:
    play.play(OurTarget(backing))


@pytest.mark.needs_hugetlb
def test_huge_pages(hugepages: Callable[[int, int], host.HugePagePool]) -> None:
    hugepages(2 * MIB, 128)
    play.play(OurTarget("hugetlb"))
    with OurTarget("hugetlb") as target:
        config = target.start(Wish(region_size=3 * MIB, block_size=MIB, requested_size=MIB)).config()
        assert (config.region_size, config.block_size, config.requested_size) == (4 * MIB, 2 * MIB, 2 * MIB)


def test_a_host_without_huge_pages_is_told_before_anything_is_judged(
    hugepages: Callable[[int, int], host.HugePagePool],
) -> None:
    hugepages(2 * MIB, 0)
    with pytest.raises(HostError, match="huge"):
        OurTarget("hugetlb")


def test_a_backing_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="floppy: has to be one of anonymous, memfd"):
        OurTarget("floppy")


def test_the_wish_is_what_the_device_is() -> None:
    with OurTarget("anonymous") as target:
        subject = target.start(Wish(512 * MIB, 4 * MIB, 8 * MIB, node_id=3))
        config = subject.config()
        assert (config.region_size, config.block_size, config.requested_size) == (512 * MIB, 4 * MIB, 8 * MIB)
        assert (config.node_id, bool(subject.offered_features & Feature.ACPI_PXM)) == (3, True)
        assert config.usable_region_size == 264 * MIB


@pytest.mark.parametrize("make", [OurTarget, RingTarget])
def test_a_notice_is_for_the_driver_that_is_there(make: type[OurTarget | RingTarget]) -> None:
    with make() as target:
        subject = target.start(play.WISH)
        subject.set_target(2 * MIB)
        assert subject.take_notices() == 0
        play.begin(subject)
        assert subject.take_notices() == 1
        subject.set_target(4 * MIB)
        play.begin(subject)
        assert subject.take_notices() == 0


class _Forgets(VirtioMemDevice):
    def device_reset(self) -> None:
        super().device_reset()
        self.blocks.unplug_all()


class _KeepsAll:
    """Memory that never goes back."""

    def __init__(self, memory: RegionMemory) -> None:
        self.page_size = memory.page_size
        self.populate, self.shortage = memory.populate, memory.shortage
        self.held, self.held_at_least = memory.held, memory.held_at_least

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        pass


class _SystemResetIsNone(DeviceService):
    def system_reset(self) -> bool:
        return True


def _forgetful(geometry: Geometry, requested_size: int) -> VirtioMemDevice:
    return _Forgets(geometry, requested_size=requested_size)


def _without_reset(device: VirtioMemDevice, memory: RegionMemory) -> DeviceService:
    return _SystemResetIsNone(device, memory, prefault=True)


def _always_nack(_service: DeviceService, _request: bytes) -> bytes:
    return b"\1" + bytes(9)


def _two_bytes(_service: DeviceService, _request: bytes) -> bytes:
    return bytes(2)


WRONG_PARTS = {
    "device": (dataclasses.replace(OURS, make_device=_forgetful), play.negotiation),
    "memory": (dataclasses.replace(OURS, make_memory=_KeepsAll), play.held),
    "service": (dataclasses.replace(OURS, make_service=_without_reset), play.system_reset),
    "answer": (dataclasses.replace(OURS, answer=_always_nack), play.requests),
}


@pytest.mark.parametrize(("parts", "shows_it"), WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_a_part_that_is_wrong_shows(parts: Parts, shows_it: Callable[[Subject], None]) -> None:
    with OurTarget("memfd", parts=parts) as target:
        subject = target.start(play.WISH)
        play.begin(subject)
        with pytest.raises(AssertionError):
            shows_it(subject)


def test_a_short_answer_leaves_the_rest_of_the_room_as_it_was() -> None:
    with OurTarget("anonymous", parts=dataclasses.replace(OURS, answer=_two_bytes)) as target:
        subject = target.start(play.WISH)
        play.begin(subject)
        assert subject.submit([Chain(bytes(24))]) == [Used(2, b"\0\0" + b"\xa5" * 8)]


class _Dies(VirtioMemDevice):
    def request(self, request: Request) -> Response | Effect:
        raise ZeroDivisionError("in the device")


def test_a_device_that_raises_is_gone() -> None:
    def make(geometry: Geometry, requested_size: int) -> VirtioMemDevice:
        return _Dies(geometry, requested_size=requested_size)

    with OurTarget("anonymous", parts=Parts(make_device=make)) as target:
        subject = target.start(play.WISH)
        play.begin(subject)
        with pytest.raises(TargetFailure, match="the device raised ZeroDivisionError: in the device"):
            play.plug(subject)


def test_time_goes_by_only_when_it_is_told_to() -> None:
    with OurTarget("anonymous") as target:
        assert Capability.TIME in target.capabilities
        subject = target.start(play.WISH)
        play.begin(subject)
        subject.refuse(True)
        assert play.ask(subject, RequestType.PLUG) is ResponseType.BUSY
        subject.advance(3600)
        assert subject.take_notices() == 0
        subject.refuse(False)
        assert subject.take_notices() == 0
        subject.advance(1)
        assert subject.take_notices() == 1
        assert play.state(subject, 0) is BlockState.UNPLUGGED


def test_parts_of_a_second() -> None:
    with OurTarget("anonymous") as target:
        subject = target.start(play.WISH)
        play.begin(subject)
        for seconds, notices in ((0.4, 1), (0.5, 0), (0.6, 1)):
            subject.refuse(True)
            assert play.ask(subject, RequestType.PLUG) is ResponseType.BUSY
            subject.refuse(False)
            subject.advance(seconds)
            assert subject.take_notices() == notices
