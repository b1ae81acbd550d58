"""`virtio-mem watch`: what happens is seen, on a terminal, as text, and as JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cli.rig import TWO_ZONES, Machine, command, run
from tests.cli.terminal import Terminal
from vhost_user.units import MIB, ByteCount, HostOffset
from virtio_mem import operation
from virtio_mem.api.server import listen
from virtio_mem.cli.dashboard import event_line
from virtio_mem.cli.event_log import EventLog
from virtio_mem.cli.feed import LOOK_AGAIN, Feed
from virtio_mem.client import Client
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.picture.spans import plain
from virtio_mem.protocol import RequestType

FAST = ("--interval", "0.05")


@pytest.fixture
def watch(api: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `virtio-mem watch`, whose output is piped."""
    with ExitStack() as stack:

        def start(*options: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                command("watch", "--api-socket", api, *FAST, *options), stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout
            stack.callback(process.stdout.close)
            return process

        yield start


def line_with(process: subprocess.Popen[str], text: str) -> str:
    """The next line that has `text`."""
    assert process.stdout
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"it ended without {text!r}")


def lines_with(process: subprocess.Popen[str], *texts: str) -> None:
    """Read on until each of the texts was in a line, in whatever order."""
    missing = set(texts)
    while missing:
        line = line_with(process, "")
        missing -= {text for text in missing if text in line}


