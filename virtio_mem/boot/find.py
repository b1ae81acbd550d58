"""A QEMU that can do it: for a guest of ours 10.2 or later, the first that has the generic vhost-user device.

The one that was named, or the one in PATH, or the one in the tree that scripts/peers makes. A program of that tree, or
of the one for QEMU 7.2 in it, is started through the dynamic linker of its tree, which is told where the libraries are.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from vhost_user.errors import HostError, UsageError

PROGRAM = "qemu-system-x86_64"

TREE = Path(__file__).resolve().parents[2] / ".cache/peers/root"
"""What scripts/peers makes, in the project's directory."""

OLD_TREE = "bookworm"
"""Where in that tree the one of an older Debian is."""


class Wanted(NamedTuple):
    """What is asked of a QEMU: the `oldest` version that will do, what makes it the first (`has`), and how the user
    names another one."""

    oldest: tuple[int, int]
    has: str
    named_by: str

    @property
    def remedy(self) -> str:
        """What to do without one."""
        return f"scripts/peers gets one in a minute, without root; or name one by {self.named_by}"


FOR_A_GUEST = Wanted((10, 2), "that has vhost-user-test-device", "--qemu")

_PATIENCE = 20.0
"""Seconds that a QEMU has to tell what it is."""


@dataclass(frozen=True)
class Qemu:
    """How to start it: `command` is followed by its arguments, `environment` added to ours.

    `exits_with_parent`: whether it can be asked to end when its parent does.
    """

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    version: tuple[int, int] = (0, 0)
    exits_with_parent: bool = False
    release: str = ""
    """The version as it says it itself: `11.1.3 (Debian 1:11.1.3+ds-1)`."""


def find_qemu(named: str | None = None, tree: Path = TREE, wanted: Wanted = FOR_A_GUEST) -> Qemu:
    """The QEMU that is `named`, or else one that there is. HostError where there is none, or none new enough."""
    if named is not None:
        path = shutil.which(named)
        if path is None:
            raise UsageError(wanted.named_by, named, "is not a program", f"name QEMU's, such as /usr/bin/{PROGRAM}")
        return _checked(Path(path), tree, wanted)
    why = f"is neither in PATH nor in {tree}"
    for path in filter(None, (shutil.which(PROGRAM), _of_tree(tree))):
        if not os.access(path, os.X_OK):
            continue
        try:
            return _checked(Path(path), tree, wanted)
        except HostError as error:
            why = f"{error.value} {error.limit}"
    raise HostError("qemu", PROGRAM, why, wanted.remedy)


def _of_tree(tree: Path) -> str:
    return str(tree / "usr/bin" / PROGRAM)


def _start(path: Path, tree: Path) -> Qemu:
    """How to start the QEMU at `path`, of which nothing else is known yet."""
    root = next((each for each in (tree, tree / OLD_TREE) if str(path.resolve()) == _of_tree(each.resolve())), None)
    if root is None:
        return Qemu((str(path),))
    libraries = root / "usr/lib/x86_64-linux-gnu"
    command = (
        *(str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), _of_tree(root)),
        *("-L", str(root / "usr/share/qemu"), "-L", str(root / "usr/share/seabios")),
    )
    return Qemu(command, {"QEMU_MODULE_DIR": str(libraries / "qemu")})


def _checked(path: Path, tree: Path, wanted: Wanted) -> Qemu:
    """The QEMU at `path`; HostError where it is too old, or doesn't say what it is."""
    qemu = _start(path, tree)
    try:
        said = subprocess.run(
            [*qemu.command, "--help"], capture_output=True, text=True, check=True, timeout=_PATIENCE, errors="replace"
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError("qemu", path, f"does not say what it is: {error}", wanted.remedy) from error
    version = re.search(r"version ((\d+)\.(\d+).*)", said)
    if not version:
        raise HostError("qemu", path, f"does not say what it is, but {said[:60]!r}", wanted.remedy)
    numbers = (int(version[2]), int(version[3]))
    if numbers < wanted.oldest:
        limit = f"is QEMU {numbers[0]}.{numbers[1]}; {'.'.join(map(str, wanted.oldest))} is the first {wanted.has}"
        raise HostError("qemu", path, limit, wanted.remedy)
    return replace(qemu, version=numbers, exits_with_parent="exit-with-parent" in said, release=version[1].strip())
