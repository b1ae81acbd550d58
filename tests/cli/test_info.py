"""`virtio-mem info`: the table says what the API says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.rig import ONE_ZONE, TWO_ZONES, Machine, run
from tests.cli.terminal import Terminal
from vhost_user.units import MIB
from virtio_mem.cli.info import table
from virtio_mem.picture import plain
from virtio_mem.protocol import ResponseType


def test_the_table(machine: Machine, api: str) -> None:
    machine.plug("mem0", 0, 5)
    machine.unplug("mem0", 4)
    assert machine.plug("mem1", 3) is ResponseType.ERROR
    machine.control.resize_zone("mem0", 64 * MIB)
    machine.control.pause()
    done = run("info", "--api-socket", api)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert re.fullmatch(r"last resize +64 MiB: running for \d s, 72 MiB now +none", last)
    rows = {line[:18].strip(): line[18:].split("  ") for line in lines}
    assert {title: [cell.strip() for cell in cells if cell.strip()] for title, cells in rows.items()} == {
        "zone": ["mem0", "mem1"],
        "boot memory": ["64 MiB", "64 MiB"],
        "guest node": ["0", "1"],
        "plugged": ["8 MiB", "0 B"],
        "requested": ["0 B", "0 B"],
        "usable": ["512 MiB", "0 B"],
        "region": ["2 GiB", "256 MiB"],
        "at address": ["0x100000000", "0x180000000"],
        "block size": ["2 MiB", "2 MiB"],
        "held by the host": ["0 B", "0 B"],
        "not plugged": ["0 B", "0 B"],
        "unplugged so far": ["2 MiB", "0 B"],
        "not given back": ["0 B", "0 B"],
        "not asked for": ["2 MiB", "0 B"],
        "requests refused": ["none", "PLUG ERROR 1"],
        "front end": ["connected", "connected"],
        "serving": ["paused", "paused"],
    }


def test_json_is_what_the_api_says(machine: Machine, api: str) -> None:
    done = run("info", "--api-socket", api, "--json")
    assert json.loads(done.stdout) == machine.control.info()


def test_a_zone_without_a_device_has_none_of_it(api: str) -> None:
    options = (
        "--memory size=0,hotplug_method=virtio-mem "
        "--memory-zone id=plain,size=64M,shared=on "
        "--memory-zone id=hot,size=64M,shared=on,hotplug_size=128M"
    )
    with Machine(options, Path(api)):
        lines = run("info", "--api-socket", api).stdout.splitlines()
        assert [line.split()[1:] for line in lines[:1]] == [["plain", "hot"]]
        assert lines[3].split() == ["plugged", "-", "0", "B"]
        assert run("map", "--api-socket", api).stdout.startswith("hot  128 MiB")


def test_a_terminal_shows_it_in_colours(machine: Machine, api: str) -> None:
    with Terminal("info", "--api-socket", api) as terminal:
        assert terminal.end() == 0
        assert terminal.colour_of("held by the host") == "818b98"
        assert terminal.screen.buffer[0][18].bold


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_that_wants_no_colours(machine: Machine, api: str, environment: dict[str, str]) -> None:
    with Terminal("info", "--api-socket", api, environment=environment) as terminal:
        assert terminal.end() == 0
        assert terminal.colour_of("held by the host") == "default"


def test_columns_that_do_not_fit_follow_below() -> None:
    columns = [[f"zone{number}", "1"] for number in range(3)]
    lines = [plain(line) for line in table(["zone", "size"], columns, 20)]
    assert lines == ["zone  zone0  zone1", "size  1      1", "", "zone  zone2", "size  1"]


def test_an_output_without_our_letters(api: str) -> None:
    """A zone may have any name; what an encoding lacks is written as an escape."""
    with Machine(TWO_ZONES.replace("mem1", '"mém\x1b1"'), Path(api)):
        done = run("info", "--api-socket", api, env={"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0
        assert done.stdout.splitlines()[0].split() == ["zone", "mem0", "m\\xe9m\\x1b1"]


def test_one_zone_alone(api: str) -> None:
    with Machine(ONE_ZONE, Path(api)):
        assert run("info", "--api-socket", api).stdout.startswith("zone              mem0\n")
