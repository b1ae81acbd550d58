"""A worker's side of the supervisor."""

from __future__ import annotations

from typing import Self

from vhost_user.backend import Device, Endpoint, Server
from vhost_user.owned_fd import OwnedFd


class Worker:
    """What the supervisor of this process keeps for it, and the front ends that it hands on.

    `bytes` and `fds` are what was kept when this worker began, and what it keeps itself since. Any thread may call
    `put`, `put_fd` and `drop`. `first` says whether no worker was here before.
    """

    bytes: dict[str, bytes]
    fds: dict[str, OwnedFd]
    first: bool

    @classmethod
    def from_environment(cls) -> Self:
        """The supervisor that started this process. UsageError where none did."""
        raise NotImplementedError

    def put(self, name: str, data: bytes) -> None:
        """Keep `data`, at most 1 MiB, in place of what was kept under `name`; nothing where it is empty.

        It is kept once this returns, whatever becomes of this process.
        """
        raise NotImplementedError

    def put_fd(self, name: str, fd: int | OwnedFd) -> None:
        """Keep a duplicate of `fd` under `name`, as `put`."""
        raise NotImplementedError

    def drop(self, name: str) -> None:
        """Keep neither bytes nor a descriptor under `name`."""
        raise NotImplementedError

    def attach(self, server: Server, name: str, device: Device) -> Endpoint:
        """Have `server` serve `device` to the front ends of the listener `name`. Before `ready()`."""
        raise NotImplementedError

    def ready(self) -> None:
        """Every device is attached: front ends may come. SIGTERM has `server.stop()` called from now on."""
        raise NotImplementedError

    @property
    def retired(self) -> bool:
        """Whether another worker takes this one's place: `Server.close()` then leaves sessions to it, as they are."""
        raise NotImplementedError
