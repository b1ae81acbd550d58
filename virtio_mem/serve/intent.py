"""The record of the request in hand, in memory that outlives the process.

A process may be killed with a request half served: memory populated or given back, some of the bits changed, the answer
not yet with the driver. The ring gives the request to the next process again (vhost_user/inflight). Served afresh, it
would go wrong: a PLUG whose blocks are plugged by now earns an ERROR, and its driver gives the device up. So:

    1. the chain is taken from the ring         the ring's inflight area has it
    2. the request is decided on                nothing changed; what needs no host is answered, without a record
    3. fields, then phase = OPEN                the host is about to act
    4. the host acts: populates, or gives back
    5. phase = GRANTED                          the answer is ACK, and can't be another one any more
    6. bits of the map, then the sizes          (state.py)
    7. the answer is written, the used element is out, the inflight area is told
    8. phase = NONE                             before the next chain is taken

What each place of death leaves, and what is made of it before anything is taken from the ring again:

    1-3  Nothing happened. The request is served as if it came for the first time.
    3-5  PLUG: the blocks are still unplugged. The range is given back again, phase = NONE, the request is served
         afresh. The others: a part of the memory is gone, with all that the guest had there, so there is one way, on.
         The range is given back again, step 5 and 6 follow.
    5-7  The bits may be half changed: they are put again, from the record. The request is answered ACK, without a
         second look at it.
    7-8  The request has gone back, so the ring doesn't give it again. The next chain is another one, by its place in
         the ring: phase = NONE, and it is served.

Where the host refuses (step 4), all of it is undone, phase = NONE, and the driver is told BUSY. A death in there is one
of 3-5. A record is for one chain: that of a split ring's head or a packed ring's id, at one position of the used ring,
with one content. A record whose chain never comes, because the front end went, is not harmful: as long as no other
record took its place no block changed, so what it says is still true. A system reset, which comes from no ring, has no
chain; its end is step 6.

The stores of step 3, 5 and 8 that decide are one word each. The process is all that is killed, not the machine, so the
next one sees what this one stored, in that order, and needs no checksum here; what a file of somebody else's holds is
checked field by field.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from vhost_user.errors import UsageError
from vhost_user.units import GuestAddress
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import EffectType
from virtio_mem.protocol import Request
from virtio_mem.serve.words import Words

RECORD_WORDS = 16
"""Room for one record, 128 bytes. A device serves one request at a time; there is room for more behind it."""

_PHASE, _EFFECT, _FIRST, _NB_BLOCKS, _HEAD, _POSITION, _TYPE, _ADDR, _COUNT = range(9)

_EFFECTS = {
    1: EffectType.PLUG,
    2: EffectType.UNPLUG,
    3: EffectType.UNPLUG_ALL,
    4: EffectType.SYSTEM_RESET,
}
_NUMBERS = {effect: number for number, effect in _EFFECTS.items()}
_WHOLE = (EffectType.UNPLUG_ALL, EffectType.SYSTEM_RESET)


class Phase(IntEnum):
    """How far the request came; see above."""

    NONE = 0
    OPEN = 1
    GRANTED = 2


@dataclass(frozen=True, slots=True)
class ChainKey:
    """What a chain is known again by: its head, the position of the used ring that it goes back to, its request."""

    head: int
    position: int
    request: Request


@dataclass(frozen=True, slots=True)
class Intent:
    """What a record says. `chain` is None where the request came from no ring."""

    phase: Phase
    type: EffectType
    run: Run
    chain: ChainKey | None


class IntentRecord:
    """The record in `words`, for a device of `nb_blocks`. Raises UsageError for what nobody wrote there."""

    def __init__(self, words: Words, nb_blocks: int) -> None:
        self._words = words
        self._nb_blocks = nb_blocks
        self.intent = self._read()
        """What the record says now, None where it says nothing."""

    def open(self, type_: EffectType, run: Run, chain: ChainKey | None) -> None:
        """Step 3."""
        self.clear()
        words = self._words
        words[_EFFECT], words[_FIRST], words[_NB_BLOCKS] = _NUMBERS[type_], run.first, run.nb_blocks
        words[_HEAD] = 0
        if chain is not None:
            words[_HEAD], words[_POSITION] = chain.head + 1, chain.position
            words[_TYPE], words[_ADDR], words[_COUNT] = chain.request
        self._move(Intent(Phase.NONE, type_, run, chain), Phase.OPEN)

    def grant(self) -> None:
        """Step 5."""
        assert self.intent is not None
        self._move(self.intent, Phase.GRANTED)

    def clear(self) -> None:
        """Step 8."""
        if self.intent is not None:
            self._words[_PHASE] = Phase.NONE
            self.intent = None

    def _move(self, intent: Intent, phase: Phase) -> None:
        self._words[_PHASE] = phase
        self.intent = Intent(phase, intent.type, intent.run, intent.chain)

    def _read(self) -> Intent | None:
        phase, effect, first, nb_blocks, head, position, type_, addr, count = (self._words[i] for i in range(9))
        if phase == Phase.NONE:
            return None
        if phase not in (Phase.OPEN, Phase.GRANTED):
            raise _wrong("phase", phase, "0 to 2")
        if effect not in _EFFECTS:
            raise _wrong("effect", effect, "1 to 4")
        if not 1 <= nb_blocks <= self._nb_blocks - first:
            raise _wrong("blocks", f"{first}+{nb_blocks}", f"some of the {self._nb_blocks} blocks")
        if _EFFECTS[effect] in _WHOLE and nb_blocks != self._nb_blocks:
            raise _wrong("blocks", f"{first}+{nb_blocks}", "all blocks")
        if max(position, type_, count) > 0xFFFF or head > 1 << 16:
            raise _wrong("chain", f"{head} at {position}", "fields of 16 bits")
        chain = ChainKey(head - 1, position, Request(type_, GuestAddress(addr), count)) if head else None
        return Intent(Phase(phase), _EFFECTS[effect], Run(BlockIndex(first), nb_blocks), chain)


def _wrong(field: str, value: object, limit: str) -> UsageError:
    return UsageError(f"intent {field}", value, limit, "the state is damaged: remove it")
