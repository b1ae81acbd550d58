"""Our tables against the document's: every message, its sizes, its answer, its descriptors, its features."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.message.document import BACKEND, FEATURES, FRONTEND, Row, counts, rows, sizes
from tests.message.strategies import PAYLOADS, all_specs
from vhost_user.errors import PeerError
from vhost_user.message import (
    BACKEND_MESSAGES,
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    FRONTEND_MESSAGES,
    MAX_FDS,
    MAX_PAYLOAD,
    VIRTIO_F_IOMMU_PLATFORM,
    BackendRequest,
    FrontendRequest,
    Iotlb,
    MemoryTable,
    MessageSpec,
    Opaque,
    Payload,
    ProtocolFeature,
    Reply,
    SingleMemoryRegion,
    XenMemoryTable,
    XenSingleMemoryRegion,
    decode_payload,
    decode_reply,
    name_of,
    spec_of,
)

NONE = ProtocolFeature.NONE
EVERY_FEATURE = ProtocolFeature(2**23 - 1)


def spec_for(row: Row) -> MessageSpec:
    acked = ProtocolFeature[row.feature] if row.feature else NONE
    return spec_of(row.number, acked, backend_channel=row.backend_channel)


def names(text: str) -> dict[int, str]:
    return {int(line.split()[0]): line.split()[1].rpartition(":")[2] for line in text.strip().splitlines()}


def test_requests_are_those_of_the_document() -> None:
    assert {request.value: request.name for request in FrontendRequest} == names(FRONTEND)
    assert {request.value: request.name for request in BackendRequest} == names(BACKEND)
    assert list(FRONTEND_MESSAGES) == list(FrontendRequest)
    assert list(BACKEND_MESSAGES) == list(BackendRequest)
    assert all(FRONTEND_MESSAGES[request].request is request for request in FrontendRequest)
    assert all(BACKEND_MESSAGES[request].request is request for request in BackendRequest)


def test_feature_bits_are_those_of_the_document() -> None:
    bits = FEATURES.split()
    assert {name: 1 << bit for bit, name in enumerate(bits)} == {each.name: each.value for each in ProtocolFeature}
    assert (F_LOG_ALL, F_PROTOCOL_FEATURES, VIRTIO_F_IOMMU_PLATFORM) == (1 << 26, 1 << 30, 1 << 33)


def test_rows_are_all_there_is() -> None:
    assert len(rows()) == 58 == len(all_specs())
    assert {id(spec_for(row)) for row in rows()} == {id(spec) for spec in all_specs()}


@pytest.mark.parametrize("row", rows(), ids=str)
def test_message_is_as_the_document_has_it(row: Row) -> None:
    spec = spec_for(row)
    assert spec.name == f"{row.name} ({row.number})"
    assert spec.reply is (Reply.ACK if row.answer == "ack" else Reply.ALWAYS)
    assert (spec.fds, spec.reply_fds) == (bounds(row.fds), bounds(row.answer_fds))
    assert {feature.name for feature in spec.needs} == set(row.needs)


def bounds(column: str) -> tuple[int, int]:
    return min(counts(column)), max(counts(column))


@pytest.mark.parametrize("row", rows(), ids=str)
def test_sizes_are_those_of_the_document(row: Row) -> None:
    spec = spec_for(row)
    assert accepted_sizes(spec.payload) == sizes(row.payload)
    empty = {0} if spec.empty_reply else set()
    assert accepted_sizes(spec.reply_payload) | empty == sizes("8" if row.answer == "ack" else row.answer)


@cache
def accepted_sizes(kind: type[Payload]) -> set[int]:
    """Of which sizes, up to 2100 bytes, some payload of a kind is."""
    return {size for size in range(2101) if any(decodes(kind, body) for body in candidates(size))}


@cache
def candidates(size: int) -> list[bytes]:
    """Bodies of one size; for every kind that has this size, one of them is of that kind."""
    ones = (b"\1" + bytes(7)) * (size // 8 + 1)
    bit_8 = b"\0\1" + bytes(size)
    config = bytes(4) + max(0, size - 12).to_bytes(4, "little") + bytes(size)
    tables = [bytes([count]) + bytes(7) + ones for count in {(size - 8) // 32 & 15, (size - 8) // 40 & 15}]
    # Permissions and type are the last two bytes of an IOTLB message, in front of its tail.
    iotlb = ones[:24] + b"\3\2" + bytes(size)
    return [body[:size] for body in (bytes(size), ones, bit_8, config, *tables, iotlb)]


def decodes(kind: type[Payload], body: bytes) -> bool:
    try:
        kind.decode(body)
    except PeerError:
        return False
    return True


@pytest.mark.parametrize("number", [0, 45, 77, 2**32 - 1])
def test_request_that_is_none_is_refused(number: int) -> None:
    with pytest.raises(PeerError, match=f"request={number}: "):
        spec_of(number, EVERY_FEATURE)
    assert name_of(number) == f"unknown request {number}"


@pytest.mark.parametrize("number", [0, 11, 44])
def test_back_end_channel_has_numbers_of_its_own(number: int) -> None:
    with pytest.raises(PeerError, match=f"request={number}: "):
        spec_of(number, EVERY_FEATURE, backend_channel=True)
    assert name_of(number, backend_channel=True) == f"unknown request {number}"
    assert name_of(9, backend_channel=True) == "SHMEM_MAP (9)"
    assert name_of(9) == "SET_VRING_ADDR (9)"


def test_each_direction_has_an_iotlb_message() -> None:
    assert spec_of(22, NONE).payload is spec_of(1, NONE, backend_channel=True).payload is Iotlb
    assert spec_of(22, NONE).needs_virtio == spec_of(1, NONE, backend_channel=True).needs_virtio == 1 << 33


def test_virtio_bit_30_is_needed_by_three_messages_and_acked_for_one() -> None:
    needing = {spec.request: spec.offered_suffices for spec in all_specs() if spec.needs_virtio == F_PROTOCOL_FEATURES}
    assert needing == {
        FrontendRequest.GET_PROTOCOL_FEATURES: True,
        FrontendRequest.SET_PROTOCOL_FEATURES: True,
        FrontendRequest.SET_VRING_ENABLE: False,
    }


def test_back_end_sends_descriptors_only_under_a_feature() -> None:
    needing = {spec.request for spec in all_specs() if spec.needs_for_fds}
    assert needing == {BackendRequest.VRING_HOST_NOTIFIER_MSG, BackendRequest.SHMEM_MAP}
    assert all(spec.needs_for_fds in {NONE, ProtocolFeature.BACKEND_SEND_FD} for spec in all_specs())


def test_only_features_that_bring_a_variant_choose_it() -> None:
    for spec in all_specs():
        if spec.variants:
            (feature, variant), plain = spec.variants[0], EVERY_FEATURE & ~spec.variants[0][0]
            assert spec_of(spec.request, plain) is spec
            assert spec_of(spec.request, feature) is spec_of(spec.request, EVERY_FEATURE) is variant
    assert spec_of(6, ProtocolFeature.LOG_SHMFD).reply_payload is Opaque


@pytest.mark.parametrize(
    ("number", "acked", "kind"),
    [
        (5, NONE, MemoryTable),
        (5, ProtocolFeature.XEN_MMAP, XenMemoryTable),
        (37, NONE, SingleMemoryRegion),
        (37, ProtocolFeature.XEN_MMAP, XenSingleMemoryRegion),
    ],
)
def test_postcopy_answers_with_regions(number: int, acked: ProtocolFeature, kind: type[Payload]) -> None:
    assert spec_of(number, acked).reply is Reply.ACK
    spec = spec_of(number, acked, postcopy=True)
    assert (spec.reply, spec.reply_payload, spec.payload) == (Reply.ALWAYS, kind, kind)
    assert spec.reply_fds == (0, 0)


def test_postcopy_changes_no_other_answer() -> None:
    for spec in all_specs():
        if spec.request not in (FrontendRequest.SET_MEM_TABLE, FrontendRequest.ADD_MEM_REG):
            channel = isinstance(spec.request, BackendRequest)
            assert spec_of(spec.request, NONE, backend_channel=channel, postcopy=True) is spec_of(
                spec.request, NONE, backend_channel=channel
            )


def test_tables_stay_as_they_are() -> None:
    with pytest.raises(TypeError):
        FRONTEND_MESSAGES[FrontendRequest.SET_OWNER] = FRONTEND_MESSAGES[FrontendRequest.GET_FEATURES]  # type: ignore[index]


def test_largest_payload_is_a_configuration_message() -> None:
    assert MAX_PAYLOAD == 12 + 4096 == max(kind.max_size() for kind in PAYLOADS)
    assert max(spec.fds[1] for spec in all_specs()) == MAX_FDS


@pytest.mark.parametrize("row", rows(), ids=str)
def test_other_numbers_of_descriptors_are_refused(row: Row) -> None:
    spec = spec_for(row)
    assert accepted_counts(decode_payload, spec, spec.payload) == counts(row.fds)
    assert accepted_counts(decode_reply, spec, spec.reply_payload) == counts(row.answer_fds)


Decode = Callable[[MessageSpec, bytes, int], Payload]


def accepted_counts(decode: Decode, spec: MessageSpec, kind: type[Payload]) -> set[int]:
    some_sizes = sorted(accepted_sizes(kind))[:9]
    bodies = [body for size in some_sizes for body in candidates(size) if decodes(kind, body)]
    return {count for count in (*range(10), 253) for body in bodies if accepts(decode, spec, body, count)}


def accepts(decode: Decode, spec: MessageSpec, body: bytes, count: int) -> bool:
    try:
        decode(spec, body, count)
    except PeerError as error:
        if (error.field, error.value) != ("descriptors", count):
            raise
        return False
    return True
