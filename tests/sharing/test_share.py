"""What daemons get of a machine's memory, and what their refusals and their ends come to."""

from __future__ import annotations

import json

import pytest

from tests.counts import SLOTS_AT_ONCE
from tests.sharing.daemon import ADD, GET_FEATURES, REM, TABLE
from tests.sharing.helpers import (
    ACK,
    BLOCK,
    BUSY,
    ONE_ZONE,
    daemon_at,
    manage,
    plug,
    service_of,
    slots_of,
    unplug,
    unplug_all,
)
from vhost_user.errors import HostError, Refused, UsageError
from vhost_user.units import GIB, MIB, GuestAddress
from vhost_user.vring import SplitLayout
from virtio_mem.config import ConfigError, VmMemoryConfig
from virtio_mem.manager import MemoryManager
from virtio_mem.sharing import HotplugSharing, require_shareable
from virtio_mem.sharing.share import MOST_REGIONS

TWO_ZONES = (
    "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=16M,shared=on,hotplug_size=128M,"
    "hotplugged_size=128M id=b,size=16M,shared=on,hotplug_size=256M,hotplugged_size=256M"
)
PRIVATE_ZONE = "--memory size=0 --memory-zone id=a,size=2M,shared=on id=p,size=2M"
BY_TIMEOUT = 0.1
"""Seconds that a front end waits for a daemon that will not answer."""


# Configuration.


@pytest.mark.parametrize(
    ("line", "field"), [(PRIVATE_ZONE, "--memory-zone id=p shared"), ("--memory size=2M", "--memory shared")]
)
def test_private_memory_is_refused_before_anything_is_made(line: str, field: str) -> None:
    config = VmMemoryConfig.parse(line)
    for refuse in (lambda: require_shareable(config), lambda: MemoryManager(config, shareable=True)):
        with pytest.raises(ConfigError, match="no other process can map") as caught:
            refuse()
        assert (caught.value.field, caught.value.remedy) == (field, "use shared=on")
    with MemoryManager(config) as manager, daemon_at() as (daemon, frontend):
        with pytest.raises(UsageError, match="no other process can map"):
            manager.share(frontend)
        assert daemon.regions == {}
        assert manager.shares == []


def test_zones_are_chosen_by_name() -> None:
    config = VmMemoryConfig.parse(PRIVATE_ZONE)
    require_shareable(config, ["a"])
    with MemoryManager(config) as manager, daemon_at() as (daemon, frontend):
        manager.share(frontend, zones=["a"])
        assert [region.size for region in daemon.regions.values()] == [2 * MIB]
        for zones in (["a", "c"], [], "a"):
            with pytest.raises(ConfigError):
                require_shareable(config, zones)
            with pytest.raises(UsageError) as caught:
                manager.share(frontend, zones=zones)
            assert not isinstance(caught.value, ConfigError)


@pytest.mark.needs_hugetlb
def test_huge_pages_are_shared_by_nature() -> None:
    require_shareable(VmMemoryConfig.parse("--memory size=2M,hugepages=on,hugepage_size=2M"))


def test_too_few_regions_are_refused_with_the_numbers() -> None:
    with manage(TWO_ZONES) as manager, daemon_at(3) as (daemon, frontend):
        with pytest.raises(UsageError, match="has to be at most 3") as caught:
            manager.share(frontend)
        assert caught.value.value == 4
        assert daemon.regions == {}


def test_other_memory_at_the_same_address_is_refused() -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        manager.share(frontend)
        for _ in range(2):
            with pytest.raises(UsageError, match="overlaps"):
                manager.share(frontend)
        assert len(manager.shares) == 1
        assert len(daemon.regions) == 1
        assert len(service_of(manager).listeners) == 1


# Sharing.


def test_a_daemon_has_the_slots_that_have_a_plugged_block() -> None:
    with manage() as manager, daemon_at(18) as (daemon, frontend):
        plug(manager, 5)
        share = manager.share(frontend)
        assert share.plan.slot_size("mem0") == 4 * BLOCK
        assert slots_of(daemon, manager) == [(4, 4)]
        assert plug(manager, 6) is ACK
        assert plug(manager, 10, 7) is ACK
        assert slots_of(daemon, manager) == [(4, 4), (8, 4), (12, 4), (16, 4)]
        assert unplug(manager, 5) is ACK
        assert unplug(manager, 16) is ACK
        assert slots_of(daemon, manager) == [(4, 4), (8, 4), (12, 4)]
        assert unplug(manager, 6) is ACK
        assert slots_of(daemon, manager) == [(8, 4), (12, 4)]
        assert unplug_all(manager) is ACK
        assert slots_of(daemon, manager) == []


def test_each_daemon_has_slots_of_its_own_size() -> None:
    with (
        manage() as manager,
        daemon_at(8) as (few, front),
        daemon_at(None) as (tables, other),
        daemon_at() as (
            many,
            third,
        ),
    ):
        for frontend in (front, other, third):
            manager.share(frontend)
        assert plug(manager, 3, 14) is ACK
        assert slots_of(few, manager) == slots_of(tables, manager) == [(0, 16), (16, 16)]
        assert slots_of(many, manager) == [(block, 1) for block in range(3, 17)]
        assert TABLE in tables.requests
        info = json.loads(json.dumps(manager.info()["daemons"]))
        assert [each["shared_unplugged"] for each in info] == [18 * BLOCK, 18 * BLOCK, 0]
        assert [each["name"] for each in info] == ["1", "2", "3"]
        assert info[0]["zones"]["mem0"] == {
            "boot": 16 * MIB,
            "hotplug": 32 * BLOCK,
            "slot_size": 16 * BLOCK,
            "slots": 2,
            "shared_unplugged": 18 * BLOCK,
        }
        assert (info[2]["regions"], info[2]["max_regions"], info[2]["shared"]) == (15, 509, 16 * MIB + 14 * BLOCK)


def test_a_whole_region_is_shared_once_and_says_what_it_costs() -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        manager.share(frontend, hotplug=HotplugSharing.WHOLE, name="whole")
        requests = len(daemon.requests)
        assert plug(manager, 1, 3) is ACK
        assert unplug(manager, 1) is ACK
        assert len(daemon.requests) == requests
        (info,) = manager.info()["daemons"]
        assert (info["name"], info["sharing"], info["regions"]) == ("whole", "whole", 2)
        assert info["shared_unplugged"] == 128 * MIB - 2 * BLOCK
        assert info["zones"]["mem0"]["slot_size"] == 128 * MIB


def test_zones_share_a_daemons_regions() -> None:
    with manage(TWO_ZONES) as manager, daemon_at(100) as (daemon, frontend):
        share = manager.share(frontend)
        assert (share.plan.slot_size("a"), share.plan.slot_size("b")) == (2 * BLOCK, 2 * BLOCK)
        for zone_id, blocks in (("a", 64), ("b", 128)):
            assert plug(manager, 0, blocks, zone_id) is ACK
        assert len(daemon.regions) == share.plan.count == 98
        assert manager.system_reset()
        assert len(daemon.regions) == 2


def test_zones_without_a_device_have_boot_memory_alone() -> None:
    with manage("--memory size=4G,shared=on") as manager, daemon_at() as (daemon, frontend):
        share = manager.share(frontend)
        assert [region.size for region in daemon.regions.values()] == [3 * GIB, GIB]
        assert share.info()["zones"]["mem0"]["slot_size"] == 0


def test_no_more_regions_than_an_unplug_all_can_wait_for() -> None:
    line = ONE_ZONE.replace("hotplug_size=128M", "hotplug_size=32G")
    with manage(line) as manager, daemon_at(2**63) as (_, frontend):
        share = manager.share(frontend)
        assert share.plan.limit == MOST_REGIONS
        assert share.plan.slot_size("mem0") == 8 * BLOCK


def test_thousands_of_slots_in_as_many_runs() -> None:
    line = ONE_ZONE.replace("128M", f"{2 * SLOTS_AT_ONCE}M")
    with manage(line) as manager, daemon_at(2**63) as (daemon, frontend):
        share = manager.share(frontend)
        assert share.plan.slot_size("mem0") == BLOCK
        assert plug(manager, 0, SLOTS_AT_ONCE) is ACK
        for block in range(0, SLOTS_AT_ONCE, 2):
            assert unplug(manager, block) is ACK
        assert slots_of(daemon, manager) == [(block, 1) for block in range(1, SLOTS_AT_ONCE, 2)]
        daemon.refuses, daemon.chances = {REM}, SLOTS_AT_ONCE // 2 - 1
        assert unplug_all(manager) is BUSY
        assert len(slots_of(daemon, manager)) == SLOTS_AT_ONCE // 2
        daemon.behave()
        assert manager.system_reset()
        assert slots_of(daemon, manager) == []


