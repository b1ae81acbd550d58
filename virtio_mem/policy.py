"""Targets for many machines on one host, by how short of memory each of them is.

Sans-IO: who has machines gives their sizes and their pressure, some seconds apart, and sets the targets that come out.
Pressure is the share of time, 0 to 1, in which something in a guest waited for memory: the guest's kernel tells it in
/proc/pressure/memory, as `some avg10`, in percent: a hundredth of that. How it comes out of the guest is the caller's
to say.

- At `grow_at` or more a machine gets `step` more, at once, and then nothing for `settle` seconds, in which its guest
  has to come there and pressure to go down. A guest that doesn't come there gets nothing more: others can use it.
- At `shrink_at` or less, for `calm` seconds without a break, it gives `step` back, and has to be calm for as long again
  before the next one. Between the two it keeps what it has: memory does not go to and fro.
- Nobody gets what is beyond `budget` for all together. What a guest was asked to give back counts as its own until it
  did. Who is short of memory most is served first. Where the budget is used up, machines at `shrink_at` or less have to
  be calm for no time at all: those that were so for longest give first, and no more of them than what is lacking takes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from vhost_user.errors import UsageError
from vhost_user.units import GIB, format_size


class Machine(NamedTuple):
    """A machine, or a zone of one: it has `size` bytes now and was asked to have `target`, within `least` and `most`.

    `pressure` is None where nobody can tell now: it keeps its target then."""

    name: str
    size: int
    target: int
    least: int
    most: int
    pressure: float | None


@dataclass
class Policy:
    """Sizes in bytes, times in seconds. `step` is whole blocks of every machine. UsageError for what can't be."""

    budget: int
    step: int = GIB
    grow_at: float = 0.1
    shrink_at: float = 0.01
    settle: float = 30.0
    calm: float = 300.0
    _grown: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _calm_since: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.step <= 0:
            raise UsageError("step", self.step, "has to be more than 0 bytes", "give whole blocks, such as 1 << 30")
        if not 0 < self.grow_at <= 1:
            raise UsageError("grow_at", self.grow_at, "has to be above 0, and 1 at most", "give a share of time: 0.1")
        if not 0 <= self.shrink_at < self.grow_at:
            limit = f"has to be from 0 to below grow_at, which is {self.grow_at}"
            raise UsageError("shrink_at", self.shrink_at, limit, "leave a gap, or memory goes to and fro")
        for name, seconds in (("settle", self.settle), ("calm", self.calm)):
            if not seconds >= 0:  # nor is NaN
                raise UsageError(name, seconds, "has to be 0 or more seconds", "give a time")

    def decide(self, now: float, machines: Iterable[Machine]) -> dict[str, int]:
        """The targets that are to be others from now on. `now` is of a clock that never goes back.

        UsageError where two have one name, a pressure is no share, or what machines can't do without is more than the
        budget.
        """
        known = _by_name(machines)
        if (least := sum(machine.least for machine in known.values())) > self.budget:
            limit = f"has to be at least {format_size(least)}, which the machines can't do without"
            raise UsageError("budget", format_size(self.budget), limit, "raise it, or have fewer machines")
        for times in (self._grown, self._calm_since):
            for name in times.keys() - known.keys():
                del times[name]
        targets, lacking = self._grow(now, known.values())
        comes = sum(  # back from those who were asked for it just now, and no longer from who doesn't give it
            machine.size - machine.target
            for machine in known.values()
            if machine.size > machine.target and now - self._calm_since.get(machine.name, float("-inf")) < self.settle
        )
        lacking -= comes
        for machine in sorted(known.values(), key=lambda each: self._calm_since.get(each.name, now)):
            if self._may_shrink(machine, now, at_once=lacking > 0):
                less = min(self.step, machine.target - machine.least)
                targets[machine.name] = machine.target - less
                lacking -= less
        return targets

    def _grow(self, now: float, machines: Collection[Machine]) -> tuple[dict[str, int], int]:
        """The targets of those that get more, and how many bytes are lacking for all to be within the budget, those who
        should have more as well."""
        room = self.budget - sum(max(machine.size, machine.target) for machine in machines)
        targets: dict[str, int] = {}
        wanted = 0
        for machine in sorted(filter(self._is_short, machines), key=lambda each: -(each.pressure or 0)):
            if now - self._grown.get(machine.name, float("-inf")) < self.settle or machine.size < machine.target:
                continue
            target = machine.target + min(self.step, machine.most - machine.target)
            more = max(0, target - machine.size)  # what it was asked to give back, and has, is in the sum
            if target > machine.target and more > max(0, room):
                wanted += more
            elif target > machine.target:
                targets[machine.name], room = target, room - more
                self._grown[machine.name] = now
        return targets, wanted - room

    def _is_short(self, machine: Machine) -> bool:
        return machine.pressure is not None and machine.pressure >= self.grow_at

    def _may_shrink(self, machine: Machine, now: float, *, at_once: bool) -> bool:
        """Whether it was calm for long enough; a guest that has not come to its target yet is asked for no more."""
        if machine.pressure is None or machine.pressure > self.shrink_at:
            self._calm_since.pop(machine.name, None)
            return False
        since = self._calm_since.setdefault(machine.name, now)
        if machine.target <= machine.least or machine.size > machine.target:
            return False
        if not at_once and now - since < self.calm:
            return False
        self._calm_since[machine.name] = now
        return True


def _by_name(machines: Iterable[Machine]) -> dict[str, Machine]:
    """UsageError for what they can't be."""
    known: dict[str, Machine] = {}
    for machine in machines:
        if machine.name in known:
            raise UsageError("name", machine.name, "has to be one machine's", "name each zone of a machine, too")
        if machine.pressure is not None and not 0 <= machine.pressure <= 1:
            limit = "has to be a share of time, from 0 to 1, or None"
            raise UsageError(f"{machine.name} pressure", machine.pressure, limit, "divide the kernel's percent by 100")
        known[machine.name] = machine
    return known
