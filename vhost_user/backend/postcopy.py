"""Postcopy on the back end's side: the machine has moved here, and its memory is still coming.

The front end asks for a userfaultfd (ADVISE), has it watch the memory that is shared from then on (LISTEN), and answers
the faults that it tells of, until all memory is here (END). What was shared before is not watched. A table that comes
while it listens is answered by where its regions are in this process, since that is what faults name; and memory is not
to be touched before the front end has acknowledged that, by a table without regions.

A fault holds the thread that meets it until the front end answers: the loop, and every device in it. So only a device
that says so offers PAGEFAULT, and it should have a process of its own. The offer goes without CONFIGURE_MEM_SLOTS, as
how regions that are added one by one are acknowledged differs from one front end to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vhost_user import _native
from vhost_user.backend.answer import Answer, Handler
from vhost_user.backend.negotiated import Negotiated
from vhost_user.errors import HostError, PeerError
from vhost_user.message import U64, Empty, FrontendRequest, MemoryRegion, MemoryTable
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import UserAddress

if TYPE_CHECKING:
    from vhost_user.memory import Region


class PostcopyHandlers:
    """The handlers of the postcopy messages, and the userfaultfd."""

    def __init__(self, negotiated: Negotiated) -> None:
        self._negotiated = negotiated
        self._uffd: OwnedFd | None = None
        self._watched: list[Region] = []
        self.unacknowledged = False
        """Whether a table's addresses were told, and the front end has not yet said that it answers faults there."""
        self.table: Mapping[FrontendRequest, Handler] = {
            FrontendRequest.POSTCOPY_ADVISE: self._advise,
            FrontendRequest.POSTCOPY_LISTEN: self._listen,
            FrontendRequest.POSTCOPY_END: self._end,
        }

    def _advise(self, *_: object) -> Answer:
        try:
            uffd = OwnedFd(_native.userfault_open())
        except OSError as error:
            remedy = "give the back end CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd"
            raise HostError.from_os_error("userfaultfd", "new", "userfaultfd", error, remedy) from error
        self.close()
        self._uffd = uffd
        return Answer(Empty().encode(), (uffd.duplicate(),))

    def _listen(self, *_: object) -> None:
        if self._uffd is None:
            raise PeerError("POSTCOPY_LISTEN", "sent", "has to come after POSTCOPY_ADVISE")
        self._negotiated.postcopy = True

    def _end(self, *_: object) -> Answer:
        if not self._negotiated.postcopy:
            raise PeerError("POSTCOPY_END", "sent", "has to come after POSTCOPY_LISTEN")
        self.close()
        return Answer(U64(0).encode())

    def watch(self, regions: Sequence[Region]) -> None:
        """Have faults in `regions`, which nothing has touched yet, go to the front end. HostError where that fails."""
        assert self._uffd is not None
        for region in regions:
            try:
                _native.userfault_register(self._uffd.fileno(), region.mapping.address, region.mapping.size)
            except OSError as error:
                raise HostError.from_os_error("region", region, "UFFDIO_REGISTER", error) from error
        self._watched = list(regions)
        self.unacknowledged = True

    def close(self) -> None:
        """Have faults be the kernel's again. What was watched and is unmapped by now needs nothing."""
        uffd, self._uffd = self._uffd, None
        self._negotiated.postcopy = self.unacknowledged = False
        if uffd is None:
            return
        for region in self._watched:
            if not region.mapping.closed:
                _native.userfault_unregister(uffd.fileno(), region.mapping.address, region.mapping.size)
        self._watched = []
        uffd.close()


def told(table: MemoryTable, regions: Sequence[Region]) -> MemoryTable:
    """The table that answers `table`: where each of its regions is in this process, in place of its user address."""
    places = {region.guest_address: region.mapping.address + region.offset for region in regions}

    def here(region: MemoryRegion) -> MemoryRegion:
        return replace(region, user_address=UserAddress(places[region.guest_address]))

    return MemoryTable(tuple(here(region) for region in table.regions))
