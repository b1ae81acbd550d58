"""An initrd: busybox, kernel modules with those that they need, and a script.

It is a cpio archive of the "newc" form, uncompressed (the kernel's Documentation/driver-api/early-userspace/
buffer-format.rst): for each file a header of 13 numbers in eight hexadecimal digits, its name, and its content, name
and content padded to four bytes.
"""

from __future__ import annotations

import lzma
import re
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from vhost_user.errors import UsageError

PROLOGUE = """#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /modules/order); do insmod /modules/$module.ko || echo "insmod $module failed"; done
"""


def build_initrd(kernel: Path, busybox: Path, script: str, modules: Sequence[str] = ()) -> bytes:
    """An initrd for the kernel whose modules are in the directory `kernel`, which loads some and runs `script`.

    A module is named as its file is (`virtio_mem`); what the kernel has built in need not be named, but may. UsageError
    where there is no such module. All of busybox's commands are there; `/dev`, `/proc` and `/sys` are mounted.
    """
    available = find_modules(kernel)
    loaded = list(_with_dependencies(available, modules))
    files = {f"modules/{name}.ko": content for name, content in loaded}
    files["modules/order"] = "\n".join(name for name, _ in loaded).encode()
    files["init"] = (PROLOGUE + script.rstrip("\n") + "\n").encode()
    files["bin/busybox"] = busybox.read_bytes()
    return _archive(files, _commands(busybox))


@cache
def find_modules(kernel: Path) -> Mapping[str, Path | None]:
    """The modules in the directory `kernel` by name: the file of each, or None where it is built in."""
    found: dict[str, Path | None] = {
        _name(path): None for path in map(Path, (kernel / "modules.builtin").read_text().splitlines())
    }
    for pattern in ("*.ko", "*.ko.xz"):
        found |= {_name(path): path for path in (kernel / "kernel").rglob(pattern)}
    return found


def _name(path: Path) -> str:
    return path.name.split(".", 1)[0].replace("-", "_")


def _with_dependencies(available: Mapping[str, Path | None], names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The modules that have to be loaded, each after those that it needs, as its own .modinfo section names them."""
    seen: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        if name not in available:
            raise UsageError("module", name, "is neither built into this kernel nor among its modules")
        path = available[name]
        if name in seen or path is None:
            return
        seen.add(name)
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in filter(None, depends[1].decode().split(",") if depends else []):
            yield from visit(needed.replace("-", "_"))
        yield name, content

    for name in names:
        yield from visit(name.replace("-", "_"))


@cache
def _commands(busybox: Path) -> list[str]:
    return subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()


def _archive(files: Mapping[str, bytes], commands: Sequence[str]) -> bytes:
    directories = {"dev", "proc", "sys", "tmp", "mnt"} | {name.rpartition("/")[0] for name in files} - {""}
    members = [_member(name, stat.S_IFDIR | 0o755, b"") for name in sorted(directories)]
    members += [_member(name, stat.S_IFREG | 0o755, content) for name, content in files.items()]
    members += [_member(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in commands if name != "busybox"]
    return b"".join([*members, _member("TRAILER!!!", 0, b"")])


def _member(name: str, mode: int, content: bytes) -> bytes:
    # Inode, mode, owner, group, links, time, size, device and device number, both in two parts, size of name, checksum.
    numbers = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    return _padded(header + name.encode() + b"\0") + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
