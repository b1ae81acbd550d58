"""Golden bytes, both ways; and what of them may differ: padding, tails, slots, flags."""

from __future__ import annotations

import pytest

from tests.message.document import rows
from tests.message.golden import (
    BACKEND_REPLIES,
    BACKEND_REQUESTS,
    FRONTEND_REPLIES,
    FRONTEND_REQUESTS,
    HIGH,
    LOW,
    NONE,
    XEN_REGION,
    Golden,
)
from vhost_user.errors import PeerError
from vhost_user.message import (
    HEADER,
    U64,
    DeviceStateReply,
    Header,
    Inflight,
    Iotlb,
    MacAddress,
    MemoryTable,
    MessageSpec,
    Mmap,
    Payload,
    ProtocolFeature,
    Reply,
    ShmemConfig,
    SingleMemoryRegion,
    XenMemoryTable,
    decode_payload,
    decode_reply,
    encode_message,
    spec_of,
)

REQUESTS = [(False, golden) for golden in FRONTEND_REQUESTS] + [(True, golden) for golden in BACKEND_REQUESTS]
REPLIES = [(False, golden) for golden in FRONTEND_REPLIES] + [(True, golden) for golden in BACKEND_REPLIES]


def spec_for(backend_channel: bool, golden: Golden) -> MessageSpec:
    header = Header.decode(golden.data[: HEADER.size])
    return spec_of(header.request, golden.acked, backend_channel=backend_channel, postcopy=golden.postcopy)


def test_there_is_a_golden_request_for_every_row() -> None:
    shown = [spec_for(*each) for each in REQUESTS]
    for row in rows():
        acked = ProtocolFeature[row.feature] if row.feature else NONE
        assert spec_of(row.number, acked, backend_channel=row.backend_channel) in shown, row


def test_there_is_a_golden_reply_for_every_message_that_has_its_own() -> None:
    shown = [spec_for(*each) for each in REPLIES]
    for row in rows():
        spec = spec_of(
            row.number,
            ProtocolFeature[row.feature] if row.feature else NONE,
            backend_channel=row.backend_channel,
        )
        assert spec in shown or spec.reply is Reply.ACK, row


@pytest.mark.parametrize(("backend_channel", "golden"), REQUESTS, ids=lambda value: getattr(value, "text", "")[:26])
def test_request(backend_channel: bool, golden: Golden) -> None:
    header, body = Header.decode(golden.data[: HEADER.size]), golden.data[HEADER.size :]
    assert (header.version, header.reply, header.need_reply, header.size) == (1, False, False, len(body))
    spec = spec_for(backend_channel, golden)
    assert encode_message(spec.request, golden.payload.encode()) == golden.data
    decoded = decode_payload(spec, body, golden.fds)
    assert type(decoded) is spec.payload
    assert decoded == golden.payload


@pytest.mark.parametrize(("backend_channel", "golden"), REPLIES, ids=lambda value: getattr(value, "text", "")[:26])
def test_reply(backend_channel: bool, golden: Golden) -> None:
    header, body = Header.decode(golden.data[: HEADER.size]), golden.data[HEADER.size :]
    assert (header.version, header.reply, header.need_reply, header.size) == (1, True, False, len(body))
    spec = spec_for(backend_channel, golden)
    assert encode_message(spec.request, golden.payload.encode(), reply=True) == golden.data
    assert decode_reply(spec, body, golden.fds) == golden.payload


def test_flags() -> None:
    assert encode_message(2, U64(1).encode(), need_reply=True) == bytes.fromhex(
        "02000000 09000000 08000000 0100000000000000"
    )
    header = Header.decode(bytes.fromhex("02000000 09000000 08000000"))
    assert (header.request, header.flags, header.size) == (2, 9, 8)
    assert (header.reply, header.need_reply) == (False, True)


