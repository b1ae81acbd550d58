"""Requests for neighbouring blocks, served together: one step of each kind, and each alone where the host refuses."""

from __future__ import annotations

import pytest

from tests.device.helpers import ADDR, BLOCK
from tests.device.test_service import ScriptedMemory, Step, make_service, refusal
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Request, RequestType, Response, ResponseType
from virtio_mem.service import RETRY_INTERVAL, DeviceService

ACK, NACK, BUSY, ERROR = ResponseType
PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType

Asked = tuple[RequestType, int, int]

THREE: list[Asked] = [(PLUG, 4, 2), (PLUG, 6, 1), (PLUG, 1, 3)]


def serve(service: DeviceService, asked: list[Asked]) -> tuple[list[ResponseType], list[int]]:
    """The answers, and how many each call gave."""
    requests = [Request(type_, GuestAddress(ADDR + block * BLOCK), nb_blocks) for type_, block, nb_blocks in asked]
    asking = memoryview(b"".join(request.encode() for request in requests))
    answers = bytearray(RESPONSE_SIZE * len(asked))
    done, calls = 0, []
    while done < len(asked):
        calls.append(service.serve(asking[REQUEST_SIZE * done :], memoryview(answers)[RESPONSE_SIZE * done :]))
        done += calls[-1]
    return [Response.decode(bytes(answers[at:])).type for at in range(0, len(answers), RESPONSE_SIZE)], calls


class Small(ScriptedMemory):
    """Has no more than so many blocks at a time."""

    most = 2

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        if size > self.most * BLOCK:
            raise refusal()
        super().populate(offset, size)


def small_service(most: int) -> tuple[DeviceService, ScriptedMemory]:
    service, script, _ = make_service()
    memory = Small(script)
    memory.most = most
    service.memory = memory
    del service.listeners[1:]
    return service, memory


def test_neighbours_come_by_one_step_of_each_kind() -> None:
    service, script, _ = make_service()
    assert serve(service, [*THREE, (STATE, 1, 6)]) == ([ACK] * 4, [3, 1])
    assert script.take() == [("memory", "populate", 1, 6), ("a", "plugged", 1, 6), ("b", "plugged", 1, 6)]
    assert serve(service, [(UNPLUG, 1, 2), (UNPLUG, 3, 4)]) == ([ACK] * 2, [2])
    assert script.take() == [("a", "unplugging", 1, 6), ("b", "unplugging", 1, 6), ("memory", "discard", 1, 6)]
    assert service.answers == {("PLUG", "ACK"): 3, ("STATE", "ACK"): 1, ("UNPLUG", "ACK"): 2}
    assert service.unplugged_bytes == 6 * BLOCK


def test_where_the_host_refuses_all_each_is_tried_alone() -> None:
    service, memory = small_service(2)
    assert serve(service, THREE) == ([ACK, ACK, BUSY], [1, 1, 1])
    steps: list[Step] = [
        ("memory", "populate", 4, 2),
        ("a", "plugged", 4, 2),
        ("memory", "populate", 6, 1),
        ("a", "plugged", 6, 1),
    ]
    assert memory.script.take() == steps
    assert service.answers == {("PLUG", "ACK"): 2, ("PLUG", "BUSY"): 1}
    assert service.device.owes_notice
    assert serve(service, [(PLUG, 10, 1), (PLUG, 11, 1)]) == ([ACK] * 2, [2]), "and then they are together again"


def test_a_driver_that_was_told_no_busy_is_owed_no_notice() -> None:
    service, _ = small_service(3)
    assert serve(service, THREE)[0] == [ACK] * 3
    assert not service.device.owes_notice
    service.poll(RETRY_INTERVAL)
    assert not service.device.take_config_notice()


@pytest.mark.parametrize("who", ["a", "b"])
def test_what_a_listener_refuses_together_is_taken_back_together(who: str) -> None:
    service, script, _ = make_service()
    script.failing = {(who, "plugged")}
    assert serve(service, THREE)[0] == [BUSY] * 3
    steps = script.take()
    for name in ("a", "b"):
        came, went = ([step[2:] for step in steps if step[:2] == (name, what)] for what in ("plugged", "unplugging"))
        assert came == went
    assert [step[2:] for step in steps if step[1] == "populate"] == [(1, 6), (4, 2), (6, 1), (1, 3)]
    assert [step[2:] for step in steps if step[1] == "discard"] == [(1, 6), (4, 2), (6, 1), (1, 3)]
    assert service.device.owes_notice
    assert service.device.plugged_size == 0
