"""Who answers at once, as a device's C function does, by a function of Python's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vhost_user import _native

VuAnswer = ctypes.CFUNCTYPE(
    ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p
)


class PythonAnswerer:
    """An `Answerer` by `answer`, which has the arguments of a `vu_answer`, pointers as integers."""

    def __init__(self, answer: Callable[[int, int, int, int, int], int], device: int = 0) -> None:
        self._keep = VuAnswer(answer)
        function = ctypes.cast(self._keep, ctypes.c_void_p).value
        assert function is not None
        self.address = function, device
        """What a `_native.Answerer` is made of."""
        self.raw = _native.Answerer(*self.address)

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield
