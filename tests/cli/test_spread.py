"""`virtio-mem spread`: one size for several zones, and what becomes of the share of one that gets no further."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.rig import Machine, run, until
from tests.cli.terminal import Terminal
from vhost_user.errors import FieldError, TimedOut, UsageError
from vhost_user.units import MIB
from virtio_mem import operation
from virtio_mem.cli import main
from virtio_mem.client import Client, NotNow
from virtio_mem.spread import ZoneRange, spread

SPREAD = ("spread", "--api-socket")


def zone(name: str, boot: int, hotplug: int, block: int = 2) -> ZoneRange:
    """Sizes in MiB."""
    return ZoneRange(name, boot * MIB, hotplug * MIB, block * MIB)


def in_mib(total: int, *zones: ZoneRange, fixed: dict[str, int] | None = None) -> dict[str, int]:
    kept = {name: size * MIB for name, size in (fixed or {}).items()}
    return {name: size // MIB for name, size in spread(total * MIB, zones, kept).items()}


def test_zones_have_what_they_can_plug_in_proportion() -> None:
    a, b, c = zone("a", 64, 1024), zone("b", 64, 1024), zone("c", 0, 512)
    assert in_mib(128, a, b, c) == {"a": 64, "b": 64, "c": 0}
    assert in_mib(128 + 1280, a, b, c) == {"a": 64 + 512, "b": 64 + 512, "c": 256}
    assert in_mib(128 + 2560, a, b, c) == {"a": 64 + 1024, "b": 64 + 1024, "c": 512}
    assert in_mib(128 + 1280, a, b, c, fixed={"a": 66}) == {"a": 66, "b": 64 + 852, "c": 426}
    assert in_mib(64 + 512, zone("big", 64, 1024, 256), zone("small", 0, 1024)) == {"big": 64 + 256, "small": 256}


def possible(zones: list[tuple[int, int, int]]) -> set[int]:
    """Every total that zones can have."""
    totals = {0}
    for boot, room, block in zones:
        totals = {total + boot + plugged for total in totals for plugged in range(0, room + 1, block)}
    return totals


@given(
    zones=st.lists(
        st.builds(
            lambda boot, blocks, block: (boot, blocks * block, block),
            st.integers(0, 9),
            st.integers(0, 40),
            st.sampled_from([1, 2, 4, 32]),
        ),
        min_size=1,
        max_size=5,
    ),
    data=st.data(),
)
def test_all_of_it_is_dealt_out_in_whole_blocks(zones: list[tuple[int, int, int]], data: st.DataObject) -> None:
    ranges = [zone(str(number), *sizes) for number, sizes in enumerate(zones)]
    boot, hotplug = sum(each[0] for each in zones), sum(each[1] for each in zones)
    total = boot + data.draw(st.integers(0, hotplug))
    if total not in possible(zones):
        with pytest.raises(UsageError, match="can't be made of whole blocks of"):
            in_mib(total, *ranges)
        return
    sizes = in_mib(total, *ranges)
    assert sum(sizes.values()) == total
    for number, (least, room, block) in enumerate(zones):
        plugged = sizes[str(number)] - least
        assert 0 <= plugged <= room
        assert plugged % block == 0


@pytest.mark.parametrize(
    ("total", "trouble"),
    [(127, "from 128M to 2176M"), (2178, "from 128M to 2176M"), (131, "can't be made of whole blocks of 2M; round it")],
)
def test_a_size_that_the_zones_can_not_have(total: int, trouble: str) -> None:
    with pytest.raises(UsageError, match=trouble):
        in_mib(total, zone("a", 64, 1024), zone("b", 64, 1024))


@pytest.fixture
def impatient(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A resize counts as stalled after half a second, and is judged often."""
    monkeypatch.setattr(operation, "STALL_SECONDS", 0.5)
    end = threading.Event()

    def poll() -> None:
        while not end.wait(0.05):
            machine.control.poll(0)

    thread = threading.Thread(target=poll)
    thread.start()
    yield
    end.set()
    thread.join()


