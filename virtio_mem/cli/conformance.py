"""`virtio-mem conformance`: judges a virtio-mem device, whoever made it."""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from vhost_user.errors import FieldError, UsageError
from virtio_mem.cli import say
from virtio_mem.cli.common import Screen, can_write_over, cursor_shown_after, teach
from virtio_mem.conformance.kit import Profile, Progress
from virtio_mem.conformance.replay import Replay, Replayed, parse_script, replay
from virtio_mem.conformance.report import check_path, write
from virtio_mem.conformance.report.terminal import lines_of
from virtio_mem.conformance.stop import Stop, asked_by_signals
from virtio_mem.conformance.target import Target, TargetFailure
from virtio_mem.conformance.targets.parse import parse_target
from virtio_mem.conformance.trial import Trial
from virtio_mem.conformance.words import ARROW, wish_words
from virtio_mem.picture.spans import Line, Role, Span, printable
from virtio_mem.serve.ending import in_order

HOLDS, VIOLATED, NOT_JUDGED = 0, 1, 2

_NAME = "virtio-mem conformance"

_HYPOTHESIS_HOME = "HYPOTHESIS_STORAGE_DIRECTORY"

_EXIT_STATUS = """\
exit status:
  0    all that could be tested holds; with --replay, all that could be compared
  1    a clause is violated; with --replay, an answer is another
  2    it could not be judged, what was found could not be written, or an argument
       can't be; with --replay, nothing was compared
  130  interrupted by Ctrl-C, or 143 by SIGTERM. A soak ends at the first of these
       signals with what was found by then, and its exit status, and at the second"""

