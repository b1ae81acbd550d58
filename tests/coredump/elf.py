"""ELF core files, read as elf(5) has them and by nothing of what writes them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

PT_LOAD, PT_NOTE = 1, 4


class Segment(NamedTuple):
    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Core:
    """A core file; `loads` are its PT_LOADs, by physical address."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            head = file.read(64)
            ident, self.type, self.machine, version, entry, phoff, shoff, flags, ehsize = struct.unpack_from(
                "<16sHHIQQQIH", head
            )
            phentsize, phnum, shentsize, shnum, shstrndx = struct.unpack_from("<HHHHH", head, 54)
            assert ident == b"\x7fELF\2\1\1" + bytes(9)
            assert (version, entry, flags, ehsize, phentsize, shentsize, shstrndx) == (1, 0, 0, 64, 56, 64, 0)
            self.extended = phnum == 0xFFFF
            assert (shnum, shoff > 0) == (int(self.extended), self.extended)
            if self.extended:
                file.seek(shoff)
                *others, phnum, addralign, entsize = struct.unpack("<IIQQQQIIQQ", file.read(64))
                assert (set(others), addralign, entsize) == ({0}, 0, 0)
            file.seek(phoff)
            self.segments = [Segment(*fields) for fields in struct.iter_unpack("<IIQQQQQQ", file.read(56 * phnum))]
        assert len(self.segments) == phnum
        self.loads = sorted((one for one in self.segments if one.type == PT_LOAD), key=lambda load: load.paddr)
        length = path.stat().st_size
        for load in self.loads:
            assert (load.vaddr, load.memsz, load.align) == (0, load.filesz, 4096)
            assert load.offset % 4096 == load.paddr % 4096 == load.filesz % 4096 == 0
            assert load.offset + load.filesz <= length
        for before, after in pairwise(self.loads):
            assert before.paddr + before.filesz <= after.paddr
        in_file = sorted((load.offset, load.filesz) for load in self.loads)
        assert all(one + size <= other for (one, size), (other, _) in pairwise(in_file))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Physical address and size of each PT_LOAD."""
        return [(load.paddr, load.filesz) for load in self.loads]

    def read(self, paddr: int, size: int) -> bytes:
        """Bytes of one PT_LOAD. LookupError where none has them."""
        for load in self.loads:
            if load.paddr <= paddr and paddr + size <= load.paddr + load.filesz:
                with self.path.open("rb") as file:
                    file.seek(load.offset + paddr - load.paddr)
                    return file.read(size)
        raise LookupError(hex(paddr))

    def notes(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Name, type and content of each note."""
        (segment,) = (one for one in self.segments if one.type == PT_NOTE)
        with self.path.open("rb") as file:
            file.seek(segment.offset)
            data = file.read(segment.filesz)
        assert len(data) == segment.filesz
        at = 0
        while at < len(data):
            namesz, descsz, type_ = struct.unpack_from("<III", data, at)
            name = data[at + 12 : at + 12 + namesz].rstrip(b"\0")
            at += 12 + (namesz + 3) // 4 * 4
            yield name, type_, data[at : at + descsz]
            at += (descsz + 3) // 4 * 4
