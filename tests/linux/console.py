"""A Linux guest's console: commands go in, what they print comes out. Whoever boots the guest, it runs OBEY."""

from __future__ import annotations

import re
from itertools import count

from tests.peers.processes import LATE, Peer
from virtio_mem.boot.console import READY

_numbers = count(1)


class Console:
    """The console of a guest whose script is `virtio_mem.boot.console.OBEY`. The peer's input is what the guest reads,
    and what the guest writes is in the peer's output."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def wait_for_boot(self, boots: int = 1, seconds: float = LATE) -> None:
        """Until the guest is ready, for that many times in all."""
        self.peer.wait_for_output(rf"(?s)(?:{READY}.*?){{{boots}}}", seconds)

    def run(self, command: str, seconds: float = LATE) -> str:
        """What a command prints. AssertionError where it fails, RuntimeError where the guest's VMM ends."""
        number = next(_numbers)
        # In two pieces, so that an echo of the command is not taken for its beginning.
        self.peer.send(f'echo "<""{number}<"; {command}')
        answer = rf"(?ms)<{number}<\r*\n(.*?)^--- (\d+)\r*\n"
        found = re.search(answer, self.peer.wait_for_output(answer, seconds))
        assert found
        printed = found[1].replace("\r", "")
        assert found[2] == "0", f"{command} ended with {found[2]} and printed {printed}"
        return printed

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
        offline = "grep -L '^online' /sys/devices/system/memory/memory*/state || true"
        return self.hotplugged() == size and self.run(offline) == ""

    def kernel_log(self) -> dict[str, int]:
        """What virtio_mem said last of each of its sizes."""
        said = re.findall(r"virtio_mem virtio\d+: ([a-z ]+): (0x[0-9a-f]+)", self.run("dmesg | grep virtio_mem"))
        return {name: int(value, 16) for name, value in said}

    def complaints(self) -> str:
        """What virtio_mem warned of, and what the kernel thinks is a bug."""
        return self.run("dmesg -r | grep -E '^<[0-4]>' | grep -iE 'virtio_mem|BUG|WARN|Oops|hung' || true")
