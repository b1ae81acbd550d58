"""`virtio-mem doctor`: what this host can give, whether options can be met, and what a daemon would have of it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable

from virtio_mem.cli.common import Screen, teach
from virtio_mem.picture.spans import Line, Role, Span

DOES = """Say what of memory this host can give, huge pages and the limits of this
process's cgroups included. With Cloud Hypervisor's memory options, also what
the zones would be, what an option comes to, and whether all of it fits. With
--socket, what the vhost-user daemon there agrees to, and how it would be given
that memory: the slots, and what of unplugged memory they leave it.

Memory is made and let go again, and none of it is populated. The daemon is
connected to, and one that serves a single front end ends with that."""

EXIT_STATUS = """exit status:
  0    nothing stands against it
  1    something does: the lines that begin with !
  2    an argument that can't be: one line says which, and its limit
  130  interrupted by Ctrl-C"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    examples = (
        "virtio-mem doctor",
        "virtio-mem doctor --memory size=1G,hotplug_method=virtio-mem,hotplug_size=4G",
    )
    teach(parser, DOES, *examples, exit_status=EXIT_STATUS)
    parser.add_argument(
        "--memory", action="append", default=[], metavar="KEY=VALUE,...", help="all memory, or size=0 and zones"
    )
    parser.add_argument("--memory-zone", nargs="+", action="extend", default=[], metavar="KEY=VALUE,...")
    parser.add_argument("--numa", nargs="+", action="extend", default=[], metavar="KEY=VALUE,...")
    parser.add_argument("--socket", metavar="PATH", help="a vhost-user daemon's socket")


def run(arguments: argparse.Namespace) -> int:
    """Look, and print; the exit status."""
    from virtio_mem import doctor  # noqa: PLC0415 - --help is for people who wait
    from virtio_mem.config import VmMemoryConfig  # noqa: PLC0415
    from virtio_mem.config.vm import only_memory  # noqa: PLC0415

    logging.getLogger("virtio_mem").addHandler(logging.NullHandler())  # each warning is a finding as well
    asked = arguments.memory or arguments.memory_zone or arguments.numa
    config = None
    if asked:
        config = VmMemoryConfig.from_options(only_memory(arguments.memory), arguments.memory_zone, arguments.numa)
    screen = Screen()
    bad = _show(screen, "this host", doctor.host())
    if config is not None:
        bad |= _show(screen, "the memory", doctor.machine(config, arguments.socket))
    elif arguments.socket is not None:
        bad |= _show(screen, "the daemon", doctor.daemon(arguments.socket))
    return int(bad)


def _show(screen: Screen, title: str, findings: Iterable[tuple[str, str, bool]]) -> bool:
    """Print what was found, as it is found; whether some of it is bad."""
    any_bad = False
    screen.show([[Span(title, Role.NAME)]])
    for what, says, bad in findings:
        any_bad |= bad
        line: Line = [Span("! " if bad else "  ", Role.BAD), Span(f"{what}: ", Role.QUIET)]
        screen.show([[*line, Span(says, Role.BAD if bad else Role.TEXT)]])
    return any_bad
