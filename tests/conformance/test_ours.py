"""Our own device passes every check, on each kind of memory and behind both rings."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests import counts, host
from tests.conformance.bare import Bare
from tests.conformance.small import on_small_blocks
from vhost_user.units import MIB, ByteCount
from virtio_mem.conformance.check import Check, all_checks
from virtio_mem.conformance.clauses import device_clauses, expected_clauses
from virtio_mem.conformance.kit import Judgement, Profile, Verdict, judgement_of, run_checks
from virtio_mem.conformance.target import Capability, Subject, Target, Wish
from virtio_mem.conformance.targets.behind_ring import FORMS, RingTarget
from virtio_mem.conformance.targets.in_process import Parts
from virtio_mem.conformance.targets.ours import OurTarget
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import Geometry

ROOT = Path(__file__).resolve().parents[2]

INSISTS = "MEM-OP-8"
"""Of a driver that leaves UNPLUGGED_INACCESSIBLE, which our device does not serve."""
NO_MACHINE = {"MEM-INIT-5", "MEM-OP-12", "MEM-OP-13", "MEM-REGION-2"}
"""Of machines, which the device alone is not."""
NO_TRANSPORT = ("MEM-ID-", "MEM-LAYOUT-2", "STATUS-", "RESET-1", "RESET-3", "CFG-2")
NOT_WITHOUT_A_RING = ("RING-", "DEP-CHAIN-", *NO_TRANSPORT)
PACKED = ("RING-PACKED-",)
SLOW = {"RING-SPLIT-5"}
"""Of a check that the profile quick leaves out."""


def judged(target: Target, checks: Sequence[Check]) -> Judgement:
    with target:
        run = run_checks(target, checks)
        return judgement_of(
            target, run, Profile.QUICK, 0, 0.0, expected=expected_clauses(target.kind, target.capabilities)
        )


def assert_all_hold(judgement: Judgement, *, but: tuple[str, ...] = ()) -> None:
    """Whatever has a check holds, except for ids that begin with one of `but`."""
    assert not judgement.failures
    assert not judgement.missing
    assert not [(one.clause.id, one.violations) for one in judgement.of(Verdict.VIOLATED)]
    open_ = {
        id_
        for id_, one in judgement.verdicts.items()
        if one.verdict is not Verdict.HOLDS and not one.clause.beyond and not (but and id_.startswith(but))
    }
    assert open_ >= {INSISTS} | NO_MACHINE
    assert open_ - {INSISTS} - NO_MACHINE <= SLOW
    assert judgement.status == 0


def quick() -> list[Check]:
    return [check for check in all_checks() if not check.slow]


@pytest.mark.clause(
    "DEP-NACK-1", "DEP-NACK-2", "DEP-ORDER-1", "DEP-BUSY-1", "DEP-BUSY-2", "DEP-BUSY-3", "DEP-BUSY-4", "DEP-BUSY-5",
    "DEP-REFUSED-1", "DEP-UNKNOWN-1", "DEP-USABLE-1", "DEP-TARGET-1", "DEP-TARGET-2", "DEP-TARGET-3", "DEP-TARGET-4",
    "DEP-HOST-1", "DEP-HOST-2", "DEP-HOST-3", "DEP-HOST-4",
)  # fmt: skip
@pytest.mark.parametrize("backing", ["private-file", "memfd", "file", "anonymous"][: counts.JUDGED_BACKINGS])
def test_every_clause_holds_on_small_blocks(backing: str) -> None:
    assert_all_hold(judged(OurTarget(backing), on_small_blocks(quick())), but=NOT_WITHOUT_A_RING)


@pytest.mark.clause("DEP-CHAIN-1")
@pytest.mark.parametrize(("form", "but"), [("split", PACKED), ("packed", ())])
def test_every_clause_holds_behind_a_ring(form: str, but: tuple[str, ...]) -> None:
    assert_all_hold(judged(RingTarget(form), on_small_blocks(quick())), but=but)


@pytest.mark.needs_hugetlb
def test_every_clause_holds_on_huge_pages(hugepages: Callable[[int, int], host.HugePagePool]) -> None:
    hugepages(2 * MIB, 128)
    assert_all_hold(judged(OurTarget("hugetlb"), quick()), but=NOT_WITHOUT_A_RING)


@pytest.mark.long
def test_slow_checks() -> None:
    slow = [check for check in all_checks() if check.slow]
    assert {id_ for check in slow for id_ in check.clauses} == SLOW
    for form in FORMS[: counts.RINGS_SENT_ROUND]:
        judgement = judged(RingTarget(form), on_small_blocks(slow))
        assert {id_ for id_ in SLOW if judgement.verdicts[id_].verdict is Verdict.HOLDS} == SLOW


def with_all_readable(geometry: Geometry, requested_size: int) -> VirtioMemDevice:
    return VirtioMemDevice(geometry, requested_size=requested_size, unplugged_inaccessible=False)


def test_unplugged_memory_can_be_read_where_that_is_promised() -> None:
    checks = [check for check in all_checks() if INSISTS in check.clauses]
    target = OurTarget("anonymous", parts=Parts(make_device=with_all_readable))
    assert judged(target, on_small_blocks(checks)).verdicts[INSISTS].verdict is Verdict.HOLDS


LITTLE = Capability.CHAINS | Capability.CONTENT | Capability.RING | Capability.CONFIG_WRITES
OPEN = Capability.START | Capability.REGISTERS | Capability.UNPLUGGED
API = Capability.SET_TARGET | Capability.SYSTEM_RESET | Capability.PAUSE
QEMU = LITTLE | OPEN | API | Capability.NOTICES | Capability.WISH | Capability.RESTART


@pytest.mark.parametrize(
    ("kind", "capabilities"),
    [
        ("vhost-user", LITTLE),
        ("vhost-user", LITTLE | API),
        ("exec", Capability(0)),
        ("qemu", QEMU),
        ("qemu", QEMU | Capability.HELD),
        ("exec", Capability.SET_TARGET),
        ("vhost-user", LITTLE | API | Capability.NOTICES | Capability.HELD),
        ("exec", LITTLE | API | Capability.NOTICES | Capability.HELD),
        ("exec", Capability.CHAINS | Capability.NOTICES | Capability.SYSTEM_RESET),
        ("exec", Capability.CONTENT | Capability.PAUSE | Capability.HELD),
        ("exec", LITTLE | OPEN | Capability.NOTICES),
        ("exec", Capability.REGISTERS | Capability.SET_TARGET | Capability.RESTART),
    ][: counts.JUDGED_KINDS],
)
def test_a_target_that_can_do_little_gets_the_verdicts_that_it_must(kind: str, capabilities: Capability) -> None:
    target = Bare(kind, capabilities)
    assert len(expected_clauses(kind, capabilities)) >= 30
    judgement = judged(target, on_small_blocks(quick()))
    assert (judgement.status, judgement.missing, judgement.failures) == (0, (), ())


class NoBlocks(OurTarget):
    """A device with a region of no blocks; its memory is there, since no zone has none."""

    def start(self, wish: Wish) -> Subject:
        assert wish.region_size == 0
        return super().start(replace(wish, region_size=2 * MIB))


def without_blocks(geometry: Geometry, requested_size: int) -> VirtioMemDevice:
    return VirtioMemDevice(replace(geometry, region_size=ByteCount(0)), requested_size=requested_size)


def test_a_device_without_blocks() -> None:
    checks = [check for check in all_checks() if check.name == "configuration.region_without_blocks"]
    judgement = judged(NoBlocks("anonymous", parts=Parts(make_device=without_blocks)), checks)
    assert judgement.verdicts["MEM-CONF-15"].verdict is Verdict.HOLDS


def test_kinds_of_targets_that_must_get_verdicts() -> None:
    kinds = tomllib.loads((ROOT / "virtio_mem/conformance/expected.toml").read_text())
    assert kinds.keys() == {"self", "ring", "qemu", "vhost-user", "exec"}
    ids = {id_ for kind in kinds.values() for ids in (kind["clauses"], *kind["with"].values()) for id_ in ids}
    assert ids <= device_clauses().keys()
    assert len(expected_clauses("ring", ~Capability(0))) == 143
    assert expected_clauses("another", ~Capability(0)) == ()


def test_every_clause_of_the_device_has_a_check_or_a_reason() -> None:
    checked = {id_ for check in all_checks() for id_ in check.clauses}
    assert checked <= device_clauses().keys()
    assert {id_ for id_, clause in device_clauses().items() if not clause.beyond} == checked
