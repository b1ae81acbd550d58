"""The order of steps in service, and that a refusal at any of them leaves everything as it was."""

from __future__ import annotations

import threading

import pytest

from tests.device.helpers import ADDR, BLOCK, REGION, make_device
from vhost_user.errors import HostError, PeerError, UsageError
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from virtio_mem.device import Effect
from virtio_mem.keeper import KeepsNothing
from virtio_mem.protocol import BlockState, Feature, Request, RequestType, Response, ResponseType
from virtio_mem.service import _MANY_RUNS, RETRY_INTERVAL, DeviceService, Section

ACK, NACK, BUSY, ERROR = ResponseType
PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType

Step = tuple[str, str, int, int]


def refusal() -> HostError:
    return HostError("here", 0, "refused by the test")


class Script:
    """What happened, in order; the steps named in `failing` refuse, once they are reached."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.failing: set[tuple[str, str]] = set()
        self.error: BaseException = refusal()

    def step(self, who: str, what: str, offset: int, size: int) -> None:
        if (who, what) in self.failing:
            raise self.error
        self.steps.append((who, what, offset // BLOCK, size // BLOCK))

    def take(self) -> list[Step]:
        steps, self.steps = self.steps, []
        return steps


class ScriptedMemory:
    """Region memory that only takes notes. What real memory does is tested with the zones."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.short: HostError | None = None
        self.asked: list[tuple[int, int]] = []

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        self.script.step("memory", "populate", offset, size)

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self.script.step("memory", "discard", offset, size)

    page_size = ByteCount(4096)
    kept: ByteCount | None = ByteCount(0)

    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        self.asked.append((offset // BLOCK, size // BLOCK))
        if self.kept is None:
            raise refusal()
        return self.kept

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        return self.held(offset, size), False

    def shortage(self, offset: HostOffset, size: ByteCount) -> HostError | None:
        return self.short


class ScriptedListener:
    def __init__(self, script: Script, name: str) -> None:
        self.script = script
        self.name = name

    def plugged(self, section: Section) -> None:
        assert section.addr == ADDR + section.offset
        self.script.step(self.name, "plugged", section.offset, section.size)

    def unplugging(self, section: Section) -> None:
        assert section.addr == ADDR + section.offset
        self.script.step(self.name, "unplugging", section.offset, section.size)


def make_service(*, prefault: bool = True, requested: int = REGION) -> tuple[DeviceService, Script, ScriptedMemory]:
    script = Script()
    memory = ScriptedMemory(script)
    service = DeviceService(make_device(requested=requested), memory, prefault=prefault)
    service.listeners += [ScriptedListener(script, "a"), ScriptedListener(script, "b")]
    return service, script, memory


def ask(service: DeviceService, type_: int, block: int = 0, nb_blocks: int = 1) -> Response:
    return service.request(Request(type_, GuestAddress(ADDR + block * BLOCK), nb_blocks))


def test_plug_populates_and_then_tells() -> None:
    service, script, _ = make_service()
    assert ask(service, PLUG, 3, 2).type is ACK
    assert script.take() == [("memory", "populate", 3, 2), ("a", "plugged", 3, 2), ("b", "plugged", 3, 2)]
    assert ask(service, STATE, 3, 2).state is BlockState.PLUGGED


def test_without_prefault_a_plug_only_tells() -> None:
    service, script, _ = make_service(prefault=False)
    assert ask(service, PLUG, 3, 2).type is ACK
    assert script.take() == [("a", "plugged", 3, 2), ("b", "plugged", 3, 2)]


def test_unplug_tells_and_then_discards() -> None:
    """Discarding before the others let go let guests fault pages back (a bug that Firecracker had: 8c4bc5a52)."""
    service, script, _ = make_service()
    ask(service, PLUG, 3, 4)
    script.take()
    assert ask(service, UNPLUG, 4, 2).type is ACK
    assert script.take() == [("a", "unplugging", 4, 2), ("b", "unplugging", 4, 2), ("memory", "discard", 4, 2)]


@pytest.mark.parametrize("cause", ["UNPLUG ALL", "system reset"])
def test_everything_goes_run_by_run_and_is_discarded_in_one(cause: str) -> None:
    service, script, _ = make_service()
    ask(service, PLUG, 0, 2)
    ask(service, PLUG, 5, 1)
    script.take()
    assert ask(service, UNPLUG_ALL).type is ACK if cause == "UNPLUG ALL" else service.system_reset()
    told = [("a", "unplugging", 0, 2), ("b", "unplugging", 0, 2), ("a", "unplugging", 5, 1), ("b", "unplugging", 5, 1)]
    assert script.take() == [*told, ("memory", "discard", 0, REGION // BLOCK)]
    assert service.device.plugged_size == 0


def test_a_refused_request_reaches_nobody() -> None:
    service, script, _ = make_service(requested=0)
    assert ask(service, PLUG).type is NACK
    assert ask(service, UNPLUG).type is ERROR
    assert script.take() == []


@pytest.mark.parametrize("prefault", [False, True])
@pytest.mark.parametrize("failing", [("memory", "populate"), ("a", "plugged"), ("b", "plugged")])
def test_a_plug_refused_at_any_step_is_undone_and_busy(failing: tuple[str, str], prefault: bool) -> None:
    service, script, _ = make_service(prefault=prefault)
    script.failing.add(failing)
    if failing[0] == "memory" and not prefault:
        assert ask(service, PLUG, 3, 2).type is ACK
        return
    before = service.device.config
    assert ask(service, PLUG, 3, 2).type is BUSY
    steps = script.take()
    done = [step for step in steps if step[1] in ("populate", "plugged")]
    undone = [step for step in steps if step[1] in ("discard", "unplugging")]
    assert len(done) == len(undone) == ["memory", "a", "b"].index(failing[0]) - (not prefault)
    assert steps == done + undone
    assert {step[0] for step in done} == {step[0] for step in undone}
    assert service.device.config == before
    assert ask(service, STATE, 3, 2).state is BlockState.UNPLUGGED
    script.failing.clear()
    assert ask(service, PLUG, 3, 2).type is ACK


@pytest.mark.parametrize("type_", [UNPLUG, UNPLUG_ALL])
@pytest.mark.parametrize("failing", [("a", "unplugging"), ("b", "unplugging"), ("memory", "discard")])
def test_an_unplug_refused_at_any_step_is_undone_and_busy(type_: RequestType, failing: tuple[str, str]) -> None:
    service, script, _ = make_service()
    ask(service, PLUG, 3, 2)
    script.take()
    script.failing.add(failing)
    before = service.device.config
    assert ask(service, type_, 3, 2).type is BUSY
    told = ["a", "b"][: ["a", "b", "memory"].index(failing[0])]
    assert script.take() == [(name, "unplugging", 3, 2) for name in told] + [(name, "plugged", 3, 2) for name in told]
    assert service.device.config == before
    assert ask(service, STATE, 3, 2).state is BlockState.PLUGGED
    script.failing.clear()
    assert ask(service, type_, 3, 2).type is ACK


def test_unplug_all_refused_half_way_is_undone_for_those_who_were_told() -> None:
    service, script, _ = make_service()
    ask(service, PLUG, 0, 2)
    ask(service, PLUG, 5, 1)
    script.take()
    refuser = service.listeners[1]

    def unplugging(section: Section) -> None:
        if section.offset:
            raise refusal()
        script.step("b", "unplugging", section.offset, section.size)

    refuser.unplugging = unplugging  # type: ignore[method-assign]
    assert ask(service, UNPLUG_ALL).type is BUSY
    told = [("a", "unplugging", 0, 2), ("b", "unplugging", 0, 2), ("a", "unplugging", 5, 1)]
    assert script.take() == told + [(name, "plugged", first, size) for name, _, first, size in told]
    assert service.device.plugged_size == 3 * BLOCK


def test_a_guest_cannot_fill_the_log_with_what_the_host_keeps(caplog: pytest.LogCaptureFixture) -> None:
    service, _, memory = make_service()
    memory.kept = ByteCount(4096)
    for now in range(2):
        for _ in range(20):
            assert ask(service, PLUG, 0, 1).type is ACK
            assert ask(service, UNPLUG, 0, 1).type is ACK
        service.poll(now)
    assert [record.levelname for record in caplog.records if "still holds" in record.message] == ["WARNING"] * 2
    assert service.info()["unreturned_bytes"] == 40 * 4096


@pytest.mark.parametrize(("kept", "expected"), [(0, 0), (4096, 4096), (None, 0)])
def test_what_the_host_keeps_of_what_was_unplugged_is_counted(kept: int | None, expected: int) -> None:
    service, _, memory = make_service()
    ask(service, PLUG, 0, 4)
    memory.kept = None if kept is None else ByteCount(kept)
    assert ask(service, UNPLUG, 1, 2).type is ACK
    info = service.info()
    assert (info["unplugged_bytes"], info["unreturned_bytes"]) == (2 * BLOCK, expected)
    assert ask(service, UNPLUG_ALL).type is ACK
    assert service.info()["unplugged_bytes"] == 4 * BLOCK


def test_the_host_is_asked_about_what_was_plugged_and_about_all_where_that_is_in_many_pieces() -> None:
    script = Script()
    memory = ScriptedMemory(script)
    blocks = 2 * _MANY_RUNS + 4
    service = DeviceService(make_device(region=blocks * BLOCK, requested=blocks * BLOCK), memory)
    for block in (0, 1, 7):
        ask(service, PLUG, block)
    ask(service, UNPLUG_ALL)
    assert memory.asked == [(0, 2), (7, 1)]
    for pieces, expected in ((_MANY_RUNS, _MANY_RUNS), (_MANY_RUNS + 1, 1)):
        memory.asked.clear()
        for piece in range(pieces):
            ask(service, PLUG, 2 * piece)
        ask(service, UNPLUG_ALL)
        assert len(memory.asked) == expected
    assert memory.asked == [(0, blocks)]


def test_a_system_reset_that_the_host_refuses() -> None:
    service, script, _ = make_service()
    ask(service, PLUG, 3, 2)
    script.failing.add(("memory", "discard"))
    assert not service.system_reset()
    assert service.device.plugged_size == 2 * BLOCK
    script.failing.clear()
    assert service.system_reset()
    assert service.device.plugged_size == 0


@pytest.mark.parametrize(
    "error", [PeerError("a", 1, "b"), OSError(5, "x"), ValueError("y")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("type_", [PLUG, UNPLUG, UNPLUG_ALL])
def test_any_error_of_a_listener_is_a_refusal(type_: RequestType, error: Exception) -> None:
    service, script, _ = make_service()
    ask(service, PLUG, 0, 1)
    script.take()
    script.error = error
    script.failing |= {("b", "plugged"), ("b", "unplugging")}
    before = service.device.config
    assert ask(service, type_, 1 if type_ is PLUG else 0).type is BUSY
    assert service.device.config == before
    steps = [step for step in script.take() if step[0] == "a"]
    assert len(steps) == 2, "what was announced to the first is taken back"
    script.failing.clear()
    assert ask(service, type_, 1 if type_ is PLUG else 0).type is ACK


def test_an_undo_that_fails_in_an_unexpected_way_keeps_no_other_from_being_taken() -> None:
    service, script, _ = make_service()
    script.error = OSError(5, "x")
    script.failing |= {("b", "plugged"), ("a", "unplugging")}
    assert ask(service, PLUG, 3, 2).type is BUSY
    assert script.take() == [("memory", "populate", 3, 2), ("a", "plugged", 3, 2), ("memory", "discard", 3, 2)]
    assert service.failed_undos == 1


def test_a_device_whose_blocks_are_smaller_than_a_page_is_refused() -> None:
    memory = ScriptedMemory(Script())
    memory.page_size = ByteCount(2 * BLOCK)
    with pytest.raises(UsageError, match="block_size"):
        DeviceService(make_device(), memory)


def test_a_system_reset_while_paused_changes_nothing() -> None:
    service, script, _ = make_service()
    service.device.negotiate(Feature.UNPLUGGED_INACCESSIBLE)
    ask(service, PLUG, 3, 2)
    script.take()
    service.pause()
    assert not service.system_reset()
    assert script.take() == []
    assert service.device.plugged_size == 2 * BLOCK
    assert service.device.acked_features == Feature.UNPLUGGED_INACCESSIBLE
    service.resume()
    assert service.system_reset()
    assert not service.device.acked_features


@pytest.mark.parametrize("paused", [False, True])
def test_a_system_reset_that_is_refused_leaves_the_notice_that_is_owed(paused: bool) -> None:
    service, script, _ = make_service()
    service.device.resize(4 * BLOCK)
    service.device.take_config_notice()
    ask(service, PLUG, 3, 1)
    service.pause()
    assert ask(service, PLUG).type is BUSY
    if not paused:
        script.failing.add(("b", "unplugging"))
        service.device.paused = False
    assert not service.system_reset()
    service.resume()
    assert service.device.take_config_notice()


def test_an_undo_that_fails_is_counted_and_keeps_no_other_from_being_taken() -> None:
    service, script, _ = make_service()
    script.failing |= {("b", "plugged"), ("a", "unplugging")}
    assert ask(service, PLUG, 3, 2).type is BUSY
    assert script.take() == [("memory", "populate", 3, 2), ("a", "plugged", 3, 2), ("memory", "discard", 3, 2)]
    assert service.failed_undos == 1


@pytest.mark.parametrize("type_", [PLUG, UNPLUG])
def test_an_interruption_leaves_the_device_usable(type_: RequestType) -> None:
    service, script, _ = make_service()
    ask(service, PLUG, 0, 1)
    script.take()
    script.failing |= {("b", "plugged"), ("b", "unplugging")}
    script.error = KeyboardInterrupt()
    block = 1 if type_ is PLUG else 0
    with pytest.raises(KeyboardInterrupt):
        ask(service, type_, block)
    script.failing.clear()
    assert service.device.plugged_size == BLOCK
    assert ask(service, type_, block).type is ACK


def test_after_busy_a_notice_follows_once_the_shortage_is_over() -> None:
    service, script, memory = make_service()
    script.failing.add(("memory", "populate"))
    memory.short = refusal()
    assert ask(service, PLUG).type is BUSY
    device = service.device
    service.poll(10.0)
    assert not device.take_config_notice(), "the host is still short"
    script.failing.clear()
    memory.short = None
    service.poll(10.1)
    assert device.take_config_notice()
    service.poll(20.0)
    assert not device.take_config_notice(), "one notice is enough"


def test_a_refusal_of_another_kind_is_not_held_back_by_an_earlier_shortage() -> None:
    service, script, memory = make_service()
    ask(service, PLUG, 5)
    script.failing.add(("memory", "populate"))
    memory.short = refusal()
    assert ask(service, PLUG).type is BUSY
    service.resize(0)
    service.device.take_config_notice()
    script.failing.add(("b", "unplugging"))
    assert ask(service, UNPLUG, 5).type is BUSY
    service.poll(10.0)
    assert service.device.take_config_notice()


def test_a_refusal_before_anything_is_tried_is_not_held_back_by_an_earlier_shortage() -> None:
    class Full(KeepsNothing):
        def opening(self, effect: Effect) -> None:
            raise HostError("state", effect.size, "room to put it on record")

    service, script, memory = make_service()
    script.failing.add(("memory", "populate"))
    memory.short = refusal()
    assert ask(service, PLUG).type is BUSY
    service.keeper = Full()
    assert ask(service, PLUG).type is BUSY
    service.poll(10.0)
    assert service.device.take_config_notice()


@pytest.mark.parametrize("system", [False, True])
def test_a_reset_cancels_what_was_owed(system: bool) -> None:
    service, script, _ = make_service()
    script.failing.add(("memory", "populate"))
    assert ask(service, PLUG).type is BUSY
    if system:
        service.system_reset()
    else:
        service.device_reset()
    service.poll(10.0)
    assert not service.device.take_config_notice()


def test_a_guest_that_repeats_a_refused_request_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    service, script, _ = make_service()
    script.failing.add(("memory", "populate"))
    for _ in range(100):
        ask(service, PLUG)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    script.failing.clear()
    ask(service, PLUG)
    service.poll(0)
    script.failing.add(("memory", "populate"))
    ask(service, PLUG, 1)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 2


def test_notices_after_busy_are_rate_limited() -> None:
    service, script, _ = make_service()
    script.failing.add(("a", "plugged"))
    notices = 0
    for tick in range(100):
        assert ask(service, PLUG).type is BUSY
        service.poll(tick * RETRY_INTERVAL / 10)
        notices += service.device.take_config_notice()
    assert notices == 10


def test_no_notice_is_given_while_paused() -> None:
    service, _, _ = make_service()
    service.device.pause()
    assert ask(service, PLUG).type is BUSY
    service.poll(10.0)
    assert not service.device.take_config_notice()
    service.device.resume()
    assert service.device.take_config_notice()


def test_answers_are_counted_and_unknown_types_share_one_counter() -> None:
    service, _, _ = make_service(requested=BLOCK)
    for type_ in (PLUG, PLUG, STATE, 7, 8, 9):
        ask(service, type_)
    assert ask(service, PLUG, 1).type is NACK
    expected = {("PLUG", "ACK"): 1, ("PLUG", "ERROR"): 1, ("STATE", "ACK"): 1, ("PLUG", "NACK"): 1}
    assert service.answers == expected | {("unknown", "ERROR"): 3}


@pytest.mark.parametrize(
    "call", ["request", "resize", "pause", "resume", "poll", "info", "device_reset", "system_reset"]
)
def test_everything_waits_for_a_request_that_is_being_served(call: str) -> None:
    service, _, memory = make_service()
    inside, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def populate(offset: HostOffset, size: ByteCount) -> None:
        inside.set()
        assert go_on.wait(30)

    memory.populate = populate  # type: ignore[method-assign]
    arguments = {"request": (Request(STATE, GuestAddress(ADDR), 1),), "resize": (0,), "poll": (1.0,)}

    def other() -> None:
        getattr(service, call)(*arguments.get(call, ()))
        done.set()

    threads = [threading.Thread(target=ask, args=(service, PLUG)), threading.Thread(target=other)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    assert not done.wait(0.05), "it went ahead in the middle of a PLUG"
    go_on.set()
    for thread in threads:
        thread.join()
    assert done.is_set()


def test_requests_and_resizes_from_many_threads_keep_the_invariants() -> None:
    service, _, _ = make_service(prefault=False)
    service.listeners.clear()
    barrier = threading.Barrier(4)

    def guest(first: int) -> None:
        barrier.wait()
        for _ in range(300):
            if ask(service, PLUG, first).type is ACK:
                assert ask(service, UNPLUG, first).type is ACK

    def host() -> None:
        barrier.wait()
        for step in range(300):
            service.resize((step % 4) * BLOCK)

    threads = [threading.Thread(target=guest, args=(n,)) for n in range(3)] + [threading.Thread(target=host)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.device.plugged_size == 0
