"""A call, from its words: what a target has to be able to do for it, and how a session makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vhost_user.errors import UsageError
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import FILL, Capability, Chain
from virtio_mem.conformance.words import BESIDE, REQUESTS, Place, parse_chain
from virtio_mem.protocol import REQUEST_SIZE

NO_NEED = Capability(0)
_ANYWHERE = Place(0, 1)

_U16_MAX = 0xFFFF

_LONGEST = 86_400
"""Seconds that a file may let go by at one time."""

FORMS = {
    "begin": "begin [FEATURES]",
    **REQUESTS,
    "batch": "batch REQUEST | REQUEST...",
    "config": "config",
    "fill": "fill BLOCK BLOCKS SEED",
    "same": "same BLOCK BLOCKS SEED",
    "held": "held BLOCK BLOCKS",
    "peek": "peek BLOCK",
    "notices": "notices",
    "target": "target BYTES",
    "advance": "advance SECONDS",
    "pause": "pause on|off",
    "refuse": "refuse on|off",
    "device_reset": "device_reset",
    "system_reset": "system_reset",
    "sleep": "sleep",
    "wake": "wake",
    "boot_memory": "boot_memory",
    "registers": "registers",
    "write_config": "write_config OFFSET HEX",
    "prepare": "prepare [FEATURES]",
    "go": "go",
    "offer": "offer FLAGS AHEAD [REQUEST | REQUEST...]",
    "kick": "kick",
    "look": "look all|now",
    "overrun": "overrun",
}
"""The form of each call that there is, by its first word. `docs/conformance.md` says what they do."""

Action = tuple[Capability, Callable[[Session], object]]


def action_of(call: str) -> Action:
    """What a call needs, and how it is made. UsageError for words that are no call."""
    word, *rest = call.split()
    if word not in FORMS:
        raise UsageError("call", call, "can't be read: there is no such call", f"they are {', '.join(FORMS)}")
    try:
        if action := _simple(word, rest):
            return action
        if word in REQUESTS or word == "batch":
            return _submitted(call)
        raise ValueError("its words are too many, too few, or others")
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError("call", call, f"can't be read: {error}", f"it is {FORMS[word]!r}") from error


def _simple(word: str, rest: Sequence[str]) -> Action | None:
    """Calls that name no request; None for the others."""
    match word, rest:
        case "begin", [] | [_]:
            features = int(rest[0], 0) if rest else None
            return NO_NEED, lambda session: session.begin(features)
        case "config" | "device_reset" | "system_reset" | "notices", []:
            return _NEEDS.get(word, NO_NEED), lambda session: getattr(session, word)()
        case "fill" | "same", [_, _, _]:
            block, nb_blocks, seed = map(int, rest)
            return Capability.CONTENT, lambda session: getattr(session, word)(block, nb_blocks, seed)
        case "held", [_, _]:
            first, count = map(int, rest)
            return Capability.HELD, lambda session: session.held(first, count)
        case "target", [size]:
            requested_size = int(size)
            return Capability.SET_TARGET, lambda session: session.set_target(requested_size)
        case "advance", [text]:
            seconds = float(text)
            if not 0 <= seconds <= _LONGEST:
                raise UsageError("advance", text, f"0 to {_LONGEST} seconds")
            return NO_NEED, lambda session: session.advance(seconds)
        case "refuse" | "pause", ["on" | "off" as state]:
            return _NEEDS[word], lambda session: getattr(session, word)(state == "on")
    return _step(word, rest)


def _step(word: str, rest: Sequence[str]) -> Action | None:
    """Calls of a driver that goes step by step, and of one that looks behind what a driver needs."""
    match word, rest:
        case "prepare", [] | [_]:
            features = int(rest[0], 0) if rest else None
            return Capability.START, lambda session: session.prepare(features)
        case "go" | "kick" | "overrun" | "registers" | "sleep" | "wake" | "boot_memory", []:
            return _NEEDS[word], lambda session: getattr(session, word)()
        case "look", ["all" | "now" as how]:
            return Capability.RING, lambda session: session.look(how == "all")
        case "peek", [block]:
            number = int(block)
            return Capability.UNPLUGGED, lambda session: session.peek(number)
        case "write_config", [at, digits]:
            offset, data = int(at), bytes.fromhex(digits)
            return Capability.CONFIG_WRITES, lambda session: session.write_config(offset, data)
        case "offer", [flags, ahead, *words]:
            said, further, texts = int(flags), int(ahead), " ".join(words).split(BESIDE) if words else []
            if not (0 <= said <= _U16_MAX and 0 <= further <= _U16_MAX):
                raise ValueError(f"FLAGS and AHEAD are 0 to {_U16_MAX}")
            for text in texts:
                parse_chain(text, _ANYWHERE)
            return Capability.RING, lambda session: session.offer(
                [parse_chain(text, session.place) for text in texts], flags=said, ahead=further
            )
    return None


_NEEDS = {
    "system_reset": Capability.SYSTEM_RESET,
    "notices": Capability.NOTICES,
    "refuse": Capability.HOST_REFUSES,
    "pause": Capability.PAUSE,
    "go": Capability.START,
    "kick": Capability.RING,
    "overrun": Capability.RING,
    "registers": Capability.REGISTERS,
    "sleep": Capability.SLEEP,
    "boot_memory": Capability.BOOT_MEMORY,
    "wake": Capability.SLEEP,
}


def _submitted(call: str) -> Action:
    """A request, or several."""
    texts = call.removeprefix("batch ").split(BESIDE)
    chains = [parse_chain(text, _ANYWHERE) for text in texts]
    plain = all(chain == Chain(chain.request) and len(chain.request) == REQUEST_SIZE for chain in chains)
    need = NO_NEED if plain else Capability.CHAINS
    if any(chain.fill != FILL[0] or chain.odd for chain in chains):
        need |= Capability.RING
    if call.startswith("batch "):
        return need, lambda session: session.batch([parse_chain(text, session.place) for text in texts])
    return need, lambda session: session.chain(parse_chain(call, session.place))
