"""The right answer to the wrong bytes, and the other way round."""

from __future__ import annotations

import struct

from tests.conformance.wrong.fault import fault
from virtio_mem.protocol import REQUEST_SIZE, Request, RequestType, Response, ResponseType
from virtio_mem.service import DeviceService

_HEADER = slice(2, 8)
_TAIL = slice(18, 24)


def answer_to(service: DeviceService, request: bytes) -> Response:
    return service.request(Request.decode(request))


def right(service: DeviceService, request: bytes) -> bytes:
    """What should be answered."""
    return answer_to(service, request).encode()


def _error_if(wrong: bool, service: DeviceService, request: bytes) -> bytes:
    return Response(ResponseType.ERROR).encode() if wrong else right(service, request)


@fault("MEM-WIRE-3")
def short_answer(service: DeviceService, request: bytes) -> bytes:
    """The answer ends before the state."""
    return right(service, request)[:8]


@fault("MEM-WIRE-3")
def state_in_the_padding(service: DeviceService, request: bytes) -> bytes:
    """The state comes right behind the type, at 2 and not at 8."""
    answer = answer_to(service, request)
    return struct.pack("<HH6x", answer.type, answer.state)


@fault("DEP-NACK-1")
def busy_is_one(service: DeviceService, request: bytes) -> bytes:
    """BUSY is 1 and NACK is 2."""
    answer = answer_to(service, request)
    return struct.pack("<H6xH", {1: 2, 2: 1}.get(answer.type, answer.type), answer.state)


@fault("MEM-WIRE-4")
def error_is_four(service: DeviceService, request: bytes) -> bytes:
    """ERROR is 4."""
    answer = answer_to(service, request)
    return struct.pack("<H6xH", {3: 4}.get(answer.type, answer.type), answer.state)


@fault("MEM-WIRE-5")
def unplugged_before_plugged(service: DeviceService, request: bytes) -> bytes:
    """UNPLUGGED is 0 and PLUGGED is 1."""
    answer = answer_to(service, request)
    return struct.pack("<H6xH", answer.type, {0: 1, 1: 0}.get(answer.state, answer.state))


@fault("MEM-WIRE-2")
def state_is_four(service: DeviceService, request: bytes) -> bytes:
    """UNPLUG ALL is 3, and STATE is 4."""
    type_ = request[0]
    numbers = {3: RequestType.UNPLUG_ALL, 4: RequestType.STATE, 2: 9}
    return right(service, bytes([numbers.get(type_, type_)]) + request[1:])


@fault("DEP-UNKNOWN-1")
def type_of_one_byte(service: DeviceService, request: bytes) -> bytes:
    """Of the type, the low byte counts: 0x0103 is STATE."""
    return right(service, request[:1] + b"\0" + request[2:])


@fault("MEM-WIRE-1")
def number_of_one_byte(service: DeviceService, request: bytes) -> bytes:
    """Of nb_blocks, the low byte counts: 257 blocks are one."""
    return right(service, request[:17] + b"\0" + request[18:])


@fault("MEM-WIRE-1")
def addr_of_four_bytes(service: DeviceService, request: bytes) -> bytes:
    """Of addr, the low four bytes count, and the region's own address fills in the rest."""
    high = struct.pack("<Q", service.device.geometry.addr)[4:]
    return right(service, request[:12] + high + request[16:])


def _header(type_: RequestType, service: DeviceService, request: bytes) -> bytes:
    return _error_if(request[0] == type_ and any(request[_HEADER]), service, request)


def _tail(type_: RequestType, service: DeviceService, request: bytes) -> bytes:
    return _error_if(request[0] == type_ and any(request[_TAIL]), service, request)


@fault("MEM-PLUG-1")
def padding_of_plug(service: DeviceService, request: bytes) -> bytes:
    """A PLUG whose header has anything but zeroes in its padding is an ERROR."""
    return _header(RequestType.PLUG, service, request)


@fault("MEM-PLUG-2")
def tail_of_plug(service: DeviceService, request: bytes) -> bytes:
    """A PLUG with anything but zeroes behind nb_blocks is an ERROR."""
    return _tail(RequestType.PLUG, service, request)


@fault("MEM-UNPLUG-1")
def padding_of_unplug(service: DeviceService, request: bytes) -> bytes:
    """An UNPLUG whose header has anything but zeroes in its padding is an ERROR."""
    return _header(RequestType.UNPLUG, service, request)


@fault("MEM-UNPLUG-2")
def tail_of_unplug(service: DeviceService, request: bytes) -> bytes:
    """An UNPLUG with anything but zeroes behind nb_blocks is an ERROR."""
    return _tail(RequestType.UNPLUG, service, request)


@fault("MEM-UNPLUGALL-2")
def padding_of_unplug_all(service: DeviceService, request: bytes) -> bytes:
    """An UNPLUG ALL with anything but zeroes in its padding is an ERROR."""
    return _tail(RequestType.UNPLUG_ALL, service, request)


@fault("MEM-STATE-1")
def padding_of_state(service: DeviceService, request: bytes) -> bytes:
    """A STATE whose header has anything but zeroes in its padding is an ERROR."""
    return _header(RequestType.STATE, service, request)


@fault("MEM-STATE-2")
def tail_of_state(service: DeviceService, request: bytes) -> bytes:
    """The padding behind nb_blocks of a STATE belongs to the number."""
    return _error_if(
        request[0] == RequestType.STATE and int.from_bytes(request[16:REQUEST_SIZE], "little") > 0xFFFF,
        service,
        request,
    )
