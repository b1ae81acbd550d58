"""A disk of another daemon's in a guest that is resized all the time: its buffers lie in memory that comes and goes."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import partial

import pytest

from tests import counts
from tests.boot.rig import Machine, machine
from tests.peers.daemons import qemu_storage_daemon
from vhost_user.units import MIB

pytestmark = pytest.mark.needs_peers

BOOT = 256 * MIB
STEP = 128 * MIB
MEMORY = f"--memory size={BOOT},shared=on,hotplug_method=virtio-mem,hotplug_size={4 * STEP},hotplugged_size={2 * STEP}"

WRITER = b"""
rounds=0
while [ ! -e /stop ]; do
    dd if=/dev/urandom of=/tmp/data bs=1M count=4
    dd if=/tmp/data of=/dev/vda bs=1M oflag=direct conv=notrunc || echo FAILED to write
    cmp /tmp/data /dev/vda -n 4194304 || echo FAILED to compare
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(dd if=/dev/vda bs=1M count=4 iflag=direct | md5sum)" = "$(md5sum </tmp/data)" ] || echo FAILED to read back
    rounds=$((rounds + 1))
done
echo "rounds $rounds"
"""


def has(vm: Machine, size: int) -> bool:
    return vm.zone("mem0")["plugged_size"] == size


def test_a_disk_is_used_while_the_guest_is_resized(
    tmp_path_factory: pytest.TempPathFactory, figure: Callable[[str, object], None]
) -> None:
    directory = tmp_path_factory.mktemp("b")
    image = directory / "image"
    image.write_bytes(bytes(16 * MIB))
    with qemu_storage_daemon(directory, image) as daemon:
        disk = f"-- -chardev socket,id=disk,path={daemon.socket} -device vhost-user-blk-pci,chardev=disk"
        with machine(directory, MEMORY, more=disk) as vm:
            vm.wait_for(partial(has, vm, 2 * STEP), "what was hotplugged at boot")
            vm.guest(f"echo {base64.b64encode(WRITER).decode()} | base64 -d >/writer")
            vm.guest("sh /writer >/written 2>/errors &")
            for number in range(counts.RESIZES_UNDER_IO):
                target = (1, 3)[number % 2] * STEP
                vm.api.resize(BOOT + target)
                vm.wait_for(partial(has, vm, target), f"resize {number}", 90.0)
            vm.send("touch /stop")
            vm.wait_for(lambda: "rounds" in vm.guest("cat /written"), "the writer ends")
            written = vm.guest("cat /written")
            assert "FAILED" not in written
            rounds = int(written.split("rounds")[1])
            assert rounds >= 1
            assert vm.zone("mem0")["unreturned_bytes"] == 0
            assert "error" not in vm.guest("dmesg | grep -i 'vda.*error' || true")
            figure("resizes under a disk's requests", counts.RESIZES_UNDER_IO)
            figure("rounds of 4 MiB written, read back and compared meanwhile", rounds)
