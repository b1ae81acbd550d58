"""The strategies that the kit gives to others: what they draw is legal where they say so, and covers what they say."""

from __future__ import annotations

from functools import partial

from hypothesis import find, given, settings
from hypothesis import strategies as st

from tests import counts
from vhost_user.units import MIB, ByteCount, GuestAddress
from virtio_mem.conformance import strategies
from virtio_mem.conformance.target import Chain
from virtio_mem.geometry import Geometry
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, ConfigSpace, Request, RequestType

some = settings(max_examples=counts.HYPOTHESIS_EXAMPLES // 5)
CONFIG = ConfigSpace(
    ByteCount(2 * MIB),
    0,
    GuestAddress(4096 * MIB),
    ByteCount(128 * MIB),
    ByteCount(64 * MIB),
    ByteCount(0),
    ByteCount(32 * MIB),
)


@some
@given(strategies.configs())
def test_configurations_are_legal(config: ConfigSpace) -> None:
    geometry = Geometry(addr=config.addr, region_size=config.region_size, block_size=config.block_size)
    assert geometry.checked_target(config.requested_size) == config.requested_size
    assert config.requested_size <= config.usable_region_size <= config.region_size
    assert config.plugged_size <= config.usable_region_size
    assert ConfigSpace.decode(config.encode()) == config


@some
@given(st.data())
def test_requests_can_be_sent_and_cut_up(data: st.DataObject) -> None:
    request = data.draw(strategies.requests(CONFIG))
    assert Request.decode(request.encode()) == request
    chain = data.draw(strategies.chains(request))
    assert Request.decode(chain.request) == request
    assert sum(chain.readable) == len(chain.request) == REQUEST_SIZE
    assert sum(chain.room) == RESPONSE_SIZE
    assert min(chain.readable + chain.room) > 0


def _is_of(type_: int, request: Request) -> bool:
    return request.type == type_


def test_requests_reach_what_they_should() -> None:
    requests = strategies.requests(CONFIG)
    usable = CONFIG.addr + CONFIG.usable_region_size
    for type_ in RequestType:
        assert find(requests, partial(_is_of, type_))
    assert find(requests, lambda request: request.type > 3)
    assert find(requests, lambda request: request.addr == usable)
    assert find(requests, lambda request: 0 < CONFIG.addr - request.addr <= 2 * CONFIG.block_size)
    assert find(requests, lambda request: bool(request.addr % CONFIG.block_size))


def test_the_simplest_are_drawn_at_last() -> None:
    assert find(strategies.block_runs(64), lambda _: True) == (0, 1)
    wish = find(strategies.wishes(), lambda _: True)
    assert (wish.region_size, wish.block_size, wish.requested_size, wish.node_id) == (2 * MIB, 2 * MIB, 0, None)
    chain = find(strategies.chains(Request(RequestType.PLUG)), lambda _: True)
    assert chain == Chain(Request(RequestType.PLUG).encode())
