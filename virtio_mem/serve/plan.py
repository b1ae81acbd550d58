"""What is served, as plain data: made from options by whoever starts the service, read by each worker."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vhost_user.units import ByteCount, GuestAddress

if TYPE_CHECKING:
    from virtio_mem.geometry import Geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedZone:
    """One device. `addr` is the guest address of its region, sizes are in bytes.

    `hotplugged_size` is the first target; `boot_size` is what the guest has of the zone besides the region: it counts
    in what the API tells.
    """

    id: str
    addr: GuestAddress
    hotplug_size: ByteCount
    block_size: ByteCount
    hotplugged_size: ByteCount = ByteCount(0)
    guest_numa_id: int | None = None
    prefault: bool = False
    unplugged_inaccessible: bool = True
    unrequested_unplug: bool = True
    boot_size: ByteCount = ByteCount(0)

    @property
    def geometry(self) -> Geometry:
        """The device's. UsageError where the standard forbids a value."""
        from virtio_mem.geometry import Geometry  # noqa: PLC0415 - a supervisor makes plans, and no devices

        return Geometry(
            addr=self.addr, region_size=self.hotplug_size, block_size=self.block_size, node_id=self.guest_numa_id
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePlan:
    """All that a worker has to know. `options` is what the user wrote; `verbose` counts the -v's.

    `user_zones`: the zones were made by the user, so that the machine as a whole can't be resized, only each of them.
    `api`, `qmp`: whether the supervisor keeps such a socket. `trace` is where traces go, see `files.trace_path`.
    """

    zones: tuple[ServedZone, ...]
    user_zones: bool = True
    api: bool = False
    qmp: bool = False
    state_dir: str | None = None
    trace: str | None = None
    options: str = ""
    verbose: int = 0

    def encode(self) -> bytes:
        """The plan as JSON."""
        return json.dumps(asdict(self)).encode()

    def serves_the_same(self, other: ServePlan) -> bool:
        """Whether a front end can't tell one from the other: they differ in what is logged or traced at most."""
        return self._to_front_ends() == other._to_front_ends()

    def _to_front_ends(self) -> ServePlan:
        return replace(self, options="", verbose=0, trace=None)

    @classmethod
    def decode(cls, data: bytes) -> ServePlan:
        """The plan from what `encode` gave."""
        fields: dict[str, Any] = json.loads(data)
        zones = tuple(ServedZone(**zone) for zone in fields.pop("zones"))
        return cls(zones=zones, **fields)
