"""Page faults that somebody else answers, from both sides: userfaultfd(2)."""

from __future__ import annotations

from vhost_user._core import ffi, lib
from vhost_user._native.result import checked


def userfault_open() -> int:
    """A userfaultfd for this process's own faults."""
    return checked(lib.vu_userfault_open())


def userfault_register(uffd: int, address: int, size: int) -> None:
    """Have faults on pages that are missing from a range wait for an answer through `uffd`."""
    checked(lib.vu_userfault_register(uffd, address, size))


def userfault_unregister(uffd: int, address: int, size: int) -> None:
    """Have faults in a range be the kernel's again, and wake who waits for one."""
    checked(lib.vu_userfault_unregister(uffd, address, size))


def fault_take(uffd: int) -> int | None:
    """The address of the next page fault that a userfaultfd tells of, without waiting. OSError for what is none."""
    address = ffi.new("uint64_t *")
    return int(address[0]) if checked(lib.vu_fault_take(uffd, address)) else None


def fault_fill(uffd: int, address: int, page: bytes) -> bool:
    """Have `page` at `address` of a userfaultfd's process, unless one is there already, and wake who waits for it.

    Whether it was put there. OSError with EAGAIN while that process changes its mappings, ENOENT or ESRCH where its
    mapping or itself is gone.
    """
    return bool(checked(lib.vu_fault_fill(uffd, address, page, len(page))))
