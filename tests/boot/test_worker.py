"""A reset of the machine: told by QEMU's monitor, carried out once, whatever becomes of the worker meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vhost_user.errors import HostError, UsageError
from virtio_mem.boot.qmp import QemuRefused
from virtio_mem.boot.worker import BootExtension

MACHINE = {
    "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
    "memory": {"mergeable": False},
    "zones": [
        {"id": "a", "boot_size": 5, "guest_numa_id": 1, "options": {"shared": True}},
        {"id": "b", "boot_size": 7, "guest_numa_id": None, "options": {}},
    ],
}


class Kept:
    """What the supervisor keeps, which outlives workers; `put` may be the end of one."""

    def __init__(self) -> None:
        self.bytes = {"machine": json.dumps(MACHINE).encode()}
        self.dies = False

    def put(self, name: str, data: bytes) -> None:
        if self.dies:
            raise KeyboardInterrupt
        self.bytes[name] = data


class Control:
    """Counts resets."""

    def __init__(self, *, paused: bool = False) -> None:
        self.resets = 0
        self.paused = paused

    def machine_was_reset(self) -> bool:
        self.resets += 1
        return True


def extension(kept: Kept, control: Control) -> BootExtension:
    """Of a worker that has just begun."""
    made = BootExtension(kept)  # type: ignore[arg-type]
    made._serving = SimpleNamespace(control=control, devices=[])  # type: ignore[assignment]
    return made


def reset_at(seconds: int) -> dict[str, Any]:
    return {"event": "RESET", "timestamp": {"seconds": seconds, "microseconds": 1}, "data": {"guest": True}}


def test_each_reset_is_carried_out_once() -> None:
    kept, control = Kept(), Control()
    first = extension(kept, control)
    first._event(reset_at(1))
    second = extension(kept, control)  # the first one died before it took the event away
    second._event(reset_at(1))
    assert control.resets == 1
    second._event(reset_at(2))
    assert control.resets == 2


def test_a_worker_that_dies_too_early_has_it_done_again() -> None:
    kept, control = Kept(), Control()
    kept.dies = True
    with pytest.raises(KeyboardInterrupt):
        extension(kept, control)._event(reset_at(1))
    kept.dies = False
    extension(kept, control)._event(reset_at(1))
    assert control.resets == 2


def test_a_machine_that_wakes_up_keeps_its_memory() -> None:
    kept, control = Kept(), Control()
    extension(kept, control)._event(reset_at(1) | {"event": "WAKEUP"})
    assert control.resets == 0


def test_zones_without_a_device_are_told_of_too() -> None:
    options = extension(Kept(), Control()).control_options([])
    assert [(zone.id, zone.boot_size, zone.guest_numa_id) for zone in options["zones"]] == [("a", 5, 1), ("b", 7, None)]
    assert options["config"] == {"cpus": {"boot_vcpus": 2, "max_vcpus": 2}}


@pytest.mark.parametrize(
    ("error", "paused", "asked"),
    [
        (HostError("qemu", "stop", "no answer within 10 s"), False, ["stop", "cont"]),
        (HostError("qemu", "stop", "no answer within 10 s"), True, ["stop"]),
        (QemuRefused("qemu", "stop", "QEMU refused: no"), False, ["stop"]),
    ],
)
def test_a_qemu_that_is_late_to_stop_does_not_stay_so(error: HostError, paused: bool, asked: list[str]) -> None:
    """It would when it comes to that, of a machine that was taken to run. One that was paused before stays so."""

    def execute(command: str, arguments: None = None, timeout: float = 10.0) -> None:
        commands.append(command)
        raise error

    commands: list[str] = []
    late = extension(Kept(), Control(paused=paused))
    late._monitor = SimpleNamespace(execute=execute)  # type: ignore[assignment]
    with pytest.raises(HostError) as caught:
        late.hooks().pause()
    assert caught.value is error
    assert commands == asked


def test_a_machine_that_a_version_without_core_dumps_booted_has_none(tmp_path: Path) -> None:
    """A worker may be of a later version than the supervisor that it is a child of."""
    old = extension(Kept(), Control())
    old._monitor = SimpleNamespace()  # type: ignore[assignment]
    dump = old.hooks().coredump
    assert dump is not None
    with pytest.raises(UsageError, match="was booted by a version which has core dumps"):
        dump(tmp_path / "core")
