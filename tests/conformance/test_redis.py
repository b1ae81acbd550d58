"""Failing sequences that machines share: a real Redis server, found by one, begun with by another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis.database import ExampleDatabase
from hypothesis.extra.redis import RedisExampleDatabase

from tests.conformance.test_machine import SMALL
from tests.conformance.wrong import FAULTS
from tests.peers.processes import Peer, running
from tests.peers.tree import command, version
from vhost_user.errors import HostError
from virtio_mem.conformance.explore import Exploration, explore
from virtio_mem.conformance.kit import Run
from virtio_mem.conformance.trial import Trial, open_database

pytestmark = pytest.mark.needs_peers


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """One that keeps nothing on disk."""
    # With --hypothesis-seed, which this suite always sets, Hypothesis uses no database at all.
    monkeypatch.setattr("hypothesis.core.global_force_seed", None)
    socket = tmp_path / "redis"
    options = ("--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path))
    with running("redis", version("redis-server"), command("bin/redis-server", *options), tmp_path, socket) as peer:
        yield peer


@contextmanager
def connected(server: Peer) -> Iterator[ExampleDatabase]:
    """What a machine has of it: nothing else is shared."""
    database = open_database(f"unix://{server.socket}")
    assert isinstance(database, RedisExampleDatabase)
    with database.redis:
        yield database


def moves_to_the_fault(server: Peer, seed: int) -> tuple[int, Exploration]:
    """How many moves a machine makes until it sees the fault for the first time."""
    seen: list[int] = []

    def watch(exploration: Exploration) -> None:
        if exploration.found and not seen:
            seen.append(exploration.moves)

    with FAULTS["nothing-is-given-back"].target() as target, connected(server) as database:
        exploration = explore(target, sequences=60, seed_=seed, wish=SMALL, database=database, rounds=1, progress=watch)
    return seen[0], exploration


@pytest.mark.long
def test_what_one_machine_found_another_begins_with(server: Peer, figure: Callable[[str, object], None]) -> None:
    first, found = moves_to_the_fault(server, 1)
    again, found_again = moves_to_the_fault(server, 2)
    figure("moves to a fault, and of another machine with the same Redis", f"{first}, {again}")
    assert again < first
    assert again <= min(len(one.lines) for one in found.found.values())
    assert found_again.passed_over == found.passed_over


def test_a_server_that_goes_ends_it_and_is_named(server: Peer) -> None:
    def go(_: object) -> None:
        server.process.kill()
        server.process.wait()

    run = Run()
    with FAULTS["no-target"].target() as target:
        Trial(database=f"unix://{server.socket}", progress=go).explore(target, run)
    assert [one.partition(": ")[0] for one in run.failures] == ["machine"]
    assert "ConnectionError" in run.failures[0]
    assert run.violated, "what was found by then"


@pytest.mark.parametrize("url", ["unix:///nowhere/at/all", "redis://localhost:1", "redis://localhost:port"])
def test_a_server_that_is_not_there(url: str) -> None:
    with pytest.raises(HostError, match=f"database={url}: can't be reached"):
        open_database(url)
