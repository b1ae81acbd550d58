"""Words of 64 bits in shared memory, each of which is stored whole: what a killed process leaves is what it stored."""

from __future__ import annotations


class Words:
    """The words of `view`, whose length in bytes is a multiple of 8, in the host's byte order."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        """The same as bytes."""
        self._words = view.cast("Q")

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value  # one aligned store of the processor

    def put(self, start: int, data: memoryview) -> None:
        """Store `data`, whole words, from word `start` on; in which order nobody knows."""
        self.view[8 * start : 8 * start + len(data)] = data

    def bytes(self, start: int, count: int) -> memoryview:
        """A copy of `count` words from word `start` on."""
        return memoryview(bytes(self.view[8 * start : 8 * (start + count)]))

    def part(self, start: int, count: int) -> Words:
        """`count` words from word `start` on."""
        return Words(self.view[8 * start : 8 * (start + count)])

    def release(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self.view.release()
