"""The attacks on daemons that we did not write. Whatever they do, each attack is judged; the verdicts are printed.

What each of them was seen to do is in spec-notes/vhost-user-peers.md. Nothing is asserted of it here: the next version
of a daemon may do better, or worse, and neither is a mistake of ours.
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests import counts
from tests.peers.daemons import passt, qemu_storage_daemon, virtiofsd
from tests.peers.dpdk import dpdk_vhost
from tests.peers.processes import Peer
from vhost_user.attack import ATTACKS, Daemon, Runner, Verdict, totals

pytestmark = pytest.mark.needs_peers

Start = Callable[[Path, Path, Path], AbstractContextManager[Peer]]

DAEMONS: dict[str, Start] = {
    "qemu-storage-daemon": lambda directory, image, _: qemu_storage_daemon(directory, image, num_queues=2),
    "virtiofsd": lambda directory, _, share: virtiofsd(directory, share, tag="attack"),
    "passt": lambda directory, *_: passt(directory),
    "dpdk": lambda directory, *_: dpdk_vhost(directory),
}

TIMEOUT = 3.0
"""Seconds that a daemon which hangs costs, each time. On a busy machine that is short, and a verdict may be unjust."""


@pytest.mark.parametrize("name", DAEMONS)
def test_every_attack_is_judged(
    name: str,
    directory: Path,
    image: Path,
    share: Path,
    rng: random.Random,
    request: pytest.FixtureRequest,
    figure: Callable[[str, object], None],
) -> None:
    with DAEMONS[name](directory, image, share) as peer:
        version = peer.version
        arguments = [str(argument) for argument in peer.process.args]  # type: ignore[union-attr]
    command = shlex.join(["env", f"XDG_RUNTIME_DIR={directory}", *arguments])
    chosen = set(rng.sample(range(len(ATTACKS)), min(counts.ATTACKS_ON_PEERS, len(ATTACKS))))
    attacks = [attack for number, attack in enumerate(ATTACKS) if number in chosen]
    with (
        Daemon(str(peer.socket), restart=command, timeout=TIMEOUT) as daemon,
        Runner(daemon, timeout=TIMEOUT, seed=int(request.config.option.hypothesis_seed)) as runner,
    ):
        results = list(runner.run(attacks))
    assert [result.attack for result in results] == attacks
    assert Verdict.NOT_MADE not in {result.verdict for result in results}
    counted = {verdict.value: number for verdict, number in totals(results).items() if number}
    failed = [f"{result.attack.name}: {result.symptom}" for result in results if result.verdict is Verdict.FAILED]
    figure(f"attacks on {name} {version}", ", ".join(f"{number} {verdict}" for verdict, number in counted.items()))
    figure(f"attacks that {name} {version} fails", "; ".join(failed) or "none")
