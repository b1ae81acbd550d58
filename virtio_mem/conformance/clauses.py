"""The clauses that a device is judged by: `spec-notes/`, as it comes with the package.

`notes/` has links to the files of `spec-notes/`, whose README says what an entry is. A clause that the kit has no check
for is in `beyond.toml`, with the reason.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from virtio_mem.conformance.target import Capability

NOTES = ("memory-device", "dependable", "rings", "transport")
"""The files, in the order of a report."""

DEPENDED = "DEPENDED"
"""The strength of a rule that is not the standard's."""


@dataclass(frozen=True, slots=True)
class DeviceClause:
    """One demand on a device. `beyond` says why no check of the kit can show it; "" where there is one."""

    id: str
    strength: str
    section: str
    says: str
    beyond: str

    @property
    def is_depended(self) -> bool:
        """Whether this is one of our rules, not of the standard's clauses."""
        return self.strength == DEPENDED


@cache
def device_clauses() -> Mapping[str, DeviceClause]:
    """Every clause whose party is the device, by id, in the order of the files."""
    here = resources.files("virtio_mem.conformance")
    beyond = {
        id_: group["reason"]
        for group in tomllib.loads((here / "beyond.toml").read_text())["group"]
        for id_ in group["clauses"]
    }
    clauses: dict[str, DeviceClause] = {}
    for name in NOTES:
        for entry in tomllib.loads((here / "notes" / f"{name}.toml").read_text())["clause"]:
            if entry["party"] == "device":
                says = " ".join(entry["says"].split())
                reason = entry.get("untestable") or beyond.get(entry["id"], "")
                if entry["strength"] == "MAY":
                    reason = "a device may do so or not"
                clause = DeviceClause(entry["id"], entry["strength"], entry["section"], says, reason)
                clauses[clause.id] = clause
    return MappingProxyType(clauses)


@cache
def expected_clauses(kind: str, capabilities: Capability) -> tuple[str, ...]:
    """The clauses that have to get a verdict with every target of this kind that can do so much: `expected.toml`.

    () for other kinds.
    """
    text = (resources.files("virtio_mem.conformance") / "expected.toml").read_text()
    table = tomllib.loads(text).get(kind, {})
    clauses = list(table.get("clauses", ()))
    for names, more in table.get("with", {}).items():
        if all(Capability[name] in capabilities for name in names.split()):
            clauses += more
    return tuple(clauses)
