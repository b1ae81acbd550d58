"""What the benchmarks rest on: pairs in turn, rows that say met or missed, and limits that do what they say."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks.floor import Floor
from tests.benchmarks.fragmented import fragmented, random_bits, system_reset, timed, unplug_all
from tests.benchmarks.fragmented import rows as fragmented_rows
from tests.benchmarks.measure import (
    SETTLE_SECONDS,
    in_turn,
    limit_row,
    plain_row,
    quantile,
    ratio_row,
    settle,
    speed_row,
    table,
)
from tests.benchmarks.ours import ADDR, BLOCK_SIZE, OurDevice, block_requests, our_device, our_vmm
from tests.benchmarks.page import PAGE, figures, filled, markdown
from tests.benchmarks.processors import on_processor
from tests.benchmarks.qemu import qemu_device
from tests.benchmarks.requests import OneRequestRing, costs
from vhost_user.units import GIB, ByteCount, GuestAddress, HostOffset
from virtio_mem.blocks import BlockMap
from virtio_mem.hostmem.files import data_size
from virtio_mem.protocol import CONFIG_SIZE, ConfigSpace, Request, RequestType


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Floor:
    return Floor(tmp_path_factory.mktemp("floor"))


@pytest.fixture
def device() -> Iterator[OurDevice]:
    with our_device() as made:
        yield made


def plugged_size(device: OurDevice) -> int:
    return ConfigSpace.decode(device.vmm.frontend.get_config(0, CONFIG_SIZE)).plugged_size


def test_who_goes_first_alternates() -> None:
    order: list[str] = []

    def ours() -> int:
        order.append("ours")
        return 1

    def theirs() -> int:
        order.append("theirs")
        return 2

    assert in_turn(3, ours, theirs) == [(1, 2)] * 3
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    order.clear()
    assert in_turn(1, ours, theirs, first=1) == [(1, 2)]
    assert order == ["theirs", "ours"]


def test_a_ratio_is_the_median_of_the_pairs_and_not_of_the_medians() -> None:
    row = ratio_row("it", "them", "us", [(1, 1), (6, 2), (10, 10)], most=1)
    assert (row.ratio, row.ours, row.theirs, row.met) == (1, 6, 2, True)


def test_few_pairs_have_no_quartiles() -> None:
    """But ends, which are called so; and one alone has none of either."""
    ratios = [(1.0, 1.0), (2.0, 1.0), (9.0, 1.0), (4.0, 1.0)]
    found = [ratio_row("it", "them", "us", ratios[:count], 1) for count in (1, 2, 3, 4)]
    assert [row.spread for row in found] == ["", "all 1.00 to 2.00", "all 1.00 to 9.00", "1.75 to 5.25"]
    assert (found[2].low, found[2].high) == (1, 9)
    limits = [limit_row("it", "ms", [ours for ours, _ in ratios[:count]], 1) for count in (1, 3, 4)]
    assert [row.against for row in limits] == ["", "all 1 to 9", "1.75 to 5.25"]
    for text in (table(found), markdown(found)):
        assert "all 1.00 to 9.00" in text
        assert "all 1.75" not in text


@pytest.mark.parametrize(("value", "within", "enough"), [(9, True, False), (10, True, True), (11, False, True)])
def test_a_goal_is_met_or_missed(value: float, within: bool, enough: bool) -> None:
    rows = [
        ratio_row("time", "them", "us", [(value, 10)], most=1),
        speed_row("speed", "them", "GiB/s", [(value, 10)], least=1),
    ]
    assert [row.met for row in rows] == [within, enough]
    time, speed = table(rows).splitlines()[1:]
    assert time.endswith("at most 1 x   " + ("met" if within else "MISSED"))
    assert speed.endswith("at least 1 x  " + ("met" if enough else "MISSED"))


def test_without_a_goal_nothing_is_met_or_missed() -> None:
    row = plain_row("time", "them", "us", [(2, 1)])
    assert (row.ratio, row.met) == (2, None)
    assert table([row]).splitlines()[1].endswith("none")


def test_a_quantile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(100, -1, -1)]
    assert [quantile(values, part) for part in (0.0, 0.5, 0.99, 1.0)] == [0, 50, 99, 100]


def test_the_echo_answers_every_signal(floor: Floor) -> None:
    with floor.echo() as echo:
        assert len(floor.trips(echo.kick, echo.call, 50)) == 50
        os.eventfd_write(echo.kick, 1)
        assert os.eventfd_read(echo.call) == 1  # no answer is left over


def test_what_is_populated_and_what_is_punched(floor: Floor) -> None:
    fd = os.memfd_create("populated", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 4 * BLOCK_SIZE)
        whole = ByteCount(4 * BLOCK_SIZE)
        assert floor.kicked("populate", fd, BLOCK_SIZE, 3, min(os.sched_getaffinity(0))) > 0
        assert data_size(fd, HostOffset(0), whole) == 3 * BLOCK_SIZE
        assert floor.punch(fd, BLOCK_SIZE, 2) > 0
        assert data_size(fd, HostOffset(0), whole) == BLOCK_SIZE
    finally:
        os.close(fd)


@pytest.mark.parametrize(("what", "held"), [("populate", 3), ("punch", 0)])
def test_what_is_timed_of_a_process_that_is_kicked_is_done(floor: Floor, what: str, held: int) -> None:
    fd = os.memfd_create("kicked", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 3 * BLOCK_SIZE)
        os.pwrite(fd, b"x", 0)
        assert floor.kicked(what, fd, BLOCK_SIZE, 3, min(os.sched_getaffinity(0))) > 0
        assert data_size(fd, HostOffset(0), ByteCount(3 * BLOCK_SIZE)) == held * BLOCK_SIZE
    finally:
        os.close(fd)


def test_a_kicked_process_that_fails_is_an_error(floor: Floor, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(subprocess.CalledProcessError):
        floor.kicked("populate", file.fileno(), BLOCK_SIZE, 1, min(os.sched_getaffinity(0)))


def test_a_processor_is_had_for_a_while_only() -> None:
    before = os.sched_getaffinity(0)
    with on_processor(max(before)):
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before


def test_what_is_timed_begins_so_long_after_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def clock() -> float:
        asked.append(9.0 + SETTLE_SECONDS * len(asked) / 2)
        return asked[-1]

    monkeypatch.setattr("tests.benchmarks.measure.time.perf_counter", clock)
    settle(9.0)
    assert asked[-1] == 9.0 + SETTLE_SECONDS
    asked.clear()
    settle(8.0)
    assert len(asked) == 1, "it was long ago"


def test_a_device_has_slept_since_it_answered_last(device: OurDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    monkeypatch.setattr("tests.benchmarks.ours.settle", found.append)
    times = [time.perf_counter()]
    for _ in range(3):
        device.rouse()
        times.append(time.perf_counter())
    assert times[0] < found[1] < times[1] < found[2] < times[2]


def test_requests_are_timed_that_the_device_grants(device: OurDevice) -> None:
    assert device.kick(block_requests(RequestType.PLUG, 60)) > 0
    assert plugged_size(device) == 60 * BLOCK_SIZE
    device.vmm.populate(60)
    assert data_size(device.vmm.fd, HostOffset(0), ByteCount(60 * BLOCK_SIZE)) == 60 * BLOCK_SIZE
    assert device.kick(block_requests(RequestType.UNPLUG, 60)) > 0
    assert (plugged_size(device), os.fstat(device.vmm.fd).st_blocks) == (0, 0)
    assert all(isinstance(seconds, float) for seconds in costs(device, 1))


def test_requests_are_not_timed_that_the_device_refuses(device: OurDevice) -> None:
    device.kick(block_requests(RequestType.PLUG, 1))
    with pytest.raises(AssertionError, match="ERROR"):
        device.kick(block_requests(RequestType.PLUG, 2))
    with pytest.raises(AssertionError, match="ERROR"):
        device.kick([Request(RequestType.UNPLUG, GuestAddress(ADDR + 1), 1)])


def test_one_request_is_asked_again_and_again(floor: Floor) -> None:
    """More often than the ring has entries, and by one process after the other."""
    with our_vmm() as vmm:
        ring = OneRequestRing(vmm, floor)
        for waits in (ring.state_waits(100), ring.plug_waits(50), ring.state_waits(100)):
            assert 0 < waits.p50 <= waits.p99


def test_requests_go_round_a_packed_ring() -> None:
    with our_device(packed=True) as device:
        for _ in range(2):
            for type_ in (RequestType.PLUG, RequestType.STATE, RequestType.UNPLUG):
                assert device.kick(block_requests(type_, 50)) > 0
        assert plugged_size(device) == 0


@pytest.mark.needs_peers
def test_qemu_is_asked_the_same() -> None:
    with qemu_device() as device:
        assert device.kick(block_requests(RequestType.PLUG, 60, device.addr)) > 0
        assert device.config().plugged_size == 60 * BLOCK_SIZE
        assert device.kick(block_requests(RequestType.UNPLUG, 60, device.addr)) > 0
        assert device.config().plugged_size == 0


def test_what_random_bits_are() -> None:
    found = {part: int.from_bytes(random_bits(80_003, part), "little") for part in (0.0, 0.125, 0.5, 0.75, 1.0)}
    assert all(bits < 1 << 80_003 for bits in found.values())
    assert {part: round(bits.bit_count() / 80_003, 1) for part, bits in found.items()} == {
        0.0: 0,
        0.125: 0.1,
        0.5: 0.5,
        0.75: 0.8,
        1.0: 1,
    }


def test_a_walk_in_c_finds_the_runs(floor: Floor) -> None:
    bits = random_bits(10_000, 0.5)
    blocks = BlockMap(10_000, memoryview(bytearray(bits)))
    _, runs = floor.walk(bits)
    assert runs == len(list(blocks.plugged_runs())) > 1_000


def test_a_file_goes_to_another_process_and_back(floor: Floor) -> None:
    fd = os.memfd_create("slot", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, BLOCK_SIZE)
        for look in (0, 100_000):
            rounds = floor.slots(fd, BLOCK_SIZE, 20, max(os.sched_getaffinity(0)), look)
            assert len(rounds) == 20
            assert min(rounds) > 0
    finally:
        os.close(fd)


def test_all_is_given_back_of_a_region_in_pieces() -> None:
    """Whatever of its pages are there; and the next device finds the same blocks."""
    with fragmented(GIB, BLOCK_SIZE) as region:
        for act in (unplug_all, system_reset):
            assert timed(region, act, 100) > 0


def test_there_is_a_row_for_each_thing_that_is_done_to_a_region_in_pieces() -> None:
    goals = [row.goal for row in fragmented_rows(quick=True, region_size=GIB, pages=64)]
    assert goals == ["at most 1.2 x", "at most 1.2 x", "none", "at most 3 x", "none", "none"]


def test_the_page_has_the_figures_that_were_measured() -> None:
    assert PAGE.read_text() == filled(PAGE.read_text(), figures())


def test_a_page_without_a_place_for_its_figures_is_an_error() -> None:
    assert filled("a\n<!-- b -->\nold\n<!-- end of b -->\nc", {"b": "new"}) == (
        "a\n<!-- b -->\n\nnew\n\n<!-- end of b -->\nc"
    )
    with pytest.raises(ValueError, match="no place for b"):
        filled("a\n<!-- b -->\n", {"b": "new"})
