"""A core dump of a machine whose memory is ours and whose CPUs are QEMU's.

Memory is read from the files that it is in, which the supervisor keeps. What QEMU knows of the guest comes from QEMU's
own dump, of one page, whose notes are taken: each CPU's registers, and of a Linux guest that told QEMU where it is (by
its driver qemu_fw_cfg and the device vmcoreinfo) VMCOREINFO, by which debuggers find their way. That dump is written to
a file that has no name, so nothing of it stays, whatever dies. Without these notes there is no core dump: who asks for
one is told why.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhost_user.errors import HostError
from vhost_user.mapping import PAGE_SIZE, page_size_of
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from virtio_mem.boot.qmp import Qmp
from virtio_mem.coredump import HEADER, IDENT, MACHINE, PROGRAM_HEADER, PT_NOTE, boot_part, write_core
from virtio_mem.serve.memory import backing_of
from virtio_mem.serve.others_memory import OthersMemory

if TYPE_CHECKING:
    from virtio_mem.serve.device import MemDevice

FILE = "memory"
"""The name under which the supervisor keeps a file, with its number behind it."""

MOST_NOTES = 16 << 20
"""Bytes of them: 4096 CPUs have less than 4 MiB."""

_MOST_HEADERS = 16

_FD_NAME = "notes"
"""QEMU's name for the file, whose descriptor it is passed. By a path in /proc a QEMU that is late would open, and
truncate, what has the descriptor's number by then; one in a chroot, or of another user, could not open it at all."""


def dump_machine(
    path: Path, monitor: Qmp, places: Mapping[str, Any], files: Mapping[str, OwnedFd], devices: Sequence[MemDevice]
) -> None:
    """Write what the guest has to `path`; its CPUs and devices are paused. `places` are where its memory is in which of
    `files`, as `machine.py` puts it. Raises what `write_core` does, and HostError where QEMU tells nothing."""
    notes = guest_notes(monitor)
    with ExitStack() as stack:
        boot = [
            boot_part(stack.enter_context(closing(_memory(place, files))), place["addr"], 0, place["size"])
            for place in places["boot"]
        ]
        hotplug = []
        for device in devices:
            with device.service.lock:
                device.settle()
            memory = stack.enter_context(closing(_memory(places["hotplug"][device.zone.id], files)))
            hotplug.append((device.zone.id, memory, device.service))
        write_core(path, boot, hotplug, notes)


def _memory(place: Mapping[str, Any], files: Mapping[str, OwnedFd]) -> OthersMemory:
    with OwnedFd.duplicate_of(files[f"{FILE}{place['file']}"].fileno()) as file:
        backing = backing_of(file.fileno(), HostOffset(place["offset"]), page_size_of(file.fileno()))
        file.take()
    return OthersMemory(backing, ByteCount(place["size"]), GuestAddress(place["addr"]))


def guest_notes(monitor: Qmp) -> bytes:
    """The notes that QEMU makes of the guest. HostError where it makes none for a 64-bit core."""
    with OwnedFd(os.memfd_create("notes", os.MFD_CLOEXEC)) as file:
        monitor.execute("getfd", {"fdname": _FD_NAME}, fds=[file.fileno()])
        arguments = {"paging": False, "protocol": f"fd:{_FD_NAME}", "begin": 0, "length": PAGE_SIZE}
        monitor.execute("dump-guest-memory", arguments)
        return _notes(file.fileno())


def _notes(fd: int) -> bytes:
    ident, _, machine, _, _, at, _, _, _, size, nb_headers, *_ = HEADER.unpack(_read(fd, HEADER.size, 0))
    if not ident.startswith(IDENT[:5]) or machine != MACHINE:
        raise _refused(f"{ident[:5].hex()} for machine {machine}", "is no 64-bit core: the guest is not in 64-bit mode")
    notes = b""
    for number in range(min(nb_headers, _MOST_HEADERS)):
        type_, _, offset, _, _, length, *_ = PROGRAM_HEADER.unpack(_read(fd, PROGRAM_HEADER.size, at + number * size))
        if type_ == PT_NOTE:
            notes += _read(fd, length, offset)
    if not notes:
        raise _refused("no notes", "must have the CPUs' registers")
    return notes


def _read(fd: int, size: int, offset: int) -> bytes:
    """So much of what QEMU wrote. HostError where it has not that, or more than it can have."""
    data = os.pread(fd, size, offset) if size <= MOST_NOTES and offset <= MOST_NOTES else b""
    if len(data) < size:
        raise _refused(f"{offset:#x}+{size:#x}", "is not in it")
    return data


def _refused(value: str, limit: str) -> HostError:
    return HostError("qemu", f"dump-guest-memory: {value}", limit, "dump it later, or by QEMU's own monitor")
