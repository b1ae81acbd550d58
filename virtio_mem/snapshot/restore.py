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
from virtio_mem.geometry import Geometry, UsableRegion
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.managed_zone import ManagedZone
from virtio_mem.manager import MemoryManager
from virtio_mem.snapshot.content import Range, populate, read_content
from virtio_mem.snapshot.manifest import (
    FILE_NAME,
    MOST_BYTES,
    DeviceState,
    Manifest,
    PartState,
    ZoneState,
    part_path,
    refused,
    snapshot_path,
)
from virtio_mem.snapshot.own_file import own_file, require_file
from virtio_mem.snapshot.save import plugged_ranges


def restore(directory: str | Path) -> MemoryManager:
    """A machine as it was when it was saved to `directory`, with memory of its own, every device paused.

    What a transport had beside its device is not in it, as the vCPUs are not: see `MmioTransport.state`.

    Raises UsageError for what is no snapshot, and where a file that it refers to is not the one that it was;
    ConfigError and HostError as MemoryManager does, and HostError where the host lacks the memory. Then nothing is left
    open.
    """
    directory = snapshot_path(directory)
    manifest = read_manifest(directory)
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
            with located(f"zone {state.id}"):
                _restore_zone(manager.zones[state.id], state, directory)
        undo.pop_all()
    return manager


def read_manifest(directory: Path) -> Manifest:
    """What a snapshot says of itself. UsageError where it says nothing that can be."""
    return Manifest.decode(_read(directory / FILE_NAME, MOST_BYTES))


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put `where` in front of the field of what is refused in the block."""
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
        _restore_part(zone, zone.zone.boot, state.boot, everything, part_path(directory, zone.id, "boot"))
    if state.device and service:
        _restore_device(service.device, state.device, part_path(directory, zone.id, "blocks"))
    if state.hotplug and service and zone.zone.hotplug:
        ranges = list(plugged_ranges(service.device))
        if service.prefault:
            for wanted in ranges:
                populate(zone.zone.hotplug, wanted)
        _restore_part(zone, zone.zone.hotplug, state.hotplug, ranges, part_path(directory, zone.id, "hotplug"))


def _restore_part(zone: ManagedZone, memory: HostMemory, state: PartState, ranges: Iterable[Range], path: Path) -> None:
    if state.size != memory.size:
        raise refused("size", state.size, f"must be {memory.size}, as the options say")
    if (file := own_file(zone.zone.spec.file, memory)) is not None:
        require_file(state, file, memory)
        return
    if state.digest is None and state.path is not None:
        limit = "is not what the options make this part of; a version before had the hotplug region in it, too"
        raise refused("file", state.path, limit, "restore it with the version that made it")
    with opened(path, memory.size) as fd:
        require_content(state, read_content(fd, ranges, memory), path)


def require_content(state: PartState, digest: str, path: Path) -> None:
    """UsageError unless the content that was read is that which was saved."""
    if digest != state.digest:
        raise refused("content", path.name, "must have the digest that was taken when it was saved")


def read_blocks(geometry: Geometry, state: DeviceState, path: Path) -> BlockMap:
    """Which blocks were plugged. UsageError where the state is another device's, or the map is not what it was."""
    for name in ("addr", "region_size", "block_size", "node_id"):
        saved, made = getattr(state, name), getattr(geometry, name)
        if saved != made:
            raise refused(
                name, saved, f"has to be {made}, as the options say", "give the options that it was taken with"
            )
    size = -(-geometry.nb_blocks // 8)
    data = _read(path, size, size)
    if hashlib.blake2b(data, digest_size=32).hexdigest() != state.blocks:
        raise refused("blocks", path.name, "must have the digest that was taken when it was saved")
    if data and data[-1] >> (geometry.nb_blocks % 8 or 8):
        raise refused("blocks", path.name, f"must have no bit beyond the region's {geometry.nb_blocks} blocks")
    blocks = BlockMap(geometry.nb_blocks, memoryview(bytearray(data)))
    if blocks.plugged * geometry.block_size != state.plugged_size:
        raise refused("plugged_size", state.plugged_size, f"must be that of the {blocks.plugged} plugged blocks")
    return blocks


def _restore_device(device: VirtioMemDevice, state: DeviceState, path: Path) -> None:
    blocks = read_blocks(device.geometry, state, path)
    device.adopt(state.requested_size, state.usable_region_size, blocks)


def _read(path: Path, most: int, least: int = 0) -> bytes:
    """All of it. What others do to the file meanwhile is not believed: so much was read that it can be."""
    with opened(path) as fd, open(fd, "rb", closefd=False) as file:
        data = file.read(most + 1)
    if not least <= len(data) <= most:
        found = f"more than {most} bytes" if len(data) > most else f"{len(data)} bytes"
        raise refused(path.name, found, f"must have {most}" if least == most else f"must have at most {most}")
    return data


@contextmanager
def opened(path: Path, size: int | None = None) -> Iterator[int]:
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
