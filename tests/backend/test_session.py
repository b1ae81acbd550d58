"""A front end and a back end of ours: negotiation, memory, rings, configuration, status, reset, state."""

from __future__ import annotations

import logging
import os
import select
from dataclasses import replace

import pytest

from tests.backend.devices import Echo, Forgetful, Keeper, NoConfig
from tests.backend.rig import EVERYTHING, RING_PACKED, SIZE, SPLIT, Ram, confirm_often, pair, start_ring
from vhost_user.backend import PROTOCOL_FEATURES
from vhost_user.errors import Disconnected, PeerError, Refused, UsageError
from vhost_user.event import Event
from vhost_user.message import (
    F_LOG_ALL,
    U64,
    FrontendRequest,
    Log,
    MacAddress,
    Opaque,
    PackedBase,
    ProtocolFeature,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
)
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress

ALL = PROTOCOL_FEATURES & ~ProtocolFeature.GPA_ADDRESSES
FORMATS = pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])


# Rings.


@FORMATS
@pytest.mark.parametrize("extra", [0, RING_PACKED - 1], ids=["no extras", "extras"])
def test_chains_come_back_with_what_was_sent(features: int, extra: int) -> None:
    with pair(features=features & ~(1 << 28 | 1 << 29) | features & extra) as both:
        ring = start_ring(both.frontend, both.ram)
        for length in (1, 100, 2047):
            ring.echo(b"x" * length)
        for _ in range(5):
            for each in range(8):
                ring.send(b"%d" % each)
            ring.kick()
            ring.collect(8)


@FORMATS
def test_a_ring_stops_and_goes_on_where_it_was(features: int) -> None:
    device = Echo()
    with pair(device, features=features) as both:
        ring = start_ring(both.frontend, both.ram)
        for _ in range(20):
            ring.echo(b"before")
        base = ring.vring.stop()
        assert base == (PackedBase(8, True, 8, True).to_num() if features & RING_PACKED else 20)
        ring.send(b"while it is stopped")
        ring.vring.kick.signal()
        both.frontend.requests.confirm()
        assert ring.driver.get_used() is None
        assert device.served == 20
        ring.vring.start(ring.layout, base)
        ring.collect(1)


@FORMATS
def test_stopping_completes_what_the_device_has(features: int) -> None:
    device = Keeper()
    with pair(device, features=features) as both:
        ring = start_ring(both.frontend, both.ram)
        for _ in range(3):
            ring.send(b"kept")
        ring.vring.kick.signal()
        while len(device.kept) < 3:
            both.frontend.requests.confirm()
        ring.vring.stop()
        ring.collect(3, timeout=0.1)


def test_a_disabled_ring_is_left_alone_until_it_is_enabled() -> None:
    device = Echo()
    with pair(device) as both:
        ring = start_ring(both.frontend, both.ram, enabled=False)
        ring.send(b"wait")
        ring.vring.kick.signal()
        both.frontend.requests.confirm()
        assert device.served == 0
        ring.vring.enable()
        ring.collect(1)
        ring.vring.enable(False)
        ring.send(b"again")
        ring.vring.kick.signal()
        both.frontend.requests.confirm()
        assert device.served == 1


def test_being_enabled_is_remembered_by_a_stopped_ring() -> None:
    with pair() as both:
        vring = both.frontend.vring(0)
        vring.enable()
        ring = start_ring(both.frontend, both.ram, enabled=False)
        ring.echo(b"enabled before it was started")


def test_two_rings_are_apart() -> None:
    with pair() as both:
        first, second = (start_ring(both.frontend, both.ram, index) for index in (0, 1))
        second.echo(b"two")
        first.echo(b"one")
        first.vring.stop()
        second.echo(b"goes on")


def test_without_a_kick_descriptor_the_ring_is_polled() -> None:
    with pair() as both:
        ring = start_ring(both.frontend, both.ram)
        both.frontend.requests.tell(FrontendRequest.SET_VRING_KICK, VringFd(0, no_fd=True))
        ring.send(b"nobody kicks")
        ring.collect(1)


def test_without_protocol_features_rings_are_enabled_at_once() -> None:
    with pair(protocol_features=ProtocolFeature.NONE) as both:
        both.frontend.requests.tell(FrontendRequest.SET_FEATURES, U64(SPLIT))
        both.frontend.features = SPLIT
        start_ring(both.frontend, both.ram).echo(b"enabled")


