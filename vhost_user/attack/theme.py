"""What an attack is, and what can come of it.

An attack is a function that gets an `Attacker`, does one thing that a front end should not do (or one that it may, and
that daemons are known to stumble over), and returns how the daemon reacted. That is the smaller part of the judgement:
most reactions are right, since the document leaves open what a back end does about a front end that breaks the rules.
It may close, refuse, ignore. What it may not do is say that it carried out what can't be carried out; that is a
finding, unless the attack is `lawful`, with the reason why it may be. Whether the daemon lives, serves the next front
end, leaks, and leaves alone what isn't its own, is for the oracles to say, after each attack (oracles.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from vhost_user.message import ProtocolFeature

if TYPE_CHECKING:
    from vhost_user.attack.attacker import Attacker


class Reaction(Enum):
    """What a daemon did about an attack, as the attacker saw it."""

    CLOSED = "closed"
    """It ended the connection."""

    REFUSED = "refused"
    """It said no: a non-zero acknowledgement, or the failure that the message's own reply has a form for."""

    IGNORED = "ignored"
    """It said nothing of it, and answered the next message."""

    SILENT = "silent"
    """It said nothing at all: it waits for more, or is busy. The next front end tells."""

    ACCEPTED = "accepted"
    """It said that it did what was asked."""

    NOT_REACHED = "not reached"
    """It refused, or did not do, what the attack needs before it can begin."""


@dataclass(frozen=True)
class Outcome:
    """A reaction, and what there is to say about it."""

    reaction: Reaction
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reaction.value} ({self.detail})" if self.detail else self.reaction.value


Act = Callable[["Attacker"], Outcome]


@dataclass(frozen=True)
class Attack:
    """One attack. `source` is the rule that it breaks, or the report of the bug that it is made after.

    It is left out where the daemon doesn't offer all of `needs` and `virtio`. `lawful` says why a daemon may accept it.
    """

    name: str
    source: str
    says: str
    act: Act
    needs: ProtocolFeature = ProtocolFeature.NONE
    virtio: int = 0
    lawful: str = ""


class Theme:
    """A collection of attacks, in the order in which they are made; each is named after the theme and itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.attacks: list[Attack] = []

    def add(
        self,
        name: str,
        source: str,
        says: str,
        act: Act,
        *,
        needs: ProtocolFeature = ProtocolFeature.NONE,
        virtio: int = 0,
        lawful: str = "",
    ) -> None:
        """One attack more."""
        self.attacks.append(Attack(f"{self.name}.{name}", source, says, act, needs, virtio, lawful))

    def attack(
        self,
        name: str,
        source: str,
        *,
        needs: ProtocolFeature = ProtocolFeature.NONE,
        virtio: int = 0,
        lawful: str = "",
    ) -> Callable[[Act], Act]:
        """Decorates a function that is an attack; what it says is the function's docstring."""

        def register(act: Act) -> Act:
            says = " ".join((act.__doc__ or "").split())
            self.add(name, source, says, act, needs=needs, virtio=virtio, lawful=lawful)
            return act

        return register
