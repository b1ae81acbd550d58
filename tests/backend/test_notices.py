"""Notices that the configuration changed: when they are sent, and when they are held back."""

from __future__ import annotations

import select
import threading

from tests.backend.rig import Pair, confirm_often, pair, start_ring
from vhost_user.frontend import Frontend


def test_a_change_of_configuration_is_told() -> None:
    with pair() as both:
        start_ring(both.frontend, both.ram)
        for expected in (1, 2):
            both.endpoint.config_changed()
            while both.frontend.channel is None or both.frontend.channel.config_changes < expected:
                both.frontend.requests.confirm()
                both.frontend.serve_channel()


def wait_for_calls(both: Pair) -> None:
    """The loop has made the calls that it was asked for. Messages may have come before them, however many."""
    made = threading.Event()
    both.server.loop.call_soon(made.set)
    assert made.wait(20)


def wait_for_notice(frontend: Frontend) -> None:
    """One has come, and is not read."""
    assert frontend.channel is not None
    assert select.select([frontend.channel], [], [], 30)[0]


def test_quiet_ends_with_the_notices_that_came_meanwhile() -> None:
    with pair() as both:
        channel = both.frontend.channel
        assert channel is not None
        start_ring(both.frontend, both.ram)
        with both.endpoint.quiet(30), both.endpoint.quiet(30):
            for _ in range(3):
                both.endpoint.config_changed()
            wait_for_calls(both)
            assert not select.select([channel], [], [], 0)[0]
        wait_for_notice(both.frontend)
        both.frontend.serve_channel()
        confirm_often(both.frontend)
        both.frontend.serve_channel()
        assert channel.config_changes == 1


def test_quiet_begins_when_all_notices_are_read_or_after_a_while() -> None:
    with pair() as both:
        channel = both.frontend.channel
        assert channel is not None
        start_ring(both.frontend, both.ram)
        both.endpoint.config_changed()
        wait_for_notice(both.frontend)
        with both.endpoint.quiet(0.05):
            assert channel.config_changes == 0
        began = threading.Event()

        def stop_the_device() -> None:
            with both.endpoint.quiet(30):
                began.set()

        stopping = threading.Thread(target=stop_the_device)
        stopping.start()
        assert not began.wait(0.1)
        both.frontend.serve_channel()
        assert began.wait(20)
        stopping.join()
        assert channel.config_changes == 1


def test_a_change_of_configuration_is_not_told_while_all_rings_are_stopped() -> None:
    with pair() as both:
        channel = both.frontend.channel
        assert channel is not None
        ring = start_ring(both.frontend, both.ram, enabled=False)
        for _ in range(2):
            both.endpoint.config_changed()
        wait_for_calls(both)
        both.frontend.serve_channel()
        assert channel.config_changes == 0
        ring.vring.enable()
        while channel.config_changes < 1:
            both.frontend.requests.confirm()
            both.frontend.serve_channel()
        base = ring.vring.stop()
        both.endpoint.config_changed()
        wait_for_calls(both)
        both.frontend.serve_channel()
        assert channel.config_changes == 1
        ring.vring.start(ring.layout, base)
        while channel.config_changes < 2:
            both.frontend.requests.confirm()
            both.frontend.serve_channel()
