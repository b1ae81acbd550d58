"""What is done to a machine as a whole: paused, set going, reset, saved, dumped; one after the other, hooks and all."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from vhost_user.errors import UsageError
from virtio_mem.control.hooks import Hooks
from virtio_mem.control.zone import ControlledZone, nothing
from virtio_mem.events import Events
from virtio_mem.service import DeviceService


class WholeMachine(ABC):
    """A machine of these zones. What it does besides is in `hooks`."""

    def __init__(self, zones: dict[str, ControlledZone], hooks: Hooks) -> None:
        self.zones = zones
        self.events = Events()
        self.goes_on = False
        """Whether it is paused for a core dump alone: whoever comes after this process is to have it go on."""
        self._hooks = hooks
        self._stopped = False
        self._in_turn = threading.RLock()

    @abstractmethod
    def save(self, *, always: bool = False) -> None:
        """Save what is new, or what there is, for the process that comes next."""

    @abstractmethod
    def _settle(self, only: str | None = None) -> None:
        """Judge the operations of all zones, or of one."""

    def _devices(self) -> list[tuple[ControlledZone, DeviceService]]:
        return [(zone, zone.service) for zone in self.zones.values() if zone.service is not None]

    @property
    def paused(self) -> bool:
        """Whether a device is paused, or the machine without one."""
        devices = self._devices()
        return any(service.device.paused for _, service in devices) if devices else self._stopped

    def pause(self) -> None:
        """Have every device answer BUSY to what would change a block, and do what else pausing means here."""
        self._pause(goes_on=False)

    def _pause(self, *, goes_on: bool) -> None:
        with self._in_turn:
            self._hooks.pause()
            for _, service in self._devices():
                service.pause()
            self._stopped, self.goes_on = True, goes_on
            self.events.publish("paused")
            self.save(always=True)

    def resume(self) -> None:
        """Have everything go on."""
        self._go_on(self._hooks.resume)

    def _go_on(self, machine: Callable[[], None]) -> None:
        with self._in_turn:
            were_paused = [service for _, service in self._devices() if service.device.paused]
            for zone, service in self._devices():
                service.resume()
                zone.notify()
            try:
                machine()
            except BaseException:
                for service in were_paused:
                    service.pause()
                raise
            self._stopped = self.goes_on = False
            self.events.publish("resumed")
            self.save(always=True)

    def found(self, *, paused: bool, goes_on: bool) -> None:
        """How another process left the machine, before this one does anything to it."""
        self._stopped, self.goes_on = paused, paused and goes_on
        for _, service in self._devices() if paused else ():
            service.pause()

    def system_reset(self) -> bool:
        """Reset the machine, or where nothing here can, take it for reset already; see `machine_was_reset`.

        False, and not reset, while a device is paused.
        """
        with self._in_turn:
            if self._hooks.system_reset is None:
                return self.machine_was_reset()
            return not self.paused and self._hooks.system_reset()

    def machine_was_reset(self) -> bool:
        """The machine was reset: every block is unplugged. False where the host refused to, or a device is paused."""
        resets = [service.system_reset() for _, service in self._devices()]
        done = all(resets)
        self.events.publish("system-reset", done=done)
        for zone, _ in self._devices():
            zone.notify()
        self._settle()
        return done

    def snapshot(self, directory: Path) -> None:
        """Save the memory and the devices to `directory`, which must not exist. UsageError unless they are paused."""
        if self._hooks.snapshot is None:
            raise UsageError("vm.snapshot", directory, "can't be taken of this machine", "save it by its VMM")
        with self._in_turn:
            self._hooks.snapshot(directory)
        self.events.publish("saved", directory=str(directory))

    def coredump(self, path: Path) -> None:
        """Write what the guest has of memory to `path`, which must not exist, as an ELF core file. A machine that runs
        is paused for that, and goes on afterwards; HostError where it doesn't, with the file as it is to be."""
        if self._hooks.coredump is None:
            raise UsageError("vm.coredump", path, "needs boot memory and CPUs, which its VMM has", "dump it by that")
        with self._in_turn, ExitStack() as stack:
            if not self.paused:
                runs = self._hooks.running()
                self._pause(goes_on=runs)
                stack.callback(self._go_on, self._hooks.resume if runs else nothing)
            self._hooks.coredump(path)
            self.events.publish("dumped", file=str(path))
