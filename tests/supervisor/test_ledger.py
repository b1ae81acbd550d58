"""The book of a supervisor: what another one finds in it, wherever the first one stopped."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vhost_user.errors import HostError
from vhost_user.message import (
    U64,
    FrontendRequest,
    Log,
    MemoryRegion,
    MemoryTable,
    MessageSpec,
    VringFd,
    VringState,
    encode_message,
)
from vhost_user.message.table import FRONTEND_MESSAGES
from vhost_user.owned_fd import OwnedFd, close_all, received_fds
from vhost_user.supervisor import ledger_file
from vhost_user.supervisor.book import WORKER
from vhost_user.supervisor.bundle import pack, unpack
from vhost_user.supervisor.fd_store import FdStore
from vhost_user.supervisor.ledger import BUNDLE, FILES, Ledger
from vhost_user.supervisor.ledger_file import Entry, LedgerFiles, Ref
from vhost_user.supervisor.outbox import Outbox
from vhost_user.supervisor.packets import Kind, Packet, encode
from vhost_user.supervisor.peeked import PeekedSocket
from vhost_user.supervisor.stored import StoredWire, end_worker, must_bring_fds
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress


class KilledError(Exception):
    """Where the process is killed."""


class MemoryStore(FdStore):
    """A store in this process, to which nothing is sent. It stops at the `left`-th thing that it is told."""

    def __init__(self, found: dict[str, list[OwnedFd]], room: int = 64, left: int = -1) -> None:
        super().__init__("/nonexistent", room, found)
        self._sock.close()
        self.stored = {name: [fd.duplicate() for fd in fds] for name, fds in found.items()}
        self.left = left

    def _send(self, state: bytes, numbers: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KilledError
        said = dict(line.split("=", 1) for line in state.decode().splitlines())
        if "FDSTOREREMOVE" in said:
            close_all(self.stored.pop(said["FDNAME"]))
        else:
            assert isinstance(numbers, list)
            self.stored.setdefault(said["FDNAME"], []).extend(OwnedFd.duplicate_of(fd) for fd in numbers)

    def copy(self, *, left: int = -1) -> MemoryStore:
        """Of a world in which things go on in another way."""
        made = self.again(left=left)
        made.found[FILES] = [memfd(os.pread(fd.fileno(), 1 << 20, 0)) for fd in made.found[FILES]]
        made.stored[FILES] = [fd.duplicate() for fd in made.found[FILES]]
        return made

    def again(self, *, left: int = -1) -> MemoryStore:
        """As the next process has it, newest first."""
        found = {name: [fd.duplicate() for fd in reversed(fds)] for name, fds in reversed(self.stored.items())}
        return MemoryStore(found, self.room, left)


def memfd(content: bytes) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("test"))
    os.pwrite(fd.fileno(), content, 0)
    return fd


def content_of(fd: OwnedFd) -> bytes:
    return os.pread(fd.fileno(), 100, 0)


def found_in(ledger: Ledger) -> dict[bytes, tuple[bytes, list[bytes]]]:
    """Everything, by key: bytes, and the content of each descriptor."""
    found = {}
    for key in ledger.keys(b""):
        data, fds = ledger.claim(key)
        found[key] = data, [content_of(fd) for fd in fds]
        close_all(fds)
    ledger.settle()
    return found


def test_what_is_committed_is_found() -> None:
    store = MemoryStore({})
    ledger = Ledger(store)
    assert ledger.blank
    one, two = ledger.keep([memfd(b"one"), memfd(b"two")])
    ledger.put(b"a", b"first", [one, two])
    ledger.put(b"b", b"second")
    ledger.commit()
    ledger.put(b"a", b"moved")
    ledger.put(b"c", b"third", [two])  # of the same bundle
    ledger.drop(b"b")
    ledger.commit()
    ledger.put(b"d", b"never said")
    assert found_in(Ledger(store.again())) == {b"a": (b"moved", []), b"c": (b"third", [b"two"])}
    ledger.drop_all(b"")
    ledger.commit()
    assert list(store.stored) == [FILES]
    assert Ledger(store.again()).blank


def test_what_was_stored_and_not_committed_leaves_the_store() -> None:
    store = MemoryStore({})
    ledger = Ledger(store)
    ledger.put(b"a", b"", ledger.keep([memfd(b"one")]))
    ledger.commit()
    ledger.keep([memfd(b"two")])
    again = store.again()
    assert len(again.stored) == 3
    ledger = Ledger(again)
    assert found_in(ledger) == {b"a": (b"", [b"one"])}
    assert set(again.stored) == {FILES, f"{BUNDLE}1"}
    (three,) = ledger.keep([memfd(b"three")])
    ledger.put(b"b", b"", [three])
    ledger.commit()
    assert f"{BUNDLE}2" not in again.stored, "a name is not used twice: its removal may still be on its way"
    assert found_in(Ledger(again.again())) == {b"a": (b"", [b"one"]), b"b": (b"", [b"three"])}


def change(ledger: Ledger, rng: random.Random) -> None:
    """Some changes, and a commit."""
    for _ in range(rng.randrange(1, 4)):
        key = b"key %d" % rng.randrange(5)
        if rng.random() < 0.3:
            ledger.drop(key)
        else:
            data = rng.randbytes(rng.choice([3, 30_000]))
            fds = ledger.keep([memfd(data[:8]) for _ in range(rng.randrange(3))])
            ledger.put(key, data, fds)
            close_all(fds)
    ledger.commit()


def test_a_kill_at_any_write_leaves_what_was_before_or_after(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_file, "LEAST_REWRITE", 60_000)
    write = os.pwrite
    stop = [0]

    def pwrite(fd: int, data: bytes, at: int) -> int:
        stop[0] -= 1
        if stop[0] == 0:
            write(fd, data[: rng.randrange(len(data))] if len(data) != 8 else b"", at)
            raise KilledError
        return write(fd, data, at)

    store = MemoryStore({})
    Ledger(store)
    monkeypatch.setattr(os, "pwrite", pwrite)
    kills = 0
    for _ in range(150):
        before = found_in(Ledger(store.again()))
        seed = rng.random()
        again = store.copy(left=rng.randrange(1, 12))
        stop[0] = rng.randrange(1, 12)
        try:
            change(Ledger(again), random.Random(seed))
            killed = False
        except KilledError:
            kills += 1
            killed = True
        stop[0] = again.left = -1
        after_kill = found_in(Ledger(again.again()))
        whole = store.copy()
        change(Ledger(whole), random.Random(seed))
        after = found_in(Ledger(whole.again()))
        assert after_kill in (before, after) if killed else after_kill == after
        store = again if rng.random() < 0.5 else whole
    assert kills > 20


def test_both_files_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_file, "LEAST_REWRITE", 1000)
    store = MemoryStore({})
    ledger = Ledger(store)
    for number in range(200):
        ledger.put(b"key", b"%d" % number)
        ledger.commit()
    assert all(os.fstat(fd.fileno()).st_size < 1100 for fd in store.stored[FILES])
    assert found_in(Ledger(store.again())) == {b"key": (b"199", [])}


@contextmanager
def refused_by(store: MemoryStore) -> Iterator[None]:
    """The ledger in there is of no use, and the next process begins anew."""
    again = store.again()
    yield
    ledger = Ledger(again)
    assert ledger.blank
    assert list(again.stored) == [FILES]


def one_entry() -> MemoryStore:
    store = MemoryStore({})
    ledger = Ledger(store)
    ledger.put(b"a", b"data", ledger.keep([memfd(b"one")]))
    ledger.commit()
    return store


@pytest.mark.parametrize(
    ("at", "word"),
    [(0, 1), (8, 1 << 60), (16, 1 << 20), (16, 30), (24, 1 << 30), (24, 7)],
    ids=["version", "generation", "end", "short end", "length", "short length"],
)
def test_a_damaged_ledger_is_of_no_use(at: int, word: int) -> None:
    store = one_entry()
    for fd in store.stored[FILES]:
        # A generation that is higher, of the file that was never written; what else, of the one that was.
        if bool(os.fstat(fd.fileno()).st_size) == (at != 8):
            os.pwrite(fd.fileno(), word.to_bytes(8, "little"), at)
    with refused_by(store):
        pass


def test_a_bundle_that_is_gone_makes_it_of_no_use() -> None:
    store = one_entry()
    close_all(store.stored.pop(f"{BUNDLE}1"))
    with refused_by(store):
        pass


def test_transactions_are_read_as_written() -> None:
    changes = {b"a": Entry(b"data", (Ref(1, 0), Ref(7, 3))), b"": None, b"key": Entry(b"", ())}
    data = ledger_file.encode(changes)
    assert dict(ledger_file.decode(data)) == changes
    for cut in range(1, len(data)):
        try:
            assert len(dict(ledger_file.decode(data[:cut]))) < 3
        except HostError as error:
            assert "ledger" in error.field  # noqa: PT017 - a cut may lie between two changes


def test_a_full_store_refuses() -> None:
    ledger = Ledger(MemoryStore({}, room=3))
    ledger.put(b"a", b"", ledger.keep([memfd(b"one")]))
    ledger.commit()
    with pytest.raises(OSError, match="FileDescriptorStoreMax"), memfd(b"two") as two:
        ledger.keep([two])


def test_files_in_any_order() -> None:
    files = LedgerFiles.create()
    files.append({b"a": Entry(b"1", ())}, {b"a": Entry(b"1", ())}, 1)
    for fds in (files.fds, files.fds[::-1]):
        loaded = LedgerFiles([fd.duplicate() for fd in fds])
        assert loaded.load() == {b"a": Entry(b"1", ())}
        loaded.close()
    files.close()


# What is in sockets.


def test_a_bundle_gives_its_descriptors_again_and_again() -> None:
    with memfd(b"one") as one, memfd(b"two") as two, pack([one, two, one]) as bundle:
        for _ in range(2):
            fds = unpack(bundle, 5)
            assert [content_of(fd) for fd in fds] == [b"one", b"two", b"one"]
            assert [(fd.bundle, fd.index) for fd in fds] == [(5, 0), (5, 1), (5, 2)]
            close_all(fds)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_what_is_looked_at_stays(kind: socket.SocketKind) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    peeked = PeekedSocket.of(ours)
    theirs.send(b"one")
    theirs.send(b"two")
    assert peeked.recvmsg(3)[0] == b"one"
    other = PeekedSocket.found(OwnedFd(os.dup(peeked.fileno())))
    assert other.looked_at == 3
    other.look_again()
    assert other.recvmsg(3)[0] == b"one"
    other.take()
    assert other.looked_at == 0
    assert other.recvmsg(3)[0] == b"two"
    theirs.close()
    for each in (peeked, other):
        each.close()


def message(size: int, byte: bytes) -> bytes:
    return struct.pack("=III", 1, 1, size) + byte * size


@pytest.mark.parametrize("split", [False, True], ids=["whole", "header first"])
def test_descriptors_belong_to_the_message_that_they_came_with(split: bool) -> None:
    """A look at the end of one message brings the descriptors of the next, if that is there already."""
    ours, theirs = socket.socketpair()
    wire = StoredWire(PeekedSocket.of(ours), Outbox.create())
    with memfd(b"one") as one:
        for byte, fds in ((b"a", []), (b"b", [one.fileno()]), (b"c", []), (b"d", [one.fileno()] * 2)):
            data = message(8, byte)
            head, rest = (data[:12], data[12:]) if split else (data, b"")
            socket.send_fds(theirs, [head], fds)
            theirs.sendall(rest)
        for number, (byte, count) in enumerate(((b"a", 0), (b"b", 1), (b"c", 0), (b"d", 2))):
            for piece, size in enumerate((12, 8)):
                data, ancillary, _ = wire.receive(size, 100, first=piece == 0)
                assert data == (message(8, byte)[:12], byte * 8)[piece]
                fds_ = received_fds(ancillary)
                assert [content_of(fd) for fd in fds_] == [b"one"] * (count if piece == 0 else 0)
                assert wire.took(2 * number + piece + 1, len(fds_))
                close_all(fds_)
        socket.send_fds(theirs, [message(8, b"e") * 2], [one.fileno()])
        _, ancillary, _ = wire.receive(12, 100, first=True)
        assert not ancillary
        assert not wire.took(9, 0), "a request with which none comes"
    wire.close()
    theirs.close()


KICK = encode_message(FrontendRequest.SET_VRING_KICK, VringFd(1).encode())
NO_CALL = encode_message(FrontendRequest.SET_VRING_CALL, VringFd(1, no_fd=True).encode())
ENABLE = encode_message(FrontendRequest.SET_VRING_ENABLE, VringState(1, 1).encode())


@pytest.mark.parametrize("behind", [[ENABLE], [NO_CALL], [ENABLE, NO_CALL]])
def test_messages_that_are_sent_at_once_are_as_good_as_one_by_one(behind: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    wire = StoredWire(PeekedSocket.of(ours), Outbox.create())
    with memfd(b"one") as one, memfd(b"two") as two:
        theirs.sendall(NO_CALL)
        socket.send_fds(theirs, [KICK + b"".join(behind)], [one.fileno()])
        socket.send_fds(theirs, [KICK], [two.fileno()])
    piece = 0
    for data, contents in [(NO_CALL, []), (KICK, [b"one"]), *((each, []) for each in behind), (KICK, [b"two"])]:
        for wanted, brought in ((data[:12], contents), (data[12:], [])):
            piece += 1
            got, ancillary, _ = wire.receive(len(wanted), 100, first=wanted == data[:12])
            fds = received_fds(ancillary)
            assert (got, [content_of(fd) for fd in fds]) == (wanted, brought)
            assert wire.took(piece, len(fds))
            close_all(fds)
    wire.close()
    theirs.close()


REGION = MemoryRegion(GuestAddress(0), ByteCount(4096), UserAddress(0), HostOffset(0))
EXAMPLES: dict[FrontendRequest, tuple[list[bytes], list[bytes]]] = {
    FrontendRequest.SET_MEM_TABLE: ([MemoryTable((REGION, REGION)).encode()], [MemoryTable(()).encode()]),
    FrontendRequest.SET_LOG_BASE: ([Log(ByteCount(4096), HostOffset(0)).encode()], [U64(1 << 40).encode()]),
    FrontendRequest.SET_VRING_KICK: ([VringFd(255).encode()], [VringFd(255, no_fd=True).encode()]),
    FrontendRequest.SET_VRING_CALL: ([VringFd(0).encode()], [VringFd(0, no_fd=True).encode()]),
    FrontendRequest.SET_VRING_ERR: ([VringFd(1).encode()], [VringFd(1, no_fd=True).encode()]),
}
"""Payloads of requests that may come with descriptors, or without: of those that do, and of those that don't."""


