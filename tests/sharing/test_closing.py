"""A machine's memory is taken back from daemons: by a share that is closed, and by the manager with all that it has."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sharing.daemon import ADD, REM
from tests.sharing.helpers import ACK, daemon_at, manage, plug, service_of, slots_of
from vhost_user.errors import Disconnected, Refused, UsageError
from vhost_user.units import GuestAddress
from vhost_user.vring import SplitLayout
from virtio_mem.sharing import MemoryShare


def test_closing_a_share_takes_everything_back() -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        share = manager.share(frontend)
        plug(manager, 0, 3)
        share.close()
        share.close()
        assert daemon.regions == {}
        assert manager.shares == manager.info()["daemons"] == []
        assert service_of(manager).listeners == []
        assert plug(manager, 5) is ACK
        manager.share(frontend)
        assert slots_of(daemon, manager) == [(0, 1), (1, 1), (2, 1), (5, 1)]


@pytest.mark.parametrize("why", ["refuses", "has a ring", "is gone", "was robbed"])
def test_a_daemon_that_does_not_give_back_loses_the_connection(why: str) -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        share = manager.share(frontend)
        plug(manager, 0, 3)
        if why == "refuses":
            daemon.refuses = {REM}
        elif why == "has a ring":
            frontend.vring(0).start(SplitLayout.place(16, GuestAddress(0)))
        elif why == "is gone":
            daemon.end()
        else:
            frontend.regions.remove(next(iter(frontend.regions)))
        share.close()
        assert not share.connected
        assert list(frontend.regions) == []


def test_a_manager_takes_its_memory_with_it() -> None:
    with daemon_at() as (daemon, frontend):
        with manage() as manager:
            manager.share(frontend)
            assert len(daemon.regions) == 1
        assert daemon.regions == {}
        assert frontend.connected


def test_a_share_that_is_made_while_another_thread_closes_the_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(MemoryShare):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            manager.close()

    monkeypatch.setattr("virtio_mem.manager.MemoryShare", Slow)
    with manage() as manager, daemon_at() as (daemon, frontend):
        with pytest.raises(UsageError, match="manager=closed"):
            manager.share(frontend)
        assert daemon.regions == {}
        assert not manager.shares


def test_a_daemon_that_refuses_at_first_has_nothing() -> None:
    with manage() as manager, daemon_at() as (daemon, frontend):
        daemon.refuses, daemon.chances = {ADD}, 1
        plug(manager)
        with pytest.raises(Refused):
            manager.share(frontend)
        assert daemon.regions == {}
        assert not manager.shares
        assert not service_of(manager).listeners
        daemon.end()
        with pytest.raises(Disconnected):
            manager.share(frontend)
