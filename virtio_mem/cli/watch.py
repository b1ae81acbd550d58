"""`virtio-mem watch`: requests, resizes and events while they happen."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable

from vhost_user.errors import UsageError
from virtio_mem.cli.common import Screen, add_api_socket, cursor_shown_after, teach
from virtio_mem.cli.dashboard import dashboard, event_line, summary
from virtio_mem.cli.feed import POLL_PATIENCE, Feed
from virtio_mem.client import Client
from virtio_mem.picture.spans import plain, printable
from virtio_mem.serve.ending import in_order

DOES = """Follow a machine's memory: for each zone a bar, bytes plugged and bytes that the
host really holds, requests a second by answer, the resize under way with its
rate and verdict, and the last events. On a terminal a picture that is kept up
to date (with the extra `terminal`), else a line a second for each zone.

It ends when the server does, and says `reconnecting` while one that crashed is
being replaced."""

_LEAST_INTERVAL, _MOST_INTERVAL = 0.05, 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    examples = ("virtio-mem watch --api-socket api.sock", "virtio-mem watch --api-socket api.sock --json | jq .zones")
    teach(parser, DOES, *examples)
    add_api_socket(parser)
    parser.add_argument("--json", action="store_true", help="a JSON object a line, sizes in bytes")
    parser.add_argument("--interval", default="1", metavar="SECONDS", help="between two looks; 1 unless given")


def run(arguments: argparse.Namespace) -> int:
    """Watch until the server goes, or Ctrl-C; the exit status."""
    interval = _interval(arguments.interval)
    feed = Feed(Client(arguments.api_socket, timeout=POLL_PATIENCE))
    feed.start()
    feed.listen()
    screen = Screen()
    if arguments.json:
        _repeat(feed, interval, lambda: _write_json(feed))
    elif screen.console is None:
        _repeat(feed, interval, lambda: _write_text(feed))
    else:
        with in_order(signal.SIGQUIT):  # so that the terminal has its cursor again
            _show(feed, interval, screen)
    return 0


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not _LEAST_INTERVAL <= seconds <= _MOST_INTERVAL:
        limit = f"has to be a number of seconds from {_LEAST_INTERVAL} to {_MOST_INTERVAL}"
        raise UsageError("--interval", text, limit, "write it like --interval 0.5")
    return seconds


def _repeat(feed: Feed, interval: float, write: Callable[[], None]) -> None:
    """Look and write, until there is no server."""
    due = time.monotonic()
    while True:
        write()
        sys.stdout.flush()
        if feed.gone:
            return
        due = max(due + feed.until_next(interval), time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        feed.poll()


def _write_json(feed: Feed) -> None:
    state = "gone" if feed.gone else "reconnecting" if feed.reconnecting else "connected"
    zones = [{**sample.zone, "requests_per_second": sample.rates} for sample in feed.samples.values()]
    events = [entry.as_dict() for entry in feed.log.taken()]
    line = {"time": round(time.time(), 3), "server": state, "zones": zones, "events": events}
    sys.stdout.write(json.dumps(line) + "\n")


def _write_text(feed: Feed) -> None:
    clock = time.strftime("%H:%M:%S")
    lines = [plain([*event_line(entry, len(entry.zone) + 2)]) for entry in feed.log.taken()]
    if feed.gone:
        lines.append(f"{clock}  the server has gone")
    elif feed.reconnecting:
        lines.append(f"{clock}  reconnecting: {feed.trouble}")
    else:
        lines += [f"{clock}  {summary(name, sample)}" for name, sample in feed.samples.items()]
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))


def _show(feed: Feed, interval: float, screen: Screen) -> None:
    """Keep the picture up to date: at each look, and when something happens."""
    from rich.console import Group  # noqa: PLC0415 - rich is there, or the screen had no console
    from rich.live import Live  # noqa: PLC0415

    from virtio_mem.picture.terminal import coloured  # noqa: PLC0415

    console = screen.console
    assert console is not None

    def picture() -> Group:
        lines = dashboard(feed, console.width, screen.glyphs)
        return Group(*map(coloured, lines))

    with cursor_shown_after(console), Live(picture(), console=console, auto_refresh=False) as live:
        due = time.monotonic() + interval
        while not feed.gone:
            if feed.news.wait(max(0.0, due - time.monotonic())):
                feed.news.clear()
                time.sleep(_LEAST_INTERVAL)  # events come in crowds
            if time.monotonic() >= due:
                feed.poll()
                due = time.monotonic() + feed.until_next(interval)
            live.update(picture(), refresh=True)
