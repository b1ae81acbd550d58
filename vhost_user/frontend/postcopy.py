"""Postcopy: the machine runs here before its memory has come, and its pages are fetched when they are touched.

The guest's faults are the VMM's own business. A back end's are told by its userfaultfd, which it hands over:

    postcopy = Postcopy(frontend, page)     ADVISE: the back end opens its userfaultfd
    postcopy.listen()                       LISTEN: from now on missing pages fault
    postcopy.share(regions)                 SET_MEM_TABLE: where the back end maps them, and that we are ready
    ... rings are started; `serve()` whenever the userfaultfd can be read ...
    postcopy.end()                          all pages are there

While a request waits for its answer, and while a ring waits for a call, faults are served too: the back end may be held
up by one. `page(region, offset, size)` gives what belongs there, from wherever the machine comes; it is called once or
more for each page that a back end needs, and may fetch it over a network for as long as it takes.

A fault's address is one in the back end's process, so it must be known where that has its regions. By the document the
answer to SET_MEM_TABLE says so. QEMU's own back end library answers with the front end's addresses instead, unchanged;
then the process whose id the caller gives is looked at, by /proc/PID/maps, which the same user may.

Memory is told by whole tables, also where regions could come one by one: the document says how ADD_MEM_REG is answered
in postcopy, but not what acknowledges that, and the one back end known to us accepts nothing there.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vhost_user import _native
from vhost_user.errors import HostError, PeerError, Refused, UsageError
from vhost_user.frontend.regions import SharedRegion
from vhost_user.mapping import page_size_of
from vhost_user.message import U64, Empty, FrontendRequest, MemoryTable, ProtocolFeature
from vhost_user.units import U64_MAX, ByteCount, HostAddress, HostOffset

if TYPE_CHECKING:
    from vhost_user.frontend.frontend import Frontend

PageSource = Callable[[SharedRegion, HostOffset, ByteCount], bytes]
"""Gives the page of a region that is at an offset from its start: as many bytes as the size says."""

_USERFAULTFD = "anon_inode:[userfaultfd]"
"""What /proc/self/fd says of one."""

_FAULTS_AT_ONCE = 64
"""A back end that faults without end doesn't keep the caller longer than that."""

_WAITING_AT_MOST = 1024
"""Faults that can't be answered yet. A thread has one at a time, and no back end has that many threads."""


class _Base(NamedTuple):
    """A region, where the back end has it, and the size of its pages."""

    region: SharedRegion
    address: HostAddress
    page_size: ByteCount


