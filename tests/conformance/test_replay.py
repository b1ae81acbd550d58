"""What a session put down is run again: on our device, on another one, and by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.conformance.bare import Bare
from vhost_user.errors import UsageError
from vhost_user.units import KIB, MIB
from virtio_mem.conformance.calls import FORMS
from virtio_mem.conformance.check import Check, expect_answer, granted, ready
from virtio_mem.conformance.kit import run_checks, shorten_evidence
from virtio_mem.conformance.replay import parse_script, replay, script_of, shorten
from virtio_mem.conformance.report.diagram import short
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Chain, Odd, Target, TargetFailure, Wish
from virtio_mem.conformance.targets.behind_ring import RingTarget
from virtio_mem.conformance.targets.in_process import Parts
from virtio_mem.conformance.targets.ours import OurTarget
from virtio_mem.conformance.words import wish_words
from virtio_mem.device import Effect, VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.protocol import Request, RequestType, Response, ResponseType
from virtio_mem.region_memory import RegionMemory
from virtio_mem.service import DeviceService

WISH = Wish(region_size=4 * MIB, block_size=64 * KIB, requested_size=1 * MIB)


@pytest.fixture
def ring() -> Iterator[Target]:
    with RingTarget("split", "anonymous") as target:
        yield target


def everything(session: Session) -> None:
    """Each call that there is."""
    session.begin()
    session.begin(session.features)
    session.plug(0, 4)
    session.state(0, 8)
    session.ask(0xFFFF, session.addr(1, 7), 1)
    session.ask(RequestType.PLUG, 2**64 - 1, 0)
    session.chain(Chain(bytes(24) + b"more", readable=(7, 30), room=(2, 30), indirect=True))
    session.chain(Chain(b"short", readable=(5,), room=()))
    session.batch([session.request(RequestType.PLUG, 8), session.request(RequestType.STATE, 7, 2)])
    session.chain(session.request(RequestType.STATE, 8)._replace(fill=0, odd=Odd.WRITE))
    session.registers()
    session.write_config(48, b"\1\2")
    session.peek(9)
    session.offer([session.request(RequestType.STATE, 8), session.request(RequestType.PLUG, 9)], flags=1, ahead=7)
    session.kick()
    session.look()
    session.fill(0, 2, 5)
    session.same(0, 2, 5)
    session.held(0, 4)
    session.set_target(2 * MIB)
    session.set_target(3 * 64 * KIB + 1)
    session.notices()
    session.refuse(True)
    session.plug(12, 2)
    session.refuse(False)
    session.pause(True)
    session.unplug(0)
    session.pause(False)
    session.advance(2.5)
    session.config()
    session.device_reset()
    session.begin()
    session.unplug_all()
    session.system_reset()
    step_by_step(session)


def step_by_step(session: Session) -> None:
    """Those of a driver that goes slowly."""
    session.prepare()
    session.offer([])
    session.look(whole=False)
    session.go()
    session.overrun()
    session.kick()
    session.look(whole=False)


def recorded(target: Target) -> list[str]:
    subject = target.start(WISH)
    session = Session(subject, WISH, target.capabilities)
    everything(session)
    subject.close()
    return session.lines


def test_a_session_runs_again_and_gets_the_same_answers(ring: Target) -> None:
    lines = recorded(ring)
    assert len({line.split()[0] for line in lines}) == 29
    assert {line.split()[0] for line in lines} == {"wish", *FORMS} - {"boot_memory", "sleep", "wake"}
    again = replay(ring, script_of(lines))
    assert (again.failure, again.differences) == ("", [])
    assert [f"{one.step.call} -> {one.now}" for one in again.replayed] == lines[1:]


def test_another_device_may_lie_elsewhere(ring: Target) -> None:
    lines = [line.replace("addr=0x100000000", "addr=0x7700000000") for line in recorded(ring)]
    assert replay(ring, script_of(lines)).differences == []


def test_what_the_host_holds_is_compared_where_it_was_nothing(ring: Target) -> None:
    steps = ["begin", "held 0 2 -> 0", "plug 0 2", "held 0 2 -> 4096", "held 0 2 -> 0"]
    again = replay(ring, script_of([wish_words(WISH), *steps]))
    assert [(one.step.number, one.now) for one in again.differences] == [(6, "131072")]


def test_other_answers_are_differences(ring: Target) -> None:
    text = f"""
    {wish_words(WISH)}

    # Written by hand.
    begin -> agreed 0x0     # which features is no matter
    plug 0 4 -> NACK
    plug 4 4
    state 0 8 -> ACK MIXED
    """
    (script,) = parse_script(text)
    again = replay(ring, script)
    assert [(one.step.number, one.step.answer, one.now) for one in again.differences] == [
        (6, "NACK", "ACK"),
        (8, "ACK MIXED", "ACK PLUGGED"),
    ]


def test_a_file_may_hold_several_sessions(ring: Target) -> None:
    lines = recorded(ring)
    scripts = parse_script("\n".join([*lines, "", *lines]))
    assert [script.wish for script in scripts] == [WISH, WISH]
    assert [len(script.steps) for script in scripts] == [len(lines) - 1] * 2


def test_an_answer_that_was_cut_is_not_compared(ring: Target) -> None:
    """As beside a picture, in a page or in Markdown."""
    line = short("config -> block_size=65536 node_id=0 addr=0x100000000 region_size=5 plugged_size=0")
    assert len(line) == 60
    again = replay(ring, script_of([wish_words(WISH), "begin", f"{line}  . [##].", "plug 0 1 -> ACK  [..]#~"]))
    assert again.differences == []
    assert [(one.step.number, one.apart) for one in again.apart] == [
        (3, "the end of the answer is missing in the file")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"WISH\n{short(f'chain 0 b0 1 more={bytes(99).hex()} -> ACK')}", "line 2: call=chain 0 b0 1 more="),
        ("plug 0 1", "line 1: call=plug 0 1: comes before the first wish"),
        ("wish region_size=1", "line 1: wish=wish region_size=1: can't be read: 'node_id'; it is 'wish region_size=N "),
        ("WISH\n\nplug 0", "line 3: call=plug 0: can't be read: its words are too many or too few; it is 'plug BLOCK"),
        ("WISH\ntarget x", "line 2: call=target x: can't be read: invalid literal"),
        (
            "WISH\nrefuse maybe",
            "line 2: call=refuse maybe: can't be read: its words are too many, too few, or others; it",
        ),
        ("WISH\nbatch plug 0 1 | dance", "line 2: call=dance: can't be read: there is no such request; they are plug"),
        ("WISH\ndance 1", "line 2: call=dance 1: can't be read: there is no such call; they are begin, plug, "),
        ("WISH\noffer -1 0", "line 2: call=offer -1 0: can't be read: FLAGS and AHEAD are 0 to 65535; it is 'offer"),
        ("WISH\noffer 0 65536", "line 2: call=offer 0 65536: can't be read: FLAGS and AHEAD are 0 to 65535; it is 'o"),
        ("WISH\nchain 1", "line 2: call=chain 1: can't be read: words are missing; it is 'chain TYPE ADDR"),
        ("WISH\nbegin 0xz", "line 2: call=begin 0xz"),
        ("WISH\nadvance inf", "line 2: advance=inf"),
        ("WISH\nadvance -1", "line 2: advance=-1"),
        ("WISH\nchain 0 b0 1 room=10,-5", "line 2: call=chain 0 b0 1 room=10,-5"),
    ],
)
def test_what_can_not_be_read_is_told_by_its_line(text: str, message: str) -> None:
    wish = wish_words(Wish(1, 1))
    with pytest.raises(UsageError) as refusal:
        parse_script(text.replace("WISH", wish))
    assert str(refusal.value).startswith(message)


def test_a_request_before_its_driver_is_a_mistake_of_the_file(ring: Target) -> None:
    with pytest.raises(UsageError, match="begin comes first"):
        replay(ring, script_of([wish_words(WISH), "begin", "device_reset", "plug 0 1"]))


# Targets that can do less.


def apart(target: Target, *calls: str) -> tuple[list[str], list[int], list[int]]:
    """The answers now, "" for steps that were not made, and the lines that differ, and that could not be compared."""
    script = script_of([wish_words(WISH), *calls])
    again = replay(target, script)
    assert again.failure == ""
    differences = [one.step.number for one in again.differences]
    return [one.now for one in again.replayed], differences, [one.step.number for one in again.apart]


@pytest.fixture
def bare() -> Iterator[Target]:
    """One that can do nothing but requests, its target being 16 blocks."""
    with Bare("exec", Capability(0), 16 << 16) as target:
        yield target


def test_questions_that_a_target_can_not_answer_are_passed_over(bare: Target) -> None:
    steps = ["begin", "plug 0 2 -> ACK", "held 0 2 -> 0", "notices -> 3", "fill 0 1 7", "same 0 1 7 -> yes", "peek 5"]
    now, differences, left_out = apart(bare, *steps, "state 0 2 -> ACK PLUGGED", "state 0 2 -> ACK MIXED")
    assert now == ["agreed 0x130000006", "ACK", "", "", "", "", "", "ACK PLUGGED", "ACK PLUGGED"]
    assert (differences, left_out) == ([10], [4, 5, 6, 7, 8])


@pytest.mark.parametrize("word", ["refuse", "pause"])
def test_what_was_busy_is_left_out_where_the_host_can_not_be_hindered(bare: Target, word: str) -> None:
    now, differences, left_out = apart(
        bare,
        *("begin", "plug 0 2 -> ACK", f"{word} on", "plug 2 2 -> BUSY", "unplug 0 1 -> BUSY", "plug 0 1 -> ERROR"),
        *("state 0 4 -> ACK MIXED", f"{word} off", "plug 2 2 -> ACK", "unplug 3 1 -> BUSY"),
    )
    assert now == ["agreed 0x130000006", "ACK", "", "", "", "ERROR", "ACK MIXED", "", "ACK", "ACK"]
    assert (differences, left_out) == ([11], [4, 5, 6, 9])


def test_the_notice_that_is_owed_for_busy_is_not_looked_for() -> None:
    with Bare("exec", Capability.NOTICES | Capability.SET_TARGET, 16 << 16) as target:
        now, differences, left_out = apart(
            target,
            *("begin", "notices -> 0", "pause on", "plug 0 1 -> BUSY", "notices -> 0", "pause off", "notices -> 1"),
            *("target 65536 -> done", "notices -> 2"),
        )
    assert now == ["agreed 0x130000006", "0", "", "", "0", "", "0", "done", "1"]
    assert (differences, left_out) == ([10], [4, 5, 6, 7, 8])


def test_after_a_move_that_a_target_can_not_make_nothing_is_compared(bare: Target) -> None:
    steps = ("begin", "chain 0 b0 1 room=9 -> ERROR", "target 0 -> done", "plug 0 1 -> NACK", "refuse on")
    now, differences, left_out = apart(bare, *steps)
    assert now == ["agreed 0x130000006", "", "", "", ""]
    assert (differences, left_out) == ([], [3, 4, 5, 6])
    script = script_of([wish_words(WISH), *steps])
    why = [one.apart for one in replay(bare, script).apart]
    assert (
        why
        == ["exec can't: CHAINS", "exec can't: SET_TARGET"] + ["what follows line 4, since exec can't: SET_TARGET"] * 2
    )


def test_several_chains_need_no_ring_of_ours() -> None:
    with OurTarget("anonymous") as target:
        script = script_of([wish_words(WISH), "begin", "batch plug 0 1 | state 0 1 -> ACK | ACK PLUGGED"])
        assert replay(target, script).differences == []
        script = script_of([wish_words(WISH), "begin", "chain 0 b0 1 room=64"])
        assert [one.apart for one in replay(target, script).apart] == ["self can't: CHAINS"]


# Shortening, on a device that gives another block back than it was asked for.


class OneTooFew(VirtioMemDevice):
    """Answers an UNPLUG of three blocks with ERROR."""

    def request(self, request: Request) -> Response | Effect:
        if request.type == RequestType.UNPLUG and request.nb_blocks == 3:
            return super().request(request._replace(nb_blocks=0))
        return super().request(request)


def make(geometry: Geometry, requested_size: int) -> VirtioMemDevice:
    return OneTooFew(geometry, requested_size=requested_size)


@pytest.fixture
def wrong() -> Iterator[Target]:
    with OurTarget("anonymous", parts=Parts(make_device=make)) as target:
        yield target


def session_of(target: Target, calls: Sequence[str]) -> list[str]:
    script = script_of(
        [f"wish region_size={WISH.region_size} block_size=65536 requested_size=1048576 node_id=none", *calls]
    )
    done = replay(target, script)
    return ["wish region_size=4194304 block_size=65536 requested_size=1048576 node_id=none"] + [
        f"{one.step.call} -> {one.now}" for one in done.replayed
    ]


def test_looks_and_refusals_are_left_out(wrong: Target) -> None:
    lines = session_of(
        wrong,
        ["config", "begin", "state 0 4", "plug 0 6", "plug 2 2", "target 65536", "plug 9 1", "config", "unplug 0 3"],
    )
    assert shorten(wrong, lines) == (
        lines[0],
        lines[2],
        "plug 0 6 -> ACK",
        "target 65536 -> done",
        "unplug 0 3 -> ERROR",
    )


class Keeps(DeviceService):
    """Gives nothing back."""

    def _unplug(self, effect: Effect) -> None:
        pass


def test_what_is_held_is_the_same_to_the_byte() -> None:
    def make_service(device: VirtioMemDevice, memory: RegionMemory) -> DeviceService:
        return Keeps(device, memory, prefault=True)

    with OurTarget("anonymous", parts=Parts(make_service=make_service)) as target:
        lines = session_of(target, ["begin", "plug 0 4", "config", "plug 0 1", "unplug 1 2", "held 1 2"])
        assert lines[-1] == "held 1 2 -> 131072"
        assert shorten(target, lines) == (*lines[:3], *lines[5:])


class Forgetful(VirtioMemDevice):
    """Takes the second STATE for a PLUG of what it names."""

    asked = 0

    def request(self, request: Request) -> Response | Effect:
        self.asked += request.type == RequestType.STATE
        if self.asked == 2:
            request = request._replace(type=RequestType.PLUG)
        return super().request(request)


def test_a_look_that_matters_stays() -> None:
    parts = Parts(make_device=lambda geometry, size: Forgetful(geometry, requested_size=size))
    with OurTarget("anonymous", parts=parts) as target:
        lines = session_of(target, ["begin", "config", "state 0 4", "config", "state 0 4", "plug 9 1", "plug 0 1"])
        assert lines[-1] == "plug 0 1 -> ERROR"
        short = shorten(target, lines)
        assert [line.split(" -> ")[0] for line in short[1:]] == [
            "begin",
            "state 0 4",
            "state 0 4",
            "plug 9 1",
            "plug 0 1",
        ]


def test_what_a_judge_shows_is_short(wrong: Target) -> None:
    def three(session: Session) -> None:
        ready(session, 4)
        granted(session, session.plug(0, 4))
        expect_answer("MEM-UNPLUG-8", session.unplug(0, 3), ResponseType.ACK)

    def three_late(session: Session) -> None:
        ready(session, 4)
        session.notices()
        three(session)

    runs = {"late": three_late, "three": three}
    checks = [Check(name, ("MEM-UNPLUG-8",), run, Capability(0), (WISH,), slow=False) for name, run in runs.items()]
    judged = run_checks(wrong, checks)
    assert [len(one.lines) for one in judged.evidence] == [9, 6]
    shorten_evidence(wrong, judged)
    late, short = (one.lines for one in judged.evidence)
    assert len(late) == 9
    assert [line.split(" -> ")[0] for line in short[1:]] == ["begin", "plug 0 4", "unplug 0 3"]


def test_a_target_that_does_not_start_any_more_shortens_nothing(wrong: Target) -> None:
    lines = session_of(wrong, ["begin", "config", "plug 0 4", "unplug 0 3"])

    def start(wish: Wish) -> None:
        raise TargetFailure("no more")

    wrong.start = start  # type: ignore[method-assign, assignment]
    assert shorten(wrong, lines) == tuple(lines)
