"""What becomes of a resize: each state, how it is left, and what survives the process."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.api.rig import MakeMachine, Rig
from vhost_user.units import MIB
from virtio_mem.operation import STALL_SECONDS, Operation, State, ZoneView
from virtio_mem.operations import MAX_OPERATIONS, Operations

BLOCK = 2 * MIB
BOOT = 64 * MIB
T0 = 1000.0
RUNNING, REACHED, SUPERSEDED, STALLED, REFUSED = State


def total(blocks: int) -> int:
    return BOOT + blocks * BLOCK


class Zone:
    """A zone's operations, with a clock that the test moves."""

    def __init__(self, plugged: int = 0, target: int = 10) -> None:
        self.operations = Operations()
        self.plugged = plugged
        self.now = T0
        self.operation = self.start(target)

    def start(self, target: int) -> Operation:
        self.target = target
        return self.operations.start("z", total(target), total(self.plugged), BLOCK, self.now)[0]

    def move(self, plugged: int, seconds: float = 1.0) -> None:
        self.now += seconds
        self.plugged = plugged
        self.operations.moved("z", total(plugged), self.now)

    def settle(self, seconds: float = STALL_SECONDS, **view: Any) -> dict[str, Any]:
        self.now += seconds
        seen = {"plugged": total(self.plugged), "target": total(self.target), "connected": True, "paused": False}
        self.operations.settle("z", ZoneView(**(seen | view)), self.now)
        return self.operation.as_dict(self.now)


def test_running_until_nothing_moves() -> None:
    zone = Zone()
    assert zone.settle(STALL_SECONDS - 0.1)["state"] == "running"
    zone.move(3)
    assert zone.settle(STALL_SECONDS - 0.1)["state"] == "running"
    assert zone.settle(0.2)["verdict"] == "stalled for 10 s: the guest refuses 7 blocks"
    assert zone.settle(2)["verdict"] == "stalled for 12 s: the guest refuses 7 blocks"


def test_one_block_is_one() -> None:
    zone = Zone()
    zone.move(9)
    assert zone.settle()["reason"] == "the guest refuses 1 block"


@pytest.mark.parametrize("target", [0, 10])
def test_what_is_stalled_runs_again_and_is_reached(target: int) -> None:
    zone = Zone(plugged=5, target=target)
    zone.settle()
    assert zone.operation.state is STALLED
    zone.move(4 if target < 5 else 6)
    assert zone.operation.state is RUNNING
    zone.move(target)
    reached = zone.operation.as_dict(zone.now + 100)
    assert (reached["state"], reached["seconds"], reached["stalled_for"]) == ("reached", STALL_SECONDS + 2, None)
    assert reached["rate"] == 5 * BLOCK // 12
    zone.move(3)
    assert zone.operation.state is REACHED, "what the guest does afterwards is another matter"


@pytest.mark.parametrize(
    ("view", "answers", "state", "reason"),
    [
        ({}, [], STALLED, "the guest asks for nothing: is its driver loaded?"),
        ({}, [{}], STALLED, "the guest refuses 10 blocks"),
        ({}, [{"error": "bad"}], STALLED, "the guest refuses 10 blocks; its last request was an error: bad"),
        ({}, [{"busy": "no huge pages"}], REFUSED, "the host refuses: no huge pages"),
        ({}, [{"busy": "no huge pages"}, {}], REFUSED, "the host refuses: no huge pages"),
        (
            {},
            [{"busy": "x"}, {"error": "bad"}],
            STALLED,
            "the guest refuses 10 blocks; its last request was an error: bad",
        ),
        ({"paused": True}, [{"busy": "x"}], REFUSED, "the device is paused"),
        ({"connected": False}, [], STALLED, "no guest is connected"),
        ({"target": total(3)}, [], SUPERSEDED, "by a resize to 70 MiB, elsewhere"),
    ],
)
def test_the_reason_is_the_last_thing_that_was_seen(
    view: dict[str, Any], answers: list[dict[str, str]], state: State, reason: str
) -> None:
    zone = Zone()
    for answer in answers:
        zone.operations.answered("z", **answer)
    seen = zone.settle(**view)
    assert (seen["state"], seen["reason"]) == (state, reason)


