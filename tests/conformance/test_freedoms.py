"""What the standard leaves to a device is not held against it: right devices that do otherwise than ours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import pytest

from tests.conformance.small import on_small_blocks
from tests.conformance.test_machine import SMALL
from tests.conformance.wrong.steps import Outcome, Steps
from vhost_user.units import GIB, MIB, ByteCount, GuestAddress
from virtio_mem import _native
from virtio_mem.blocks import BlockMap
from virtio_mem.conformance.check import WISH, Check, Violation, all_checks, checks_of
from virtio_mem.conformance.kit import Profile, Run, Verdict, chosen_checks, run_checks
from virtio_mem.conformance.referee import Referee
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Wish
from virtio_mem.conformance.targets import in_process
from virtio_mem.conformance.targets.in_process import Parts
from virtio_mem.conformance.targets.ours import OurTarget
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.protocol import ConfigSpace, Request, RequestType, Response
from virtio_mem.service import DeviceService


def judged(checks: Sequence[Check], device: type[VirtioMemDevice] = VirtioMemDevice) -> Run:
    """What the checks say of a device whose memory is allocated by the guest's touch."""
    parts = Parts(
        make_device=lambda geometry, size: device(geometry, requested_size=size),
        make_service=DeviceService,
    )
    with OurTarget("memfd", parts=parts) as target:
        run = run_checks(target, checks)
    assert not run.failures
    return run


def verdicts_on(run: Run, clause: str) -> set[Verdict]:
    return {one.verdict for one in run.evidence if one.clause == clause}


class BusyAtFirst(Steps):
    """Each PLUG that is in order has to be made twice."""

    asked = False

    def _plug(self, request: Request) -> Outcome:
        outcome = super()._plug(request)
        if isinstance(outcome, Effect):
            self.asked = not self.asked
            if self.asked:
                return self.abandon(outcome, "not at once")
        return outcome


def test_busy_is_no_violation_of_the_standard() -> None:
    """MEM-PLUG-7. A driver that was told BUSY is woken once it can go on, and that is all that it depends on."""
    run = judged(on_small_blocks(chosen_checks(Profile.QUICK)), BusyAtFirst)
    assert run.violated == set()
    for clause in ("DEP-BUSY-4", "DEP-USABLE-1", "DEP-DRIVER-1", "DEP-DRIVER-2"):
        assert Verdict.HOLDS in verdicts_on(run, clause)


class BusyAtFirstInSilence(BusyAtFirst):
    """The same without a notice afterwards."""

    def retry_now(self) -> None:
        pass


class BusyForThree(Steps):
    """A PLUG of three blocks is BUSY at all times."""

    def _plug(self, request: Request) -> Outcome:
        outcome = super()._plug(request)
        return self.abandon(outcome, "never") if isinstance(outcome, Effect) and request.nb_blocks == 3 else outcome


@pytest.mark.parametrize(
    ("device", "clause", "was"),
    [
        (BusyAtFirst, "", ""),
        (BusyAtFirstInSilence, "DEP-BUSY-5", "no notice after BUSY"),
        (BusyForThree, "DEP-BUSY-4", "BUSY, and again 5 s later"),
    ],
)
def test_busy_has_to_pass(device: type[VirtioMemDevice], clause: str, was: str) -> None:
    """The machine makes the request again, and goes on from its answer."""
    parts = Parts(make_device=lambda geometry, size: device(geometry, requested_size=size))
    with OurTarget("anonymous", parts=parts) as target, closing(target.start(SMALL)) as subject:
        referee = Referee(Session(subject, SMALL, target.capabilities))
        if not clause:
            referee.ask(RequestType.PLUG, referee.session.addr(0), 3)
            assert referee.model.plugged_size == 3 * referee.session.block_size
            return
        with pytest.raises(Violation) as violation:
            referee.ask(RequestType.PLUG, referee.session.addr(0), 3)
    assert (violation.value.clause, violation.value.was) == (clause, was)


