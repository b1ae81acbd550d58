"""QEMU's own virtio-mem-pci, driven by the kit: what it can do is brought across, on each kind of memory."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from tests.conformance.targets import play
from tests.conformance.targets.play import BLOCK
from vhost_user.errors import HostError, UsageError
from vhost_user.units import GIB, MIB
from virtio_mem.conformance.kit import Verdict, judge
from virtio_mem.conformance.target import Capability, Chain, Refused, Subject, TargetFailure, Wish
from virtio_mem.conformance.targets.qemu import QemuSubject, QemuTarget
from virtio_mem.protocol import BlockState, Feature, RequestType, ResponseType

pytestmark = pytest.mark.needs_peers

PARTS = (
    *(play.requests, play.notices, play.system_reset, play.memory, play.held, play.pause),
    *(play.ring, play.events, play.odd_tables, play.start_in_two, play.registers, play.needs_reset, play.config_writes),
    *(play.unplugged, play.sleep, play.boot_memory),
)
"""What QEMU's device does as ours does."""


@contextmanager
def started(rest: str) -> Iterator[QemuSubject]:
    with closing(QemuTarget.parse(rest)) as target:
        yield target.start(play.WISH)


@pytest.fixture(scope="module")
def found() -> QemuTarget:
    """One for all tests, since it takes half a second to ask a QEMU what it has."""
    target = QemuTarget()
    target.close()
    return target


@pytest.fixture
def qemu(found: QemuTarget) -> Iterator[QemuTarget]:
    with closing(found):
        yield found


@pytest.fixture
def subject(qemu: QemuTarget) -> Iterator[QemuSubject]:
    with closing(qemu.start(play.WISH)) as subject:
        play.begin(subject)
        yield subject


def from_the_start(subject: Subject, part: Callable[[Subject], None]) -> None:
    play.begin(subject)
    assert play.ask(subject, RequestType.UNPLUG_ALL) is ResponseType.ACK
    part(subject)


@pytest.mark.parametrize(
    "rest", ["", ",memory=ram", ",dynamic-memslots=on,prealloc=on", ",memory=ram,dynamic-memslots=on,block-size=2M"]
)
def test_what_it_can_do(rest: str) -> None:
    with started(rest) as subject:
        for part in PARTS:
            from_the_start(subject, part)


@pytest.mark.needs_hugetlb
@pytest.mark.needs_userfaultfd
def test_huge_pages(hugepages: Callable[[int, int], object]) -> None:
    hugepages(2 * MIB, 64)
    with started(",memory=hugetlb") as subject:
        for part in PARTS:
            from_the_start(subject, part)


@pytest.mark.needs_hugetlb
def test_huge_pages_that_are_not_there(hugepages: Callable[[int, int], object]) -> None:
    hugepages(2 * MIB, 1)
    with pytest.raises(HostError, match="needs 64 huge pages of 2M"):
        QemuTarget.parse(",memory=hugetlb")


def test_memory_that_is_allocated_when_it_is_plugged() -> None:
    with started(",prealloc=on") as subject:
        play.begin(subject)
        play.plug(subject, 1, 2)
        assert [subject.held(block * BLOCK, BLOCK) for block in range(4)] == [0, BLOCK, BLOCK, 0]


def test_a_host_that_refuses() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs_mount: only root mounts file systems")
    with started(",memory=tmpfs,prealloc=on") as subject:
        play.begin(subject)
        play.plug(subject, 0)
        subject.refuse(True)
        assert [play.ask(subject, RequestType.PLUG, 1), play.ask(subject, RequestType.UNPLUG, 0)] == [
            ResponseType.BUSY
        ] * 2
        assert play.ask(subject, RequestType.UNPLUG_ALL) is ResponseType.BUSY
        assert subject.held(0, 8 * BLOCK) == BLOCK
        subject.refuse(False)
        play.plug(subject, 1)
        from_the_start(subject, play.held)


