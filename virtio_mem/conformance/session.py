"""A device under a script: every call is put down with its answer, in words that can be read back and run again.

A session never judges. What the device says is kept as it is, also where it is no answer: `-> 7 bytes: 0102...`. Blocks
are indices from the start of the region; which of them the device may refuse is up to whoever asks.

    session.begin()             begin -> agreed 0x130000006
    session.plug(0, 4)          plug 0 4 -> ACK
    session.state(3, 2)         state 3 2 -> ACK MIXED
    session.held(0, 4)          held 0 4 -> 8388608
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from vhost_user.units import MIB
from virtio_mem.conformance.target import (
    Asks,
    Capability,
    Chain,
    Refused,
    Registers,
    Subject,
    TargetFailure,
    Wish,
)
from virtio_mem.conformance.words import (
    ARROW,
    BESIDE,
    Answer,
    Looked,
    Place,
    chain_words,
    config_words,
    registers_words,
    request_bytes,
    wish_words,
)
from virtio_mem.protocol import ConfigSpace, Feature, RequestType

KNOWN_FEATURES = sum(Feature)
"""What a session takes of the features on offer unless it is told otherwise."""

T = TypeVar("T")

_PIECE = MIB
"""Of a block larger than two of these, the first and the last are written and compared."""

_PEEKED = 16
"""Bytes that `peek` reads."""

MOST_FILLED = 2 * _PIECE
"""Bytes of a block that `fill` writes, at most."""


class Session:
    """One device, from its start on. `lines` is all that was said so far; `features` are those that were taken.

    `capabilities` are the target's: what a check may use where it is there.
    """

    def __init__(self, subject: Subject, wish: Wish, capabilities: Capability | None = None) -> None:
        self.subject = subject
        self.wish = wish
        self.capabilities = ~Capability(0) if capabilities is None else capabilities
        self.lines = [wish_words(wish)]
        self.features = 0
        self._first: ConfigSpace | None = None
        self._offered: Sequence[Chain] = []
        self._submitted: Sequence[Chain] = []

    # What does not change but by a system reset, from the first look at the configuration space.

    @property
    def first_config(self) -> ConfigSpace:
        """The configuration space as it was when it was first read, since the last system reset if there was one."""
        return self.config() if self._first is None else self._first

    @property
    def block_size(self) -> int:
        """Bytes in a block."""
        return self.first_config.block_size

    @property
    def nb_blocks(self) -> int:
        """Blocks in the region, usable or not; 0 for a block size of 0."""
        return self.first_config.region_size // self.block_size if self.block_size else 0

    @property
    def place(self) -> Place:
        """Where the region lies."""
        return Place(self.first_config.addr, self.block_size)

    def addr(self, block: int, shift: int = 0) -> int:
        """The guest address of a block, `shift` bytes further on."""
        return self.place.addr_of(block, shift)

    def can(self, wanted: Capability) -> bool:
        """Whether the target has all of `wanted`."""
        return wanted in self.capabilities

    # The driver.

    def begin(self, features: int | None = None) -> bool:
        """Reset, negotiate `features` or all offered ones that are known, DRIVER_OK; whether the device agreed."""
        return self._agree("begin", features, self.subject.begin)

    def plug(self, block: int, nb_blocks: int = 1) -> Answer:
        """PLUG."""
        return self.ask(RequestType.PLUG, self.addr(block), nb_blocks)

    def unplug(self, block: int, nb_blocks: int = 1) -> Answer:
        """UNPLUG."""
        return self.ask(RequestType.UNPLUG, self.addr(block), nb_blocks)

    def unplug_all(self) -> Answer:
        """UNPLUG ALL."""
        return self.ask(RequestType.UNPLUG_ALL, 0, 0)

    def state(self, block: int, nb_blocks: int = 1) -> Answer:
        """STATE."""
        return self.ask(RequestType.STATE, self.addr(block), nb_blocks)

    def ask(self, type_: int, addr: int, nb_blocks: int) -> Answer:
        """Any request: 16 bits, 64 bits, 16 bits."""
        return self.chain(Chain(request_bytes(type_, addr, nb_blocks)))

    def chain(self, chain: Chain) -> Answer:
        """One buffer as it is."""
        return self._submit(chain_words(chain, self.place), [chain])[0]

    def batch(self, chains: Sequence[Chain]) -> list[Answer]:
        """Several buffers with one notification, or with as few as the ring needs; answers in the order of `chains`."""
        answers: list[Answer] = []
        for part in self._ringfuls(chains):
            words = BESIDE.join(chain_words(chain, self.place) for chain in part)
            answers += self._submit(f"batch {words}", part)
        return answers

    def _ringfuls(self, chains: Sequence[Chain]) -> Iterator[list[Chain]]:
        part: list[Chain] = []
        free = self.subject.ring_size
        for chain in chains:
            taken = 1 if chain.indirect else len(chain.readable) + len(chain.room)
            if part and taken > free:
                yield part
                part, free = [], self.subject.ring_size
            part.append(chain)
            free -= taken
        if part:
            yield part

    def fits(self, chain: Chain) -> bool:
        """Whether a chain is no longer than the ring, as none may be."""
        return len(chain.readable) + len(chain.room) <= self.subject.ring_size

    def request(self, type_: int, block: int, nb_blocks: int = 1, shift: int = 0) -> Chain:
        """A plain request as a buffer, for `batch`."""
        return Chain(request_bytes(type_, self.addr(block, shift), nb_blocks))

    def config(self) -> ConfigSpace:
        """Read the configuration space."""
        config = self._say("config", self.subject.config, config_words)
        if self._first is None:
            self._first = config
        return config

    # The driver, step by step.

    def prepare(self, features: int | None = None) -> bool:
        """`begin` without DRIVER_OK."""
        return self._agree("prepare", features, self.subject.prepare)

    def go(self) -> None:
        """DRIVER_OK."""
        self._say("go", self.subject.go)

    def offer(self, chains: Sequence[Chain], *, flags: int = 0, ahead: int = 0) -> None:
        """Make buffers available without a notification, the driver's area saying this."""
        words = BESIDE.join(chain_words(chain, self.place) for chain in chains)
        self._say(f"offer {flags} {ahead} {words}".rstrip(), lambda: self.subject.offer(chains, Asks(flags, ahead)))
        self._offered = list(chains)

    def kick(self) -> None:
        """Notify the device."""
        self._say("kick", self.subject.kick)

    def look(self, whole: bool = True) -> Looked:
        """What became of the last offer, all of which is waited for if `whole`."""

        def look() -> Looked:
            used, notified, flags = self.subject.look(whole)
            pairs = zip(self._offered, used, strict=True)
            return Looked([one and Answer.of(chain.request, one) for chain, one in pairs], notified, flags)

        return self._say(f"look {'all' if whole else 'now'}", look, str)

    def overrun(self) -> None:
        """Have the available index run ahead by more than the ring has entries."""
        self._say("overrun", self.subject.overrun)

    def registers(self) -> Registers:
        """What the transport says."""
        return self._say("registers", self.subject.registers, registers_words)

    def write_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space."""
        self._say(f"write_config {offset} {data.hex()}", lambda: self.subject.write_config(offset, data))

    def peek(self, block: int) -> bytes:
        """The first bytes of a usable block, plugged or not."""
        return self._say(f"peek {block}", lambda: self.subject.read(block * self.block_size, _PEEKED), bytes.hex)

    def device_reset(self) -> None:
        """The driver's reset. `begin` must come next."""
        self._say("device_reset", self.subject.device_reset)

    def fill(self, block: int, nb_blocks: int, seed: int) -> None:
        """Write bytes that follow from `seed` to plugged blocks."""

        def write() -> None:
            for offset, data in self._pattern(block, nb_blocks, seed):
                self.subject.write(offset, data)

        self._say(f"fill {block} {nb_blocks} {seed}", write)

    def same(self, block: int, nb_blocks: int, seed: int) -> bool:
        """Whether plugged blocks still have what `fill` wrote with the same `seed`."""
        pattern = self._pattern(block, nb_blocks, seed)
        return self._say(
            f"same {block} {nb_blocks} {seed}",
            lambda: all(self.subject.read(offset, len(data)) == data for offset, data in pattern),
            lambda yes: "yes" if yes else "no",
        )

    # The host.

    def set_target(self, requested_size: int) -> bool:
        """The host's target in bytes; whether its side took it."""

        def set_target() -> str:
            try:
                self.subject.set_target(requested_size)
            except Refused as refused:
                return f"refused: {refused}"
            return "done"

        return self._say(f"target {requested_size}", set_target, str) == "done"

    def system_reset(self) -> None:
        """Reset the machine. `begin` must come next."""
        self._say("system_reset", self.subject.system_reset)
        self._first = None

    def boot_memory(self) -> list[tuple[int, int]]:
        """Address and size of what the tables for boot call RAM."""

        def words(ranges: list[tuple[int, int]]) -> str:
            return BESIDE.join(f"{addr:#x} {size}" for addr, size in ranges) or "none"

        return self._say("boot_memory", self.subject.boot_memory, words)

    def sleep(self) -> None:
        """The machine goes to sleep."""
        self._say("sleep", self.subject.sleep)

    def wake(self) -> None:
        """It wakes up. `begin` must come next."""
        self._say("wake", self.subject.wake)

    def held(self, block: int, nb_blocks: int) -> int:
        """Bytes that the host holds for these blocks, plugged or not."""
        offset, size = block * self.block_size, nb_blocks * self.block_size
        return self._say(f"held {block} {nb_blocks}", lambda: self.subject.held(offset, size), str)

    def notices(self) -> int:
        """Configuration change notices since this was last asked, or since `begin`."""
        return self._say("notices", self.subject.take_notices, str)

    def advance(self, seconds: float) -> None:
        """Let time go by."""
        self._say(f"advance {seconds:g}", lambda: self.subject.advance(seconds))

    def refuse(self, refuses: bool) -> None:
        """While `refuses`, the host has nothing to give and takes nothing back."""
        self._say(f"refuse {'on' if refuses else 'off'}", lambda: self.subject.refuse(refuses))

    def pause(self, paused: bool) -> None:
        """While `paused`, blocks are to stay as they are."""
        self._say(f"pause {'on' if paused else 'off'}", lambda: self.subject.pause(paused))

    # Private.

    def _agree(self, call: str, features: int | None, agree: Callable[[int], bool]) -> bool:
        wanted = self.subject.offered_features & KNOWN_FEATURES if features is None else features
        call = call if features is None else f"{call} {features:#x}"
        agreed = self._say(call, lambda: agree(wanted), lambda yes: f"{'agreed' if yes else 'refused'} {wanted:#x}")
        self.features = wanted if agreed else 0
        return agreed

    def again(self) -> Answer:
        """The last request once more, which has to be one by itself."""
        (chain,) = self._submitted
        return self.chain(chain)

    def _submit(self, call: str, chains: Sequence[Chain]) -> list[Answer]:
        self._submitted = chains

        def submit() -> list[Answer]:
            used = self.subject.submit(chains)
            return [Answer.of(chain.request, one) for chain, one in zip(chains, used, strict=True)]

        return self._say(call, submit, lambda answers: BESIDE.join(map(str, answers)))

    def _say(self, call: str, act: Callable[[], T], words: Callable[[T], str] = lambda _: "done") -> T:
        """Make a call and put it down, also one that ends the device."""
        try:
            answer = act()
        except TargetFailure as failure:
            self.lines.append(f"{call}{ARROW}failure: {' '.join(failure.what.split())}")
            raise
        self.lines.append(f"{call}{ARROW}{' '.join(words(answer).split())}")
        return answer

    def _pattern(self, block: int, nb_blocks: int, seed: int) -> Iterator[tuple[int, bytes]]:
        """What `seed` puts where: offsets in the region, and bytes."""
        size = self.block_size
        pieces = [(0, size)] if size <= 2 * _PIECE else [(0, _PIECE), (size - _PIECE, _PIECE)]
        for number in range(block, block + nb_blocks):
            for start, length in pieces:
                yield number * size + start, random.Random(f"{seed} {number} {start}").randbytes(length)
