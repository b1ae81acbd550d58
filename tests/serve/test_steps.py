"""The process is killed between each two steps of a request; the next one goes on, and nobody can tell.

A step is a store to the state, a half of a change of many bits, something that is done to the host's memory, or a used
element. The front end comes back by its inflight area, as one does that reconnects.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests import counts
from tests.serve.rig import BLOCK_SIZE, FORMS, NB_BLOCKS, RING_SIZE, Guest, guest, request_for, zone
from vhost_user.backend import Server
from vhost_user.connection import Connection
from vhost_user.event import Event
from vhost_user.frontend import Frontend
from vhost_user.owned_fd import OwnedFd
from vhost_user.vring import BatchedQueue, DeviceQueue
from virtio_mem.blocks import BlockMap, Run
from virtio_mem.protocol import BlockState, RequestType, Response, ResponseType
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_memfd
from virtio_mem.serve.memory import FrontendMemory
from virtio_mem.serve.state import DeviceState, state_size
from virtio_mem.serve.words import Words

ZONE = zone()
RESET = b"reset"
STRIDE = 20 // counts.STEPS_KILLED_OF_20


class Bomb:
    """Kills the process at its `at`-th step; never where that is 0."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, name: str) -> None:
        """Each call of a method is a step."""
        method = getattr(owner, name)

        def stepping(*arguments: Any, **keywords: Any) -> Any:
            self.step()
            return method(*arguments, **keywords)

        setattr(owner, name, stepping)

    def halves(self, name: str, state: BlockState) -> None:
        """Each change of many bits is made in two halves."""
        method = getattr(BlockMap, name)

        def stepping(blocks: BlockMap, run: Run = Run(0, NB_BLOCKS), *rest: Any) -> Any:  # type: ignore[arg-type]  # noqa: B008
            self.step()
            if run.nb_blocks > 1:
                half = Run(run.first, run.nb_blocks // 2)
                before = [blocks.state(Run(each, 1)) for each in range(half.first, half.first + half.nb_blocks)]  # type: ignore[arg-type]
                blocks._bits[half.first : half.first + half.nb_blocks] = int(state is BlockState.PLUGGED)
                self.step()
                for each, was in enumerate(before, half.first):
                    blocks._bits[each] = int(was is BlockState.PLUGGED)
            return method(blocks) if name == "unplug_all" else method(blocks, run, *rest)

        setattr(BlockMap, name, stepping)

    def arm(self) -> None:
        self.before(Words, "__setitem__")
        self.before(Words, "put")
        self.before(FrontendMemory, "populate")
        self.before(FrontendMemory, "discard")
        self.before(BatchedQueue, "give")
        self.before(DeviceQueue, "push")
        self.before(Event, "signal")
        self.before(DeviceState, "granted")
        self.before(DeviceState, "done")
        self.halves("plug", BlockState.PLUGGED)
        self.halves("unplug", BlockState.UNPLUGGED)
        self.halves("unplug_all", BlockState.UNPLUGGED)


class Backend:
    """A process with the device, whose end of the connection is `connection`."""

    def __init__(self, state: OwnedFd, bomb: Bomb | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.control, control = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                self.control.close()
                _serve(state, theirs, control, bomb)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        theirs.close()
        control.close()
        self.connection = Connection(ours)

    def dead(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.control.close()
        assert os.WIFSIGNALED(status), "the back end failed; its traceback is above"


def _serve(state: OwnedFd, sock: socket.socket, control: socket.socket, bomb: Bomb | None) -> None:
    if bomb is not None:
        bomb.arm()
    device = MemDevice(ZONE, state.fileno())
    with Server() as server:
        device.endpoint = server.serve(sock, device)

        def reset() -> None:
            control.recv(len(RESET))
            control.send(b"yes" if device.service.system_reset() else b"no")

        server.loop.watch(control, reset)
        server.run()


class World:
    """A guest, the state, and one back end after the other."""

    def __init__(self, machine: Guest) -> None:
        self.machine = machine
        self.state = state_memfd("test", state_size(ZONE.geometry))
        self.backend = Backend(self.state)
        self.frontend = Frontend(self.backend.connection, features=machine.features)
        self.frontend.track_inflight(1, RING_SIZE)
        machine.start(self.frontend)

    def next_backend(self, bomb: Bomb | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Kill the back end, and go on with another one. It may die while it is told of the session."""
        self.backend.kill()
        meanwhile()
        self.backend = Backend(self.state, bomb)
        try:
            self.frontend.reconnect(self.backend.connection)
        except Exception:
            assert bomb is not None

    def answered(self) -> bool:
        """Whether the answer comes before the back end dies."""
        while not (dead := self.backend.dead()):
            if self.machine.driver.enable_interrupts():
                return True
            self.frontend.vring(0).wait(0.002)
        return not dead

    def answers_until_death(self, count: int) -> list[Response]:
        """The next `count` answers, or those that come before the back end dies."""
        answers: list[Response] = []
        while len(answers) < count:
            dead = self.backend.dead()
            if (answer := self.machine.receive()) is not None:
                answers.append(answer)
            elif dead:
                break
            elif not self.machine.driver.enable_interrupts():
                self.frontend.vring(0).wait(0.002)
        return answers

    def close(self) -> None:
        self.frontend.close()
        self.backend.kill()
        self.state.close()


@contextmanager
def world(form: str) -> Iterator[World]:
    with guest(form) as machine:
        made = World(machine)
        try:
            yield made
        finally:
            made.close()


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


def prepare(machine: Guest, frontend: Frontend) -> None:
    """Blocks 0 to 7 are plugged, and no other."""
    for block in list(machine.plugged):
        if block >= 8:
            assert machine.ask(frontend, RequestType.UNPLUG, block) is ResponseType.ACK
    for block in range(8):
        if block not in machine.plugged:
            assert machine.ask(frontend, RequestType.PLUG, block) is ResponseType.ACK


@pytest.mark.parametrize("form", FORMS)
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
            here.next_backend(Bomb(at))
            machine.send(request_for(type_, block, nb_blocks), frontend)
            survived = here.answered()
            if not survived and rng.random() < 0.3:  # and what comes after it dies too
                here.next_backend(Bomb(rng.randrange(1, 30)))
                here.answered()
            here.next_backend()
            assert machine.took(type_, block, nb_blocks, machine.wait(frontend)) is ResponseType.ACK
            machine.check(frontend)
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


@pytest.mark.parametrize("form", FORMS)
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
            here.next_backend(Bomb(at), send)
            answers = here.answers_until_death(len(MANY))
            died = len(answers) < len(MANY)
            if died and rng.random() < 0.3:  # and what comes after it dies too
                here.next_backend(Bomb(rng.randrange(1, 40)))
                answers += here.answers_until_death(len(MANY) - len(answers))
            here.next_backend()
            answers += here.answers_until_death(len(MANY) - len(answers))
            for (type_, block, nb_blocks), answer in zip(MANY, answers, strict=True):
                assert machine.took(type_, block, nb_blocks, answer) is ResponseType.ACK
            machine.check(frontend)
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
    here.next_backend(Bomb(at))
    here.backend.control.settimeout(10)
    try:
        here.backend.control.send(RESET)
        told = here.backend.control.recv(3)
    except OSError:
        told = b""
    here.next_backend()
    if here.machine.config(here.frontend).plugged_size == 0:
        here.machine.plugged.clear()
    return told


def test_killed_at_each_step_of_a_system_reset(rng: random.Random, figure: Callable[[str, object], None]) -> None:
    with world("split") as here:
        machine, frontend = here.machine, here.frontend
        kills = 0
        for at in steps(rng):
            told = dies_in_a_system_reset(here, at)
            machine.check(frontend)
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
