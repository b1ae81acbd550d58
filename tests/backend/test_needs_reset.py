"""DEVICE_NEEDS_RESET: a ring that broke shows in the device status, and a driver that runs has a notice of it."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable

import pytest

from tests.backend.rig import Pair, Running, pair, start_ring
from vhost_user.device_status import Status
from vhost_user.frontend import Frontend
from vhost_user.units import GuestAddress

RUNNING = 15
"""A driver's status that has started its device."""


def break_ring(both: Pair, ring: Running) -> None:
    """Have the driver's index run ahead by more than the ring has room for."""
    at = GuestAddress(ring.layout.areas["avail"].address + 2)
    both.ram.memory.store16(at, 9999)
    ring.vring.kick.signal()
    assert select.select([ring.vring.err], [], [], 10)[0]
    both.ram.memory.store16(at, 0)


def notices(both: Pair) -> int:
    """How many have come by now."""
    both.frontend.requests.confirm()
    assert both.frontend.channel is not None
    both.frontend.serve_channel()
    return both.frontend.channel.config_changes


@pytest.mark.clause("STATUS-4", "STATUS-5")
def test_a_ring_that_broke_shows_and_is_told_of_once() -> None:
    with pair() as both:
        broken, good = (start_ring(both.frontend, both.ram, index) for index in (0, 1))
        both.frontend.status = RUNNING
        assert (both.frontend.status, notices(both)) == (RUNNING, 0)
        break_ring(both, broken)
        assert both.frontend.status == RUNNING | Status.NEEDS_RESET
        good.echo(b"the other one lives")
        assert (both.frontend.status, notices(both)) == (RUNNING | Status.NEEDS_RESET, 1)


@pytest.mark.clause("STATUS-5")
def test_a_driver_that_does_not_run_yet_is_told_when_it_does() -> None:
    with pair() as both:
        break_ring(both, start_ring(both.frontend, both.ram))
        assert (both.frontend.status, notices(both)) == (Status.NEEDS_RESET, 0)
        both.frontend.status = RUNNING & ~Status.DRIVER_OK
        assert (both.frontend.status, notices(both)) == (RUNNING & ~Status.DRIVER_OK | Status.NEEDS_RESET, 0)
        both.frontend.status = RUNNING
        assert (both.frontend.status, notices(both)) == (RUNNING | Status.NEEDS_RESET, 1)
        both.frontend.status = both.frontend.status
        assert notices(both) == 1, "it runs, and has been told"


def reset_device(frontend: Frontend, _: Running) -> int:
    frontend.reset_device()
    return 0


def reset_status(frontend: Frontend, _: Running) -> int:
    frontend.status = 0
    return 0


def stop_ring(_: Frontend, ring: Running) -> int:
    ring.vring.stop()
    return RUNNING


@pytest.mark.clause("STATUS-4")
@pytest.mark.parametrize("reset", [reset_device, reset_status, stop_ring])
def test_a_reset_ends_it(reset: Callable[[Frontend, Running], int]) -> None:
    with pair() as both:
        ring = start_ring(both.frontend, both.ram)
        both.frontend.status = RUNNING
        break_ring(both, ring)
        both.frontend.status |= 0  # as QEMU adds bits: what it reads, it writes
        expected = reset(both.frontend, ring)
        assert both.frontend.status == expected
        if ring.vring.started:
            ring.vring.stop()
        start_ring(both.frontend, both.ram).echo(b"made anew")
        both.frontend.status = RUNNING
        assert both.frontend.status == RUNNING


def test_a_status_of_0_leaves_rings_that_run() -> None:
    with pair() as both:
        broken, good = (start_ring(both.frontend, both.ram, index) for index in (0, 1))
        break_ring(both, broken)
        both.frontend.status = 0
        good.echo(b"runs on")


def test_no_driver_sets_it() -> None:
    with pair() as both:
        start_ring(both.frontend, both.ram)
        both.frontend.status = RUNNING | Status.NEEDS_RESET
        assert (both.frontend.status, notices(both)) == (RUNNING, 0)


def test_the_notice_waits_while_the_endpoint_is_quiet() -> None:
    with pair() as both:
        ring = start_ring(both.frontend, both.ram)
        both.frontend.status = RUNNING
        with both.endpoint.quiet(30):
            break_ring(both, ring)
            assert (both.frontend.status, notices(both)) == (RUNNING | Status.NEEDS_RESET, 0)
        over = threading.Event()
        both.server.loop.call_soon(over.set)
        assert over.wait(20)
        assert notices(both) == 1
