"""From options to memory: what the manager makes, how it is resized, and that it makes all or nothing."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.host import HugePagePool
from vhost_user.errors import FieldError, HostError, UsageError
from vhost_user.units import GIB, MIB, ByteCount, GuestAddress, HostOffset
from vhost_user.vring import RingBroken, SplitDriver, SplitLayout, SplitQueue
from virtio_mem.config import ConfigError, VmMemoryConfig
from virtio_mem.control import Control
from virtio_mem.geometry import UsableRegion
from virtio_mem.manager import MemoryManager
from virtio_mem.protocol import Feature, Request, RequestType, ResponseType
from virtio_mem.request_queue import GuestRequestQueue

ONE_ZONE = "--memory size=64M,shared=on,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=256M"
TWO_ZONES = (
    "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=64M,shared=on,hotplug_size=512M "
    "id=b,size=4G,hotplug_size=1G,hotplugged_size=128M "
    "--numa guest_numa_id=0,memory_zones=a guest_numa_id=3,memory_zones=b"
)


def manage(line: str, **options: object) -> MemoryManager:
    return MemoryManager(VmMemoryConfig.parse(line), **options)  # type: ignore[arg-type]


def plug(manager: MemoryManager, zone_id: str, block: int = 0, nb_blocks: int = 1) -> ResponseType:
    service = manager.zones[zone_id].service
    assert service is not None
    geometry = service.device.geometry
    addr = GuestAddress(geometry.addr + block * geometry.block_size)
    return service.request(Request(RequestType.PLUG, addr, nb_blocks)).type


def test_the_default_zone_and_its_device() -> None:
    with manage(ONE_ZONE) as manager:
        zone = manager.zones["mem0"]
        assert zone.service is not None
        config = zone.service.device.config
        assert (config.addr, config.region_size, config.requested_size) == (4 * GIB, GIB, 256 * MIB)
        assert config.block_size == 2 * MIB
        assert config.plugged_size == 0
        assert zone.service.device.offered_features == Feature.PERSISTENT_SUSPEND | Feature.UNPLUGGED_INACCESSIBLE
        assert not zone.service.prefault


@pytest.mark.clause("MEM-FEAT-1", "MEM-OP-8")
def test_zones_lie_where_the_layout_says_and_know_their_nodes() -> None:
    with manage(TWO_ZONES) as manager:
        a, b = manager.zones["a"].service, manager.zones["b"].service
        assert a is not None
        assert b is not None
        assert [(hex(region.guest_address), hex(region.size)) for region in manager.guest_memory.regions] == [
            ("0x0", "0x4000000"),
            ("0x4000000", "0xbc000000"),
            ("0x100000000", "0x44000000"),
            ("0x148000000", "0x20000000"),
            ("0x168000000", "0x40000000"),
        ]
        assert (a.device.config.node_id, b.device.config.node_id) == (0, 3)
        assert Feature.ACPI_PXM in a.device.offered_features
        assert Feature.UNPLUGGED_INACCESSIBLE in a.device.offered_features
        # Private anonymous memory has the shared zero page: reading what is unplugged costs nothing, and is allowed.
        assert Feature.UNPLUGGED_INACCESSIBLE not in b.device.offered_features
        unplugged = GuestAddress(b.device.geometry.addr)
        assert manager.guest_memory.read(unplugged, 4096) == bytes(4096)
        hotplug = manager.zones["b"].zone.hotplug
        assert hotplug is not None
        assert hotplug.held() == 0


def test_boot_memory_across_the_hole_is_one_piece_of_host_memory() -> None:
    with manage(TWO_ZONES) as manager:
        manager.guest_memory.write(GuestAddress(3 * GIB - 4), b"last")
        manager.guest_memory.write(GuestAddress(4 * GIB), b"next")
        boot = manager.zones["b"].zone.boot
        assert boot is not None
        split = 3 * GIB - 64 * MIB
        with boot.view(split - 4, 8) as view:  # type: ignore[arg-type]
            assert bytes(view) == b"lastnext"


@pytest.mark.clause("MEM-OP-4", "MEM-OP-6", "MEM-OP-2", "MEM-INIT-3")
def test_plugged_memory_is_the_guests_until_it_is_unplugged() -> None:
    with manage(ONE_ZONE) as manager:
        zone = manager.zones["mem0"]
        assert zone.service is not None
        assert zone.zone.hotplug is not None
        assert plug(manager, "mem0", 0, 4) is ResponseType.ACK
        addr = GuestAddress(4 * GIB + 2 * MIB - 3)
        manager.guest_memory.write(addr, b"across")
        zone.service.device.device_reset()
        manager.resize(64 * MIB)
        zone.service.request(Request(RequestType.UNPLUG, GuestAddress(4 * GIB + 4 * MIB), 2))
        assert manager.guest_memory.read(addr, 6) == b"across"
        assert zone.zone.hotplug.held() == 8192
        zone.service.request(Request(RequestType.UNPLUG, GuestAddress(4 * GIB), 2))
        assert zone.zone.hotplug.held() == 0
        assert manager.guest_memory.read(addr, 6) == bytes(6)


def test_resize_sets_the_total() -> None:
    with manage(ONE_ZONE) as manager:
        service = manager.zones["mem0"].service
        assert service is not None
        for total in (64 * MIB, GIB + 64 * MIB, 320 * MIB, 320 * MIB):
            manager.resize(total)
            assert service.device.requested_size == total - 64 * MIB


@pytest.mark.parametrize("total", [0, 64 * MIB - 1, 64 * MIB + 1, 65 * MIB, GIB + 66 * MIB, 2**64, -1])
def test_a_total_that_cannot_be_changes_nothing(total: int) -> None:
    with manage(ONE_ZONE) as manager:
        before = manager.info()
        with pytest.raises(UsageError):
            manager.resize(total)
        with pytest.raises(UsageError):
            manager.resize_zone("mem0", total)
        assert manager.info() == before


@pytest.mark.parametrize("total", [128.0 * MIB, "128M", None, True])
def test_a_total_that_is_no_int_changes_nothing(total: Any) -> None:
    with manage(ONE_ZONE) as manager, Control.from_manager(manager) as control:
        service = manager.zones["mem0"].service
        assert service is not None
        before = service.device.config.encode()
        for resize in (manager.resize, control.resize):
            with pytest.raises(UsageError, match="has to be an int"):
                resize(total)
        for resize_zone in (manager.resize_zone, control.resize_zone):
            with pytest.raises(UsageError, match="has to be an int"):
                resize_zone("mem0", total)
        assert service.device.config.encode() == before
        assert control.operations.all() == []
    with manage(TWO_ZONES) as manager, pytest.raises(UsageError, match="resize_zone"):
        manager.resize(total)


@pytest.mark.parametrize("line", [ONE_ZONE, "--memory size=64M"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 2.0 * MIB),
        ("block_size", "2M"),
        ("block_size", -2),
        ("usable_region", "whole-region"),
        ("usable_region", None),
        ("usable_region", 5),
    ],
)
def test_an_argument_of_another_kind_is_refused(line: str, field: str, value: object) -> None:
    with pytest.raises(UsageError, match="has to be") as caught:
        manage(line, **{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("config", [ONE_ZONE, ["--memory", "size=2M"], None])
def test_what_is_no_configuration_is_refused(config: Any) -> None:
    with pytest.raises(UsageError, match=r"^config=\w+: has to be a VmMemoryConfig; make one by VmMemoryConfig.parse$"):
        MemoryManager(config)


def test_a_total_between_two_blocks_is_refused_in_the_callers_terms() -> None:
    with manage(TWO_ZONES) as manager, pytest.raises(UsageError) as caught:
        manager.resize_zone("a", 67 * MIB)
    assert (caught.value.field, caught.value.value) == ("zone a size", 67 * MIB)
    assert f"{66 * MIB} and {68 * MIB}" in caught.value.remedy


@pytest.mark.needs_hugetlb
def test_a_ring_or_a_buffer_where_the_host_has_no_page_kills_nobody(
    hugepages: Callable[[int, int], HugePagePool],
) -> None:
    hugepages(2 * MIB, 0)
    line = "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=2M id=h,size=0,"
    with manage(line + "hugepages=on,hugepage_size=2M,hotplug_size=128M,hotplugged_size=16M") as manager:
        service, memory = manager.zones["h"].service, manager.guest_memory
        assert service is not None
        nowhere = service.device.geometry.addr
        for buffers, ring in ((nowhere, GuestAddress(0)), (GuestAddress(0x10000), nowhere)):
            layout = SplitLayout.place(8, ring)
            queue = GuestRequestQueue(service, SplitQueue(memory, **vars(layout)))
            if ring == nowhere:
                with pytest.raises(RingBroken):
                    queue.process()
                continue
            SplitDriver(memory, layout).add([(buffers, 24)], [(buffers + 64, 10)])
            queue.process()
            assert queue.queue.malformed == {"memory_gone": 1}
        assert service.device.plugged_size == 0


def test_user_zones_are_resized_one_by_one() -> None:
    with manage(TWO_ZONES) as manager:
        with pytest.raises(UsageError, match="resize_zone"):
            manager.resize(5 * GIB)
        manager.resize_zone("a", 128 * MIB)
        a, b = manager.zones["a"].service, manager.zones["b"].service
        assert a is not None
        assert b is not None
        assert (a.device.requested_size, b.device.requested_size) == (64 * MIB, 128 * MIB)
        with pytest.raises(UsageError, match="one of a, b"):
            manager.resize_zone("c", GIB)


@pytest.mark.parametrize("size", [0, 32 * MIB, 128 * MIB, 2 * GIB])
def test_resizing_by_acpi_says_that_it_is_not_there(size: int) -> None:
    with manage("--memory size=64M,hotplug_size=1G") as manager:
        assert manager.zones["mem0"].service is None
        manager.resize(64 * MIB)
        with pytest.raises(UsageError, match=r"ACPI is not there yet; .*needs hotplug_method=virtio-mem"):
            manager.resize(size)


def test_a_zone_without_a_hotplug_region_has_one_size() -> None:
    with manage("--memory size=64M") as manager:
        manager.resize(64 * MIB)
        with pytest.raises(UsageError, match=r"stays 67108864 bytes: the zone has no virtio-mem device"):
            manager.resize(66 * MIB)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("--memory size=64M,hotplug_method=virtio-mem,hotplug_size=1025M", "zone mem0 hotplug_size"),
        ("--memory size=64M,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=1M", "zone mem0 hotplugged_size"),
        ("--memory size=1000", "zone mem0 size"),
        ("--memory size=64M,hotplug_method=virtio-mem,hotplug_size=4096T", "zone mem0 hotplug_size"),
        ("--memory size=0 --memory-zone id=a,size=1M id=b,size=1M,file=/nowhere/at/all", "zone b file"),
        ("--memory size=0 --memory-zone id=a,size=1M id=b,size=1M,host_numa_node=77", "zone b host_numa_node"),
        ("--memory size=0 --memory-zone id=a,size=1M id=b,size=1M,hugepages=on,hugepage_size=2M", "zone b size"),
    ],
)
def test_all_or_nothing(line: str, field: str) -> None:
    """That nothing stays open or mapped is checked after every test."""
    with pytest.raises(FieldError) as caught:
        manage(line)
    assert caught.value.field == field


def test_a_bad_combination_of_options_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError):
        manage("--memory size=64M --memory-zone id=a,size=1G")


def test_block_size_and_policy_can_be_chosen() -> None:
    with manage(ONE_ZONE, block_size=16 * MIB, usable_region=UsableRegion.WHOLE_REGION) as manager:
        service = manager.zones["mem0"].service
        assert service is not None
        assert service.device.config.block_size == 16 * MIB
        assert service.device.config.usable_region_size == GIB
    for block_size in (1024, 3 * MIB):
        with pytest.raises(UsageError, match="block_size"):
            manage(ONE_ZONE, block_size=block_size)


def test_warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    line = "--memory size=0 --memory-zone id=a,size=1M --numa guest_numa_id=1,memory_zones=a"
    with caplog.at_level(logging.WARNING), manage(line) as manager:
        assert manager.info()["warnings"] == list(manager.config.warnings)
    assert "PCI bus" in caplog.text


@pytest.mark.needs_hugetlb
def test_huge_pages_that_run_out_are_busy_and_then_asked_for_again(
    hugepages: Callable[[int, int], HugePagePool],
) -> None:
    pool = hugepages(2 * MIB, 4)
    line = "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=2M id=h,size=0,"
    with manage(line + "hugepages=on,hugepage_size=2M,hotplug_size=1G,hotplugged_size=16M") as manager:
        zone = manager.zones["h"]
        assert zone.service is not None
        assert zone.zone.hotplug is not None
        device = zone.service.device
        assert zone.service.prefault
        assert plug(manager, "h", 0, 3) is ResponseType.ACK
        before = manager.info()["zones"]["h"]["held"]
        assert plug(manager, "h", 3, 2) is ResponseType.BUSY
        assert manager.info()["zones"]["h"]["held"] == before == {"boot": 0, "hotplug": 6 * MIB}
        assert device.requested_size == 16 * MIB, "the target stays pending"
        manager.poll(100.0)
        assert not device.take_config_notice(), "there are too few still"
        with pool.with_free(2):
            manager.poll(200.0)
            assert device.take_config_notice()
            assert plug(manager, "h", 3, 2) is ResponseType.ACK
            manager.system_reset()


def test_pause_and_resume() -> None:
    with manage(TWO_ZONES) as manager:
        manager.pause()
        assert manager.info()["zones"]["b"]["device"]["paused"]
        assert plug(manager, "b") is ResponseType.BUSY
        manager.resume()
        assert plug(manager, "b") is ResponseType.ACK


def test_a_system_reset_reaches_every_zone_though_one_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with manage(TWO_ZONES.replace("hotplug_size=512M", "hotplug_size=512M,hotplugged_size=128M")) as manager:
        for zone_id in ("a", "b"):
            assert plug(manager, zone_id) is ResponseType.ACK
        refusing, other = manager.zones["a"], manager.zones["b"]

        def discard(offset: HostOffset, size: ByteCount) -> None:
            raise HostError("discard", size, "refused by the test")

        monkeypatch.setattr(refusing.zone.hotplug, "discard", discard)
        assert not manager.system_reset()
        assert (refusing.size, other.size) == (66 * MIB, 4 * GIB)


def test_info_is_plain_data() -> None:
    with manage(TWO_ZONES) as manager:
        plug(manager, "b", 0, 2)
        info = json.loads(json.dumps(manager.info()))
        assert VmMemoryConfig.parse(info["options"]) == manager.config
        assert info["size"] == 4 * GIB + 68 * MIB
        assert info["zones"]["b"]["device"]["plugged_size"] == 4 * MIB
        assert info["zones"]["b"]["device"]["answers"] == {"PLUG ACK": 1}
        assert info["zones"]["b"]["guest_numa_id"] == 3
        assert info["zones"]["a"]["held"] == {"boot": 0, "hotplug": 0}
        settings = info["zones"]["a"]["settings"]
        assert settings["thp"]["requested"] is True


def test_shared_parts_are_what_another_process_can_map(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    with file.open("wb") as opened:
        opened.truncate(32 * MIB)
    line = (
        "--memory size=0,hotplug_method=virtio-mem --memory-zone id=private,size=1M id=shared,size=4G,shared=on "
        f"id=file,size=32M,shared=on,file={file},hotplug_size=64M"
    )
    with manage(line) as manager:
        parts = [(part.zone, part.addr, part.size, part.offset, part.hotplug) for part in manager.shared_parts()]
        low = 3 * GIB - MIB
        assert parts == [
            ("shared", MIB, low, 0, False),
            ("shared", 4 * GIB, 4 * GIB - low, low, False),
            ("file", 5 * GIB + MIB, 32 * MIB, 0, False),
            ("file", 5 * GIB + 128 * MIB, 64 * MIB, 0, True),
        ]
        manager.guest_memory.write(GuestAddress(parts[3][1]), b"hotplugged")
        fd = manager.shared_parts()[3].fd
        assert os.pread(fd, 10, 0) == b"hotplugged"
        assert not manager.zones["private"].zone.shared


@pytest.mark.parametrize("shared", ["on", "off"])
def test_the_unplug_all_that_drivers_begin_with_leaves_a_file_as_it_is(tmp_path: Path, shared: str) -> None:
    file = tmp_path / "memory"
    image = os.urandom(4 * MIB) * 2
    file.write_bytes(image)
    zone = f"id=z,size=2M,shared={shared},file={file},hotplug_size=128M,hotplugged_size=2M"
    with manage(f"--memory size=0,hotplug_method=virtio-mem --memory-zone {zone}") as manager:
        service = manager.zones["z"].service
        assert service is not None
        assert service.request(Request(RequestType.UNPLUG_ALL)).type is ResponseType.ACK
        assert plug(manager, "z") is ResponseType.ACK
        (view,) = manager.guest_memory.views(GuestAddress(service.device.geometry.addr), 2 * MIB)
        with view:
            assert not any(view)
        assert service.request(Request(RequestType.UNPLUG_ALL)).type is ResponseType.ACK
    assert file.read_bytes() == image


def test_two_shared_zones_cannot_have_one_file(tmp_path: Path) -> None:
    file, other = tmp_path / "memory", tmp_path / "link"
    with file.open("wb") as opened:
        opened.truncate(4 * MIB)
    other.hardlink_to(file)
    line = f"--memory size=0 --memory-zone id=a,size=2M,file={file},%s id=b,size=2M,file={other},shared=on"
    with pytest.raises(UsageError, match="zone a's file too"):
        manage(line % "shared=on")
    manage(line % "shared=off").close()
    line = (
        f"--memory size=0 --memory-zone id=a,size=2M,file={tmp_path},shared=on id=b,size=2M,file={tmp_path},shared=on"
    )
    manage(line).close()


def test_views_keep_memory_from_being_closed() -> None:
    manager = manage("--memory size=2M")
    (view,) = manager.guest_memory.views(GuestAddress(0), 10)
    with pytest.raises(BufferError):
        manager.close()
    boot = manager.zones["mem0"].zone.boot
    assert boot is not None
    assert not boot.mapping.closed
    view.release()
    manager.close()
    assert boot.mapping.closed
    manager.close()
    with pytest.raises(UsageError, match="closed"):
        boot.discard(HostOffset(0), ByteCount(2 * MIB))


@pytest.mark.parametrize("viewed", [False, True])
def test_what_is_closed_serves_nobody(viewed: bool, caplog: pytest.LogCaptureFixture) -> None:
    with manage(ONE_ZONE) as manager, Control.from_manager(manager) as control:
        assert plug(manager, "mem0") is ResponseType.ACK
        service = manager.zones["mem0"].service
        assert service is not None
        before = service.device.config
        if viewed:
            (view,) = manager.guest_memory.views(GuestAddress(4 * GIB), 10)
            with view, pytest.raises(BufferError):
                manager.close()
        else:
            manager.close()
        for resize in (manager.resize, control.resize, lambda size: manager.resize_zone("mem0", size)):
            with pytest.raises(UsageError, match="closed: has to be open"):
                resize(128 * MIB)
        assert plug(manager, "mem0", 1) is ResponseType.BUSY
        for type_ in (RequestType.UNPLUG, RequestType.UNPLUG_ALL):
            assert service.request(Request(type_, GuestAddress(4 * GIB), 1)).type is ResponseType.BUSY
        assert not manager.system_reset()
        assert service.device.config == before
        with pytest.raises(UsageError, match="closed"):
            manager.share(None)  # type: ignore[arg-type]
    warnings = [record for record in caplog.records if "memory=closed" in record.message]
    assert warnings
    assert not any(record.exc_info for record in warnings)


def test_no_memory_without_the_pages_it_reserves() -> None:
    with pytest.raises(HostError, match="free"):
        manage("--memory size=64T,hugepages=on,hugepage_size=2M,reserve=on")
