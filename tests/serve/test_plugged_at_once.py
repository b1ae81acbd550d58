"""A PLUG that the C core answers at once: killed after each of its stores, and where somebody has a say in it.

The back end is stepped instruction by instruction while it answers what is in the ring (tests/stepping.py). What there
is after each store is what a kill there leaves: its state, the ring, the guest's buffers and the inflight area. Another
back end takes that over, and the guest hears of each of its requests once, and is granted all of them.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import mmap
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest

from tests import counts
from tests.rings.answerer import VuAnswer
from tests.serve.killed import World, prepare, world
from tests.serve.rig import (
    BLOCK_SIZE,
    FORMS,
    NB_BLOCKS,
    REQUESTS,
    RING_SIZE,
    Guest,
    guest,
    request_for,
    zone,
)
from tests.serve.test_device import Served, served
from tests.stepping import left_by, stepped
from vhost_user import _native
from vhost_user.vring import Batch
from virtio_mem.blocks import BlockIndex, BlockMap, Run
from virtio_mem.device import EffectType
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, RequestType, ResponseType
from virtio_mem.serve.at_once import AtOnce
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_memfd
from virtio_mem.serve.intent import Intent, Phase
from virtio_mem.serve.state import DeviceState, state_size
from virtio_mem.service import Section

ZONE = zone(prefault=False)
PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType

ASKED = [
    *((PLUG, block, nb_blocks) for block, nb_blocks in ((12, 2), (10, 2), (14, 1))),  # neighbours
    (STATE, 12, 1),
    (PLUG, 9, 1),
]
GRANTED = [Run(BlockIndex(10), 5), Run(BlockIndex(9), 1)]


def _map(*runs: Run) -> bytes:
    blocks = BlockMap(NB_BLOCKS)
    for run in (Run(BlockIndex(0), 8), *runs):
        blocks.plug(run)
    return blocks.to_bytes()


MAPS = [_map(*GRANTED[:count]) for count in range(len(GRANTED) + 1)]
"""With none of the runs, the first, and both."""


class Stepping:
    """Has a back end that began by `arm()` stepped through its look at the ring behind `next()`."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)

    def next(self) -> None:
        self._shared[0] = 1

    def arm(self) -> None:
        serve = _native.Batch.serve

        def serve_stepped(*arguments: Any) -> int:
            if not self._shared[0]:
                return serve(*arguments)
            self._shared[0] = 0
            return stepped(partial(serve, *arguments))

        setattr(_native.Batch, "serve", serve_stepped)  # noqa: B010 - mypy would have it called by anybody


class Left(NamedTuple):
    """What outlives a back end, by its parts."""

    state: bytes
    ring: bytes
    buffers: bytes
    inflight: bytes


class Files:
    """Where that is."""

    def __init__(self, here: World) -> None:
        buffer = here.frontend._inflight._buffer
        assert buffer is not None
        inflight, area = buffer
        ram = here.machine.ram.fd
        ring_end = max(part.address + part.size for part in here.machine.layout.areas.values())
        self._places = [
            (here.state.fileno(), int(state_size(ZONE.geometry)), 0),
            (ram, ring_end, 0),
            (ram, 64 * 64, REQUESTS),
            (inflight.fileno(), int(area.mmap_size), int(area.mmap_offset)),
        ]

    def left(self) -> Left:
        return Left(*(os.pread(*place) for place in self._places))

    def put(self, left: Left) -> None:
        for (fd, _, offset), data in zip(self._places, left, strict=True):
            os.pwrite(fd, data, offset)


@contextmanager
def as_it_is(machine: Guest) -> Iterator[None]:
    """What the guest knows is again afterwards what it was."""
    memory = machine.ram.memory
    kept = copy.deepcopy((machine.driver, machine._waiting, machine.plugged, machine._number), {id(memory): memory})
    yield
    machine.driver, machine._waiting, machine.plugged, machine._number = kept


def goes_on(here: World, left: Left, files: Files) -> None:
    """Another back end answers what the guest has asked; then all is as it was asked."""
    with as_it_is(here.machine):
        here.next_backend(meanwhile=lambda: files.put(left))
        answers = here.answers_until_death(len(ASKED))
        for asked, answer in zip(ASKED, answers, strict=True):
            assert here.machine.took(*asked, answer) is ResponseType.ACK
        here.machine.check(here.frontend, prefault=False)
        for run in GRANTED:  # the host is to have none of it when another back end goes on from somewhere else
            assert here.machine.ask(here.frontend, UNPLUG, *run) is ResponseType.ACK


