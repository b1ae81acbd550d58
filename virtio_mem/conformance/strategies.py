"""Hypothesis strategies for those who write properties of their own about a virtio-mem device.

    @given(strategies.requests(config))
    def test_every_request_has_an_answer(request): ...

Sizes are in bytes, blocks are numbers from the start of the region. All draw legal and illegal values unless they say
otherwise; what shrinks, shrinks to the first block, to one block, and to the smallest device.
"""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

from vhost_user.units import MIB, ByteCount, GuestAddress
from virtio_mem.conformance.target import FILL, Chain, Odd, Wish
from virtio_mem.conformance.words import request_bytes
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, ConfigSpace, Request, RequestType

SearchStrategy = st.SearchStrategy

any_type = st.integers(0, 0xFFFF)
any_addr = st.integers(0, 2**64 - 1)
any_count = st.integers(0, 0xFFFF)
known_types = st.sampled_from(list(RequestType))
"""The four that the standard has."""


def block_runs(nb_blocks: int, most: int = 8) -> SearchStrategy[tuple[int, int]]:
    """A first block of `nb_blocks`, and how many, up to `most`: the last ones can be beyond the end."""
    return st.tuples(st.integers(0, max(0, nb_blocks - 1)), st.integers(1, most))


def requests(config: ConfigSpace) -> SearchStrategy[Request]:
    """Requests to a device with this configuration: in order, at its borders, askew, and mere nonsense."""
    nb_blocks = config.region_size // config.block_size
    ends = sorted({0, config.usable_region_size // config.block_size, nb_blocks})
    near_an_end = st.builds(lambda end, by: end + by, st.sampled_from(ends), st.integers(-2, 2))
    blocks = st.one_of(st.integers(0, max(0, nb_blocks - 1)), near_an_end)
    shifts = st.one_of(st.just(0), st.sampled_from([1, -1, 4096, config.block_size // 2]))
    counts = st.one_of(st.integers(1, 8), any_count)

    def of(type_: int, block: int, nb_blocks: int, shift: int) -> Request:
        addr = (config.addr + block * config.block_size + shift) % 2**64
        return Request(type_, GuestAddress(addr), nb_blocks)

    return st.one_of(
        st.builds(of, known_types, blocks, counts, shifts),
        st.builds(Request, any_type, any_addr.map(GuestAddress), any_count),
    )


def cuts(size: int) -> SearchStrategy[tuple[int, ...]]:
    """Lengths of one to four descriptors, none of them empty, that hold `size` bytes together."""
    places = st.sets(st.integers(1, size - 1), max_size=3)

    def lengths(inner: set[int]) -> tuple[int, ...]:
        ends = [0, *sorted(inner), size]
        return tuple(end - start for start, end in pairwise(ends))

    return places.map(lengths)


def chains(request: Request) -> SearchStrategy[Chain]:
    """The request as a buffer, cut up in every legal way; with padding that no device may look at."""
    six_bytes = st.one_of(st.just(bytes(6)), st.binary(min_size=6, max_size=6))
    data = st.builds(lambda pad, tail: request_bytes(*request, pad=pad, tail=tail), six_bytes, six_bytes)
    as_ever = st.just(FILL[0]), st.just(Odd(0))
    return st.builds(Chain, data, cuts(REQUEST_SIZE), cuts(RESPONSE_SIZE), st.booleans(), *as_ever)


@st.composite
def wishes(draw: st.DrawFn, most_blocks: int = 256) -> Wish:
    """Devices that can be made: legal sizes, up to `most_blocks` blocks, with and without a node."""
    block_size = draw(st.sampled_from([2 * MIB, 4 * MIB, 16 * MIB]))
    nb_blocks = draw(st.integers(1, most_blocks))
    requested = draw(st.integers(0, nb_blocks))
    node_id = draw(st.one_of(st.none(), st.integers(0, 0xFFFF)))
    return Wish(nb_blocks * block_size, block_size, requested * block_size, node_id)


@st.composite
def configs(draw: st.DrawFn, most_blocks: int = 256) -> ConfigSpace:
    """Configuration spaces that the standard allows, at addresses from 0 to near the end."""
    wish = draw(wishes(most_blocks))
    block_size, nb_blocks = wish.block_size, wish.region_size // wish.block_size
    last = (2**64 - 1 - wish.region_size) // block_size
    usable = draw(st.integers(wish.requested_size // block_size, nb_blocks))
    plugged = draw(st.integers(0, usable))
    return ConfigSpace(
        ByteCount(block_size),
        wish.node_id or 0,
        GuestAddress(draw(st.integers(0, last)) * block_size),
        ByteCount(wish.region_size),
        ByteCount(usable * block_size),
        ByteCount(plugged * block_size),
        ByteCount(wish.requested_size),
    )
