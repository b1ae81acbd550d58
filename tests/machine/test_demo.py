"""The demo, as a newcomer runs it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.host import setting, settings_lock
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from virtio_mem import demo as program
from virtio_mem.demo import HUGEPAGES
from virtio_mem.managed_zone import SharedPart


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "virtio_mem.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.needs_hugetlb
def test_the_demo_without_options(tmp_path: Path) -> None:
    with settings_lock:
        before = setting(HUGEPAGES)
        done = demo("--picture", str(tmp_path / "demo.svg"))
        assert setting(HUGEPAGES) == before
    assert done.returncode == 0, done.stderr
    for line in (
        "mem0 ▕████████████████················                                ▏ 1 GiB at 0x100000000",
        "plugged 768 MiB, usable 1 GiB, blocks of 2 MiB; the host holds 805,306,368 bytes",
        "guest address 0x100000000 holds b'virtio-mem page 0000000100000000'",
        "mem0: 128 MiB plugged, 128 MiB held by the host",
        "huge0: 64 MiB plugged, 64 MiB held by the host",
    ):
        assert line in done.stdout
    ElementTree.parse(tmp_path / "demo.svg")


def test_a_machine_of_ones_own_on_a_packed_ring() -> None:
    done = demo("--memory", "size=8M,shared=on,hotplug_method=virtio-mem,hotplug_size=512M", "--packed")
    assert done.returncode == 0, done.stderr
    assert "mem0: 64 MiB plugged, 64 MiB held by the host" in done.stdout


def test_only_one_memory_is_taken() -> None:
    done = demo("--memory", "size=8M,shared=on", "--memory", "size=16M,shared=on")
    assert done.returncode == 2
    assert "--memory=size=8M,shared=on size=16M,shared=on: may be given only once; describe parts" in done.stderr


def test_a_reader_that_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "READER", "")
    with (tmp_path / "part").open("w+b") as file, suppress(ConnectionError):
        part = SharedPart("mem0", GuestAddress(0), ByteCount(4096), file.fileno(), HostOffset(0), hotplug=True)
        assert program._read_elsewhere(part, 0) == b""


def test_a_region_that_is_no_multiple_of_a_memory_block() -> None:
    done = demo("--memory", "size=8M,shared=on,hotplug_method=virtio-mem,hotplug_size=200M,hotplugged_size=2M")
    assert done.returncode == 0, done.stderr
    assert "mem0: 0 B plugged, 0 B held by the host" in done.stdout


def test_a_guest_that_cannot_start_is_told_of_at_once() -> None:
    zones = ["id=a,size=8M", "id=b,size=8M,shared=on,hotplug_size=256M,hotplugged_size=128M"]
    done = demo("--memory", "size=0,hotplug_method=virtio-mem", "--memory-zone", *zones)
    assert done.returncode == 1
    assert "the guest is gone" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("memory", "error"),
    [
        ("size=12X", "--memory size=12X"),
        ("size=64M", "shared=on"),
        ("size=1000,shared=on", "page size"),
        ("size=64M,shared=on", "nothing to show"),
        ("size=64M,shared=on,hotplug_size=1G", "nothing to show"),
    ],
)
def test_options_that_cannot_be_are_explained(memory: str, error: str) -> None:
    done = demo("--memory", memory)
    assert done.returncode == 2
    assert error in done.stderr
    assert "Traceback" not in done.stderr
