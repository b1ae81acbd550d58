"""Makes attacks, one after the other, and judges the daemon after each.

After an attack a good front end comes: it negotiates, shares memory, starts a ring and stops it. Then all memory of the
attacker is looked at, and what the daemon holds. Whatever is wrong then is put down to the attack before it.

Some daemons end when their front end leaves, or when it breaks a rule. With `restart` that is no failure unless a
signal or a panic ended it; without, whoever ends is lost to the next front end, and that is one.

A daemon may open something for good the first time that it does a thing. So more descriptors or mappings than before
are a leak only if the same attack, made again, leaves as many more.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from vhost_user.attack.attacker import HARMLESS, OF_THE_DEVICE, VERSION_1, Attacker, NotReached, Offer
from vhost_user.attack.canary import GUEST
from vhost_user.attack.line import Line
from vhost_user.attack.oracles import Daemon, more, peer_pid, wait_until
from vhost_user.attack.theme import Attack, Outcome, Reaction
from vhost_user.errors import Disconnected, FieldError, HostError, TimedOut
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.message import F_PROTOCOL_FEATURES, MAX_REGIONS, U64, FrontendRequest, ProtocolFeature, VringState
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import KIB, ByteCount, GuestAddress
from vhost_user.vring import SplitLayout

VISITS = 3
"""Good front ends before the first attack: by then a daemon has opened what it opens once."""

_VISITOR = "vhost-user-visitor"


class Verdict(Enum):
    """What to say of an attack."""

    PASSED = "passed"
    ACCEPTED = "accepted"
    """The daemon said that it did what can't be done, and nothing broke: a finding, and no failure."""
    FAILED = "FAILED"
    NOT_REACHED = "not reached"
    NOT_OFFERED = "not offered"
    NOT_MADE = "not made"
    """The daemon was gone by then."""


@dataclass(frozen=True)
class Result:
    """An attack, its verdict, and what was seen; `symptom` is why it failed."""

    attack: Attack
    verdict: Verdict
    outcome: Outcome
    symptom: str = ""
    note: str = ""