def test_need_reply_may_be_left_in_a_reply() -> None:
    """Seen: QEMU's storage daemon answers with flags 0xd. QEMU takes nothing but 0x5, so we send that."""
    header = Header.decode(bytes.fromhex("01000000 0d000000 08000000"))
    assert (header.reply, header.need_reply) == (True, True)


def test_bits_of_flags_without_a_meaning_are_ignored() -> None:
    header = Header.decode(bytes.fromhex("01000000 f1ffffff 00000000"))
    assert (header.version, header.reply, header.need_reply) == (1, False, False)


@pytest.mark.parametrize("regions", [(), (LOW,), (LOW, HIGH), (HIGH,) * 7])
def test_table_may_have_all_eight_slots(regions: tuple[object, ...]) -> None:
    """Seen: a table of 264 bytes is taken by three daemons of four; the document draws eight slots."""
    table = MemoryTable(regions)  # type: ignore[arg-type]
    padded = table.encode().ljust(264, b"\xff")
    assert decode_payload(spec_of(5, NONE), padded, len(regions)) == table


def test_xen_table_may_have_all_eight_slots() -> None:
    table = XenMemoryTable((XEN_REGION,))
    assert XenMemoryTable.decode(table.encode().ljust(8 + 8 * 40, b"\xff")) == table


# What is overwritten with 0xff, from where to where, without a difference.
PADDING: list[tuple[Payload, int, int]] = [
    (SingleMemoryRegion(LOW), 0, 8),
    (MemoryTable((LOW,)), 4, 8),
    (Inflight.decode(bytes(24)), 20, 24),
    (Iotlb.decode(bytes(25) + b"\1" + bytes(6)), 26, 32),
    (Mmap.decode(b"\1" + bytes(23) + b"\1" + bytes(15)), 1, 8),
    (ShmemConfig.decode(bytes(2056)), 4, 8),
    (MacAddress(b"123456"), 6, 8),
    (DeviceStateReply(2, no_fd=True), 2, 8),
]


@pytest.mark.parametrize(("payload", "start", "end"), PADDING, ids=lambda value: type(value).__name__)
def test_padding_does_not_matter(payload: Payload, start: int, end: int) -> None:
    data = payload.encode()
    assert data[start:end] in {bytes(end - start), b"\1" + bytes(end - start - 1)[1:]}
    assert type(payload).decode(data[:start] + b"\xff" * (end - start) + data[end:]) == payload


@pytest.mark.parametrize("wire_size", [20, 24])
def test_answer_has_the_size_of_its_question(wire_size: int) -> None:
    request = Inflight.decode(bytes(16) + b"\1\0\2\0" + bytes(wire_size - 20))
    answer = request.answer(4096, 0)  # type: ignore[arg-type]
    assert (answer.num_queues, answer.queue_size, answer.mmap_size) == (1, 2, 4096)
    assert len(answer.encode()) == wire_size


def test_map_is_writable_by_its_flag() -> None:
    assert [Mmap(0, *(0, 0, 1), flags).writable for flags in (0, 1, 2, 3)] == [False, True, False, True]  # type: ignore[arg-type]


def test_device_state_reply_never_brings_a_channel_with_an_error() -> None:
    spec = spec_of(42, NONE)
    assert decode_reply(spec, U64(3).encode(), 0) == DeviceStateReply(3, no_fd=False)
    for value in (3, 0x103, 0x100):
        with pytest.raises(PeerError, match="descriptors=1: has to be 0 "):
            decode_reply(spec, U64(value).encode(), 1)
    with pytest.raises(PeerError, match="descriptors=0: has to be 1 "):
        decode_reply(spec, U64(0).encode(), 0)


def test_table_as_an_answer_brings_no_descriptors() -> None:
    spec = spec_of(5, NONE, postcopy=True)
    with pytest.raises(PeerError, match="descriptors=1: has to be 0 "):
        decode_reply(spec, MemoryTable((LOW,)).encode(), 1)
