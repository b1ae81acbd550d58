"""The kit has teeth: it finds each device that is wrong in one way, by the clause that the device breaks."""

from __future__ import annotations

import logging
import random

import pytest

from tests.conformance.wrong import FAULTS, Fault
from tests.counts import FAULTS_JUDGED
from virtio_mem.conformance.check import all_checks
from virtio_mem.conformance.clauses import device_clauses
from virtio_mem.conformance.kit import Evidence, Profile, chosen_checks, run_checks

WITHOUT = {"RING-SPLIT-5": "its check makes 65,736 requests before there is something to see"}
"""Clauses for which there is no wrong device, and why."""


def test_there_are_enough_of_them() -> None:
    assert len(FAULTS) >= 160
    assert sum(bool(fault.source) for fault in FAULTS.values()) >= 20


def test_each_names_a_clause_that_can_be_shown() -> None:
    clauses = device_clauses()
    assert not [fault.name for fault in FAULTS.values() if fault.clause not in clauses or clauses[fault.clause].beyond]


def test_there_is_one_for_each_clause_that_a_check_can_show() -> None:
    shown = {clause for check in all_checks() for clause in check.clauses}
    assert shown - {fault.clause for fault in FAULTS.values()} == WITHOUT.keys()


def evidence_against(fault: Fault) -> list[Evidence]:
    """What the first check that finds the fault has to say; the others that name its clause aren't run any more."""
    with fault.target() as target:
        for check in chosen_checks(Profile.QUICK, only=[fault.clause]):
            run = run_checks(target, [check])
            assert not run.failures, run.failures
            if fault.clause in run.violated:
                return [one for one in run.evidence if one.lines]
    return []


def test_the_kit_finds_them_by_their_clause(rng: random.Random, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    chosen = rng.sample(list(FAULTS.values()), min(FAULTS_JUDGED, len(FAULTS)))
    missed = []
    for fault in chosen:
        found = evidence_against(fault)
        if not any(one.clause == fault.clause and one.was and one.should for one in found):
            missed.append(f"{fault.name}, {fault.clause}: {fault.says}")
    assert not missed, missed
