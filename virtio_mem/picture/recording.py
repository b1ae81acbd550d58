"""What a terminal showed while a command ran in it, from one moment to the next, by pyte.

The command has a terminal of its own, a pty; what it writes goes through an emulator, whose screen is looked at when
the command has stopped writing for a moment, or has written for `INTERVAL`: so no frame is half of a redrawn picture.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import pyte

from vhost_user.errors import HostError
from virtio_mem.picture.spans import printable

INTERVAL = 0.1
"""Seconds between two frames of a screen that never rests: no eye misses one."""

REST = 0.02
"""Seconds without output after which a picture counts as drawn: a program writes it at once, a pty passes 4 KiB at a
time."""

_ENDS_WITHIN = 20.0
_ENVIRONMENT = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
_NOT_INHERITED = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM_PROGRAM")


class Look(NamedTuple):
    """How letters look. A colour is six hexadecimal digits, one of the terminal's own names, or "default"."""

    colour: str = "default"
    ground: str = "default"
    bold: bool = False
    italic: bool = False
    underlined: bool = False


class Piece(NamedTuple):
    """Letters of one look, from a column on, and how many columns they take."""

    column: int
    text: str
    columns: int
    look: Look = Look()


Row = tuple[Piece, ...]


class Frame(NamedTuple):
    """The screen from `at` on, in seconds since the command was started; rows from the top, without empty last ones."""

    at: float
    rows: tuple[Row, ...]

    @property
    def text(self) -> str:
        """The screen as text."""
        return "\n".join(_text(row) for row in self.rows)


class Recording(NamedTuple):
    """What the terminal showed: at least one frame, in order, no two neighbours the same; and the command's status."""

    columns: int
    frames: list[Frame]
    seconds: float
    status: int


def record(
    command: Sequence[str], *, columns: int, rows: int, echo: Callable[[bytes], object] | None = None
) -> Recording:
    """Run `command` in a terminal of that size, to its end. `echo` is given what it writes, as it writes it.

    HostError where it can't be started. Ctrl-C, and whatever `echo` raises, is the command's Ctrl-C.
    """
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        try:
            process = subprocess.Popen(
                command,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env=inherited | _ENVIRONMENT,
                start_new_session=True,
            )
        except OSError as error:
            raise HostError.from_os_error("command", command[0], "start", error) from None
        finally:
            os.close(slave)
        with process:
            try:
                frames, seconds = _watch(master, pyte.Screen(columns, rows), echo)
            except BaseException:
                _interrupt(process)
                raise
            return Recording(columns, frames, seconds, process.wait())
    finally:
        os.close(master)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()


def _watch(master: int, screen: pyte.Screen, echo: Callable[[bytes], object] | None) -> tuple[list[Frame], float]:
    """The frames until nobody has the other side of the terminal any more, and when that was."""
    stream, began = pyte.ByteStream(screen), time.monotonic()
    frames = [Frame(0.0, ())]
    changed: float | None = None  # when output came that no frame has
    while True:
        resting = not select.select([master], [], [], None if changed is None else REST)[0]
        now = time.monotonic() - began
        if changed is not None and (resting or now - changed >= INTERVAL):
            _take(frames, changed, screen)
            changed = None
        if resting:
            continue
        try:
            data = os.read(master, 1 << 16)
        except OSError:  # EIO
            _take(frames, now, screen)
            return frames, now
        stream.feed(data)
        changed = now if changed is None else changed
        if echo is not None:
            echo(data)


def _take(frames: list[Frame], at: float, screen: pyte.Screen) -> None:
    rows = [_pieces(screen, row) for row in range(screen.lines)]
    while rows and not rows[-1]:
        rows.pop()
    if tuple(rows) != frames[-1].rows:
        frames.append(Frame(at, tuple(rows)))


def _pieces(screen: pyte.Screen, row: int) -> Row:
    """A row of the screen. Blanks are left out where they show nothing."""
    line = screen.buffer[row]
    pieces = []
    for look, group in groupby(range(screen.columns), lambda column: _look(line[column])):
        columns = list(group)
        if look.ground == "default" and not look.underlined:
            while columns and line[columns[0]].data == " ":
                columns.pop(0)
            while columns and line[columns[-1]].data == " ":
                columns.pop()
        if columns:
            text = "".join(line[column].data for column in columns)  # a wide letter's second column has no data
            pieces.append(Piece(columns[0], printable(text), len(columns), look))
    return tuple(pieces)


def _look(letter: pyte.screens.Char) -> Look:
    colour, ground = letter.fg, letter.bg
    if letter.reverse:
        colour, ground = ("ground" if ground == "default" else ground), ("ink" if colour == "default" else colour)
    return Look(colour, ground, letter.bold, letter.italics, letter.underscore)


def _text(row: Row) -> str:
    text = ""
    for piece in row:
        text = text.ljust(piece.column) + piece.text
    return text
