"""From what the user wrote to a target: `self:memfd`, `vhost-user:/run/mem0.sock,api=/run/mem.api`, `exec:./shim`.

What is before the first colon or comma is the kind, and the rest is the kind's own. Modules are imported for the kind
that is wanted: whoever judges a socket needs no QEMU, and the other way round.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

from vhost_user.errors import UsageError
from virtio_mem.conformance.target import Target

KINDS = {
    "self": "self[:BACKING]: our own device, on anonymous, memfd, hugetlb, file or private-file memory",
    "ring": "ring[:split|packed]: our own device behind a ring",
    "vhost-user": "vhost-user:SOCKET[,api=APISOCKET][,memory=memfd|hugetlb]: the device behind a vhost-user socket",
    "qemu": "qemu[:BINARY][,OPTION=VALUE...]: QEMU's own device",
    "exec": "exec:COMMAND: a device in any language, behind a program that speaks JSON lines",
}
"""What each kind of target is, as a user is told."""


def parse_target(text: str) -> Target:
    """The target that `text` names, which the caller closes.

    UsageError for a text that names none, TargetFailure or HostError for a target that is not there to be judged.
    """
    kind, mark, rest = re.fullmatch(r"([^:,]*)([:,]?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    if kind not in KINDS:
        raise UsageError("target", text, f"its kind is one of {', '.join(KINDS)}", "; ".join(KINDS.values()))
    if kind == "qemu":
        return _qemu(mark + rest)
    if mark == ",":
        raise UsageError("target", text, f"what is behind {kind} begins with a colon", KINDS[kind])
    if not rest and kind in ("vhost-user", "exec"):
        raise UsageError("target", text, f"{kind} alone does not say which", KINDS[kind])
    return _PARSERS[kind](rest)


def check_target(text: str) -> None:
    """As `parse_target`, for who only wants to know whether there can be such a target.

    It is opened and closed, but for a socket, whose daemon may end with its first front end, and a program, which may
    do anything: of these it is the words that count, and that the program is there.
    """
    kind, _, rest = text.partition(":")
    if kind == "vhost-user" and rest:
        _vhost_user_words(rest)
    elif kind == "exec" and rest:
        _exec_words(rest)
    else:
        parse_target(text).close()


def _self(rest: str) -> Target:
    from virtio_mem.conformance.targets.ours import OurTarget  # noqa: PLC0415

    return OurTarget(rest) if rest else OurTarget()


def _ring(rest: str) -> Target:
    from virtio_mem.conformance.targets.behind_ring import RingTarget  # noqa: PLC0415

    return RingTarget(rest) if rest else RingTarget()


def _vhost_user(rest: str) -> Target:
    from virtio_mem.conformance.targets.vhost_user_socket import VhostUserTarget  # noqa: PLC0415

    socket, given = _vhost_user_words(rest)
    return VhostUserTarget(socket, given.get("api"), memory=given.get("memory", "memfd"))


def _vhost_user_words(rest: str) -> tuple[str, dict[str, str]]:
    """The socket, and the options by name."""
    socket, *options = rest.split(",")
    given: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in ("api", "memory") or key in given or not value:
            limit = "the options of vhost-user are api=APISOCKET and memory=memfd|hugetlb, and a path has no comma"
            raise UsageError("target", option, limit, KINDS["vhost-user"])
        given[key] = value
    if not socket:
        raise UsageError("target", "vhost-user", "vhost-user alone does not say which", KINDS["vhost-user"])
    return socket, given


def _exec_words(rest: str) -> None:
    from virtio_mem.conformance.targets.lines import words_of  # noqa: PLC0415

    program = words_of(rest)[0]
    if shutil.which(program) is None:
        raise UsageError("exec", program, "can't be run: there is no such program", "name a program")


def _exec(rest: str) -> Target:
    from virtio_mem.conformance.targets.subprocess import ProgramTarget  # noqa: PLC0415

    return ProgramTarget(rest)


def _qemu(rest: str) -> Target:
    from virtio_mem.conformance.targets.qemu import QemuTarget  # noqa: PLC0415

    return QemuTarget.parse(rest)


_PARSERS: dict[str, Callable[[str], Target]] = {"self": _self, "ring": _ring, "vhost-user": _vhost_user, "exec": _exec}
