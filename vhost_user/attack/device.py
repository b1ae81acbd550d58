"""Attacks on what belongs to the device: configuration space, state on its way through a pipe, status."""

from __future__ import annotations

import os
import select
import struct
import time
from contextlib import suppress
from functools import partial

from vhost_user.attack.attacker import ODD_FDS, Attacker, NotReached
from vhost_user.attack.theme import Outcome, Reaction, Theme
from vhost_user.errors import Disconnected, FieldError
from vhost_user.message import U64, DeviceState, FrontendRequest, ProtocolFeature, TransferDirection
from vhost_user.owned_fd import OwnedFd

F = FrontendRequest
CONFIG = ProtocolFeature.CONFIG
STATE = ProtocolFeature.DEVICE_STATE
STATUS = ProtocolFeature.STATUS
config = Theme("config")
state = Theme("state")
status = Theme("status")

_PIECES = 1024
"""Pieces of 64 KiB that a writer without end writes."""

# Configuration space. Offset, size and flags, and how many bytes are really there.

_MUST_FAIL = ""
_CONFIGS: tuple[tuple[str, str, str, int, int, int, int, str], ...] = (
    ("offset-max", "vhost-user: configuration space", "at offset 2**32 - 1", 0xFFFFFFFF, 8, 0, 8, _MUST_FAIL),
    ("wrap", "vhost-user: configuration space", "whose offset and size wrap", 0xFFFFFFF8, 16, 0, 16, _MUST_FAIL),
    (
        "wrap-to-little",
        "vhost-user: configuration space",
        "whose size and offset sum to 8",
        0xFFFFFFFF,
        9,
        0,
        9,
        _MUST_FAIL,
    ),
    ("beyond", "vhost-user: configuration space", "behind the end of any such space", 4096, 8, 0, 8, _MUST_FAIL),
    ("size-zero", "vhost-user: configuration space", "of no bytes", 0, 0, 0, 0, "no byte of it is wrong"),
    (
        "size-max",
        "vhost-user: configuration space",
        "that says 2**32 - 1 bytes and has 8",
        0,
        0xFFFFFFFF,
        0,
        8,
        _MUST_FAIL,
    ),
    ("size-more", "vhost-user: configuration space", "that says 256 bytes and has 8", 0, 256, 0, 8, _MUST_FAIL),
    (
        "size-less",
        "vhost-user: configuration space",
        "that says 8 bytes and has 64",
        0,
        8,
        0,
        64,
        "the rest has no meaning",
    ),
    ("largest", "vhost-user: configuration space", "of 4096 bytes", 0, 4096, 0, 4096, "a space may be so large"),
    ("flags", "vhost-user: configuration space", "with flags of 7", 0, 8, 7, 8, "only SET_CONFIG has to look at flags"),
)


def _config(request: FrontendRequest, offset: int, size: int, flags: int, there: int, attacker: Attacker) -> Outcome:
    line = attacker.negotiate()
    return line.provoke(request, struct.pack("=III", offset, size, flags) + bytes(there))


for _name, _source, _says, _offset, _size, _flags, _there, _lawful in _CONFIGS:
    _act = partial(_config, F.GET_CONFIG, _offset, _size, _flags, _there)
    config.add(f"get.{_name}", _source, f"GET_CONFIG {_says}.", _act, needs=CONFIG, lawful=_lawful)
    _act = partial(_config, F.SET_CONFIG, _offset, _size, _flags, _there)
    _lawful_set = _lawful if _name in {"size-zero", "size-less"} else ""
    config.add(f"set.{_name}", _source, f"SET_CONFIG {_says}.", _act, needs=CONFIG, lawful=_lawful_set)


@config.attack("get.without-body", "vhost-user: configuration space", needs=CONFIG)
def get_without_body(attacker: Attacker) -> Outcome:
    """GET_CONFIG of 8 bytes whose place for them is missing."""
    return attacker.negotiate().provoke(F.GET_CONFIG, struct.pack("=III", 0, 8, 0))


# Device state.


def _state(direction: int, phase: int, attacker: Attacker) -> Outcome:
    reading, writing = attacker.pipe()
    line = attacker.negotiate()
    end = reading if direction == TransferDirection.LOAD else writing
    return line.provoke(F.SET_DEVICE_STATE_FD, DeviceState(direction, phase), [end.fileno()])