class Runner:
    """Judges the daemon, which is started if it has to be. HostError where no good front end is served.

    `timeout` in seconds is for each answer of the daemon, `patience` is how long to wait where none is likely, and
    `settling` within how long a daemon lets go of what a front end left behind, or ends after it. `seed` makes what is
    random. `progress` is called with each attack before it is made.
    """

    def __init__(
        self,
        daemon: Daemon,
        *,
        timeout: float = 5.0,
        patience: float = 0.1,
        settling: float = 1.0,
        seed: int = 0,
        progress: Callable[[Attack], None] = lambda _: None,
    ) -> None:
        self.daemon = daemon
        self.seed = seed
        self._timeout = timeout
        self._patience = patience
        self._settling = settling
        self._progress = progress
        self._baseline: Counter[str] | None = None
        self._memory = OwnedFd(os.memfd_create(_VISITOR, os.MFD_CLOEXEC))
        os.ftruncate(self._memory.fileno(), 64 * KIB)
        self._lost = ""
        self._visited = 0
        self._insists = 0
        self.one_shot = False
        """Whether the daemon ends when its front end leaves."""
        try:
            self.offer = self._get_acquainted()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close what is the runner's; the daemon is its owner's."""
        self._memory.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Good front ends.

    def _get_acquainted(self) -> Offer:
        self.daemon.ensure()
        try:
            offer = self._first_visit()
            self.one_shot = bool(self.daemon.restart) and self.daemon.ends(self._settling)
            self._ensure()
            rings = offer.rings or self._count_rings()
            for _ in range(VISITS - 1):
                self._settle()
                self._visit()
        except FieldError as error:
            if isinstance(error, HostError):
                raise
            remedy = "give --restart, if the daemon ends with its front end; else look at its log"
            raise HostError(
                "daemon", str(error), "has to serve good front ends, one after the other", remedy
            ) from error
        self._settle()
        self._take_stock()
        return replace(offer, rings=rings)

    def _first_visit(self) -> Offer:
        """A device may refuse a driver that does not know a feature of its own. Then all of those are acked."""
        try:
            return self._visit()
        except FieldError as error:
            if isinstance(error, HostError):
                raise
            self._insists = OF_THE_DEVICE
            self._ensure()
            try:
                return self._visit()
            except FieldError:
                raise error from None

    def _settle(self) -> None:
        """Between two connections: a daemon that ends with the first is waited for, and started again."""
        self._see_off()
        self._ensure()

    def _see_off(self) -> None:
        """Wait for the end of a daemon that ends with its front end, if it had one."""
        if self.one_shot and self._visited == self.daemon.restarts:
            self.daemon.ends(self._timeout)

    def _ensure(self) -> None:
        before = self.daemon.restarts
        self.daemon.ensure()
        if self.daemon.restarts != before:
            self._baseline = None

    def _visit(self) -> Offer:
        """Be a good front end, from the first message to the last. Raises FieldError where that isn't possible."""
        self._visited = self.daemon.restarts
        with Frontend.connect(
            self.daemon.path,
            features=VERSION_1 | self._insists,
            protocol_features=HARMLESS,
            timeout=self._timeout,
        ) as frontend:
            self.daemon.watch(peer_pid(frontend.requests.fileno()))
            region = SharedRegion(GuestAddress(GUEST), ByteCount(64 * KIB), self._memory.fileno())
            frontend.regions.share([region])
            os.pwrite(self._memory.fileno(), bytes(64 * KIB), 0)
            vring = frontend.vring(0)
            vring.start(SplitLayout.place(64, GuestAddress(GUEST)))
            vring.stop()
            offered = ProtocolFeature.NONE
            if frontend.offered & F_PROTOCOL_FEATURES:
                offered = ProtocolFeature(frontend.requests.ask(FrontendRequest.GET_PROTOCOL_FEATURES, U64).value)
            rings, slots = frontend.queue_count or 0, frontend.regions.slots or MAX_REGIONS
            return Offer(frontend.offered, offered, rings, slots, frontend.offered & self._insists)

    def _count_rings(self) -> int:
        """Rings of a daemon that doesn't tell how many it has: one or two, which is as many as we use."""
        self._visited = self.daemon.restarts
        line = Line(self.daemon.path, self._timeout)
        try:
            line.send(FrontendRequest.SET_OWNER)
            line.send(FrontendRequest.SET_VRING_NUM, VringState(1, 64))
            return 2 if line.answers() else 1
        except FieldError:
            return 1
        finally:
            line.close()

    # Attacks.

    def run(self, attacks: Iterable[Attack]) -> Iterator[Result]:
        """Make these attacks, in order, and judge each."""
        gone = ""
        for attack in attacks:
            if not self.offer.has(attack.needs, attack.virtio):
                yield Result(attack, Verdict.NOT_OFFERED, Outcome(Reaction.NOT_REACHED))
                continue
            if gone:
                yield Result(attack, Verdict.NOT_MADE, Outcome(Reaction.NOT_REACHED, gone))
                continue
            self._progress(attack)
            yield self._judge(attack)
            try:
                self._settle()
                gone = self._lost
            except HostError as error:
                gone = str(error)

    def _judge(self, attack: Attack) -> Result:
        outcome, symptom, note = self._attack(attack)
        if not symptom and (extra := self._more_than_before()):
            self._take_stock()
            again, symptom, _ = self._attack(attack)
            if not symptom and again.reaction is not Reaction.NOT_REACHED and (extra := self._more_than_before()):
                symptom = f"leaks each time: {extra}"
                self._take_stock()
            else:
                note = note or f"once, {extra}"
        return Result(attack, self._verdict(attack, outcome, symptom), outcome, symptom, note)

    @staticmethod
    def _verdict(attack: Attack, outcome: Outcome, symptom: str) -> Verdict:
        if symptom:
            return Verdict.FAILED
        if outcome.reaction is Reaction.NOT_REACHED:
            return Verdict.NOT_REACHED
        if outcome.reaction is Reaction.ACCEPTED and not attack.lawful:
            return Verdict.ACCEPTED
        return Verdict.PASSED

    def _attack(self, attack: Attack) -> tuple[Outcome, str, str]:
        """Make it, and have a good front end come: what the daemon did, what broke, and what is worth a note."""
        rng = random.Random(f"{self.seed} {attack.name}")
        self._visited = self.daemon.restarts
        try:
            attacker = Attacker(self.daemon.path, self.offer, rng, timeout=self._timeout, patience=self._patience)
        except NotReached as error:
            outcome = Outcome(Reaction.NOT_REACHED, str(error))
            return outcome, *self._aftermath()
        with attacker:
            outcome = _made(attack, attacker)
            attacker.vanish()
            symptom, note = self._aftermath()
            if spoiled := attacker.spoiled():
                symptom = "; ".join(filter(None, (symptom, f"wrong memory: {spoiled}")))
            return outcome, symptom, note

    # Oracles.

    def _aftermath(self) -> tuple[str, str]:
        """What broke, and what is worth a note; a daemon that ended is started again if it can be."""
        self._see_off()
        if not self.one_shot and (self.daemon.running or not self.daemon.watched):
            error = self._visit_fails()
            if not error:
                return ("", "") if self.daemon.running or not self.daemon.watched else self._after_its_end()
            if not self.daemon.ends(self._settling):
                return self._hung(error)
        if self.daemon.running and self.one_shot and self._visited == self.daemon.restarts:
            return self._hung("it does not end with its front end any more")
        if self.daemon.running:
            return self._hung(error) if (error := self._visit_fails()) else ("", "")
        return self._after_its_end()

    def _visit_fails(self) -> str:
        try:
            self._visit()
        except FieldError as error:
            return str(error)
        return ""

    def _after_its_end(self) -> tuple[str, str]:
        how, crashed = self.daemon.ended(), self.daemon.crashed
        if not self.daemon.restart:
            return how, ""
        self._ensure()
        if error := self._visit_fails():
            how = f"{how}; started again, it does not serve: {error}"
            return how, ""
        self._settle()
        self._take_stock()
        if crashed:
            return how, ""
        return "", "" if self.one_shot else f"the daemon {how}"

    def _hung(self, error: str) -> tuple[str, str]:
        symptom = f"does not serve the next front end: {error}"
        if self.daemon.restart:
            self.daemon.kill()
            self._ensure()
            if not self._visit_fails():
                self._settle()
                self._take_stock()
        elif self._visit_fails():
            self._lost = symptom
        return symptom, ""

    def _take_stock(self) -> None:
        self._baseline = None if self.one_shot else self.daemon.holdings()

    def _more_than_before(self) -> str:
        """What the daemon holds beyond what it held before, once it had time to let go of it."""
        if self._baseline is None or self.one_shot:
            self._take_stock()
            return ""
        baseline, now = self._baseline, Counter[str]()

        def settled() -> bool:
            nonlocal now
            now = self.daemon.holdings() or Counter()
            return not more(now, baseline)

        if wait_until(settled, self._settling):
            self._baseline = now
            return ""
        return more(now, baseline)


def _made(attack: Attack, attacker: Attacker) -> Outcome:
    try:
        return attack.act(attacker)
    except NotReached as error:
        return Outcome(Reaction.NOT_REACHED, str(error))
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    except TimedOut:
        return Outcome(Reaction.SILENT)
    except FieldError as error:
        return Outcome(Reaction.CLOSED, f"by us: {error}")
    except OSError as error:
        return Outcome(Reaction.NOT_REACHED, str(error))