def objects_until(process: subprocess.Popen[str], wanted: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    """The next objects, up to one that is wanted."""
    assert process.stdout
    objects = []
    for line in process.stdout:
        objects.append(json.loads(line))
        if wanted(objects[-1]):
            return objects
    raise AssertionError("it ended before that")


def test_a_terminal_shows_a_resize(machine: Machine, api: str) -> None:
    with Terminal("watch", "--api-socket", api, *FAST) as terminal, machine.guest("mem0", blocks_a_second=100):
        terminal.until("64 MiB boot + ")
        machine.control.resize_zone("mem0", 192 * MIB)
        terminal.until("192 MiB requested")
        terminal.until("PLUG ACK ")
        terminal.until("reached 192 MiB in ")
        terminal.until("64 MiB boot + 128 MiB plugged   the host holds 0 B")
        terminal.until("no requests")
        assert terminal.colour_of("reached 192 MiB") == "1a9b50"
        rows = terminal.text.splitlines()
        bar = next(row for row in rows if row.startswith("mem0  ▕"))
        assert bar.count("█") == 5  # of 80 columns for 2 GiB
        assert bar.endswith("▏ 2 GiB")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 128 + signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_terminal_has_its_cursor_again(number: signal.Signals, machine: Machine, api: str) -> None:
    with Terminal("watch", "--api-socket", api, *FAST) as terminal:
        terminal.until("mem1")
        assert terminal.screen.cursor.hidden
        terminal.process.send_signal(number)
        assert terminal.end() == 128 + number
        assert not terminal.screen.cursor.hidden


def test_a_terminal_shows_what_is_wrong(machine: Machine, api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "STALL_SECONDS", 0.3)
    with Terminal("watch", "--api-socket", api, *FAST) as terminal:
        terminal.until("none yet")
        machine.control.resize_zone("mem0", 128 * MIB)
        machine.plug("mem0", 0, 29)
        machine.plug("mem0", 0)
        machine.plug("mem0", 0)
        terminal.until("PLUG answered ERROR 2 times: a block is plugged already")
        assert terminal.colour_of("PLUG answered ERROR") == "e5534b"
        machine.control.poll(0)
        while "stalled for" not in terminal.text:
            machine.control.poll(0)
            terminal.read()
        terminal.until(" s: the guest refuses 3 blocks")
        assert terminal.colour_of("stalled for") == "e5534b"


def test_what_is_held_for_unplugged_blocks_is_shown(
    machine: Machine, api: str, watch: Callable[..., subprocess.Popen[str]]
) -> None:
    memory = machine.service("mem0").memory
    assert isinstance(memory, HostMemory)
    with memory.view(HostOffset(8 * MIB), ByteCount(MIB)) as view:
        view[:] = bytes(MIB)
    assert line_with(watch(), "mem0").count("host holds 1 MiB, 1 MiB of it for unplugged blocks; no requests") == 1
    assert "  not plugged     1 MiB" in run("info", "--api-socket", api).stdout
    with Terminal("watch", "--api-socket", api, *FAST) as terminal:
        terminal.until("the host holds 1 MiB, 1 MiB of it for unplugged blocks")
        assert terminal.colour_of("of it for unplugged") == "e5534b"


def test_a_narrow_terminal(machine: Machine, api: str) -> None:
    with Terminal("watch", "--api-socket", api, *FAST, columns=40) as terminal:
        terminal.until("mem1")
        assert max(map(len, terminal.text.splitlines())) <= 40
        assert terminal.text.count("virtio-mem watch") == 1


def test_text_has_a_line_a_zone(machine: Machine, watch: Callable[..., subprocess.Popen[str]]) -> None:
    process = watch()
    assert "mem0: 0 B of 256 MiB plugged, host holds 0 B; no requests" in line_with(process, "mem0")
    assert "mem1: 0 B of 0 B plugged" in line_with(process, "mem1")
    machine.plug("mem0", 0, 4)
    lines_with(process, "mem0  plugged 8 MiB", "mem0: 8 MiB of 256 MiB plugged, host holds 0 B; PLUG ACK ")


def test_json_has_all_that_happens(machine: Machine, watch: Callable[..., subprocess.Popen[str]]) -> None:
    process = watch("--json")
    (first,) = objects_until(process, lambda _: True)
    assert first["server"] == "connected"
    assert [zone["id"] for zone in first["zones"]] == ["mem0", "mem1"]
    assert [zone["requests_per_second"] for zone in first["zones"]] == [{}, {}]
    for block in range(10):
        machine.plug("mem0", block)
    machine.plug("mem0", 0, 10, RequestType.UNPLUG)
    seen = objects_until(process, lambda each: any(event["kind"] == "unplugged" for event in each["events"]))
    events = [event for each in seen for event in each["events"]]
    assert sum(event["count"] for event in events if event["kind"] == "plugged") == 10
    assert sum(event["size"] for event in events if event["kind"] == "plugged") == 20 * MIB
    rates = [zone["requests_per_second"] for each in seen for zone in each["zones"] if zone["id"] == "mem0"]
    assert any("PLUG ACK" in rate or "UNPLUG ACK" in rate for rate in rates)


def test_a_crowd_of_events(machine: Machine, watch: Callable[..., subprocess.Popen[str]]) -> None:
    """More than anybody could read one by one, and more than the server keeps for a reader."""
    process = watch()
    line_with(process, "mem1")
    with machine.service("mem0").lock:  # nobody looks meanwhile, however long it takes
        for _ in range(1000):
            machine.plug("mem0", 0)
            machine.unplug("mem0", 0)
    machine.control.pause()
    events = 0
    while "paused" not in (line := line_with(process, "  ")):
        events += "  mem0  " in line
    assert 0 < events < 400  # of 4,000


def test_a_server_that_is_restarted(api: str, watch: Callable[..., subprocess.Popen[str]]) -> None:
    """Its socket is gone for a moment; then it counts anew."""
    with Machine(TWO_ZONES, Path(api)) as first:
        first.plug("mem0", 0, 5)
        process = watch()
        line_with(process, "mem0: 10 MiB of 256 MiB plugged")
    line_with(process, "reconnecting: ")
    with Machine(TWO_ZONES, Path(api)) as second:
        second.plug("mem0", 0, 3)
        lines_with(process, "mem0: 6 MiB of 256 MiB plugged", "mem0  plugged 6 MiB")


def test_a_worker_that_is_replaced(api: str) -> None:
    """The socket goes on listening, and belongs to somebody who does not die."""
    with listen(api) as listener, ExitStack() as stack:
        first = stack.enter_context(Machine(TWO_ZONES, listener))
        terminal = stack.enter_context(Terminal("watch", "--api-socket", api, *FAST))
        terminal.until("mem1")
        first.close()
        terminal.until("reconnecting: ")
        second = stack.enter_context(Machine(TWO_ZONES, listener))
        second.plug("mem0", 0, 3)
        terminal.until("64 MiB boot + 6 MiB plugged")
        assert "reconnecting" not in terminal.text
        assert terminal.process.poll() is None


def test_a_server_that_goes(api: str, watch: Callable[..., subprocess.Popen[str]]) -> None:
    with ExitStack() as stack:
        machine = stack.enter_context(Machine(TWO_ZONES, Path(api)))
        terminal = stack.enter_context(Terminal("watch", "--api-socket", api, *FAST))
        text, objects = watch(), watch("--json")
        terminal.until("mem1")
        line_with(text, "mem1")
        objects_until(objects, lambda _: True)
        machine.close()
        assert terminal.end() == 0
        assert "the server has gone" in terminal.text
        assert line_with(text, "the server has gone")
        assert objects_until(objects, lambda each: each["server"] == "gone")[0]["zones"]
        assert (text.wait(5), objects.wait(5)) == (0, 0)


def test_a_server_that_is_away_when_it_is_looked_for_after_a_long_while(
    api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtio_mem.cli.feed.GRACE", 0.2)
    feed = Feed(Client(api))
    with Machine(TWO_ZONES, Path(api)) as machine:
        feed.start()
        time.sleep(0.3)
    feed.poll()
    assert (feed.gone, feed.reconnecting, feed.until_next(3600)) == (False, True, LOOK_AGAIN)
    with Machine(TWO_ZONES, Path(api), before=machine):
        feed.poll()
    assert (feed.gone, feed.reconnecting, feed.until_next(3600)) == (False, False, 3600)


@pytest.mark.parametrize(
    "number", [float("inf"), float("nan"), 10**400, 1e300, -1, None, "x"], ids=lambda each: f"{each!r:.9}"
)
def test_an_event_whose_numbers_are_none(number: object) -> None:
    log = EventLog()
    for kind in ("plugged", "freed", "lost", "requested"):
        log.add(dict.fromkeys(("time", "size", "count", "held", "target"), number) | {"kind": kind, "zone": "a"})
    lines = [plain(event_line(entry)) for entry in log.last(9)]
    assert [line[10:] for line in lines] == [
        "aplugged 0 B",
        "a0 B back with the host",
        "a0 events lost: more came than are kept"
        if number is not None
        else "aevents may be lost: another process answers",
        "a0 B requested",
    ]


def test_a_zone_with_a_name_that_a_terminal_would_obey(api: str) -> None:
    with (
        Machine(TWO_ZONES.replace("mem1", '"m\x1bc"'), Path(api)),
        Terminal("watch", "--api-socket", api) as terminal,
    ):
        terminal.until("m\\x1bc")
        assert run("info", "--api-socket", api).stdout.isascii()
