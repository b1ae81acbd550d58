"""QEMU's qtest protocol: whoever holds its socket makes the accesses that the guest's processor would make.

A command is one line, and so is its answer: `OK`, with what was read behind it, or `FAIL` or `ERR` with a reason. An
access has had all its effects when the answer comes, but for those that QEMU left to a thread. Lines that begin with
`IRQ` come in between for who asked for them, which nobody does here. Source: the comment at the head of
system/qtest.c in QEMU, and docs/devel/testing/qtest.rst.
"""

from __future__ import annotations

import socket
import time
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Callable

from virtio_mem.conformance.target import TargetFailure

Failure = Callable[[str], TargetFailure]
"""What to raise where QEMU is at fault: it is given the fault in words."""

PIECE = 64 << 10
"""Bytes of memory in one line. QEMU looks for a line's end from its beginning each time that 4 KiB of it arrived, which
makes a line of a megabyte thirty times as slow as the same bytes in sixteen lines."""

_LONGEST_LINE = 2 * PIECE
"""Of an answer: more than base64 makes of a piece."""

_CHUNK = 1 << 16

HUNG_UP = "QEMU hung up"
"""What is said of a socket that QEMU closed, or that its end closed."""


class QTest:
    """The processor's side of a QEMU, at `sock`, a connected stream socket, which stays the caller's to close.

    `seconds` is how long an answer may take. Addresses are guest addresses, or port numbers of the x86's other address
    space where a method says so. Whatever goes wrong is raised as `failure` makes it.
    """

    def __init__(self, sock: socket.socket, failure: Failure, seconds: float) -> None:
        self._sock, self._failure = sock, failure
        self._rest = b""
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        """From now on, an answer may take so long."""
        self._seconds = seconds

    def load(self, address: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes in one access."""
        return self._number(f"read{_LETTER[size]} {address:#x}")

    def store(self, address: int, value: int, size: int) -> None:
        """Write 1, 2, 4 or 8 bytes in one access."""
        self._ask(f"write{_LETTER[size]} {address:#x} {value:#x}")

    def port_in(self, port: int, size: int) -> int:
        """Read 1, 2 or 4 bytes from a port."""
        return self._number(f"in{_LETTER[size]} {port:#x}")

    def port_out(self, port: int, value: int, size: int) -> None:
        """Write 1, 2 or 4 bytes to a port."""
        self._ask(f"out{_LETTER[size]} {port:#x} {value:#x}")

    def read(self, address: int, size: int) -> bytes:
        """Any number of bytes, in accesses of QEMU's choice."""
        pieces = [self._read(address + at, min(PIECE, size - at)) for at in range(0, size, PIECE)]
        return b"".join(pieces)

    def write(self, address: int, data: bytes) -> None:
        """Any number of bytes, in accesses of QEMU's choice."""
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            self._ask(f"b64write {address + at:#x} {len(piece):#x} {b64encode(piece).decode()}")

    def step_clock(self, nanoseconds: int) -> None:
        """Let the machine's virtual clock go on. Only with the qtest accelerator, whose clock stands still else."""
        self._ask(f"clock_step {nanoseconds}")

    def _read(self, address: int, size: int) -> bytes:
        command = f"b64read {address:#x} {size:#x}"
        answer = self._ask(command)
        try:
            data = b64decode(answer, validate=True)
        except NotBase64:
            data = b""
        if len(data) != size:
            raise self._failure(f"QEMU answered {command!r} with {answer[:60]!r}")
        return data

    def _number(self, command: str) -> int:
        answer = self._ask(command)
        try:
            return int(answer, 0)
        except ValueError:
            raise self._failure(f"QEMU answered {command!r} with {answer[:60]!r}") from None

    def _ask(self, command: str) -> str:
        """What follows the OK."""
        deadline = time.monotonic() + self._seconds
        try:
            self._sock.settimeout(self._seconds)
            self._sock.sendall(command.encode() + b"\n")
            line = self._line(deadline)
            while line.startswith("IRQ "):
                line = self._line(deadline)
        except TimeoutError:
            failure = self._failure(f"QEMU did not answer {command[:60]!r} within {self._seconds:g} s")
            failure.silent = True
            raise failure from None
        except (OSError, EOFError):
            raise self._failure(HUNG_UP) from None
        word, _, rest = line.partition(" ")
        if word != "OK":
            raise self._failure(f"QEMU answered {command[:60]!r} with {line[:60]!r}")
        return rest

    def _line(self, deadline: float) -> str:
        received = bytearray(self._rest)
        self._allow_until(deadline)
        while b"\n" not in received[-_CHUNK:]:
            chunk = self._sock.recv(_CHUNK)
            if not chunk:
                raise EOFError
            self._allow_until(deadline)
            received += chunk
            if len(received) > _LONGEST_LINE:
                raise self._failure(f"QEMU said {len(received)} bytes without a line's end that was due")
        line, _, self._rest = bytes(received).partition(b"\n")
        return line.decode(errors="replace")

    def _allow_until(self, deadline: float) -> None:
        """What is awaited next may come until then. TimeoutError where that is over."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)


_LETTER = {1: "b", 2: "w", 4: "l", 8: "q"}
