"""Events: what is told of what happens, to whom, and what becomes of those who do not listen."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from tests.api.rig import ACK, BLOCK, BOOT, BUSY, NACK, MakeMachine, Rig
from vhost_user.errors import HostError
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.api import stream
from virtio_mem.events import HISTORY_LENGTH, QUEUE_LENGTH, Event, Events
from virtio_mem.operation import STALL_SECONDS
from virtio_mem.protocol import Request, RequestType

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType


def told(events: list[Event] | list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    found = [event if isinstance(event, dict) else event.as_dict() for event in events]
    return [tuple(event.get(name) for name in ("kind", *names)) for event in found]


def take(rig: Rig, after: int = 0) -> list[Event]:
    with rig.control.events.subscribe(after=after) as subscription:
        found = []
        while event := subscription.get(0):
            found.append(event)
    return found


def test_a_resize_and_what_the_guest_makes_of_it(rig: Rig) -> None:
    rig.follow()
    after = take(rig)[-1].id
    number = rig.resize(BOOT + 2 * BLOCK)
    rig.follow()
    addr = rig.service().device.geometry.addr
    assert told(take(rig, after), "zone", "operation", "target", "plugged", "addr", "size", "held") == [
        ("requested", "mem0", number, BOOT + 2 * BLOCK, BOOT + 128 * BLOCK, None, None, None),
        ("freed", "mem0", None, None, None, None, 126 * BLOCK, 0),
        ("unplugged", "mem0", None, None, BOOT + 2 * BLOCK, addr + 2 * BLOCK, 126 * BLOCK, None),
        ("reached", "mem0", number, BOOT + 2 * BLOCK, BOOT + 2 * BLOCK, None, None, None),
    ]


def test_everything_goes(rig: Rig) -> None:
    rig.follow()
    after = take(rig)[-1].id
    assert rig.request(UNPLUG_ALL) is ACK
    rig.follow()
    rig.control.system_reset()
    assert told(take(rig, after), "size", "plugged", "done") == [
        ("freed", 128 * BLOCK, None, None),
        ("unplugged", 128 * BLOCK, BOOT, None),
        ("plugged", 128 * BLOCK, BOOT + 128 * BLOCK, None),
        ("freed", 128 * BLOCK, None, None),
        ("system-reset", None, None, True),
    ]


def test_refusals_have_their_reasons(rig: Rig) -> None:
    class Refuses:
        def plugged(self, section: object) -> None:
            raise HostError("huge pages", 0, "at least 1")

        unplugging = plugged

    rig.service().listeners.append(Refuses())
    assert rig.request(PLUG, 7) is BUSY
    assert rig.request(PLUG, 0, 200) is NACK
    rig.request(RequestType(STATE), 10_000)
    rig.service().request(Request(77))
    assert told(take(rig), "request", "answer", "reason", "blocks") == [
        ("refused", "PLUG", "BUSY", "huge pages=0: at least 1", 1),
        ("refused", "PLUG", "NACK", "plugged_size would exceed requested_size", 200),
        ("refused", "STATE", "ERROR", "a block is outside the usable region", 1),
        ("refused", "unknown", "ERROR", "the request type is unknown", 0),
    ]
    number = rig.resize(BOOT + BLOCK)
    rig.request(PLUG)
    rig.control.operations._operations[number].moved -= STALL_SECONDS
    rig.control.poll(time.monotonic())
    assert rig.operation(number)["verdict"] == "refused for 10 s: the host refuses: huge pages=0: at least 1"


def test_the_end_of_an_operation_is_told_once(rig: Rig) -> None:
    first = rig.resize(BOOT + BLOCK)
    second = rig.resize(BOOT + 2 * BLOCK)
    rig.control.operations._operations[second].moved -= STALL_SECONDS
    for _ in range(3):
        rig.control.poll(time.monotonic())
    rig.manager.resize(BOOT)
    for _ in range(3):
        rig.control.poll(time.monotonic())
    assert told(take(rig), "operation", "reason")[1:] == [
        ("requested", second, None),
        ("superseded", first, f"by operation {second}"),
        ("stalled", second, "the guest asks for nothing: is its driver loaded?"),
        ("superseded", second, "by a resize to 64 MiB, elsewhere"),
    ]


def test_pauses_are_told(rig: Rig) -> None:
    rig.control.pause()
    rig.control.resume()
    assert told(take(rig), "zone") == [("paused", None), ("resumed", None)]


def test_front_ends_that_come_and_go_are_told_once_they_are_seen_twice(make_machine: MakeMachine) -> None:
    there = [False]
    rig = make_machine(connected=lambda: there[0])
    for now in (False, True, False, True, True, True, False, False):
        there[0] = now
        rig.control.poll(time.monotonic())
    assert told(take(rig), "zone") == [("connected", "mem0"), ("disconnected", "mem0")]


def test_an_observer_that_fails_keeps_no_request_from_being_answered(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails:
        def answered(self, *_: object) -> None:
            raise ZeroDivisionError

        discarded = answered

    rig.service().observers.insert(0, Fails())
    assert rig.request(PLUG) is ACK
    assert rig.request(UNPLUG) is ACK
    assert told(take(rig))[-2:] == [("freed",), ("unplugged",)]
    assert "an observer failed" in caplog.text


def test_what_the_host_cannot_tell_is_none(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_offset: HostOffset, _size: ByteCount) -> ByteCount:
        raise HostError("held", 0, "no counters")

    rig.request(PLUG)
    for name in ("held", "held_at_least"):
        monkeypatch.setattr(rig.service().memory, name, refuse)
    rig.request(UNPLUG)
    assert told(take(rig), "held")[-2] == ("freed", None)
    assert rig.get("/api/v1/vm.info").json["zones"][0]["held"] is None
    assert b"virtio_mem_held_bytes{" not in rig.get("/metrics").body


def test_a_closed_control_lets_go_of_the_devices(rig: Rig) -> None:
    assert len(rig.service().observers) == 1
    rig.control.close()
    assert rig.service().observers == []


# Who listens.


def test_a_slow_reader_loses_the_oldest_and_is_told_how_many() -> None:
    events = Events()
    with events.subscribe() as slow, events.subscribe() as quick:
        for number in range(QUEUE_LENGTH + 5):
            events.publish("plugged", "z", number=number)
            assert quick.get(0) is not None
        lost = slow.get(0)
        assert lost is not None
        assert (lost.kind, lost.details) == ("lost", {"count": 5})
        numbers = [event.details["number"] for _ in range(QUEUE_LENGTH) if (event := slow.get(0))]
        assert numbers == list(range(5, QUEUE_LENGTH + 5))
        assert slow.get(0) is None
        assert events.dropped == 5
    assert events.listeners == 0
    events.publish("plugged", "z")


def test_one_who_comes_back_gets_what_is_still_known() -> None:
    events = Events()
    for number in range(HISTORY_LENGTH + 10):
        events.publish("plugged", "z", number=number)
    with events.subscribe(after=0) as everything, events.subscribe() as nothing:
        first = everything.get(0)
        assert first is not None
        assert first.details["number"] == 10
        assert nothing.get(0) is None
    for after in (first.id, first.id - 1):
        with events.subscribe(after=after) as rest:
            following = rest.get(0)
            assert following is not None
            assert following.id == after + 1


@pytest.mark.parametrize(
    ("earlier", "count"), [(2, 1), (11, 10), (12, None), (10**9, None)], ids=["one", "all", "before", "long before"]
)
def test_one_who_comes_back_is_told_what_is_not_known_any_more(earlier: int, count: int | None) -> None:
    """Of what came before this process nobody knows how much it was."""
    events = Events()
    for number in range(HISTORY_LENGTH + 10):
        events.publish("plugged", "z", number=number)
    oldest = events._history[0].id
    with events.subscribe(after=oldest - earlier) as returned:
        lost, first = returned.get(0), returned.get(0)
    assert lost is not None
    assert first is not None
    assert (lost.kind, lost.details, first.id) == ("lost", {"count": count}, oldest)


def test_one_who_comes_back_to_a_process_without_events_may_lack_some() -> None:
    events = Events()
    with events.subscribe(after=events._first - 2) as returned, events.subscribe(after=events._first - 1) as other:
        lost = returned.get(0)
        assert lost is not None
        assert (lost.kind, lost.details) == ("lost", {"count": None})
        assert returned.get(0) is other.get(0) is None


def test_a_later_process_numbers_on() -> None:
    first = Events()
    for _ in range(1000):
        first.publish("plugged")
    time.sleep(0.01)
    with Events().subscribe() as _, first.subscribe(after=0) as subscription:
        last = subscription.get(0)
    assert last is not None
    second = Events()
    second.publish("plugged")
    with second.subscribe(after=0) as subscription:
        event = subscription.get(0)
    assert event is not None
    assert event.id > last.id + HISTORY_LENGTH


def test_who_waits_is_woken_by_an_event_and_by_the_end() -> None:
    events = Events()
    subscription = events.subscribe()
    timer = threading.Timer(0.05, events.publish, ["paused"])
    timer.start()
    event = subscription.get(10)
    assert event is not None
    assert event.kind == "paused"
    for end in (events.wake, subscription.close):
        timer = threading.Timer(0.05, end)
        timer.start()
        start = time.monotonic()
        assert subscription.get(60) is None
        assert time.monotonic() - start < 30
    events.close()
    assert list(events.subscribe()) == []


def test_iterating_ends_with_the_events() -> None:
    events = Events()
    subscription = events.subscribe()
    for kind in ("paused", "resumed"):
        events.publish(kind)

    def end() -> None:
        events.wake()
        events.publish("plugged")
        events.close()

    timer = threading.Timer(0.05, end)
    timer.start()
    assert [event.kind for event in subscription] == ["paused", "resumed", "plugged"]


# The stream.


def stream_of(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream; each also names itself in its `id` and `event` lines. Comments are `{"comment": ...}`."""
    block: dict[str, str] = {}
    while line := response.readline().decode():
        if line != "\n":
            name, _, value = line.rstrip("\n").partition(": ")
            block[name or "comment"] = value
            continue
        if "data" in block:
            event = json.loads(block["data"])
            assert block["event"] == event["kind"]
            assert block.get("id", "0") == str(event["id"])
            yield event
        else:
            yield block
        block = {}


