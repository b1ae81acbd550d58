"""The kit has teeth: it finds each device that is wrong in one way, by the clause that the device breaks."""

from __future__ import annotations

from tests.conformance.wrong import FAULTS


def test_there_are_enough_of_them() -> None:
    assert len(FAULTS) >= 120
    assert sum(bool(fault.source) for fault in FAULTS.values()) >= 20