class GrowsWithWhatIsPlugged(VirtioMemDevice):
    """With each PLUG a block more is usable, of which there is a notice (MEM-CONF-1, MEM-CONF-17)."""

    def commit(self, effect: Effect) -> Response:
        answer, more = super().commit(effect), self.usable_region_size + self.geometry.block_size
        if effect.type is EffectType.PLUG and more <= self.geometry.region_size:
            self.usable_region_size, self._notice = ByteCount(more), True
        return answer


def test_a_usable_region_that_grows_with_what_is_plugged() -> None:
    run = judged([*checks_of("MEM-CONF-17"), *checks_of("MEM-CONF-19")], GrowsWithWhatIsPlugged)
    assert not run.violated
    assert verdicts_on(run, "MEM-CONF-17") == {Verdict.HOLDS}


class LateNotices(VirtioMemDevice):
    """A notice comes a moment after what it is of."""

    late = False

    def take_config_notice(self) -> bool:
        notice, self.late = self.late, super().take_config_notice()
        return notice


@pytest.mark.parametrize("clause", ["MEM-CONF-17", "MEM-CONF-18"])
def test_notices_that_come_a_moment_later(clause: str) -> None:
    assert verdicts_on(judged(list(checks_of(clause)), LateNotices), clause) == {Verdict.HOLDS}


def test_a_region_at_address_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "ADDR", GuestAddress(0))
    run = judged([check for check in all_checks() if any(one.startswith("MEM-") for one in check.clauses)])
    assert not run.violated


class AnotherAfterASystemReset(VirtioMemDevice):
    """The region lies elsewhere, and has blocks of another size."""

    def commit(self, effect: Effect) -> Response:
        answer, before = super().commit(effect), self.geometry
        if effect.type is EffectType.SYSTEM_RESET:
            addr, block_size = GuestAddress(before.addr + GIB), ByteCount(2 * before.block_size)
            self.geometry = replace(before, addr=addr, block_size=block_size)
            self.blocks = BlockMap(self.geometry.nb_blocks)
            self._rules = _native.Rules(addr, before.region_size, block_size)
        return answer


def test_a_system_reset_may_make_another_device() -> None:
    """MEM-CONF-3 to MEM-CONF-6 except it."""
    parts = Parts(make_device=lambda geometry, size: AnotherAfterASystemReset(geometry, requested_size=size))
    with OurTarget("anonymous", parts=parts) as target, closing(target.start(SMALL)) as subject:
        referee = Referee(Session(subject, SMALL, target.capabilities))
        for _ in range(2):
            referee.ask(RequestType.PLUG, referee.session.addr(0), 2)
            referee.write(1, seed=1)
            referee.system_reset()
            referee.look_closely()
        assert referee.model.addr == in_process.ADDR + 2 * GIB
        assert not judged(list(checks_of("MEM-OP-11")), AnotherAfterASystemReset).violated


def test_large_blocks_that_are_allocated_by_touch() -> None:
    """Of such blocks the kit writes a part only, and so much is held."""
    wish = Wish(region_size=GIB, block_size=8 * MIB, requested_size=64 * MIB)
    checks = [check for check in checks_of("DEP-HOST-1") if check.wishes == (WISH,)]
    run = judged([replace(check, wishes=(wish,)) for check in checks])
    assert verdicts_on(run, "DEP-HOST-1") == {Verdict.HOLDS}


class NoBlocksAfterASystemReset(VirtioMemDevice):
    """That is no freedom."""

    reset = False

    def commit(self, effect: Effect) -> Response:
        self.reset |= effect.type is EffectType.SYSTEM_RESET
        return super().commit(effect)

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        return config._replace(block_size=ByteCount(0)) if self.reset else config


def test_but_none_whose_blocks_are_nothing() -> None:
    parts = Parts(make_device=lambda geometry, size: NoBlocksAfterASystemReset(geometry, requested_size=size))
    with OurTarget("anonymous", parts=parts) as target, closing(target.start(SMALL)) as subject:
        referee = Referee(Session(subject, SMALL, target.capabilities))
        with pytest.raises(Violation, match="MEM-CONF-9"):
            referee.system_reset()
