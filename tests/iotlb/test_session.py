"""Our front end and our back end with an IOMMU between them: rules K2 to K4, and the section "IOMMU support"."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import replace

import pytest

from tests.backend.devices import Echo
from tests.backend.rig import DATA, SIZE, SPLIT, USER, Running, pair, start_ring
from tests.iotlb.rig import FEATURES, PAGE, Behind, EchoBehind, KeeperBehind, behind, guest_of
from vhost_user.backend import Server
from vhost_user.connection import Connection
from vhost_user.errors import PeerError, Refused, UsageError
from vhost_user.frontend import PROTOCOL_FEATURES, SharedRegion
from vhost_user.message import (
    F_LOG_ALL,
    LOG_PAGE,
    U64,
    VIRTIO_F_IOMMU_PLATFORM,
    FrontendRequest,
    Iotlb,
    IotlbPermission,
    IotlbType,
    ProtocolFeature,
)
from vhost_user.units import MIB, ByteCount, GuestAddress, UserAddress

FORMATS = pytest.mark.parametrize("form", ["split", "packed"])
READ, WRITE, READ_WRITE = IotlbPermission.READ, IotlbPermission.WRITE, IotlbPermission.READ_WRITE
ANSWER = 0x800  # where `Running.send` has the device write, in the page that it sends


def iotlb_msg(
    iova: int, size: int, user: int, kind: IotlbType = IotlbType.UPDATE, permission: IotlbPermission = READ_WRITE
) -> Iotlb:
    return Iotlb(GuestAddress(iova), ByteCount(size), UserAddress(user), permission, kind)


# Translations.


@FORMATS
def test_chains_come_back_through_translations(form: str) -> None:
    with behind(form) as rig:
        ring = rig.ready()
        for length in (1, 100, 2047):
            ring.echo(b"x" * length)
        for _ in range(5):
            for each in range(8):
                ring.send(b"%d" % each)
            ring.kick()
            ring.collect(8)


@FORMATS
def test_indirect_tables_and_buffers_that_cross_pages_are_translated(form: str) -> None:
    with behind(form) as rig:
        ring = rig.ready()
        data, ask, answer = bytes(range(256)) * 40, DATA + 0x1080, GuestAddress(DATA + 0x8080)
        for table in (None, GuestAddress(DATA + 0x20FF0)):  # a table whose descriptors lie on two pages
            rig.memory.write(GuestAddress(ask), data)
            half = len(data) // 2
            buffers = [(ask, half), (ask + half, half)], [(answer, half), (answer + half, half)]
            ring.driver.add(*buffers, indirect_table=table)
            ring.kick()
            rig.until(lambda: (used := ring.driver.get_used()) is not None and used[1] == len(data))
            assert rig.memory.read(answer, len(data)) == data
            rig.memory.write(answer, bytes(len(data)))


@FORMATS
def test_each_page_is_asked_for_once(form: str) -> None:
    with behind(form) as rig:
        ring = rig.ready()
        ring.echo(b"x" * 100)
        before = rig.iommu.updates
        for _ in range(3):
            ring.echo(b"another page")
        assert rig.iommu.updates == before + 3
        ring.next_data = 0
        for _ in range(4):
            ring.echo(b"the same pages")
        assert (rig.iommu.updates, rig.iommu.invalid_misses) == (before + 3, 0)


@FORMATS
def test_a_ring_that_is_not_mapped_starts_when_it_is(form: str) -> None:
    with behind(form) as rig:
        ring = rig.start()
        rig.until(lambda: rig.iommu.invalid_misses > 0)
        assert isinstance(rig.device, EchoBehind)
        assert rig.device.served == 0
        rig.map_ring()
        rig.map_data()
        ring.send(b"late")
        ring.vring.kick.signal()
        ring.collect(1)


@FORMATS
def test_a_ring_that_waits_can_be_stopped_and_set_up_anew(form: str) -> None:
    with behind(form) as rig:
        ring = rig.start()
        rig.until(lambda: rig.iommu.invalid_misses > 0)
        base = ring.vring.base
        assert ring.vring.stop() == base
        rig.ready().echo(b"again")


def test_a_miss_while_a_request_waits_is_answered_after_it() -> None:
    with behind() as rig:
        ring = rig.ready()
        ring.send(b"nobody waits for the channel")
        ring.vring.kick.signal()
        while not ring.driver.enable_interrupts():
            rig.frontend.requests.confirm()
        ring.collect(1)


# Permissions.


@FORMATS
@pytest.mark.parametrize("permission", [READ, WRITE], ids=["only to be read", "only to be written"])
def test_what_a_mapping_forbids_is_a_miss_without_an_answer(form: str, permission: IotlbPermission) -> None:
    with behind(form) as rig:
        rig.map_ring()
        mappings = rig.map_data(permission=permission)
        ring, other = rig.start(), rig.ready(1)
        ring.send(b"not allowed")
        ring.kick()
        rig.until(lambda: rig.iommu.invalid_misses > 0)
        other.echo(b"the other ring lives")
        assert ring.driver.get_used() is None
        for mapping in mappings:
            rig.iommu.unmap(mapping)
        rig.map_data()
        ring.vring.kick.signal()
        ring.collect(1)


def test_a_ring_whose_used_ring_is_read_only_waits() -> None:
    with behind() as rig:
        rig.map(0, READ, pages=2)
        ring = rig.start()
        rig.until(lambda: rig.iommu.invalid_misses > 0)
        assert ring.vring.stop() == 0


# Invalidation.


@FORMATS
def test_what_is_unmapped_is_missed_again(form: str) -> None:
    with behind(form) as rig:
        mappings = [*rig.map_ring(), *rig.map_data()]
        ring = rig.start()
        for _ in range(64):
            ring.echo(b"all pages")
        for mapping in mappings:
            rig.iommu.unmap(mapping)
        for _ in range(3):
            ring.send(b"where is it?")
        ring.vring.kick.signal()
        rig.until(lambda: rig.iommu.invalid_misses > 0)
        rig.frontend.requests.confirm()
        assert ring.driver.get_used() is None
        rig.map_ring()
        rig.map_data()
        ring.vring.kick.signal()
        ring.collect(3)


@FORMATS
def test_what_is_unmapped_can_be_mapped_elsewhere(form: str) -> None:
    with behind(form) as rig:
        ring = rig.ready()
        ring.echo(b"here")
        at = GuestAddress(DATA)
        rig.iommu.unmap(rig.iommu.map(GuestAddress(DATA + MIB), ByteCount(PAGE), guest_of(DATA)))
        (old,) = [mapping for mapping in rig.iommu if mapping.iova == at]
        rig.iommu.unmap(old)
        elsewhere = guest_of(DATA + 200 * PAGE)
        rig.iommu.map(at, ByteCount(PAGE), elsewhere)
        rig.both.ram.memory.write(elsewhere, b"there")
        ring.driver.add([(at, 5)], [(at + ANSWER, 5)])
        ring.kick()
        rig.until(lambda: ring.driver.get_used() is not None)
        assert rig.both.ram.memory.read(GuestAddress(elsewhere + ANSWER), 5) == b"there"


def keep_five(rig: Behind, device: KeeperBehind) -> Running:
    """A ring, whose areas are mapped, with five chains that the device has and keeps."""
    rig.map_data()
    ring = rig.start()
    for _ in range(5):
        ring.send(b"kept")
    ring.kick()
    rig.until(lambda: len(device.kept) == 5)
    return ring


@FORMATS
def test_chains_are_given_back_when_the_used_ring_is_mapped_again(form: str) -> None:
    device = KeeperBehind()
    with behind(form, device) as rig:
        ring_mappings = rig.map_ring()
        ring = keep_five(rig, device)
        for mapping in ring_mappings:
            rig.iommu.unmap(mapping)
        link = rig.both.endpoint.link
        assert link is not None
        rig.both.server.loop.call_soon(lambda: device.release(link.session.rings[0], 5))
        rig.until(lambda: rig.iommu.invalid_misses > 0)
        assert (ring.driver.get_used(), len(device.kept)) == (None, 0)
        rig.map_ring()
        ring.vring.kick.signal()
        ring.collect(5)


@FORMATS
def test_what_is_owed_goes_back_before_a_ring_is_stopped(form: str) -> None:
    """The translations came just before, and nobody has looked at the ring again."""
    device = KeeperBehind()
    with behind(form, device) as rig:
        mappings = rig.map_ring()
        ring = keep_five(rig, device)
        link = rig.both.endpoint.link
        assert link is not None
        session, stopped = link.session, threading.Event()
        places = [
            (each.iova, each.size, rig.frontend.regions.to_user(each.guest_address, each.size)) for each in mappings
        ]

        def stop() -> None:
            for iova, size, _ in places:
                session.negotiated.iotlb.invalidate(iova, size)
            device.release(session.rings[0], 5)
            for iova, size, user in places:
                session.negotiated.iotlb.update(iova, size, user, READ_WRITE)
            session.rings.stop(session.rings[0])
            stopped.set()

        rig.both.server.loop.call_soon(stop)
        assert stopped.wait(20)
        ring.collect(5)


@FORMATS
def test_memory_that_is_shared_no_more_is_missed(form: str) -> None:
    with behind(form) as rig:
        ring = rig.ready()
        ring.echo(b"shared")
        rig.frontend.regions.remove(rig.both.ram.region)
        ring.send(b"gone")
        ring.vring.kick.signal()
        rig.until(lambda: rig.iommu.updates_failed > 0)
        rig.frontend.regions.add(rig.both.ram.region)
        ring.vring.kick.signal()
        ring.collect(1)


# The dirty log.


@FORMATS
def test_the_log_knows_guest_addresses(form: str) -> None:
    with behind(form) as rig:
        ring = rig.ready()
        ring.echo(b"before")
        rig.frontend.start_logging(GuestAddress(SIZE - 1))
        ring.echo(b"page 1")
        ring.echo(b"page 2")
        assert rig.frontend.stop_logging() == {guest_of(DATA + at * PAGE) // LOG_PAGE for at in (1, 2)}


# Negotiation.


def test_only_a_device_that_says_so_is_behind_an_iommu() -> None:
    with pair(Echo(), features=FEATURES["split"]) as both:
        assert not both.frontend.offered & VIRTIO_F_IOMMU_PLATFORM
        start_ring(both.frontend, both.ram).echo(b"not behind")


def test_a_driver_may_do_without() -> None:
    with pair(EchoBehind(), features=SPLIT) as both:
        assert both.frontend.offered & VIRTIO_F_IOMMU_PLATFORM
        start_ring(both.frontend, both.ram).echo(b"not behind")


def test_there_is_no_iommu_without_a_channel() -> None:
    without = PROTOCOL_FEATURES & ~ProtocolFeature.BACKEND_REQ
    with (
        pytest.raises(PeerError, match="BACKEND_REQ"),
        pair(EchoBehind(), features=FEATURES["split"], protocol_features=without),
    ):
        pass
    with pair(EchoBehind(), features=SPLIT, protocol_features=without) as both:
        features = both.frontend.features | VIRTIO_F_IOMMU_PLATFORM
        with pytest.raises(Refused):
            both.frontend.requests.tell(FrontendRequest.SET_FEATURES, U64(features))
        both.frontend.requests.confirm()


def test_mappings_of_the_front_end_are_checked() -> None:
    with behind() as rig:
        (mapping,) = rig.map(0x3000)
        for iova, size, guest, permission in (
            (0x3000, PAGE, 0, READ),
            (0x2FFF, 2, 0, READ),
            (0x3FFF, 2, 0, READ),
            (0, 0, 0, READ),
            (2**64 - 1, 2, 0, READ),
            (0, PAGE, 0, IotlbPermission.NO_ACCESS),
            (0, PAGE, SIZE - 1, READ),
        ):
            with pytest.raises(UsageError):
                rig.iommu.map(GuestAddress(iova), ByteCount(size), GuestAddress(guest), permission)
        with pytest.raises(UsageError):
            rig.iommu.unmap(replace(mapping, size=ByteCount(1)))
        assert rig.iommu.to_guest(GuestAddress(0x3001)) == MIB + 0x3001
        rig.iommu.unmap(mapping)
        with pytest.raises(UsageError):
            rig.iommu.to_guest(GuestAddress(0x3001))


def test_a_mapping_lies_in_one_region() -> None:
    fd = os.memfd_create("more", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE)
    try:
        with behind() as rig:
            more = SharedRegion(GuestAddress(SIZE), ByteCount(PAGE), fd, user_address=UserAddress(USER + 16 * MIB))
            rig.frontend.regions.add(more)
            at = GuestAddress(1 << 40)
            with pytest.raises(UsageError):
                rig.iommu.map(at, ByteCount(2 * PAGE), GuestAddress(SIZE - PAGE))
            rig.iommu.map(at, ByteCount(PAGE), GuestAddress(SIZE))
    finally:
        os.close(fd)


def test_a_back_end_that_comes_back_asks_again() -> None:
    with behind() as rig:
        ring = rig.ready()
        ring.echo(b"the first one")
        before = rig.iommu.updates
        rig.both.endpoint.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with Server() as server:
            server.serve(theirs, EchoBehind())
            with server.in_thread():
                rig.frontend.reconnect(Connection(ours))
                ring.echo(b"the second one")
                assert rig.iommu.updates > before
                rig.frontend.close()


# What a front end may do wrong.


@pytest.mark.parametrize(
    "message",
    [
        iotlb_msg(0, PAGE, USER + SIZE),
        iotlb_msg(0, PAGE, USER - PAGE),
        iotlb_msg(0, SIZE + 1, USER),
        iotlb_msg(0, PAGE, 0),
        iotlb_msg(0, 0, USER),
        iotlb_msg(0, PAGE, USER, IotlbType.MISS),
        iotlb_msg(0, PAGE, USER, IotlbType.ACCESS_FAIL),
    ],
)
def test_an_entry_outside_of_shared_memory_is_answered_by_a_failure(message: Iotlb) -> None:
    with behind() as rig:
        ring = rig.ready()
        assert rig.frontend.requests.ask(FrontendRequest.IOTLB_MSG, U64, message).value != 0
        ring.echo(b"lives")


def test_an_iotlb_message_without_an_iommu_is_refused() -> None:
    with pair(Echo()) as both, pytest.raises(PeerError):
        both.frontend.requests.ask(FrontendRequest.IOTLB_MSG, U64, iotlb_msg(0, PAGE, USER))


def test_features_stay_as_they_are_while_a_ring_waits() -> None:
    with behind() as rig:
        rig.start()
        with pytest.raises(Refused):
            rig.frontend.requests.tell(FrontendRequest.SET_FEATURES, U64(SPLIT))
        rig.frontend.requests.tell(FrontendRequest.SET_FEATURES, U64(rig.frontend.features | F_LOG_ALL))


@FORMATS
def test_a_ring_that_has_no_inflight_area_does_not_start(form: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused before it waits for translations: what waits is started."""
    with behind(form) as rig:
        rig.frontend.track_inflight(1, 16)
        rig.map_ring(1)
        with pytest.raises(Refused, match="SET_VRING_KICK"):
            rig.start(1)
        for _ in range(2):
            rig.frontend.vring(1).kick.signal()
            rig.frontend.requests.confirm()
        rig.ready(0).echo(b"good")
    assert not [record.message for record in caplog.records if record.levelname == "ERROR"]
