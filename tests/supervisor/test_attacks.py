"""A supervised back end under attack: what our back end stands, it stands through a supervisor."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import counts
from tests.attack.run import stands
from tests.attack.test_own_back_end import ABSENT
from vhost_user.attack import ATTACKS, Verdict


def test_every_attack_passes(
    tmp_path: Path, request: pytest.FixtureRequest, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    path = str(tmp_path / "echo.sock")
    seed = int(request.config.option.hypothesis_seed)
    command = f"{sys.executable} -m tests.supervisor.echo {path}"
    attacks = rng.sample(ATTACKS, min(counts.ATTACKS_ON_SUPERVISED_BACK_END, len(ATTACKS)))
    results = stands(path, command, attacks, seed)
    assert [
        result.attack.name
        for result in results
        if result.verdict is Verdict.NOT_OFFERED and not result.attack.needs & ABSENT
    ] == []
    figure("attacks that a supervised back end passes", sum(result.verdict is Verdict.PASSED for result in results))