def test_a_target_that_it_turns_down(subject: QemuSubject) -> None:
    for impossible, why in ((BLOCK + 1, "multiples of 'block-size'"), (64 * MIB, "cannot exceed")):
        with pytest.raises(Refused, match=why):
            subject.set_target(impossible)
    assert subject.config().requested_size == play.WISH.requested_size


@pytest.mark.parametrize(
    "wish",
    [
        Wish(256 * GIB, 2 * MIB, 1 * GIB),
        Wish(2048 * GIB, 1 * GIB, 2048 * GIB),
        Wish(64 * MIB, 8 * MIB, 16 * MIB, node_id=3),
        Wish(2 * MIB, 1 * MIB),
    ],
)
def test_a_device_as_it_is_wished(qemu: QemuTarget, wish: Wish) -> None:
    with closing(qemu.start(wish)) as subject:
        config = subject.config()
        assert (config.region_size, config.block_size) == (wish.region_size, wish.block_size)
        assert (config.requested_size, config.plugged_size) == (wish.requested_size, 0)
        assert config.node_id == (wish.node_id or 0)
        play.begin(subject)
        last = config.usable_region_size // config.block_size - 1
        assert play.ask(subject, RequestType.STATE, last + 1) is ResponseType.ERROR
        if config.requested_size:
            assert play.state(subject, last) is BlockState.UNPLUGGED
            play.plug(subject, last)
            subject.write(config.usable_region_size - 1, b"x")
            assert subject.held(last * config.block_size, config.block_size)


def test_what_it_cant_have_is_made_whole(qemu: QemuTarget) -> None:
    with closing(qemu.start(Wish(5 * MIB + 1, 4096, 1, node_id=60000))) as subject:
        config = subject.config()
        assert (config.region_size, config.block_size, config.requested_size) == (6 * MIB, MIB, MIB)
        assert config.node_id == 127


def test_features_are_what_the_driver_says(subject: QemuSubject) -> None:
    wanted = Feature.VERSION_1 | Feature.UNPLUGGED_INACCESSIBLE
    assert int(wanted) & ~subject.offered_features == 0
    assert subject.begin(int(wanted))
    play.requests(subject)
    # By default QEMU insists on the one that keeps drivers off unplugged memory.
    assert not subject.begin(int(Feature.VERSION_1))
    assert subject.begin(int(wanted | Feature.EVENT_IDX | Feature.INDIRECT_DESC))
    chain = Chain(play.request(subject, RequestType.STATE), readable=(3, 21, 8), room=(1, 15), indirect=True)
    for _ in range(100):
        assert {play.response(used).type for used in subject.submit([chain] * 10)} == {ResponseType.ACK}


def test_each_start_is_a_device_that_has_just_been_made(qemu: QemuTarget) -> None:
    """Also those that were launched while the one before was there, and after a change of mind."""
    pids = set()
    other = dataclasses.replace(play.WISH, requested_size=0)
    for wish in (play.WISH, play.WISH, play.WISH, play.WISH, other, play.WISH):
        subject = qemu.start(wish)
        pids.add(subject.machine.pid)
        assert subject.config().requested_size == wish.requested_size
        play.begin(subject)
        assert subject.config().plugged_size == 0
        if wish.requested_size:
            assert play.state(subject, 0, 8) is BlockState.UNPLUGGED
            play.plug(subject, 0, 4)
            subject.write(0, b"x")
        assert subject.held(0, 8 * BLOCK) <= BLOCK
        subject.close()
        subject.close()
    assert len(pids) == 6


def test_one_that_dies_while_it_waits(qemu: QemuTarget) -> None:
    for _ in range(2):
        qemu.start(play.WISH).close()
    assert qemu.waiting is not None
    os.kill(qemu.waiting.machine.pid, signal.SIGKILL)
    with pytest.raises(TargetFailure, match="QEMU hung up; it ended with signal 9"):
        qemu.start(play.WISH)
    qemu.start(play.WISH).close()


