"""Who answers at once, as a device's C function does, by a function of Python's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vhost_user import _native

VuAnswer = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)


class PythonAnswerer:
    """An `Answerer` by `answer`, which has the arguments of a `vu_answer`, pointers as integers."""

    def __init__(self, answer: Callable[[int, int, int, int], int]) -> None:
        self._keep = VuAnswer(answer)
        address = ctypes.cast(self._keep, ctypes.c_void_p).value
        assert address is not None
        self.raw = _native.Answerer(address, 0)

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield
