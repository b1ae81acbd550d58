"""--zone: what it takes, and what it refuses and says."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhost_user.errors import UsageError
from vhost_user.units import GIB, MIB
from virtio_mem.serve.plan import ServePlan
from virtio_mem.serve.zone_option import MAX_ZONES, ServedZoneOption, check_together

GOOD = "id=mem0,socket=/tmp/a.sock,addr=4G,hotplug_size=2G"


def parse(more: str = "", good: str = GOOD) -> ServedZoneOption:
    return ServedZoneOption.parse(good + more)


def test_every_key_is_read_and_printed() -> None:
    more = ",hotplugged_size=1G,block_size=4M,guest_numa_id=3,prefault=on,unplugged_inaccessible=off"
    more += ",unrequested_unplug=off"
    zone = parse(more)
    assert (zone.id, zone.socket, zone.addr, zone.hotplug_size) == ("mem0", Path("/tmp/a.sock"), 4 * GIB, 2 * GIB)
    assert (zone.hotplugged_size, zone.block_size, zone.guest_numa_id) == (GIB, 4 * MIB, 3)
    assert zone.prefault
    assert not zone.unplugged_inaccessible
    assert not zone.unrequested_unplug
    assert not ServePlan.decode(ServePlan(zones=(zone.planned(),)).encode()).zones[0].unrequested_unplug
    assert str(zone) == GOOD + more
    assert ServedZoneOption.parse(str(zone)) == zone


def test_what_is_left_out_has_a_default() -> None:
    zone = parse()
    assert (zone.hotplugged_size, zone.block_size, zone.guest_numa_id) == (0, 2 * MIB, None)
    assert not zone.prefault
    assert zone.unplugged_inaccessible
    assert zone.unrequested_unplug


@pytest.mark.parametrize(
    ("text", "field", "limit"),
    [
        (GOOD + ",colour=red", "colour", "there is no such key"),
        (GOOD + ",addr=8G", "addr", "was given before"),
        (GOOD.replace(",addr=4G", ""), "addr", "is mandatory"),
        (GOOD.replace("id=mem0,", ""), "id", "is mandatory"),
        (GOOD.replace("socket=/tmp/a.sock,", ""), "socket", "is mandatory"),
        (GOOD.replace(",hotplug_size=2G", ""), "hotplug_size", "is mandatory"),
        (GOOD.replace("2G", "0"), "hotplug_size", "a size of 0"),
        (GOOD.replace("2G", "2X"), "hotplug_size", "a size is"),
        (GOOD.replace("2G", "3M"), "hotplug_size", "multiple of block_size=2M"),
        (GOOD.replace("4G", "4095M"), "addr", "multiple of block_size=2M"),
        (GOOD.replace("4G", "17179869182G"), "addr", "below 2\\*\\*64"),
        (GOOD + ",hotplugged_size=1M", "hotplugged_size", "multiple of block_size=2M"),
        (GOOD + ",hotplugged_size=4G", "hotplugged_size", "exceed hotplug_size=2G"),
        (GOOD + ",block_size=3M", "block_size", "power of two"),
        (GOOD + ",block_size=512K", "block_size", "1M or more"),
        (GOOD + ",guest_numa_id=65536", "guest_numa_id", "0 to 65535"),
        (GOOD + ",prefault=perhaps", "prefault", "on or off"),
        (GOOD.replace("mem0", "x" * 201), "id", "200 bytes"),
        (GOOD.replace("/tmp/a.sock", "/" + "a" * 107), "socket", "107 bytes"),
    ],
)
def test_refusals_say_what_is_wrong(text: str, field: str, limit: str) -> None:
    with pytest.raises(UsageError, match=limit) as refusal:
        ServedZoneOption.parse(text)
    assert refusal.value.field.endswith(field)
    assert refusal.value.field.startswith("--zone")


def test_a_socket_may_have_a_path_that_is_no_utf_8() -> None:
    assert ServedZoneOption.parse(GOOD.replace("/tmp/a.sock", "/tmp/\udcff")).socket == Path("/tmp/\udcff")
    with pytest.raises(UsageError, match="107 bytes"):
        ServedZoneOption.parse(GOOD.replace("/tmp/a.sock", "/" + "\udcff" * 107))


def other(**changes: str) -> ServedZoneOption:
    keys = {"id": "mem1", "socket": "/tmp/b.sock", "addr": "6G", "hotplug_size": "2G"} | changes
    return ServedZoneOption.parse(",".join(f"{key}={value}" for key, value in keys.items()))


def test_zones_are_checked_together() -> None:
    check_together([parse(), other()])
    check_together([other(), parse()])


@pytest.mark.parametrize(
    ("changes", "field", "limit"),
    [
        ({"id": "mem0"}, "id", "twice"),
        ({"socket": "/tmp/a.sock"}, "socket", "zone mem0"),
        ({"addr": "5G"}, "addr", "overlaps zone mem0, which ends at 0x180000000"),
        ({"addr": "3G", "hotplug_size": "8G"}, "addr", "overlaps zone mem1"),
    ],
)
def test_zones_share_nothing(changes: dict[str, str], field: str, limit: str) -> None:
    with pytest.raises(UsageError, match=limit) as refusal:
        check_together([parse(), other(**changes)])
    assert refusal.value.field.endswith(field)


def test_at_least_one_zone_is_served() -> None:
    with pytest.raises(UsageError, match="at least one"):
        check_together([])


def test_a_service_has_so_many_zones_at_most() -> None:
    zones = [other(id=f"mem{n}", socket=f"/tmp/{n}.sock", addr=f"{4 + 2 * n}G") for n in range(MAX_ZONES + 1)]
    check_together(zones[1:])
    with pytest.raises(UsageError, match="121 zones: have to be at most 120"):
        check_together(zones)


def test_a_plan_is_what_it_was_after_it_was_kept() -> None:
    plan = ServePlan(zones=(parse().planned(), other(guest_numa_id="1").planned()), api=True, state_dir="/x", verbose=2)
    assert ServePlan.decode(plan.encode()) == plan