for _name, _direction, _phase in (
    ("direction-9", 9, 0),
    ("direction-max", 0xFFFFFFFF, 0),
    ("phase-1", 0, 1),
    ("phase-max", 1, 0xFFFFFFFF),
):
    state.add(
        _name,
        "vhost-user: device state",
        f"SET_DEVICE_STATE_FD with direction {_direction} and phase {_phase}.",
        partial(_state, _direction, _phase),
        needs=STATE,
    )


def _state_of_kind(kind: str, direction: TransferDirection, attacker: Attacker) -> Outcome:
    line = attacker.negotiate()
    fd = attacker.odd_fd(kind)
    outcome = line.provoke(F.SET_DEVICE_STATE_FD, DeviceState(direction), [fd])
    if outcome.reaction is not Reaction.ACCEPTED:
        return outcome
    line.timeout = attacker.patience
    return _checked(attacker, outcome)


def _checked(attacker: Attacker, before: Outcome) -> Outcome:
    """CHECK_DEVICE_STATE: a transfer that can't have gone well must not have."""
    try:
        failed = attacker.line.ask_number(F.CHECK_DEVICE_STATE)
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    except FieldError:
        return Outcome(Reaction.SILENT, "CHECK_DEVICE_STATE waits for the transfer's end")
    if failed:
        return Outcome(Reaction.REFUSED, "by CHECK_DEVICE_STATE")
    return Outcome(Reaction.ACCEPTED, ", ".join(filter(None, (before.detail, "CHECK_DEVICE_STATE is 0"))))


_BY_READ_AND_WRITE = "whatever can be read and written serves"
for _direction_ in TransferDirection:
    for _kind in ODD_FDS:
        state.add(
            f"{_direction_.name.lower()}.{_kind}",
            "vhost-user: device state",
            f"SET_DEVICE_STATE_FD, {_direction_.name.lower()}, with a descriptor of this kind: {_kind}.",
            partial(_state_of_kind, _kind, _direction_),
            needs=STATE,
            lawful=_BY_READ_AND_WRITE,
        )


@state.attack("fds-none", "CVE-2019-14818", needs=STATE)
def fds_none(attacker: Attacker) -> Outcome:
    """SET_DEVICE_STATE_FD without a descriptor."""
    return attacker.negotiate().provoke(F.SET_DEVICE_STATE_FD, DeviceState(TransferDirection.SAVE))


@state.attack("fds-two", "CVE-2022-0669", needs=STATE)
def fds_two(attacker: Attacker) -> Outcome:
    """SET_DEVICE_STATE_FD with both ends of a pipe."""
    ends = [end.fileno() for end in attacker.pipe()]
    return attacker.negotiate().provoke(F.SET_DEVICE_STATE_FD, DeviceState(TransferDirection.SAVE), ends)


def _begin(attacker: Attacker, direction: TransferDirection) -> OwnedFd:
    """Begin a transfer; our end of its pipe."""
    ends = attacker.pipe()
    theirs, ours = ends if direction is TransferDirection.LOAD else reversed(ends)
    line = attacker.negotiate()
    outcome = line.provoke(F.SET_DEVICE_STATE_FD, DeviceState(direction), [theirs.fileno()])
    if outcome.reaction is not Reaction.ACCEPTED:
        raise NotReached(f"a transfer of state: {outcome}")
    theirs.close()
    line.timeout = attacker.patience
    return ours


@state.attack("load.garbage", "vhost-user: device state", needs=STATE)
def load_garbage(attacker: Attacker) -> Outcome:
    """Random bytes as state, to their end, and CHECK_DEVICE_STATE."""
    with _begin(attacker, TransferDirection.LOAD) as pipe:
        os.write(pipe.fileno(), attacker.rng.randbytes(1000))
    attacker.line.timeout = attacker.timeout
    return _checked(attacker, Outcome(Reaction.ACCEPTED))


@state.attack("load.nothing", "vhost-user: device state", needs=STATE, lawful="a device may have no state")
def load_nothing(attacker: Attacker) -> Outcome:
    """State of no bytes, and CHECK_DEVICE_STATE."""
    _begin(attacker, TransferDirection.LOAD).close()
    attacker.line.timeout = attacker.timeout
    return _checked(attacker, Outcome(Reaction.ACCEPTED))


@state.attack("load.without-end", "vhost-user: device state", needs=STATE)
def load_without_end(attacker: Attacker) -> Outcome:
    """64 MiB of state, or as much as the daemon takes, whose end never comes, and CHECK_DEVICE_STATE."""
    pipe = _begin(attacker, TransferDirection.LOAD).fileno()
    os.set_blocking(pipe, False)
    piece, pieces = bytes(1 << 16), 0
    deadline = time.monotonic() + attacker.timeout
    with suppress(BrokenPipeError):
        while pieces < _PIECES and time.monotonic() < deadline:
            try:
                pieces += os.write(pipe, piece) > 0
            except BlockingIOError:  # it reads no more, or is not as fast as we are
                if not select.select([], [pipe], [], attacker.patience)[1]:
                    break
    return _checked(attacker, Outcome(Reaction.ACCEPTED, f"{pieces >> 4} MiB"))


