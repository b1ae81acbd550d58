"""The driver of virtio-mem-pci, with QEMU's own device behind it and some of its registers read wrong."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.conformance.targets import play
from virtio_mem.conformance.target import Chain, TargetFailure
from virtio_mem.conformance.targets.qemu import QemuSubject, QemuTarget
from virtio_mem.conformance.targets.qtest import driver
from virtio_mem.conformance.targets.qtest.driver import Register
from virtio_mem.conformance.targets.qtest.machine import Machine, Program
from virtio_mem.conformance.targets.qtest.memory import Private
from virtio_mem.protocol import Feature, RequestType

pytestmark = pytest.mark.needs_peers

COMMON = 1


@pytest.fixture(scope="module")
def found() -> QemuTarget:
    target = QemuTarget()
    target.close()
    return target


@pytest.fixture
def subject(found: QemuTarget) -> Iterator[QemuSubject]:
    with closing(found):
        yield found.start(play.WISH)


Distort = Callable[[Register, int], None]


@pytest.fixture
def distort(subject: QemuSubject, monkeypatch: pytest.MonkeyPatch) -> Distort:
    """distort(register, value): from now on it reads so."""

    def distort(register: Register, value: int) -> None:
        at = subject._driver._structures[COMMON] + register.at
        load = subject.machine.qtest.load
        monkeypatch.setattr(
            subject.machine.qtest, "load", lambda address, size: value if address == at else load(address, size)
        )

    return distort


@pytest.mark.parametrize(
    ("register", "value", "what"),
    [
        (driver.CONFIG_MSIX_VECTOR, 0xFFFF, "no room for two interrupt vectors"),
        (driver.QUEUE_MSIX_VECTOR, 0xFFFF, "no room for two interrupt vectors"),
        (driver.QUEUE_SIZE, 0, "the device's queue can't be: size=0"),
        (driver.QUEUE_SIZE, 24, "the device's queue can't be: size=24: .* power of two"),
        (driver.QUEUE_ENABLE, 0, "queue_enable stays 0"),
    ],
)
def test_a_driver_that_cant_begin(
    subject: QemuSubject, distort: Distort, register: Register, value: int, what: str
) -> None:
    distort(register, value)
    with pytest.raises(TargetFailure, match=what):
        play.begin(subject)


def test_a_status_that_does_not_go(subject: QemuSubject, distort: Distort) -> None:
    subject._driver._seconds = 0.01
    distort(driver.DEVICE_STATUS, 0x4F)
    with pytest.raises(TargetFailure, match=r"the device's status is 0x4f 0\.01 s after its reset"):
        subject.device_reset()


def test_a_notification_that_goes_astray(subject: QemuSubject) -> None:
    play.begin(subject)
    subject._driver._seconds = 0.05
    subject._driver._notify += 0x800
    with pytest.raises(TargetFailure, match=r"1 of 1 buffers did not come back within 0\.05 s"):
        play.ask(subject, RequestType.STATE)
    with pytest.raises(TargetFailure, match="since the last reset 1 of 1 buffers did not come back"):
        play.ask(subject, RequestType.STATE)
    play.begin(subject)
    play.requests(subject)


def test_an_interrupt_that_goes_astray(subject: QemuSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    play.begin(subject)
    monkeypatch.setattr(subject._driver, "_take_message", lambda _: False)
    with pytest.raises(TargetFailure, match="all buffers came back, and no interrupt did"):
        play.ask(subject, RequestType.STATE)
    assert subject.submit([]) == []


def script(directory: Path, before: str, after: str = "") -> str:
    """A program that is the QEMU that there is, told something else."""
    qemu = Program.find(None).qemu
    path = directory / "qemu"
    lines = [f"export {name}={shlex.quote(value)}" for name, value in qemu.environment.items()]
    path.write_text("\n".join(["#!/bin/sh", *lines, before, f'exec {shlex.join(qemu.command)} "$@" {after}', ""]))
    path.chmod(0o755)
    return str(path)


def test_a_device_without_messages(tmp_path: Path) -> None:
    """Notices and interrupts are then bits of the ISR status."""
    path = script(tmp_path, "", "-global virtio-mem-pci.vectors=0")
    with closing(QemuTarget(path)) as target, closing(target.start(play.WISH)) as subject:
        assert not subject._driver._messages
        for part in (play.requests, play.notices, play.system_reset, play.pause):
            play.begin(subject)
            play.ask(subject, RequestType.UNPLUG_ALL)
            part(subject)


def test_a_qemu_without_the_qtest_accelerator(tmp_path: Path) -> None:
    """It is started stopped, and its clock is nobody's."""
    path = script(tmp_path, 'case "$*" in *qtest,help*) echo "invalid accelerator qtest"; exit 1 ;; esac')
    with closing(QemuTarget(path)) as target, closing(target.start(play.WISH)) as subject:
        assert "TIME" in target.lacks(~target.capabilities)
        for part in (play.requests, play.notices, play.system_reset, play.memory, play.held, play.pause):
            play.begin(subject)
            play.ask(subject, RequestType.UNPLUG_ALL)
            part(subject)
        subject.advance(0.01)


class Monitor:
    """Says of QEMU's memory what versions before 8.0 say."""

    def __init__(self, machine: Machine, *, hva: bool) -> None:
        self._machine, self._hva = machine, hva
        self.pid = machine.pid

    def execute(self, command: str, arguments: dict[str, str] | None = None) -> object:
        if command == "x-query-ramblock":
            return {"human-readable-text": "Block Name  PSize  Offset  Used  Total\n   region  4 KiB  0x0 0x1 0x2\n"}
        return self._machine.execute(command, arguments) if self._hva else "No memory is mapped at address 0x1\r\n"


def test_memory_of_a_qemu_that_does_not_list_where_it_is() -> None:
    with closing(QemuTarget.parse(",memory=ram")) as target, closing(target.start(play.WISH)) as subject:
        play.begin(subject)
        play.plug(subject, 0, 2)
        subject.write(play.BLOCK, bytes([1]) * play.BLOCK)
        region, addr = subject.region, subject._addr
        assert isinstance(region, Private)
        monitor: Machine = Monitor(subject.machine, hva=True)  # type: ignore[assignment]
        assert [region.held(monitor, addr, block * play.BLOCK, play.BLOCK) for block in range(3)] == [0, play.BLOCK, 0]
        silent: Machine = Monitor(subject.machine, hva=False)  # type: ignore[assignment]
        with pytest.raises(TargetFailure, match="QEMU does not say where its memory is, but 'No memory is mapped"):
            region.held(silent, addr, 0, play.BLOCK)


@pytest.mark.parametrize("extra", [0, Feature.EVENT_IDX, Feature.INDIRECT_DESC])
def test_batches_with_each_feature(subject: QemuSubject, extra: int) -> None:
    assert subject.begin(play.DEVICE_FEATURES | extra)
    chain = Chain(play.request(subject, RequestType.STATE), indirect=bool(extra & Feature.INDIRECT_DESC))
    for count in (1, 20, 3, 30):
        assert {play.response(used).type.name for used in subject.submit([chain] * count)} == {"ACK"}