class Postcopy:
    """The postcopy phase of one back end; making it is POSTCOPY_ADVISE. `pid` is the back end's process, if known.

    Raises Refused where the back end has no userfaultfd to give, PeerError for a descriptor that is none.
    """

    def __init__(self, frontend: Frontend, page: PageSource, *, pid: int | None = None) -> None:
        if not frontend.has(ProtocolFeature.PAGEFAULT):
            raise Refused("PAGEFAULT", "not negotiated", "the back end has to offer it", "use another daemon")
        self._frontend = frontend
        self._requests = frontend.requests
        self._page = page
        self._pid = pid
        self._bases: list[_Base] = []
        self._waiting: deque[int] = deque()
        self.faults = 0
        """How many faults were answered by a page."""
        _, fds = self._requests.ask_for_fds(FrontendRequest.POSTCOPY_ADVISE, Empty)
        if not fds:
            raise Refused("POSTCOPY_ADVISE", "no descriptor", "the back end has to open a userfaultfd", "allow it to")
        self._uffd = fds[0]
        target = str(Path(f"/proc/self/fd/{self._uffd.fileno()}").readlink())
        if target != _USERFAULTFD:
            self._uffd.close()
            raise PeerError("POSTCOPY_ADVISE", target, "has to be a userfaultfd")

    def fileno(self) -> int:
        """The userfaultfd, for a selector: `serve()` when it can be read."""
        return self._uffd.fileno()

    def listen(self) -> None:
        """POSTCOPY_LISTEN: what the back end is given from now on faults where it is missing."""
        self._requests.tell(FrontendRequest.POSTCOPY_LISTEN)
        self._requests.postcopy = True
        self._requests.watched[self.fileno()] = self.serve

    def share(self, regions: Iterable[SharedRegion]) -> None:
        """Have `regions` be all the memory of the back end, eight of them at most. After `listen()`, and once.

        Raises UsageError where memory is shared already or regions overlap, PeerError for an answer that is not about
        them, Refused where the back end's addresses can't be learnt.
        """
        new, requests = tuple(regions), self._requests
        if not requests.postcopy or len(self._frontend.regions):
            raise UsageError(
                "regions", len(self._frontend.regions), "have to be shared once, after listen()", "listen first"
            )
        pages = [_page_size(region) for region in new]
        with requests.lock:
            table = MemoryTable(tuple(region.wire for region in new))
            fds = [region.fd for region in new]
            answer = requests.ask(FrontendRequest.SET_MEM_TABLE, MemoryTable, table, fds)
            addresses = self._addresses(new, table, answer)
            self._bases = [_Base(*base) for base in zip(new, addresses, pages, strict=True)]
            # Eight zero bytes, which some back ends insist on.
            requests.send(FrontendRequest.SET_MEM_TABLE, MemoryTable(()))
            requests.confirm()
            self._frontend.regions.keep(new)

    def _addresses(self, new: tuple[SharedRegion, ...], sent: MemoryTable, answer: MemoryTable) -> list[HostAddress]:
        keys = [[(wire.guest_address, wire.size) for wire in table.regions] for table in (sent, answer)]
        if keys[0] != keys[1]:
            raise PeerError("SET_MEM_TABLE", answer, "has to have the regions that were sent, in the same order")
        if new and answer == sent:
            return _look_up(self._pid, new)
        return _checked(new, answer)

    def serve(self) -> None:
        """Answer the faults that there are. PeerError for one in no region, HostError where the kernel refuses."""
        with self._requests.lock:
            again, self._waiting = self._waiting, deque()
            for address in again:
                self._answer(address)
            for _ in range(_FAULTS_AT_ONCE):
                try:
                    fault = _native.fault_take(self.fileno())
                except OSError as error:
                    raise PeerError(
                        "userfaultfd", os.strerror(error.errno or 0), "has to tell of page faults"
                    ) from error
                if fault is None:
                    return
                self._answer(fault)

    def _answer(self, address: int) -> None:
        base = next((base for base in self._bases if 0 <= address - base.address < base.region.size), None)
        if base is None:
            raise PeerError("page fault", f"{address:#x}", "has to lie in a region that is shared")
        region, start, page_size = base
        page_address = address - address % page_size
        page = self._page(region, HostOffset(page_address - start), page_size)
        assert len(page) == page_size
        try:
            self.faults += _native.fault_fill(self.fileno(), page_address, page)
        except BlockingIOError:
            self._wait_with(address)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ESRCH}:  # nobody waits for it any more
                raise HostError.from_os_error("page fault", f"{address:#x}", "UFFDIO_COPY", error) from error

    def _wait_with(self, address: int) -> None:
        """Its process changes its mappings just now: tried again at the next `serve()`."""
        if len(self._waiting) == _WAITING_AT_MOST:
            raise PeerError("page faults", _WAITING_AT_MOST, "may wait at most", "close the connection")
        self._waiting.append(address)

    def end(self) -> None:
        """POSTCOPY_END: all pages have come, and none faults any more. Raises Refused where the back end says no."""
        code = self._requests.ask(FrontendRequest.POSTCOPY_END, U64).value
        if code:
            raise Refused("POSTCOPY_END", code, "was answered by a failure")
        self.close()

    def close(self) -> None:
        """Close the userfaultfd: whoever still waits for a page waits on. Closing twice is allowed."""
        if not self._uffd.closed:
            self._requests.watched.pop(self.fileno(), None)
            self._requests.postcopy = False
            self._uffd.close()

    def __enter__(self) -> Postcopy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _page_size(region: SharedRegion) -> ByteCount:
    size = page_size_of(region.fd)
    if region.offset % size or region.size % size:
        raise UsageError("region", region, f"has to consist of whole pages of {size} bytes of its file")
    return size


def _checked(regions: tuple[SharedRegion, ...], answer: MemoryTable) -> list[HostAddress]:
    """Where the back end says that it has mapped the regions. PeerError where no mapping of theirs can be."""
    bases = [HostAddress(wire.user_address) for wire in answer.regions]
    for region, base in zip(regions, bases, strict=True):
        page_size = _page_size(region)
        if (base - region.offset) % page_size or base + region.size - 1 > U64_MAX:
            limit = f"has to be a mapping's, by pages of {page_size}, of {region.size:#x} bytes"
            raise PeerError("SET_MEM_TABLE address", f"{base:#x}", limit)
    spans = sorted((base, base + region.size) for region, base in zip(regions, bases, strict=True))
    for (_, end), (start, _) in pairwise(spans):
        if end > start:
            raise PeerError("SET_MEM_TABLE address", f"{start:#x}", "may be no part of another region's mapping")
    return bases


def _look_up(pid: int | None, regions: tuple[SharedRegion, ...]) -> list[HostAddress]:
    """Where a process has mapped these regions' files."""
    if pid is None:
        raise Refused("SET_MEM_TABLE", "our own addresses", "the back end's are needed to serve it", "give its pid")
    try:
        lines = os.fsdecode(Path(f"/proc/{pid}/maps").read_bytes()).split("\n")[:-1]
    except OSError as error:
        limit = f"the back end's are needed, which process {pid} doesn't show"
        raise Refused("SET_MEM_TABLE", "our own addresses", limit) from error
    return [_find(lines, region) for region in regions]


def _find(lines: list[str], region: SharedRegion) -> HostAddress:
    status = os.fstat(region.fd)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino)
    for line in lines:
        addresses, _, offset, device, inode, *_ = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        first = int(offset, 16)
        if (device, inode) == file and first <= region.offset and region.offset + region.size <= first + end - start:
            return HostAddress(start + region.offset - first)
    raise Refused("SET_MEM_TABLE", "our own addresses", f"the back end has to map the region {region}")
