"""The control of a machine's memory: thread-safe, and the one place where a resize becomes an operation.

The order of locks: a device's first, then that of the operations, then that of the events. None of them is held while a
zone's `notify`, a hook of the machine or `save` is called. What is done to the machine as a whole is in whole.py.

    control = Control.from_manager(manager, notify=transport_notified)
    operation = control.resize(2 << 30)
    control.poll(time.monotonic())                # once a second
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from vhost_user.errors import UsageError
from virtio_mem.control.hooks import Hooks, manager_hooks
from virtio_mem.control.info import ZoneBlocks, machine_counters, machine_info
from virtio_mem.control.watch import ZoneWatch
from virtio_mem.control.whole import WholeMachine
from virtio_mem.control.zone import ControlledZone, UnknownZone, always, nothing
from virtio_mem.operation import Operation, State, ZoneView
from virtio_mem.operations import Operations
from virtio_mem.targets import hotplugged_part

if TYPE_CHECKING:
    from virtio_mem.manager import MemoryManager

log = logging.getLogger(__name__)

_EVENTS = {State.REACHED: "reached", State.SUPERSEDED: "superseded", State.STALLED: "stalled"}
"""The events that tell of an operation's state; of one that is refused the guest's requests told already."""


class Control(WholeMachine):
    """Controls the memory of a machine. Close it, or use it as a context manager: it then lets go of the devices.

    With `user_zones` the machine has no size of its own, and its zones are resized one by one; without, it has exactly
    one zone. `memory_options` and `config` are what `vm.info` says of --memory and of the machine besides. `save` is
    called with what `load()` takes, whenever there is something new, in the thread that brought it and before that is
    answered.
    """

    def __init__(
        self,
        zones: Iterable[ControlledZone],
        *,
        user_zones: bool = True,
        memory_options: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        hooks: Hooks | None = None,
        save: Callable[[bytes], None] | None = None,
    ) -> None:
        super().__init__({zone.id: zone for zone in zones}, hooks or Hooks())
        if not user_zones and len(self.zones) != 1:
            raise UsageError("zones", len(self.zones), "a machine without user zones has one", "use user_zones=True")
        self.user_zones = user_zones
        self.memory_options = dict(memory_options or {})
        self.config = dict(config or {})
        self.operations = Operations()
        self._save = save
        self._saving = threading.Lock()
        self._connected = self._last_look = {zone.id: zone.connected() for zone in self.zones.values()}
        self._watches = [ZoneWatch(self, zone, service) for zone, service in self._devices()]

    @classmethod
    def from_manager(
        cls,
        manager: MemoryManager,
        *,
        notify: Callable[[str], None] | None = None,
        connected: Callable[[], bool] = always,
        **options: Any,
    ) -> Control:
        """The control of a manager that a VMM embeds. Call its `poll()` in place of the manager's own.

        `notify` is called with the id of a zone whose guest may be due a notice: have it call `notify_config()` of the
        zone's transport. `options` are those of the class.
        """
        from virtio_mem.control.options import memory_options, zone_options  # noqa: PLC0415

        zones = [
            ControlledZone(
                id=zone.id,
                service=zone.service,
                boot_size=zone.plan.spec.size,
                guest_numa_id=zone.plan.guest_numa_id,
                notify=partial(notify, zone.id) if notify else nothing,
                connected=connected,
                options=zone_options(zone.plan),
            )
            for zone in manager.zones.values()
        ]
        config = manager.config
        options.setdefault("hooks", manager_hooks(manager))
        return cls(zones, user_zones=config.user_zones, memory_options=memory_options(config), **options)

    # Resizing.

    def resize(self, size: int) -> Operation:
        """Let the machine have `size` bytes in all. UsageError as of `resize_zone`, and with user zones."""
        if self.user_zones:
            limit = "a machine with memory zones has no size of its own to set"
            raise UsageError("desired_ram", size, limit, f"resize one of its zones: {', '.join(self.zones)}")
        (zone,) = self.zones.values()
        return self._resize(zone, size)

    def resize_zone(self, zone_id: str, size: int) -> Operation:
        """Let zone `zone_id` have `size` bytes in all, boot memory included.

        The same target again is the same operation again, or one that is reached at once. UsageError, and nothing
        changed, for a size that the zone can't have; UnknownZone.
        """
        return self._resize(self.zone(zone_id), size)

    def _resize(self, zone: ControlledZone, size: int) -> Operation:
        service, sizes = zone.service, {"boot_size": zone.boot_size, "hotplug_size": zone.hotplug_size}
        plugged = hotplugged_part("desired_ram", size, **sizes, block_size=zone.block_size)
        now = time.monotonic()
        if service is None:
            operation, _ = self.operations.start(zone.id, size, size, 1, now)
        else:
            with service.lock:
                service.resize(plugged)
                operation, before = self.operations.start(
                    zone.id, size, zone.size, service.device.geometry.block_size, now
                )
                self.events.publish("requested", zone.id, operation=operation.id, target=size, plugged=zone.size)
                for settled in filter(None, (before, operation)):
                    self.tell(settled)
        zone.notify()
        self.save()
        return operation

    def wait(
        self, operation_id: int, seconds: float, given_up: Callable[[], bool] | None = None
    ) -> dict[str, Any] | None:
        """The operation as plain data once it does not run any more, or after `seconds`, or once `given_up()`, which is
        asked about once a second. None for one that is not known. It may have to wait for the device of its own zone,
        and for no other."""
        zone_id = (self.operations.get(operation_id) or {}).get("zone", "")
        return self.operations.wait(operation_id, seconds, lambda: self._settle(zone_id), given_up or (lambda: False))

    # What is seen to in time.

    def poll(self, now: float) -> None:
        """To be called about once a second, with time.monotonic(): drivers that were told BUSY are asked to try again,
        and operations are judged."""
        for zone, service in self._devices():
            service.poll(now)
            zone.notify()
        for watch in self._watches:
            watch.look(now)
        self._look_who_is_connected()
        self._settle()

    # From one process to the next.

    def save(self, *, always: bool = False) -> None:
        """Save what is new, or what there is, if somebody wants it saved."""
        if self._save is None:
            return
        with self._saving:  # so that what is newer is saved later
            if always or self.operations.changed:
                self._save(self.dump())

    def dump(self) -> bytes:
        """What `load()` takes."""
        operations = self.operations.dump()
        state = {"paused": self.paused, "goes_on": self.goes_on, "connected": self._connected, "operations": operations}
        return json.dumps(state).encode()

    def load(self, saved: bytes) -> None:
        """Go on where the process before was. What can't be read is logged, and given up."""
        try:
            state = json.loads(saved)
            operations, paused = Operations.load(state["operations"]), bool(state["paused"])
            # What follows a process of an earlier version did not save.
            were_there, goes_on = state.get("connected", {}), bool(state.get("goes_on", False))
            connected = {key: bool(were_there.get(key, there)) for key, there in self._connected.items()}
        except (AttributeError, ValueError, TypeError, KeyError, RecursionError) as error:
            log.warning("what was saved of the operations can't be read, and they begin anew: %r", error)
            return
        self.operations, self._connected = operations, connected
        self.found(paused=paused, goes_on=goes_on)

    # Information.

    def info(self) -> dict[str, Any]:
        """All that there is to know, as plain data: the body of `vm.info`."""
        return machine_info(self)

    def counters(self) -> dict[str, dict[str, int]]:
        """What only grows, by zone: the body of `vm.counters`."""
        return machine_counters(self)

    def blocks(self, zone_id: str) -> ZoneBlocks:
        """Which blocks of a zone are plugged; UnknownZone."""
        return ZoneBlocks(self.zone(zone_id))

    def zone(self, zone_id: str) -> ControlledZone:
        """The zone of that name; UnknownZone."""
        if zone_id not in self.zones:
            raise UnknownZone("id", zone_id, f"has to be one of {', '.join(self.zones)}", "name a zone that there is")
        return self.zones[zone_id]

    def tell(self, operation: Operation) -> None:
        """Publish what became of `operation`, if there is something to tell."""
        kind = _EVENTS.get(operation.state)
        facts = self.operations.get(operation.id)
        if kind is None or facts is None:
            return
        log.info("zone %s: operation %d: %s", operation.zone, operation.id, facts["verdict"])
        details = {name: facts[name] for name in ("target", "plugged", "reason", "verdict")}
        self.events.publish(kind, operation.zone, operation=operation.id, **details)

    def wake(self) -> None:
        """Have those who wait for operations and events look whether they are to give up."""
        self.operations.wake()
        self.events.wake()

    def close(self) -> None:
        """Let go of the devices, and end who waits for events."""
        for watch in self._watches:
            watch.close()
        self.events.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Private.

    def _look_who_is_connected(self) -> None:
        """Tell of front ends that came or went, once they are seen twice: a process that takes over from another one
        has their connections a moment later, which is nothing to tell of."""
        look = {zone.id: zone.connected() for zone in self.zones.values()}
        changed = [key for key, there in look.items() if there == self._last_look[key] != self._connected[key]]
        self._last_look = look
        for zone_id in changed:
            self._connected = {**self._connected, zone_id: look[zone_id]}
            self.events.publish("connected" if look[zone_id] else "disconnected", zone_id)
        if changed:
            self.save(always=True)

    def _settle(self, only: str | None = None) -> None:
        for zone, service in self._devices():
            if only not in (None, zone.id):
                continue
            connected = zone.connected()
            with service.lock:
                view = ZoneView(zone.size, zone.target, connected, service.device.paused)
                operation = self.operations.settle(zone.id, view, time.monotonic())
                if operation is not None:
                    self.tell(operation)
        self.save()
