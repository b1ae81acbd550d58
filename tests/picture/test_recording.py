"""What a terminal showed, as frames: of programs that write, redraw, rest, fail and are interrupted."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest

from vhost_user.errors import HostError
from virtio_mem.picture.recording import Look, Piece, Recording, record

SHOW = """
import os, sys, time
said = 0
def show(text):
    global said
    said += len(text.replace("\\n", "\\r\\n"))
    sys.stdout.write(text)
    sys.stdout.flush()
    while os.path.getsize(heard) < said:
        time.sleep(0.01)
    time.sleep(0.3)
"""
"""A text of which `show` knows that it was heard stands for 0.3 s, however late the listener was."""


def python(program: str, **options: object) -> Recording:
    """The recording of a Python program."""
    settings = {"columns": 40, "rows": 8} | options
    return record([sys.executable, "-c", f"import os, sys, time\n{program}"], **settings)  # type: ignore[arg-type]


def shown(directory: Path, *texts: str) -> Recording:
    """The recording of a program that shows one text after another."""
    heard = directory / "heard"
    with heard.open("wb", buffering=0) as file:
        return python(f"heard = {str(heard)!r}{SHOW}for text in {texts!r}: show(text)", echo=file.write)


def texts(recording: Recording) -> list[str]:
    return [frame.text for frame in recording.frames]


def test_frames_come_in_order_and_at_their_time(tmp_path: Path) -> None:
    recording = shown(tmp_path, "one\n", "two\n")
    assert texts(recording) == ["", "one", "one\ntwo"]
    _, one, two = recording.frames
    assert two.at - one.at >= 0.29
    assert recording.seconds - two.at >= 0.29
    assert (recording.status, recording.columns) == (0, 40)


def test_a_line_that_is_redrawn(tmp_path: Path) -> None:
    recording = shown(tmp_path, "a long one", "\r\x1b[K", "\rshort", "\rshort")
    assert texts(recording) == ["", "a long one", "", "short"]


def test_colours_and_blanks() -> None:
    coloured = r"\x1b[1;31mbold\x1b[0m \x1b[38;2;47;129;247mx  y\x1b[0m   \x1b[7m r \x1b[0m\x1b[4m \x1b[0m"
    recording = python(f"print('{coloured}\\n   in')")
    assert recording.frames[-1].rows == (
        (
            Piece(0, "bold", 4, Look("red", bold=True)),
            Piece(5, "x  y", 4, Look("2f81f7")),
            Piece(12, " r ", 3, Look("ground", "ink")),
            Piece(15, " ", 1, Look(underlined=True)),
        ),
        (Piece(3, "in", 2),),
    )
    assert texts(recording)[-1] == "bold x  y    r  \n   in"


def test_what_does_not_fit_scrolls_and_wraps() -> None:
    recording = python("for number in range(20): print(number)\nprint('x' * 41)")
    assert texts(recording)[-1].splitlines() == ["15", "16", "17", "18", "19", "x" * 40, "x"]


def test_what_never_rests_has_frames_too() -> None:
    program = "end = time.monotonic() + 1\nnumber = 0\n"
    program += "while time.monotonic() < end: number += 1; print(f'\\r{number}', end='', flush=True); time.sleep(0.002)"
    recording = python(program)
    numbers = [int(text) for text in texts(recording)[1:]]
    assert len(numbers) >= 3
    assert numbers == sorted(set(numbers))
    assert all(before.at < after.at for before, after in pairwise(recording.frames))


def test_the_program_has_a_terminal_of_that_size() -> None:
    recording = python("print(sys.stdout.isatty(), os.get_terminal_size(), os.environ['COLORTERM'])", columns=70)
    assert texts(recording)[-1] == "True os.terminal_size(columns=70, lines=8) truecolor"


def test_what_it_writes_is_passed_on_as_it_comes() -> None:
    heard: list[bytes] = []
    recording = python("print('one'); print('two'); sys.exit(3)", echo=heard.append)
    assert b"".join(heard) == b"one\r\ntwo\r\n"
    assert recording.status == 3


def test_a_program_that_is_silent() -> None:
    assert texts(python("pass")) == [""]


def test_a_recording_that_is_broken_off_ends_the_program_as_ctrl_c_does(tmp_path: Path) -> None:
    told = tmp_path / "told"

    def interrupt(_: bytes) -> None:
        raise KeyboardInterrupt

    program = "try:\n    print('ready', flush=True)\n    time.sleep(600)\n"
    program += f"except KeyboardInterrupt:\n    open({str(told)!r}, 'w').write('interrupted')"
    with pytest.raises(KeyboardInterrupt):
        python(program, echo=interrupt)
    assert told.read_text() == "interrupted"


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="nosuch"):
        record([str(tmp_path / "nosuch")], columns=80, rows=10)
