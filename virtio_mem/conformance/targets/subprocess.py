"""`exec:COMMAND`: a device in any language, behind a program that speaks JSON lines on standard input and output.

docs/conformance-targets.md has the protocol. Whatever the program says is checked for its form here, and for nothing
else: what a device answers is for checks to judge.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from vhost_user.errors import PeerError, UsageError
from vhost_user.units import KIB, U64_MAX
from virtio_mem.conformance.check import FINE
from virtio_mem.conformance.target import (
    FILL,
    Asks,
    Capability,
    Chain,
    Refused,
    Registers,
    Seen,
    Subject,
    Target,
    TargetFailure,
    Used,
    Wish,
    clear,
)
from virtio_mem.conformance.targets.lines import LineProcess, printable, words_of
from virtio_mem.protocol import RESPONSE_SIZE, ConfigSpace

PROTOCOL = "virtio-mem-conformance"
"""The key of the first line, whose value is the protocol's version."""

VERSION = 1

PATIENCE = 10.0
"""Seconds for each answer."""

IMPATIENCE = 1.0
"""The same for a program that let that time go by once: a hundred checks are not to wait so long each."""

_PIECE = 128 * KIB
"""Bytes of memory that are read or written by one line."""

_KINDS = {bool: "true or false", int: "a whole number from 0 to 2**64 - 1", str: "text", list: "a list"}

Value = TypeVar("Value", bool, int, str, list[Any])


_LONGEST_WORDS = 500
"""Characters of what a program says in words."""


class _Answer:
    """What a line of the program says: a JSON object, its parts by name and kind."""

    def __init__(self, said: object, shown: str, process: LineProcess) -> None:
        self._process = process
        self._shown = shown
        if not isinstance(said, dict):
            raise self._wrong("is no JSON object")
        self._fields = said
        if said.get("error"):
            raise process.failure(f"says: {self.words('error')}")

    @classmethod
    def of(cls, line: bytes, process: LineProcess) -> _Answer:
        """The answer that `line` is."""
        shown = printable(line[:_LONGEST_WORDS])
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            raise process.failure(f"answers {shown}, which is no JSON") from None
        return cls(said, shown, process)

    def _wrong(self, what: str) -> TargetFailure:
        return self._process.failure(f"answers {self._shown}, which {what}")

    def get(self, key: str, kind: type[Value]) -> Value:
        """A part that has to be there. Whole numbers are from 0 to 2**64 - 1."""
        value = self._fields.get(key)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= int(value) <= U64_MAX):
            raise self._wrong(f"has no good {key!r}, {_KINDS[kind]}")
        return value

    def has(self, key: str) -> bool:
        """Whether a part is there that may be missing or null."""
        return self._fields.get(key) is not None

    def octets(self, key: str) -> bytes:
        """A part that is text, two hexadecimal digits for each byte."""
        try:
            return bytes.fromhex(self.get(key, str))
        except ValueError:
            raise self._wrong(f"has no good {key!r}, hexadecimal digits") from None

    def words(self, key: str) -> str:
        """A part that is text for people, such that it can be printed."""
        return printable(self.get(key, str)[:_LONGEST_WORDS].encode(errors="backslashreplace"))

    @property
    def refusal(self) -> str | None:
        """Why the program would not do it, if it would not."""
        return None if self._fields.get("refused") is None else self.words("refused")

    def inner(self, key: str) -> list[_Answer]:
        """A part that is a list of objects."""
        return [_Answer(each, self._shown, self._process) for each in self.get(key, list)]

    def room(self, size: int) -> bytes:
        """The part that is the `size` bytes of a chain's room."""
        octets = self.octets("room")
        if len(octets) != size:
            raise self._wrong(f"has a room of {len(octets)} bytes, and that of the chain has {size}")
        return octets


