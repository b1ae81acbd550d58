"""Postcopy with a back end in another process, and with descriptors and faults that are none."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.frontend.fake import ALL, LATE, VERSION_1, Behaviour, FakeBackend, fake
from vhost_user import _native
from vhost_user.connection import Received
from vhost_user.errors import HostError, PeerError, Refused, UsageError
from vhost_user.frontend import Frontend, Postcopy, SharedRegion
from vhost_user.mapping import Mapping
from vhost_user.message import Empty, FrontendRequest, MemoryRegion, MemoryTable, ProtocolFeature
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress

R = FrontendRequest
PAGE = mmap.PAGESIZE
SIZE = ByteCount(16 * PAGE)

# <linux/userfaultfd.h>
API, REGISTER = 0xC018AA3F, 0xC020AA00
MISSING = 1
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}.get(os.uname().machine, -1)


class FaultingBackend:
    """Opens a userfaultfd, maps what it is given, tells where, and lets missing pages fault."""

    def __init__(self) -> None:
        self.uffd: OwnedFd | None = None
        self.mappings: list[Mapping] = []

    def behaviour(self) -> dict[R, Behaviour]:
        return {R.POSTCOPY_ADVISE: self.advise, R.SET_MEM_TABLE: self.map}

    def advise(self, back: FakeBackend, request: R, _received: Received) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.uffd = OwnedFd(libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK))
        fcntl.ioctl(self.uffd.fileno(), API, bytearray(struct.pack("=QQQ", 0xAA, 0, 0)))
        back.reply(request, Empty(), [self.uffd.fileno()])

    def map(self, back: FakeBackend, request: R, received: Received) -> None:
        table = MemoryTable.decode(received.body)
        if not table.regions:
            self._register()
            return
        answer = []
        for region, fd in zip(table.regions, received.fds, strict=True):
            mapping = Mapping(region.size, mmap.MAP_SHARED, fd.fileno(), region.mmap_offset)
            self.mappings.append(mapping)
            answer.append(MemoryRegion(region.guest_address, region.size, UserAddress(mapping.address), HostOffset(0)))
        back.reply(request, MemoryTable(tuple(answer)))

    def _register(self) -> None:
        assert self.uffd is not None
        for mapping in self.mappings:
            ask = bytearray(struct.pack("=QQQQ", mapping.address, mapping.size, MISSING, 0))
            fcntl.ioctl(self.uffd.fileno(), REGISTER, ask)

    def touch(self, region: int, offset: int) -> bytes:
        """A page as the back end sees it: by a call of the core, so that the thread that faults holds no lock."""
        table = _native.MemoryTable(_native.REGION.pack(0, SIZE, self.mappings[region].address, 0), self.mappings)
        return _native.memory_read(table, offset, PAGE)

    def close(self) -> None:
        for mapping in self.mappings:
            mapping.close()
        if self.uffd is not None:
            self.uffd.close()


@contextmanager
def memory() -> Iterator[list[SharedRegion]]:
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 2 * SIZE)
        yield [
            SharedRegion(GuestAddress(0), SIZE, fd.fileno()),
            SharedRegion(GuestAddress(1 << 32), SIZE, fd.fileno(), HostOffset(SIZE)),
        ]


def page_of(region: SharedRegion, offset: HostOffset, size: ByteCount) -> bytes:
    return f"{region} {offset}".encode().ljust(size, b".")


@contextmanager
def postcopied(
    source: Callable[[SharedRegion, HostOffset, ByteCount], bytes] = page_of,
) -> Iterator[tuple[FaultingBackend, Postcopy, list[SharedRegion]]]:
    device = FaultingBackend()
    try:
        with (
            memory() as regions,
            fake(behaviour=device.behaviour()) as back,
            Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
            Postcopy(frontend, source) as postcopy,
        ):
            postcopy.listen()
            postcopy.share(regions)
            yield device, postcopy, regions
    finally:
        device.close()


class Toucher(threading.Thread):
    def __init__(self, device: FaultingBackend, region: int, offset: int) -> None:
        super().__init__()
        self._where = region, offset
        self._device = device
        self.seen = b""

    def run(self) -> None:
        self.seen = self._device.touch(*self._where)


@pytest.mark.needs_userfaultfd
def test_pages_come_when_they_are_touched() -> None:
    with postcopied() as (device, postcopy, regions):
        threads = [Toucher(device, at % 2, at * PAGE) for at in range(16)]
        for thread in threads:
            thread.start()
        requests = postcopy._requests
        while postcopy.faults < 16:
            assert requests.wait_ready(postcopy.fileno(), LATE)
        for at, thread in enumerate(threads):
            thread.join()
            assert thread.seen == page_of(regions[at % 2], HostOffset(at * PAGE), ByteCount(PAGE))
        # What is there does not fault.
        assert device.touch(0, 0) == threads[0].seen
        assert postcopy.faults == 16
        postcopy.end()
        with pytest.raises(UsageError):
            postcopy.fileno()
        postcopy.close()


@pytest.mark.needs_userfaultfd
def test_a_page_that_has_come_meanwhile_is_left_alone() -> None:
    def late(region: SharedRegion, offset: HostOffset, size: ByteCount) -> bytes:
        os.pwrite(region.fd, b"written", region.offset + offset)
        return bytes(size)

    with postcopied(late) as (device, postcopy, _):
        thread = Toucher(device, 1, 3 * PAGE)
        thread.start()
        assert postcopy._requests.wait_ready(postcopy.fileno(), LATE)
        thread.join()
        assert thread.seen.startswith(b"written")
        assert postcopy.faults == 0


@pytest.mark.needs_userfaultfd
def test_a_fault_in_no_region() -> None:
    with postcopied() as (device, postcopy, _):
        postcopy._bases.pop()
        thread = Toucher(device, 1, 0)
        thread.start()
        with pytest.raises(PeerError, match="has to lie in a region that is shared"):
            postcopy._requests.wait_ready(postcopy.fileno(), LATE)
        assert device.uffd is not None
        _native.fault_fill(device.uffd.fileno(), device.mappings[1].address, bytes(PAGE))
        thread.join()


@pytest.mark.parametrize(
    ("number", "raised"), [(2, None), (3, None), (22, HostError)], ids=["ENOENT", "ESRCH", "EINVAL"]
)
def test_what_the_kernel_says_of_a_page(
    number: int, raised: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where mapping or process are gone, nobody waits any more; all else is an error."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with scripted(monkeypatch, faults=[PAGE]) as postcopy:
        monkeypatch.setattr(_native, "fault_fill", refuse)
        if raised is None:
            postcopy.serve()
        else:
            with pytest.raises(raised, match="UFFDIO_COPY failed: EINVAL"):
                postcopy.serve()


def test_a_page_is_tried_again_while_mappings_change(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def busy(_uffd: int, address: int, _page: bytes) -> bool:
        asked.append(address)
        if len(asked) < 3:
            raise BlockingIOError(11, "changing")
        return True

    with scripted(monkeypatch, faults=[PAGE + 5]) as postcopy:
        monkeypatch.setattr(_native, "fault_fill", busy)
        for _ in range(4):
            postcopy.serve()
        assert asked == [PAGE] * 3
        assert postcopy.faults == 1


def test_faults_that_can_never_be_answered_are_not_collected_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> bool:
        raise BlockingIOError(11, "changing")

    with scripted(monkeypatch, faults=[PAGE] * 2000) as postcopy:
        monkeypatch.setattr(_native, "fault_fill", busy)
        with pytest.raises(PeerError, match="may wait at most"):
            serve_on_and_on(postcopy)


def serve_on_and_on(postcopy: Postcopy) -> None:
    while True:
        postcopy.serve()


@contextmanager
def scripted(monkeypatch: pytest.MonkeyPatch, faults: list[int]) -> Iterator[Postcopy]:
    """With a region at address 0 of a back end that faults at these addresses."""
    left = list(faults)

    def give(back: FakeBackend, request: R, _received: Received) -> None:
        with OwnedFd(os.eventfd(0)) as fd:
            back.reply(request, Empty(), [fd.fileno()])

    def place_at_zero(back: FakeBackend, request: R, received: Received) -> None:
        table = MemoryTable.decode(received.body)
        if table.regions:
            (region,) = table.regions
            back.reply(
                request, MemoryTable((MemoryRegion(region.guest_address, region.size, UserAddress(0), HostOffset(0)),))
            )

    behaviour = {R.POSTCOPY_ADVISE: give, R.SET_MEM_TABLE: place_at_zero}
    monkeypatch.setattr("vhost_user.frontend.postcopy._USERFAULTFD", "anon_inode:[eventfd]")
    monkeypatch.setattr(_native, "fault_take", lambda _: left.pop(0) if left else None)
    with (
        memory() as regions,
        fake(behaviour=behaviour) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
        Postcopy(frontend, page_of) as postcopy,
    ):
        postcopy.listen()
        postcopy.share([regions[1]])
        yield postcopy


def test_a_descriptor_that_is_no_userfaultfd() -> None:
    def give(back: FakeBackend, request: R, _received: Received) -> None:
        with OwnedFd(os.eventfd(0)) as fd:
            back.reply(request, Empty(), [fd.fileno()])

    with (
        fake(behaviour={R.POSTCOPY_ADVISE: give}) as back,
        Frontend(back.connection, features=VERSION_1) as frontend,
        pytest.raises(PeerError, match="has to be a userfaultfd"),
    ):
        Postcopy(frontend, page_of)


def test_events_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork(_: int) -> int:
        raise OSError(71, os.strerror(71))

    with scripted(monkeypatch, []) as postcopy:
        monkeypatch.setattr(_native, "fault_take", fork)
        with pytest.raises(PeerError, match="has to tell of page faults"):
            postcopy.serve()


def test_the_core_reads_events_of_a_fault_only() -> None:
    reading, writing = os.pipe()
    try:
        os.set_blocking(reading, True)
        assert _native.fault_take(reading) is None  # and does not wait
        os.write(writing, struct.pack("=BBHIQQQ", 0x12, 0, 0, 0, 0, 0xABC, 0))
        assert _native.fault_take(reading) == 0xABC
        os.write(writing, struct.pack("=BBHIQQQ", 0x13, 0, 0, 0, 0, 0xABC, 0))
        with pytest.raises(OSError, match="Protocol error"):
            _native.fault_take(reading)
        os.write(writing, b"short")
        with pytest.raises(OSError, match="Input/output error"):
            _native.fault_take(reading)
        with pytest.raises(OSError, match="Inappropriate ioctl"):
            _native.fault_fill(reading, 0, bytes(PAGE))
    finally:
        os.close(reading)
        os.close(writing)


def test_a_back_end_that_has_none() -> None:
    with fake() as back, Frontend(back.connection, features=VERSION_1) as frontend:
        with pytest.raises(Refused, match="no descriptor"):
            Postcopy(frontend, page_of)
        assert frontend.connected


def test_without_the_feature() -> None:
    with (
        fake(offered=ALL & ~ProtocolFeature.PAGEFAULT) as back,
        Frontend(back.connection, features=VERSION_1) as frontend,
        pytest.raises(Refused, match="PAGEFAULT"),
    ):
        Postcopy(frontend, page_of)


def test_an_end_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(monkeypatch, []) as postcopy:
        monkeypatch.setattr(postcopy._requests, "ask", lambda *_: type("Answer", (), {"value": 1}))
        with pytest.raises(Refused, match="POSTCOPY_END"):
            postcopy.end()
        monkeypatch.undo()


class TestSharing:
    def test_before_it_listens(self) -> None:
        behaviour = FaultingBackend()
        with (
            memory() as regions,
            fake(behaviour=behaviour.behaviour()) as back,
            Frontend(back.connection, features=VERSION_1) as frontend,
            Postcopy(frontend, page_of) as postcopy,
            pytest.raises(UsageError, match="listen first"),
        ):
            postcopy.share(regions)
        behaviour.close()

    def test_a_second_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with scripted(monkeypatch, []) as postcopy, pytest.raises(UsageError, match="once"):
            postcopy.share([])

    def test_parts_of_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with scripted(monkeypatch, []) as postcopy, memory() as regions:
            postcopy._frontend.regions.drop(list(postcopy._frontend.regions))
            odd = SharedRegion(GuestAddress(0), ByteCount(PAGE + 1), regions[0].fd)
            with pytest.raises(UsageError, match="whole pages of 4096 bytes"):
                postcopy.share([odd])

    def test_an_answer_about_something_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with scripted(monkeypatch, []) as postcopy, memory() as regions:
            postcopy._frontend.regions.drop(list(postcopy._frontend.regions))
            other = MemoryTable((MemoryRegion(GuestAddress(PAGE), SIZE, UserAddress(0), HostOffset(0)),))
            monkeypatch.setattr(postcopy._requests, "ask", lambda *_: other)
            with pytest.raises(PeerError, match="in the same order"):
                postcopy.share(regions[:1])

    @pytest.mark.parametrize("mapped", [True, False])
    def test_our_own_addresses_are_looked_up(self, mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        with scripted(monkeypatch, []) as postcopy, memory() as regions:
            postcopy._frontend.regions.drop(list(postcopy._frontend.regions))
            monkeypatch.setattr(postcopy._requests, "ask", lambda *args: args[2])
            monkeypatch.setattr(postcopy, "_pid", os.getpid())
            if not mapped:
                with pytest.raises(Refused, match="has to map the region"):
                    postcopy.share(regions)
                return
            mapping = Mapping(ByteCount(2 * SIZE), mmap.MAP_SHARED, regions[0].fd, HostOffset(0))
            monkeypatch.setattr(postcopy._requests, "confirm", lambda: None)
            postcopy.share(regions)
            assert [base.address for base in postcopy._bases] == [mapping.address, mapping.address + SIZE]
            mapping.close()

    def test_what_else_is_mapped_there_may_have_any_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        odd = tmp_path / os.fsdecode(b"caf\xe9\x0c\r\x85")
        odd.write_bytes(bytes(4096))
        with odd.open("rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ):
            self.test_our_own_addresses_are_looked_up(True, monkeypatch)

    def test_a_process_that_there_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with scripted(monkeypatch, []) as postcopy, memory() as regions:
            postcopy._frontend.regions.drop(list(postcopy._frontend.regions))
            monkeypatch.setattr(postcopy._requests, "ask", lambda *args: args[2])
            monkeypatch.setattr(postcopy, "_pid", 0)
            with pytest.raises(Refused, match="doesn't show"):
                postcopy.share(regions)
