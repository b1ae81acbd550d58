"""Attacks on a daemon of ours, which is to stand all of them."""

from __future__ import annotations

from collections.abc import Sequence

from vhost_user.attack import Daemon, Runner, Verdict, explain
from vhost_user.attack.runner import Result
from vhost_user.attack.theme import Attack


def stands(path: str, command: str, attacks: Sequence[Attack], seed: int) -> list[Result]:
    """What came of each attack on the daemon that `command` starts at `path`: passed, or not offered, and the daemon
    is the one that it was. AssertionError otherwise."""
    with Daemon(path, restart=command, timeout=20) as daemon, Runner(daemon, timeout=20, seed=seed) as runner:
        results = list(runner.run(attacks))
        assert daemon.restarts == 1, "it ended, and was started again"
    wrong = [
        f"{result.attack.name}: {explain(result)}"
        for result in results
        if result.verdict not in {Verdict.PASSED, Verdict.NOT_OFFERED}
    ]
    assert not wrong, "\n".join(wrong)
    return results
