"""The command `virtio-mem`: finds the subcommand, imports it and nothing else, and ends the way a command should.

Each subcommand is a module with `add_arguments(parser)`, which also sets the parser's epilog, and `run(arguments)`,
which returns the exit status. What goes wrong is one line on standard error. A reader that went away (`| head`) and
Ctrl-C end it with the status that a shell gives to a program killed by SIGPIPE or SIGINT.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from vhost_user.errors import FieldError, HostError, UsageError
from vhost_user.output import give_up

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

FAILED = 1
USAGE = 2
_KILLED_BY = 128
_OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What is said of standard output, by a call that names no file."""

_COLUMNS = 80


class Subcommand(NamedTuple):
    """Where a subcommand is, and what it is for. `failed` is its exit status where nothing of its own says better."""

    module: str
    summary: str
    failed: int = FAILED


SUBCOMMANDS = {
    "serve": Subcommand("serve", "serve virtio-mem devices to VMMs, one vhost-user socket a zone"),
    "boot": Subcommand("boot", "boot a Linux guest whose memory is ours and whose CPUs are QEMU's"),
    "info": Subcommand("info", "show zones: sizes, what the host holds, the last resize"),
    "resize": Subcommand("resize", "set the size of a machine's memory"),
    "resize-zone": Subcommand("resize_zone", "set the size of one zone"),
    "spread": Subcommand("spread", "set one size for several zones, such as those of NUMA nodes"),
    "map": Subcommand("map", "draw which blocks are plugged, in the terminal or in a file"),
    "watch": Subcommand("watch", "follow requests, resizes and events while they happen"),
    "doctor": Subcommand("doctor", "say what this host can give, and if options can be met"),
    "conformance": Subcommand("conformance", "judge a virtio-mem device, whoever made it", failed=USAGE),
}

_HEAD = """usage: virtio-mem SUBCOMMAND ...
       virtio-mem --version

Memory that comes to a Linux guest and goes again while it runs, by the
virtio-mem device. serve and boot run devices and listen at an API socket; the
other subcommands use that, but for doctor and conformance.

"""

_TAIL = """
For example, a zone of up to 2 GiB, for a VMM that connects to mem0.sock; the
guest is to plug 1 GiB of it at first, then 1.5 GiB:

  virtio-mem serve --api-socket api.sock \\
      --zone id=mem0,socket=mem0.sock,addr=4G,hotplug_size=2G,hotplugged_size=1G
  virtio-mem resize-zone --api-socket api.sock mem0 1536M --wait
  virtio-mem map --api-socket api.sock

Each subcommand has a --help with an example that works.

exit status:
  0    done
  1    the server is not there, went away or failed, or the host refused
  2    an argument or a size that can't be: one line says which, its limit, and
       what to do about it
  130  interrupted by Ctrl-C
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        # What begins so is no option. argparse takes -1G for one, and misses the argument that it is.
        self._negative_number_matcher = re.compile("-[0-9]")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and the way to more."""
        raise SystemExit(say(self.prog, f"{message}; see {self.prog} --help", USAGE))

    def _get_formatter(self) -> argparse.HelpFormatter:
        """argparse makes one for each argument, and its own asks shutil for the width, which loads bz2 and lzma."""
        return argparse.RawDescriptionHelpFormatter(self.prog, width=_columns() - 2)

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help. argparse's own passes over what the output can't take."""
        (sys.stdout if file is None else file).write(self.format_help())


def _columns() -> int:
    """The width of the terminal that help goes to."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    try:
        return os.get_terminal_size(1).columns or _COLUMNS
    except OSError:
        return _COLUMNS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or the process's; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the output's encoding lacks is written as an escape
    name, failed = "virtio-mem", FAILED
    if arguments and arguments[0] in SUBCOMMANDS:
        name, failed = f"virtio-mem {arguments[0]}", SUBCOMMANDS[arguments[0]].failed
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except FieldError as error:
        return say(name, error, USAGE if isinstance(error, UsageError) else failed)
    except UnicodeEncodeError as error:  # paths may have any bytes; all else that is given is text
        limit = f"must be text: {error.reason} at letter {error.start}"
        return say(name, UsageError("argument", error.object[:60], limit, "write it in UTF-8"), USAGE)
    except KeyboardInterrupt:
        return _KILLED_BY + signal.SIGINT
    except BrokenPipeError:
        give_up(sys.stdout)
        return _KILLED_BY + signal.SIGPIPE
    except OSError as error:  # of those that nobody foresaw; most of all, that standard output is full
        why = _of_output(error) if error.errno in _OF_OUTPUT and error.filename is None else error
        give_up(sys.stdout)
        return say(name, why, failed)
    return status


def _open_standard_streams() -> None:
    """What was closed when we were started (`>&-`) is /dev/null from here on, for what we start, too.

    Left closed, its number is that of the next file or socket, which others' complaints would be written to.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere == number:  # the lowest that is free, unless somebody was quicker
                os.set_inheritable(nowhere, True)
            setattr(sys, name, open(nowhere, "w" if number else "r"))  # noqa: SIM115 - it stays open


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _help()
        return 0 if arguments else USAGE
    if arguments[0] in ("-V", "--version"):
        from virtio_mem.installed import version  # noqa: PLC0415 - it is seldom wanted

        sys.stdout.write(f"virtio-mem {version()}\n")
        return 0
    name, *rest = arguments
    if name not in SUBCOMMANDS:
        raise UsageError("SUBCOMMAND", name, f"has to be one of {', '.join(SUBCOMMANDS)}", "see virtio-mem --help")
    module = importlib.import_module(f"virtio_mem.cli.{SUBCOMMANDS[name].module}")
    parser = Parser(f"virtio-mem {name}", SUBCOMMANDS[name].summary)
    module.add_arguments(parser)
    try:
        return int(module.run(parser.parse_args(rest)))
    except SystemExit as end:  # argparse's way to end after --help and after a mistake
        return end.code if isinstance(end.code, int) else USAGE if end.code else 0


def _help() -> None:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {subcommand.summary}\n" for name, subcommand in SUBCOMMANDS.items()]
    sys.stdout.write(_HEAD + "".join(lines) + _TAIL)


def say(name: str, why: object, status: int) -> int:
    """Say in one line on standard error why `name` ends with this status, which is returned."""
    from virtio_mem.picture.spans import printable  # noqa: PLC0415 - there is seldom something to say

    try:
        sys.stderr.write(f"{name}: {printable(' '.join(str(why).split()))}\n")
    except OSError:  # nobody is told then; the status is as it would be
        give_up(sys.stderr)
    return status


def _of_output(error: OSError) -> HostError:
    from pathlib import Path  # noqa: PLC0415 - it is seldom wanted

    try:
        where = str(Path(f"/proc/self/fd/{sys.stdout.fileno()}").readlink())
    except OSError:
        where = str(sys.stdout.fileno())
    return HostError.from_os_error("standard output", where, "write", error, "write to where there is room")
