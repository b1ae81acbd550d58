"""The kinds of value that an option can have: how each is read, checked and printed.

A kind does three things. `read` turns text into a value and finds fault with the text only. `check` takes any value,
also one from a keyword argument, and finds fault with what no option of that kind can be. `show` prints a value so that
`read` gives the same again. Rules between two values of an option belong to the option.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Generic, TypeVar

from vhost_user.units import GIB, KIB, MIB, TIB, U64_MAX, ByteCount, format_size, is_whole
from virtio_mem.config import syntax
from virtio_mem.config.errors import ConfigError

Value = TypeVar("Value")
ChoiceValue = TypeVar("ChoiceValue", bound=StrEnum)

U32_MAX = 2**32 - 1

_SUFFIXES = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(f"([0-9]+)([{''.join(_SUFFIXES)}]?)")
_NUMBER = re.compile("[0-9]+")
_TOO_MANY_DIGITS = len(str(U64_MAX)) + 1
_TOGGLES = {"on": True, "true": True, "off": False, "false": False}


class Kind(ABC, Generic[Value]):
    """A kind of value. `where` names the option and key in errors, which are ConfigErrors."""

    @abstractmethod
    def read(self, where: str, text: str) -> Value:
        """The value that `text`, not empty, stands for."""

    @abstractmethod
    def check(self, where: str, value: object) -> Value:
        """`value`, if an option of this kind can have it."""

    @abstractmethod
    def show(self, value: Value) -> str:
        """`value` in the syntax that `read` takes."""


def read_whole(digits: str) -> int:
    """Decimal digits as a number. Of more than 20 digits only the first 21 count: what is beyond 64 bits stays beyond
    them, and int() refuses strings of some thousand digits."""
    return int(digits.lstrip("0")[:_TOO_MANY_DIGITS] or "0")


def _encodes(text: str, encode: Callable[[str], bytes]) -> bool:
    """Whether `text` can be handed to the kernel: a lone surrogate, say, has no encoding."""
    try:
        return b"\0" not in encode(text)
    except UnicodeEncodeError:
        return False


def show_size(size: int) -> str:
    """`size` bytes with the largest suffix that divides it, but never T: Cloud Hypervisor reads K, M and G only."""
    return f"{size // GIB}G" if size and size % GIB == 0 else format_size(size)


@dataclass(frozen=True)
class Size(Kind[ByteCount]):
    """A number of bytes: digits and one of the suffixes K, M, G and T, each 1024 times the one before it.

    The suffixes are capitals, as in Cloud Hypervisor.
    """

    zero: bool = True

    def read(self, where: str, text: str) -> ByteCount:
        """Bytes."""
        match = _SIZE.fullmatch(syntax.unquote(text))
        if not match:
            remedy = "write it like 512M: the suffix is K, M, G or T, a capital, or none for bytes"
            raise ConfigError(where, text, "a size is a whole number with at most one suffix", remedy)
        size = read_whole(match[1]) * _SUFFIXES[match[2]]
        if size > U64_MAX:
            raise ConfigError(where, text, f"a size is at most 2**64 - 1 bytes, {U64_MAX}", "choose a smaller one")
        return ByteCount(size)

    def check(self, where: str, value: object) -> ByteCount:
        """An int in bytes."""
        if not is_whole(value, U64_MAX):
            raise ConfigError(where, value, "a size is 0 to 2**64 - 1 bytes", "give an int in bytes")
        if value == 0 and not self.zero:
            raise ConfigError(where, value, "a size of 0 is invalid here", "give a size above 0, or leave it out")
        return ByteCount(value)

    def show(self, value: ByteCount) -> str:
        """Digits and perhaps a suffix."""
        return show_size(value)


@dataclass(frozen=True)
class Number(Kind[int]):
    """A whole number from `minimum` to `maximum`."""

    maximum: int = U32_MAX
    minimum: int = 0

    def read(self, where: str, text: str) -> int:
        """An int."""
        digits = syntax.unquote(text)
        if not _NUMBER.fullmatch(digits):
            raise self.error(where, text)
        return read_whole(digits)

    def check(self, where: str, value: object) -> int:
        """An int within bounds."""
        if not is_whole(value, self.maximum) or value < self.minimum:
            raise self.error(where, value)
        return value

    def error(self, where: str, value: object) -> ConfigError:
        """What is wrong with `value`, to be raised."""
        limit = f"must be a whole number from {self.minimum} to {self.maximum}"
        return ConfigError(where, value, limit, "choose one of these")

    def show(self, value: int) -> str:
        """Decimal digits."""
        return str(value)


class Toggle(Kind[bool]):
    """A switch: on or off, or as Cloud Hypervisor allows too, true or false, in any case of letters."""

    def read(self, where: str, text: str) -> bool:
        """True for on."""
        if text.lower() not in _TOGGLES:
            raise ConfigError(where, text, "must be on or off", "write on or off")
        return _TOGGLES[text.lower()]

    def check(self, where: str, value: object) -> bool:
        """A bool."""
        if not isinstance(value, bool):
            raise ConfigError(where, value, "must be True or False", "give a bool")
        return value

    def show(self, value: bool) -> str:
        """on or off."""
        return "on" if value else "off"


@dataclass(frozen=True)
class Choice(Kind[ChoiceValue]):
    """One of the members of an enumeration, in any case of letters."""

    members: type[ChoiceValue]

    def read(self, where: str, text: str) -> ChoiceValue:
        """The member."""
        try:
            return self.members(text.lower())
        except ValueError:
            raise self._error(where, text, f"write {self._words}") from None

    def check(self, where: str, value: object) -> ChoiceValue:
        """A member, not only its text."""
        if not isinstance(value, self.members):
            raise self._error(where, value, f"give a {self.members.__name__}")
        return value

    @property
    def _words(self) -> str:
        return " or ".join(self.members)

    def _error(self, where: str, value: object, remedy: str) -> ConfigError:
        return ConfigError(where, value, f"must be {self._words}", remedy)

    def show(self, value: ChoiceValue) -> str:
        """The member's text."""
        return value.value


