"""A terminal: a command runs on a pty, and what it shows is on a screen that can be read."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping
from types import MappingProxyType

import pyte

from tests.cli.rig import command


class Terminal:
    """`virtio-mem` on a terminal of its own. Close it, or use it as a context manager."""

    def __init__(
        self,
        *arguments: str,
        columns: int = 100,
        lines: int = 30,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        settings = {"TERM": "xterm-256color", "COLORTERM": "truecolor", **environment}
        inherited = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
        try:
            self.process = subprocess.Popen(
                command(*arguments), stdin=slave, stdout=slave, stderr=slave, env=inherited | settings
            )
        finally:
            os.close(slave)
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.written = b""
        """What the command wrote, as it came."""

    @property
    def text(self) -> str:
        """What is on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def read(self, seconds: float = 0.05) -> bool:
        """Take in what the command writes; False once it has closed its terminal."""
        if select.select([self._master], [], [], seconds)[0]:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # EIO: nobody has the other side any more
                return False
            self.written += data
            self._stream.feed(data)
        return True

    def until(self, text: str, seconds: float = 15) -> None:
        """Wait until the screen has `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert self.read() or text in self.text, f"it ended without {text!r}:\n{self.text}"
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.text}"

    def colour_of(self, text: str) -> str:
        """The colour of the first letter of `text` on the screen."""
        for row, line in enumerate(self.screen.display):
            if text in line:
                return str(self.screen.buffer[row][line.index(text)].fg)
        raise AssertionError(f"{text!r} is not on the screen")

    def end(self, seconds: float = 15) -> int:
        """Wait for the command's end; its status."""
        deadline = time.monotonic() + seconds
        while self.read():
            assert time.monotonic() < deadline, self.text
        return self.process.wait(seconds)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
