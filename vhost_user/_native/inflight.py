"""What an inflight area was told last, for both who tell it: the packages's own code, and the C core for a batch."""

from __future__ import annotations

from vhost_user._core import ffi


class Inflight:
    """`area` begins with its head, and stays until `close()`; the words behind it are what csrc/inflight_api.h says."""

    __slots__ = ("_area", "_keep", "pointer")

    def __init__(self, area: memoryview, **words: object) -> None:
        self._area = ffi.from_buffer("uint8_t[]", area, require_writable=True)
        self._keep = words
        self.pointer = ffi.new("struct vu_inflight *", {"area": self._area, **words})

    def close(self) -> None:
        """Let go of the area: whoever gives this to a call from now on gets a TypeError. Twice is fine."""
        ffi.release(self._area)
        self.pointer = None

    @property
    def counter(self) -> int:
        """The next chain's."""
        return int(self.pointer.counter)

    @counter.setter
    def counter(self, value: int) -> None:
        self.pointer.counter = value


class SplitInflight(Inflight):
    """That of a split queue."""

    __slots__ = ()

    @property
    def used_idx(self) -> int:
        """That of the area."""
        return int(self.pointer.used_idx)

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self.pointer.used_idx = value

    @property
    def last_batch_head(self) -> int:
        """That of the area."""
        return int(self.pointer.last_batch_head)

    @last_batch_head.setter
    def last_batch_head(self, value: int) -> None:
        self.pointer.last_batch_head = value


class PackedInflight(Inflight):
    """That of a packed queue whose area has `entries`: `next` of each, and `last` and `num` of each that is a chain's
    first one."""

    __slots__ = ("last", "next", "num")

    def __init__(self, area: memoryview, entries: int) -> None:
        lists = {name: ffi.new("uint16_t[]", entries) for name in ("next", "last", "num")}
        super().__init__(area, **lists, taken=ffi.new("struct vu_descriptor[]", entries))
        self.next, self.last, self.num = (memoryview(ffi.buffer(each)).cast("H") for each in lists.values())

    @property
    def free_head(self) -> int:
        """That of the area."""
        return int(self.pointer.free_head)

    @free_head.setter
    def free_head(self, value: int) -> None:
        self.pointer.free_head = value

    @property
    def used(self) -> tuple[int, bool]:
        """The used position: its slot and its wrap counter."""
        return int(self.pointer.used_slot), bool(self.pointer.used_wrap)

    @used.setter
    def used(self, position: tuple[int, bool]) -> None:
        self.pointer.used_slot, self.pointer.used_wrap = position