class Name(Kind[str]):
    """An identifier: any text but none at all, that UTF-8 can have and a file's name can be made of.

    Two underscores at the start are reserved, as in Cloud Hypervisor.
    """

    def read(self, where: str, text: str) -> str:
        """The text without its quotes."""
        return self.check(where, syntax.unquote(text))

    def check(self, where: str, value: object) -> str:
        """A str."""
        if not isinstance(value, str) or not value:
            raise ConfigError(where, value or None, "must be a text that is not empty", "give it a name, such as mem0")
        if not _encodes(value, str.encode):
            raise ConfigError(where, repr(value), "has to be UTF-8 without a zero byte", "choose another name")
        if value.startswith("__"):
            raise ConfigError(where, value, "names that start with __ are reserved", "choose another name")
        return value

    def show(self, value: str) -> str:
        """The text, between quotes where needed."""
        return syntax.quote(value)


class File(Kind[Path]):
    """The path of a file or a directory. Whether it exists is not asked here."""

    def read(self, where: str, text: str) -> Path:
        """The path without its quotes."""
        path = syntax.unquote(text)
        if not path:
            raise ConfigError(where, text, "must be a path that is not empty", "give a path, or leave the key out")
        return Path(path)

    def check(self, where: str, value: object) -> Path:
        """A pathlib.Path that a system call can take."""
        if not isinstance(value, Path) or not _encodes(str(value), os.fsencode):
            limit = "has to be a path that the file system's encoding has, without a zero byte"
            raise ConfigError(where, repr(value), limit, "give a pathlib.Path")
        return value

    def show(self, value: Path) -> str:
        """The path, between quotes where needed."""
        return syntax.quote(str(value))


SIZE = Size()
NONZERO_SIZE = Size(zero=False)
TOGGLE = Toggle()
NAME = Name()
FILE = File()
U32 = Number()