# Refusals.


@pytest.mark.parametrize("chances", [0, 1, 2])
def test_a_refused_slot_makes_the_plug_busy_and_rolls_back(chances: int) -> None:
    with manage() as manager, daemon_at() as (first, front), daemon_at() as (second, other):
        manager.share(front)
        manager.share(other)
        second.refuses, second.chances = {ADD}, chances
        assert plug(manager, 4, 3) is BUSY
        assert slots_of(first, manager) == slots_of(second, manager) == []
        assert service_of(manager).failed_undos == 0
        second.behave()
        assert plug(manager, 4, 3) is ACK
        assert slots_of(first, manager) == slots_of(second, manager) == [(4, 1), (5, 1), (6, 1)]


@pytest.mark.parametrize("slots", [None, 509])
def test_a_daemon_that_acknowledges_and_then_closes_has_refused(slots: int | None) -> None:
    """libvhost-user does so; after that it is gone, and in nobody's way."""
    with manage() as manager, daemon_at() as (first, front), daemon_at(slots) as (second, other):
        manager.share(front)
        share = manager.share(other)
        second.closes_after = {ADD, TABLE}
        assert plug(manager) is BUSY
        assert slots_of(first, manager) == []
        assert not share.connected
        assert plug(manager) is ACK
        assert slots_of(first, manager) == [(0, 1)]
        second.behave()
        other.reconnect(second.start())
        assert slots_of(second, manager) == [(0, 1 if slots else 16)]


@pytest.mark.parametrize("request_", [REM, TABLE])
def test_a_refused_removal_makes_the_unplug_busy_and_rolls_back(request_: object) -> None:
    with (
        manage() as manager,
        daemon_at() as (first, front),
        daemon_at(509 if request_ is REM else None) as (
            second,
            other,
        ),
    ):
        manager.share(front)
        manager.share(other)
        plug(manager, 0, 3)
        had = slots_of(first, manager), slots_of(second, manager)
        second.refuses, second.chances = {REM, TABLE}, 1 if request_ is REM else 0
        assert unplug_all(manager) is BUSY
        assert (slots_of(first, manager), slots_of(second, manager)) == had
        assert service_of(manager).device.plugged_size == 3 * BLOCK
        second.behave()
        assert unplug_all(manager) is ACK
        assert slots_of(first, manager) == slots_of(second, manager) == []


def test_what_a_daemon_refuses_to_take_back_costs_the_connection() -> None:
    """Else it would lack memory that the guest has plugged."""
    with manage() as manager, daemon_at() as (first, front), daemon_at() as (second, other):
        share = manager.share(front)
        manager.share(other)
        plug(manager)
        first.refuses, second.refuses = {ADD}, {REM}
        assert unplug(manager) is BUSY
        assert not share.connected
        assert service_of(manager).failed_undos == 0
        first.behave()
        front.reconnect(first.start())
        assert slots_of(first, manager) == slots_of(second, manager) == [(0, 1)]


def test_what_a_daemon_refuses_to_give_back_costs_the_connection() -> None:
    """Else it would have memory that is unplugged."""
    with manage() as manager, daemon_at() as (first, front), daemon_at() as (second, other):
        share = manager.share(front)
        manager.share(other)
        first.refuses, second.refuses = {REM}, {ADD}
        assert plug(manager) is BUSY
        assert not share.connected
        assert service_of(manager).failed_undos == 0
        first.behave()
        front.reconnect(first.start())
        assert slots_of(first, manager) == []


def test_a_batch_that_a_daemon_takes_half_and_does_not_give_back() -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        share = manager.share(frontend)
        daemon.refuses, daemon.chances = {ADD, REM}, 1
        assert plug(manager, 0, 3) is BUSY
        assert not share.connected
        assert plug(manager, 0, 3) is ACK
        daemon.behave()
        frontend.reconnect(daemon.start())
        assert slots_of(daemon, manager) == [(0, 1), (1, 1), (2, 1)]


def test_a_ring_keeps_its_memory() -> None:
    """The daemon is not even asked: some crash."""
    with manage() as manager, daemon_at() as (daemon, frontend):
        manager.share(frontend)
        plug(manager, 0, 2)
        at = service_of(manager).device.geometry.addr
        vring = frontend.vring(0)
        vring.start(SplitLayout.place(16, GuestAddress(at)))
        frontend.vring(1)
        asked = daemon.requests.count(REM)
        assert unplug(manager) is BUSY
        assert daemon.requests.count(REM) == asked
        assert unplug(manager, 1) is ACK
        vring.stop()
        assert unplug(manager) is ACK


