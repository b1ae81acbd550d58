"""Attacks on a vhost-user daemon, of any make, through its socket: `python -m vhost_user.attack SOCKET`.

    with Daemon("/run/blk.sock", timeout=5.0) as daemon, Runner(daemon) as runner:
        for result in runner.run(ATTACKS):
            print(result.attack.name, result.verdict.value, explain(result))

A front end is a virtual machine monitor, and what a guest can do to one it can do to the daemons behind it. So a daemon
has to bear whatever comes through its socket and stands in its rings: not crash, not hang, not leak, not touch what
isn't its own, and not say yes to what it can't do.

The attacks lie in modules by theme (catalogue.py has them all), what an attack and a reaction are in theme.py, what a
daemon is judged by in oracles.py, and how in runner.py.
"""

from vhost_user.attack.catalogue import ATTACKS, choose
from vhost_user.attack.oracles import Daemon
from vhost_user.attack.report import Report, as_json, explain, totals
from vhost_user.attack.runner import Result, Runner, Verdict
from vhost_user.attack.theme import Attack, Outcome, Reaction

__all__ = [
    "ATTACKS",
    "Attack",
    "Daemon",
    "Outcome",
    "Reaction",
    "Report",
    "Result",
    "Runner",
    "Verdict",
    "as_json",
    "choose",
    "explain",
    "totals",
]
