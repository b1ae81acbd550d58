"""A film shows, at every moment, what the terminal showed; and where nothing moves, what it showed last."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.picture.player import SVG, Player
from virtio_mem.picture.film import LAST, MOST_STILL, film, schedule
from virtio_mem.picture.recording import Frame, Look, Piece, Recording, Row

DOCS = Path(__file__).parents[2] / "docs"

DRAWN = {"svg", "style", "defs", "g", "use", "rect", "circle", "text"}

LOOKS = [Look(), Look("2f81f7"), Look("red", "default", bold=True), Look("ink", "ground", italic=True, underlined=True)]
WORDS = st.text(alphabet="ab<&>\"'█·▲日", min_size=1, max_size=6)


def row_of(*words: str, looks: tuple[Look, ...] = (LOOKS[0],)) -> Row:
    pieces, column = [], 0
    for number, word in enumerate(words):
        pieces.append(Piece(column, word, len(word), looks[number % len(looks)]))
        column += len(word) + number % 2  # side by side, or with a blank between
    return tuple(pieces)


ROWS = st.builds(
    lambda words, looks: row_of(*words, looks=tuple(looks)), st.lists(WORDS, max_size=3), st.permutations(LOOKS)
)


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    known = draw(st.lists(ROWS, min_size=1, max_size=4))  # so that some come up again, elsewhere
    frames, at = [Frame(0.0, ())], 0.0
    for rows in draw(st.lists(st.lists(st.sampled_from(known), min_size=1, max_size=5), max_size=6)):
        while rows and not rows[-1]:
            rows.pop()
        at += draw(st.sampled_from([0.03, 0.1, 1.0, MOST_STILL, 5.2, 90.0]))
        if tuple(rows) != frames[-1].rows:
            frames.append(Frame(at, tuple(rows)))
    return Recording(20, frames, at + 0.1, 0)


@given(recordings())
def test_every_frame_is_seen_for_its_time_and_the_last_one_for_good(recording: Recording) -> None:
    begins, _ = schedule(recording.frames)
    if len(begins) == 1:
        return
    player = Player(film(recording, "a film"))
    assert player.seconds == pytest.approx(begins[-1] + LAST, abs=0.001)
    for frame, begin, end in zip(recording.frames, begins, [*begins[1:], player.seconds], strict=True):
        for moment in (begin + 0.01, (begin + end) / 2, end - 0.01):
            assert player.screen(moment) == frame.text
    assert player.screen(None) == recording.frames[-1].text


def test_a_wait_is_shortened_and_said_so() -> None:
    frames = [Frame(at, (row_of(text),)) for at, text in ((0.0, "a"), (1.5, "b"), (14.5, "c"), (14.6, "d"))]
    player = Player(film(Recording(10, frames, 15.0, 0), "a film"))
    assert player.seconds == pytest.approx(1.5 + MOST_STILL + 0.1 + LAST)
    moments = (0.5, 1.4, 1.6, 3.4, 3.55, 3.65, 9.5)
    assert [player.screen(moment) for moment in moments] == ["a", "a", "b", "b", "c", "d", "d"]
    waits = ["", "", *["a wait of 13 s, shortened"] * 2, "", *["15 s in all"] * 2]
    assert [player.note(moment) for moment in moments] == waits
    assert player.note(None) == "15 s in all"


def test_what_does_not_change_is_drawn_once() -> None:
    """A line that stays is there once, one that moves up is one drawing that is used again."""
    stays = row_of("stays")
    frames = [Frame(at * 0.1, (stays, *(row_of(f"{line:04}") for line in range(at, at + 30)))) for at in range(50)]
    svg = film(Recording(100, frames, 6.0, 0), "a film")
    assert svg.count(">stays<") == 1
    assert svg.count(">0030<") == 1
    assert len(svg) < 300 * 50 * 30 / 2


def test_markup_and_a_title_are_text() -> None:
    frames = [Frame(0.0, ()), Frame(0.1, (row_of("<b>&amp;", "]]>"),))]
    player = Player(film(Recording(40, frames, 0.2, 0), "a \"<title>\" & 'more'"))
    assert player.screen(None) == "<b>&amp;]]>"
    assert player.root.get("aria-label") == "a \"<title>\" & 'more'"


def test_the_same_recording_gives_the_same_bytes() -> None:
    frames = [
        Frame(at, (row_of("a" * number, looks=(LOOKS[number % 4],)),)) for number, at in enumerate((0.0, 0.1, 9.0), 1)
    ]
    recording = Recording(10, frames, 9.1, 0)
    assert film(recording, "x") == film(recording, "x")


def test_the_demos_film() -> None:
    """What README shows: all of it in one file that nothing runs in, and that tells the demo in its order."""
    svg = (DOCS / "linux.svg").read_text()
    player = Player(svg)
    assert len(svg.encode()) < 200_000
    assert {each.tag.removeprefix(SVG) for each in player.root.iter()} <= DRAWN
    assert not re.search(r"url\(|@import|@font-face|https?://(?!www\.w3\.org/2000/svg)", svg)
    assert "@media (prefers-reduced-motion:no-preference)" in svg
    story = ["boots", "gives more", "uses it", "takes memory back", "0 bytes did not go back"]
    last = player.screen(None)
    assert all(part in last for part in story)
    screens = [player.screen(moment / 20) for moment in range(int(player.seconds * 20))]
    firsts = [next(number for number, screen in enumerate(screens) if part in screen) for part in story]
    assert firsts == sorted(set(firsts))
    assert screens[-1] == last
    assert all(before.count("\n") <= after.count("\n") for before, after in pairwise(screens))
    bars = {line for screen in screens for line in screen.splitlines() if line.startswith("mem0 ")}
    assert len(bars) > 10, "the bar moves"
