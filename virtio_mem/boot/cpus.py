"""`--cpus`: how many processors the guest has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from virtio_mem.config.option import Option, kind
from virtio_mem.config.values import Number

MAX_CPUS = 4096
"""Processors that QEMU's machine q35 has at most, since QEMU 9.1: `cpu-max` of the monitor's query-machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpusConfig(Option):
    """`--cpus`: `boot` processors, of which none comes later: `max`, where it is given, is the same number."""

    OPTION: ClassVar[str] = "--cpus"

    boot: int = field(default=1, metadata=kind(Number(MAX_CPUS, minimum=1)))
    max: int | None = field(default=None, metadata=kind(Number(MAX_CPUS, minimum=1)))

    def _check_rules(self) -> None:
        if self.max is not None and self.max != self.boot:
            limit = f"must be boot={self.boot}: processors can't be added later"
            raise self.error("max", limit, "leave max out")
