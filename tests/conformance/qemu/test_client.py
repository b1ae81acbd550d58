"""The qtest protocol, QEMU's end played by the test."""

from __future__ import annotations

import socket
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress

import pytest

from virtio_mem.conformance.target import TargetFailure
from virtio_mem.conformance.targets.qtest.client import PIECE, QTest


class Qemu:
    """Answers each line with the next of `answers`, and notes the lines."""

    def __init__(self) -> None:
        self.ours, self._sock = socket.socketpair()
        self.heard: list[str] = []
        self.chunk = PIECE
        self._thread: threading.Thread | None = None

    def answer(self, *answers: bytes) -> QTest:
        self._thread = threading.Thread(target=self._run, args=(answers,))
        self._thread.start()
        return QTest(self.ours, TargetFailure, 10.0)

    def _run(self, answers: tuple[bytes, ...]) -> None:
        # A client that has had enough hangs up while it is told more.
        with suppress(ConnectionError), self._sock, self._sock.makefile("rb") as lines:
            for answer in answers:
                self.heard.append(lines.readline().decode().rstrip("\n"))
                for at in range(0, len(answer), self.chunk):
                    self._sock.sendall(answer[at : at + self.chunk])

    def end(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self.ours.close()
        self._sock.close()


@pytest.fixture
def qemu() -> Iterator[Qemu]:
    qemu = Qemu()
    yield qemu
    qemu.end()


def test_accesses_of_every_size(qemu: Qemu) -> None:
    qtest = qemu.answer(b"OK 0x00000000000000ff\n", b"OK 0x1af4\n", b"OK\n", b"OK 0x12\n", b"OK\n")
    assert qtest.load(0x1000, 1) == 0xFF
    assert qtest.load(0x1000, 8) == 0x1AF4
    qtest.store(0x2000, 7, 2)
    assert qtest.port_in(0xCFC, 4) == 0x12
    qtest.port_out(0xCF8, 0x80000000, 4)
    assert qemu.heard == ["readb 0x1000", "readq 0x1000", "writew 0x2000 0x7", "inl 0xcfc", "outl 0xcf8 0x80000000"]


def test_bytes_go_in_pieces(qemu: Qemu) -> None:
    data = bytes(range(256)) * (PIECE // 256) + b"end"
    answers = [b"OK " + b64encode(piece) + b"\n" for piece in (data[:PIECE], data[PIECE:])]
    qtest = qemu.answer(b"OK\n", b"OK\n", *answers)
    qtest.write(0x1000, data)
    assert qtest.read(0x1000, len(data)) == data
    assert [line.split()[:3] for line in qemu.heard] == [
        ["b64write", "0x1000", f"{PIECE:#x}"],
        ["b64write", f"{0x1000 + PIECE:#x}", "0x3"],
        ["b64read", "0x1000", f"{PIECE:#x}"],
        ["b64read", f"{0x1000 + PIECE:#x}", "0x3"],
    ]
    assert qemu.heard[1].split()[3] == b64encode(b"end").decode()


def test_interrupts_are_passed_over(qemu: Qemu) -> None:
    assert qemu.answer(b"IRQ raise 3\nIRQ lower 3\nOK 0x5\n").load(0, 4) == 5


def test_answers_that_come_byte_by_byte(qemu: Qemu) -> None:
    qemu.chunk = 1
    qtest = qemu.answer(b"IRQ raise 3\nOK 0x5\n", b"OK AAAA\n")
    assert qtest.load(0, 4) == 5
    assert qtest.read(0, 3) == bytes(3)


def test_what_is_left_of_one_answer_is_of_the_next(qemu: Qemu) -> None:
    qtest = qemu.answer(b"OK 0x1\nOK 0x2\n", b"")
    assert [qtest.load(0, 1), qtest.load(0, 1)] == [1, 2]


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"FAIL Unknown command\n", "with 'FAIL Unknown command'"),
        (b"OK\n", "with ''"),
        (b"OK zero\n", "with 'zero'"),
        (b"\xff\xfe\n", "QEMU answered 'readl 0x10' with"),
        (b"OK 0x", "hung up"),
        (b"x" * 4 * PIECE, "without a line's end"),
    ],
)
def test_what_is_no_answer(qemu: Qemu, answer: bytes, what: str) -> None:
    with pytest.raises(TargetFailure, match=what):
        qemu.answer(answer).load(0x10, 4)
    qemu.ours.close()


@pytest.mark.parametrize("answer", [b"OK\n", b"OK AAAA\n", b"OK AAAAAAAA\n", b"OK ====\n", b"OK A?A=\n"])
def test_not_the_bytes_that_were_asked_for(qemu: Qemu, answer: bytes) -> None:
    with pytest.raises(TargetFailure, match=r"QEMU answered 'b64read 0x10 0x4'"):
        qemu.answer(answer).read(0x10, 4)


def test_silence(qemu: Qemu) -> None:
    qtest = QTest(qemu.ours, TargetFailure, 0.01)
    with pytest.raises(TargetFailure, match=r"did not answer 'readb 0x0' within 0\.01 s"):
        qtest.load(0, 1)


def test_interrupts_without_an_end(qemu: Qemu) -> None:
    """The time is for the answer, whatever comes before it."""
    qtest = qemu.answer(b"IRQ raise 3\n" * 2_000_000)
    qtest.allow(0.05)
    with pytest.raises(TargetFailure, match="did not answer"):
        qtest.load(0, 1)
    qemu.ours.close()


def test_a_dead_end(qemu: Qemu) -> None:
    qtest = qemu.answer()
    qemu.end()
    with pytest.raises(TargetFailure, match="hung up"):
        qtest.load(0, 1)
