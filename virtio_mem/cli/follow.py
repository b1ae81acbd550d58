"""Asks for a resize, and follows it to its end: what `resize` and `resize-zone` have in common."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from vhost_user.errors import HostError, PeerError, TimedOut, UsageError
from virtio_mem.cli.common import can_write_over
from virtio_mem.cli.outcome import FINAL, STATUS, outcome
from virtio_mem.client import Client, NotNow
from virtio_mem.config.values import SIZE
from virtio_mem.picture.sizes import human_size, human_time
from virtio_mem.picture.spans import printable

MANNER = """SIZE is in bytes, or a number with K, M, G or T; what is beyond boot memory must
be whole blocks.

Without --wait the command ends as soon as the server has taken the size; the
guest then does what it can in its own time. With --wait it ends when the size
is reached, and also when the guest stalls, when the host refuses it, or when
somebody asks for another size. With --wait SECONDS the guest has all of that
time, since one that was refused tries again. A server that is silent is waited
for as well: it gives memory back to the host.

A guest goes on trying what it could not do. With --keep it is asked, at the end
of --wait, for what it has by then, and has nothing more to try."""

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
the next process is there within one. One that is there and silent gives memory back, which may take it minutes."""

_NO_LIMIT = "for ever"

AnswerT = TypeVar("AnswerT")


def add_keep(parser: argparse.ArgumentParser) -> None:
    """The option of who follows one resize."""
    keep = "if --wait ends without SIZE, ask for what there is by then"
    parser.add_argument("--keep", action="store_true", help=keep)


def add_size(parser: argparse.ArgumentParser) -> None:
    """The arguments SIZE and --wait."""
    parser.add_argument("size", metavar="SIZE", help="bytes, or a number with K, M, G or T: 512M, 2G")
    parser.add_argument(
        "--wait", nargs="?", const=_NO_LIMIT, metavar="SECONDS", help="follow the resize until it ends, or so long"
    )


def bytes_of(text: str) -> int:
    """SIZE in bytes; UsageError for what is no size."""
    return SIZE.read("SIZE", text)


def ask(
    client: Client, resize: Callable[[], int], wait: str | None, *, keep: Callable[[int], int] | None = None
) -> int:
    """Ask, say what came of it, and with `wait` follow; returns the exit status. `keep` asks for so many bytes, those
    that there are at the end if the size was not reached."""
    if keep is not None and wait is None:
        raise UsageError("--keep", "on", "goes with --wait, at whose end it is done", "add --wait SECONDS")
    deadline = time.monotonic() + seconds_of(wait) if wait is not None else 0.0
    number = insist(resize, deadline, outage=0.0)  # the same again is the same operation
    operation = insist(lambda: client.operation(number), deadline, outage=OUTAGE)
    _say(result_of(operation))
    if wait is None:
        return 0
    began = _state(operation)
    operation = _follow(client, number, operation, deadline)
    if _state(operation) != began or began not in FINAL:
        _say(result_of(operation))
    if keep is not None and _state(operation) not in FINAL:
        operation = _keep(client, number, keep, deadline)
    return STATUS.get(_state(operation), STATUS["stalled"])


def _keep(client: Client, number: int, keep: Callable[[int], int], deadline: float) -> dict[str, Any]:
    """Ask for what there is by now in place of operation `number`; how that one was. A server that is being replaced
    just then is waited for."""
    operation = insist(lambda: client.operation(number), deadline, outage=OUTAGE)
    if _state(operation) in FINAL:  # after all
        _say(result_of(operation))
        return operation
    kept = insist(lambda: keep(operation["plugged"]), deadline, outage=OUTAGE)
    _say(result_of(insist(lambda: client.operation(kept), deadline, outage=OUTAGE)))
    return operation


def insist(question: Callable[[], AnswerT], deadline: float, *, outage: float) -> AnswerT:
    """What a server answers that may be away for `outage` seconds, and silent until `deadline`."""
    seen = time.monotonic()
    while True:
        try:
            return question()
        except TimedOut:
            seen = time.monotonic()
            if seen >= deadline:
                raise
        except (HostError, PeerError):  # one that dies may break off anywhere
            if time.monotonic() - seen >= outage:
                raise
            time.sleep(RETRY)


def result_of(operation: dict[str, Any]) -> str:
    """What became of a resize, or how it is."""
    return f"operation {operation['id']}: {operation['zone']} to {outcome(operation)}"


def _say(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def seconds_of(text: str) -> float:
    """What is given to --wait in seconds; UsageError for what is no time."""
    if text == _NO_LIMIT:
        return math.inf
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 10**9:
        raise UsageError(
            "--wait", text, "has to be a number of seconds, from 0 to 1000000000", "write it like --wait 60"
        )
    return seconds


def _follow(client: Client, number: int, operation: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Follow operation `number` to its end, or until `deadline`; its last state that was told."""
    progress = Progress()
    seen = time.monotonic()
    try:
        while _goes_on(operation, deadline):
            progress.show(_progress_of(operation))
            left = deadline - time.monotonic()
            patience, left = max(RETRY, min(client.timeout, left)), max(0.0, min(STEP, left))
            try:
                operation = _look(client, number, left, patience)
                seen = time.monotonic()
            except TimedOut:  # it is there, and waits for its device
                seen = time.monotonic()
                continue
            except (HostError, PeerError):
                if time.monotonic() - seen > OUTAGE:
                    raise
                time.sleep(RETRY)
                continue
            if _state(operation) not in (*FINAL, "running"):
                time.sleep(left)  # the server does not wait with what has ended for now
    finally:
        progress.clear()
    return operation


def _look(client: Client, number: int, wait: float, patience: float) -> dict[str, Any]:
    """The operation when it ends, or after `wait` seconds."""
    try:
        return client.operation(number, wait, timeout=patience)
    except NotNow:  # others may have all the places of those who wait; who does not has an answer
        operation = client.operation(number, timeout=patience)
        if _state(operation) == "running":
            time.sleep(wait)
        return operation


def _state(operation: dict[str, Any]) -> str:
    return str(operation["state"])


def _goes_on(operation: dict[str, Any], deadline: float) -> bool:
    """Whether there is something to wait for: without a deadline, only as long as the guest gets on."""
    if _state(operation) in FINAL:
        return False
    return _state(operation) == "running" if deadline == math.inf else time.monotonic() < deadline


def _progress_of(operation: dict[str, Any]) -> str:
    """How far a resize is."""
    verdict = operation["verdict"] if _state(operation) != "running" else human_time(operation["seconds"])
    size, target, rate = (human_size(operation[name]) for name in ("plugged", "target", "rate"))
    return f"{operation['zone']}: {size} of {target}, {rate}/s, {verdict}"


class Progress:
    """A line that is written over, where that can be."""

    def __init__(self) -> None:
        self._shown = can_write_over(sys.stdout)

    def show(self, line: str) -> None:
        """Have this line in place of the one before."""
        if not self._shown:
            return
        sys.stdout.write(f"\r{printable(line)[: shutil.get_terminal_size().columns - 1]}\x1b[K")
        sys.stdout.flush()

    def say(self, line: str) -> None:
        """Have this line stay."""
        self.clear()
        _say(line)

    def clear(self) -> None:
        """Leave an empty line."""
        if self._shown:
            sys.stdout.write("\r\x1b[K")
