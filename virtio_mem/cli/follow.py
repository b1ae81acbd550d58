"""Asks for a resize, and follows it to its end: what `resize` and `resize-zone` have in common."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from vhost_user.errors import HostError, PeerError, UsageError
from virtio_mem.cli.outcome import FINAL, STATUS, outcome
from virtio_mem.client import Client
from virtio_mem.config.values import SIZE
from virtio_mem.picture.sizes import human_size, human_time
from virtio_mem.picture.spans import printable

MANNER = """SIZE is in bytes, or a number with K, M, G or T; what is beyond boot memory must
be whole blocks.

Without --wait the command ends as soon as the server has taken the size; the
guest then does what it can in its own time. With --wait it ends when the size
is reached, and also when the guest stalls, when the host refuses it, or when
somebody asks for another size. With --wait SECONDS the guest has all of that
time, since one that was refused tries again."""

EXIT_STATUS = """exit status:
  0    the size is reached; without --wait: the server has taken it
  1    the server is not there, went away or failed
  2    an argument or a size that can't be: one line says which, and its limit
  3    the guest stalled, or SECONDS are over
  4    the host refuses the guest's requests
  5    somebody asked for another size meanwhile
  130  interrupted by Ctrl-C; the guest goes on"""

STEP = 0.5
"""Seconds between two looks at a resize that is being followed on a terminal."""

RETRY = 0.1
OUTAGE = 10.0
"""Seconds between two tries to reach a server that went away while a resize is followed, and how long it may be away:
the next process is there within one."""

_NO_LIMIT = "for ever"


def add_size(parser: argparse.ArgumentParser) -> None:
    """The arguments SIZE and --wait."""
    parser.add_argument("size", metavar="SIZE", help="bytes, or a number with K, M, G or T: 512M, 2G")
    parser.add_argument(
        "--wait", nargs="?", const=_NO_LIMIT, metavar="SECONDS", help="follow the resize until it ends, or so long"
    )


def bytes_of(text: str) -> int:
    """SIZE in bytes; UsageError for what is no size."""
    return SIZE.read("SIZE", text)


def ask(client: Client, resize: Callable[[], int], wait: str | None) -> int:
    """Ask, say what came of it, and with `wait` follow; returns the exit status."""
    seconds = None if wait is None else _seconds(wait)
    number = resize()
    operation = _begin(client, number)
    _say(operation)
    if wait is None:
        return 0
    began = _state(operation)
    operation = _follow(client, number, operation, seconds)
    if _state(operation) != began or began not in FINAL:
        _say(operation)
    return STATUS.get(_state(operation), STATUS["stalled"])


def _begin(client: Client, number: int) -> dict[str, Any]:
    """Operation `number`, which a server has taken that may be being replaced just now."""
    began = time.monotonic()
    while True:
        try:
            return client.operation(number)
        except (HostError, PeerError):
            if time.monotonic() - began > OUTAGE:
                raise
            time.sleep(RETRY)


def _say(operation: dict[str, Any]) -> None:
    sys.stdout.write(printable(f"operation {operation['id']}: {operation['zone']} to {outcome(operation)}") + "\n")
    sys.stdout.flush()


def _seconds(text: str) -> float | None:
    if text == _NO_LIMIT:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 10**9:
        raise UsageError("--wait", text, "a number of seconds, from 0 to 1000000000", "write it like --wait 60")
    return seconds


def _follow(client: Client, number: int, operation: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """Follow operation `number` to its end, or for so many seconds; its last state."""
    progress = _Progress()
    deadline = None if seconds is None else time.monotonic() + seconds
    seen = time.monotonic()
    try:
        while _goes_on(operation, deadline):
            progress.show(operation)
            left = STEP if deadline is None else min(STEP, deadline - time.monotonic())
            try:
                operation = client.operation(number, max(0.0, left))
                seen = time.monotonic()
            except (HostError, PeerError):  # one that dies may break off anywhere
                if time.monotonic() - seen > OUTAGE:
                    raise
                time.sleep(RETRY)
                continue
            if _state(operation) not in (*FINAL, "running"):
                time.sleep(max(0.0, left))  # the server does not wait with what has ended for now
    finally:
        progress.clear()
    return operation


def _state(operation: dict[str, Any]) -> str:
    return str(operation["state"])


def _goes_on(operation: dict[str, Any], deadline: float | None) -> bool:
    """Whether there is something to wait for: without a deadline, only as long as the guest gets on."""
    if _state(operation) in FINAL:
        return False
    return _state(operation) == "running" if deadline is None else time.monotonic() < deadline


class _Progress:
    """A line that is written over, on a terminal only."""

    def __init__(self) -> None:
        self._shown = sys.stdout.isatty()

    def show(self, operation: dict[str, Any]) -> None:
        """How far the resize is."""
        if not self._shown:
            return
        verdict = operation["verdict"] if _state(operation) != "running" else human_time(operation["seconds"])
        size, target, rate = (human_size(operation[name]) for name in ("plugged", "target", "rate"))
        line = f"{operation['zone']}: {size} of {target}, {rate}/s, {verdict}"
        sys.stdout.write(f"\r{printable(line)[: shutil.get_terminal_size().columns - 1]}\x1b[K")
        sys.stdout.flush()

    def clear(self) -> None:
        """Leave an empty line."""
        if self._shown:
            sys.stdout.write("\r\x1b[K")
