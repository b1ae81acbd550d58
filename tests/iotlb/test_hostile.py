"""An IOMMU on whose other side somebody means no good, or doesn't care."""

from __future__ import annotations

import random

import pytest

from tests import counts
from tests.backend.rig import DATA, SIZE, USER
from tests.iotlb.rig import PAGE, Behind, behind, guest_of
from vhost_user.backend.session import Session
from vhost_user.iotlb import MAX_PIECES
from vhost_user.message import U64, BackendRequest, FrontendRequest, Iotlb, IotlbPermission, IotlbType
from vhost_user.units import ByteCount, GuestAddress, UserAddress

FORMATS = pytest.mark.parametrize("form", ["split", "packed"])
READ_WRITE = IotlbPermission.READ_WRITE


def session_of(rig: Behind) -> Session:
    assert rig.both.endpoint.link is not None
    return rig.both.endpoint.link.session


def test_entries_without_end_leave_the_table_bounded_and_a_ring_running(rng: random.Random) -> None:
    with behind() as rig:
        ring = rig.ready()
        iotlb = session_of(rig).negotiated.iotlb
        for at in range(counts.IOTLB_UPDATES):
            iova = (1 << 40) + rng.randrange(1 << 20) * 2 * PAGE
            user = USER + rng.randrange(SIZE // PAGE) * PAGE
            permission = rng.choice(list(IotlbPermission))
            place = GuestAddress(iova), ByteCount(PAGE), UserAddress(user)
            message = Iotlb(*place, permission, IotlbType.UPDATE)
            assert rig.frontend.requests.ask(FrontendRequest.IOTLB_MSG, U64, message).value == 0
            if at % 1000 == 0:
                ring.echo(b"lives")
                assert len(iotlb) <= MAX_PIECES
        assert len(iotlb) <= MAX_PIECES


@FORMATS
def test_a_miss_that_nobody_answers_holds_its_own_ring_only(form: str) -> None:
    with behind(form) as rig:
        other = rig.ready(1)
        rig.start()
        other.echo(b"asked for once, and once again after the kick that every start ends with")
        rig.frontend.requests.confirm()
        rig.frontend.serve_channel()
        assert 1 <= rig.iommu.invalid_misses <= 2
        before = rig.iommu.invalid_misses
        for _ in range(50):
            other.echo(b"lives")
        assert rig.iommu.invalid_misses == before


@FORMATS
def test_a_chain_for_nowhere_is_asked_for_once_a_kick(form: str) -> None:
    with behind(form) as rig:
        ring, other = rig.ready(), rig.ready(1)
        ring.driver.add([(1 << 60, 100)])
        for kicks in range(1, 20):
            ring.vring.kick.signal()
            other.echo(b"lives")
            rig.frontend.requests.confirm()
            rig.frontend.serve_channel()
            assert rig.iommu.invalid_misses <= kicks + 1  # starting it is a kick, too
        assert rig.iommu.invalid_misses >= 1
        assert ring.driver.get_used() is None


def test_a_channel_that_is_not_read_is_asked_again_when_it_is() -> None:
    with behind() as rig:
        rig.map_ring()
        ring = rig.start()
        watched = dict(rig.frontend.requests.watched)
        rig.frontend.requests.watched.clear()
        ring.send(b"asked for more often than the socket holds")
        for _ in range(1000):
            ring.vring.kick.signal()
            rig.frontend.requests.confirm()
        rig.frontend.requests.watched.update(watched)
        rig.map_data()
        ring.collect(1)


def test_misses_without_end_are_answered_with_an_end() -> None:
    with behind() as rig:
        rig.map_data()
        channel = session_of(rig).channel
        assert channel is not None
        miss = Iotlb(GuestAddress(DATA), ByteCount(0), UserAddress(0), READ_WRITE, IotlbType.MISS).encode()

        def flood() -> None:
            for _ in range(20):
                channel.send(BackendRequest.IOTLB_MSG, miss)
            if rig.iommu.updates < 50:
                rig.both.server.loop.call_soon(flood)

        rig.both.server.loop.call_soon(flood)
        for _ in range(20):
            rig.frontend.requests.confirm()
        rig.until(lambda: rig.iommu.updates >= 50)


@FORMATS
def test_pages_come_and_go_under_a_ring(form: str, rng: random.Random) -> None:
    with behind(form) as rig:
        mappings = [*rig.map_ring(), *rig.map_data()]
        ring = rig.start()
        for _ in range(counts.IOTLB_REMAPS):
            at = rng.randrange(len(mappings))
            if rng.random() < 0.5:
                ring.send(b"before")
                ring.vring.kick.signal()
            mapping = mappings[at]
            rig.iommu.unmap(mapping)
            ring.send(b"without" * rng.randrange(1, 100))
            ring.vring.kick.signal()
            if rng.random() < 0.5:
                rig.frontend.requests.confirm()
            mappings[at] = rig.iommu.map(mapping.iova, mapping.size, guest_of(mapping.iova))
            ring.vring.kick.signal()
            ring.collect(len(ring.sent))
