"""The picture that `watch` keeps up to date: a bar for each zone, figures, the resize under way, and recent events.

    mem0  ▕██████████████████████████████················          ▏ 2 GiB
                                                     ▲ target 1.5 GiB
          64 MiB boot + 1 GiB plugged   the host holds 1 GiB   PLUG ACK 58/s
          resize 7 to 1.562 GiB: running for 2 s, 1.062 GiB now   120 MiB/s, 4.3 s to go

The bar is a gauge: it shows how much of the hotplug region is plugged, and not where; `map` shows where. What the host
holds is of the hotplug region too. A resize counts boot memory in, as its SIZE did.
"""

from __future__ import annotations

import time
from typing import Any

from virtio_mem.cli.event_log import Entry
from virtio_mem.cli.feed import Feed, Sample
from virtio_mem.cli.outcome import outcome
from virtio_mem.picture.bar import bar, framed, target_mark
from virtio_mem.picture.blocks import ZoneBlocks
from virtio_mem.picture.sizes import human_size, human_time
from virtio_mem.picture.spans import Glyphs, Line, Role, Span

EVENTS_SHOWN = 8
_STATE_ROLES = {"reached": Role.GOOD, "stalled": Role.BAD, "refused": Role.BAD}
_BESIDE_BAR = 14
"""Columns for the frame and the region's size."""


def dashboard(feed: Feed, width: int, glyphs: Glyphs) -> list[Line]:
    """All lines, for a terminal of `width` columns."""
    margin = max([4, *map(len, feed.samples)]) + 2
    lines = _heading(feed)
    for name, sample in feed.samples.items():
        lines += [[], *_zone(name, sample, margin, width, glyphs)]
    entries = feed.log.last(EVENTS_SHOWN)
    lines += [[], [Span("events", Role.NAME)]]
    lines += [event_line(entry, margin) for entry in entries] or [[Span("none yet", Role.QUIET)]]
    return lines


def _heading(feed: Feed) -> list[Line]:
    """The title, and whether the server is there: of a narrow terminal's line only the path's end is lost."""
    state = Span("connected", Role.QUIET)
    if feed.gone:
        state = Span("the server has gone", Role.BAD)
    elif feed.reconnecting:
        state = Span(f"reconnecting: {feed.trouble}", Role.BAD)
    clock = time.strftime("%H:%M:%S")
    return [
        [Span("virtio-mem watch", Role.NAME), Span(f"  {feed.client.path}", Role.QUIET)],
        [Span(f"{clock}  "), state],
    ]


def _zone(name: str, sample: Sample, margin: int, width: int, glyphs: Glyphs) -> list[Line]:
    blank = Span(" " * margin)
    blocks = gauge(sample.zone)
    if blocks is None:
        return [[Span(f"{name:<{margin}}", Role.NAME), Span(f"{_size(sample.zone, 'boot_size')}, no virtio-mem")]]
    columns = max(8, width - margin - _BESIDE_BAR)
    size = f" {human_size(blocks.size(blocks.nb_blocks))}"
    lines: list[Line] = [
        [Span(f"{name:<{margin}}", Role.NAME), *framed(bar(blocks, columns, glyphs), glyphs), Span(size)],
        [blank, Span(" "), *target_mark(blocks, columns, glyphs)],
        [blank, *_figures(sample)],
    ]
    operation = sample.zone["operation"]
    return [*lines, [blank, *_resize(operation)]] if operation else lines


def gauge(zone: dict[str, Any]) -> ZoneBlocks | None:
    """A zone's sizes as blocks that are plugged from the region's start; None for a zone without a device."""
    block_size = zone["block_size"]
    if not block_size:
        return None
    sizes = (zone[key] or 0 for key in ("hotplug_size", "usable_region_size", "requested_size", "plugged_size"))
    nb_blocks, usable, requested, plugged = (size // block_size for size in sizes)
    return ZoneBlocks(
        addr=zone["addr"] or 0,
        block_size=block_size,
        nb_blocks=nb_blocks,
        usable_blocks=usable,
        requested_blocks=requested,
        plugged=[(0, min(plugged, nb_blocks))] if plugged and nb_blocks else [],
    )


def _figures(sample: Sample) -> Line:
    zone = sample.zone
    boot = f"{_size(zone, 'boot_size')} boot + " if zone["boot_size"] else ""
    line = [Span(f"{boot}{_size(zone, 'plugged_size')} plugged   the host holds {_size(zone, 'held')}")]
    if strays := _strays(zone):
        line.append(Span(strays, Role.BAD))
    for name, rate in sample.rates.items():
        line.append(Span(f"   {name} {rate:.3g}/s", Role.QUIET if name.endswith(" ACK") else Role.BAD))
    if not sample.rates:
        line.append(Span("   no requests", Role.QUIET))
    if zone.get("connected") is False:
        line.append(Span("   no front end", Role.BAD))
    if zone.get("paused"):
        line.append(Span("   paused", Role.BAD))
    return line


def _resize(operation: dict[str, Any]) -> Line:
    state, rate = operation["state"], operation["rate"]
    line = [Span(f"resize {operation['id']} to "), Span(outcome(operation), _STATE_ROLES.get(state, Role.TEXT))]
    if state == "running" and rate:
        left = abs(operation["target"] - operation["plugged"]) / rate
        line.append(Span(f"   {human_size(rate)}/s, {human_time(left)} to go", Role.QUIET))
    return line


def event_line(entry: Entry, margin: int = 0) -> Line:
    """One entry of the log."""
    clock = time.strftime("%H:%M:%S", time.localtime(entry.time))
    return [Span(f"{clock}  ", Role.QUIET), Span(f"{entry.zone:<{margin}}"), Span(entry.text, entry.role)]


def summary(name: str, sample: Sample) -> str:
    """A zone in one line, for what is no terminal."""
    zone, operation = sample.zone, sample.zone["operation"]
    rates = ", ".join(f"{key} {rate:.3g}/s" for key, rate in sample.rates.items()) or "no requests"
    sizes = (
        f"{_size(zone, 'plugged_size')} of {_size(zone, 'requested_size')} plugged, "
        f"host holds {_size(zone, 'held')}{_strays(zone)}"
    )
    resize = f"; resize {operation['id']} to {outcome(operation)}" if operation else ""
    return f"{name}: {sizes}; {rates}{resize}"


def _strays(zone: dict[str, Any]) -> str:
    """What of that is for blocks that are not plugged, if any is: somebody has touched them all the same."""
    return f", {_size(zone, 'held_unplugged')} of it for unplugged blocks" if zone.get("held_unplugged") else ""


def _size(zone: dict[str, Any], key: str) -> str:
    return "?" if zone[key] is None else human_size(zone[key])
