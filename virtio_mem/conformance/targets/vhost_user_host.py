"""The host's side of a device behind a vhost-user socket, by the API that `virtio-mem serve` has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vhost_user.errors import FieldError, UsageError
from virtio_mem.client import Client, NotNow
from virtio_mem.conformance.target import Refused, TargetFailure
from virtio_mem.conformance.targets.vhost_user_link import PATIENCE


class HostSide:
    """The API's part of a device: that of the zone whose region lies at `addr`.

    Its methods raise TargetFailure where the API fails. The constructor does so where it has no such zone.
    """

    def __init__(self, path: str, addr: int) -> None:
        self._client = Client(path, timeout=PATIENCE)
        with self._answering():
            self.version = str(self._client.ping().get("version", "unknown"))
            zones = [zone for zone in self._client.info()["zones"] if zone["addr"] == addr]
        if not zones:
            raise TargetFailure(f"{path}: the API has no zone whose region is at {addr:#x}, as the device's is")
        self._zone, self._boot_size = zones[0]["id"], zones[0]["boot_size"] or 0
        self._target_before = zones[0]["requested_size"]

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except FieldError as error:
            raise TargetFailure(f"{self._client.path}: {error}") from error

    def resize(self, requested_size: int) -> None:
        """The device's target. Refused where the API says that it can't be."""
        with self._answering():
            try:
                self._client.resize_zone(self._zone, self._boot_size + requested_size)
            except UsageError as error:
                raise Refused(str(error)) from None

    def system_reset(self) -> None:
        """The machine is reset. That the device would not give its blocks back just now is for its driver to see."""
        with self._answering(), suppress(NotNow):
            self._client.system_reset()

    def pause(self, paused: bool) -> None:
        """As before a snapshot."""
        with self._answering():
            (self._client.pause if paused else self._client.resume)()

    def put_back(self) -> None:
        """Leave the device as it was found, as far as the API goes."""
        with suppress(TargetFailure, Refused):
            self.pause(False)
            self.resize(self._target_before)
