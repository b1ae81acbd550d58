"""Snapshots of served zones: saved while they are paused, restored by `virtio-mem serve --restore DIR`.

The memory is a front end's. It is saved from there; and since a service has none of it when it starts, restoring has
two halves. `prepare`, before any front end comes, reads the whole snapshot, digests and all, and makes the devices'
states from it: a snapshot that is wrong is refused then. `Content` waits in the worker until a front end shares the
zone's memory, and is written there once, before anything is served from a ring. A worker that dies on the way leaves it
to the next one, which begins again: nobody has used the memory meanwhile, as the devices are paused.

What the guest had besides (its CPUs, its other memory) is the VMM's to save and restore.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from vhost_user.errors import HostError, UsageError
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import HostOffset
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import UsableRegion
from virtio_mem.hostmem.backed import BackedMemory
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_file, state_memfd, state_path
from virtio_mem.serve.plan import ServedZone, ServePlan
from virtio_mem.serve.state import DeviceState, is_blank, make_blank, state_size
from virtio_mem.snapshot.content import populate, read_content
from virtio_mem.snapshot.manifest import PartState, ZoneState, part_path, refused
from virtio_mem.snapshot.own_file import require_file
from virtio_mem.snapshot.restore import located, opened, read_blocks, read_manifest, require_content
from virtio_mem.snapshot.save import SavedZone, plugged_ranges, save_zones

_SAME_ZONES = "give the same --zone options"


def save(devices: Sequence[MemDevice], options: str, directory: Path) -> None:
    """Save paused devices and what is plugged of their memory. Raises what `save_zones` does, and HostError where no
    front end shares the memory. One that goes meanwhile leaves it as it was, as what is saved."""
    with ExitStack() as stack:
        zones = []
        for device in devices:
            with device.service.lock:
                device.settle()
                memory = stack.enter_context(closing(device.memory.again()))
            zones.append(SavedZone(device.zone.id, None, memory, device.service, _path_of(memory)))
        save_zones(directory, zones, options, None, UsableRegion.REQUESTED_PLUS_SLACK)


def _path_of(memory: BackedMemory) -> Path:
    """Where the file of a front end's memory is, as far as this process can see."""
    return Path(f"/proc/self/fd/{memory.backing.fd}").readlink()


class Prepared(NamedTuple):
    """What a worker needs to go on from a snapshot: a zone's state, its content, and facts that `Content` takes.

    `content` is None where the file that the front end has its memory in has it already. `facts` are None where nothing
    is to be restored any more.
    """

    zone: ServedZone
    state: OwnedFd
    content: OwnedFd | None
    facts: bytes | None


def prepare(directory: Path, plan: ServePlan) -> list[Prepared]:
    """Check a snapshot, and make the states of the plan's zones from it; the descriptors are the caller's.

    A state directory that has states of them already is none to restore to: UsageError, as for what is no snapshot of
    these zones, and then no state was made or changed. Not so where restoring this snapshot was not brought to its end
    before: whatever of it was, or was changed since, stays, and the rest is restored.
    """
    manifest = read_manifest(directory)
    states = {zone.id: zone for zone in manifest.zones}
    if list(states) != [zone.id for zone in plan.zones]:
        wanted = ", ".join(zone.id for zone in plan.zones)
        raise refused("zones", ", ".join(states), f"has to be those of --zone: {wanted}", _SAME_ZONES)
    with ExitStack() as undo:
        checked = []
        for zone in plan.zones:
            with located(f"zone {zone.id}"):
                device, content, facts = _checked(zone, states[zone.id], directory, undo)
                checked.append((*_state_file(zone, device, plan, undo), zone, device, content, facts))
        used = [zone.id for _, found, zone, *_ in checked if found is _Found.USED]
        if used and not any(found is _Found.UNRESTORED for _, found, *_ in checked):
            limit = f"has a state of the zone {used[0]}"
            raise UsageError("--state-dir", plan.state_dir, limit, "remove it, to restore")
        prepared = []
        for file, found, zone, device, content, facts in checked:
            if found is _Found.BLANK:
                undo.callback(make_blank, file.fileno())
                _open_state(file, zone, device).close()
            prepared.append(Prepared(zone, file, content, None if found is _Found.USED else facts))
        undo.pop_all()
    for each in prepared:
        if each.facts is None and each.content is not None:
            each.content.close()
    return prepared