def plugged(machine: Machine) -> list[int]:
    return [machine.service(name).device.plugged_size // MIB for name in ("mem0", "mem1")]


def test_both_zones_follow(machine: Machine, api: str) -> None:
    with machine.guest("mem0"), machine.guest("mem1"):
        done = run(*SPREAD, api, f"{128 + 1152}M", "--wait")
    assert (done.returncode, done.stderr) == (0, "")
    assert plugged(machine) == [1024, 128]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["operation 1", "operation 2"]


@pytest.mark.usefixtures("impatient")
def test_another_zone_takes_the_share_of_one_that_stalls(machine: Machine, api: str) -> None:
    with machine.guest("mem0"):
        done = run(*SPREAD, api, f"{128 + 1152}M", "--wait", "60")
    assert (done.returncode, done.stderr) == (0, "")
    assert plugged(machine) == [1152, 0]
    assert "mem1 keeps 64 MiB: stalled for 1 s: the guest asks for nothing" in done.stdout.replace("0 s", "1 s")
    assert [machine.service(name).device.requested_size // MIB for name in ("mem0", "mem1")] == [1152, 0]


@pytest.mark.long
@pytest.mark.usefixtures("impatient")
def test_progress_on_a_terminal(machine: Machine, api: str) -> None:
    with (
        Terminal(*SPREAD, api, f"{128 + 256}M", "--wait", "60") as terminal,
        machine.guest("mem0", blocks_a_second=40),
    ):
        terminal.until(" MiB of 384 MiB, ")
        terminal.until("0 of 2 zones there")
        assert terminal.end() == 0
        kept, *over = (line for line in terminal.text.splitlines() if line)
        assert kept.startswith("mem1 keeps 64 MiB: stalled for ")
        assert [line[:28] for line in over] == ["operation 3: mem0 to 320 MiB", "operation 4: mem1 to 64 MiB:"]


@pytest.mark.usefixtures("impatient")
def test_nobody_gets_on(machine: Machine, api: str) -> None:
    done = run(*SPREAD, api, "2432M", "--wait")
    assert done.returncode == 3
    assert done.stdout.count("the guest asks for nothing") == 2
    assert "keeps" not in done.stdout, "neither has room for the other's share"


@pytest.mark.usefixtures("impatient")
def test_the_others_take_of_the_share_what_they_can(machine: Machine, api: str) -> None:
    with machine.guest("mem1"):
        done = run(*SPREAD, api, "2304M", "--wait", "60")
    assert done.returncode == 3
    assert "mem0 stays behind with 64 MiB: stalled for " in done.stdout
    assert plugged(machine) == [0, 256]
    assert machine.service("mem0").device.requested_size == (2304 - 64 - 64 - 256) * MIB, (
        "and so all of it is asked for"
    )


@pytest.mark.usefixtures("impatient")
def test_the_others_give_of_the_share_what_they_can(machine: Machine, api: str) -> None:
    machine.control.resize_zone("mem0", 1088 * MIB)
    with machine.guest("mem0"):
        until(lambda: plugged(machine)[0] == 1024)
    machine.control.resize_zone("mem1", 192 * MIB)
    with machine.guest("mem1"):
        until(lambda: plugged(machine)[1] == 128)
        done = run(*SPREAD, api, "704M", "--wait", "60")
    assert done.returncode == 3
    assert plugged(machine) == [1024, 0]
    assert machine.service("mem0").device.requested_size == 576 * MIB


@pytest.mark.parametrize("trouble", [TimedOut, NotNow])
@pytest.mark.usefixtures("impatient")
def test_a_server_that_has_something_else_to_do(
    machine: Machine, api: str, trouble: type[FieldError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent while it gives memory back, or being replaced when another zone is to have a share."""
    asked: list[str] = []

    def resize_zone(client: Client, zone: str, size: int) -> int:
        asked.append(zone)
        if len(asked) == (1 if trouble is TimedOut else 3):
            raise trouble("vm.resize-zone", api, "no answer", "try again")
        return really(client, zone, size)

    really = Client.resize_zone
    monkeypatch.setattr(Client, "resize_zone", resize_zone)
    with machine.guest("mem0"):
        assert main([*SPREAD, api, f"{128 + 1152}M", "--wait", "60"]) == 0
    assert plugged(machine) == [1152, 0]


def test_a_machine_of_boot_memory_alone(api: str) -> None:
    with Machine("--memory size=64M,shared=on", Path(api)):
        for words in (["0", "--wait"], ["64M"], ["64M", "--zone", "mem0"]):
            done = run(*SPREAD, api, *words)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.startswith("virtio-mem spread: zones=none: has to be one that can be resized")


def test_without_waiting_the_sizes_are_taken(machine: Machine, api: str) -> None:
    assert run(*SPREAD, api, "192M", "--zone", "mem1").returncode == 0
    assert machine.service("mem1").device.requested_size == 128 * MIB
    assert machine.control.operations.last("mem0") is None


def test_somebody_asks_for_another_size(machine: Machine, api: str, capsys: pytest.CaptureFixture[str]) -> None:
    def meanwhile() -> None:
        while machine.control.operations.last("mem1") is None:
            end.wait(0.01)
        machine.control.resize_zone("mem1", 64 * MIB)

    end = threading.Event()
    thread = threading.Thread(target=meanwhile)
    thread.start()
    assert main([*SPREAD, api, "1280M", "--wait"]) == 5
    thread.join()
    assert "mem1 to 192 MiB: superseded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "trouble"),
    [
        (["9T"], "SIZE=9T: has to be from 128M to 2432M; ask for what the zones can have"),
        (["1G", "--zone", "mem9"], "--zone=mem9: has to be one of mem0, mem1; name a zone that can be resized"),
        (["1G", "--wait", "soon"], "--wait=soon: has to be a number of seconds"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_what_can_not_be_is_one_line(words: list[str], trouble: str, api: str) -> None:
    done = run(*SPREAD, api, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"virtio-mem spread: {trouble}")