def test_a_block_that_moves_makes_refusals_forgotten() -> None:
    zone = Zone()
    zone.operations.answered("z", busy="no huge pages")
    zone.move(1)
    assert zone.settle()["reason"] == "the guest refuses 9 blocks"


def test_a_guest_that_gives_back_what_it_plugged_comes_no_nearer() -> None:
    """Linux without memory for the page structures of 128 MiB more: it tries again by a timer, for ever."""
    zone = Zone()
    zone.move(3)
    for _ in range(3):
        zone.move(4)
        zone.move(3)
    why = "has it memory left to manage more? Linux needs a 64th of what is plugged"
    expected = f"the guest plugs blocks and gives them back, 7 are missing: {why}"
    stalled = zone.settle()
    assert (stalled["state"], stalled["reason"]) == ("stalled", expected)
    for _ in range(3):
        zone.move(4, 50)
        assert zone.operation.state is STALLED
        zone.move(3)
        assert zone.settle(1)["reason"] == expected
    zone.operations.answered("z", error="a block is plugged already")
    assert (
        zone.settle(1)["reason"]
        == "the guest refuses 7 blocks; its last request was an error: a block is plugged already"
    )
    zone.move(5)
    assert zone.operation.state is RUNNING
    assert zone.settle()["reason"] == "the guest refuses 5 blocks"


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_a_guest_that_begins_anew_runs(seen: bool) -> None:
    zone = Zone()
    zone.move(8)
    if seen:
        zone.operations.moved("z", total(0), zone.now + 1, anew=True)
    zone.plugged = 0
    zone.settle(1)
    for plugged in (1, 2, 3):
        zone.move(plugged, STALL_SECONDS - 1)
        assert zone.settle(0)["state"] == "running"


def test_asking_again_renews_the_patience() -> None:
    zone = Zone()
    zone.settle()
    assert zone.start(10) is zone.operation
    assert zone.operation.state is RUNNING
    assert zone.settle(STALL_SECONDS - 0.1)["state"] == "running"


def test_blocks_that_went_unseen_are_seen_by_the_judge() -> None:
    zone = Zone()
    zone.now += STALL_SECONDS
    zone.plugged = 4
    assert zone.settle(0)["state"] == "running"
    zone.plugged = 10
    assert zone.settle(0)["state"] == "reached"


def test_the_rate_is_of_the_last_seconds() -> None:
    zone = Zone(target=1000)
    for step in range(1, 101):
        zone.move(step, 0.1)
    assert zone.operation.as_dict(zone.now)["rate"] == pytest.approx(10 * BLOCK, rel=0.05)
    assert zone.operation.as_dict(zone.now + 60)["rate"] == 0
    assert len(zone.operation.samples) <= 64


def test_only_so_many_are_remembered_and_the_last_of_each_zone_always() -> None:
    operations = Operations()
    operations.start("quiet", total(1), total(0), BLOCK, T0)
    for number in range(5 * MAX_OPERATIONS):
        operations.start("busy", total(number % 7), total(0), BLOCK, T0)
    remembered = operations.all()
    assert len(remembered) == MAX_OPERATIONS
    assert remembered[0]["zone"] == "quiet"
    last = operations.last("busy")
    assert last is not None
    assert (
        last["id"]
        == remembered[-1]["id"]
        == 5 * MAX_OPERATIONS + 1 - sum(1 for number in range(5 * MAX_OPERATIONS - 1) if number % 7 == (number + 1) % 7)
    )
    assert operations.get(2) is None