@state.attack("load.no-end", "vhost-user: device state", needs=STATE)
def load_no_end(attacker: Attacker) -> Outcome:
    """A few bytes of state, no end, CHECK_DEVICE_STATE, and the front end is gone while that is waited for."""
    os.write(_begin(attacker, TransferDirection.LOAD).fileno(), b"state")
    return _checked(attacker, Outcome(Reaction.ACCEPTED))


@state.attack("save.unread", "vhost-user: device state", needs=STATE, lawful="a short state fits into the pipe")
def save_unread(attacker: Attacker) -> Outcome:
    """State that is saved into a pipe that nobody reads, and CHECK_DEVICE_STATE."""
    _begin(attacker, TransferDirection.SAVE)
    return _checked(attacker, Outcome(Reaction.ACCEPTED))


@state.attack("save.unreadable", "vhost-user: device state", needs=STATE, lawful="a device may have no state")
def save_unreadable(attacker: Attacker) -> Outcome:
    """State that is saved into a pipe whose reader closes at once, and CHECK_DEVICE_STATE: SIGPIPE."""
    _begin(attacker, TransferDirection.SAVE).close()
    return _checked(attacker, Outcome(Reaction.ACCEPTED))


@state.attack("again-and-again", "vhost-user: device state", needs=STATE, lawful="a new transfer ends the one before")
def state_again_and_again(attacker: Attacker) -> Outcome:
    """Fifty transfers begun, of which none ends."""
    line = attacker.negotiate()
    outcome = Outcome(Reaction.IGNORED)
    for _ in range(50):
        reading, _ = attacker.pipe()
        outcome = line.provoke(F.SET_DEVICE_STATE_FD, DeviceState(TransferDirection.LOAD), [reading.fileno()])
        if outcome.reaction is not Reaction.ACCEPTED:
            break
    return outcome


@state.attack("while-running", "vhost-user: device state", needs=STATE, lawful="the document binds the front end")
def state_while_running(attacker: Attacker) -> Outcome:
    """State that is saved while rings run."""
    attacker.running()
    _, writing = attacker.pipe()
    return attacker.line.provoke(F.SET_DEVICE_STATE_FD, DeviceState(TransferDirection.SAVE), [writing.fileno()])


@state.attack("check-first", "vhost-user: device state", needs=STATE, lawful="what did not begin did not fail")
def check_first(attacker: Attacker) -> Outcome:
    """CHECK_DEVICE_STATE without a transfer."""
    line = attacker.negotiate()
    line.timeout = attacker.patience
    return _checked(attacker, Outcome(Reaction.ACCEPTED))


# Status, MTU.


def _status(value: int, attacker: Attacker) -> Outcome:
    return attacker.negotiate().provoke(F.SET_STATUS, U64(value))


for _value in (0x100, 0xFFFFFFFF, 2**64 - 1):
    status.add(
        f"{_value:#x}",
        "virtio: the status has eight bits",
        f"SET_STATUS of {_value:#x}.",
        partial(_status, _value),
        needs=STATUS,
    )


@status.attack(
    "driver-ok-first", "vhost-user: SET_STATUS", needs=STATUS, lawful="the status mirrors what the driver wrote"
)
def driver_ok_first(attacker: Attacker) -> Outcome:
    """SET_STATUS of DRIVER_OK with no memory and no ring, then 0, then all bits."""
    line = attacker.negotiate()
    outcome = Outcome(Reaction.IGNORED)
    for value in (0x0F, 0, 0xFF):
        outcome = line.provoke(F.SET_STATUS, U64(value))
        if outcome.reaction is Reaction.CLOSED:
            break
    return outcome


def _mtu(value: int, attacker: Attacker) -> Outcome:
    return attacker.negotiate(ProtocolFeature.REPLY_ACK | ProtocolFeature.MTU).provoke(F.NET_SET_MTU, U64(value))


for _value in (0, 67, 2**16, 2**64 - 1):
    status.add(
        f"mtu-{_value:#x}",
        "virtio: an MTU is 68 to 65535",
        f"NET_SET_MTU of {_value}.",
        partial(_mtu, _value),
        needs=ProtocolFeature.MTU,
    )
