"""The register layout of virtio-mmio, as the device and the driver both read it (section "Virtio Over MMIO")."""

from __future__ import annotations

from enum import IntEnum, IntFlag

REGISTER_SPACE = 0x200
"""Bytes of guest-physical space that the registers take: 0x100, and the configuration space behind them."""

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
"""Of the register layout: 1 was the legacy one."""


class Register(IntEnum):
    """Offsets of the registers, section "MMIO Device Register Layout"."""

    MAGIC_VALUE = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_SIZE_MAX = 0x034
    QUEUE_SIZE = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    CONFIG_GENERATION = 0x0FC
    CONFIG = 0x100


class Interrupt(IntFlag):
    """Bits of InterruptStatus."""

    USED_BUFFER = 1
    CONFIG_CHANGE = 2