def test_what_is_saved_goes_on() -> None:
    zone = Zone()
    zone.operations.answered("z", busy="no huge pages")
    zone.operations.start("y", total(1), total(1), BLOCK, time.monotonic())
    assert zone.operations.changed
    saved = json.loads(json.dumps(zone.operations.dump()))
    assert not zone.operations.changed
    zone.operations = Operations.load(saved)
    assert [operation["state"] for operation in zone.operations.all()] == ["running", "reached"]
    zone.operations.settle("z", ZoneView(total(0), total(10), True, False), T0 + STALL_SECONDS)
    again = zone.operations.last("z")
    assert again is not None
    assert (again["id"], again["state"], again["reason"]) == (1, "refused", "the host refuses: no huge pages")
    assert zone.operations.start("z", total(2), total(0), BLOCK, T0)[0].id == 3, "no number is given twice"


def test_more_zones_than_operations_are_remembered_keep_theirs() -> None:
    operations = Operations()
    for number in range(2 * MAX_OPERATIONS):
        operations.start(f"zone {number}", total(1), total(0), BLOCK, time.monotonic())
    after = Operations.load(json.loads(json.dumps(operations.dump())))
    assert [operation["id"] for operation in after.all()] == [operation["id"] for operation in operations.all()]


@given(st.data())
def test_what_is_saved_is_parsed_and_trusted_in_nothing(data: st.DataObject) -> None:
    zone = Zone()
    saved: Any = json.loads(json.dumps(zone.operations.dump()))
    target = data.draw(st.sampled_from([saved, saved["operations"][0]]))
    key = data.draw(st.sampled_from(sorted(target)))
    target[key] = data.draw(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none()) | st.just({})
    )
    try:
        loaded = Operations.load(saved)
    except (ValueError, TypeError, KeyError, OverflowError):
        return
    json.dumps(loaded.all(), allow_nan=False)
    loaded.settle("z", ZoneView(total(0), total(10), True, False), time.monotonic())
    assert loaded.start("z", total(1), total(0), BLOCK, time.monotonic())[0].id not in [
        operation.get("id") for operation in saved["operations"]
    ]


def test_waiting_ends_when_the_one_who_waits_gives_up() -> None:
    operations = Operations()
    operation, _ = operations.start("z", total(1), total(0), BLOCK, time.monotonic())
    given_up = threading.Event()

    def give_up() -> None:
        given_up.set()
        operations.wake()

    timer = threading.Timer(0.05, give_up)
    timer.start()
    start = time.monotonic()
    found = operations.wait(operation.id, 60, lambda: None, given_up.is_set)
    assert time.monotonic() - start < 30
    assert found is not None
    assert found["state"] == "running"
    assert operations.wait(99, 60, lambda: None, lambda: False) is None
    timer.join()


def test_who_waits_for_one_zone_does_not_wait_for_another(zones: Rig) -> None:
    number = zones.resize(BOOT + BLOCK, "a")
    found: list[dict[str, Any] | None] = []
    waiting = threading.Thread(target=lambda: found.append(zones.control.wait(number, 0.01)))
    with zones.service("b").lock:  # as while it gives back gigabytes
        waiting.start()
        waiting.join(10)
        assert [each and each["state"] for each in found] == ["running"]
    waiting.join()


@pytest.mark.parametrize(
    "saved",
    [
        b"",
        b"x",
        b"[]",
        b"1",
        b"{}",
        b'{"operations": {}, "paused": 0}',
        b'{"operations": 1, "paused": 0}',
        b"[" * 99999,
    ],
)
def test_a_control_that_cannot_read_what_was_saved_begins_anew(
    rig: Rig, saved: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    rig.resize(BOOT)
    rig.control.load(saved)
    assert "they begin anew" in caplog.text
    assert rig.operation(1)["state"] == "reached"


def test_a_control_goes_on_where_another_one_was(make_machine: MakeMachine) -> None:
    saved: list[bytes] = []
    before = make_machine(save=saved.append)
    before.resize(BOOT)
    before.control.pause()
    assert saved[-1] == before.control.dump()
    after = make_machine(connected=lambda: False)
    after.control.load(saved[-1])
    assert after.control.paused
    assert after.operation(1)["target"] == BOOT
    for _ in range(2):
        after.control.poll(time.monotonic())
    with after.control.events.subscribe(after=0) as subscription:
        kinds = [event.kind for event in iter(lambda: subscription.get(0), None)]
    assert "disconnected" in kinds, "who was there before is gone"
