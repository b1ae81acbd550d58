"""A session's calls and answers as words: what a reader sees, what a file holds, and what a replay reads back.

One line is one call: `plug 0 4 -> ACK`. Where a request lies is said in blocks of the region, so that a line means the
same to a device whose region is elsewhere: `b4` is block 4, `b4+0x1000` is 4096 bytes further on, `@0x10` is an address
far away from the region. A request that is cut up, or longer than it need be, has its bytes beside it.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from vhost_user.errors import PeerError, UsageError
from virtio_mem.conformance.target import Chain, Odd, Registers, Used, Wish
from virtio_mem.protocol import (
    REQUEST_SIZE,
    RESPONSE_SIZE,
    BlockState,
    ConfigSpace,
    RequestType,
    Response,
    ResponseType,
)

ARROW = " -> "
"""Between a call and its answer."""

BESIDE = " | "
"""Between the requests of one kick, and between their answers."""

NO_FLAG = " without the write flag"
"""Behind an answer that a driver would have to take for none."""

NEAR = 2**20
"""Up to so many blocks away from the region an address is told by its block."""

LONGEST = 60
"""Letters of a line beside a picture that has no room for more: what is longer ends in CUT there."""

CUT = "..."

_PICTURE = re.compile(r"(?<=\S)\s{2,}[\[\]#.!~ ]+$")

REQUESTS = {
    "plug": "plug BLOCK BLOCKS",
    "unplug": "unplug BLOCK BLOCKS",
    "unplug_all": "unplug_all",
    "state": "state BLOCK BLOCKS",
    "ask": "ask TYPE ADDR BLOCKS",
    "chain": "chain TYPE ADDR BLOCKS|hex=HEX [pad=HEX] [tail=HEX] [more=HEX] [readable=N,N...] [room=N,N...] [fill=N] "
    "[odd=N] [indirect]",
}
"""The form of each call that is a request, by its first word."""

WISH_FORM = "wish region_size=N block_size=N requested_size=N node_id=none"
"""The form of a session's first line; a node's number may stand for none."""

_WORDS = {RequestType.PLUG: "plug", RequestType.UNPLUG: "unplug", RequestType.STATE: "state"}
_TYPES = {word: type_ for type_, word in _WORDS.items()}
_PLAIN = Chain(b"")
_PARTS = struct.Struct("<H6sQH6s")
_NO_PADDING = bytes(6)


class Place(NamedTuple):
    """Where the region lies and how large its blocks are, in bytes: what an address is told by."""

    addr: int
    block_size: int

    def addr_of(self, block: int, shift: int = 0) -> int:
        """The guest address `shift` bytes behind the start of `block`, also outside the region; modulo 2**64."""
        return (self.addr + block * self.block_size + shift) % 2**64

    def block_of(self, addr: int) -> tuple[int, int] | None:
        """The block of `addr` and the bytes into it, or None where it is far away from the region."""
        block_size = self.block_size or 1
        near = NEAR * block_size
        offset = (addr - self.addr + near) % 2**64 - near
        return divmod(offset, block_size) if -near <= offset < near else None


class Answer(NamedTuple):
    """What a device said to one request: `type` None where that is no response at all.

    `state` is there where a STATE was granted. `used` is what came back of the buffer, whatever it holds.
    """

    type: ResponseType | None
    state: BlockState | None
    used: Used

    @classmethod
    def of(cls, request: bytes, used: Used) -> Answer:
        """What `used` says to `request`."""
        if used.length < RESPONSE_SIZE:
            return cls(None, None, used)
        asks_state = request[:2] == RequestType.STATE.to_bytes(2, "little")
        answer = used.room if asks_state else used.room[:8] + bytes(2)
        try:
            response = Response.decode(answer)
        except PeerError:
            return cls(None, None, used)
        granted = asks_state and response.type is ResponseType.ACK
        return cls(response.type, response.state if granted else None, used)

    def __str__(self) -> str:
        if self.type is None:
            return f"{self.used.length} bytes: {self.used.room[: max(self.used.length, RESPONSE_SIZE)].hex()}"
        words = self.type.name if self.state is None else f"{self.type.name} {self.state.name}"
        words = words if self.used.length == RESPONSE_SIZE else f"{words} in {self.used.length} bytes"
        return words if self.used.flagged else words + NO_FLAG


class Looked(NamedTuple):
    """What a look at the ring showed: the answer to each chain that was offered, None where there is none yet;
    whether a used buffer notification came; what the device's area says."""

    answers: list[Answer | None]
    notified: bool
    flags: int

    def __str__(self) -> str:
        answers = BESIDE.join("nothing yet" if answer is None else str(answer) for answer in self.answers)
        return f"{answers or 'no chain'}, {'a' if self.notified else 'no'} notification, flags {self.flags}"


def chain_words(chain: Chain, place: Place) -> str:
    """`plug 0 4` where that says it all, `ask` for another type or address, else `chain` with all of it."""
    rest = _rest_words(chain)
    if len(chain.request) < REQUEST_SIZE:
        return f"chain hex={chain.request.hex()}{rest}"
    type_, pad, addr, nb_blocks, tail = _PARTS.unpack_from(chain.request)
    more = chain.request[REQUEST_SIZE:]
    bare = not (rest or more) and pad == tail == _NO_PADDING
    where = place.block_of(addr)
    if bare and type_ == RequestType.UNPLUG_ALL and not nb_blocks and not addr:
        return "unplug_all"
    if bare and type_ in _WORDS and where and not where[1]:
        return f"{_WORDS[RequestType(type_)]} {where[0]} {nb_blocks}"
    words = f"{type_} {addr_words(addr, place)} {nb_blocks}"
    if bare:
        return f"ask {words}"
    for name, data, default in (("pad", pad, _NO_PADDING), ("tail", tail, _NO_PADDING), ("more", more, b"")):
        if data != default:
            words += f" {name}={data.hex()}"
    return f"chain {words}{rest}"


