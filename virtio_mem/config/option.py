"""What the options have in common: keys with kinds, read from text or taken as keyword arguments, checked and printed.

An option is a frozen dataclass whose fields are its keys, in the order in which they are printed. A field's metadata
holds its kind. A field without a default is mandatory, and None is allowed where it is the default. A default that was
written out is remembered, so that it is printed again, and so that nobody is warned of what was not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Self

from virtio_mem.config import syntax
from virtio_mem.config.errors import ConfigError
from virtio_mem.config.values import Kind

_KIND = "kind"


def kind(of: Kind[Any]) -> Mapping[str, Kind[Any]]:
    """The metadata of a field whose values are of that kind."""
    return {_KIND: of}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One occurrence of a command-line option. Both ways to make one raise ConfigError for what breaks its rules."""

    OPTION: ClassVar[str]
    """The option's name on the command line, such as --memory."""

    IDENTITY: ClassVar[str] = ""
    """The key that tells several occurrences apart, if there may be several."""

    _written: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The option from its text, such as `size=1G,shared=on`."""
        keys = _keys(cls)
        texts = syntax.read_options(cls.OPTION, text, keys)
        labels = {name: cls._label(name, syntax.unquote(texts.get(cls.IDENTITY, ""))) for name in keys}
        for name, key in keys.items():
            if name not in texts and key.default is MISSING:
                raise ConfigError(labels[name], None, "is mandatory", f"add {name}=")
        for name, value in texts.items():
            if not value:
                raise ConfigError(labels[name], "", "has no value", f"write one behind {name}=, or leave it out")
        option = cls(**{name: _kind(keys[name]).read(labels[name], value) for name, value in texts.items()})
        object.__setattr__(option, "_written", frozenset(texts))
        return option

    def __post_init__(self) -> None:
        for name, key in _keys(type(self)).items():
            value = getattr(self, name)
            if value is not None or key.default is not None:
                object.__setattr__(self, name, _kind(key).check(self.label(name), value))
        self._check_rules()

    def _check_rules(self) -> None:
        """Raise ConfigError where values, each good alone, break a rule together."""

    def label(self, key: str) -> str:
        """The name of `key` in errors: `--memory size`, or `--memory-zone id=mem0 size`."""
        return self._label(key, getattr(self, self.IDENTITY, ""))

    @classmethod
    def _label(cls, key: str, identity: object) -> str:
        who = "" if identity == "" or key == cls.IDENTITY else f"{cls.IDENTITY}={identity} "
        return f"{cls.OPTION} {who}{key}"

    def error(self, key: str, limit: str, remedy: str) -> ConfigError:
        """What is wrong with the value of `key`, to be raised."""
        return ConfigError(self.label(key), self._show(key), limit, remedy)

    @property
    def explicit(self) -> frozenset[str]:
        """The keys that were written, or that differ from their default: of keyword arguments only the latter."""
        return self._written | {name for name, key in _keys(type(self)).items() if getattr(self, name) != key.default}

    def __str__(self) -> str:
        """The option's text, which `parse` reads back: the `explicit` keys, in the order of the fields."""
        explicit = self.explicit
        return ",".join(f"{name}={self._show(name)}" for name in _keys(type(self)) if name in explicit)

    def _show(self, key: str) -> str:
        return _kind(_keys(type(self))[key]).show(getattr(self, key))


def _keys(of: type[Option]) -> dict[str, Field[Any]]:
    return {key.name: key for key in fields(of) if _KIND in key.metadata}


def _kind(key: Field[Any]) -> Kind[Any]:
    of: Kind[Any] = key.metadata[_KIND]
    return of