def test_each_reset_is_waited_for(subject: QemuSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the monitor says to the command is only that it was heard."""
    for _ in range(2):
        play.begin(subject)
        play.plug(subject)
        subject.system_reset()
        assert subject.config().plugged_size == 0
    subject.machine.patience = 0.01
    monkeypatch.setattr(subject.machine, "execute", lambda _: {})
    with pytest.raises(TargetFailure, match=r"QEMU did not reset the machine within 0\.01 s"):
        subject.system_reset()


def test_time_is_the_kits(subject: QemuSubject) -> None:
    subject.advance(1e6)
    assert subject.take_notices() == 0


def test_a_device_that_breaks_says_why(subject: QemuSubject) -> None:
    request = bytes([77]).ljust(24, b"\0")
    with pytest.raises(TargetFailure) as failure:
        subject.submit([Chain(request)])
    assert "1 of 1 buffers did not come back, and the device needs a reset" in failure.value.what
    assert "it said: " in failure.value.what
    assert "virtio-mem protocol violation: unknown request type: 77" in failure.value.what
    with pytest.raises(TargetFailure, match="since the last reset 1 of 1 buffers did not come back"):
        subject.submit([Chain(request)])
    play.begin(subject)
    play.requests(subject)


def test_a_death_is_told_with_its_cause(subject: QemuSubject) -> None:
    os.kill(subject.machine.pid, signal.SIGABRT)
    for call in (subject.config, lambda: subject.set_target(0), subject.system_reset, lambda: subject.pause(True)):
        with pytest.raises(TargetFailure, match="it ended with signal 6"):
            call()
    subject.close()


def test_ctrl_c_is_not_for_it(subject: QemuSubject) -> None:
    """A terminal sends it to the group of processes that the kit is in; a QEMU that ends is a device that died."""
    assert os.getpgid(subject.machine.pid) != os.getpgid(0)


def test_a_hang_has_an_end(subject: QemuSubject) -> None:
    os.kill(subject.machine.pid, signal.SIGSTOP)
    subject.machine.qtest.allow(0.01)
    with pytest.raises(TargetFailure, match=r"did not answer 'b64read \S+ 0x38' within 0\.01 s"):
        subject.config()
    subject.machine.patience = 0.01
    with pytest.raises(TargetFailure, match=r"no answer within 0\.01 s"):
        subject.set_target(0)


def test_what_it_does_not_start_with() -> None:
    with pytest.raises(TargetFailure, match=r"it ended with status 1; it said: .* has to be a power of two"):
        QemuTarget.parse(",block-size=3M")


def test_options_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="qemu memory=disk: must be memfd or hugetlb or ram or tmpfs"):
        QemuTarget.parse("memory=disk")
    with pytest.raises(UsageError, match="there is no such key"):
        QemuTarget.parse(":,blocksize=2M")
    with pytest.raises(UsageError, match="qemu:BINARY=/no/such/qemu: is not a program"):
        QemuTarget.parse(":/no/such/qemu,memory=ram")


def test_what_it_is() -> None:
    with QemuTarget.parse(",memory=ram,prealloc=on") as target:
        assert target.name == "qemu,memory=ram,prealloc=on"
        assert target.version.startswith("QEMU ")
        assert target.lacks(Capability.HOST_REFUSES) == "qemu can't: HOST_REFUSES"


class Stopped(QemuTarget):
    """QEMUs that are stopped as soon as they are there."""

    started = 0

    def start(self, wish: Wish) -> QemuSubject:
        subject = super().start(wish)
        self.started += 1
        if self.started > 1:  # the first one shows whether the host tells what it holds
            os.kill(subject.machine.pid, signal.SIGSTOP)
            subject.machine.qtest.allow(0.01)  # it would wait for ever
        return subject


def test_a_qemu_that_hangs_is_given_up_after_its_first_time_limit() -> None:
    target = Stopped()
    with closing(target):
        judgement = judge(target)
    assert target.started == 3
    assert judgement.status == 1
    (failure,) = judgement.failures
    assert failure.startswith("not judged any more, since the device answers nothing: QEMU did not answer")
    assert len(judgement.of(Verdict.HOLDS)) == 0
