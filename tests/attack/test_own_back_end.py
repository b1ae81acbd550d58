"""Our back end under every attack: none fails, none is believed that should not be, none is left out unexplained."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import counts
from tests.attack.run import stands
from vhost_user.attack import ATTACKS, Verdict, choose
from vhost_user.message import ProtocolFeature

ABSENT = ProtocolFeature.PAGEFAULT | ProtocolFeature.CROSS_ENDIAN | ProtocolFeature.CRYPTO_SESSION
ABSENT |= ProtocolFeature.XEN_MMAP | ProtocolFeature.SHARED_OBJECT | ProtocolFeature.SHMEM_MAP
ABSENT |= ProtocolFeature.INBAND_NOTIFICATIONS
"""What our back end does not offer, so that attacks that need one of these can't be made."""


def test_every_attack_passes(
    tmp_path: Path, request: pytest.FixtureRequest, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    path = str(tmp_path / "echo.sock")
    seed = int(request.config.option.hypothesis_seed)
    command = f"{sys.executable} -m tests.attack.echo {path}"
    chosen = set(rng.sample(range(len(ATTACKS)), min(counts.ATTACKS_ON_OUR_BACK_END, len(ATTACKS))))
    attacks = [attack for number, attack in enumerate(ATTACKS) if number in chosen]
    results = stands(path, command, attacks, seed)
    assert [result for result in results if result.note] == []
    left_out = [result.attack for result in results if result.verdict is Verdict.NOT_OFFERED]
    assert [attack.name for attack in left_out if not attack.needs & ABSENT] == []
    figure("attacks that our back end passes", len(results) - len(left_out))


def test_attacks_have_names_of_their_own_and_say_what_they_do() -> None:
    assert [name for name, times in Counter(attack.name for attack in ATTACKS).items() if times > 1] == []
    for attack in ATTACKS:
        assert attack.says.endswith("."), attack.name
        assert attack.source, attack.name
        assert not re.search(r"\b[A-Z]\d{1,2}\b|issue", attack.source), "no reader has the list that this is from"


@pytest.mark.parametrize(
    "source",
    [
        "CVE-2018-1059",
        "CVE-2019-14818",
        "CVE-2020-10722",
        "CVE-2022-0669",
        "CVE-2026-86563",
        "GHSA-whmr-hj5c-pm9g",
        "QEMU work_items 3974",
        "QEMU a81d8d4a72",
        "QEMU 8d19371593",
        "SPDK#2852",
        "SPDK#3132",
        "FDio/vpp#776",
        "libvhost-user 2024-03-12",
    ],
)
def test_bugs_that_daemons_had_are_among_the_attacks(source: str) -> None:
    assert any(source in attack.source for attack in ATTACKS)


def test_attacks_are_chosen_by_pattern() -> None:
    assert [attack.name for attack in choose(["framing.version-*"])] == [f"framing.version-{n}" for n in (0, 2, 3)]
    assert choose([]) == list(ATTACKS)
    with pytest.raises(ValueError, match="matches no attack"):
        choose(["framing.*", "no.such"])