@pytest.mark.parametrize("spec", FRONTEND_MESSAGES.values(), ids=lambda spec: spec.name)
def test_which_messages_bring_descriptors(spec: MessageSpec) -> None:
    one = [bytes(8)] if spec.fds == (1, 1) else []
    bring, do_not = EXAMPLES.get(FrontendRequest(spec.request), (one, [] if one else [bytes(8)]))
    for payloads, expected in ((bring, True), (do_not, False)):
        for payload in payloads:
            assert must_bring_fds(encode_message(FrontendRequest(spec.request), payload) + KICK) is expected


def test_a_byte_out_of_band_is_one_like_any_other() -> None:
    """It makes the socket one that can be read: a supervisor that does not see it would look again for ever."""
    ours, theirs = socket.socketpair()
    wire = StoredWire(PeekedSocket.of(ours), Outbox.create())
    theirs.send(message(8, b"a"))
    assert wire.receive(20, 100, first=True)[0] == message(8, b"a")
    assert wire.took(1, 0)
    theirs.send(b"!", socket.MSG_OOB)
    assert wire.receive(12, 100, first=True)[0] == b"!"
    wire.close()
    theirs.close()


def test_the_outbox_says_what_was_sent() -> None:
    ours, theirs = socket.socketpair()
    outbox = Outbox.create()
    other = Outbox(outbox.fd.duplicate())
    with ours, theirs, memfd(b"one") as one:
        assert outbox.send(ours, 1, b"with\0a descriptor", [one]) == 17
        data, fds, _, _ = socket.recv_fds(theirs, 100, 2)
        assert data == b"with\0a descriptor"
        with OwnedFd(fds[0]) as received:
            assert content_of(received) == b"one"
        assert (other.sent(1), other.sent(2)) == (17, 0)
        outbox.clear(2)
        with suppress(BlockingIOError):
            while outbox.send(ours, 2, bytes(5000), []):
                pass
        assert other.sent(1) == 17
        theirs.close()
        with pytest.raises(BrokenPipeError):
            outbox.send(ours, 3, b"gone", [])
    outbox.close()
    other.close()


