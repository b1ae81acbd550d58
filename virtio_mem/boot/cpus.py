"""`--cpus`: how many processors the guest has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from virtio_mem.config.numa import MAX_CPU
from virtio_mem.config.option import Option, kind
from virtio_mem.config.values import Number

MAX_CPUS = MAX_CPU + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CpusConfig(Option):
    """`--cpus`: `boot` processors, of which none comes later: `max`, where it is given, is the same number."""

    OPTION: ClassVar[str] = "--cpus"

    boot: int = field(default=1, metadata=kind(Number(MAX_CPUS)))
    max: int | None = field(default=None, metadata=kind(Number(MAX_CPUS)))

    def _check_rules(self) -> None:
        if self.boot == 0:
            raise self.error("boot", "a machine has one processor at least", "write boot=1")
        if self.max is not None and self.max != self.boot:
            limit = f"must be boot={self.boot}: processors can't be added later"
            raise self.error("max", limit, "leave max out")
