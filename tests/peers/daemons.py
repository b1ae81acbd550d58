"""Daemons that we did not write, as back ends; DPDK's is in dpdk.py.

Each listens at `socket`, or at a path of its own in `directory`, which has to be short: the path of a socket holds 107
bytes. The strings in `arguments` are added to its command line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.peers.processes import Peer, running, unused
from tests.peers.tree import command, version

GUEST_ADDRESS, GATEWAY = "192.0.2.2", "192.0.2.1"
"""What passt assigns, and what it answers for, whatever network the machine has."""


@contextmanager
def qemu_storage_daemon(
    directory: Path,
    image: Path,
    *arguments: str,
    num_queues: int = 1,
    writable: bool = True,
    socket: Path | None = None,
) -> Iterator[Peer]:
    """A raw image as a vhost-user-blk device; one client at a time, for as long as it lives. (libvhost-user, C)"""
    socket = socket or unused(directory, "qsd", ".sock")
    export = f"type=vhost-user-blk,id=export,node-name=image,addr.type=unix,addr.path={socket},num-queues={num_queues}"
    line = command(
        "bin/qemu-storage-daemon",
        "--blockdev",
        f"driver=file,node-name=image,filename={image},read-only={'off' if writable else 'on'}",
        "--export",
        f"{export},writable={'on' if writable else 'off'}",
        *arguments,
    )
    with running("qsd", version("qemu-utils"), line, directory, socket) as peer:
        yield peer


@contextmanager
def virtiofsd(
    directory: Path, share: Path, *arguments: str, tag: str | None = None, socket: Path | None = None
) -> Iterator[Peer]:
    """A directory as a file system. It ends, with status 0, when its first client leaves. (rust-vmm)"""
    socket = socket or unused(directory, "vfs", ".sock")
    line = command(
        "libexec/virtiofsd",
        f"--socket-path={socket}",
        f"--shared-dir={share}",
        "--sandbox=none",
        *([] if tag is None else [f"--tag={tag}"]),
        *arguments,
    )
    with running("virtiofsd", version("virtiofsd"), line, directory, socket) as peer:
        yield peer


@contextmanager
def passt(directory: Path, *arguments: str, socket: Path | None = None) -> Iterator[Peer]:
    """A network interface that the host's sockets stand behind, without frames of anybody else. (its own C code)"""
    socket = socket or unused(directory, "passt", ".sock")
    line = command(
        "bin/passt",
        "--foreground",
        "--vhost-user",
        f"--socket={socket}",
        *(["--runas=0"] if os.geteuid() == 0 else []),
        *("--ipv4-only", f"--address={GUEST_ADDRESS}", "--netmask=24", f"--gateway={GATEWAY}", "--dns=none"),
        *arguments,
    )
    with running("passt", version("passt"), line, directory, socket) as peer:
        yield peer
