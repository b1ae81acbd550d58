"""Wire layouts, against bytes worked out by hand from the struct definitions in the standard."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_user.errors import PeerError
from vhost_user.units import ByteCount, GuestAddress
from virtio_mem.protocol import BlockState, ConfigSpace, Request, RequestType, Response, ResponseType

PLUG_BYTES = bytes.fromhex("0000 000000000000 0000200001000000 4000 000000000000")
STATE_ACK_BYTES = bytes.fromhex("0000 000000000000 0200")
CONFIG_BYTES = bytes.fromhex(
    "0000200000000000"  # block_size, 2 MiB
    "0300 000000000000"  # node_id, padding
    "0000000001000000"  # addr, 4 GiB
    "0000004000000000"  # region_size, 1 GiB
    "0000003000000000"  # usable_region_size, 768 MiB
    "0000400000000000"  # plugged_size, 4 MiB
    "0000002000000000"  # requested_size, 512 MiB
)

u16, u64 = st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1)


def test_golden_request() -> None:
    request = Request(RequestType.PLUG, GuestAddress((4 << 30) + (2 << 20)), 64)
    assert request.encode() == PLUG_BYTES
    assert Request.decode(PLUG_BYTES) == request


def test_golden_response() -> None:
    response = Response(ResponseType.ACK, BlockState.MIXED)
    assert response.encode() == STATE_ACK_BYTES
    assert Response.decode(STATE_ACK_BYTES) == response


def test_golden_configuration_space() -> None:
    sizes = (ByteCount(size << 20) for size in (1024, 768, 4, 512))
    config = ConfigSpace(ByteCount(2 << 20), 3, GuestAddress(4 << 30), *sizes)
    assert config.encode() == CONFIG_BYTES
    assert ConfigSpace.decode(CONFIG_BYTES) == config


@given(u16, u64, u16)
def test_requests_round_trip(type_: int, addr: int, nb_blocks: int) -> None:
    request = Request(type_, GuestAddress(addr), nb_blocks)
    assert Request.decode(request.encode()) == request


@pytest.mark.clause("MEM-PLUG-1", "MEM-PLUG-2", "MEM-UNPLUG-1", "MEM-UNPLUG-2", "MEM-STATE-1", "MEM-STATE-2")
@given(st.binary(min_size=24, max_size=24), st.binary(max_size=40))
def test_padding_and_what_follows_a_request_are_ignored(data: bytes, rest: bytes) -> None:
    clean = data[:2] + bytes(6) + data[8:18] + bytes(6)
    assert Request.decode(data + rest) == Request.decode(clean)


@given(st.binary(max_size=60))
def test_anything_decodes_or_is_the_peers_error(data: bytes) -> None:
    for kind, size in ((Request, 24), (Response, 10), (ConfigSpace, 56)):
        try:
            kind.decode(data)
        except PeerError:
            assert kind is Response or len(data) < size
        else:
            assert len(data) >= size


@pytest.mark.parametrize(("type_", "state"), [(4, 0), (0xFFFF, 0), (0, 3)])
def test_a_response_without_meaning_is_the_peers_error(type_: int, state: int) -> None:
    with pytest.raises(PeerError):
        Response.decode(type_.to_bytes(2, "little") + bytes(6) + state.to_bytes(2, "little"))


@pytest.mark.parametrize("type_", [ResponseType.NACK, ResponseType.BUSY, ResponseType.ERROR])
def test_the_state_of_a_refusal_is_not_looked_at(type_: ResponseType) -> None:
    data = int(type_).to_bytes(2, "little") + b"\xff" * 8
    assert Response.decode(data) == Response(type_)
