"""The process is killed between each two steps of a request; the next one goes on, and nobody can tell.

A step is a store to the state, a half of a change of many bits, something that is done to the host's memory, or a used
element. The front end comes back by its inflight area, as one does that reconnects.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest

from tests import counts
from tests.serve.killed import RESET, ZONE, Bomb, World, prepare, world
from tests.serve.rig import BLOCK_SIZE, FORMS, NB_BLOCKS, request_for
from virtio_mem.protocol import RequestType, ResponseType
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_memfd
from virtio_mem.serve.state import state_size
from virtio_mem.serve.words import Words

STRIDE = 20 // counts.STEPS_KILLED_OF_20


def steps(rng: random.Random) -> Iterator[int]:
    """The steps to be killed at: all of them, or as many as the tier has time for, without an end."""
    at = rng.randrange(1, STRIDE + 1)
    while True:
        yield at
        at += STRIDE


MOVES = {
    RequestType.PLUG: (4, 8),
    RequestType.UNPLUG: (0, 8),
    RequestType.UNPLUG_ALL: (0, NB_BLOCKS),
}


@pytest.mark.parametrize("form", FORMS[: counts.RINGS_TRIED_AT_LENGTH])
@pytest.mark.parametrize("type_", list(MOVES), ids=lambda type_: type_.name)
def test_killed_at_each_step_of_a_request(
    form: str, type_: RequestType, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    block, nb_blocks = MOVES[type_]
    block += 4 if type_ is RequestType.PLUG else 0
    with world(form) as here:
        machine, frontend = here.machine, here.frontend
        kills = 0
        for at in steps(rng):
            prepare(machine, frontend)
            here.next_backend(Bomb(at).arm)
            machine.send(request_for(type_, block, nb_blocks), frontend)
            survived = here.answered()
            if not survived and rng.random() < 0.3:  # and what comes after it dies too
                here.next_backend(Bomb(rng.randrange(1, 30)).arm)
                here.answered()
            here.next_backend()
            assert machine.took(type_, block, nb_blocks, machine.wait(frontend)) is ResponseType.ACK
            here.check()
            if survived:
                break
            kills += 1
    assert kills * STRIDE > 15
    figure(f"kills at the steps of {type_.name}, {form} ring", kills)


MANY = [
    *((RequestType.PLUG, block, nb_blocks) for block, nb_blocks in ((12, 2), (10, 2), (14, 1))),  # neighbours
    (RequestType.STATE, 12, 1),
    *((RequestType.UNPLUG, block, nb_blocks) for block, nb_blocks in ((6, 2), (4, 2), (0, 1))),  # two of them are
]


@pytest.mark.parametrize("form", FORMS[: counts.RINGS_TRIED_AT_LENGTH])
def test_killed_at_each_step_of_many_requests(
    form: str, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    """They are in the ring together, and some of them are granted together."""

    def send() -> None:
        for type_, block, nb_blocks in MANY:
            machine.send(request_for(type_, block, nb_blocks), frontend)

    with world(form) as here:
        machine, frontend = here.machine, here.frontend
        kills = 0
        for at in steps(rng):
            prepare(machine, frontend)
            here.next_backend(Bomb(at).arm, send)
            answers = here.answers_until_death(len(MANY))
            died = len(answers) < len(MANY)
            if died and rng.random() < 0.3:  # and what comes after it dies too
                here.next_backend(Bomb(rng.randrange(1, 40)).arm)
                answers += here.answers_until_death(len(MANY) - len(answers))
            here.next_backend()
            answers += here.answers_until_death(len(MANY) - len(answers))
            for (type_, block, nb_blocks), answer in zip(MANY, answers, strict=True):
                assert machine.took(type_, block, nb_blocks, answer) is ResponseType.ACK
            here.check()
            if not died:
                break
            kills += 1
    assert kills * STRIDE > 40
    figure(f"kills at the steps of {len(MANY)} requests together, {form} ring", kills)


def dies_in_a_system_reset(here: World, at: int) -> bytes:
    """The process is killed at step `at` of a system reset of a machine with blocks, and another one goes on.

    Returns what it said, which is nothing unless the reset came to its end.
    """
    prepare(here.machine, here.frontend)
    here.next_backend(Bomb(at).arm)
    here.backend.control.settimeout(10)
    try:
        here.backend.control.send(RESET)
        told = here.backend.control.recv(3)
    except OSError:
        told = b""
    here.next_backend()
    if here.machine.config(here.frontend).plugged_size == 0:
        here.machine.lost_all()
    return told


def test_killed_at_each_step_of_a_system_reset(rng: random.Random, figure: Callable[[str, object], None]) -> None:
    with world("split") as here:
        machine = here.machine
        kills = 0
        for at in steps(rng):
            told = dies_in_a_system_reset(here, at)
            here.check()
            if told:
                assert told == b"yes"
                assert not machine.plugged
                break
            kills += 1
    assert kills * STRIDE > 10
    figure("kills at the steps of a system reset", kills)


def test_killed_while_the_state_is_made(rng: random.Random) -> None:
    for at in steps(rng):
        with state_memfd("test", state_size(ZONE.geometry)) as state:
            pid = os.fork()
            if pid == 0:
                try:
                    Bomb(at).arm()
                    bomb = Bomb(at)
                    bomb.before(Words, "__setitem__")
                    MemDevice(ZONE, state.fileno())
                finally:
                    os._exit(0)
            _, status = os.waitpid(pid, 0)
            device = MemDevice(ZONE, state.fileno())
            assert device.device.config.requested_size == NB_BLOCKS * BLOCK_SIZE
            device.close()
            if not os.WIFSIGNALED(status):
                break
    assert at > 20