def test_what_a_dead_worker_had_sent_is_read_though_it_had_not_read_all() -> None:
    """The kernel tells of the latter first: unix(7), ECONNRESET."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    pidfd = OwnedFd(os.pidfd_open(pid))
    store = MemoryStore({})
    ledger = Ledger(store)
    outbox = Outbox.create()
    control = PeekedSocket.of(ours)
    for name in (b"one", b"two", b"three"):
        theirs.send(encode(Kind.PUT_FD, [name]))
    control.send(b"never read")
    control.recvmsg(100)
    control.take()
    control.recvmsg(100)
    theirs.close()
    fds = ledger.keep([pidfd, OwnedFd(control.detach()), outbox.fd.duplicate()])
    ledger.put(WORKER, (2).to_bytes(8, "little"), fds)
    ledger.commit()
    outbox.taken = 1  # killed before it took the second one out
    again = Ledger(store.again())
    packets: list[Packet] = []
    data, fds = again.claim(WORKER)
    end_worker(data, fds, again, packets.append)
    assert [packet.fields for packet in packets] == [[b"three"]]
    assert again.blank
    os.waitpid(pid, 0)


def test_a_store_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS"):
        monkeypatch.delenv(name, raising=False)
    assert FdStore.from_environment() is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        for room in ("", "0", "many"):
            monkeypatch.setenv("FDSTORE", room)
            assert FdStore.from_environment() is None
        monkeypatch.setenv("FDSTORE", "2")
        monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))  # meant for a parent
        monkeypatch.setenv("LISTEN_FDS", "1")
        store = FdStore.from_environment()
        assert store is not None
        assert not store.found
        assert "LISTEN_FDS" not in os.environ
        with memfd(b"one") as one:
            store.put("a", [one, one])
            data, fds, _, _ = socket.recv_fds(manager, 100, 4)
            assert (data, len(fds), store.free) == (b"FDSTORE=1\nFDNAME=a\nFDPOLL=0", 2, 0)
            for fd in fds:
                os.close(fd)
            with pytest.raises(OSError, match="room for 2"):
                store.put("b", [one])
        store.remove("a")
        assert manager.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=a"
        assert store.free == 2
        store.close()
