"""The guest that is booted where the user names no kernel: a Linux from the tree of scripts/peers, with a shell.

The tree has two kernels of Debian's, that of trixie's backports and that of bookworm; the initrd is made when it is
needed, in a hundredth of a second, from the tree's busybox and the kernel's modules.
"""

from __future__ import annotations

import re
from pathlib import Path

from vhost_user.errors import HostError
from virtio_mem.boot.find import TREE
from virtio_mem.boot.initrd import build_initrd

MODULES = ("virtio_pci", "virtio_mem", "qemu_fw_cfg", "virtio_blk", "virtiofs")
"""The device's driver, its bus, what tells QEMU of VMCOREINFO, and the drivers of devices that one may want to try."""

SHELL = """\
mkdir -p /etc /root
hostname guest
export PATH=/bin:/sbin HOME=/root PS1='guest# ' TERM=linux
echo
echo "Linux $(uname -r), with $(free -m | awk '/^Mem/ { print $2 }') MiB of memory. Try:"
echo "  free -m                       how much there is now"
echo "  dmesg | grep virtio_mem       what the driver says"
echo "  grep virtio_mem /proc/iomem   where plugged memory is"
echo "  poweroff -f                   to end (or Ctrl-A x)"
cd /root
setsid cttyhack sh || sh
poweroff -f
"""


def find_kernel(version: str | None = None, tree: Path = TREE) -> Path:
    """The directory of a kernel in the tree: `vmlinuz`, and its modules. The newest, or the newest whose version begins
    as `version` does. HostError where there is none."""
    there = sorted((tree / "usr/lib/modules").glob("*/vmlinuz"), key=lambda path: _sort_key(path.parent.name))
    fitting = [path.parent for path in there if version is None or f"{path.parent.name}.".startswith(f"{version}.")]
    if not fitting:
        names = ", ".join(path.parent.name for path in there) or "none"
        limit = f"is not in {tree}, whose kernels are: {names}"
        raise HostError("kernel", version or "linux", limit, "run scripts/peers, or name a file by --kernel")
    return fitting[-1]


def _sort_key(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def default_initrd(kernel: Path, script: str = SHELL, tree: Path = TREE) -> bytes:
    """An initrd with busybox, the drivers, and a shell on the console, or another script for /init."""
    return build_initrd(kernel, tree / "usr/bin/busybox", script, MODULES)
