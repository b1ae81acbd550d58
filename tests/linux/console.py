"""A Linux guest's console: commands go in, what they print comes out."""

from __future__ import annotations

import re
from itertools import count

from tests.peers.processes import LATE
from tests.peers.qemu import Qemu

SHELL = """
stty -echo 2>/dev/null
echo console ready
while read -r line; do eval "$line"; done
"""
"""The script of a guest that does what it is told, until its console is closed or it is told to `exit`."""

_numbers = count(1)


class Console:
    """The shell of a guest whose script is SHELL."""

    def __init__(self, vm: Qemu) -> None:
        self.vm = vm

    def wait_until_up(self, seconds: float = LATE) -> None:
        self.vm.wait_for_output("console ready", seconds)

    def run(self, command: str, seconds: float = LATE) -> str:
        """What a command prints. RuntimeError where QEMU ends."""
        number = next(_numbers)
        # In two pieces each, so that an echo of the command is not taken for its end.
        self.vm.send(f'echo "<""{number}<"; {command}; echo ">""{number}>"')
        output = self.vm.wait_for_output(f">{number}>", seconds)
        found = re.search(rf"<{number}<\r?\n(.*?)>{number}>", output, re.DOTALL)
        assert found, output[-1000:]
        return found[1].replace("\r", "")

    def number(self, command: str) -> int:
        """What a command prints, a decimal number."""
        return int(self.run(command).strip())

    def memory_total(self) -> int:
        """MemTotal, in bytes."""
        return self.number("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo") << 10

    def hotplugged(self) -> int:
        """Bytes of what /proc/iomem names as virtio_mem's System RAM."""
        lines = re.findall(r"([0-9a-f]+)-([0-9a-f]+) : System RAM \(virtio_mem\)", self.run("cat /proc/iomem"))
        return sum(int(last, 16) - int(first, 16) + 1 for first, last in lines)

    def has_online(self, size: int) -> bool:
        """Whether so much is plugged, and all of it in use: a block counts in MemTotal when it is online, which comes
        later than the device's answer, and later than its line in /proc/iomem."""
        return (
            self.hotplugged() == size and self.run("grep -L '^online' /sys/devices/system/memory/memory*/state") == ""
        )

    def kernel_log(self) -> dict[str, int]:
        """What virtio_mem said last of each of its sizes."""
        said = re.findall(r"virtio_mem virtio\d+: ([a-z ]+): (0x[0-9a-f]+)", self.run("dmesg | grep virtio_mem"))
        return {name: int(value, 16) for name, value in said}

    def complaints(self) -> str:
        """What virtio_mem warned of, and what the kernel thinks is a bug."""
        return self.run("dmesg -r | grep -E '^<[0-4]>' | grep -iE 'virtio_mem|BUG|WARN|Oops|hung'")
