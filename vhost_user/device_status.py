"""The device status: how far a driver has come with a device, and what has become of the device."""

from __future__ import annotations

from enum import IntFlag


class Status(IntFlag):
    """Device status bits, section "Device Status Field"."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128
