"""`virtio-mem spread`: one size for several zones, and another zone in place of one that gets no further."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from vhost_user.errors import UsageError
from virtio_mem.cli.common import add_api_socket, teach
from virtio_mem.cli.follow import EXIT_STATUS, OUTAGE, STEP, Progress, add_size, bytes_of, insist, result_of, seconds_of
from virtio_mem.cli.outcome import STALLED, STATUS
from virtio_mem.client import Client
from virtio_mem.picture.sizes import human_size
from virtio_mem.spread import ZoneRange, spread

DOES = """Ask the guest to plug or unplug memory until its zones have SIZE in all, boot
memory included: each zone in proportion to what it can plug, so that NUMA
nodes of one size have the same. With --zone these zones alone.

SIZE is in bytes, or a number with K, M, G or T; what is beyond boot memory must
be whole blocks.

Without --wait the command ends as soon as the server has taken the sizes. With
--wait it ends when they are reached. A zone that stalls meanwhile, or whose
requests the host refuses, is asked to keep what it has, and the others have the
rest; where that is more than they can have, they have what they can, and it is
asked for what is lacking. So until SIZE is reached or nobody gets on, or for
SECONDS."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    example = "virtio-mem spread --api-socket api.sock 2G --wait 60"
    teach(parser, DOES, example, exit_status=EXIT_STATUS)
    add_api_socket(parser)
    add_size(parser)
    parser.add_argument("--zone", action="append", metavar="ID", help="one of these zones; all that can be resized")


def run(arguments: argparse.Namespace) -> int:
    """Ask for the sizes, and follow; the exit status."""
    total = bytes_of(arguments.size)
    deadline = time.monotonic() + seconds_of(arguments.wait) if arguments.wait is not None else 0.0
    client = Client(arguments.api_socket)
    progress = Progress()
    try:
        resize = _Resize(client, total, _ranges(client, arguments.zone), deadline, progress)
        operations = resize.look()
        while arguments.wait is not None and _goes_on(operations, deadline):
            progress.show(_progress_of(operations))
            if not resize.pass_on(operations):
                if "running" not in _states(operations):
                    break
                time.sleep(max(0.0, min(STEP, deadline - time.monotonic())))
            operations = resize.look()
    finally:
        progress.clear()
    for operation in operations.values():
        progress.say(result_of(operation))
    return 0 if arguments.wait is None else max(STATUS.get(state, STALLED) for state in _states(operations))


class _Resize:
    """`total` bytes for zones of these ranges, asked for when this is made; UsageError where they can't have it. A
    server that is silent is waited for until `deadline`."""

    def __init__(
        self, client: Client, total: int, ranges: Sequence[ZoneRange], deadline: float, progress: Progress
    ) -> None:
        self._client = client
        self._total = total
        self._ranges = ranges
        self._deadline = deadline
        self._progress = progress
        self._kept: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._ask(spread(total, ranges), outage=0.0)

    def _ask(self, sizes: dict[str, int], *, outage: float) -> None:
        """What a zone was asked for already it is not asked again: that would renew the patience with it."""
        for name, size in sizes.items():
            if self._sizes.get(name) != size:
                resize = partial(self._client.resize_zone, name, size)  # the same again is the same operation
                self._numbers[name] = insist(resize, self._deadline, outage=outage)
        self._sizes = sizes

    def look(self) -> dict[str, dict[str, Any]]:
        """The operation of each zone as it is now."""
        return {
            name: insist(partial(self._client.operation, number), self._deadline, outage=OUTAGE)
            for name, number in self._numbers.items()
        }

    def pass_on(self, operations: dict[str, dict[str, Any]]) -> bool:
        """Have zones that get no further keep what they have, and the others take the rest, or of it what they can;
        whether any did."""
        stuck = {
            name: operation["plugged"]
            for name, operation in operations.items()
            if operation["state"] in ("stalled", "refused") and name not in self._kept
        }
        if not stuck:
            return False
        kept = self._kept | stuck
        try:
            sizes, become = spread(self._total, self._ranges, kept), "keeps"
        except UsageError:  # the others have no room for it
            kept, become = self._kept, "stays behind with"
            sizes = self._as_far_as_can_be(stuck)
            if sizes == self._sizes:
                return False
        for name, size in stuck.items():
            self._progress.say(f"{name} {become} {human_size(size)}: {operations[name]['verdict']}")
        self._kept = kept
        self._ask(sizes, outage=OUTAGE)
        return True

    def _as_far_as_can_be(self, stuck: dict[str, int]) -> dict[str, int]:
        """The sizes where the others have the most, or the least, that they can, and those that are stuck the rest."""
        others = [zone for zone in self._ranges if zone.id not in self._kept | stuck]
        least = sum(self._kept.values()) + sum(stuck.values()) + sum(zone.boot for zone in others)
        if least < self._total <= least + sum(zone.hotplug for zone in others):  # it is not whole blocks
            return self._sizes
        ends = {zone.id: zone.boot + zone.hotplug * (self._total > least) for zone in others}
        try:
            return spread(self._total, self._ranges, self._kept | ends)
        except UsageError:
            return self._sizes


def _ranges(client: Client, names: Sequence[str] | None) -> list[ZoneRange]:
    """The zones that can be resized, or those of these names."""
    able = {
        zone["id"]: ZoneRange(zone["id"], zone["boot_size"], zone["hotplug_size"], zone["block_size"])
        for zone in client.info()["zones"]
        if zone["block_size"]
    }
    if not able:
        raise UsageError("zones", "none", "has to be one that can be resized", "give the machine a hotplug region")
    for name in names or ():
        if name not in able:
            limit = f"has to be one of {', '.join(able) or 'none'}"
            raise UsageError("--zone", name, limit, "name a zone that can be resized")
    return [able[name] for name in dict.fromkeys(names or able)]


def _states(operations: dict[str, dict[str, Any]]) -> set[str]:
    return {str(operation["state"]) for operation in operations.values()}


def _goes_on(operations: dict[str, dict[str, Any]], deadline: float) -> bool:
    states = _states(operations)
    return time.monotonic() < deadline and "superseded" not in states and states != {"reached"}


def _progress_of(operations: dict[str, dict[str, Any]]) -> str:
    """How far all of them are."""
    sums = (sum(operation[name] for operation in operations.values()) for name in ("plugged", "target", "rate"))
    size, target, rate = map(human_size, sums)
    reached = sum(operation["state"] == "reached" for operation in operations.values())
    return f"{size} of {target}, {rate}/s, {reached} of {len(operations)} zones there"
