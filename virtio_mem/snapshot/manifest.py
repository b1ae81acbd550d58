"""snapshot.json: what a snapshot says of itself, as plain data; reading it is parsing it, and trusting nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from vhost_user.errors import UsageError
from virtio_mem.config.values import FILE

FORMAT = "virtio-mem snapshot"
VERSION = 2
FILE_NAME = "snapshot.json"
MOST_BYTES = 4 << 20
"""Of snapshot.json. A machine of a thousand zones has a tenth of that."""

MOST_OPTIONS = 256 << 10
"""Letters of the options: the time that it takes to split a line for a shell grows by the square of a word's length."""


@dataclass(frozen=True)
class PartState:
    """A zone's boot memory or hotplug region: `digest` of its content, or which file is the content (own_file.py)."""

    size: int
    digest: str | None
    path: str | None
    inode: int | None
    file_size: int | None
    device: int | None
    generation: int | None
    file_offset: int | None


@dataclass(frozen=True)
class DeviceState:
    """A device; sizes in bytes. `blocks` is the digest of ZONE.blocks."""

    addr: int
    region_size: int
    block_size: int
    node_id: int | None
    requested_size: int
    usable_region_size: int
    plugged_size: int
    blocks: str


@dataclass(frozen=True)
class ZoneState:
    """A zone, by its id; None for a part or a device that it has not."""

    id: str
    boot: PartState | None
    hotplug: PartState | None
    device: DeviceState | None


@dataclass(frozen=True)
class Manifest:
    """The whole: the machine's options as a line for a shell, and what MemoryManager was told besides."""

    options: str
    block_size: int | None
    usable_region: str
    zones: tuple[ZoneState, ...]

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Parse JSON. UsageError, which says where and why, for anything but what `encode` gives."""
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise refused(FILE_NAME, f"{len(data)} bytes", f"is not JSON ({error})") from error
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise refused("format", type(found).__name__, f"must be an object whose format is {FORMAT!r}")
        if (version := found.pop("version", None)) != VERSION:
            remedy = "restore it with the version that made it"
            raise refused("version", str(version)[:60], f"must be {VERSION}", remedy)
        zones = found.get("zones")
        if not isinstance(zones, list):
            raise refused("zones", type(zones).__name__, "must be a list")
        found["zones"] = tuple(_zone(zone, f"zones[{at}]") for at, zone in enumerate(zones))
        manifest = _build(cls, found, "snapshot")
        if len(manifest.options) > MOST_OPTIONS:
            raise refused("snapshot.options", f"{len(manifest.options)} letters", f"must be at most {MOST_OPTIONS}")
        return manifest


def snapshot_path(directory: str | Path) -> Path:
    """Where a snapshot is or is to be, as a path; UsageError for what no system call takes as one."""
    return FILE.check("directory", Path(directory) if isinstance(directory, str) else directory)


def part_path(directory: Path, zone_id: str, part: str) -> Path:
    """Where a zone's `boot`, `hotplug` or `blocks` are; whatever a path can't have is written as %XX."""
    return directory / f"{quote(zone_id, safe='')}.{part}"


def refused(field: str, value: object, limit: str, remedy: str = "take the snapshot anew") -> UsageError:
    """Why a snapshot is none."""
    return UsageError(field, value, limit, remedy)


def _zone(found: Any, where: str) -> ZoneState:
    if not isinstance(found, dict):
        raise refused(where, type(found).__name__, "must be an object")
    for name in ("boot", "hotplug"):
        if found.get(name) is not None:
            found[name] = _build(PartState, found[name], f"{where}.{name}")
    if found.get("device") is not None:
        found["device"] = _build(DeviceState, found["device"], f"{where}.device")
    return _build(ZoneState, found, where)


BuiltT = TypeVar("BuiltT", PartState, DeviceState, ZoneState, Manifest)

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "str": (str,),
    "str | None": (str, type(None)),
    "PartState | None": (PartState, type(None)),
    "DeviceState | None": (DeviceState, type(None)),
    "tuple[ZoneState, ...]": (tuple,),
}


def _build(kind: type[BuiltT], found: Any, where: str) -> BuiltT:
    """An object of dataclass `kind`, if `found` has just its fields, each of its type; numbers are not negative."""
    if not isinstance(found, dict):
        raise refused(where, type(found).__name__, "must be an object")
    wanted = {field.name: str(field.type) for field in fields(kind)}
    if found.keys() != wanted.keys():
        odd = ", ".join(sorted(map(str, found.keys() ^ wanted.keys())))
        raise refused(where, odd, f"must have the fields {', '.join(wanted)} and no others")
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, _TYPES[wanted[name]]):
            raise refused(f"{where}.{name}", type(value).__name__, f"must be {wanted[name]}")
        if isinstance(value, int) and not 0 <= value < 2**64:
            raise refused(f"{where}.{name}", value, "must be from 0 to 2**64 - 1")
    return kind(**found)
