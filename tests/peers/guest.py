"""The guest that the VMs boot: the kernel of the tree, and an initrd that holds busybox, modules and a test's script.

The initrd is a cpio archive of the "newc" form, uncompressed (the kernel's Documentation/driver-api/early-userspace/
buffer-format.rst): for each file a header of 13 numbers in eight hexadecimal digits, its name, and its content, name
and content padded to four bytes.
"""

from __future__ import annotations

import lzma
import re
import stat
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tests.host import PEERS_TREE
from tests.peers.processes import unused
from tests.peers.tree import kernel

BUSYBOX = PEERS_TREE / "usr/bin/busybox"

PROLOGUE = """#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /modules/order); do insmod /modules/$module.ko || echo "insmod $module failed"; done
"""
EPILOGUE = "poweroff -f\n"


def make_initrd(directory: Path, script: str, modules: Sequence[str] = ()) -> Path:
    """An initrd in `directory` that loads modules, with those that they need, runs a shell script, and powers off.

    A module is named as its file is (`virtio_mem`); what the kernel has built in need not be named, but may. KeyError
    where there is no such module. All of busybox's commands are there; `/dev`, `/proc` and `/sys` are mounted.
    """
    loaded = list(_with_dependencies(modules))
    files = {f"modules/{name}.ko": _module(name) for name in loaded}
    files["modules/order"] = "\n".join(loaded).encode()
    files["init"] = (PROLOGUE + script.rstrip("\n") + "\n" + EPILOGUE).encode()
    files["bin/busybox"] = BUSYBOX.read_bytes()
    path = unused(directory, "initrd", "")
    path.write_bytes(_archive(files))
    return path


@cache
def _modules() -> dict[str, Path | None]:
    """By name: the file, or None where it is built in."""
    found: dict[str, Path | None] = {
        _name(path): None for path in map(Path, (kernel() / "modules.builtin").read_text().splitlines())
    }
    return found | {_name(path): path for path in (kernel() / "kernel").rglob("*.ko.xz")}


def _name(path: Path) -> str:
    return path.name.split(".", 1)[0].replace("-", "_")


def _module(name: str) -> bytes:
    path = _modules()[name]
    assert path is not None
    return lzma.decompress(path.read_bytes())


def _with_dependencies(names: Sequence[str]) -> Iterator[str]:
    """The modules that have to be loaded, each after those that it needs, as its own .modinfo section names them."""
    seen: set[str] = set()

    def visit(name: str) -> Iterator[str]:
        if name in seen or _modules()[name] is None:
            return
        seen.add(name)
        depends = re.search(rb"\0depends=([^\0]*)\0", _module(name))
        for needed in filter(None, depends[1].decode().split(",") if depends else []):
            yield from visit(needed.replace("-", "_"))
        yield name

    for name in names:
        yield from visit(name.replace("-", "_"))


@cache
def _commands() -> list[str]:
    return subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()


def _archive(files: dict[str, bytes]) -> bytes:
    directories = {"dev", "proc", "sys", "tmp", "mnt"} | {name.rpartition("/")[0] for name in files} - {""}
    members = [_member(name, stat.S_IFDIR | 0o755, b"") for name in sorted(directories)]
    members += [_member(name, stat.S_IFREG | 0o755, content) for name, content in files.items()]
    members += [_member(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in _commands() if name != "busybox"]
    return b"".join([*members, _member("TRAILER!!!", 0, b"")])


def _member(name: str, mode: int, content: bytes) -> bytes:
    # Inode, mode, owner, group, links, time, size, device and device number, both in two parts, size of name, checksum.
    numbers = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    return _padded(header + name.encode() + b"\0") + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
