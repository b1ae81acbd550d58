"""The record of the request in hand, in memory that outlives the process.

A process may be killed with a request half served: memory populated or given back, some of the bits changed, the answer
not yet with the driver. The ring gives the request to the next process again (vhost_user/inflight). Served afresh, it
would go wrong: a PLUG whose blocks are plugged by now earns an ERROR, and its driver gives the device up. So:

    1. chains are taken from the ring           the ring's inflight area has them
    2. the first request is decided on          nothing changed; what needs no host is answered, without a record
    3. fields, then phase = OPEN                the host is about to act
    4. the host acts: populates, or gives back
    5. phase = GRANTED                          the answer is ACK, and can't be another one any more
    6. bits of the map, then sizes and counts   (state.py)
    7. the answer is written, the used element is out, the inflight area is told
    8. phase = NONE                             before the next request is decided on

Neighbouring blocks that requests one behind the other plug, or unplug, are one effect. Its record has the chain of
each, and step 7 is done for each, in order.

What each place of death leaves, and what is made of it before anything is taken from the ring again:

    1-3  Nothing happened. The request is served as if it came for the first time.
    3-5  PLUG: the blocks are still unplugged. The range is given back again, phase = NONE, the request is served
         afresh. The others: a part of the memory is gone, with all that the guest had there, so there is one way, on.
         The range is given back again, step 5 and 6 follow.
    5-7  The bits may be half changed: they are put again, from the record. The request is answered ACK, without a
         second look at it. How many bytes were unplugged in all, the record says: it may be counted already.
    7-8  The request has gone back, so the ring doesn't give it again. The next chain is another one of the record, or
         one that is none of it, by its place in the ring: then phase = NONE, and it is served.

A ring may break in step 7, or owe its driver the used element, since its own memory is gone or not translated. The
process lives, and is where the next one would be: it keeps the record, and answers a chain of it that comes again
without a second look.

For a PLUG the host may have nothing to do. Then the C core answers it at once (at_once.py), and steps 3 to 5 are one:
phase = NONE, the fields, phase = GRANTED. There is no other place of death than those above. Step 8 is the core's
before it decides on another request, and the caller's behind the last one.

Where the host refuses (step 4), all of it is undone, phase = NONE, and the driver is told BUSY. A death in there is one
of 3-5. A record's chain is that of a split ring's head or a packed ring's id, at one position of the used ring, with
one content. A record whose chain never comes, because the front end went, is not harmful: as long as no other record
took its place no block changed, so what it says is still true.

A system reset comes from no ring and has no chain; its end is step 6. It may be refused, and then what the record says
is still true and still needed. So the reset has a phase of its own, which hides the record and leaves it as it is: one
store opens the reset, and one store has the record be there again. When the reset has come to its end the record goes
first: a death between the two has the reset finished once more.

A request that was granted before such a reset, and whose chain the ring has still, is then served afresh. A system
reset is no device reset: the ring goes on, and its chains are the driver's requests. But the blocks are as the reset
left them, and an ACK without a second look would say of a PLUG that they are plugged. Nor is an UNPLUG's ERROR wrong:
there is nothing to unplug. The driver that made these requests is most likely gone, as its machine was reset; one that
is there hears nothing but what is true.

The stores of step 3, 5 and 8 that decide are one word each. The process is all that is killed, not the machine, so the
next one sees what this one stored, in that order, and needs no checksum here; what a file of somebody else's holds is
checked field by field.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from vhost_user.errors import UsageError
from virtio_mem import _native
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import Effect, EffectType
from virtio_mem.protocol import REQUEST_SIZE, Request
from virtio_mem.serve.words import Words
from virtio_mem.tally import MOST_BYTES

MOST_CHAINS = _native.MOST_CHAINS
"""How many chains one record can have, and so how many requests can be granted together."""

_PHASE, _EFFECT, _FIRST, _NB_BLOCKS, _COUNT, _RESET, _UNPLUGGED, _UNPLUGGED_BY_RESET, _KEYS, _REQUESTS = (
    _native.RECORD.values()
)
_REQUEST_WORDS = REQUEST_SIZE // 8

_KEY = struct.Struct("=II")

_EFFECTS = {
    1: EffectType.PLUG,
    2: EffectType.UNPLUG,
    3: EffectType.UNPLUG_ALL,
}
_NUMBERS = {effect: number for number, effect in _EFFECTS.items()}


class Phase(IntEnum):
    """How far the request came; see above."""

    NONE = 0
    OPEN = 1
    GRANTED = 2


class ChainKey(NamedTuple):
    """What a chain is known again by: its head, the position of the used ring that it goes back to, its request."""

    head: int
    position: int
    request: Request


class Chains(NamedTuple):
    """Chains as a batch has them: `keys` has id and position of each, two 32-bit words, and `requests` 24 bytes."""

    keys: memoryview
    requests: memoryview

    @classmethod
    def of(cls, *chains: ChainKey) -> Chains:
        """These."""
        keys = b"".join(_KEY.pack(chain.head, chain.position) for chain in chains)
        return cls(memoryview(keys), memoryview(b"".join(chain.request.encode() for chain in chains)))

    def chain(self, index: int) -> ChainKey:
        """One of them."""
        head, position = _KEY.unpack_from(self.keys, _KEY.size * index)
        return ChainKey(head, position, Request.decode(self.requests[REQUEST_SIZE * index :]))


@dataclass(frozen=True, slots=True)
class Intent:
    """What a record says. There are no `chains` where the request came from no ring.

    `unplugged` is what the device's count of unplugged bytes is once this is granted; a PLUG doesn't say.
    """

    phase: Phase
    type: EffectType
    run: Run
    chains: tuple[ChainKey, ...]
    unplugged: int = 0


class IntentRecord:
    """The record in `words`, for a device of `nb_blocks`. Raises UsageError for what nobody wrote there."""

    def __init__(self, words: Words, nb_blocks: int) -> None:
        self._words = words
        self._nb_blocks = nb_blocks
        self.read()
        self._in_hand = _RESET if words[_RESET] else _PHASE

    def open(self, effect: Effect, chains: Chains | None, unplugged: int) -> None:
        """Step 3."""
        if effect.type is EffectType.SYSTEM_RESET:
            self._in_hand = _RESET
            self._words[_UNPLUGGED_BY_RESET] = unplugged
        else:
            self.clear()
            self._words[_UNPLUGGED] = unplugged
            self._write(effect, chains, 0 if chains is None else effect.requests)
        self._words[self._in_hand] = Phase.OPEN

    def _write(self, effect: Effect, chains: Chains | None, count: int) -> None:
        words, run = self._words, effect.run
        words[_EFFECT], words[_FIRST], words[_NB_BLOCKS] = _NUMBERS[effect.type], run.first, run.nb_blocks
        if chains is not None:
            words.put(_KEYS, chains.keys[: _KEY.size * count])
            words.put(_REQUESTS, chains.requests[: REQUEST_SIZE * count])
        words[_COUNT] = count

    def grant(self) -> None:
        """Step 5."""
        self._words[self._in_hand] = Phase.GRANTED

    def clear(self) -> None:
        """Step 8."""
        if self._words[_PHASE]:
            self._words[_PHASE] = Phase.NONE
        self.uncover()

    def uncover(self) -> None:
        """Say what it said before the system reset, which was refused."""
        if self._in_hand == _RESET:
            self._words[_RESET] = Phase.NONE
            self._in_hand = _PHASE

    def read(self) -> Intent | None:
        """What the record says now, None where it says nothing. UsageError for what nobody wrote there."""
        phase, effect, first, nb_blocks, count, reset = map(
            self._words.__getitem__, (_PHASE, _EFFECT, _FIRST, _NB_BLOCKS, _COUNT, _RESET)
        )
        if max(phase, reset) > Phase.GRANTED:
            raise _wrong("phase", max(phase, reset), "0 to 2")
        if reset:
            unplugged = self._read_unplugged(_UNPLUGGED_BY_RESET)
            return Intent(Phase(reset), EffectType.SYSTEM_RESET, Run(BlockIndex(0), self._nb_blocks), (), unplugged)
        if phase == Phase.NONE:
            return None
        if effect not in _EFFECTS:
            raise _wrong("effect", effect, "1 to 3")
        if not 1 <= nb_blocks <= self._nb_blocks - first:
            raise _wrong("blocks", f"{first}+{nb_blocks}", f"some of the {self._nb_blocks} blocks")
        if _EFFECTS[effect] is EffectType.UNPLUG_ALL and nb_blocks != self._nb_blocks:
            raise _wrong("blocks", f"{first}+{nb_blocks}", "all blocks")
        if count > MOST_CHAINS:
            raise _wrong("chains", count, f"at most {MOST_CHAINS}")
        keys = self._words.bytes(_KEYS, count)
        chains = Chains(keys, self._words.bytes(_REQUESTS, _REQUEST_WORDS * count))
        if max(keys.cast("I"), default=0) > 0xFFFF:
            raise _wrong("chain", keys.hex(), "ids and positions of 16 bits")
        return Intent(
            Phase(phase),
            _EFFECTS[effect],
            Run(BlockIndex(first), nb_blocks),
            tuple(map(chains.chain, range(count))),
            0 if _EFFECTS[effect] is EffectType.PLUG else self._read_unplugged(_UNPLUGGED),
        )

    def _read_unplugged(self, index: int) -> int:
        if (unplugged := self._words[index]) > MOST_BYTES:
            raise _wrong("unplugged", unplugged, f"at most {MOST_BYTES}")
        return unplugged


def _wrong(field: str, value: object, limit: str) -> UsageError:
    return UsageError(f"intent {field}", value, f"has to be {limit}", "remove the state: it is damaged")
