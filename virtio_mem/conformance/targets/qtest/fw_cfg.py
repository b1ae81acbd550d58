"""What QEMU tells the firmware: its fw_cfg device, by the two ports that a PC has it at.

Sources: docs/specs/fw_cfg.rst in QEMU; ACPI, "System Address Map Interfaces", for the entries of etc/e820.
"""

from __future__ import annotations

import struct

from virtio_mem.conformance.targets.qtest.client import Failure, QTest

_SELECT_PORT, _DATA_PORT = 0x510, 0x511
_DIRECTORY = 0x19
_COUNT = struct.Struct(">I")
_FILE = struct.Struct(">IH2x56s")
_E820 = "etc/e820"
_ENTRY = struct.Struct("<QQI")
_IS_RAM = 1

_MOST_FILES, _MOST_ENTRIES = 256, 256
"""More of either is nothing that a QEMU says."""


def boot_memory(qtest: QTest, failure: Failure) -> list[tuple[int, int]]:
    """Guest address and size of each range that the map for the firmware calls RAM. `failure` where there is no map."""
    (count,) = _COUNT.unpack(_read(qtest, _DIRECTORY, _COUNT.size))
    for size, key, name in _FILE.iter_unpack(_more(qtest, min(count, _MOST_FILES) * _FILE.size)):
        if name.rstrip(b"\0") == _E820.encode() and not size % _ENTRY.size and size <= _MOST_ENTRIES * _ENTRY.size:
            entries = _ENTRY.iter_unpack(_read(qtest, key, size))
            return [(start, length) for start, length, kind in entries if kind == _IS_RAM]
    raise failure(f"QEMU has no {_E820} for its firmware, or none of whole entries")


def _read(qtest: QTest, key: int, size: int) -> bytes:
    qtest.port_out(_SELECT_PORT, key, 2)
    return _more(qtest, size)


def _more(qtest: QTest, size: int) -> bytes:
    """The next bytes of what is selected."""
    return bytes(qtest.port_in(_DATA_PORT, 1) for _ in range(size))
