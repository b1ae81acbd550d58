"""Fixtures: a machine whose API listens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.rig import TWO_ZONES, Machine


@pytest.fixture
def api(tmp_path: Path) -> str:
    """The path of an API socket."""
    return str(tmp_path / "api.sock")


@pytest.fixture
def machine(api: str) -> Iterator[Machine]:
    """Two zones of 64 MiB, mem0 with up to 2 GiB more and mem1 with up to 256 MiB; its API listens at `api`."""
    with Machine(TWO_ZONES, Path(api)) as made:
        yield made
