"""A host without huge pages while a Linux guest plugs: BUSY, nobody dies, and it goes on once there are some."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.boot.rig import machine
from tests.host import HugePagePool
from vhost_user.units import MIB, ByteCount
from virtio_mem.hostmem import files

pytestmark = [pytest.mark.needs_peers, pytest.mark.needs_hugetlb]

BOOT, STEP = 320 * MIB, 128 * MIB
"""STEP is what Linux adds to itself in one piece."""

HUGE = (
    f"--memory size={BOOT},hugepages=on,hugepage_size=2M,prefault=on,hotplug_method=virtio-mem,hotplug_size={4 * STEP}"
)


def test_the_target_is_reached_soon_after_pages_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    hugepages: Callable[[int, int], HugePagePool],
    figure: Callable[[str, object], None],
) -> None:
    pool = hugepages(2 * MIB, (BOOT + 2 * STEP) // (2 * MIB))
    somebody = files.memfd("somebody else", ByteCount(STEP), ByteCount(2 * MIB))
    try:
        os.posix_fallocate(somebody, 0, STEP)
        with machine(tmp_path_factory.mktemp("b"), HUGE) as vm:
            vm.api.resize(BOOT + 2 * STEP)
            vm.wait_for(lambda: "PLUG BUSY" in str(vm.zone("mem0")["answers"]), "the guest is told BUSY")
            assert vm.zone("mem0")["plugged_size"] == STEP
            assert vm.guest("echo it lives") == "it lives\n"
            os.close(somebody)
            somebody = -1
            began = time.monotonic()
            vm.wait_for(lambda: vm.zone("mem0")["plugged_size"] == 2 * STEP, "the target", 5.0)
            figure("seconds from huge pages that came back to the target", f"{time.monotonic() - began:.1f}")
            vm.guest("dd if=/dev/zero of=/dev/null bs=1M count=10 2>/dev/null")
            assert vm.held_by_host("mem0") == 2 * STEP
            assert pool.counter("free_hugepages") == 0
    finally:
        if somebody >= 0:
            os.close(somebody)
