"""All attacks, in the order in which they are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from vhost_user.attack.channel import channel
from vhost_user.attack.codec import codec
from vhost_user.attack.device import config, state, status
from vhost_user.attack.framing import framing
from vhost_user.attack.iotlb import iotlb
from vhost_user.attack.live import content
from vhost_user.attack.order import order
from vhost_user.attack.packed import packed
from vhost_user.attack.regions import memory
from vhost_user.attack.rings import rings
from vhost_user.attack.structures import inflight, log
from vhost_user.attack.theme import Attack
from vhost_user.errors import UsageError

THEMES = (framing, codec, order, memory, rings, content, packed, log, inflight, config, state, status, channel, iotlb)

ATTACKS: tuple[Attack, ...] = tuple(attack for theme in THEMES for attack in theme.attacks)
"""Every one. The order is fixed: what a daemon suffers from one attack may show in the next."""


def choose(patterns: Iterable[str]) -> Sequence[Attack]:
    """The attacks whose names one of the shell patterns matches; all where there is none.

    Raises UsageError for a pattern that matches nothing.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(attack.name, pattern) for attack in ATTACKS):
            raise UsageError("name", pattern, "matches no attack", "--list shows their names")
    return [a for a in ATTACKS if not patterns or any(fnmatchcase(a.name, pattern) for pattern in patterns)]
