"""What supervisor and worker tell each other: packets with a kind, a few fields, and descriptors.

The socket between them is a SOCK_SEQPACKET one: a packet arrives as a whole or not at all, whenever either side dies.
So what is in one packet is done as one. A packet that was sent is received, also from a worker that is dead by then.

The worker is trusted with what it serves, and not with the supervisor: it may be broken, and a guest may have broken
it. So whatever it sends is parsed here, and PeerError is raised for what can't be.
"""

from __future__ import annotations

import errno
import signal
import socket
import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from vhost_user.errors import PeerError
from vhost_user.owned_fd import OwnedFd, close_all, received_fds

ENVIRONMENT = "VHOST_USER_SUPERVISOR"
"""The variable that tells a worker which of its descriptors the control socket is."""

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
"""What terminals and service managers send to every process. A worker is started with these blocked, until it has said
what it makes of them."""

MAX_PACKET = 64 << 10
"""Bytes. The kernel takes a packet as a whole into the sender's buffer, of 208 KiB where nobody set another size, and
counts about twice its size; 64 KiB is four times what the largest one needs, a reset of a device with 256 rings."""

MAX_PART = 32 << 10
"""Bytes of what is kept that go into one packet."""

MAX_PACKET_FDS = 16
"""Descriptors in one packet: a message's eight at most, or a reply's eight and what is to be kept besides."""

_ROOM = socket.CMSG_SPACE(MAX_PACKET_FDS * 4)

SESSION = struct.Struct("=Q")
"""Which front end: each that connects has a number of its own."""

MESSAGE = struct.Struct("=QQB")
"""Session, the message's number within it, and whether a worker died under it before: then `BEGUN` is wanted."""

DONE = struct.Struct("=QQB?")
"""Session, message, how many of the descriptors belong to the reply, and whether there is one."""

KEY = struct.Struct(">BQ")
"""A journal's key: what kind of thing, and which one. In the order of these bytes a journal is told to a worker."""

FD_REF = struct.Struct("=B9sB")
"""Where a descriptor of a journal's entry comes from: a `Source`, a key for `KEPT`, and which of several."""


class Kind(IntEnum):
    """What a packet says. Fields in brackets."""

    # From the supervisor.
    KEPT_BYTES = 1
    """A part of what is kept. [name, 1 if it is the last part, part]"""
    KEPT_FD = 2
    """[name], and the descriptor."""
    KEPT_ALL = 3
    """That was all that is kept. [1 for the first worker]"""
    CONNECT = 4
    """A front end came. [session, listener, name of a socket end ...]"""
    RESUME = 5
    """A front end is here whose session is to be rebuilt: its journal follows. As CONNECT."""
    ENTRY = 6
    """Of a journal. [session, key, data], and descriptors."""
    JOURNAL_END = 7
    """Serve its rings. [session]"""
    MESSAGE = 8
    """[message, bytes as they came], and its descriptors."""
    CLOSE = 9
    """The front end is gone. [session]"""
    RETIRE = 10
    """Another worker takes over: end, and leave everything as it is."""

    # From the worker.
    READY = 32
    """Devices are attached."""
    PUT = 33
    """As KEPT_BYTES; no bytes at all for what is not to be kept any more."""
    PUT_FD = 34
    """As KEPT_FD; without a descriptor, it is not to be kept any more."""
    BEGUN = 35
    """A message that a worker died under is in hand; message 0 is the journal. [session and message]"""
    RESUMED = 36
    """A session is rebuilt, and what was in flight is served. [session]"""
    DONE = 37
    """A message was handled: keep this, then send the reply. [done, reply, (key, data, references) ...], and
    descriptors: the reply's, then new ones to be kept. A key without data is to be forgotten."""
    ENDED = 38
    """The session is closed: close the front end's connection, if it is still there. [session]"""
    LEAVING = 39
    """It was told to end by somebody else: have another worker take over."""


class Source(IntEnum):
    """Where a descriptor that is to be kept comes from."""

    CURRENT = 0
    """It came with the message in hand."""
    NEW = 1
    """It came with the packet, behind the reply's."""
    KEPT = 2
    """An entry has it that this packet replaces or removes."""


class Packet(NamedTuple):
    """A packet as it came. The descriptors are the receiver's."""

    kind: Kind
    fields: list[bytes]
    fds: list[OwnedFd]


class FdsLost(PeerError):  # noqa: N818
    """Descriptors of a packet did not come, as this process may open no more. `packet` is what did, without any."""

    packet: Packet


_LENGTH = struct.Struct("=I")


def encode(kind: Kind, fields: Iterable[bytes]) -> bytes:
    """A packet's bytes."""
    parts = [bytes([kind])]
    for field in fields:
        parts += (_LENGTH.pack(len(field)), field)
    data = b"".join(parts)
    assert len(data) <= MAX_PACKET, kind
    return data


def decode(data: bytes, fds: list[OwnedFd]) -> Packet:
    """The packet that these bytes are. PeerError for what is none; the descriptors are closed then."""
    try:
        kind = Kind(data[0])
        fields, at = [], 1
        while at < len(data):
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            if length > len(data) - at:
                raise ValueError(length)
            fields.append(data[at : at + length])
            at += length
    except (IndexError, ValueError, struct.error) as error:
        close_all(fds)
        raise PeerError("packet", data[:32], "has to be a kind, and fields with their lengths") from error
    return Packet(kind, fields, fds)


def unpack(form: struct.Struct, field: bytes) -> tuple[int, ...]:
    """A field's numbers. PeerError for another size."""
    if len(field) != form.size:
        raise PeerError("field", field[:32], f"has to be {form.size} bytes")
    return form.unpack(field)


def receive(sock: socket.socket, *, wait: bool = False) -> Packet | None:
    """The next packet; None where there is none yet. EOFError at the end, PeerError for what is no packet."""
    flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
    try:
        data, ancillary, told, _ = sock.recvmsg(MAX_PACKET, _ROOM, flags)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        raise EOFError("the other side is gone, and left packets unread") from None
    fds = received_fds(ancillary)
    if told & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        close_all(fds)
        size, limit = f"{len(data)} bytes, {len(fds)} descriptors", "has to be as large as there is room for"
        if told & socket.MSG_TRUNC:
            raise PeerError("packet", size, limit)
        error = FdsLost("packet", size, limit)
        error.packet = decode(data, [])
        raise error
    if not data:
        close_all(fds)
        raise EOFError("the other side is gone")
    return decode(data, fds)


def send(sock: socket.socket, data: bytes, fds: Sequence[OwnedFd] = (), *, wait: bool = False) -> None:
    """Send a packet. BlockingIOError where there is no room, and it was not sent; other OSErrors where nobody reads."""
    flags = socket.MSG_NOSIGNAL | (0 if wait else socket.MSG_DONTWAIT)
    try:
        if fds:
            socket.send_fds(sock, [data], [fd.fileno() for fd in fds], flags)
        else:
            sock.send(data, flags)
    except OSError as error:
        # Too many descriptors are on their way through sockets, of all of a user's processes: unix(7).
        if error.errno in {errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM}:
            raise BlockingIOError(error.errno, error.strerror) from error
        raise


def parts_of(name: str, data: bytes) -> Iterable[list[bytes]]:
    """The fields of the packets that bring `data`, which may be empty."""
    for at in range(0, max(len(data), 1), MAX_PART):
        last = at + MAX_PART >= len(data)
        yield [name.encode(), bytes([last]), data[at : at + MAX_PART]]