class ProgramSubject(Subject):
    """The device that the program at `process` has from now on. UsageError where it says that none can be as wished."""

    def __init__(self, process: LineProcess, capabilities: Capability, wish: Wish, patience: float) -> None:
        self._process = process
        self._patience = patience
        self._capabilities = capabilities
        self._offered: list[Chain] = []
        started = self._ask("start", **vars(wish))
        if (words := started.refusal) is not None:
            raise UsageError("wish", wish, words)
        self.offered_features = started.get("offered_features", int)

    def _ask(self, do: str, **fields: object) -> _Answer:
        line = json.dumps({"do": do} | fields, separators=(",", ":")).encode()
        return _Answer.of(self._process.ask(line, self._patience), self._process)

    def begin(self, features: int) -> bool:
        """See `Subject`."""
        return self._ask("begin", features=features).get("accepted", bool)

    def config(self) -> ConfigSpace:
        """The bytes that the driver reads. TargetFailure for fewer than 56."""
        octets = self._ask("config").octets("config")
        try:
            return ConfigSpace.decode(octets)
        except PeerError as error:
            raise self._process.failure(f"has a configuration space that is none: {error}") from None

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        """One request after the other, unless the program lays out chains."""
        if Capability.CHAINS not in self._capabilities:
            responses = [self._ask("request", request=chain.request.hex()).octets("response") for chain in chains]
            return [Used(len(response), response.ljust(RESPONSE_SIZE, FILL)) for response in responses]
        used = self._ask("submit", chains=list(map(_fields, chains))).inner("used")
        if len(used) != len(chains):
            raise self._process.failure(f"gives {len(used)} of {len(chains)} buffers back")
        return [
            Used(each.get("length", int), each.room(sum(chain.room))) for each, chain in zip(used, chains, strict=True)
        ]

    def device_reset(self) -> None:
        """See `Subject`."""
        self._ask("device_reset")

    def set_target(self, requested_size: int) -> None:
        """See `Subject`."""
        if (words := self._ask("set_target", requested_size=requested_size).refusal) is not None:
            raise Refused(words)

    def advance(self, seconds: float) -> None:
        """The program's clock, if it has one; else it is waited."""
        if Capability.TIME in self._capabilities:
            self._ask("advance", seconds=seconds)
        else:
            time.sleep(seconds)

    def system_reset(self) -> None:
        """See `Subject`."""
        self._ask("system_reset")

    def take_notices(self) -> int:
        """See `Subject`."""
        return self._ask("notices").get("notices", int)

    def held(self, offset: int, size: int) -> int:
        """See `Subject`."""
        return self._ask("held", offset=offset, size=size).get("held", int)

    def read(self, offset: int, size: int) -> bytes:
        """See `Subject`."""
        pieces = []
        for start in range(offset, offset + size, _PIECE):
            length = min(_PIECE, offset + size - start)
            piece = self._ask("read", offset=start, size=length).octets("data")
            if len(piece) != length:
                raise self._process.failure(f"reads {len(piece)} bytes, and was asked for {length}")
            pieces.append(piece)
        return b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        """See `Subject`."""
        for start in range(0, len(data), _PIECE):
            self._ask("write", offset=offset + start, data=data[start : start + _PIECE].hex())

    def refuse(self, refuses: bool) -> None:
        """See `Subject`."""
        self._ask("refuse", refuses=refuses)

    def pause(self, paused: bool) -> None:
        """See `Subject`."""
        self._ask("pause", paused=paused)

    def prepare(self, features: int) -> bool:
        """See `Subject`."""
        return self._ask("prepare", features=features).get("accepted", bool)

    def go(self) -> None:
        """See `Subject`."""
        self._ask("go")

    def offer(self, chains: Sequence[Chain], asks: Asks) -> None:
        """See `Subject`."""
        self._ask("offer", chains=list(map(_fields, chains)), **asks._asdict())
        self._offered = list(chains)

    def kick(self) -> None:
        """See `Subject`."""
        self._ask("kick")

    def look(self, whole: bool) -> Seen:
        """See `Subject`."""
        answer = self._ask("look", whole=whole)
        used = answer.inner("used")
        if len(used) != len(self._offered):
            raise self._process.failure(f"tells of {len(used)} chains, and {len(self._offered)} were offered")
        return Seen(
            tuple(
                Used(each.get("length", int), each.room(sum(chain.room))) if each.has("length") else None
                for each, chain in zip(used, self._offered, strict=True)
            ),
            answer.get("notified", bool),
            answer.get("flags", int),
        )

    def overrun(self) -> None:
        """See `Subject`."""
        self._ask("overrun")

    def boot_memory(self) -> list[tuple[int, int]]:
        """See `Subject`."""
        return [(each.get("addr", int), each.get("size", int)) for each in self._ask("boot_memory").inner("ram")]

    def sleep(self) -> None:
        """See `Subject`."""
        self._ask("sleep")

    def wake(self) -> None:
        """See `Subject`."""
        self._ask("wake")

    def registers(self) -> Registers:
        """See `Subject`. What the program leaves out or calls null, there is not."""
        answer = self._ask("registers")
        return Registers(**{name: answer.get(name, int) for name in Registers._fields if answer.has(name)})

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Subject`."""
        self._ask("write_config", offset=offset, data=data.hex())

    def close(self) -> None:
        """Nothing is told: the next `start` tells, or the end of the input."""


class ProgramTarget(Target):
    """The device behind the program that `command` starts, a line as for a shell that has quotes and no more.

    UsageError where there is no such program, TargetFailure where it doesn't speak the protocol.
    """

    kind = "exec"

    def __init__(self, command: str, *, name: str = "") -> None:
        self._command = words_of(command)
        self.name = name or f"exec:{command}"
        self._process: LineProcess | None = None
        self._was_silent = False
        self._launch()

    def _launch(self) -> None:
        process = LineProcess(self._command)
        try:
            hello = _Answer.of(process.receive(PATIENCE), process)
            if (spoken := hello.get(PROTOCOL, int)) != VERSION:
                raise process.failure(f"speaks version {spoken} of the protocol, and the kit {VERSION}")
            self.version = hello.words("version")
            self.capabilities = _capabilities(hello.get("capabilities", list), process)
            if Capability.WISH in self.capabilities:  # else nobody knows how much memory its blocks would be
                self.many = FINE
        except BaseException:
            process.close()
            raise
        self._process = process

    def start(self, wish: Wish) -> Subject:
        """A device of the program's; the program is started anew if a failure may have left it anywhere."""
        if self._process is None or self._process.broken:
            self.close()
            self._launch()
        assert self._process is not None
        patience = IMPATIENCE if self._was_silent else PATIENCE
        subject = ProgramSubject(self._process, self.capabilities, wish, patience)
        if Capability.RESTART not in self.capabilities:
            clear(subject)
        return subject

    def close(self) -> None:
        """End the program: its input is closed, and it has a second to end by itself."""
        process, self._process = self._process, None
        if process is not None:
            self._was_silent |= process.silent
            process.close()


def _fields(chain: Chain) -> dict[str, object]:
    """A chain as it is told. What only RING has is left out where it is as ever."""
    fields: dict[str, object] = chain._asdict() | {"request": chain.request.hex()}
    for key in ("fill", "odd"):
        if fields[key] == Chain._field_defaults[key]:
            del fields[key]
    return fields


def _capabilities(names: list[Any], process: LineProcess) -> Capability:
    """Those that are named."""
    known = list(Capability.__members__)
    if unknown := [name for name in names if name not in known]:
        raise process.failure(f"has capabilities {unknown}, and these are known: {', '.join(known)}")
    found = Capability(0)
    for name in names:
        found |= Capability[name]
    return found
