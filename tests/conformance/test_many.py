"""Requests of hundreds of blocks, as drivers make them: wrong devices are found by them, and they are little memory."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conformance.small import on_small_blocks
from tests.conformance.test_machine import SMALL
from tests.conformance.wrong import FAULTS
from vhost_user.errors import UsageError
from vhost_user.units import ByteCount
from virtio_mem import geometry
from virtio_mem.conformance.check import FINE, MANY, Check, all_checks
from virtio_mem.conformance.checks.many import COUNTS
from virtio_mem.conformance.explore import explore
from virtio_mem.conformance.kit import run_checks
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Subject, Target, Wish
from virtio_mem.conformance.targets.ours import OurTarget
from virtio_mem.conformance.targets.subprocess import ProgramTarget

SHIM = Path(__file__).parent / "targets" / "shim.py"
COARSE, SMALL_BLOCKS = (one for one in all_checks() if one.name.startswith("many."))

WRONG = [
    "plug-of-many-leaves-one-out",
    "plug-counts-in-eight-bits",
    "unplug-of-many-leaves-one-out",
    "unplug-counts-in-eight-bits",
    "last-of-many-is-not-looked-at",
    "first-of-many-is-not-looked-at",
    "plugged-many-are-mixed",
    "unplugged-many-are-mixed",
]
"""Devices that are right as long as requests are small."""


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_of_many_blocks_only_is_found(name: str) -> None:
    fault = FAULTS[name]
    with fault.target() as target:
        assert fault.clause in run_checks(target, on_small_blocks([SMALL_BLOCKS])).violated


def test_it_is_found_where_blocks_are_usable_only_once_the_target_allows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a daemon that was not told otherwise: it has no target yet."""
    monkeypatch.setattr(geometry, "USABLE_SLACK", ByteCount(0))
    fault = FAULTS["plug-counts-in-eight-bits"]
    with fault.target() as target:
        start = target.start
        monkeypatch.setattr(target, "start", lambda wish: start(replace(wish, requested_size=0)))
        assert fault.clause in run_checks(target, on_small_blocks([SMALL_BLOCKS])).violated


def test_the_machine_makes_such_requests_too() -> None:
    with FAULTS["plug-of-many-leaves-one-out"].target() as target:
        found = explore(target, sequences=60, seed_=1, wish=SMALL, rounds=1).found
    assert [line.split()[0] for line in found["MEM-PLUG-8"].lines[2:]] == ["plug", "state"]


def test_the_machine_leaves_them_where_there_is_no_memory_for_them() -> None:
    with FAULTS["plug-of-many-leaves-one-out"].target() as target:
        target.many = None
        assert not explore(target, sequences=60, seed_=1, wish=SMALL, rounds=1).found


class NoneSoLarge(OurTarget):
    """A target that refuses to be made with so much to plug."""

    def start(self, wish: Wish) -> Subject:
        if wish == self.many:
            raise UsageError("wish", wish, "is too much")
        return super().start(wish)


def test_a_device_that_can_not_be_so_large_is_explored_as_it_can_be() -> None:
    with NoneSoLarge("anonymous") as target:
        exploration = explore(target, sequences=20, seed_=1, wish=SMALL, rounds=1)
    assert not exploration.found
    assert exploration.sequences >= 20


def counts_asked(target: Target, check: Check) -> set[int]:
    """Of the PLUGs that a check makes, those of more than one block."""
    (wish,) = check.wishes
    with closing(target.start(wish)) as subject:
        session = Session(subject, wish, target.capabilities)
        check.run(session)
    calls = [line.split() for line in session.lines if line.endswith("-> ACK")]
    return {int(call[2]) for call in calls if call[0] == "plug" and call[2] != "1"}


@pytest.mark.parametrize("capabilities", [~Capability(0), Capability.HELD])
def test_a_device_that_holds_memory_is_spared(capabilities: Capability) -> None:
    """Also one that is what it is, as a daemon's."""
    with OurTarget("anonymous") as target:
        target.capabilities &= capabilities
        assert counts_asked(target, *on_small_blocks([COARSE])) == {64}
    with ProgramTarget(f"{sys.executable} {SHIM}") as target:
        assert counts_asked(target, COARSE) == set(COUNTS)


def test_a_program_of_whose_memory_nothing_is_known_is_spared_by_the_machine() -> None:
    for capability, many in (("WISH", FINE), ("TIME", None), ("HELD", None)):
        hello = f'{{"virtio-mem-conformance":1,"version":"x","capabilities":["{capability}"]}}'
        with ProgramTarget(shlex.join(["sh", "-c", 'echo "$0"; cat', hello])) as target:
            assert target.many == many


def test_a_program_with_memory_for_64_mib_is_right(tmp_path: Path) -> None:
    """It is BUSY for want of more."""
    short = """        if type_ == PLUG and (len(self.plugged) + nb_blocks) * self.block > 64 << 20:
            self.owes = True
            return BUSY, 0
        if self.paused:
"""
    program = tmp_path / "shim.py"
    program.write_text(SHIM.read_text().replace("        if self.paused:\n", short))
    with ProgramTarget(f"{sys.executable} -S -E {program}") as target:
        assert not explore(target, sequences=30, seed_=1, rounds=1).found
        assert run_checks(target, [COARSE, SMALL_BLOCKS]).violated == set()


def test_what_is_wished_for() -> None:
    assert [one.wishes for one in (COARSE, SMALL_BLOCKS)] == [(MANY,), (FINE,)]
    for wish in (MANY, FINE):
        assert wish.region_size // wish.block_size > max(COUNTS)
        assert wish.requested_size == wish.region_size
    assert FINE.region_size * 16 == MANY.region_size