def test_a_broken_ring_signals_its_error_and_lives_again_when_started_anew() -> None:
    with pair() as both:
        broken, good = (start_ring(both.frontend, both.ram, index) for index in (0, 1))
        both.ram.memory.store16(GuestAddress(broken.layout.areas["avail"].address + 2), 9999)
        broken.vring.kick.signal()
        both.frontend.requests.confirm()
        assert select.select([broken.vring.err], [], [], 5)[0]
        good.echo(b"the other one lives")
        both.ram.memory.store16(GuestAddress(broken.layout.areas["avail"].address + 2), 0)
        broken.vring.stop()
        start_ring(both.frontend, both.ram).echo(b"made anew")


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (FrontendRequest.SET_VRING_NUM, VringState(0, 0)),
        (FrontendRequest.SET_VRING_NUM, VringState(0, 3)),
        (FrontendRequest.SET_VRING_NUM, VringState(0, 512)),
        (FrontendRequest.SET_VRING_NUM, VringState(2, 16)),
        (FrontendRequest.SET_VRING_BASE, VringState(0, 1 << 16)),
        (FrontendRequest.SET_VRING_ENABLE, VringState(0, 2)),
        (FrontendRequest.SET_VRING_ADDR, VringAddr(9, 0, UserAddress(0), UserAddress(0), UserAddress(0))),
        (FrontendRequest.SET_VRING_KICK, VringFd(0, no_fd=True)),
        (FrontendRequest.SET_STATUS, U64(256)),
        (FrontendRequest.SET_FEATURES, U64(1 << 63)),
        (FrontendRequest.SET_PROTOCOL_FEATURES, U64(1 << 40)),
        (FrontendRequest.SET_PROTOCOL_FEATURES, U64(int(ProtocolFeature.INBAND_NOTIFICATIONS))),
    ],
    ids=str,
)
def test_a_refusal_is_told_and_changes_nothing(request_: FrontendRequest, payload: U64) -> None:
    with pair() as both:
        ring = start_ring(both.frontend, both.ram, 1)
        with pytest.raises(Refused):
            both.frontend.requests.tell(request_, payload)
        ring.echo(b"as before")
        start_ring(both.frontend, both.ram, 0).echo(b"can be set up")


def test_what_a_running_ring_has_can_not_be_set() -> None:
    with pair() as both:
        ring = start_ring(both.frontend, both.ram)
        for request, payload in (
            (FrontendRequest.SET_VRING_NUM, VringState(0, 32)),
            (FrontendRequest.SET_VRING_BASE, VringState(0, 7)),
            (FrontendRequest.SET_FEATURES, U64(both.frontend.features & ~(1 << 29))),
            (FrontendRequest.SET_VRING_ADDR, VringAddr(0, 0, UserAddress(16), UserAddress(0), UserAddress(0))),
        ):
            with pytest.raises(Refused):
                both.frontend.requests.tell(request, payload)
        ring.echo(b"as before")


# Memory.


def test_regions_come_and_go_while_a_ring_runs() -> None:
    device = Echo()
    with pair(device) as both:
        ring = start_ring(both.frontend, both.ram)
        more = Ram(guest=1 << 32, user=1 << 33)
        try:
            for _ in range(50):
                both.frontend.regions.add(more.region)
                ring.echo(b"with it")
                both.frontend.regions.remove(more.region)
                ring.echo(b"without it")
        finally:
            more.close()
        assert device.memory is not None
        assert [region.guest_address for region in device.memory.guest_memory.regions] == [0]


def test_a_buffer_in_a_region_that_is_gone_costs_its_chain_only() -> None:
    with pair() as both:
        ring = start_ring(both.frontend, both.ram)
        token = ring.driver.add([(1 << 32, 8)], [(1 << 33, 8)])
        ring.vring.kick.signal()
        while (used := ring.driver.get_used()) is None:
            assert ring.vring.wait(5)
        assert used == (token, 0)
        ring.echo(b"goes on")


def test_the_region_of_a_running_ring_stays() -> None:
    with pair() as both:
        ring = start_ring(both.frontend, both.ram)
        with pytest.raises(Refused):
            both.frontend.regions.remove(both.ram.region)
        ring.echo(b"as before")
        ring.vring.stop()
        both.frontend.regions.remove(both.ram.region)


