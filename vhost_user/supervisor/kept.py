"""What the supervisor holds for the next worker: bytes and descriptors by name, and a journal for each front end.

All of it is bounded, and what a worker asks for beyond that is PeerError. A journal has a key for each thing that a
session has one of, so front ends can't make it grow: a thing that is set anew replaces the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vhost_user.errors import PeerError
from vhost_user.owned_fd import OwnedFd, close_all
from vhost_user.supervisor.book import BYTES, FDS, JOURNAL, PART, Book
from vhost_user.supervisor.packets import FD_REF, KEY, MAX_PACKET_FDS, MAX_PART, Source, unpack

MAX_NAMES = 256
"""Of bytes and of descriptors, each."""

MAX_NAME = 255
"""Bytes of a name, as of a file's."""

MAX_BYTES = 1 << 20
"""Kept under one name."""

MAX_PARTS = MAX_BYTES // MAX_PART
"""In which they come."""

MAX_ALL_BYTES = 16 << 20
"""Kept in all."""

MAX_ENTRIES = 4096
"""Of a journal: 509 regions, 256 rings with seven things each, and a few more."""

MAX_ENTRY = 8 << 10
"""Bytes of an entry: the largest message has 4120."""


class Kept:
    """Bytes and descriptors by name; `book` has them too."""

    def __init__(self, book: Book | None = None) -> None:
        self._book = book or Book()
        self.bytes: dict[str, bytes] = {}
        self.fds: dict[str, OwnedFd] = {}
        self._name = ""
        self._parts: list[bytes] = []

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes, or none."""
        others = {key: value for key, value in self.bytes.items() if key != name}
        if data:
            check_name(name, others)
            total = len(data) + sum(map(len, others.values()))
            if len(data) > MAX_BYTES or total > MAX_ALL_BYTES:
                raise PeerError(
                    name, len(data), f"has to be at most {MAX_BYTES} bytes, and {MAX_ALL_BYTES} of all names"
                )
        self.bytes.pop(name, None)
        self._book.drop(BYTES + name.encode())
        if not data:
            return
        self.bytes[name] = data
        self._book.put(BYTES + name.encode(), data)

    def put_part(self, name: str, part: bytes, *, last: bool) -> None:
        """Take a part of bytes; nothing changes before the last one."""
        if self._parts and name != self._name:
            raise PeerError("name", name, f"has to be the rest of {self._name}")
        self._name = name
        self._parts.append(part)
        if sum(map(len, self._parts)) > MAX_BYTES or len(self._parts) > MAX_PARTS:
            raise PeerError(name, "more", f"has to be at most {MAX_BYTES} bytes, in {MAX_PARTS} parts")
        if last:
            data = b"".join(self._parts)
            self.forget_parts()
            self.put(name, data)
        else:
            self._book.put(PART + b"%04d/" % len(self._parts) + name.encode(), part)

    def put_fd(self, name: str, fd: OwnedFd | None) -> None:
        """Keep a descriptor, which is taken over, or none."""
        if fd is not None and name not in self.fds:
            try:
                check_name(name, self.fds)
            except BaseException:
                fd.close()
                raise
        key = FDS + name.encode()
        kept = [] if fd is None else self._book.keep([fd])
        before = self.fds.pop(name, None)
        if before is not None:
            before.close()
        if kept:
            self._book.put(key, b"", kept)
            (self.fds[name],) = kept
        else:
            self._book.drop(key)

    def restore_part(self, name: str, part: bytes) -> None:
        """Have what the book has, in the order of its keys."""
        self._name = name
        self._parts.append(part)

    def restore_fd(self, name: str, fd: OwnedFd) -> None:
        """Have what the book has."""
        self.fds[name] = fd

    def forget_parts(self) -> None:
        """The worker that began to tell them is dead."""
        self._parts.clear()
        self._book.drop_all(PART)

    def close(self) -> None:
        """Keep nothing."""
        close_all(self.fds.values())
        self.fds.clear()
        self.bytes.clear()


def check_name(name: str, others: Mapping[str, object]) -> None:
    """PeerError where one more name can't be kept."""
    if not 1 <= len(name.encode()) <= MAX_NAME or len(others) >= MAX_NAMES:
        raise PeerError("name", name, f"has to be 1 to {MAX_NAME} bytes, and at most {MAX_NAMES} names")