@contextmanager
def listen(rig: Rig, headers: dict[str, str] | None = None) -> Iterator[http.client.HTTPResponse]:
    with closing(rig.connect()) as connection:
        connection.request("GET", "/api/v1/events", headers=headers or {})
        yield connection.getresponse()


def wait_until(condition: Any, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_stream_tells_what_happens_as_it_happens(rig: Rig) -> None:
    with listen(rig) as response:
        assert response.getheader("Content-Type") == "text/event-stream"
        events = stream_of(response)
        assert next(events) == {"comment": "connected"}
        number = rig.resize(BOOT + BLOCK)
        event = next(events)
        assert (event["kind"], event["operation"]) == ("requested", number)
        rig.follow()
        assert [next(events)["kind"] for _ in range(2)] == ["plugged", "reached"]
    wait_until(lambda: rig.control.events.listeners == 0, 3)
    with listen(rig, {"Last-Event-ID": str(event["id"])}) as response:
        events = stream_of(response)
        assert [next(events).get("kind") for _ in range(3)] == [None, "plugged", "reached"]


@pytest.mark.parametrize("last", ["x", "", "-1", "1.5", "9" * 19])
def test_a_last_event_that_is_none(rig: Rig, last: str) -> None:
    answer = rig.ask("GET", "/api/v1/events", headers={"Last-Event-ID": last})
    assert (answer.status, answer.json["field"]) == (400, "Last-Event-ID")
    assert rig.control.events.listeners == 0


def test_a_reader_that_goes_before_the_first_byte_is_forgotten(rig: Rig) -> None:
    with rig.raw() as sock:
        sock.shutdown(socket.SHUT_RD)  # so that the server's first byte finds nobody
        sock.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        rig.wait_until_idle()
    assert rig.control.events.listeners == 0


def test_a_silent_stream_shows_that_it_lives(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(stream, "_LOOK_SECONDS", 0.01)
    with listen(rig) as response:
        events = stream_of(response)
        assert [next(events) for _ in range(3)][1:] == 2 * [{"comment": "still here"}]


def test_a_reader_that_stops_reading_loses_events_and_then_the_connection(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, figure: Any
) -> None:
    monkeypatch.setattr("virtio_mem.api.connection.SEND_SECONDS", 0.3)
    with listen(rig):
        wait_until(lambda: rig.control.events.listeners == 1)
        number, deadline = 0, time.monotonic() + 10
        while rig.control.events.listeners:
            assert time.monotonic() < deadline
            rig.control.events.publish("plugged", "mem0", number=number, text="x" * 1000)
            number += 1
        assert rig.control.events.dropped > 0
        assert len(rig.get("/api/v1/vm.info").body) > 0
