"""A daemon that touches guest memory when it is told to, as a guest's driver could have an honest device do.

Run as `python toucher.py SOCKET`. It reads commands, one a line, and answers each with a line:

touch ADDRESS       write a byte there: "done", or "no memory"
hammer FIRST STEP COUNT
                    from now on write to COUNT addresses, over and over, between any two messages: "hammering"
hits                how many of these writes were done since it was asked last, and how many were not
"""

from __future__ import annotations

import os
import sys
import threading

from vhost_user.backend import Device, Server
from vhost_user.errors import PeerError
from vhost_user.shared_memory import SharedMemory
from vhost_user.units import GuestAddress


class Toucher(Device):
    """Has the front end's memory, and no queue that anybody uses."""

    name = "toucher"

    def __init__(self, server: Server) -> None:
        self.server = server
        self.memory: SharedMemory | None = None
        self.targets: list[int] = []
        self.done = self.refused = 0

    def memory_changed(self, memory: SharedMemory) -> None:
        self.memory = memory

    def disconnected(self) -> None:
        self.memory = None

    def touch(self, address: int) -> bool:
        try:
            if self.memory is not None:
                self.memory.guest_memory.write(GuestAddress(address), b"t")
                return True
        except PeerError:
            pass
        return False

    def hammer(self) -> None:
        for address in self.targets:
            if self.touch(address):
                self.done += 1
            else:
                self.refused += 1
        self.server.loop.call_soon(self.hammer)

    def command(self, line: str) -> str:
        match line.split():
            case ["touch", address]:
                return "done" if self.touch(int(address)) else "no memory"
            case ["hammer", first, step, count]:
                self.targets = [int(first) + n * int(step) for n in range(int(count))]
                self.hammer()
                return "hammering"
            case ["hits"]:
                answer = f"{self.done} {self.refused}"
                self.done = self.refused = 0
                return answer
        return "what?"


def main(path: str) -> None:
    with Server() as server:
        device = Toucher(server)
        server.listen(path, device)

        def read_commands() -> None:
            for line in sys.stdin:
                server.loop.call_soon(lambda line=line: print(device.command(line), flush=True))  # type: ignore[misc]  # noqa: T201
            os._exit(0)

        threading.Thread(target=read_commands, daemon=True).start()
        print("ready", flush=True)  # noqa: T201
        server.run()


if __name__ == "__main__":
    main(sys.argv[1])