def test_a_whole_table_replaces_what_there_was() -> None:
    device = Echo()
    no_slots = ~ProtocolFeature.CONFIGURE_MEM_SLOTS & ProtocolFeature(0xFFFF)
    with pair(device, protocol_features=no_slots) as both:
        ring = start_ring(both.frontend, both.ram)
        more = Ram(guest=1 << 32, user=1 << 33)
        try:
            both.frontend.regions.add(more.region)
            ring.echo(b"two regions")
            both.frontend.regions.remove(more.region)
            ring.echo(b"one region")
        finally:
            more.close()


def test_a_table_without_the_running_ring_breaks_that_ring() -> None:
    no_slots = ~ProtocolFeature.CONFIGURE_MEM_SLOTS & ProtocolFeature(0xFFFF)
    with pair(protocol_features=no_slots) as both:
        ring = start_ring(both.frontend, both.ram)
        both.frontend.regions.remove(both.ram.region)
        both.frontend.requests.confirm()
        assert ring.vring.failed


def test_overlap_and_unknown_regions_are_refused() -> None:
    with pair() as both:
        ring = start_ring(both.frontend, both.ram)
        wire = both.ram.region.wire
        with pytest.raises(Refused):
            both.frontend.requests.tell(FrontendRequest.ADD_MEM_REG, SingleMemoryRegion(wire), [both.ram.fd])
        unknown = Ram(guest=1 << 40, user=1 << 41)
        try:
            with pytest.raises(Refused):
                both.frontend.requests.tell(FrontendRequest.REM_MEM_REG, SingleMemoryRegion(unknown.region.wire))
            with pytest.raises(UsageError):
                both.frontend.regions.remove(unknown.region)
        finally:
            unknown.close()
        ring.echo(b"as before")


@pytest.mark.parametrize("what", ["region", "dirty log"])
def test_a_truncated_file_ends_the_session_and_not_the_server(what: str, caplog: pytest.LogCaptureFixture) -> None:
    with pair() as both:
        ring = start_ring(both.frontend, both.ram)
        ring.echo(b"before")
        if what == "region":
            file = os.dup(both.ram.fd)
        else:
            file = os.memfd_create("log", os.MFD_CLOEXEC)
            os.ftruncate(file, 4096)
            log = Log(ByteCount(4096), HostOffset(0))
            both.frontend.requests.ask(FrontendRequest.SET_LOG_BASE, Opaque, log, [file])
            both.frontend.requests.tell(FrontendRequest.SET_FEATURES, U64(both.frontend.features | F_LOG_ALL))
        ring.send(b"x" * 16)
        with caplog.at_level(logging.WARNING):
            os.ftruncate(file, 0)
            ring.vring.kick.signal()
            with pytest.raises(PeerError):
                confirm_often(both.frontend)
        os.ftruncate(both.ram.fd, SIZE)
        os.close(file)
        assert what in caplog.text


# The device.


def test_configuration_is_read_and_written() -> None:
    with pair() as both:
        assert both.frontend.get_config(0, 16) == b"READONLYwritable"
        both.frontend.set_config(8, b"WRITTEN!")
        assert both.frontend.get_config(8, 8) == b"WRITTEN!"
        with pytest.raises(Refused):
            both.frontend.set_config(0, b"no")
        both.frontend.set_config(0, b"MIGRATED", migration=True)
        assert both.frontend.get_config(0, 16) == b"MIGRATEDWRITTEN!"
        with pytest.raises(Refused):
            both.frontend.get_config(8, 9)
        assert both.frontend.connected


def test_a_device_without_configuration_or_state_does_not_offer_them() -> None:
    with pair(NoConfig()) as both:
        assert not both.frontend.has(ProtocolFeature.CONFIG)
        assert not both.frontend.has(ProtocolFeature.DEVICE_STATE)
        with pytest.raises(Refused):
            both.frontend.get_config(0, 1)


def test_status_is_kept_and_told() -> None:
    device = Echo()
    with pair(device) as both:
        both.frontend.status = 15
        assert both.frontend.status == 15 == device.status


def test_a_device_reset_stops_rings_and_keeps_the_rest() -> None:
    device = Echo()
    with pair(device) as both:
        ring = start_ring(both.frontend, both.ram)
        ring.echo(b"before")
        both.frontend.status = 15
        both.frontend.set_config(8, b"WRITTEN!")
        both.frontend.reset_device()
        assert device.log[-2:] == ["stopped 0", "reset"]
        assert both.frontend.status == 0
        assert both.frontend.get_config(8, 8) == b"writable"
        ring.send(b"nobody serves")
        ring.vring.kick.signal()
        both.frontend.requests.confirm()
        assert ring.driver.get_used() is None
        start_ring(both.frontend, both.ram).echo(b"after")


