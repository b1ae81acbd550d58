"""DPDK's two ends of vhost-user, each as a testpmd that sends what it receives: one an echo, one with frames to begin.

testpmd polls: from its start to its end it takes the whole of one processor. Its messages about the protocol are seen
at once; the rest, its counters among them, when it ends, since it buffers them. With `--stats-period=1` it writes all
out once a second, and ends by `terminate` only, not by a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

from tests.peers.processes import Peer, running, unused
from tests.peers.tree import LIBRARIES, command, version


@contextmanager
def dpdk_vhost(
    directory: Path, *arguments: str, queues: int = 1, options: str = "", socket: Path | None = None
) -> Iterator[Peer]:
    """A network device that sends each frame back as it came. `options` goes to net_vhost. (librte_vhost, C)"""
    socket = socket or unused(directory, "dpdk", ".sock")
    device = ",".join(filter(None, [f"net_vhost0,iface={socket},queues={queues}", options]))
    line = _testpmd("net_vhost", device, 512, "--auto-start", f"--rxq={queues}", f"--txq={queues}", *arguments)
    with running("dpdk-vhost", version("dpdk-dev"), line, directory, socket, environment=_runtime(directory)) as peer:
        yield peer


@contextmanager
def dpdk_virtio_user(
    directory: Path,
    socket: Path,
    *arguments: str,
    queues: int = 1,
    queue_size: int = 256,
    server: bool = False,
    burst: bool = True,
    options: str = "",
) -> Iterator[Peer]:
    """DPDK as the front end: it sends a burst of frames, and sends again each one that comes back.

    Without `burst` it begins with what its forwarding mode does, and watches its link; only then does it accept another
    back end after the first one.

    It connects to `socket` and needs its answers from then on, not before this yields; with `server` it listens there.
    `options` goes to net_virtio_user. An empty line sent to it ends it, with its counters printed.
    """
    device = f"net_virtio_user0,path={socket},queues={queues},queue_size={queue_size},mac=52:54:00:aa:bb:cc"
    device = ",".join(filter(None, [device, "server=1" if server else "", options]))
    line = _testpmd(
        "net_virtio",
        device,
        256,
        "--tx-first" if burst else "--auto-start",
        f"--rxq={queues}",
        f"--txq={queues}",
        *arguments,
    )
    environment = _runtime(directory)
    peer_version = version("dpdk-dev")
    with running(
        "dpdk-virtio-user", peer_version, line, directory, socket, server=server, environment=environment
    ) as peer:
        yield peer


def _testpmd(driver: str, device: str, mebibytes: int, *arguments: str) -> list[str]:
    """testpmd on one port, without huge pages. Where there is one processor, both of its threads share that."""
    drivers = LIBRARIES / "dpdk"
    processors = islice(cycle(sorted(os.sched_getaffinity(0))), 2)
    loaded = [next(drivers.glob(f"pmds-*/librte_{name}.so.*")) for name in (driver, "mempool_ring", "bus_vdev")]
    return command(
        "bin/dpdk-testpmd",
        "--lcores=" + ",".join(f"{thread}@{processor}" for thread, processor in enumerate(processors)),
        *("--no-huge", "-m", str(mebibytes), "--no-shconf", "--no-pci", "--no-telemetry"),
        *(argument for path in loaded for argument in ("-d", path.name)),
        f"--vdev={device}",
        "--",
        *("--no-mlockall", "--forward-mode=io", "--port-topology=loop", "--total-num-mbufs=8192"),
        *arguments,
    )


def _runtime(directory: Path) -> dict[str, str]:
    """Where DPDK keeps what it would leave behind elsewhere."""
    return {"XDG_RUNTIME_DIR": str(directory)}
