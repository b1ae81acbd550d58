"""Writes a snapshot of a paused machine."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vhost_user.errors import HostError, UsageError
from virtio_mem.device import VirtioMemDevice
from virtio_mem.hostmem.backing import SharedFile
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.managed_zone import ManagedZone
from virtio_mem.manager import MemoryManager
from virtio_mem.snapshot.content import Range, write_content
from virtio_mem.snapshot.manifest import FILE_NAME, DeviceState, Manifest, PartState, ZoneState
from virtio_mem.zone import Zone


def save(manager: MemoryManager, directory: Path) -> None:
    """Write the machine's memory and devices to `directory`, which is made, for its owner only.

    The guest must not run, and the devices must be paused. Raises UsageError for devices that are not, and for a
    directory that exists; HostError where the host has no room. Then the directory is taken away again.
    """
    for zone in manager.zones.values():
        if zone.service is not None and not zone.service.device.paused:
            raise UsageError(f"zone {zone.id}", "running", "paused while it is saved", "call pause() first")
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError as error:
        raise UsageError("directory", directory, "is there already", "name one that is not") from error
    except OSError as error:
        raise HostError.from_os_error("directory", directory, "mkdir", error) from error
    try:
        zones = tuple(_save_zone(zone, directory) for zone in manager.zones.values())
        manifest = Manifest(str(manager.config), manager.block_size, manager.usable_region.value, zones)
        with _written(directory / FILE_NAME) as fd:
            _write_all(fd, manifest.encode())
    except OSError as error:
        shutil.rmtree(directory)
        raise HostError.from_os_error("directory", directory, "write", error, "make room there") from error
    except BaseException:
        shutil.rmtree(directory)
        raise


def _save_zone(zone: ManagedZone, directory: Path) -> ZoneState:
    boot = None
    if zone.zone.boot is not None:
        everything = [Range(0, zone.zone.boot.size)]
        boot = _save_part(zone.zone, zone.zone.boot, everything, directory / f"{zone.id}.boot")
    if zone.service is None or zone.zone.hotplug is None:
        return ZoneState(zone.id, boot, None, None)
    with zone.service.lock:
        device = zone.service.device
        state = _save_device(device, directory / f"{zone.id}.blocks")
        hotplug = _save_part(zone.zone, zone.zone.hotplug, plugged_ranges(device), directory / f"{zone.id}.hotplug")
    return ZoneState(zone.id, boot, hotplug, state)


def plugged_ranges(device: VirtioMemDevice) -> Iterator[Range]:
    """Where plugged blocks lie in the region, in ascending order."""
    size = device.geometry.block_size
    return (Range(run.first * size, run.nb_blocks * size) for run in device.blocks.plugged_runs())


def is_referenced(zone: Zone, memory: HostMemory) -> bool:
    """Whether the content is the user's own file, which stays: a regular one, and shared."""
    return isinstance(memory.backing, SharedFile) and zone.spec.file is not None and zone.spec.file.is_file()


def _save_part(zone: Zone, memory: HostMemory, ranges: Iterable[Range], path: Path) -> PartState:
    if is_referenced(zone, memory):
        file = os.fstat(memory.backing.fd)
        assert zone.spec.file is not None
        os.fsync(memory.backing.fd)
        return PartState(memory.size, None, str(zone.spec.file), file.st_ino, file.st_size)
    with _written(path) as fd:
        os.ftruncate(fd, memory.size)
        digest = write_content(memory, ranges, fd)
    return PartState(memory.size, digest, None, None, None)


def _save_device(device: VirtioMemDevice, path: Path) -> DeviceState:
    geometry = device.geometry
    data = device.blocks.to_bytes()
    with _written(path) as fd:
        _write_all(fd, data)
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


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def _written(path: Path) -> Iterator[int]:
    """A new file, on disk when the block ends."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)
