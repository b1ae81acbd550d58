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
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from vhost_user.errors import HostError, UsageError
from vhost_user.owned_fd import OwnedFd
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import UsableRegion
from virtio_mem.hostmem.backed import BackedMemory
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_file, state_memfd, state_path
from virtio_mem.serve.plan import ServedZone, ServePlan
from virtio_mem.serve.state import DeviceState, make_blank, state_size
from virtio_mem.snapshot.content import populate, read_content
from virtio_mem.snapshot.manifest import PartState, ZoneState, part_path, refused
from virtio_mem.snapshot.own_file import require_file
from virtio_mem.snapshot.restore import located, opened, read_blocks, read_manifest, require_content
from virtio_mem.snapshot.save import SavedZone, plugged_ranges, save_zones


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

    `content` is None where the file that the front end has its memory in has it already.
    """

    zone: ServedZone
    state: OwnedFd
    content: OwnedFd | None
    facts: bytes


def prepare(directory: Path, plan: ServePlan) -> list[Prepared]:
    """Check a snapshot, and make the states of the plan's zones from it; the descriptors are the caller's.

    Raises UsageError for what is no snapshot of these zones, and where a state directory has states of them already,
    unless those were made from a snapshot whose content never came to be restored. Then no state was made.
    """
    manifest = read_manifest(directory)
    states = {zone.id: zone for zone in manifest.zones}
    if list(states) != [zone.id for zone in plan.zones]:
        wanted = ", ".join(zone.id for zone in plan.zones)
        raise refused("zones", ", ".join(states), f"must be those of --zone: {wanted}", "give the same --zone options")
    with ExitStack() as undo:
        checked, prepared = [], []
        for zone in plan.zones:
            with located(f"zone {zone.id}"):
                checked.append(_checked(zone, states[zone.id], directory, undo))
        for zone, (device, content, facts) in zip(plan.zones, checked, strict=True):
            with located(f"zone {zone.id}"):
                prepared.append(Prepared(zone, _write_state(zone, device, plan, undo), content, facts))
        undo.pop_all()
    return prepared


def _checked(
    zone: ServedZone, saved: ZoneState, directory: Path, undo: ExitStack
) -> tuple[VirtioMemDevice, OwnedFd | None, bytes]:
    """The device that was saved, its content as `Prepared` has it, and the facts."""
    if saved.device is None or saved.hotplug is None or saved.boot is not None:
        raise refused("device", "missing" if saved.device is None else "with boot memory", "must be a served zone's")
    if saved.hotplug.size != zone.hotplug_size:
        raise refused("size", saved.hotplug.size, f"must be {zone.hotplug_size}, as --zone says")
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


def _write_state(zone: ServedZone, device: VirtioMemDevice, plan: ServePlan, undo: ExitStack) -> OwnedFd:
    """The state of a paused device that is where `device` is."""
    size = state_size(zone.geometry)
    where = undo.enter_context(
        state_memfd(zone.id, size) if plan.state_dir is None else state_file(plan.state_dir, zone.id, size)
    )
    with closing(_open_state(where, zone)) as state:
        if not (state.blank or state.unrestored):
            raise UsageError("--state-dir", plan.state_dir, "has a state of the zone", "remove it, to restore")
    if plan.state_dir is not None:
        undo.callback(state_path(plan.state_dir, zone.id).unlink)
    make_blank(where.fileno())
    with closing(_open_state(where, zone)) as state:
        state.take_over(device)
    return where


def _open_state(where: OwnedFd, zone: ServedZone) -> DeviceState:
    return DeviceState(where.fileno(), zone.geometry, requested_size=zone.hotplugged_size)


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
                require_file(self._saved, _path_of(memory), memory, renamed=True)
            except UsageError as error:
                raise HostError(error.field, error.value, error.limit, "have the VMM use that file") from error
            return
        for wanted in plugged_ranges(device) if prefault else ():
            populate(memory, wanted)
        if read_content(self._fd, plugged_ranges(device), memory) != self._saved.digest:
            raise HostError("content", "other bytes", "is as it was when the service began", "start the service anew")
