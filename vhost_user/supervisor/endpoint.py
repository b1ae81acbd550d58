"""Where a device of a worker's is served, at a listener of the supervisor's: front ends come as packets.

All of a session is its server's thread's. What the supervisor says is read in another one, if the worker has several
(worker.py), and left here as errands: a call, and the descriptors that came with the packet. They are run in the order
in which they came; what nobody comes to run any more, since the server has stopped, is closed with the endpoint.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from vhost_user.backend.device import Device
from vhost_user.backend.loop import EventLoop
from vhost_user.backend.server import Endpoint, Server
from vhost_user.owned_fd import OwnedFd, close_all
from vhost_user.supervisor.packets import SESSION, Kind

if TYPE_CHECKING:
    from vhost_user.supervisor.handed import Control, HandedLink

log = logging.getLogger(__name__)

Errand = Callable[["HandedLink", list[OwnedFd]], object]
"""What is to be done with a session. The descriptors are its own from then on."""


class HandedEndpoint(Endpoint):
    """Where one device is served: at the supervisor's listener `name`.

    `number` is the session that the supervisor began last, and belongs to the thread that reads what it says.
    """

    def __init__(self, server: Server, device: Device, name: str, control: Control) -> None:
        super().__init__(server, device, name)
        self._control = control
        self._errands: deque[tuple[Callable[[list[OwnedFd]], object], list[OwnedFd]]] = deque()
        self._call = server.loop.call_soon
        self.number = 0
        self.handed: HandedLink | None = None

    # For the thread that reads what the supervisor says.

    def told_in(self, loop: EventLoop) -> None:
        """What the supervisor says is read in a callback of `loop`."""
        own = self._server.loop
        self._call = own.call_next if loop is own else own.call_soon

    def begin(self, number: int, names: set[object], *, rebuild: bool) -> None:
        """A front end came, or one is here that another process served: its journal follows."""
        self.number = number
        self._post(lambda _: self._begin(number, names, rebuild), [])

    def post(self, errand: Errand, fds: list[OwnedFd]) -> None:
        """Have the errand run with the session that began last, unless it has ended by then. Takes `fds` over."""
        number = self.number

        def run(fds: list[OwnedFd]) -> None:
            if self.handed is not None and self.handed.number == number:
                errand(self.handed, fds)
            else:
                close_all(fds)

        self._post(run, fds)

    def when_done(self, call: Callable[[], object]) -> None:
        """Have `call` called, in the server's thread, after what was posted before."""
        self._post(lambda _: call(), [])

    def _post(self, run: Callable[[list[OwnedFd]], object], fds: list[OwnedFd]) -> None:
        self._errands.append((run, fds))
        self._call(self._run_errand)

    # For the server's.

    def _run_errand(self) -> None:
        run, fds = self._errands.popleft()
        run(fds)

    def _begin(self, number: int, names: set[object], rebuild: bool) -> None:
        from vhost_user.supervisor.handed import HandedLink  # noqa: PLC0415 - `Worker.ready` has imported it

        self.sessions += 1
        try:
            self.handed = HandedLink(self.device, self._server, self._control, number, names, self._gone)
        except Exception:
            log.exception("%s: front end %d can't be served, by a mistake of ours", self.name, number)
            self._control.tell(Kind.ENDED, SESSION.pack(number))
            return
        self._use(self.handed)
        if rebuild:
            self.handed.rebuild()

    @property
    def waits(self) -> bool:
        """Whether an answer is not known yet."""
        return self.handed is not None and self.handed.waits

    def _gone(self) -> None:
        self.handed = None
        super()._gone()

    def close(self) -> None:
        """End the session, unless it is left to another worker. When the server has stopped."""
        self._closed = True
        while self._errands:
            close_all(self._errands.popleft()[1])
        if self.handed is not None and self._control.retired:
            self.handed.abandon()
        elif self.handed is not None:
            self.handed.close()