class Entry(NamedTuple):
    """A message that is part of what a session is, and the descriptors that came with it."""

    data: bytes
    fds: tuple[OwnedFd, ...]


class Journal:
    """A front end's session as the messages that make it, in the order of their keys. `book` has it, too, under keys
    that begin with `prefix`."""

    def __init__(self, book: Book | None = None, prefix: bytes = b"") -> None:
        self._book, self._prefix = book or Book(), prefix + JOURNAL
        self._entries: dict[bytes, Entry] = {}
        self.fd_count = 0
        """How many descriptors it has."""

    def __iter__(self) -> Iterator[tuple[bytes, Entry]]:
        return iter(sorted(self._entries.items()))

    def apply(self, fields: Sequence[bytes], current: Sequence[OwnedFd], new: Sequence[OwnedFd]) -> None:
        """Do what a worker says in `fields`: key, data and references of each change. All of it, or nothing.

        `current` and `new`, which the book has, are taken over: what no change refers to is closed. PeerError for what
        can't be done.
        """
        pool = {(Source.CURRENT, b"", index): fd for index, fd in enumerate(current)}
        pool |= {(Source.NEW, b"", index): fd for index, fd in enumerate(new)}
        try:
            changes = {key: (data, references) for key, data, references in _threes(fields)}
            for key in changes:
                if key in self._entries:
                    pool |= {(Source.KEPT, key, index): fd for index, fd in enumerate(self._entries[key].fds)}
            left = dict(pool)
            made = {key: _entry(data, references, left) for key, (data, references) in changes.items()}
            added = sum(entry is not None and key not in self._entries for key, entry in made.items())
            if len(self._entries) + added > MAX_ENTRIES:
                raise PeerError("journal", len(self._entries) + added, f"has to be at most {MAX_ENTRIES} entries")
        except BaseException:
            close_all((*current, *new))
            raise
        for key, entry in made.items():
            before = self._entries.pop(key, None)
            self.fd_count -= 0 if before is None else len(before.fds)
            if entry is None:
                self._book.drop(self._prefix + key)
            else:
                self._book.put(self._prefix + key, *entry)
                self.restore(key, entry)
        close_all(left.values())

    def restore(self, key: bytes, entry: Entry) -> None:
        """Have what the book has."""
        self._entries[key] = entry
        self.fd_count += len(entry.fds)

    def close(self) -> None:
        """Forget it."""
        for entry in self._entries.values():
            close_all(entry.fds)
        self._entries.clear()
        self.fd_count = 0


_Pool = dict[tuple[Source, bytes, int], OwnedFd]


def _threes(fields: Sequence[bytes]) -> Iterable[tuple[bytes, bytes, bytes]]:
    if len(fields) % 3:
        raise PeerError("changes", len(fields), "have to be a key, data and references of each")
    for at in range(0, len(fields), 3):
        key, data, references = fields[at : at + 3]
        unpack(KEY, key)
        if len(data) > MAX_ENTRY:
            raise PeerError("entry", len(data), f"has to be at most {MAX_ENTRY} bytes")
        yield key, data, references


def _entry(data: bytes, references: bytes, left: _Pool) -> Entry | None:
    """The entry; its descriptors are taken from those that are `left`."""
    if len(references) % FD_REF.size:
        raise PeerError("references", len(references), f"have to be {FD_REF.size} bytes each")
    if len(references) > MAX_PACKET_FDS * FD_REF.size:  # a packet brings them to the next worker
        raise PeerError(
            "references", len(references) // FD_REF.size, f"have to be at most {MAX_PACKET_FDS} descriptors"
        )
    if references and not data:
        raise PeerError("references", len(references), "have to be none where an entry is to be forgotten")
    fds = []
    for number, key, index in FD_REF.iter_unpack(references):
        try:
            fds.append(left.pop((Source(number), key if number == Source.KEPT else b"", index)))
        except (KeyError, ValueError):
            raise PeerError("reference", (number, key, index), "has to be a descriptor that is there, once") from None
    return Entry(data, tuple(fds)) if data else None