def _rest_words(chain: Chain) -> str:
    words = ""
    if chain.readable != _PLAIN.readable:
        words += f" readable={','.join(map(str, chain.readable))}"
    if chain.room != _PLAIN.room:
        words += f" room={','.join(map(str, chain.room))}"
    for name, value in (("fill", chain.fill), ("odd", int(chain.odd))):
        if value != getattr(_PLAIN, name):
            words += f" {name}={value}"
    return f"{words} indirect" if chain.indirect else words


def addr_words(addr: int, place: Place) -> str:
    """`b4`, `b4+0x1000` or `@0x10`."""
    where = place.block_of(addr)
    if where is None:
        return f"@{addr:#x}"
    return f"b{where[0]}+{where[1]:#x}" if where[1] else f"b{where[0]}"


def parse_chain(text: str, place: Place) -> Chain:
    """What `chain_words` said, for a region at `place`. UsageError for other words."""
    try:
        return _parse_chain(text.split(), place)
    except (ValueError, IndexError, struct.error) as error:
        word = text.split(maxsplit=1)[0] if text.strip() else ""
        if word not in REQUESTS:
            known = f"they are {', '.join(REQUESTS)}"
            raise UsageError("call", text, "can't be read: there is no such request", known) from error
        why = "words are missing" if isinstance(error, IndexError) else error
        raise UsageError("call", text, f"can't be read: {why}", f"it is {REQUESTS[word]!r}") from error


def _parse_chain(words: list[str], place: Place) -> Chain:
    match words:
        case ["unplug_all"]:
            return Chain(request_bytes(RequestType.UNPLUG_ALL, 0, 0))
        case ["plug" | "unplug" | "state" as word, block, nb_blocks]:
            return Chain(request_bytes(_TYPES[word], place.addr_of(int(block)), int(nb_blocks)))
        case ["ask", type_, addr, nb_blocks]:
            return Chain(request_bytes(int(type_), _parse_addr(addr, place), int(nb_blocks)))
        case ["chain", *rest]:
            named = {name: value for name, _, value in (word.partition("=") for word in rest)}
            if (data := named.get("hex")) is not None:
                request = bytes.fromhex(data)
            else:
                pad, tail = (bytes.fromhex(named.get(name, "00" * 6)) for name in ("pad", "tail"))
                head = _PARTS.pack(int(rest[0]), pad, _parse_addr(rest[1], place), int(rest[2]), tail)
                request = head + bytes.fromhex(named.get("more", ""))
            lengths = {name: _lengths(named[name]) for name in ("readable", "room") if name in named}
            fill, odd = int(named.get("fill", _PLAIN.fill)), int(named.get("odd", 0))
            if not 0 <= fill <= 255 or not 0 <= odd <= sum(Odd):
                raise ValueError(f"fill={fill} is no byte, or odd={odd} none of those that there are")
            return Chain(request, indirect="indirect" in named, odd=Odd(odd), fill=fill, **lengths)
    raise ValueError("its words are too many or too few")


def _lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(map(int, text.split(","))) if text else ()
    if any(length < 0 for length in lengths):
        raise ValueError(f"{text} has a length below 0")
    return lengths


def _parse_addr(word: str, place: Place) -> int:
    if word.startswith("@"):
        return int(word[1:], 0)
    if not word.startswith("b"):
        raise ValueError(f"{word} is no address")
    block, _, shift = word[1:].partition("+")
    return place.addr_of(int(block), int(shift, 0) if shift else 0)


def request_bytes(type_: int, addr: int, nb_blocks: int, *, pad: bytes = bytes(6), tail: bytes = bytes(6)) -> bytes:
    """The 24 bytes of a request, with something in its paddings: `pad` behind the type, `tail` behind nb_blocks."""
    return _PARTS.pack(type_, pad, addr, nb_blocks, tail)


def wish_words(wish: Wish) -> str:
    """A session's first line."""
    node_id = "none" if wish.node_id is None else wish.node_id
    sizes = f"region_size={wish.region_size} block_size={wish.block_size} requested_size={wish.requested_size}"
    return f"wish {sizes} node_id={node_id}"


def parse_wish(text: str) -> Wish:
    """What `wish_words` said. UsageError for other words."""
    try:
        word, *rest = text.split()
        named = dict(part.split("=", 1) for part in rest)
        node_id = named.pop("node_id")
        if word != "wish":
            raise ValueError("it begins with another word")
        sizes = {name: int(value) for name, value in named.items()}
        return Wish(**sizes, node_id=None if node_id == "none" else int(node_id))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("wish", text, f"can't be read: {error}", f"it is {WISH_FORM!r}") from error


def without_picture(line: str) -> str:
    """A line as it was before a picture of its blocks was set behind it. No call or answer has two blanks together."""
    return _PICTURE.sub("", line)


def config_words(config: ConfigSpace) -> str:
    """Every field with its name; the address in hexadecimal."""
    return " ".join(
        f"{name}={value:#x}" if name == "addr" else f"{name}={value}" for name, value in config._asdict().items()
    )


def registers_words(registers: Registers) -> str:
    """Every register with its name."""
    return " ".join(f"{name}={'none' if value is None else value}" for name, value in registers._asdict().items())
