"""Machines with the API in front of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.api.rig import TWO_ZONES, MakeMachine, Rig, machine


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A machine of one zone without user zones: 64M, and 1G to plug into, of which 256M are asked for."""
    with machine(tmp_path) as made:
        yield made


@pytest.fixture
def zones(tmp_path: Path) -> Iterator[Rig]:
    """A machine of two zones, a and b, with 64M each."""
    with machine(tmp_path, TWO_ZONES) as made:
        yield made


@pytest.fixture
def make_machine(tmp_path: Path) -> Iterator[MakeMachine]:
    """make_machine(line, **options of Control)"""
    with ExitStack() as machines:

        def make(*args: Any, **options: Any) -> Rig:
            directory = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            directory.mkdir()
            return machines.enter_context(machine(directory, *args, **options))

        yield make
