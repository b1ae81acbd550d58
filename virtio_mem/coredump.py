"""A core dump: the memory that a machine's guest has, as an ELF core file, without what is unplugged.

    manager.pause()
    core_dump(manager, "/tmp/core")                # the file is made, and must not exist

The file has a PT_NOTE, with the notes that the caller adds, and a PT_LOAD for each piece of boot memory and each run
of plugged blocks: p_paddr is where the guest has it, p_vaddr is 0, and p_memsz is p_filesz. Neighbours are not merged:
from 65,535 program headers on their number is in section header 0, and e_phnum is PN_XNUM, elf(5).

Content is sparse: pages that are zero are holes, whether the host had memory for them or not, and unplugged blocks are
not looked at. Neither has the host allocate memory. The runs follow one another in the file, which is as long as what
the guest has, not as the regions. The ELF header is written last: a file whose writer was killed is no ELF file.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from vhost_user.errors import HostError, UsageError
from vhost_user.mapping import PAGE_SIZE
from vhost_user.units import align_up
from virtio_mem.blocks import BlockMap
from virtio_mem.config.values import FILE
from virtio_mem.hostmem.backed import ZEROS, BackedMemory
from virtio_mem.hostmem.files import write_at
from virtio_mem.manager import MemoryManager
from virtio_mem.service import DeviceService
from virtio_mem.snapshot.content import Range, held_chunks
from virtio_mem.snapshot.save import block_ranges, require_paused, require_unchanged, sync_names

HEADER = struct.Struct("<16s2HI3QI6H")
PROGRAM_HEADER = struct.Struct("<2I6Q")
_SECTION_HEADER = struct.Struct("<2I4Q2I2Q")

IDENT = b"\x7fELF\2\1\1" + bytes(9)
"""ELFCLASS64, ELFDATA2LSB, EV_CURRENT."""

_ET_CORE = 4
MACHINE = {"x86_64": 62, "aarch64": 183}.get(platform.machine(), 0)
"""That of the host, whose guests are of the same; EM_NONE where it is another one."""
PT_LOAD, PT_NOTE = 1, 4
_PF_ALL = 7
_PN_XNUM = 0xFFFF
_AT_ONCE = 4096
"""Program headers that are written together."""


class Part(NamedTuple):
    """Memory of the guest's: of `memory`, whose first byte would be at guest address `addr`, it has `nb_ranges` ranges
    of `size` bytes in all. `ranges()` makes them, in ascending order, each time that it is called."""

    memory: BackedMemory
    addr: int
    nb_ranges: int
    size: int
    ranges: Callable[[], Iterator[Range]]


def boot_part(memory: BackedMemory, addr: int, offset: int, size: int) -> Part:
    """`size` bytes of memory from `offset` on, which the guest has at `addr`."""
    return Part(memory, addr - offset, 1, size, lambda: iter([Range(offset, size)]))


def plugged_part(memory: BackedMemory, service: DeviceService, blocks: BlockMap) -> Part:
    """What `blocks` has plugged of a device's region."""
    block_size = service.device.geometry.block_size
    size, nb_runs = blocks.plugged * block_size, len(blocks.plugged_runs())
    return Part(memory, service.device.geometry.addr, nb_runs, size, lambda: block_ranges(blocks, block_size))


def core_dump(manager: MemoryManager, path: str | Path, notes: bytes = b"") -> None:
    """Write the machine's memory to `path`, which is made, for its owner only. `notes` is the content of the PT_NOTE,
    such as an NT_PRSTATUS for each CPU.

    The devices must be paused. A guest that runs all the same changes content while it is written. Raises UsageError
    for devices that are not, and for a file that exists or can't be; HostError where the host has no room. Then there
    is no file.
    """
    zones = manager.zones.values()
    boot = [
        boot_part(zone.zone.boot, place.addr, place.offset, place.size)
        for zone in zones
        for place in zone.boot
        if zone.zone.boot is not None
    ]
    hotplug = [(zone.id, zone.zone.hotplug, zone.service) for zone in zones if zone.service and zone.zone.hotplug]
    write_core(path, boot, hotplug, notes)


