"""`virtio-mem map`: the blocks that the API has, as a picture."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.api.rig import Client as Asked
from tests.cli.rig import Machine, run
from tests.cli.terminal import Terminal
from tests.device.helpers import make_device
from tests.device.test_service import Script, ScriptedMemory
from vhost_user.units import MIB
from virtio_mem.api.server import ApiServer
from virtio_mem.blocks import BlockMap
from virtio_mem.control import Control, ControlledZone
from virtio_mem.service import DeviceService

MAP = ("map", "--api-socket")

PICTURE = """\
mem0  2 GiB at 0x100000000, 1,024 blocks of 2 MiB
176 MiB plugged in 2 runs; a cell is a block
+0 B       [################################################################]
+128 MiB   [.......########################.................................]
                                                          requested 256 MiB ^
+256 MiB   [................................................................]
+384 MiB   [................................................................]
                                                             usable 512 MiB |
+512 MiB   [                           not usable                           ]

mem1  256 MiB at 0x180000000, 128 blocks of 2 MiB
0 B plugged; a cell is a block
+0 B       [                           not usable                           ]
            ^ requested 0 B
            | usable 0 B

# plugged  1-9 tenths plugged  . unplugged  ^ requested  | usable up to here
"""


@pytest.fixture
def plugged(machine: Machine) -> Machine:
    machine.plug("mem0", 0, 64)
    machine.plug("mem0", 71, 24)
    return machine


def without_it(directory: Path) -> dict[str, str]:
    """An environment in which modules in `directory` come before those that are installed."""
    return {"PYTHONPATH": f"{directory}:{os.environ.get('PYTHONPATH', '')}", "PYTHONSAFEPATH": "1"}


def test_plain_letters(plugged: Machine, api: str) -> None:
    done = run(*MAP, api, "--width", "80")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == PICTURE


def test_one_zone_and_a_width(plugged: Machine, api: str) -> None:
    done = run(*MAP, api, "--zone", "mem0", "--width", "30")
    assert done.stdout.splitlines()[:4] == [
        "mem0  2 GiB at 0x100000000, 1,024 blocks of 2 MiB",
        "176 MiB plugged in 2 runs; a cell is 4 blocks",
        "+0 B       [################]",
        "+128 MiB   [.2#####7........]",
    ]
    assert "mem1" not in done.stdout


def test_a_zone_that_is_not_there(machine: Machine, api: str) -> None:
    done = run(*MAP, api, "--zone", "mem/0 ")
    assert (done.returncode, done.stdout) == (2, "")
    assert "id=mem/0 : has to be one of mem0, mem1" in done.stderr


def test_a_terminal_has_colours(plugged: Machine, api: str) -> None:
    with Terminal(*MAP, api, columns=80) as terminal:
        assert terminal.end() == 0
        assert terminal.text.splitlines()[2] == "+0 B       ▕" + "█" * 64 + "▏"
        colours = [terminal.colour_of(glyph) for glyph in "█▒·▲┊"]
        assert len(set(colours)) == 5
        assert "default" not in colours


def test_a_terminal_whose_encoding_lacks_the_letters(plugged: Machine, api: str) -> None:
    with Terminal(*MAP, api, columns=80, environment={"PYTHONIOENCODING": "ascii"}) as terminal:
        assert terminal.end() == 0
        assert terminal.text.splitlines()[2] == "+0 B       [" + "#" * 64 + "]"


def test_a_terminal_without_rich(plugged: Machine, api: str, tmp_path: Path) -> None:
    """Where the extra is not installed: a module of that name that can't be imported stands in its way."""
    (tmp_path / "rich.py").write_text("raise ImportError('not here')\n")
    with Terminal(*MAP, api, columns=80, environment=without_it(tmp_path)) as terminal:
        assert terminal.end() == 0
        assert terminal.text.splitlines()[2] == "+0 B       [" + "#" * 64 + "]"


@pytest.mark.parametrize(("name", "error"), [("none/map.svg", "none is no directory"), (".svg", ".svg or .png")])
def test_a_file_that_cannot_be(machine: Machine, api: str, tmp_path: Path, name: str, error: str) -> None:
    done = run(*MAP, api, "--output", str(tmp_path / name))
    assert (done.returncode, done.stdout) == (2, "")
    assert error in done.stderr


def test_a_picture_in_a_file_needs_the_extra(machine: Machine, api: str, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('No module named matplotlib')\n")
    environment = os.environ | without_it(tmp_path)
    done = run(*MAP, api, "--output", str(tmp_path / "map.svg"), env=environment)
    assert done.returncode == 2
    assert "pip install matplotlib" in done.stderr


@pytest.mark.parametrize("nb_blocks", [8, 8 << 20])
def test_every_scale(nb_blocks: int, api: str, figure: Callable[[str, object], None]) -> None:
    """A device without memory, since no host has 8 TiB; every second block is plugged. The answer is short."""
    device = make_device(region=nb_blocks * MIB, requested=nb_blocks * MIB, block=MIB)
    device.blocks = BlockMap(nb_blocks, memoryview(bytearray(b"\x55" * (nb_blocks // 8))))
    service = DeviceService(device, ScriptedMemory(Script()))
    with Control([ControlledZone(id="big", service=service)]) as control, ApiServer(control, api):
        before = time.monotonic()
        done = run(*MAP, api, "--width", "80")
        figure(f"seconds to map {nb_blocks:,} blocks", round(time.monotonic() - before, 2))
        assert len(Asked(api).get("/api/v1/zones/big/blocks?cells=1024").body) < 1024 * 8
    assert done.returncode == 0
    rows = [line for line in done.stdout.splitlines() if line.startswith("+")]
    assert len(rows) == (1 if nb_blocks == 8 else 16)
    assert ("[" + "5" * 64 + "]" in rows[-1]) == (nb_blocks > 8)
