"""The file of a trace: lines that are appended one call at a time, and what they say to the process that goes on.

The words are those of the conformance kit (virtio_mem/conformance/words.py), so that `virtio-mem conformance --replay`
reads the file. What is behind a `#` is for people, and for us: an answer to a request says where it went in the ring,
which tells it from the same answer to the same request later.

A call is one write(2), after which it is in the file whatever becomes of the process. One that is killed in there may
leave a part of it: what follows the last end of a line is cut off by who opens the file next.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vhost_user.owned_fd import OwnedFd
from virtio_mem.conformance.words import ARROW, parse_wish
from virtio_mem.serve.files import open_trace

log = logging.getLogger(__name__)

_IN_RING = "  # used "


class Tail(NamedTuple):
    """How far the last session of a file came, as its lines say."""

    last: str
    """The last line."""
    begun: int | None
    """The features that the driver began with; None where it did not, or was reset since."""
    asked: str
    """The last answer to a request, as a line; "" where there is none."""
    reset_since: bool
    """Whether a reset came after that."""
    requested_size: int
    """The host's last target in bytes, or what the session began with."""
    paused: bool
    refuses: bool
    """Whether a call was begun before which the host refuses, and not brought to its end."""


class TraceFile:
    """Appends to the file at `path`. Nothing that goes wrong here is the device's affair: it ends the trace.

    `kept` is what `keep` was called with last, by this process or one before it; b"" where it never was. `tail` is what
    a session says that is to go on; None where one is to begin.
    """

    def __init__(self, path: Path, kept: bytes, keep: Callable[[bytes], None]) -> None:
        self._path, self._keep = path, keep
        self._ended = b"ended " + os.fsencode(path)
        self._fd: OwnedFd | None = None
        self._identity = b""
        self.tail: Tail | None = None
        if kept == self._ended:
            return
        try:
            self._fd = open_trace(path)
            about = os.fstat(self._fd.fileno())
            self._identity = f"{about.st_dev} {about.st_ino}".encode()
            if about.st_size:
                self.tail = self._whole_lines(about.st_size, known=self._identity == kept)
        except (OSError, ValueError) as error:  # among them a file that others have written to
            self._end(error)

    def _whole_lines(self, size: int, *, known: bool) -> Tail | None:
        """Cut off what is no whole line. What was `known` before is a session to go on with, if there is one."""
        assert self._fd is not None
        with mmap.mmap(self._fd.fileno(), size, access=mmap.ACCESS_READ) as text:
            end = text.rfind(b"\n") + 1
            tail = _tail_of(text, end) if known else None
        if end != size:
            os.ftruncate(self._fd.fileno(), end)
        return tail

    def begin(self, *lines: str) -> None:
        """Begin a session with these lines. Workers to come go on with it."""
        self.write(*lines)
        if self._fd is not None:
            self._keep(self._identity)

    def write(self, *lines: str) -> None:
        """Append lines, all at once."""
        if self._fd is None:
            return
        data = "".join(f"{line}\n" for line in lines).encode()
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd.fileno(), data[written:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd.fileno(), os.fstat(self._fd.fileno()).st_size - written)
            self._end(error)

    def _end(self, error: Exception) -> None:
        log.error("the trace %s ends here: %s", self._path, error)
        self.close()
        self._keep(self._ended)

    def close(self) -> None:
        """Let go of the file. Closing twice is allowed, and what is written afterwards is lost."""
        fd, self._fd = self._fd, None
        if fd is not None:
            fd.close()


def call_line(call: str, answer: str = "done") -> str:
    """A call with its answer, as a session has it."""
    return f"{call}{ARROW}{' '.join(answer.replace('#', '').split())}"


def asked_line(call: str, answer: str, head: int, position: int) -> str:
    """The same for a request, that of the chain `head`, which goes back to `position` of the used ring."""
    return f"{call_line(call, answer)}{_IN_RING}{position} head {head}"


def _tail_of(text: mmap.mmap, end: int) -> Tail | None:
    """What the lines before `end` say; None where no session began."""
    start = text.rfind(b"\nwish ", 0, end)
    if start < 0:
        return None

    def last(*calls: str, having: str = "") -> tuple[int, str]:
        """Where the last line that begins with one of `calls` is, and that line; -1 and "" where none is."""
        places = [_rfind(text, f"\n{call}", having, start, end) for call in calls]
        place = max(places)
        return place, _line(text, place + 1) if place >= 0 else ""

    reset_at, _ = last("device_reset ", "system_reset ")
    begun_at, driver = last("begin ")
    asked_at = text.rfind(_IN_RING.encode(), start, end)
    asked = _line(text, text.rfind(b"\n", start, asked_at) + 1) if asked_at >= 0 else ""
    _, target = last("target ", having=call_line("", "done"))
    begun = driver.partition(f"{ARROW}agreed ")[2]
    return Tail(
        last=_line(text, text.rfind(b"\n", 0, end - 1) + 1),
        begun=int(begun, 0) if begun and begun_at > reset_at else None,
        asked=asked,
        reset_since=reset_at > asked_at,
        requested_size=int(target.split()[1]) if target else parse_wish(_line(text, start + 1)).requested_size,
        paused=last("pause ")[1].startswith("pause on"),
        refuses=last("refuse ")[1].startswith("refuse on"),
    )


def _rfind(text: mmap.mmap, call: str, having: str, start: int, end: int) -> int:
    while (place := text.rfind(call.encode(), start, end)) >= 0 and having not in _line(text, place + 1):
        end = place
    return place


def _line(text: mmap.mmap, start: int) -> str:
    return text[start : text.find(b"\n", start)].decode()
