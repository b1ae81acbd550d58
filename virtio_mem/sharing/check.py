"""Whether zones can be shared at all: the same answer from a configuration, before anything is made, and from zones."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from vhost_user.errors import UsageError
from virtio_mem.config import ConfigError, VmMemoryConfig
from virtio_mem.managed_zone import ManagedZone

_PRIVATE = "is private memory, which no other process can map, so no vhost-user daemon either"
_REMEDY = "use shared=on"


def require_shareable(config: VmMemoryConfig, zones: Collection[str] | None = None) -> None:
    """Raise ConfigError if daemons could not be given the zones of these names, or all if there are none.

    Huge pages are always shared; other zones need shared=on.
    """
    plans = config.zone_plans()
    require_known(zones, [plan.spec.id for plan in plans], ConfigError)
    for plan, option in zip(plans, config.zones or (config.memory,), strict=True):
        chosen = zones is None or plan.spec.id in zones
        if chosen and not (plan.spec.shared or plan.spec.hugepages):
            raise option.error("shared", _PRIVATE, _REMEDY)


def require_shared(zones: Iterable[ManagedZone]) -> None:
    """Raise UsageError if one of the zones is private memory."""
    for zone in zones:
        if not zone.zone.shared:
            raise UsageError(f"zone {zone.id} shared", "off", _PRIVATE, _REMEDY)


def require_known(zones: Collection[str] | None, known: Collection[str], error: type[UsageError] = UsageError) -> None:
    """Raise UsageError for a zone that doesn't exist, and for none at all."""
    if zones is None:
        return
    if isinstance(zones, str):
        raise error("zones", zones, "has to be a collection of names, not one", f"give [{zones!r}]")
    for zone in zones:
        if zone not in known:
            raise error("zone", zone, f"has to be one of {', '.join(known)}", "name a zone that there is")
    if not zones:
        raise error("zones", "none", "one or more", "name some, or leave it out for all")
