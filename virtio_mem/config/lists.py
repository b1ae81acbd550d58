"""The kinds of value that are lists: tuples in Python, in text either `[a,b]` or the older `a:b`, printed as `[a,b]`.

An empty tuple is a list that was not given; in text there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from virtio_mem.config import syntax
from virtio_mem.config.errors import ConfigError
from virtio_mem.config.values import NAME, Kind, Number

Element = TypeVar("Element")


@dataclass(frozen=True)
class ListOf(Kind[tuple[Element, ...]]):
    """Elements of one kind, in the order given, none twice."""

    element: Kind[Element]

    def read(self, where: str, text: str) -> tuple[Element, ...]:
        """The elements of a list in either syntax."""
        return tuple(self.element.read(where, item) for item in syntax.read_list(where, text))

    def check(self, where: str, value: object) -> tuple[Element, ...]:
        """A tuple, or a list made a tuple."""
        if not isinstance(value, (tuple, list)):
            raise ConfigError(where, repr(value), "must be a tuple", "give a tuple, as in (1,) or (1, 2)")
        elements: dict[Element, None] = {}  # thousands of CPUs, of which each is looked for
        for item in value:
            element = self.element.check(where, item)
            if element in elements:
                raise ConfigError(where, self.element.show(element), "is in the list twice", "name it once")
            elements[element] = None
        return tuple(elements)

    def show(self, value: tuple[Element, ...]) -> str:
        """The list in brackets."""
        return f"[{','.join(self.element.show(element) for element in value)}]"


class Integers(ListOf[int]):
    """Whole numbers from 0 to a maximum; in text also ranges, as in 0-99, from the lower to the higher number."""

    def __init__(self, maximum: int) -> None:
        super().__init__(Number(maximum))

    def read(self, where: str, text: str) -> tuple[int, ...]:
        """The numbers, ranges written out."""
        return tuple(number for item in syntax.read_list(where, text) for number in self._read_range(where, item))

    def _read_range(self, where: str, text: str) -> range:
        first, dash, last = text.partition("-")
        start = self.element.check(where, self.element.read(where, first))
        if not dash:
            return range(start, start + 1)
        stop = self.element.check(where, self.element.read(where, last))
        if stop <= start:
            remedy = f"write {start}" if stop == start else "swap its ends"
            raise ConfigError(where, text, "a range goes from a lower to a higher number", remedy)
        return range(start, stop + 1)

    def show(self, value: tuple[int, ...]) -> str:
        """The list in brackets, with ranges where numbers follow one another."""
        return f"[{','.join(_show_runs(value))}]"


def _show_runs(numbers: tuple[int, ...]) -> Iterator[str]:
    """`3` or `3-7` for each run of numbers that grows by one."""
    start = 0
    for index, number in enumerate(numbers, 1):
        if index == len(numbers) or numbers[index] != number + 1:
            yield str(number) if index - start == 1 else f"{numbers[start]}-{number}"
            start = index


NAMES = ListOf(NAME)
