"""Devices that are wrong in one way each; see `fault`. Importing the package fills `FAULTS`."""

from tests.conformance.wrong import (
    answers,
    configuration,
    features,
    host_memory,
    notices,
    precedence,
    ranges,
    resets,
    rings,
    rollback,
    states,
    wire,
)
from tests.conformance.wrong.fault import FAULTS, Fault

__all__ = [
    "FAULTS",
    "Fault",
    "answers",
    "configuration",
    "features",
    "host_memory",
    "notices",
    "precedence",
    "ranges",
    "resets",
    "rings",
    "rollback",
    "states",
    "wire",
]
