"""Where a mapping lies, and when it goes: with `close()`, which a view refuses, or with the last to have it."""

from __future__ import annotations

import gc
import mmap
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest

from tests.shared_memory.helpers import HUGE, SMALL, Pages, guarded, mappings
from vhost_user._core import ffi, lib
from vhost_user._native import mapping as native
from vhost_user.errors import HostError
from vhost_user.mapping import MAP_NORESERVE, PAGE_SIZE, Mapping, map_part
from vhost_user.units import MIB, ByteCount

FLAGS = mmap.MAP_PRIVATE | MAP_NORESERVE


@pytest.mark.parametrize("alignment", [0, HUGE, 8 * HUGE])
@pytest.mark.parametrize("off", [0, 1, 3])
def test_it_is_aligned_wherever_the_last_one_was(alignment: int, off: int) -> None:
    before = mappings()
    with ExitStack() as stack:
        for _ in range(off):
            stack.enter_context(Mapping(ByteCount(PAGE_SIZE), FLAGS))
        for size in (HUGE, 2 * HUGE + PAGE_SIZE):
            mapping = stack.enter_context(Mapping(ByteCount(size), FLAGS, alignment=alignment))
            assert mapping.address % max(alignment, HUGE) == 0
            mapping.view()[-1] = 1
    assert mappings() <= before + 1, "the slack goes, too"


def test_what_comes_again_finds_its_place() -> None:
    """There is room above, where the kernel would put it."""
    with Pages(PAGE_SIZE).file(HUGE // PAGE_SIZE) as fd:
        above = guarded(fd, HUGE)
        with guarded(fd, HUGE) as mapping:
            address = mapping.address
        above.close()
        with guarded(fd, HUGE) as mapping:
            assert mapping.address == address


def test_a_refusal_that_is_kept_holds_nothing() -> None:
    with Mapping(ByteCount(PAGE_SIZE), FLAGS) as mapping:
        view = mapping.view()
        with pytest.raises(BufferError, match="view") as refusal:
            mapping.close()
        assert not mapping.closed
        view[0] = 7
        assert mapping.view()[0] == 7
        view.release()
        mapping.close()
        assert mapping.closed
        assert refusal.value


def test_it_goes_with_the_last_slice_of_a_view() -> None:
    mapping = Mapping(ByteCount(PAGE_SIZE), FLAGS)
    lives = ref(mapping.lifeline)
    part = mapping.view()[10:20][2:4]
    with pytest.raises(BufferError):
        mapping.close()
    del mapping
    part[0] = 1
    assert lives() is not None
    del part
    assert lives() is None


def test_nothing_is_seen_of_it_once_it_is_closed() -> None:
    mapping = Mapping(ByteCount(PAGE_SIZE), FLAGS)
    mapping.close()
    mapping.close()
    assert (mapping.closed, mapping.dead) == (True, False)
    with pytest.raises(ValueError, match="closed"):
        mapping.view()


def test_no_code_of_pythons_runs_while_it_is_unmapped() -> None:
    """Else a signal that comes meanwhile has its handler run there, and what that raises would be lost."""
    mapping, called = Mapping(ByteCount(PAGE_SIZE), FLAGS), []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        mapping.close()
    finally:
        sys.setprofile(None)
    assert called == ["close", "close"]


@pytest.mark.parametrize("size", [2**47, 2**63, 2**64 - PAGE_SIZE, 2**70])
def test_there_is_no_room_for_it(size: int) -> None:
    before = mappings()
    with pytest.raises(HostError, match="no room in the address space"):
        Mapping(ByteCount(size), FLAGS)
    assert mappings() == before


def test_a_file_that_can_not_be_asked() -> None:
    with SMALL.file(1) as fd:
        closed = fd.fileno()
    with pytest.raises(HostError, match="fstat or fstatfs failed: EBADF"):
        map_part(closed, 0, 1)


def test_a_mapping_that_the_garbage_collector_ends_has_its_record_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it unmaps what the memory of its record has come to hold by then, which is another thread's."""
    seen, others = [], []

    def let_go(record: Any, memory: Any) -> None:
        for _ in range(100):
            others.append(ffi.new("struct vu_mapping *"))
            ffi.memmove(others[-1], b"\xff" * ffi.sizeof(others[-1][0]), ffi.sizeof(others[-1][0]))
        seen.append(record.size)
        lib.vu_let_go(record, memory)

    core = SimpleNamespace(vu_map=lib.vu_map, vu_unmap=lib.vu_unmap, vu_let_go=let_go)
    monkeypatch.setattr(native, "lib", core)
    mapped = native.Mapped(MIB, PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0, 0)
    mapped.itself = mapped  # type: ignore[attr-defined]
    del mapped
    gc.collect()
    assert seen == [MIB]
