"""The order of steps in service, and that a refusal at any of them leaves everything as it was."""

from __future__ import annotations

import threading

import pytest

from tests.device.helpers import ADDR, BLOCK, REGION, make_device
from vhost_user.errors import HostError
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from virtio_mem.protocol import BlockState, Request, RequestType, Response, ResponseType
from virtio_mem.service import RETRY_INTERVAL, DeviceService, Section

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

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        self.script.step("memory", "populate", offset, size)

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self.script.step("memory", "discard", offset, size)

    def shortage(self, size: ByteCount) -> HostError | None:
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


def test_a_system_reset_that_the_host_refuses() -> None:
    service, script, _ = make_service()
    ask(service, PLUG, 3, 2)
    script.failing.add(("memory", "discard"))
    assert not service.system_reset()
    assert service.device.plugged_size == 2 * BLOCK
    script.failing.clear()
    assert service.system_reset()
    assert service.device.plugged_size == 0


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
