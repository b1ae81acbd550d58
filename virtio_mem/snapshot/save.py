"""Writes a snapshot of a paused machine."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vhost_user.errors import HostError, UsageError
from virtio_mem.blocks import BlockMap
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import UsableRegion
from virtio_mem.hostmem.backed import BackedMemory
from virtio_mem.hostmem.files import write_at
from virtio_mem.managed_zone import ManagedZone
from virtio_mem.manager import MemoryManager
from virtio_mem.service import DeviceService
from virtio_mem.snapshot.content import Range, require_length, write_content
from virtio_mem.snapshot.manifest import (
    FILE_NAME,
    DeviceState,
    Manifest,
    PartState,
    ZoneState,
    part_path,
    snapshot_path,
)
from virtio_mem.snapshot.own_file import named, own_file


class SavedZone(NamedTuple):
    """What is saved of a zone. `file` is what its memory may be in, or None: a part that is in a regular file is not
    copied.

    `service` and `hotplug` are None where the zone can't be resized.
    """

    id: str
    boot: BackedMemory | None
    hotplug: BackedMemory | None
    service: DeviceService | None
    file: Path | None


def save(manager: MemoryManager, directory: str | Path) -> None:
    """Write the machine's memory and devices to `directory`, which is made, for its owner only.

    The guest must not run, and the devices must be paused. Raises UsageError for devices that are not, and for a
    directory that exists or can't be; HostError where the host has no room. Then the directory is taken away again.
    """
    directory = snapshot_path(directory)
    zones = [_saved(zone) for zone in manager.zones.values()]
    save_zones(directory, zones, str(manager.config), manager.block_size, manager.usable_region)


def _saved(zone: ManagedZone) -> SavedZone:
    hotplug = zone.zone.hotplug if zone.service is not None else None
    return SavedZone(zone.id, zone.zone.boot, hotplug, zone.service, zone.zone.spec.file)


def save_zones(
    directory: Path, zones: Sequence[SavedZone], options: str, block_size: int | None, usable_region: UsableRegion
) -> None:
    """As `save`, for zones of whoever has them; `options` and the rest is what they are made from again."""
    for zone in zones:
        require_paused(zone.id, zone.service)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError as error:
        raise UsageError("directory", directory, "is there already", "name one that is not") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        limit = "has to be in a directory that there is"
        raise UsageError("directory", directory, limit, "make that one first") from error
    except OSError as error:
        raise HostError.from_os_error("directory", directory, "mkdir", error) from error
    try:
        states = tuple(_save_zone(zone, directory) for zone in zones)
        with _written(directory / FILE_NAME) as fd:
            write_at(fd, Manifest(options, block_size, usable_region.value, states).encode(), 0)
        for names in (directory, directory.parent):
            sync_names(names)
    except OSError as error:
        shutil.rmtree(directory)
        raise HostError.from_os_error("directory", directory, "write", error, "make room there") from error
    except BaseException:
        shutil.rmtree(directory)
        raise


def require_paused(zone_id: str, service: DeviceService | None) -> None:
    """UsageError where the zone has a device that is not."""
    if service is not None and not service.device.paused:
        raise UsageError(f"zone {zone_id}", "running", "paused while it is saved", "pause it first")


def _save_zone(zone: SavedZone, directory: Path) -> ZoneState:
    boot = hotplug = device = None
    if zone.boot is not None:
        everything = [Range(0, zone.boot.size)]
        boot = _save_part(zone, zone.boot, everything, part_path(directory, zone.id, "boot"))
    if zone.service is not None and zone.hotplug is not None:
        with zone.service.lock:
            blocks = zone.service.device.blocks.copy()
            device = _save_device(zone.service.device, part_path(directory, zone.id, "blocks"))
        # The content takes seconds a gibibyte, in which others may ask the device. Paused, it changes no block.
        ranges = block_ranges(blocks, device.block_size)
        hotplug = _save_part(zone, zone.hotplug, ranges, part_path(directory, zone.id, "hotplug"))
        require_unchanged(zone.service, blocks)
    return ZoneState(zone.id, boot, hotplug, device)


def require_unchanged(service: DeviceService, blocks: BlockMap) -> None:
    """UsageError where the device is not paused any more, or has other blocks than these."""
    with service.lock:
        if not service.device.paused or service.device.blocks.to_bytes() != blocks.to_bytes():
            raise UsageError("device", "resumed", "stays paused until it is saved", "pause it, and save it anew")


def plugged_ranges(device: VirtioMemDevice) -> Iterator[Range]:
    """Where plugged blocks lie in the region, in ascending order."""
    return block_ranges(device.blocks, device.geometry.block_size)


def block_ranges(blocks: BlockMap, size: int) -> Iterator[Range]:
    """Where plugged blocks of `size` bytes lie, in ascending order."""
    for runs in blocks.plugged_runs().arrays():
        for first, nb_blocks in runs:
            yield Range(first * size, nb_blocks * size)


def _save_part(zone: SavedZone, memory: BackedMemory, ranges: Iterable[Range], path: Path) -> PartState:
    if (file := own_file(zone.file, memory)) is not None:
        os.fsync(memory.backing.fd)
        state = named(file, memory)
        assert state.file_size is not None
        require_length(memory, state.file_size)
        return state
    with _written(path) as fd:
        os.ftruncate(fd, memory.size)
        digest = write_content(memory, ranges, fd)
    return PartState(memory.size, digest, None, None, None, None, None, None)


def _save_device(device: VirtioMemDevice, path: Path) -> DeviceState:
    geometry = device.geometry
    data = device.blocks.to_bytes()
    with _written(path) as fd:
        write_at(fd, data, 0)
    return DeviceState(
        addr=geometry.addr,
        region_size=geometry.region_size,
        block_size=geometry.block_size,
        node_id=geometry.node_id,
        requested_size=device.requested_size,
        usable_region_size=device.usable_region_size,
        plugged_size=device.plugged_size,
        blocks=hashlib.blake2b(data, digest_size=32).hexdigest(),
    )


def sync_names(directory: Path) -> None:
    """Have the names in it on disk as well. Who may not read it may not have that done; not every file system can."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


@contextmanager
def _written(path: Path) -> Iterator[int]:
    """A new file, on disk when the block ends."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)
