"""A zone that is not in the front end's memory: the log says what is wrong and what to do, for each front end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.serve.rig import ADDR, BLOCK_SIZE, NB_BLOCKS, guest, zone
from tests.serve.test_device import BUSY, PLUG, served
from vhost_user.frontend import SharedRegion
from vhost_user.units import ByteCount, GuestAddress

SHARE = "have all of the zone be shared RAM of the VMM's (share=on), or give it another addr or hotplug_size"
SIZE = NB_BLOCKS * BLOCK_SIZE


@contextmanager
def other_file() -> Iterator[int]:
    fd = os.memfd_create("other", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SIZE)
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("case", ["elsewhere", "half", "two files"])
def test_what_is_missing_is_said_with_the_way_out(case: str, caplog: pytest.LogCaptureFixture) -> None:
    with served(zone()) as here:
        for _ in range(2):  # another front end that does the same has a line of its own
            with guest() as machine, other_file() as other:
                first = SharedRegion(ADDR, BLOCK_SIZE, machine.fd)
                rest = SharedRegion(GuestAddress(ADDR + BLOCK_SIZE), ByteCount(SIZE - BLOCK_SIZE), other)
                regions, expected = {
                    "elsewhere": ([replace(first, guest_address=GuestAddress(4 * ADDR))], "shares 0x0 bytes"),
                    "half": ([first], f"shares {BLOCK_SIZE:#x} bytes"),
                    "two files": ([first, rest], "has to adjoin the one before it in one file"),
                }[case]
                with here.connect(machine.features) as frontend:
                    frontend.regions.share([machine.ram.region, *regions])
                    frontend.vring(0).start(machine.layout)
                    for _ in range(2):
                        assert machine.ask(frontend, PLUG) is BUSY
            (line,) = (record.message for record in caplog.records if record.levelname == "WARNING")
            assert line.startswith("zone mem0: PLUG of ")
            assert expected in line
            assert line.endswith(SHARE)
            caplog.clear()


def test_a_file_that_was_cut_is_said_to_be_too_short(caplog: pytest.LogCaptureFixture) -> None:
    with guest() as machine, served(zone()) as here:
        frontend = here.start(machine)
        os.ftruncate(machine.fd, BLOCK_SIZE)
        assert machine.ask(frontend, PLUG, 1) is BUSY
        os.ftruncate(machine.fd, SIZE)
    (line,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    size = f"{BLOCK_SIZE:#x}"
    assert f"file={size} bytes: has to have {size}+{size} of the zone; don't truncate it" in line