def test_no_block_comes_or_goes_during_postcopy() -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        manager.share(frontend)
        plug(manager)
        frontend.requests.postcopy = True
        assert plug(manager, 1) is BUSY
        assert unplug(manager) is BUSY
        assert slots_of(daemon, manager) == [(0, 1)]
        frontend.requests.postcopy = False
        assert unplug(manager) is ACK


# Ends.


def test_a_daemon_that_is_gone_is_in_nobodys_way() -> None:
    with manage() as manager, daemon_at() as (daemon, frontend), daemon_at() as (other, front):
        share = manager.share(frontend)
        manager.share(front)
        plug(manager, 0, 3)
        daemon.end()
        assert unplug(manager, 1) is ACK
        assert plug(manager, 7) is ACK
        assert slots_of(other, manager) == [(0, 1), (2, 1), (7, 1)]
        info = share.info()
        assert (info["connected"], info["lingering"], info["regions"], info["shared"]) == (False, False, 0, 0)
        frontend.reconnect(daemon.start())
        assert slots_of(daemon, manager) == [(0, 1), (2, 1), (7, 1)]
        assert share.info()["shared"] == 16 * MIB + 3 * BLOCK
        assert unplug_all(manager) is ACK
        assert slots_of(daemon, manager) == []


def test_a_daemon_that_vanishes_at_a_removal_has_the_memory_no_more() -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        share = manager.share(frontend)
        plug(manager, 0, 3)
        daemon.closes_after = {REM}
        assert unplug(manager, 1) is ACK
        assert not share.connected
        daemon.behave()
        frontend.reconnect(daemon.start())
        assert slots_of(daemon, manager) == [(0, 1), (2, 1)]


def test_reconnecting_may_fail_and_be_tried_again() -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        manager.share(frontend)
        plug(manager, 0, 2)
        daemon.end()
        daemon.refuses = {ADD}
        with pytest.raises(Refused):
            frontend.reconnect(daemon.start())
        daemon.refuses = {GET_FEATURES}
        with pytest.raises(Exception, match="features"):
            frontend.reconnect(daemon.start())
        daemon.behave()
        daemon.slots = 2
        with pytest.raises(HostError, match="has to be at most 2"):
            frontend.reconnect(daemon.start())
        daemon.slots = 509
        frontend.reconnect(daemon.start())
        assert slots_of(daemon, manager) == [(0, 1), (1, 1)]


@pytest.mark.parametrize("mood", ["silent_after", "babbles_after"])
def test_a_stuck_daemon_keeps_its_slots_plugged_until_it_closes(mood: str) -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        share = manager.share(frontend)
        plug(manager, 0, 3)
        setattr(daemon, mood, {REM})
        frontend.requests.timeout = BY_TIMEOUT
        assert unplug(manager, 1) is BUSY
        assert (share.connected, share.lingering) == (False, True)
        assert unplug(manager, 1) is BUSY
        assert service_of(manager).device.plugged_size == 3 * BLOCK
        assert plug(manager, 8) is ACK
        assert manager.info()["daemons"][0]["shared"] == 16 * MIB + 4 * BLOCK
        daemon.end()
        assert not share.lingering
        assert unplug(manager, 1) is ACK


def test_undoing_does_not_wait_for_a_stuck_daemon() -> None:
    with manage() as manager, daemon_at() as (stuck, front), daemon_at() as (other, frontend):
        manager.share(front)
        manager.share(frontend)
        plug(manager)
        stuck.silent_after = {REM}
        front.requests.timeout = BY_TIMEOUT
        assert unplug(manager) is BUSY
        other.refuses = {ADD}
        assert plug(manager, 1) is BUSY
        assert service_of(manager).failed_undos == 0
        stuck.end()
        stuck.behave()
        front.requests.timeout = 5.0
        front.reconnect(stuck.start())
        assert slots_of(stuck, manager) == slots_of(other, manager) == [(0, 1)]


def test_closing_the_front_end_lets_go_of_a_stuck_daemon() -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        share = manager.share(frontend)
        plug(manager)
        daemon.silent_after = {REM}
        frontend.requests.timeout = BY_TIMEOUT
        assert unplug(manager) is BUSY
        frontend.close()
        assert not share.lingering
        assert unplug(manager) is ACK
