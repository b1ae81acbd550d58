"""What needs nothing but a look at the device is answered by the C core, while it has the ring in its hands."""

from __future__ import annotations

from collections.abc import Callable

from vhost_user import _native
from virtio_mem.service import DeviceService


class AtOnce:
    """Answers for `service`, as an `Answerer`, where nobody wants to know of each request, and as long as `may()`.

    It is what it has the service's lock by: `with` it, the device is as it was.
    """

    def __init__(self, service: DeviceService, may: Callable[[], bool]) -> None:
        self.raw = _native.Answerer(*service.device.answering())
        self._service = service
        self._may = may

    def ready(self) -> AtOnce | None:
        """See `Answerer`."""
        return None if self._service.tally.looks_at_each or not self._may() else self

    def __enter__(self) -> None:
        self._service.lock.__enter__()
        try:
            self._service.device.prepare()
        except BaseException:
            self._service.lock.__exit__(None, None, None)
            raise

    def __exit__(self, *_: object) -> None:
        self._service.lock.__exit__(None, None, None)
