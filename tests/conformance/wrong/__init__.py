"""Devices that are wrong in one way each; see `fault`. Importing the package fills `FAULTS`."""

from tests.conformance.wrong import (
    answers,
    configuration,
    descriptors,
    features,
    host_memory,
    notices,
    notifications,
    precedence,
    ranges,
    resets,
    rings,
    rollback,
    states,
    transport,
    wire,
)
from tests.conformance.wrong.fault import FAULTS, Fault

__all__ = [
    "FAULTS",
    "Fault",
    "answers",
    "configuration",
    "descriptors",
    "features",
    "host_memory",
    "notices",
    "notifications",
    "precedence",
    "ranges",
    "resets",
    "rings",
    "rollback",
    "states",
    "transport",
    "wire",
]
