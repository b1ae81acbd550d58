"""Drivers in the manner of Linux and of Windows: they get to their targets with our device, and not with wrong ones."""

from __future__ import annotations

import pytest

from tests.conformance.small import on_small_blocks, small
from tests.conformance.wrong import FAULTS
from vhost_user.errors import PeerError
from virtio_mem.conformance.check import WISH, Violation, all_checks
from virtio_mem.conformance.drivers import WindowsDriver, linux_driver
from virtio_mem.conformance.kit import Run, Verdict, run_checks
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Target
from virtio_mem.conformance.targets.behind_ring import RingTarget
from virtio_mem.conformance.targets.in_process import Parts
from virtio_mem.conformance.targets.ours import OurTarget
from virtio_mem.protocol import ResponseType
from virtio_mem.service import DeviceService

SCENARIOS = [check for check in on_small_blocks(all_checks()) if check.name.startswith("drivers.")]


def went(target: Target) -> Run:
    with target:
        return run_checks(target, SCENARIOS)


@pytest.mark.clause("DEP-DRIVER-1", "DEP-DRIVER-2")
@pytest.mark.parametrize("target", [OurTarget, RingTarget])
def test_every_scenario_ends_well(target: type[OurTarget | RingTarget]) -> None:
    run = went(target())
    assert not run.failures
    assert len(run.evidence) == len(SCENARIOS) >= 8
    assert {one.verdict for one in run.evidence} == {Verdict.HOLDS}


@pytest.mark.parametrize(
    ("clause", "driver"),
    [
        ("DEP-BUSY-5", "DEP-DRIVER-1"),
        ("DEP-BUSY-5", "DEP-DRIVER-2"),
        ("DEP-BUSY-1", "DEP-DRIVER-1"),
        ("DEP-USABLE-1", "DEP-DRIVER-1"),
        ("MEM-INIT-2", "DEP-DRIVER-2"),
        ("MEM-STATE-9", "DEP-DRIVER-2"),
    ],
)
def test_a_wrong_device_fails_a_driver(clause: str, driver: str) -> None:
    wrong = [fault for fault in FAULTS.values() if fault.clause == clause]
    assert wrong
    assert any(driver in went(fault.target()).violated for fault in wrong)


def test_a_driver_that_finds_other_bytes_says_so() -> None:
    with OurTarget("anonymous") as target:
        session = Session(target.start(small(WISH)), small(WISH))
        session.begin()
        driver, memory = linux_driver(session)
        driver.run()
        memory.check(0, session.nb_blocks)
        session.fill(0, 1, seed=99)
        with pytest.raises(Violation, match="DEP-DRIVER-1: block 0 lost"):
            memory.check(0, session.nb_blocks)
        session.subject.close()


def answers(service: DeviceService, request: bytes) -> bytes:
    """Types that no driver knows."""
    return b"\xff" * 10


def test_no_driver_starts_on_nonsense() -> None:
    with OurTarget("anonymous", parts=Parts(answer=answers)) as target:
        session = Session(target.start(small(WISH)), small(WISH))
        session.begin()
        with pytest.raises(Violation, match="DEP-DRIVER-1"):
            linux_driver(session)[0].run()
        session.subject.close()


def test_windows_finds_what_is_plugged() -> None:
    with OurTarget("anonymous") as target:
        session = Session(target.start(small(WISH)), small(WISH))
        session.begin()
        plugged = [(0, 1), (3, 4), (8, 1), (17, 2)]
        for run in plugged:
            assert session.plug(*run).type is ResponseType.ACK
        driver = WindowsDriver(session)
        assert [tuple(run) for run in driver.blocks.plugged_runs()] == plugged
        assert driver.plugged_size == session.config().plugged_size
        session.device_reset()
        with pytest.raises(PeerError, match="STATE"):
            WindowsDriver(Refused(session))
        session.subject.close()


class Refused(Session):
    """A device that is asked beyond its region."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.subject, session.wish)
        self.begin()

    def addr(self, block: int, shift: int = 0) -> int:
        return super().addr(block + self.nb_blocks, shift)