def test_logging_is_offered_and_switched_while_rings_run() -> None:
    with pair() as both:
        ring = start_ring(both.frontend, both.ram)
        ring.echo(b"before")
        both.frontend.start_logging(GuestAddress(SIZE - 1))
        assert both.frontend.take_dirty_pages() == set()
        ring.echo(b"logged")
        assert both.frontend.take_dirty_pages() == {0x101}
        ring.vring.set_log(ring.layout.areas["used"].address)
        ring.echo(b"with the used ring")
        assert both.frontend.take_dirty_pages() == {0, 0x102}
        both.frontend.stop_logging()
        ring.echo(b"after")
        assert both.frontend.offered & F_LOG_ALL


# What only some devices have.


def test_rarp_and_mtu_reach_the_device() -> None:
    device = Echo()
    with pair(device, protocol_features=ALL) as both:
        both.frontend.requests.tell(FrontendRequest.SEND_RARP, MacAddress(b"\2\0\0\0\0\1"))
        both.frontend.requests.tell(FrontendRequest.NET_SET_MTU, U64(1500))
        with pytest.raises(Refused):
            both.frontend.requests.tell(FrontendRequest.NET_SET_MTU, U64(9001))
        assert device.log[-2:] == ["rarp 020000000001", "mtu 1500"]


@FORMATS
@pytest.mark.parametrize("suspend", [True, False])
def test_what_is_in_flight_may_be_left_for_later(features: int, suspend: bool) -> None:
    device = Forgetful()
    wanted = ALL
    if not suspend:
        wanted &= ~ProtocolFeature.GET_VRING_BASE_INFLIGHT
    with pair(device, features=features, protocol_features=wanted) as both:
        both.frontend.track_inflight(2, 16)
        ring = start_ring(both.frontend, both.ram)
        for each in range(3):
            ring.send(b"request %d" % each)
        ring.vring.kick.signal()
        while len(device.kept) < 3:
            both.frontend.requests.confirm()
        base = ring.vring.stop()
        assert (ring.driver.get_used() is None) == suspend
        assert device.served == (0 if suspend else 3)
        if suspend:
            ring.vring.start(ring.layout, base)
            while len(device.kept) < 3:
                both.frontend.requests.confirm()
            ring.vring.stop()


def test_suspending_needs_a_record_of_what_is_in_flight() -> None:
    with pair() as both:
        bits = U64(int(ProtocolFeature.GET_VRING_BASE_INFLIGHT))
        with pytest.raises(Refused):
            both.frontend.requests.tell(FrontendRequest.SET_PROTOCOL_FEATURES, bits)


def test_with_gpa_addresses_the_front_end_has_no_addresses_of_its_own() -> None:
    with pair(protocol_features=PROTOCOL_FEATURES, share=False) as both:
        assert both.frontend.has(ProtocolFeature.GPA_ADDRESSES)
        with pytest.raises(Refused):
            both.frontend.regions.add(both.ram.region)
        both.frontend.regions.add(replace(both.ram.region, user_address=None))
        start_ring(both.frontend, both.ram).echo(b"by guest address")


# What is told, and how.


def test_the_driver_is_called_for_what_is_completed_when_a_ring_stops() -> None:
    device = Keeper()
    with pair(device) as both:
        ring = start_ring(both.frontend, both.ram)
        ring.send(b"kept")
        ring.vring.kick.signal()
        while not device.kept:
            both.frontend.requests.confirm()
        ring.vring.call.take()
        ring.vring.stop()
        assert ring.vring.call.take()


def test_a_new_call_descriptor_is_rung_at_once() -> None:
    with pair() as both, Event.create() as call:
        start_ring(both.frontend, both.ram)
        both.frontend.requests.tell(FrontendRequest.SET_VRING_CALL, VringFd(0), [call.fileno()])
        assert call.take()


def test_a_message_with_a_reply_of_its_own_is_never_acknowledged() -> None:
    """A number in the place of a ring's base would be taken for one: the session ends instead."""
    with pair() as both:
        connection = both.frontend.requests._connection
        assert connection is not None
        connection.send(FrontendRequest.GET_VRING_BASE, VringState(9, 0).encode(), need_reply=True, timeout=5)
        with pytest.raises(Disconnected):
            connection.receive(5)
