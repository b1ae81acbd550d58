"""A back end that survives SIGKILL: a small supervisor holds what must not be lost, and a worker does the work.

The supervisor (supervisor.py) knows no device. It holds the connections of front ends, the descriptors and messages
that a session consists of, and whatever bytes and descriptors a worker asks it to keep. The worker (worker.py) serves
devices as any back end does, by messages and rings; when it dies, the next one is given all of that and goes on.
journal.py has the theory: which order of writes makes it true.

Each name is imported when it is first used: the supervisor pays for nothing that only a worker needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_user.late import importer

if TYPE_CHECKING:
    from vhost_user.supervisor.supervisor import Supervisor
    from vhost_user.supervisor.worker import Worker

__all__ = ["Supervisor", "Worker"]

_HOME = {"Supervisor": "vhost_user.supervisor.supervisor", "Worker": "vhost_user.supervisor.worker"}

__getattr__ = importer(globals(), _HOME)
