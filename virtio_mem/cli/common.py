"""What the subcommands share: a parser whose errors are one line, and a screen that may have colours or not."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

from virtio_mem.cli import USAGE
from virtio_mem.picture.spans import ASCII, UNICODE, Line, plain

if TYPE_CHECKING:
    from rich.console import Console

EXIT_STATUS = """exit status:
  0    done
  1    the server is not there, went away or failed
  2    an argument that can't be: the line says which, its limit, and what to do
  130  interrupted by Ctrl-C"""


class Parser(argparse.ArgumentParser):
    """A subcommand's parser: `example` is shown as it is typed, `more` stands between it and `exit_status`."""

    def __init__(self, name: str, does: str, example: str, *, more: str = "", exit_status: str = EXIT_STATUS) -> None:
        epilog = f"example:\n  {example}\n\n{more}{exit_status}"
        super().__init__(
            prog=f"virtio-mem {name}",
            description=does,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """One line, and the way to more."""
        self.exit(USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")

    def add_api_socket(self) -> None:
        """The option that says which server."""
        self.add_argument("--api-socket", required=True, metavar="PATH", help="the server's API socket")


class Screen:
    """Standard output: `console` is rich's where it is a terminal and rich is there, else None, for plain letters.

    `width` columns, or the terminal's. Letters that the output's encoding lacks are written as escapes.
    """

    def __init__(self, width: int | None = None) -> None:
        self.width = width or shutil.get_terminal_size().columns
        self.console = _console(self.width) if sys.stdout.isatty() else None
        self.glyphs = UNICODE if self.console is not None and _has_blocks(sys.stdout.encoding) else ASCII
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    def show(self, lines: Iterable[Line]) -> None:
        """Write lines."""
        if self.console is None:
            for line in lines:
                sys.stdout.write(plain(line) + "\n")
            return
        from virtio_mem.picture.terminal import coloured  # noqa: PLC0415 - rich is there, or console would be None

        for line in lines:
            self.console.print(coloured(line), soft_wrap=True)


def _console(width: int) -> Console | None:
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