def _checked(
    zone: ServedZone, saved: ZoneState, directory: Path, undo: ExitStack
) -> tuple[VirtioMemDevice, OwnedFd | None, bytes]:
    """The device that was saved, its content as `Prepared` has it, and the facts."""
    if saved.device is None or saved.hotplug is None or saved.boot is not None:
        raise refused("device", "missing" if saved.device is None else "with boot memory", "must be a served zone's")
    if saved.hotplug.size != zone.hotplug_size:
        limit = f"has to be {zone.hotplug_size}, as --zone says"
        raise refused("size", saved.hotplug.size, limit, _SAME_ZONES)
    blocks = read_blocks(zone.geometry, saved.device, part_path(directory, zone.id, "blocks"))
    device = VirtioMemDevice(zone.geometry)
    device.adopt(saved.device.requested_size, saved.device.usable_region_size, blocks)
    content = _checked_content(saved.hotplug, device, part_path(directory, zone.id, "hotplug"))
    if content is not None:
        undo.enter_context(content)
    return device, content, json.dumps(asdict(saved.hotplug)).encode()


def _checked_content(part: PartState, device: VirtioMemDevice, path: Path) -> OwnedFd | None:
    if part.digest is None:
        return None
    with opened(path, part.size) as fd:
        require_content(part, read_content(fd, plugged_ranges(device), None), path)
        return OwnedFd.duplicate_of(fd)


class _Found(Enum):
    """What there was of a zone's state before: nothing; what this snapshot makes of it, and its content has yet to be
    restored; or anything else."""

    BLANK = 0
    UNRESTORED = 1
    USED = 2


def _state_file(zone: ServedZone, device: VirtioMemDevice, plan: ServePlan, undo: ExitStack) -> tuple[OwnedFd, _Found]:
    """The file of a zone's state, as it is. One that is made here is removed by `undo`."""
    size = state_size(zone.geometry)
    if plan.state_dir is None:
        return undo.enter_context(state_memfd(zone.id, size)), _Found.BLANK
    path = state_path(plan.state_dir, zone.id)
    is_new = not os.path.lexists(path)
    file = undo.enter_context(state_file(plan.state_dir, zone.id, size))
    if is_new:
        undo.callback(path.unlink)
    if os.fstat(file.fileno()).st_size == size and is_blank(file.fileno()):
        return file, _Found.BLANK
    with closing(_open_state(file, zone)) as state:
        waits = state.unrestored and state.device.blocks.to_bytes() == device.blocks.to_bytes()
    return file, _Found.UNRESTORED if waits else _Found.USED


def _open_state(file: OwnedFd, zone: ServedZone, saved: VirtioMemDevice | None = None) -> DeviceState:
    return DeviceState(file.fileno(), zone.geometry, requested_size=zone.hotplugged_size, saved=saved)


class Content:
    """What is to be written to a zone's memory once that is there: `fd` as it was saved, None where it is the memory.

    `facts` are those of `Prepared`.
    """

    def __init__(self, fd: int | None, facts: bytes) -> None:
        self._fd = fd
        self._saved = PartState(**json.loads(facts))

    def write(self, device: VirtioMemDevice, memory: BackedMemory, *, prefault: bool) -> None:
        """Write it. HostError where the host lacks the memory for it, and where the memory is another file's."""
        if self._fd is None:
            try:
                self._require_file(memory)
            except UsageError as error:
                raise HostError(error.field, error.value, error.limit, "have the VMM use that file") from error
            return
        for wanted in plugged_ranges(device) if prefault else ():
            populate(memory, wanted)
        if read_content(self._fd, plugged_ranges(device), memory) != self._saved.digest:
            raise HostError("content", "other bytes", "is as it was when the service began", "start the service anew")

    def give_back(self, memory: BackedMemory) -> None:
        """Nothing of it is plugged any more: where the memory has it, it goes back to the host, or HostError."""
        if self._fd is None:
            with suppress(UsageError):  # it is another file, and another one's
                self._require_file(memory)
                memory.discard(HostOffset(0), memory.size)

    def _require_file(self, memory: BackedMemory) -> None:
        require_file(self._saved, _path_of(memory), memory, renamed=True)
