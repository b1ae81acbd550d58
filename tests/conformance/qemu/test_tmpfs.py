"""A host that is at its end, as one file sees it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from vhost_user import _native
from vhost_user.errors import HostError
from vhost_user.mapping import PAGE_SIZE, Mapping
from vhost_user.units import MIB, ByteCount, HostOffset
from virtio_mem.conformance.targets.qtest.tmpfs import Tmpfs
from virtio_mem.hostmem import files
from virtio_mem.hostmem.memory import MADV_POPULATE_WRITE

SIZE = ByteCount(8 * MIB)


class Memory:
    """The file, mapped."""

    def __init__(self, tmpfs: Tmpfs, mapping: Mapping) -> None:
        self.tmpfs, self._mapping = tmpfs, mapping

    def populate(self, offset: int, size: int) -> None:
        _native.madvise(self._mapping.address + offset, size, MADV_POPULATE_WRITE)

    def discard(self, offset: int, size: int) -> None:
        files.punch_hole(self.tmpfs.fd, HostOffset(offset), ByteCount(size))

    @property
    def held(self) -> int:
        return files.data_size(self.tmpfs.fd, HostOffset(0), SIZE)


@pytest.fixture
def memory() -> Iterator[Memory]:
    if os.geteuid() != 0:
        pytest.skip("needs_mount: only root mounts file systems")
    with closing(Tmpfs(SIZE)) as tmpfs, Mapping(SIZE, mmap.MAP_SHARED, tmpfs.fd) as mapping:
        yield Memory(tmpfs, mapping)


def test_it_gives_and_takes(memory: Memory) -> None:
    memory.populate(0, SIZE)
    assert memory.held == SIZE
    memory.discard(0, MIB)
    assert memory.held == SIZE - MIB


@pytest.mark.parametrize("before", [0, PAGE_SIZE, MIB])
def test_it_refuses_and_gives_in(memory: Memory, before: int) -> None:
    if before:
        memory.populate(0, before)
    for _ in range(2):
        memory.tmpfs.refuse(True)
        for refused, why in ((memory.populate, errno.EFAULT), (memory.discard, errno.EPERM)):
            with pytest.raises(OSError) as error:  # noqa: PT011
                refused(MIB, PAGE_SIZE)
            assert error.value.errno == why
        assert memory.held == before
    memory.tmpfs.refuse(False)
    memory.populate(MIB, MIB)
    memory.discard(0, MIB)
    assert memory.held == MIB


def test_who_may_not() -> None:
    """As a process of nobody's, which has no rights to lose."""
    child = os.fork()
    if not child:
        try:
            os.setresuid(65534, 65534, 65534)
            Tmpfs(SIZE)
        except HostError as error:
            os._exit(0 if "fsopen failed: EPERM" in str(error) or "fsmount failed: EPERM" in str(error) else 2)
        except PermissionError:
            os._exit(0)  # not root to begin with
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
