"""What a machine does besides, where its control does something to it as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from virtio_mem.control.zone import always, nothing

if TYPE_CHECKING:
    from virtio_mem.manager import MemoryManager


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a machine does besides: `pause` is called before the devices are paused, `resume` after they were resumed.

    HostError where that fails; either leaves the devices as they were then. `system_reset` resets the machine itself,
    on which `Control.machine_was_reset` is called, and returns what that returned; None where nothing can.
    `snapshot` saves the paused machine's memory and devices to a directory, `coredump` writes its memory to a file;
    None where nothing can. `running` says whether the machine itself runs: what something else has stopped does not go
    on behind a core dump.
    """

    pause: Callable[[], None] = nothing
    resume: Callable[[], None] = nothing
    running: Callable[[], bool] = always
    system_reset: Callable[[], bool] | None = None
    snapshot: Callable[[Path], None] | None = None
    coredump: Callable[[Path], None] | None = None


def manager_hooks(manager: MemoryManager) -> Hooks:
    """Those of a machine of which nothing is known but its memory."""
    return Hooks(snapshot=partial(_save, manager), coredump=partial(_dump, manager))


def _save(manager: MemoryManager, directory: Path) -> None:
    from virtio_mem.snapshot import save  # noqa: PLC0415 - for those who take one

    save(manager, directory)


def _dump(manager: MemoryManager, path: Path) -> None:
    from virtio_mem.coredump import core_dump  # noqa: PLC0415 - for those who take one

    core_dump(manager, path)