def plugged_by(state: bytes) -> tuple[int, Phase | None]:
    """How many of the runs are plugged for a back end that finds this state, and what it finds on record."""
    with state_memfd("left", state_size(ZONE.geometry)) as fd:
        os.pwrite(fd.fileno(), state, 0)
        found = DeviceState(fd.fileno(), ZONE.geometry, requested_size=ZONE.hotplugged_size)
        try:
            plugged = found.device.blocks.to_bytes()
            assert plugged in MAPS, "some of a request's blocks are plugged, and some are not"
            return MAPS.index(plugged), None if found.interrupted is None else found.interrupted.phase
        finally:
            found.close()


@pytest.mark.parametrize("form", FORMS[: counts.RINGS_TRIED_AT_LENGTH])
def test_killed_after_each_store_of_a_plug(
    form: str, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    with world(form, ZONE) as here:
        machine, stepping = here.machine, Stepping()
        here.next_backend(stepping.arm)
        prepare(machine, here.frontend)
        files = Files(here)
        machine.until_asleep(here.frontend)
        stepping.next()
        for asked in ASKED:
            machine.send_typed(here.frontend, *asked)
        found = left_by(here.backend.pid, files.left)
        steps = [step for step, _ in itertools.groupby(plugged_by(left.state) for left in found)]
        # The first PLUGs are granted all at once, and so is the last one; its record is left for the caller to clear.
        assert steps == [(0, None), (1, Phase.GRANTED), (1, None), (2, Phase.GRANTED)]
        for left in rng.sample(found, min(len(found), counts.TAKEN_OVER_AFTER_A_STORE)):
            goes_on(here, left, files)
    figure(f"stores of a PLUG after which a back end was killed, {form} ring", len(found))


# Who has a say.


def plugs_at_once(device: MemDevice) -> bool:
    """Whether a PLUG of the first block is answered by the C core."""
    request, room = request_for(PLUG).encode(), ctypes.create_string_buffer(RESPONSE_SIZE)
    batch = Batch(RING_SIZE, 1, REQUEST_SIZE, RESPONSE_SIZE)
    batch.requests[:] = request
    with AtOnce(device.service, device.memory, device.state, batch):
        function, itself = device.device.answering()
        return bool(VuAnswer(function)(itself, bytes(8), request, 1, room))


class Listens:
    def plugged(self, section: Section) -> None:
        pass

    def unplugging(self, section: Section) -> None:
        pass


def truncate(here: Served, machine: Guest) -> None:
    del here
    os.ftruncate(machine.fd, BLOCK_SIZE - 1)


def listen(here: Served, machine: Guest) -> None:
    del machine
    here.device.service.listeners.append(Listens())


def pause(here: Served, machine: Guest) -> None:
    del machine
    here.device.service.pause()


def owe(here: Served, machine: Guest) -> None:
    """There is an answer that its driver has not got; meanwhile the lock was another's."""
    del machine
    here.device.state.intent = Intent(Phase.GRANTED, EffectType.PLUG, Run(BlockIndex(1), 1), ())


@pytest.mark.parametrize("against", [None, truncate, listen, pause, owe])
def test_somebody_has_a_say_in_a_plug(against: Callable[[Served, Guest], None] | None) -> None:
    with guest() as machine, served(ZONE) as here:
        assert not plugs_at_once(here.device), "there is no memory"
        here.start(machine)
        if against is not None:
            against(here, machine)
        assert plugs_at_once(here.device) == (against is None)
        assert here.device.device.plugged_size == (BLOCK_SIZE if against is None else 0)


def test_what_is_populated_is_not_plugged_at_once() -> None:
    with guest() as machine, served(zone()) as here:
        here.start(machine)
        assert not plugs_at_once(here.device)


def test_a_refusal_is_said_again_after_a_plug_and_a_poll(caplog: pytest.LogCaptureFixture) -> None:
    """One line of warning for each, not one for all that are the same: something else happened between them."""
    with guest() as machine, served(ZONE) as here:
        frontend = here.start(machine)
        for _ in range(2):
            os.ftruncate(machine.fd, machine.size - BLOCK_SIZE)
            for _ in range(2):
                assert machine.ask(frontend, PLUG, NB_BLOCKS - 1) is ResponseType.BUSY
            os.ftruncate(machine.fd, machine.size)
            assert machine.ask(frontend, PLUG, len(machine.plugged)) is ResponseType.ACK
            here.device.service.poll(0)
    assert [record.levelname for record in caplog.records if "refused" in record.message] == ["WARNING"] * 2
