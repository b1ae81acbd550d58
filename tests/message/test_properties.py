"""Every payload there and back, cut short, too long; and any bytes at all."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.counts import PAYLOAD_BODIES
from tests.message.strategies import PAYLOADS, U32, all_specs
from vhost_user.errors import PeerError
from vhost_user.message import (
    HEADER,
    MAX_PAYLOAD,
    Config,
    CryptoSession,
    Header,
    Inflight,
    Iotlb,
    MessageSpec,
    Opaque,
    PackedBase,
    Payload,
    SplitBase,
    decode_payload,
    decode_reply,
    encode_message,
)

KINDS = list(PAYLOADS)
WITHOUT_A_LAYOUT = (Opaque, CryptoSession)


def test_every_kind_that_a_message_has_is_tested() -> None:
    assert {kind for spec in all_specs() for kind in (spec.payload, spec.reply_payload)} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_there_and_back(kind: type[Payload], data: st.DataObject) -> None:
    payload = data.draw(PAYLOADS[kind])
    encoded = payload.encode()
    assert len(encoded) <= kind.max_size() <= MAX_PAYLOAD
    assert kind.decode(encoded) == payload
    assert kind.decode(memoryview(encoded)) == payload  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_A_LAYOUT])
@given(data=st.data())
def test_cut_short_or_too_long(kind: type[Payload], data: st.DataObject) -> None:
    payload = data.draw(PAYLOADS[kind])
    encoded = payload.encode()
    lengths = range(len(encoded)) if len(encoded) < 400 else data.draw(st.sets(st.integers(0, len(encoded) - 1)))
    for length in lengths:
        refused_or_another_size(kind, payload, encoded[:length])
    for extra in range(1, 50):
        refused_or_another_size(kind, payload, encoded + bytes(extra))


def refused_or_another_size(kind: type[Payload], payload: Payload, data: bytes) -> None:
    """PeerError, but for a tail, or empty slots, that belong to the same payload or may be left out."""
    outcome = outcome_of(kind, data)
    if isinstance(outcome, PeerError):
        assert outcome.field in {"size", "config size"}
        return
    assert len(data) == kind.max_size() or kind in {Inflight, Iotlb}
    names = set(type(payload).__match_args__) - {"wire_size"}  # type: ignore[attr-defined]
    assert all(getattr(outcome, name) == getattr(payload, name) for name in names)


def outcome_of(kind: type[Payload], data: bytes) -> Payload | PeerError:
    try:
        return kind.decode(data)
    except PeerError as error:
        return error


@settings(max_examples=PAYLOAD_BODIES)
@given(spec=st.sampled_from(all_specs()), count=st.integers(0, 9), reply=st.booleans(), data=st.data())
def test_any_bytes_are_a_payload_or_a_violation(
    spec: MessageSpec, count: int, reply: bool, data: st.DataObject
) -> None:
    decode, kind = (decode_reply, spec.reply_payload) if reply else (decode_payload, spec.payload)
    valid = PAYLOADS[kind].map(lambda payload: payload.encode())
    body = data.draw(st.binary(max_size=400) | valid.flatmap(near))
    with suppress(PeerError):
        decoded = decode(spec, body, count)
        again = decoded.encode()
        assert type(decoded).decode(again) == decoded
        assert len(encode_message(spec.request, again)) <= HEADER.size + MAX_PAYLOAD


@st.composite
def near(draw: st.DrawFn, valid: bytes) -> bytes:
    """`valid`, with a few of its bytes changed: the size is right, and most of what is in it."""
    changed = bytearray(valid)
    for at in draw(st.lists(st.integers(0, max(0, len(valid) - 1)), max_size=4)) if valid else ():
        changed[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    return bytes(changed)


@given(data=st.binary(max_size=16) | st.tuples(U32, U32, U32).map(lambda numbers: HEADER.pack(*numbers)))
def test_any_bytes_are_a_header_or_a_violation(data: bytes) -> None:
    with suppress(PeerError):
        header = Header.decode(data)
        assert len(data) == HEADER.size
        assert (header.version, header.size) == (1, min(header.size, MAX_PAYLOAD))
        assert HEADER.pack(header.request, header.flags, header.size) == data


@given(num=st.integers(0, 2**32 - 1))
def test_packed_base_there_and_back(num: int) -> None:
    assert PackedBase.from_num(num).to_num() == num


@given(num=st.integers(0, 2**32 - 1) | st.integers(0, 2**16 + 1))
def test_split_base_there_and_back(num: int) -> None:
    with suppress(PeerError):
        assert SplitBase.from_num(num).to_num() == num
        assert num < 2**16


def test_config_data_is_a_copy() -> None:
    body = bytearray(Config(0, 0, b"abc").encode())
    config = Config.decode(body)  # type: ignore[arg-type]
    body[-1] = 0
    assert config.data == b"abc"
