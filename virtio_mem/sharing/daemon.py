"""One daemon as the memory's side sees it: it is given regions and they are taken from it.

It can be in three states. *Connected*: it is asked, and may refuse. *Lingering*: it gave no answer or a wrong one, so
the connection was ended, but its own end is open still, and it may use all that it was given. *Gone*: it closed its
end, or the front end was closed; what it had, it has no more. For a daemon that is not connected the regions are
listed, and the next one gets them, by `Frontend.reconnect()`.

To undo a step must not fail. Where the daemon refuses that too it is given up: it would have memory that is unplugged,
or lack some that is plugged and fail the guest's requests for no reason that anybody could find.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from vhost_user.errors import Disconnected, FieldError, HostError
from vhost_user.frontend import Frontend, SharedRegion

log = logging.getLogger(__name__)


class Daemon:
    """The daemon at the other end of `frontend`; `name` is for errors and logs."""

    def __init__(self, frontend: Frontend, name: str) -> None:
        self.frontend = frontend
        self.name = name
        self._requests = frontend.requests
        self._regions = frontend.regions

    @property
    def connected(self) -> bool:
        """Whether nothing has ended the connection; that the daemon closed it is seen now."""
        self._requests.notice_end()
        return self._requests.connected

    @property
    def lingering(self) -> bool:
        """Whether it was given up, and may use what it has all the same."""
        return self._requests.lingering

    def give(self, regions: Sequence[SharedRegion], *, undoing: bool = False) -> None:
        """Share `regions` with it. HostError where it refuses, and then it has none of them; not if `undoing`."""
        with self._requests.lock:
            if not self.connected:
                self._regions.keep(regions)
                return
            try:
                self._regions.share(regions)
            except FieldError as error:
                if not undoing:
                    raise self._refusal("takes new memory", error) from error
                self._give_up(error)
                self._regions.keep(regions)

    def take(self, regions: Sequence[SharedRegion], *, undoing: bool = False) -> None:
        """Have it unmap `regions`. HostError where it may have them still, and all others too; not if `undoing`."""
        with self._requests.lock:
            try:
                if self.connected:
                    self._require_no_ring(regions)
                    self._regions.unshare(regions)
                    return
                if self.lingering and not undoing:
                    limit = "gave no good answer, and has its end of the connection open: it may use the memory"
                    raise HostError(f"daemon {self.name}", "lingering", limit, "end it, or close its front end")
            except Disconnected as error:
                log.info("%s: %s", self.name, error)
                return
            except FieldError as error:
                if not undoing:
                    raise self._refusal("gives back memory", error) from error
                self._give_up(error)
            self._regions.drop(regions)

    def take_for_good(self, regions: Sequence[SharedRegion]) -> None:
        """Have it unmap `regions`, or end the connection."""
        with self._requests.lock:
            try:
                self.take(regions)
            except FieldError as error:
                self._give_up(error)
                self._regions.drop(region for region in regions if region in self._regions)

    def _give_up(self, error: FieldError) -> None:
        log.warning("daemon %s is given up: %s", self.name, error)
        self._requests.give_up()

    def _refusal(self, limit: str, error: FieldError) -> HostError:
        if isinstance(error, HostError):
            return error
        return HostError(f"daemon {self.name}", error.value, f"{limit} ({error})", "look into the daemon's log")

    def _require_no_ring(self, regions: Iterable[SharedRegion]) -> None:
        """Daemons were seen to crash when the memory of a running ring goes, so they are not even asked."""
        for vring in tuple(self.frontend.vrings.values()):
            if not vring.started or vring.layout is None:
                continue
            for area in vring.layout.areas.values():
                for region in regions:
                    if region.guest_address < area.address + area.size and area.address < region.end:
                        limit = f"ring {vring.index} of daemon {self.name} runs in it"
                        raise HostError("region", region, limit, "stop the ring first")
