"""What is written in spec-notes/peers.md of QEMU is what QEMU does."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import counts
from tests.conformance.targets import play
from tests.host import PEERS_TREE
from vhost_user.units import MIB
from virtio_mem.boot.find import OLD_TREE, PROGRAM
from virtio_mem.conformance.explore import explore
from virtio_mem.conformance.kit import Verdict, judge
from virtio_mem.conformance.replay import Script, parse_script, replay
from virtio_mem.conformance.target import Target, TargetFailure
from virtio_mem.conformance.targets.parse import parse_target
from virtio_mem.protocol import RequestType, ResponseType

pytestmark = pytest.mark.needs_peers

NOTES = Path(__file__).parents[3] / "spec-notes/peers.md"

VIOLATED = {
    *("MEM-PLUG-6", "DEP-BUSY-5", "DEP-UNKNOWN-1", "DEP-DRIVER-1", "DEP-DRIVER-2", "STATUS-2", "STATUS-3"),
}
"""With split rings, in every version that was judged, on each kind of memory; with packed ones RING-PACKED-5, too."""

JUDGED_VERSIONS = ("11.1.3", "7.2.22")
OLD = f":{PEERS_TREE / OLD_TREE / 'usr/bin' / PROGRAM}"
"""Behind `qemu`, the one of Debian bookworm."""


class Finding(NamedTuple):
    """A session in the notes, and the versions of which it is told."""

    target: str
    versions: tuple[str, ...]
    script: Script


def findings() -> Iterator[Finding]:
    for words, text in re.findall(r"^```replay (.+)\n((?:.*\n)+?)```$", NOTES.read_text(), re.MULTILINE):
        target, *versions = words.split()
        for script in parse_script(text):
            yield Finding(target, tuple(versions), script)


FINDINGS = list(findings())


def test_they_are_found() -> None:
    assert len(FINDINGS) == NOTES.read_text().count("```replay")
    assert len({finding.target for finding in FINDINGS}) == 3


@cache
def target_of(text: str) -> Target:
    """Asked once what it is. It can be started again after it was closed."""
    return parse_target(text)


def goes_as_it_is_written(finding: Finding, figure: Callable[[str, object], None], program: str = "") -> None:
    with target_of(f"qemu{program}{finding.target.removeprefix('qemu')}") as target:
        run = replay(target, finding.script)
        version = target.version.split()[1]
    different = [f"{one.step.call} -> {one.now}, was {one.step.answer}" for one in run.differences]
    if version in finding.versions:
        assert (run.failure, different) == ("", [])
    elif different:
        figure(f"{finding.target} {version}, not as in {NOTES.name}", "; ".join(different))


def call_of(finding: Finding) -> str:
    return finding.script.steps[-1].call


@pytest.mark.parametrize("finding", FINDINGS, ids=call_of)
def test_a_session_goes_as_it_is_written(finding: Finding, figure: Callable[[str, object], None]) -> None:
    goes_as_it_is_written(finding, figure)


# Those in which it is waited, as this QEMU's clock can't be moved, are the first ones.
@pytest.mark.parametrize("finding", FINDINGS[-counts.SESSIONS_OF_OLD_QEMU :], ids=call_of)
def test_a_session_of_an_old_qemu(finding: Finding, figure: Callable[[str, object], None]) -> None:
    goes_as_it_is_written(finding, figure, OLD)


@pytest.mark.needs_hugetlb
@pytest.mark.needs_userfaultfd
@pytest.mark.parametrize(("prealloc", "answer"), [("off", ResponseType.ACK), ("on", ResponseType.BUSY)])
def test_huge_pages_that_are_not_there(
    hugepages: Callable[[int, int], object], prealloc: str, answer: ResponseType
) -> None:
    hugepages(2 * MIB, 64)
    with parse_target(f"qemu,memory=hugetlb,prealloc={prealloc}") as target:
        hugepages(2 * MIB, 2)
        subject = target.start(play.WISH)
        play.begin(subject)
        assert play.ask(subject, RequestType.PLUG, 0, 4) is answer
        assert subject.held(0, 4 * play.BLOCK) == 0
        # Plugged or not: the guest can touch it, and there is no third page.
        with pytest.raises(TargetFailure, match="it ended with signal 7"):
            subject.write(0, bytes(3 * play.BLOCK))


@pytest.mark.long
def test_nothing_else_is_violated() -> None:
    kinds = ("", OLD, ",packed=on", ",memory=ram,dynamic-memslots=on", ",prealloc=on", ",memory=ram")
    for options in kinds[: counts.QEMUS_JUDGED]:
        with parse_target(f"qemu{options}") as target:
            judgement = judge(target)
        if judgement.version.split()[1] in JUDGED_VERSIONS:
            violated = {one.clause.id for one in judgement.of(Verdict.VIOLATED)}
            assert violated == VIOLATED | ({"RING-PACKED-5"} if "packed" in options else set())
        assert (judgement.missing, judgement.failures) == ((), ())


@pytest.mark.parametrize("memory", ["memfd", "ram"])
def test_unplugged_memory_can_be_read(memory: str) -> None:
    with parse_target(f"qemu,memory={memory},unplugged-inaccessible=off") as target:
        judgement = judge(target, only=["MEM-OP-8"])
    assert judgement.verdicts["MEM-OP-8"].verdict is Verdict.HOLDS


def test_sequences_of_moves_find_nothing_else(rng: random.Random) -> None:
    with target_of("qemu") as target:
        exploration = explore(
            target, sequences=counts.QEMU_SEQUENCES, steps=30, seed_=rng.randrange(2**32), pass_over=VIOLATED
        )
    assert exploration.sequences >= counts.QEMU_SEQUENCES
    if "11.1.3" in target.version:
        assert exploration.found == {}
