"""The tree that scripts/peers makes: Debian's builds of daemons, VMMs and a guest kernel, and how to start them.

Nothing of it is installed in the machine. A program is started through the dynamic linker of the tree, which is told
where the libraries are; it then runs in the machine's own namespaces, so that sockets and files are where everybody
sees them, and needs no root. It replaces the linker that starts it, so its process id is the one that Popen knows.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tests.host import PEERS_TREE
from virtio_mem.boot.guest import find_kernel

LIBRARIES = PEERS_TREE / "usr/lib/x86_64-linux-gnu"


def command(program: str, *arguments: str) -> list[str]:
    """The command line that runs a program of the tree, such as `bin/passt`.

    The program ends with the thread that starts it, whatever becomes of the tests.
    """
    # DPDK's drivers too: it takes none by its path where a directory on the way to it can be written by everybody.
    libraries = ":".join(map(str, (LIBRARIES, *LIBRARIES.glob("dpdk/pmds-*"))))
    linker = [str(LIBRARIES / "ld-linux-x86-64.so.2"), "--library-path", libraries]
    return ["setpriv", "--pdeathsig=KILL", *linker, str(PEERS_TREE / "usr" / program), *arguments]


@cache
def _packages() -> dict[str, str]:
    return dict(line.split("=", 1) for line in (PEERS_TREE / "packages").read_text().splitlines())


def version(package: str) -> str:
    """The upstream version of a package in the tree: `11.1.3` of Debian's `1:11.1.3+ds-1~bpo13+1`."""
    return re.sub(r"^\d+:|[+~-](ds|dfsg).*$|-[^-]*$", "", _packages()[package])


def kernel() -> Path:
    """The directory of the guest's kernel, the newest one: `vmlinuz`, and its modules under `kernel/`."""
    return find_kernel(tree=PEERS_TREE)
