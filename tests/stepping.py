"""A process that is stepped instruction by instruction (ptrace(2)), and what it leaves after each of its stores."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_TRACEME, _CONT, _SINGLESTEP = 0, 7, 9
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None):
        raise OSError(ctypes.get_errno(), "ptrace")


def stepped(work: Callable[[], T]) -> T:
    """Do some work; to be called in a child, of whose parent `left_by()` steps it."""
    sys.settrace(None)  # of coverage each instruction would be stepped, too
    _ptrace(_TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    done = work()
    os.kill(os.getpid(), signal.SIGSTOP)
    return done


def left_by(pid: int, look: Callable[[], T]) -> list[T]:
    """What `look` saw before the child's `stepped()` work, and each time that it saw something else after one of its
    instructions. The child goes on then."""
    _wait_for_stop(pid)
    found = [look()]
    while True:
        _ptrace(_SINGLESTEP, pid)
        stopped_by = _wait_for_stop(pid)
        if (left := look()) != found[-1]:
            found.append(left)
        if stopped_by == signal.SIGSTOP:  # once more, at the end
            _ptrace(_CONT, pid)
            return found


def _wait_for_stop(pid: int) -> int:
    """By which signal it was stopped."""
    _, status = os.waitpid(pid, 0)
    assert os.WIFSTOPPED(status), f"it has ended, with status {status:#x}"
    return os.WSTOPSIG(status)
