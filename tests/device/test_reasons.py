"""What is said, on our side, of a request or features that were not granted: logs and users see it."""

from __future__ import annotations

import pytest

from tests.device.helpers import ADDR, BLOCK, BLOCKS, ask, make_device, plug
from vhost_user.errors import PeerError
from vhost_user.units import GuestAddress
from virtio_mem.device import Effect, VirtioMemDevice
from virtio_mem.protocol import Feature, Request, RequestType, ResponseType

ACK, NACK, BUSY, ERROR = ResponseType
PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType


def request(type_: int, addr: int, nb_blocks: int) -> Request:
    return Request(type_, GuestAddress(addr), nb_blocks)


@pytest.mark.parametrize(
    ("asked", "type_", "reason"),
    [
        (request(PLUG, ADDR + 4096, 1), ERROR, "addr is not aligned to block_size"),
        (request(STATE, ADDR, 0), ERROR, "nb_blocks is 0"),
        (request(UNPLUG, ADDR + BLOCKS * BLOCK, 1), ERROR, "a block is outside the usable region"),
        (request(PLUG, ADDR, 1), ERROR, "a block is plugged already"),
        (request(UNPLUG, ADDR + BLOCK, 1), ERROR, "a block is unplugged already"),
        (request(PLUG, ADDR + BLOCK, 2), NACK, "plugged_size would exceed requested_size"),
        (request(4, ADDR, 1), ERROR, "the request type is unknown"),
        (request(STATE, ADDR, 1), ACK, ""),
    ],
)
def test_an_answer_says_why(asked: Request, type_: ResponseType, reason: str) -> None:
    device = make_device(requested=2 * BLOCK)
    plug(device)
    outcome = device.request(asked)
    assert not isinstance(outcome, Effect)
    assert (outcome.type, outcome.reason) == (type_, reason)


def test_busy_says_why() -> None:
    device = make_device()
    plug(device)
    device.pause()
    assert [ask(device, type_, 1 - type_).reason for type_ in (PLUG, UNPLUG)] == ["the device is paused"] * 2
    assert ask(device, UNPLUG_ALL).reason == "the device is paused"
    device.resume()
    reset = device.system_reset()
    answer = device.abandon(reset, "no time")
    assert (answer.type, answer.reason) == (BUSY, "no time")
    effect = device.request(request(PLUG, ADDR + BLOCK, 1))
    assert isinstance(effect, Effect)
    answer = device.abandon(effect, "no memory")
    assert (answer.type, answer.reason) == (BUSY, "no memory")


def test_refused_features_are_named() -> None:
    device = make_device()
    with pytest.raises(PeerError) as refusal:
        device.negotiate(Feature.UNPLUGGED_INACCESSIBLE | Feature.ACPI_PXM)
    assert str(refusal.value) == "driver features=0x3: within the offered 0x6"
    with pytest.raises(PeerError) as refusal:
        device.negotiate(Feature.PERSISTENT_SUSPEND)
    assert str(refusal.value) == (
        "driver features=0x4: VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (bit 1) must be accepted; "
        "use a driver that knows it (Linux 5.16 or later)"
    )


def test_a_new_device_says_so() -> None:
    device = VirtioMemDevice(make_device().geometry)
    assert device.offered_features == Feature.UNPLUGGED_INACCESSIBLE | Feature.PERSISTENT_SUSPEND
    assert (device.acked_features, device.requested_size, device.paused, device.owes_notice) == (0, 0, False, False)
    assert ask(device, PLUG).type is NACK


def test_a_pause_and_a_debt_are_yes_or_no() -> None:
    """Both are written down as they are: None would be neither."""
    device = make_device()
    assert (device.paused, device.owes_notice) == (False, False)
    device.pause()
    assert ask(device, PLUG).type is BUSY
    assert (device.paused, device.owes_notice) == (True, True)
    device.device_reset()
    assert device.owes_notice is False
    device.resume()
    assert device.paused is False


def test_bits_of_the_ring_and_the_transport_are_passed_over() -> None:
    device = make_device()
    device.negotiate(Feature.UNPLUGGED_INACCESSIBLE | 0xFF << 24 | Feature.VERSION_1)
    assert device.acked_features == Feature.UNPLUGGED_INACCESSIBLE
    with pytest.raises(PeerError, match="driver features=0x800002"):
        device.negotiate(Feature.UNPLUGGED_INACCESSIBLE | 1 << 23)


@pytest.mark.parametrize("type_", [RequestType.PLUG, RequestType.UNPLUG_ALL])
def test_one_effect_at_a_time_and_its_end_once(type_: RequestType) -> None:
    device = make_device()
    effect = device.request(request(type_, ADDR, 1))
    assert isinstance(effect, Effect)
    for again in (lambda: device.request(request(STATE, ADDR, 1)), device.device_reset):
        with pytest.raises(AssertionError):
            again()
    with pytest.raises(AssertionError, match=r"^the effect of the request before is still open"):
        device.request(request(STATE, ADDR, 1))
    with pytest.raises(AssertionError, match=r"^only the effect given last can end, once"):
        device.commit(effect._replace())
    device.commit(effect)
    with pytest.raises(AssertionError):
        device.abandon(effect, "too late")
