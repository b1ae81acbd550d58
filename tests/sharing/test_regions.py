"""The front end's list of regions: several come or go together, and none overlaps another."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.sharing.daemon import ADD, GET_FEATURES, REM, FakeDaemon
from tests.sharing.helpers import BLOCK, daemon_at
from vhost_user.errors import Refused, UsageError
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.units import GIB, ByteCount, GuestAddress, HostOffset, UserAddress


def other_region(fd: int, n: int, size: int = BLOCK) -> SharedRegion:
    return SharedRegion(GuestAddress(GIB + n * BLOCK), ByteCount(size), fd)


@pytest.fixture
def alone() -> Iterator[tuple[FakeDaemon, Frontend, int]]:
    fd = os.memfd_create("region", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * BLOCK)
    try:
        with daemon_at() as (daemon, frontend):
            yield daemon, frontend, fd
    finally:
        os.close(fd)


def test_several_regions_come_and_go_together(alone: tuple[FakeDaemon, Frontend, int]) -> None:
    daemon, frontend, fd = alone
    regions = [other_region(fd, n) for n in range(4)]
    frontend.regions.share([])
    frontend.regions.unshare([])
    frontend.regions.share(regions)
    assert list(frontend.regions) == regions
    assert daemon.requests[-5:] == [ADD] * 4 + [GET_FEATURES]
    with pytest.raises(UsageError, match="is shared"):
        frontend.regions.unshare([regions[0], other_region(fd, 9)])
    assert len(daemon.regions) == 4
    daemon.refuses, daemon.chances = {REM}, 2
    with pytest.raises(Refused):
        frontend.regions.unshare(regions)
    assert len(daemon.regions) == len(frontend.regions) == 4
    daemon.behave()
    frontend.regions.unshare([regions[1], regions[1], regions[3]])
    assert list(frontend.regions) == [regions[0], regions[2]]
    assert sorted(daemon.regions) == [regions[0].guest_address, regions[2].guest_address]


def test_overlapping_regions_are_refused(alone: tuple[FakeDaemon, Frontend, int]) -> None:
    daemon, frontend, fd = alone
    frontend.regions.share([other_region(fd, 1), other_region(fd, 3)])
    for regions in (
        [other_region(fd, 0, BLOCK + 1)],
        [other_region(fd, 3, 4096)],
        [other_region(fd, 0), other_region(fd, 0, 4096)],
        [SharedRegion(GuestAddress(0), ByteCount(BLOCK), fd, user_address=UserAddress(GIB + BLOCK + 4096))],
    ):
        with pytest.raises(UsageError, match="overlaps"):
            frontend.regions.share(regions)
    frontend.regions.share([other_region(fd, 0), other_region(fd, 2)])
    assert len(daemon.regions) == 4


@pytest.mark.parametrize("fd", [-1, 999_999, 1 << 40, True, "a", None])
def test_a_region_of_no_open_file_is_refused_and_costs_nothing(
    alone: tuple[FakeDaemon, Frontend, int], fd: object
) -> None:
    daemon, frontend, _ = alone
    regions, asked = [other_region(alone[2], 0), other_region(fd, 1)], len(daemon.requests)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^fd=.*: has to be the number of an open file") as refused:
        frontend.regions.share(regions)
    assert refused.value.field == "fd"
    assert (len(frontend.regions), len(daemon.requests)) == (0, asked)
    frontend.regions.share(regions[:1])
    assert frontend.connected


@pytest.mark.parametrize(
    ("size", "offset", "limit"),
    [
        (0, 0, "size=0: has to be 1 or more"),
        (-4096, 0, "size=-4096: has to be 1 or more"),
        (2 * BLOCK + 1, 0, f"region=0[+]{2 * BLOCK + 1}: has to lie in the file, which has {2 * BLOCK} bytes"),
        (BLOCK, BLOCK + 1, "has to lie in the file"),
        (BLOCK, -1, "has to lie in the file"),
        (BLOCK, 1 << 63, "has to lie in the file"),
    ],
)
def test_a_region_that_is_not_in_its_file_is_refused_and_costs_nothing(
    alone: tuple[FakeDaemon, Frontend, int], size: int, offset: int, limit: str
) -> None:
    daemon, frontend, fd = alone
    asked = len(daemon.requests)
    with pytest.raises(UsageError, match=limit):
        frontend.regions.add(SharedRegion(GuestAddress(GIB), ByteCount(size), fd, HostOffset(offset)))
    assert (len(frontend.regions), len(daemon.requests), frontend.connected) == (0, asked, True)


def test_addresses_are_translated_within_one_region(alone: tuple[FakeDaemon, Frontend, int]) -> None:
    _, frontend, fd = alone
    os.pwrite(fd, b"bytes", 4096)
    regions = frontend.regions
    regions.share([SharedRegion(GuestAddress(GIB), ByteCount(BLOCK), fd, user_address=UserAddress(0x1000))])
    regions.add(other_region(fd, 1))
    assert regions.to_user(GIB + 4096, 16) == 0x2000
    assert regions.to_user(GIB + BLOCK, BLOCK) == GIB + BLOCK
    assert regions.read(GuestAddress(GIB + 4096), 5) == b"bytes"
    for address, size in ((GIB - 1, 1), (GIB + BLOCK - 1, 2), (GIB - 1, 2), (GIB + 2 * BLOCK, 1)):
        with pytest.raises(UsageError, match="one shared region"):
            regions.to_user(address, size)


def test_a_back_end_that_comes_back_to_nothing(alone: tuple[FakeDaemon, Frontend, int]) -> None:
    daemon, frontend, _ = alone
    frontend.reconnect(daemon.start())
    assert frontend.connected
    assert ADD not in daemon.requests