def write_core(
    path: str | Path,
    boot: Sequence[Part],
    hotplug: Sequence[tuple[str, BackedMemory, DeviceService]],
    notes: bytes = b"",
) -> None:
    """As `core_dump`, for memory of whoever has it: `hotplug` are zones with their regions and devices."""
    path = FILE.check("file", Path(path) if isinstance(path, str) else path)
    if not isinstance(notes, bytes):
        raise UsageError("notes", type(notes).__name__, "have to be bytes", "give the content of a PT_NOTE")
    for zone_id, _, service in hotplug:
        require_paused(zone_id, service)
    devices = []
    for _, memory, service in hotplug:
        with service.lock:
            devices.append((memory, service, service.device.blocks.copy()))
    parts = [*boot, *(plugged_part(*device) for device in devices)]
    with _new_file(path) as fd:
        _write(fd, parts, notes)
        for _, service, blocks in devices:
            require_unchanged(service, blocks)


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """A new file, on disk with its name when the block ends; removed where that raises."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise UsageError("file", path, "is there already", "name one that is not") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError("file", path, "has to be in a directory that there is", "make that one first") from error
    except OSError as error:
        raise HostError.from_os_error("file", path, "open", error) from error
    try:
        yield fd
        os.fsync(fd)
        sync_names(path.parent)
    except BaseException as error:
        with suppress(FileNotFoundError):
            path.unlink()
        if isinstance(error, OSError):
            raise HostError.from_os_error("file", path, "write", error, "make room there") from error
        raise
    finally:
        os.close(fd)


def _write(fd: int, parts: Sequence[Part], notes: bytes) -> None:
    """The whole file: headers, notes, content, and then the header that makes it one."""
    nb_headers = 1 + sum(part.nb_ranges for part in parts)
    many = nb_headers >= _PN_XNUM
    section_at = HEADER.size + nb_headers * PROGRAM_HEADER.size
    notes_at = section_at + _SECTION_HEADER.size * many
    content_at = align_up(notes_at + len(notes), PAGE_SIZE)
    os.ftruncate(fd, content_at + sum(part.size for part in parts))
    _write_program_headers(fd, parts, (PT_NOTE, 0, notes_at, 0, 0, len(notes), len(notes), 4), content_at)
    if many:
        write_at(fd, _SECTION_HEADER.pack(0, 0, 0, 0, 0, 0, 0, nb_headers, 0, 0), section_at)
    write_at(fd, notes, notes_at)
    for part in parts:
        _write_content(fd, part, content_at)
        content_at += part.size
    header = HEADER.pack(
        *(IDENT, _ET_CORE, MACHINE, 1, 0),
        *(HEADER.size, section_at if many else 0, 0),
        *(HEADER.size, PROGRAM_HEADER.size, min(nb_headers, _PN_XNUM), _SECTION_HEADER.size, int(many), 0),
    )
    write_at(fd, header, 0)


def _write_program_headers(fd: int, parts: Iterable[Part], first: tuple[int, ...], content_at: int) -> None:
    some, at = [PROGRAM_HEADER.pack(*first)], HEADER.size
    for part in parts:
        for offset, size in part.ranges():
            numbers = (PT_LOAD, _PF_ALL, content_at, 0, part.addr + offset, size, size, PAGE_SIZE)
            some.append(PROGRAM_HEADER.pack(*numbers))
            content_at += size
            if len(some) == _AT_ONCE:
                write_at(fd, b"".join(some), at)
                some, at = [], at + _AT_ONCE * PROGRAM_HEADER.size
    write_at(fd, b"".join(some), at)


def _write_content(fd: int, part: Part, content_at: int) -> None:
    """The ranges of a part, one behind the other from byte `content_at` of the file on."""
    ranges, start, end = part.ranges(), 0, 0
    for offset, data in held_chunks(part.memory, part.ranges()):
        while offset >= end:
            content_at += end - start
            start, size = next(ranges)
            end = start + size
        _write_pages(fd, data, content_at + offset - start)


def _write_pages(fd: int, data: bytes, at: int) -> None:
    """Write `data`, whole pages, but for those that are zero."""
    view = memoryview(data)
    starts = range(0, len(data), PAGE_SIZE)
    for zero, run in groupby(starts, lambda start: ZEROS.startswith(view[start : start + PAGE_SIZE])):
        pages = list(run)
        if not zero:
            write_at(fd, view[pages[0] : pages[-1] + PAGE_SIZE], at + pages[0])
