"""Back ends in processes of their own that are killed somewhere, and the front end that goes on with the next one."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.serve.rig import BLOCK_SIZE, NB_BLOCKS, RING_SIZE, Guest, guest, zone
from vhost_user.backend import Server
from vhost_user.connection import Connection
from vhost_user.errors import Disconnected
from vhost_user.event import Event
from vhost_user.frontend import Frontend
from vhost_user.owned_fd import OwnedFd
from vhost_user.vring import BatchedQueue, DeviceQueue
from virtio_mem.blocks import BlockMap, Run
from virtio_mem.protocol import BlockState, RequestType, Response, ResponseType
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_memfd
from virtio_mem.serve.memory import FrontendMemory
from virtio_mem.serve.plan import ServedZone
from virtio_mem.serve.state import DeviceState, state_size
from virtio_mem.serve.words import Words

ZONE = zone()
RESET = b"reset"

SLOTS = (128, 192)
"""Where a state has its sizes."""


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
    """A process with the device of a zone, whose end of the connection is `connection`. It begins by `arm()`."""

    def __init__(self, zone: ServedZone, state: OwnedFd, arm: Callable[[], None] = lambda: None) -> None:
        ours, theirs = socket.socketpair()
        self.control, control = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                self.control.close()
                arm()
                _serve(zone, state, theirs, control)
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


def _serve(zone: ServedZone, state: OwnedFd, sock: socket.socket, control: socket.socket) -> None:
    device = MemDevice(zone, state.fileno())
    with Server() as server:
        device.endpoint = server.serve(sock, device)

        def reset() -> None:
            control.recv(len(RESET))
            control.send(b"yes" if device.service.system_reset() else b"no")

        server.loop.watch(control, reset)
        server.run()


class World:
    """A guest, the state, and one back end after the other."""

    def __init__(self, machine: Guest, zone: ServedZone) -> None:
        self.machine = machine
        self.zone = zone
        self.state = state_memfd("test", state_size(zone.geometry))
        self.backend = Backend(zone, self.state)
        self.frontend = Frontend(self.backend.connection, features=machine.features)
        self.frontend.track_inflight(1, RING_SIZE)
        machine.start(self.frontend)

    def next_backend(self, arm: Callable[[], None] | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Kill the back end, and go on with another one. It may die while it is told of the session."""
        self.backend.kill()
        meanwhile()
        self.backend = Backend(self.zone, self.state, arm or (lambda: None))
        try:
            self.frontend.reconnect(self.backend.connection)
        except Exception:
            assert arm is not None

    def answered(self) -> bool:
        """Whether the answer comes before the back end dies."""
        while not (dead := self.backend.dead()):
            if self.machine.driver.enable_interrupts():
                return True
            self.wait()
        return not dead

    def wait(self) -> None:
        """For a call, or the end of the back end, a little."""
        with suppress(Disconnected):
            self.frontend.vring(0).wait(0.002)

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
                self.wait()
        return answers

    def check(self) -> None:
        """See `Guest.check`. And what was unplugged was counted, once."""
        self.machine.check(self.frontend)
        slots = [struct.unpack("=6Q", os.pread(self.state.fileno(), 48, at)) for at in SLOTS]
        *_, unplugged, _ = max(slots)  # by generation
        assert unplugged == self.machine.unplugged * BLOCK_SIZE

    def close(self) -> None:
        self.frontend.close()
        self.backend.kill()
        self.state.close()


@contextmanager
def world(form: str, zone: ServedZone = ZONE) -> Iterator[World]:
    with guest(form) as machine:
        made = World(machine, zone)
        try:
            yield made
        finally:
            made.close()


def prepare(machine: Guest, frontend: Frontend) -> None:
    """Blocks 0 to 7 are plugged, and no other."""
    for block in list(machine.plugged):
        if block >= 8:
            assert machine.ask(frontend, RequestType.UNPLUG, block) is ResponseType.ACK
    for block in range(8):
        if block not in machine.plugged:
            assert machine.ask(frontend, RequestType.PLUG, block) is ResponseType.ACK
