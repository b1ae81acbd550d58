"""Host memory that is mapped as long as somebody has it."""

from __future__ import annotations

import os
from functools import partial
from weakref import ref

from vhost_user._core import ffi, lib

RESERVE: int = lib.VU_RESERVE
MAP: int = lib.VU_MAP
GUARD: int = lib.VU_GUARD

_RECORD = ffi.typeof("struct vu_mapping *")
_MEMORY = ffi.typeof("char *")


class MapError(OSError):
    """What the host refused, in making a mapping, at `step`: RESERVE, MAP or GUARD."""

    def __init__(self, result: int, step: int) -> None:
        super().__init__(-result, os.strerror(-result))
        self.step = step


class Mapped:
    """`size` bytes of a file, mapped as `vu_map` in csrc/mapping_api.h has it, `guarded` being a page size or 0.

    They are unmapped when this and all views are gone. The views refer to the memory, and so does this until `close()`.
    """

    def __init__(self, size: int, alignment: int, flags: int, fd: int, offset: int, guarded: int) -> None:
        record = ffi.new(_RECORD)
        # From the first moment on there is somebody to unmap it, whatever interrupts.
        undo = ffi.gc(record, lib.vu_unmap)
        result = lib.vu_map(record, size, alignment, flags, fd, offset, guarded)
        if result < 0:
            raise MapError(result, record.step)
        self.address: int = record.address
        self._size = size
        self._record = record
        # Nothing of Python's runs while it is unmapped: what a signal's handler raises there would be lost. The record
        # has nothing to do at its own end: the garbage collector ends what goes together in any order, and cffi frees
        # what it ends.
        self._memory = ffi.gc(ffi.cast(_MEMORY, self.address), partial(lib.vu_let_go, record))
        ffi.gc(undo, None)

    @property
    def closed(self) -> bool:
        """Whether `close()` was called, and not refused."""
        return "_memory" not in vars(self)

    @property
    def dead(self) -> bool:
        """Whether it is guarded and an access met missing memory."""
        return bool(lib.vu_mapping_dead(self._record))

    @property
    def lifeline(self) -> object:
        """What views refer to. Gone only when nobody has it."""
        return self._memory

    def view(self, start: int, end: int) -> memoryview:
        """A writable view of a part. ValueError where there is none, since it is closed."""
        try:
            return memoryview(ffi.buffer(self._memory, self._size))[start:end]
        except AttributeError:
            raise ValueError("the mapping was closed") from None

    def close(self) -> None:
        """Unmap; BufferError, and nothing happens, while a view lives. Closing twice is allowed."""
        # One step, whoever else closes.
        if (memory := vars(self).pop("_memory", None)) is None:
            return
        view = ref(memory)
        del memory
        if (memory := view()) is not None:
            self._memory = memory
            del memory  # the error's traceback has this frame
            raise BufferError("a view of the mapping lives")
