"""UNPLUGs that leave a driver with less than the target are counted, and refused where that is wished."""

from __future__ import annotations

import pytest

from tests.device.helpers import BLOCK
from tests.device.test_service import ACK, BUSY, PLUG, UNPLUG, UNPLUG_ALL, ask, make_service
from vhost_user.units import GuestAddress
from virtio_mem.protocol import Request, Response
from virtio_mem.service import DeviceService


def with_blocks(plugged: int, target: int, *, allowed: bool) -> DeviceService:
    service, _, _ = make_service(requested=plugged * BLOCK)
    assert ask(service, PLUG, 0, plugged).type is ACK
    service.resize(target * BLOCK)
    service.unrequested_unplug = allowed
    service.device.take_config_notice()
    return service


@pytest.mark.parametrize(("target", "unasked"), [(0, 0), (4, 0), (5, 0), (6, 1), (7, 2), (8, 3), (20, 3)])
def test_what_was_unplugged_below_the_target_is_counted(target: int, unasked: int) -> None:
    service = with_blocks(8, target, allowed=True)
    assert ask(service, UNPLUG, 2, 3).type is ACK
    assert service.info()["unrequested_bytes"] == unasked * BLOCK
    assert service.device.plugged_size == 5 * BLOCK


@pytest.mark.parametrize("target", [6, 8, 20])
def test_it_is_refused_where_it_is_off_and_changes_nothing(target: int) -> None:
    service = with_blocks(8, target, allowed=False)
    response = ask(service, UNPLUG, 2, 3)
    assert (response.type, service.device.plugged_size) == (BUSY, 8 * BLOCK)
    assert f"leaves {5 * BLOCK >> 20}M plugged, of {target * BLOCK >> 20}M that are requested" in response.reason
    assert service.info()["unrequested_bytes"] == 0


def test_what_the_host_asked_for_is_granted_all_the_same() -> None:
    service = with_blocks(8, 5, allowed=False)
    assert ask(service, UNPLUG, 2, 3).type is ACK
    assert ask(service, UNPLUG, 0).type is BUSY
    assert ask(service, UNPLUG_ALL).type is ACK, "every driver begins so"
    assert service.info()["unrequested_bytes"] == 0
    assert service.system_reset()


def test_of_several_requests_as_many_are_granted_as_were_asked_for() -> None:
    service = with_blocks(8, 6, allowed=False)
    addr = service.device.geometry.addr
    requests = memoryview(
        b"".join(Request(UNPLUG, GuestAddress(addr + block * BLOCK), 1).encode() for block in range(4))
    )
    answers = memoryview(bytearray(40))
    done = 0
    while done < 4:
        done += service.serve(requests[24 * done :], answers[10 * done :])
    kinds = [Response.decode(answers[at : at + 10]).type for at in range(0, 40, 10)]
    assert kinds == [ACK, ACK, BUSY, BUSY]


def test_the_driver_is_asked_to_try_again_once_the_target_is_lower_and_not_before() -> None:
    service = with_blocks(8, 8, allowed=False)
    assert ask(service, UNPLUG, 2, 3).type is BUSY
    service.poll(10)
    assert not service.device.take_config_notice()
    service.resize(5 * BLOCK)
    assert service.device.take_config_notice(), "of the resize"
    service.poll(20)
    assert service.device.take_config_notice(), "of the BUSY"
    assert ask(service, UNPLUG, 2, 3).type is ACK


def test_a_guest_cannot_fill_the_log_with_what_is_granted_and_refused_by_turns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = with_blocks(1, 8, allowed=False)
    for now in range(3):
        for block in range(1, 6):
            assert ask(service, PLUG, block).type is ACK
            assert ask(service, UNPLUG, block).type is BUSY
        assert ask(service, UNPLUG_ALL).type is ACK
        assert ask(service, PLUG).type is ACK
        service.poll(now)
    levels = [record.levelname for record in caplog.records if "refused" in record.message]
    assert levels == ["WARNING"] * 3, "one a poll"
