"""The attack suite's echo device as a supervised daemon: supervisor and worker by command, as programs have them."""

from __future__ import annotations

import logging
import sys

from tests.attack.echo import Echo
from vhost_user.backend import Server
from vhost_user.supervisor import Supervisor, Worker
from vhost_user.unix_socket import listen


def work() -> None:
    worker = Worker.from_environment()
    with Server() as server:
        worker.attach(server, "echo", Echo())
        worker.ready()
        server.run()
    worker.close()


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    if sys.argv[1] == "--worker":
        work()
    else:
        command = [sys.executable, "-m", "tests.supervisor.echo", "--worker"]
        ready = lambda: print("ready", flush=True)  # noqa: E731, T201
        sys.exit(Supervisor(command, {"echo": listen(sys.argv[1])}, on_ready=ready).run())


if __name__ == "__main__":
    main()