_MORE = """\
TARGET is one of
  self[:BACKING]                     our own device, in this process
  ring[:split|packed]                the same behind a virtqueue
  vhost-user:SOCKET[,api=APISOCKET]  a daemon that serves a virtio-mem device;
                                     see docs/conformance-targets.md for more
  qemu[:BINARY][,option...]          QEMU's virtio-mem-pci, without a guest
  exec:COMMAND                       a program that speaks JSON lines

A clause gets a verdict where the target can do what showing it takes. What was
violated is shown with the shortest sequence that was found. A report has it as
lines, which --replay runs again, on this target or on another.

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    teach(
        parser,
        "Judge a virtio-mem device by the standard, and by what drivers depend on besides.",
        "virtio-mem conformance self",
        "virtio-mem conformance vhost-user:/tmp/mem0.sock --report mem0.html",
        exit_status=_MORE + _EXIT_STATUS,
    )
    parser.add_argument("target", metavar="TARGET", help="what is to be judged, see below")
    parser.add_argument(
        "--profile",
        choices=[profile.value for profile in Profile],
        default=Profile.QUICK.value,
        help="quick: under half a minute; full: some minutes; soak: until a sequence goes wrong, or Ctrl-C (quick)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="soak in N processes, each with devices of its own (1)"
    )
    parser.add_argument(
        "--report",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="write what was found, as the name says: .html, .md, .json, or .xml for JUnit's; may be given again",
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the sequences of a file, compare the answers")
    parser.add_argument("--seed", type=int, metavar="N", help="repeat the random sequences of an earlier run")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="CLAUSE",
        help="only the checks of this clause; may be given again",
    )
    parser.add_argument(
        "--database", metavar="WHERE", help="keep failing sequences, and begin with them: a directory, or redis://HOST"
    )


def run(arguments: argparse.Namespace) -> int:
    """Judge or replay; the exit status."""
    # What a device of ours logs is part of what is judged, and reported as such.
    logging.getLogger("virtio_mem").addHandler(logging.NullHandler())
    for path in arguments.report:
        check_path(path)
    scripts = parse_script(_read(arguments.replay)) if arguments.replay else []
    if arguments.replay and not any(script.steps for script in scripts):
        raise UsageError("replay", str(arguments.replay), "has to be a file of sequences: there is none in it")
    try:
        with in_order(signal.SIGQUIT), parse_target(arguments.target) as target:
            if arguments.replay:
                return _show_replays([replay(target, script) for script in scripts])
            return _judge(target, arguments)
    except TargetFailure as failure:
        return say(_NAME, f"{arguments.target}: {failure.what}", NOT_JUDGED)
    except FieldError as error:
        # One about the argument has the target in it.
        return say(_NAME, error if error.field == "target" else f"{arguments.target}: {error}", NOT_JUDGED)


def _judge(target: Target, arguments: argparse.Namespace) -> int:
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    profile, stop = Profile(arguments.profile), Stop()
    asked = asked_by_signals(stop.ask) if profile is Profile.SOAK else nullcontext()
    with asked, _hypothesis_elsewhere(), _live() as progress:
        trial = Trial(
            profile,
            seed,
            arguments.only,
            database=arguments.database,
            workers=arguments.workers,
            progress=progress,
            stopped=stop,
        )
        judgement = trial.hold(target)
    with ExitStack() as reports:  # each is written, whatever becomes of what was to be shown, and of the others
        for path in reversed(arguments.report):
            reports.callback(write, judgement, path)
        Screen().show(lines_of(judgement, arguments.only))
    return judgement.status


@contextmanager
def _hypothesis_elsewhere() -> Iterator[None]:
    """Has hypothesis, in this process and in workers, not leave what it noted in the current directory."""
    if _HYPOTHESIS_HOME in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="virtio-mem-hypothesis-") as directory:
        os.environ[_HYPOTHESIS_HOME] = directory
        try:
            yield
        finally:
            del os.environ[_HYPOTHESIS_HOME]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("replay", str(path), f"has to be a file of sequences: {error}") from error


def _show_replays(replays: list[Replay]) -> int:
    """What there is to say of each step, and the sum; the exit status.

    Where a step had no answer in the file, all of them are shown with theirs, and what is said of them as comments, so
    that it is the file that has the answers.
    """
    unanswered = sum(_is_unanswered(one) for each in replays for one in each.replayed)
    aside = [Span("# ")] if unanswered else []
    lines: list[Line] = []
    for each in replays:
        if unanswered:
            lines.append([Span(wish_words(each.script.wish))])
        for one in each.replayed:
            if remark := _remark(one):
                lines.append([*aside, *remark])
            if unanswered:
                lines.append([Span(_answered(one))])
        if each.failure:
            lines.append([*aside, Span(each.failure, Role.BAD)])
    steps = sum(len(each.replayed) for each in replays)
    differences = sum(len(each.differences) for each in replays)
    apart = sum(len(each.apart) for each in replays)
    summary = f"{steps} steps of {len(replays)} sequences, {differences} other answers"
    summary += f", {unanswered} without one to compare" if unanswered else ""
    lines.append([*aside, Span(f"{summary}, {apart} not compared" if apart else summary)])
    Screen().show(lines)
    if differences:
        return VIOLATED
    return NOT_JUDGED if apart + unanswered == steps or any(each.failure for each in replays) else HOLDS


def _is_unanswered(one: Replayed) -> bool:
    return not one.step.answer and not one.apart


def _answered(one: Replayed) -> str:
    """A step with its answer of now, or as the file has it where it was not made."""
    answer = one.now or one.step.answer
    return f"{one.step.call}{ARROW}{answer}" if answer else one.step.call


def _remark(one: Replayed) -> Line:
    """What is to be said of a step: nothing where the answer is that of the file, or the file has none."""
    step = one.step
    if one.apart:
        return [Span(f"line {step.number}: {step.call}; not compared: {one.apart}", Role.QUIET)]
    if one.same:
        return []
    return [Span(f"line {step.number}: {step.call}{ARROW}{step.answer}; now "), Span(one.now, Role.BAD)]


@contextmanager
def _live() -> Iterator[Callable[[Progress], None]]:
    """Progress on standard error while it is a terminal: a bar where rich is there, else one line."""
    if not can_write_over(sys.stderr):
        yield lambda _: None
        return
    try:
        from rich.console import Console  # noqa: PLC0415 - a quarter of a second, and an extra
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415
        from rich.progress import Progress as Bar  # noqa: PLC0415
    except ImportError:
        yield _overwrite
        sys.stderr.write("\r\x1b[K")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with cursor_shown_after(console), Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")

        def show(progress: Progress) -> None:
            words = f"{progress.violated} violated  {progress.step}"
            bar.update(task, description=printable(words), completed=progress.done, total=progress.total)

        yield show


def _overwrite(progress: Progress) -> None:
    words = f"{progress.done} of {progress.total}, {progress.violated} violated: {progress.step}"
    sys.stderr.write(f"\r\x1b[K{printable(words)}")
    sys.stderr.flush()
