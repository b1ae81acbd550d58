"""A session puts down every call with its answer, and its words can be read back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_user.errors import UsageError
from vhost_user.units import MIB, ByteCount, GuestAddress
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Chain, Odd, Refused, Subject, TargetFailure, Used, Wish
from virtio_mem.conformance.words import (
    Answer,
    Place,
    chain_words,
    parse_chain,
    parse_wish,
    request_bytes,
    wish_words,
)
from virtio_mem.protocol import BlockState, ConfigSpace, RequestType, ResponseType

ADDR = 4 << 30
BLOCK = 2 * MIB
PLACE = Place(ADDR, BLOCK)


class Parrot(Subject):
    """Says what it was told to say."""

    offered_features = 1 << 32 | 1 << 63

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.seen: list[Chain] = []
        self.memory = bytearray(4 * BLOCK)

    def begin(self, features: int) -> bool:
        return features == 1 << 32

    def config(self) -> ConfigSpace:
        size = ByteCount(4 * BLOCK)
        return ConfigSpace(ByteCount(BLOCK), 0, GuestAddress(ADDR), size, size, ByteCount(0), size)

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        self.seen += chains
        if not self.answers:
            raise TargetFailure("gone")
        answers, self.answers = self.answers[: len(chains)], self.answers[len(chains) :]
        return [Used(len(answer), answer.ljust(10, b"\xa5")) for answer in answers]

    def device_reset(self) -> None:
        pass

    def close(self) -> None:
        pass

    def set_target(self, requested_size: int) -> None:
        if requested_size > 4 * BLOCK:
            raise Refused("too\nmuch")

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.memory[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.memory[offset : offset + len(data)] = data


def answer(type_: int, state: int = 0) -> bytes:
    return type_.to_bytes(2, "little") + b"\xff" * 6 + state.to_bytes(2, "little")


def test_each_call_is_a_line() -> None:
    subject = Parrot()
    session = Session(subject, Wish(64 * MIB, BLOCK, 0, 3))
    assert session.begin()
    assert not session.begin(5)
    subject.answers = [answer(0), answer(1), answer(0, 2), answer(3, 9), answer(2), answer(0), answer(3)]
    session.plug(0, 4)
    session.unplug(-1)
    session.state(3, 2)
    session.ask(0xFFFF, ADDR + BLOCK + 0x1000, 1)
    session.unplug_all()
    session.batch([session.request(RequestType.PLUG, 1), session.request(RequestType.STATE, 0, 2, shift=1)])
    session.set_target(BLOCK)
    session.set_target(8 * BLOCK)
    session.device_reset()
    assert session.lines == [
        "wish region_size=67108864 block_size=2097152 requested_size=0 node_id=3",
        "begin -> agreed 0x100000000",
        "begin 0x5 -> refused 0x5",
        (
            "config -> block_size=2097152 node_id=0 addr=0x100000000 region_size=8388608 usable_region_size=8388608 "
            "plugged_size=0 requested_size=8388608"
        ),
        "plug 0 4 -> ACK",
        "unplug -1 1 -> NACK",
        "state 3 2 -> ACK MIXED",
        "ask 65535 b1+0x1000 1 -> ERROR",
        "unplug_all -> BUSY",
        "batch plug 1 1 | ask 3 b0+0x1 2 -> ACK | ERROR",
        "target 2097152 -> done",
        "target 16777216 -> refused: too much",
        "device_reset -> done",
    ]


def test_a_failure_is_a_line_too() -> None:
    session = Session(Parrot(), Wish())
    with pytest.raises(TargetFailure):
        session.plug(0)
    assert session.lines[-1] == "plug 0 1 -> failure: gone"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "0 bytes: a5a5a5a5a5a5a5a5a5a5"),
        (answer(0)[:9], "9 bytes: 0000ffffffffffff00a5"),
        (answer(4), "10 bytes: 0400ffffffffffff0000"),
        (answer(0, 3), "10 bytes: 0000ffffffffffff0300"),
    ],
)
def test_what_is_no_answer_is_kept_as_it_is(raw: bytes, words: str) -> None:
    subject = Parrot()
    session = Session(subject, Wish())
    subject.answers = [raw]
    got = session.state(0)
    assert (got.type, got.state) == (None, None)
    assert session.lines[-1] == f"state 0 1 -> {words}"


def test_an_answer_of_another_length_says_so() -> None:
    request = request_bytes(RequestType.PLUG, ADDR, 1)
    assert str(Answer.of(request, Used(12, answer(1) + b"xx"))) == "NACK in 12 bytes"


def test_a_state_is_read_of_a_granted_state_only() -> None:
    asked = request_bytes(RequestType.STATE, ADDR, 1)
    assert Answer.of(asked, Used(10, answer(0, 1)))[:2] == (ResponseType.ACK, BlockState.UNPLUGGED)
    assert Answer.of(asked, Used(10, answer(3, 77)))[:2] == (ResponseType.ERROR, None)
    assert Answer.of(request_bytes(RequestType.PLUG, ADDR, 1), Used(10, answer(0, 77)))[:2] == (ResponseType.ACK, None)


def test_contents_follow_from_a_seed() -> None:
    subject = Parrot()
    session = Session(subject, Wish())
    session.fill(1, 2, 7)
    assert session.same(1, 2, 7)
    assert session.same(2, 1, 7)
    assert not session.same(1, 2, 8)
    subject.memory[3 * BLOCK - 1] ^= 1
    assert not session.same(1, 2, 7)
    assert session.same(1, 1, 7)
    assert session.lines[-1] == "same 1 1 7 -> yes"
    assert not any(subject.memory[:BLOCK])


REQUESTS = st.builds(
    lambda type_, addr, nb_blocks, pad, tail, more: request_bytes(type_, addr, nb_blocks, pad=pad, tail=tail) + more,
    st.sampled_from([0, 1, 2, 3, 4, 0xFFFF]),
    st.integers(0, 2**64 - 1) | st.integers(-5, 5).map(lambda block: ADDR + block * BLOCK),
    st.integers(0, 0xFFFF),
    st.just(bytes(6)) | st.binary(min_size=6, max_size=6),
    st.just(bytes(6)) | st.binary(min_size=6, max_size=6),
    st.just(b"") | st.binary(max_size=9),
)
LENGTHS = st.lists(st.integers(1, 64), max_size=3).map(tuple)


@given(
    st.builds(
        Chain,
        REQUESTS | st.binary(max_size=23),
        LENGTHS | st.just((24,)),
        LENGTHS | st.just((10,)),
        st.booleans(),
        st.integers(0, 255) | st.just(0xA5),
        st.sampled_from(range(8)).map(Odd),
    )
)
def test_every_request_can_be_read_back(chain: Chain) -> None:
    assert parse_chain(chain_words(chain, PLACE), PLACE) == chain


def test_a_request_moves_with_the_region() -> None:
    chain = Chain(request_bytes(RequestType.PLUG, ADDR + BLOCK // 2, 3))
    other = Place(64 << 30, 8 * MIB)
    moved = parse_chain(chain_words(chain, PLACE), other)
    assert moved == Chain(request_bytes(RequestType.PLUG, other.addr + BLOCK // 2, 3))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plug",
        "plug a 1",
        "ask 0 4 1",
        "plug 0 65536",
        "chain",
        "chain hex=0",
        "chain hex=00 fill=256",
        "chain hex=00 odd=8",
        "dance",
    ],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        parse_chain(text, PLACE)


@pytest.mark.parametrize("wish", [Wish(), Wish(1, 2, 3, 4)])
def test_a_wish_can_be_read_back(wish: Wish) -> None:
    assert parse_wish(wish_words(wish)) == wish


@pytest.mark.parametrize(
    "text", ["", "wish", "wish node_id=1 other=2", "config node_id=1", "wish node_id=none region_size=x"]
)
def test_other_wishes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        parse_wish(text)
