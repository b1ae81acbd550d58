"""A device that makes a mistake while it serves a ring: the front end is told, and the ring can be started anew."""

from __future__ import annotations

import logging
import select
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.backend.devices import Echo
from tests.backend.rig import EVERYTHING, SPLIT, Pair, Running, pair, start_ring
from tests.peers.processes import wait_until
from vhost_user.backend import Vring
from vhost_user.backend.loop import Call, EventLoop
from vhost_user.chain import Chain
from vhost_user.device_status import Status
from vhost_user.errors import HostError, UsageError
from vhost_user.units import GuestAddress


class Mistaken(Echo):
    """Fails with `error`, once the chain was taken, as long as there is one."""

    name = "mistaken"
    error: BaseException | None = None
    fails_after: int | None = None

    def echo(self, chain: Chain) -> int:
        if self.error is not None:
            raise self.error
        if self.served == self.fails_after:
            raise ZeroDivisionError
        return super().echo(chain)


@pytest.fixture
def device() -> Mistaken:
    return Mistaken()


@pytest.fixture(params=[SPLIT, EVERYTHING], ids=["split", "packed"])
def both(request: pytest.FixtureRequest, device: Mistaken, caplog: pytest.LogCaptureFixture) -> Iterator[Pair]:
    with caplog.at_level(logging.WARNING), pair(device, features=request.param) as both:
        yield both


def fail(ring: Running) -> None:
    ring.send(b"a question")
    ring.vring.kick.signal()
    assert select.select([ring.vring.err], [], [], 10)[0], "nobody was told"
    assert ring.vring.failed


@pytest.mark.parametrize("error", [ZeroDivisionError("by 0"), HostError("file", 1, "no"), UsageError("size", 1, "2")])
def test_the_ring_fails_and_the_log_says_so_once(
    error: Exception, both: Pair, device: Mistaken, caplog: pytest.LogCaptureFixture
) -> None:
    ring, other = (start_ring(both.frontend, both.ram, index) for index in (0, 1))
    device.error = error
    fail(ring)
    assert both.frontend.status & Status.NEEDS_RESET
    device.error = None
    for _ in range(3):
        ring.send(b"it is not served")
        ring.vring.kick.signal()
    other.echo(b"the other one is")
    both.frontend.close()
    both.server.stop()
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("vhost_user.backend.vring", "ring 0 of mistaken: its device failed")
    ]
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[1] is error
    assert device.served == 1


def test_what_was_answered_before_is_heard_of(both: Pair, device: Mistaken) -> None:
    """There is no other call for it."""
    ring = start_ring(both.frontend, both.ram, enabled=False)
    while ring.vring.wait(0):
        pass
    device.fails_after = 2
    for each in range(3):
        ring.send(b"%d" % each)
    ring.vring.enable()
    assert ring.vring.failed
    assert ring.vring.wait(5)
    assert [ring.driver.get_used() is not None for _ in range(3)] == [True, True, False]


def test_it_is_started_anew(both: Pair, device: Mistaken) -> None:
    ring = start_ring(both.frontend, both.ram)
    device.error = ZeroDivisionError()
    fail(ring)
    device.error = None
    ring.vring.stop()
    assert not both.frontend.status & Status.NEEDS_RESET
    both.ram.memory.write(GuestAddress(0), bytes(0x10000))
    again = start_ring(both.frontend, both.ram)
    again.echo(b"it is served")
    assert not again.vring.failed


def test_a_mistake_at_the_start_of_a_ring_is_no_other(both: Pair, device: Mistaken) -> None:
    ring = start_ring(both.frontend, both.ram, enabled=False)
    device.error = ZeroDivisionError()
    ring.send(b"it is there when the ring is enabled")
    ring.vring.enable()
    assert both.frontend.status & Status.NEEDS_RESET
    assert both.frontend.connected
    assert ring.vring.failed


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_end_that_was_asked_for_passes(
    error: type[BaseException], device: Mistaken, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[BaseException] = []
    call = EventLoop._call

    def caught(what: Call) -> None:
        try:
            call(what)
        except (KeyboardInterrupt, SystemExit) as end:
            passed.append(end)

    monkeypatch.setattr(EventLoop, "_call", staticmethod(caught))
    device.error = error()
    with pair(device) as both:
        ring = start_ring(both.frontend, both.ram)
        ring.send(b"a question")
        ring.vring.kick.signal()
        with suppress(AssertionError):
            ring.collect(1, timeout=0.1)
        wait_until(lambda: passed, "it passes")
        assert passed == [device.error]
        assert not ring.vring.failed
        ring_of: Vring = both.endpoint.link.session.rings[0]  # type: ignore[union-attr]
        assert ring_of.broken is None
        ring_of.in_flight = 0  # what it took is lost by this test, not by the device
