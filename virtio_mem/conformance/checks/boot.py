"""What the machine says of its memory before there is a driver."""

from __future__ import annotations

from virtio_mem.conformance.check import check, expect, need_blocks
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability


@check("MEM-REGION-2", needs=Capability.BOOT_MEMORY)
def region_is_no_boot_memory(session: Session) -> None:
    """A guest that took some of the region for RAM would use it before any block is plugged."""
    need_blocks(session, 1)
    config = session.config()
    end = config.addr + config.region_size
    for start, size in session.boot_memory():
        apart = start + size <= config.addr or end <= start
        expect("MEM-REGION-2", apart, f"RAM at {start:#x}, {size} bytes", f"none from {config.addr:#x} to {end:#x}")
