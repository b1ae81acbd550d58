"""A worker that is broken: whatever it says, it is replaced, and its front ends are served on."""

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.supervisor.rig import WORKER, WORKERS, Board, Counter, fork, service
from vhost_user.backend.loop import EventLoop
from vhost_user.errors import PeerError
from vhost_user.owned_fd import OwnedFd
from vhost_user.supervisor import Worker, kept, packets
from vhost_user.supervisor.packets import DONE, FD_REF, KEY, MESSAGE, SESSION, Kind, Source, decode, encode
from vhost_user.supervisor.process import WorkerProcess

DONE_HEAD = DONE.pack(1, 1, 0, False)
A_KEY = KEY.pack(1, 0)
A_REFERENCE = FD_REF.pack(Source.CURRENT, b"", 0)
A_NEW = FD_REF.pack(Source.NEW, b"", 8)

BROKEN = {
    "no packet": b"\0",
    "unknown kind": b"\xff",
    "a field that is too long": bytes([Kind.DONE]) + b"\xff\0\0\0",
    "half a length": bytes([Kind.DONE]) + b"\1\0",
    "what a supervisor says": encode(Kind.CONNECT, [SESSION.pack(1), b"device0"]),
    "no fields": encode(Kind.DONE, []),
    "a session that is not": encode(Kind.DONE, [DONE.pack(77, 1, 0, False), b""]),
    "a message that is not": encode(Kind.DONE, [DONE.pack(1, 77, 0, False), b""]),
    "no reply field": encode(Kind.DONE, [DONE_HEAD]),
    "descriptors that are not there": encode(Kind.DONE, [DONE.pack(1, 1, 3, True), b""]),
    "half a change": encode(Kind.DONE, [DONE_HEAD, b"", A_KEY, b"data"]),
    "a key of another size": encode(Kind.DONE, [DONE_HEAD, b"", b"key", b"data", b""]),
    "half a reference": encode(Kind.DONE, [DONE_HEAD, b"", A_KEY, b"data", b"half"]),
    "a reference to nothing": encode(Kind.DONE, [DONE_HEAD, b"", A_KEY, b"data", A_REFERENCE]),
    "a source that is not": encode(Kind.DONE, [DONE_HEAD, b"", A_KEY, b"data", FD_REF.pack(9, b"", 0)]),
    "a reference without data": encode(Kind.DONE, [DONE_HEAD, b"", A_KEY, b"", A_REFERENCE]),
    "a large entry": encode(Kind.DONE, [DONE_HEAD, b"", A_KEY, bytes(kept.MAX_ENTRY + 1), b""]),
    "an end that is not": encode(Kind.ENDED, [SESSION.pack(77)]),
    "a short number": encode(Kind.RESUMED, [b"1"]),
    "a beginning of nothing": encode(Kind.BEGUN, [MESSAGE.pack(77, 1, 1)]),
    "no name": encode(Kind.PUT, [b"", b"\1", b"data"]),
    "a long name": encode(Kind.PUT, [b"x" * 256, b"\1", b"data"]),
    "a name that is no text": encode(Kind.PUT, [b"\xff", b"\1", b"data"]),
    "no part": encode(Kind.PUT, [b"name", b"\1"]),
    "no descriptor's name": encode(Kind.PUT_FD, []),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_a_worker_that_says_what_it_can_not_is_replaced(tmp_path: Path, data: bytes) -> None:
    class Broken(Counter):
        """Says so when it is asked for its configuration, by the way that the test knows."""

        def read_config(self, offset: int, size: int) -> bytes:
            if self.board[WORKERS] == 1:
                assert control is not None
                packets.send(control, data)
            return super().read_config(offset, size)

    control = None

    def remember(worker: Worker, _: Board) -> None:
        nonlocal control
        control = worker._control

    with service(tmp_path, Broken, remember) as supervised, supervised.connect() as frontend:
        assert frontend.get_config(0, 4) == b"conf"
        supervised.wait_for(WORKERS, 2)
        assert frontend.get_config(0, 4) == b"conf"


def test_what_is_kept_has_limits() -> None:
    store = kept.Kept()
    for number in range(kept.MAX_ALL_BYTES // kept.MAX_BYTES):
        store.put(f"{number}", bytes(kept.MAX_BYTES))
    with pytest.raises(PeerError, match="of all names"):
        store.put("more", b"1")
    with pytest.raises(PeerError, match="at most"):
        store.put("0", bytes(kept.MAX_BYTES + 1))
    assert len(store.bytes["0"]) == kept.MAX_BYTES, "as before"
    store.put("0", b"")
    for number in range(kept.MAX_NAMES - len(store.bytes)):
        store.put(f"small {number}", b"1")
    with pytest.raises(PeerError, match="at most 256 names"):
        store.put("one more", b"1")
    store.put("1", b"as before")
    store.put_part("parts", bytes(kept.MAX_BYTES), last=False)
    with pytest.raises(PeerError, match="the rest"):
        store.put_part("other", b"1", last=False)
    with pytest.raises(PeerError, match="at most"):
        store.put_part("parts", b"1", last=False)
    store.forget_parts()
    for _ in range(kept.MAX_PARTS):
        store.put_part("parts", b"", last=False)
    with pytest.raises(PeerError, match="32 parts"):
        store.put_part("parts", b"", last=False)
    store.forget_parts()
    for number in range(kept.MAX_NAMES):
        store.put_fd(f"{number}", OwnedFd.duplicate_of(0))
    store.put_fd("0", OwnedFd.duplicate_of(0))
    with pytest.raises(PeerError, match="names"):
        store.put_fd("one more", OwnedFd.duplicate_of(0))
    store.close()


def test_a_journal_has_limits_and_changes_as_a_whole() -> None:
    journal = kept.Journal()
    for number in range(kept.MAX_ENTRIES):
        journal.apply([KEY.pack(1, number), b"data", b""], [], [])
    before = list(journal)
    with pytest.raises(PeerError, match="entries"):
        journal.apply([KEY.pack(2, 0), b"data", A_REFERENCE], [OwnedFd.duplicate_of(0)], [])
    changes = [KEY.pack(1, 0), b"other", b"", KEY.pack(1, 1), b"data", FD_REF.pack(Source.NEW, b"", 1)]
    with pytest.raises(PeerError, match="that is there"):
        journal.apply(changes, [], [OwnedFd.duplicate_of(0)])
    assert list(journal) == before
    journal.apply([KEY.pack(1, 0), b"", b"", KEY.pack(1, 1), b"data", A_REFERENCE], [OwnedFd.duplicate_of(0)], [])
    assert (len(list(journal)), journal.fd_count) == (kept.MAX_ENTRIES - 1, 1)
    moved = FD_REF.pack(Source.KEPT, KEY.pack(1, 1), 0)
    journal.apply([KEY.pack(1, 1), b"", b"", KEY.pack(3, 0), b"data", moved], [], [])
    assert journal.fd_count == 1
    many = b"".join(FD_REF.pack(Source.NEW, b"", number) for number in range(8))
    journal.apply([KEY.pack(3, 0), b"data", many], [], [OwnedFd.duplicate_of(0) for _ in range(8)])
    older = b"".join(FD_REF.pack(Source.KEPT, KEY.pack(3, 0), number) for number in range(8))
    journal.apply([KEY.pack(3, 0), b"data", older + many], [], [OwnedFd.duplicate_of(0) for _ in range(8)])
    with pytest.raises(PeerError, match="at most 16"):  # more than a packet brings to the next worker
        journal.apply([KEY.pack(3, 0), b"data", older + many + A_NEW], [], [OwnedFd.duplicate_of(0) for _ in range(9)])
    assert journal.fd_count == 16
    journal.close()


@given(kind=st.sampled_from(Kind), fields=st.lists(st.binary(max_size=50), max_size=5))
def test_packets_come_back(kind: Kind, fields: list[bytes]) -> None:
    assert decode(encode(kind, fields), []) == (kind, fields, [])


@given(st.binary(max_size=100))
def test_bytes_that_are_no_packet_are_refused(data: bytes) -> None:
    fd = OwnedFd(os.dup(0))
    try:
        packet = decode(data, [fd])
    except PeerError:
        assert fd.closed
    else:
        assert encode(packet.kind, packet.fields) == data
        fd.close()


def test_nothing_is_left_of_a_worker_that_can_not_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    def start(_: socket.socket) -> int:
        started.append(fork(signal.pause))
        return started[0]

    started: list[int] = []
    monkeypatch.setattr(os, "pidfd_open", refuse)
    loop = EventLoop()
    with pytest.raises(OSError, match="Too many"):
        WorkerProcess(loop, start, on_packet=lambda _: None, on_exit=lambda _: None)
    loop.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(started[0], os.WNOHANG)


def test_a_worker_is_started_by_a_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert WORKER == 0
    with pytest.raises(ValueError, match="set by a supervisor"):
        Worker.from_environment()
