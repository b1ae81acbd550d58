"""Descriptors that the kernel does not send: the fault is not the back end's, and the connection goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

import pytest

from tests.frontend import fake as backs
from tests.frontend.fake import LATE, VERSION_1, fake
from vhost_user import _native
from vhost_user.errors import Disconnected, HostError
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.message import FrontendRequest, ProtocolFeature
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset
from vhost_user.vring import SplitLayout

R = FrontendRequest

SIZE = ByteCount(1 * MIB)
BY_TABLE = backs.ALL & ~ProtocolFeature.CONFIGURE_MEM_SLOTS
SPLIT = SplitLayout.place(16, GuestAddress(0))


@pytest.fixture
def regions() -> Iterator[list[SharedRegion]]:
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 3 * SIZE)
        yield [SharedRegion(GuestAddress(n * SIZE), SIZE, fd.fileno(), HostOffset(n * SIZE)) for n in range(3)]


@pytest.mark.parametrize("offered", [backs.ALL, BY_TABLE])
def test_a_host_that_sends_no_descriptors_now_costs_no_connection(
    regions: list[SharedRegion], offered: ProtocolFeature, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, left = _native.send, 1 if offered is backs.ALL else 0

    def refuse(sock: int, data: bytes, fds: Sequence[int]) -> int:
        nonlocal left
        if fds and (left := left - 1) < 0:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        return send(sock, data, fds)

    with fake(offered=offered) as back, Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend:
        frontend.regions.add(regions[0])
        with monkeypatch.context() as patch:
            patch.setattr(_native, "send", refuse)
            with pytest.raises(HostError, match="ETOOMANYREFS"):
                frontend.regions.share(regions[1:])
            with pytest.raises(HostError, match="ETOOMANYREFS"):
                frontend.vring(0).start(SPLIT)
        assert frontend.connected
        assert list(frontend.regions) == regions[:1]
        assert back.requests.count(R.ADD_MEM_REG) - back.requests.count(R.REM_MEM_REG) in (0, 1)
        frontend.regions.share(regions[1:])
        frontend.vring(0).start(SPLIT)
        assert list(frontend.regions) == regions


def test_who_asks_a_front_end_that_was_closed_is_told_so() -> None:
    with fake() as back, Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend:
        frontend.close()
        with pytest.raises(Disconnected, match=r"=no longer connected: was closed; connect again$"):
            frontend.requests.confirm()
