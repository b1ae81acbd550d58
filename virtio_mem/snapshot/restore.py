"""Makes a machine from a snapshot."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vhost_user.errors import FieldError, HostError, UsageError
from virtio_mem.blocks import BlockMap
from virtio_mem.config import VmMemoryConfig
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import UsableRegion
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.managed_zone import ManagedZone
from virtio_mem.manager import MemoryManager
from virtio_mem.snapshot.content import Range, populate, read_content
from virtio_mem.snapshot.manifest import FILE_NAME, MOST_BYTES, DeviceState, Manifest, PartState, ZoneState, refused
from virtio_mem.snapshot.save import is_referenced, plugged_ranges


def restore(directory: Path) -> MemoryManager:
    """A machine as it was when it was saved to `directory`, with memory of its own, every device paused.

    Raises UsageError for what is no snapshot, and where a file that it refers to is not the one that it was;
    ConfigError and HostError as MemoryManager does, and HostError where the host lacks the memory. Then nothing is left
    open.
    """
    manifest = Manifest.decode(_read(directory / FILE_NAME, MOST_BYTES))
    if manifest.usable_region not in {policy.value for policy in UsableRegion}:
        raise refused("usable_region", manifest.usable_region, "must be a policy of this version")
    with ExitStack() as undo:
        manager = undo.enter_context(
            MemoryManager(
                VmMemoryConfig.parse(manifest.options),
                block_size=manifest.block_size,
                usable_region=UsableRegion(manifest.usable_region),
            )
        )
        if [zone.id for zone in manifest.zones] != list(manager.zones):
            found = ", ".join(zone.id for zone in manifest.zones)
            raise refused("zones", found, f"must be those of the options: {', '.join(manager.zones)}")
        manager.pause()
        for state in manifest.zones:
            with _located(f"zone {state.id}"):
                _restore_zone(manager.zones[state.id], state, directory)
        undo.pop_all()
    return manager


@contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except FieldError as error:
        error.locate(where)
        raise


def _restore_zone(zone: ManagedZone, state: ZoneState, directory: Path) -> None:
    service = zone.service
    memories = {
        "boot": (state.boot, zone.zone.boot),
        "hotplug": (state.hotplug, zone.zone.hotplug if service else None),
        "device": (state.device, service),
    }
    for name, (saved, made) in memories.items():
        if (saved is None) != (made is None):
            raise refused(name, "there" if saved else "missing", "must be what the options make")
    if state.boot and zone.zone.boot:
        everything = [Range(0, zone.zone.boot.size)]
        _restore_part(zone, zone.zone.boot, state.boot, everything, directory / f"{zone.id}.boot")
    if state.device and service:
        _restore_device(service.device, state.device, directory / f"{zone.id}.blocks")
    if state.hotplug and service and zone.zone.hotplug:
        ranges = list(plugged_ranges(service.device))
        if service.prefault:
            for wanted in ranges:
                populate(zone.zone.hotplug, wanted)
        _restore_part(zone, zone.zone.hotplug, state.hotplug, ranges, directory / f"{zone.id}.hotplug")


def _restore_part(zone: ManagedZone, memory: HostMemory, state: PartState, ranges: Iterable[Range], path: Path) -> None:
    if state.size != memory.size:
        raise refused("size", state.size, f"must be {memory.size}, as the options say")
    if is_referenced(zone.zone, memory):
        file = os.fstat(memory.backing.fd)
        if (state.path, state.inode, state.file_size) != (str(zone.zone.spec.file), file.st_ino, file.st_size):
            was = f"inode {state.inode} of {state.file_size} bytes at {state.path}"
            limit = f"is inode {file.st_ino} of {file.st_size} bytes now"
            raise UsageError("file", was, limit, "put the file back that was there when the snapshot was taken")
        return
    with _opened(path, memory.size) as fd:
        digest = read_content(fd, ranges, memory)
    if digest != state.digest:
        raise refused("content", path.name, "must have the digest that was taken when it was saved")


def _restore_device(device: VirtioMemDevice, state: DeviceState, path: Path) -> None:
    geometry = device.geometry
    for name in ("addr", "region_size", "block_size", "node_id"):
        saved, made = getattr(state, name), getattr(geometry, name)
        if saved != made:
            raise refused(name, saved, f"must be {made}, as the options say")
    size = -(-geometry.nb_blocks // 8)
    with _opened(path, size):
        data = _read(path, size)
    if hashlib.blake2b(data, digest_size=32).hexdigest() != state.blocks:
        raise refused("blocks", path.name, "must have the digest that was taken when it was saved")
    if data and data[-1] >> (geometry.nb_blocks % 8 or 8):
        raise refused("blocks", path.name, f"must have no bit beyond the region's {geometry.nb_blocks} blocks")
    blocks = BlockMap(geometry.nb_blocks, memoryview(bytearray(data)))
    device.adopt(state.requested_size, state.usable_region_size, blocks)
    if device.plugged_size != state.plugged_size:
        raise refused("plugged_size", state.plugged_size, f"must be {device.plugged_size}, as the blocks say")


def _read(path: Path, most: int) -> bytes:
    with _opened(path) as fd, open(fd, "rb", closefd=False) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise refused(path.name, f"more than {most} bytes", f"must have at most {most}")
    return data


@contextmanager
def _opened(path: Path, size: int | None = None) -> Iterator[int]:
    """A regular file, and no link to one, of `size` bytes if that is given."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(path.name, path, os.strerror(error.errno or 0), "name the directory of a snapshot") from error
    try:
        file = os.fstat(fd)
        if not stat.S_ISREG(file.st_mode):
            raise refused(path.name, path, "must be a regular file")
        if size is not None and file.st_size != size:
            raise refused(path.name, f"{file.st_size} bytes", f"must have {size}")
        yield fd
    except OSError as error:
        raise HostError.from_os_error(path.name, path, "read", error) from error
    finally:
        os.close(fd)
