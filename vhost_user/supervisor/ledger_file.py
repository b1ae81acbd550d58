"""The bytes of a ledger: transactions in two memfds, one of which counts.

    byte 0     magic and version
    byte 8     generation: the file with the higher one counts; 0 in one that is not whole
    byte 16    where the transactions end
    byte 24    transactions: the length of each, then its changes, see `encode`

A transaction is written behind the end, and then the end is. A kill in between leaves what is behind the end, which
nobody reads. Once there is much in a file that was replaced since, all that is true is written to the other one: as one
transaction, then the end, and last a generation that is higher by one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vhost_user.errors import HostError
from vhost_user.owned_fd import OwnedFd

MAGIC = int.from_bytes(b"vuledge1", "little")

_GENERATION, _END, _BEGIN = 8, 16, 24

_HEAD = struct.Struct("=3Q")
_WORD = struct.Struct("=Q")
_LENGTH = struct.Struct("=I")
_CHANGE = struct.Struct("=HIB")
"""Bytes of the key and of the data, and how many descriptors; _GONE where the entry is dropped."""
_REF = struct.Struct("=QB")
_GONE = 0xFF

LEAST_REWRITE = 256 << 10
"""Bytes that a file may have before it is looked at how much of it is true."""


class Ref(NamedTuple):
    """A descriptor: which bundle's, and which of several."""

    bundle: int
    which: int


class Entry(NamedTuple):
    """What a key has."""

    data: bytes
    refs: tuple[Ref, ...]

    @property
    def size(self) -> int:
        """About how many bytes of a file it takes."""
        return _CHANGE.size + len(self.data) + _REF.size * len(self.refs)


Changes = Mapping[bytes, Entry | None]


def encode(changes: Changes) -> bytes:
    """The transaction that makes these changes; None is for an entry that is dropped."""
    parts = []
    for key, entry in changes.items():
        if entry is None:
            parts += [_CHANGE.pack(len(key), 0, _GONE), key]
        else:
            refs = (_REF.pack(*ref) for ref in entry.refs)
            parts += [_CHANGE.pack(len(key), len(entry.data), len(entry.refs)), *refs, key, entry.data]
    return b"".join(parts)


def decode(data: bytes) -> Iterator[tuple[bytes, Entry | None]]:
    """The changes of a transaction. HostError for what is none."""
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        if at > len(data):
            raise damaged("transaction", len(data))
        return data[at - size : at]

    while at < len(data):
        key_size, size, count = _CHANGE.unpack(take(_CHANGE.size))
        refs = () if count == _GONE else tuple(Ref(*_REF.unpack(take(_REF.size))) for _ in range(count))
        key = take(key_size)
        yield key, None if count == _GONE else Entry(take(size), refs)


def damaged(field: str, value: object) -> HostError:
    """What a ledger is that was not written by this code."""
    return HostError(f"ledger {field}", value, "has to be what this version writes", "start the service anew")


class LedgerFiles:
    """The two memfds. OSError where the host has no room."""

    def __init__(self, fds: list[OwnedFd]) -> None:
        self.fds = fds
        self._generation = 0
        self._end = _BEGIN

    @classmethod
    def create(cls) -> LedgerFiles:
        """Two that are empty."""
        return cls([OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC)) for name in ("ledger", "ledger too")])

    @property
    def _current(self) -> int:
        return self.fds[self._generation % 2].fileno()

    def load(self) -> dict[bytes, Entry]:
        """The entries that are true. HostError for what is no ledger of this version's."""
        entries: dict[bytes, Entry] = {}
        heads = [_HEAD.unpack(os.pread(fd.fileno(), _HEAD.size, 0).ljust(_HEAD.size, b"\0")) for fd in self.fds]
        best = max(range(len(heads)), key=lambda index: heads[index][1])
        magic, self._generation, self._end = heads[best]
        if not self._generation:
            return entries  # killed before anything was written
        if best != self._generation % 2:  # they come in any order
            self.fds.reverse()
        if magic != MAGIC:
            raise damaged("version", f"{magic:#x}")
        data = os.pread(self._current, self._end, 0)
        at = _BEGIN
        while at < self._end:
            if len(data) < at + _LENGTH.size:
                raise damaged("end", self._end)
            (size,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size + size
            if at > len(data):
                raise damaged("length", size)
            for key, entry in decode(data[at - size : at]):
                if entry is None:
                    entries.pop(key, None)
                else:
                    entries[key] = entry
        return entries

    def append(self, changes: Changes, entries: Mapping[bytes, Entry], size: int) -> None:
        """Write a transaction, after which `entries` are true, which have `size` bytes."""
        transaction = encode(changes)
        end = self._end + _LENGTH.size + len(transaction)
        if self._generation and (end < LEAST_REWRITE or end < 4 * size):
            self._write(self._current, _LENGTH.pack(len(transaction)) + transaction, self._end)
            self._write(self._current, _WORD.pack(end), _END)
            self._end = end
        else:
            self._rewrite(entries)

    def _rewrite(self, entries: Mapping[bytes, Entry]) -> None:
        other = self.fds[(self._generation + 1) % 2].fileno()
        transaction = encode(entries)
        end = _BEGIN + _LENGTH.size + len(transaction)
        os.ftruncate(other, 0)
        self._write(other, _HEAD.pack(MAGIC, 0, end) + _LENGTH.pack(len(transaction)) + transaction, 0)
        self._write(other, _WORD.pack(self._generation + 1), _GENERATION)
        self._generation += 1
        self._end = end

    @staticmethod
    def _write(fd: int, data: bytes, at: int) -> None:
        while data:
            written = os.pwrite(fd, data, at)
            data, at = data[written:], at + written

    def close(self) -> None:
        """Let go of them."""
        for fd in self.fds:
            fd.close()
