"""The command: python -m vhost_user.attack SOCKET."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from vhost_user.attack.catalogue import ATTACKS, choose
from vhost_user.attack.oracles import Daemon
from vhost_user.attack.report import Report, as_json
from vhost_user.attack.runner import Runner, Verdict
from vhost_user.attack.theme import Attack
from vhost_user.errors import FieldError, HostError, UsageError
from vhost_user.output import give_up

_KILLED_BY = 128
"""The exit status for a signal is this and its number, as a shell has it."""

_LONGEST = 86400.0
"""Seconds of a time limit at most: a day."""

_DESCRIPTION = """\
Attacks the vhost-user daemon that listens at SOCKET, in every way that a front end and its guest have, and says what
became of it. The daemon must serve nobody else meanwhile, and nothing that it serves should be of value.
"""

_EPILOGUE = """\
After each attack a good front end comes, and has to be served. A daemon of the same user on the same machine is looked
at from outside too: it must not hold more descriptors and shared mappings than before. Memory of the attacker that the
daemon had no business with must not change.

verdicts:
  passed       it closed, refused, ignored, or did what may be done (--verbose says which)
  accepted     it said that it did what can't be done; nothing broke that we could see
  FAILED       it crashed, hung, leaked, or wrote where it must not
  not reached  it refused what comes before the attack proper
  not offered  it doesn't have the feature that the attack is about
  not made     it was gone by then, and nobody starts it again

exit status:
  0    all attacks were made that it has the features for, and none FAILED
  1    at least one FAILED, or was not made
  2    the daemon could not be judged, or what was found could not be written
  130  interrupted by Ctrl-C

examples:
  python -m vhost_user.attack /run/blk.sock
  python -m vhost_user.attack /run/blk.sock --only 'memory.*' framing.fds-9 --verbose
  python -m vhost_user.attack /tmp/fs.sock --restart 'virtiofsd --socket-path=/tmp/fs.sock --shared-dir=/tmp/share'
"""


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= _LONGEST:
        raise argparse.ArgumentTypeError(f"has to be 0 to {_LONGEST:g} seconds, and not {text}")
    return value


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vhost_user.attack",
        description=_DESCRIPTION,
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("socket", nargs="?", metavar="SOCKET", help="path of the socket that the daemon listens at")
    add("--list", action="store_true", help="print the attacks, what each does, and where it comes from")
    add("--only", nargs="+", default=[], metavar="NAME", help="make only these; shell patterns are allowed")
    add("--restart", default="", metavar="COMMAND", help="starts the daemon where it has ended, by itself or by us")
    add("--pid", type=int, help="the daemon's process, where it is not the one that listens")
    add("--timeout", type=_seconds, default=5.0, metavar="SECONDS", help="for each answer of the daemon (default: 5)")
    add("--patience", type=_seconds, default=0.1, metavar="SECONDS", help="where none is likely (default: 0.1)")
    add("--seed", type=int, help="repeats the random parts of another run")
    add("--json", metavar="FILE", help="write all results there; - is the standard output, and then no table")
    add("--verbose", action="store_true", help="a line for each attack, not only for what matters")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = _arguments()
    options = parser.parse_args(arguments)
    try:
        status = _do(parser, options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _KILLED_BY + signal.SIGINT
    except BrokenPipeError:
        give_up(sys.stdout)
        return _KILLED_BY + signal.SIGPIPE
    except OSError as error:  # the output is full
        give_up(sys.stdout)
        sys.stderr.write(f"{parser.prog}: standard output: {error}\n")
        return 2
    except FieldError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    return status


def _do(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    try:
        attacks = choose(options.only)
    except FieldError as error:
        parser.error(str(error))
    report = Report(sys.stderr if options.json == "-" else sys.stdout, verbose=options.verbose)
    if options.list:
        for attack in attacks:
            report.line(f"{attack.name}: {attack.says} [{attack.source}]")
        report.line(f"{len(attacks)} of {len(ATTACKS)} attacks")
        return 0
    if options.socket is None:
        parser.error("SOCKET is missing: the path of the socket that the daemon listens at")
    if options.json is not None:
        _check_place(options.json)
    if options.pid is not None and not (options.pid > 0 and Path(f"/proc/{options.pid}").exists()):
        raise UsageError("--pid", options.pid, "has to be a process that is there", "see ps for its number")
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    with (
        Daemon(options.socket, restart=options.restart, pid=options.pid or 0, timeout=options.timeout) as daemon,
        Runner(daemon, timeout=options.timeout, patience=options.patience, seed=seed) as runner,
    ):
        return _run(runner, attacks, report, options.json)


def _check_place(name: str) -> None:
    """UsageError where no file can be written: better now than behind all attacks."""
    path = Path(name)
    if name != "-" and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise UsageError("--json", name, "has to be a file that can be written", "choose another place")


def _run(runner: Runner, attacks: Sequence[Attack], report: Report, json: str | None) -> int:
    offer = runner.offer
    report.line(f"daemon: {runner.daemon.path}, {f'process {runner.daemon.pid}' if runner.daemon.pid else 'unseen'}")
    report.line(f"offers: features {offer.features:#x}, protocol features {int(offer.protocol):#x}")
    if runner.one_shot:
        report.line("it ends with its front end, so leaks are not looked for")
    elif not runner.daemon.watched:
        report.line("its process can't be seen from here, so leaks are not looked for")
    report.line(f"seed: {runner.seed} (repeat with --seed {runner.seed})")
    results = []
    for result in runner.run(attacks):
        results.append(result)
        report.result(result)
    report.close(results)
    if json == "-":
        sys.stdout.write(as_json(runner, results) + "\n")
    elif json:
        try:
            Path(json).write_text(as_json(runner, results) + "\n")
        except OSError as error:
            raise HostError.from_os_error("--json", json, "write", error, "write to where there is room") from error
    return 1 if any(result.verdict in {Verdict.FAILED, Verdict.NOT_MADE} for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
