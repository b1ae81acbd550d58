"""What the host holds for blocks that are not plugged.

A driver must leave those alone, but no device can keep a guest from them: its VMM has mapped the region as a whole. A
guest that touches them all the same has the host allocate memory, and has more than it was given. The host's own
counters tell of it, whoever touched what. A read is enough where memory is shared: its pages come into being by it.

Each run of unplugged blocks, or piece of a long one, is asked about under the device's lock, and the lock is let go in
between: no request waits for more than one of them. One of which a block was plugged meanwhile is passed over. Of huge
pages the host tells quickly how many there are in all, and slowly which ones; but a PLUG populates those, and so what
is held beyond what is plugged is held for the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from vhost_user.errors import HostError, UsageError
from vhost_user.mapping import PAGE_SIZE
from vhost_user.units import GIB, ByteCount, HostOffset
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.service import DeviceService

log = logging.getLogger(__name__)

MOST_RUNS = 4096
"""Runs, or pieces of them, that are looked at for somebody who only wants to know: a question costs some ten
microseconds."""

LOOKED_AT = 64 * GIB
"""What is asked about while a request may have to wait: before Linux 6.7 the kernel looks at every page of a private
range, and that of this one takes a twentieth of a second."""

PIECE = GIB
"""What is given back while a request may have to wait. Of huge pages, each of which is asked about, 512 are in that."""

MOST_BYTES = GIB
"""What is counted at most before it is enough to say that there is more: a guest that touches every second page makes
131,072 pieces of it, which take a fifth of a second."""


def held_unplugged(service: DeviceService) -> tuple[ByteCount, bool]:
    """Bytes that the host holds for the unplugged blocks, and whether not all of those were looked at, since they are
    in very many runs or hold very much. HostError where nobody can tell."""
    with service.lock:
        _require_open(service)
        every_page = service.prefault and service.memory.page_size > PAGE_SIZE
    if every_page:
        return _beyond_plugged(service)
    held = 0
    runs = _pieces(_unplugged_runs(service), LOOKED_AT // service.device.geometry.block_size)
    for run in islice(runs, MOST_RUNS):
        with service.lock:
            _require_open(service)
            if service.device.blocks.count(run):
                continue
            part, more = service.memory.held_at_least(*_range(service, run))
        held += part
        if more or held >= MOST_BYTES:
            return ByteCount(held), more or next(runs, None) is not None
    return ByteCount(held), next(runs, None) is not None


def _beyond_plugged(service: DeviceService) -> tuple[ByteCount, bool]:
    """The same where each plugged block is held; requests go on meanwhile, and what they plug may be counted, even of
    what they unplug again."""
    device, tally = service.device, service.tally
    with service.lock:
        before, unplugged, size = device.plugged_size, tally.unplugged_bytes, device.geometry.region_size
    held, more = service.memory.held_at_least(HostOffset(0), size) if size else (ByteCount(0), False)
    with service.lock:
        most = max(before, device.plugged_size + tally.unplugged_bytes - unplugged)
    return ByteCount(max(0, held - most)), more


def reclaim(
    service: DeviceService,
    *,
    given_up: Callable[[], bool] = lambda: False,
    tell: Callable[[ByteCount, ByteCount], None] = lambda *_: None,
) -> tuple[ByteCount, ByteCount]:
    """Give back to the host what it holds for the unplugged blocks: how many bytes that was, and how many it holds
    still. `tell` is called with both where there were any, also where this raises in the middle of it.

    Raises UsageError while the device is paused, for who paused it relies on memory to stay as it is; HostError where
    the host can't tell, or takes nothing back, and once `given_up()`, which is asked about before each piece.
    """
    freed = left = 0
    try:
        for run in _pieces(_unplugged_runs(service), PIECE // service.device.geometry.block_size):
            if given_up():
                raise HostError("reclaim", f"{freed} bytes so far", "was given up", "ask again")
            with service.lock:
                _require_may_go(service)
                where = _range(service, run)
                if service.device.blocks.count(run) or not (held := service.memory.held(*where)):
                    continue
                gone = service.memory.discard(*where)
                kept = 0 if gone else service.memory.held(*where)
            freed, left = freed + max(0, held - kept), left + kept
    finally:
        if freed or left:
            who = f"{service.name}: " if service.name else ""
            log.warning("%sunplugged blocks held %d bytes, and hold %d", who, freed + left, left)
            tell(ByteCount(freed), ByteCount(left))
    return ByteCount(freed), ByteCount(left)


def _require_may_go(service: DeviceService) -> None:
    if service.closed:
        raise UsageError("memory", "closed", "has to be open", "make it anew")
    if service.device.paused:
        raise UsageError("reclaim", "refused", "the device is paused, and its memory has to stay", "resume it first")


def _require_open(service: DeviceService) -> None:
    """Under the lock: until it is let go, whoever closes the memory waits."""
    if service.closed:
        raise HostError("memory", "closed", "has to be open")


def _unplugged_runs(service: DeviceService) -> Iterator[Run]:
    with service.lock:
        blocks = service.device.blocks.copy()
    everything = Run(BlockIndex(0), len(blocks))
    return iter(blocks.unplugged_runs(everything) if everything.nb_blocks else ())


def _pieces(runs: Iterable[Run], most: int) -> Iterator[Run]:
    """The runs in pieces of `most` blocks, or of one."""
    step = max(1, most)
    for run in runs:
        end = run.first + run.nb_blocks
        for first in range(run.first, end, step):
            yield Run(BlockIndex(first), min(step, end - first))


def _range(service: DeviceService, run: Run) -> tuple[HostOffset, ByteCount]:
    block_size = service.device.geometry.block_size
    return HostOffset(run.first * block_size), ByteCount(run.nb_blocks * block_size)
