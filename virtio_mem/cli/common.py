"""What the clients share: the API socket, the manner of their --help, and a screen that may have colours or not."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from virtio_mem.picture.spans import ASCII, UNICODE, Line, plain

if TYPE_CHECKING:
    from rich.console import Console

EXIT_STATUS = """exit status:
  0    done
  1    the server is not there, went away or failed
  2    an argument that can't be: one line says which, and its limit
  130  interrupted by Ctrl-C"""


def teach(parser: argparse.ArgumentParser, does: str, *examples: str, exit_status: str = EXIT_STATUS) -> None:
    """What --help says before and after the arguments."""
    parser.description = does
    lines = "".join(f"  {example}\n" for example in examples)
    parser.epilog = f"example{'s' if len(examples) > 1 else ''}:\n{lines}\n{exit_status}"


def add_api_socket(parser: argparse.ArgumentParser) -> None:
    """The option that says which server."""
    parser.add_argument("--api-socket", required=True, metavar="PATH", help="the server's API socket")


def can_write_over(stream: TextIO) -> bool:
    """Whether it is a terminal where a line can be written over: not one that says that it is dumb, as rich has it."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


@contextmanager
def cursor_shown_after(console: Console) -> Iterator[None]:
    """Has the terminal its cursor again at the end, also if that came while rich was about to begin."""
    try:
        yield
    finally:
        console.show_cursor()


class Screen:
    """Standard output: `console` is rich's where it is a terminal and rich is there, else None, for plain letters.

    `width` columns, or the terminal's.
    """

    def __init__(self, width: int | None = None) -> None:
        self.width = width or shutil.get_terminal_size().columns
        self.console = _console(width) if sys.stdout.isatty() else None
        self.glyphs = UNICODE if self.console is not None and _has_blocks(sys.stdout.encoding) else ASCII

    def show(self, lines: Iterable[Line]) -> None:
        """Write lines."""
        if self.console is None:
            for line in lines:
                sys.stdout.write(plain(line) + "\n")
            return
        from virtio_mem.picture.terminal import coloured  # noqa: PLC0415 - rich is there, or console would be None

        for line in lines:
            self.console.print(coloured(line), soft_wrap=True)


def _console(width: int | None) -> Console | None:
    try:
        from rich.console import Console  # noqa: PLC0415 - a quarter of a second, and an extra
    except ImportError:
        return None
    return Console(highlight=False, width=width)


def _has_blocks(encoding: str) -> bool:
    try:
        "".join(UNICODE).encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
