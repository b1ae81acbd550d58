"""Which pages the log has after one step, at the places where it matters: ranges that end on a page's first byte."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dirty_log.shared import log_file, log_on, pages
from tests.rings.rig import BORDER, FORMATS, RING, Rig, guest_memory, make_rig, pop
from vhost_user.dirty_log import DirtyLog
from vhost_user.errors import PeerError
from vhost_user.units import GuestAddress
from vhost_user.vring import DeviceQueue, SplitDriver, SplitLayout, SplitQueue

SIZE = 256
"""Of a log for 8 MiB, more than the rig's lower regions."""

PAGE = 0x1000


class Logged:
    """A log that a queue has from the start, and the pages of it that are new."""

    def __init__(self, fd: int, log: DirtyLog) -> None:
        self.fd, self.log = fd, log
        self._seen: set[int] = set()

    def watch(self, queue: DeviceQueue, base: int | None) -> None:
        queue.log, queue.log_used = self.log, None if base is None else GuestAddress(base)

    def new(self) -> set[int]:
        before, self._seen = self._seen, pages(self.fd, SIZE)
        assert before <= self._seen
        return self._seen - before


@pytest.fixture
def logged() -> Iterator[Logged]:
    with log_file(SIZE) as fd, log_on(fd, SIZE) as log:
        yield Logged(fd, log)


def split_rig(size: int, start: int, *, event_idx: bool = False) -> Rig:
    """A split ring whose used ring begins at a page, and whose indices begin at `start`."""
    memory = guest_memory()
    layout = SplitLayout(size, RING, GuestAddress(RING + 16 * size), GuestAddress(RING + 0x8000))
    driver = SplitDriver(memory, layout, event_idx=event_idx, start=start)
    queue = SplitQueue(memory, **vars(layout), event_idx=event_idx, next_avail=start, next_used=start)
    return Rig(memory, layout, driver, queue)


USED = (RING + 0x8000) // PAGE


@pytest.mark.parametrize(
    ("slot", "expected"),
    [
        (0, {USED}),
        (510, {USED}),
        (511, {USED, USED + 1}),  # at 4 + 8 * 511 = 4092: it ends behind the page, as element 1023 does
        (512, {USED, USED + 1}),
        (1023, {USED, USED + 1, USED + 2}),
    ],
)
def test_split_element_and_idx(logged: Logged, slot: int, expected: set[int]) -> None:
    rig = split_rig(1024, slot)
    logged.watch(rig.queue, rig.layout.areas["used"].address)
    rig.driver.add([(0x100000, 1)])
    chain = pop(rig.queue)
    assert logged.new() == set()
    rig.queue.push(chain, 0)
    assert logged.new() == expected


@pytest.mark.parametrize(("event_idx", "enable", "page"), [(False, True, 0), (False, False, 0), (True, True, 2)])
def test_split_advice(logged: Logged, event_idx: bool, enable: bool, page: int) -> None:
    rig = split_rig(1024, 0, event_idx=event_idx)
    logged.watch(rig.queue, rig.layout.areas["used"].address)
    call = rig.queue.enable_notifications if enable else rig.queue.disable_notifications
    call()
    assert logged.new() == {USED + page}


def test_split_advice_that_writes_nothing(logged: Logged) -> None:
    rig = split_rig(1024, 0, event_idx=True)
    logged.watch(rig.queue, rig.layout.areas["used"].address)
    rig.queue.disable_notifications()
    assert logged.new() == set()


@pytest.mark.parametrize("form", FORMATS)
def test_malformed_chains_that_pop_gives_back(logged: Logged, form: str) -> None:
    """As many as a ring of several pages has, in one pop."""
    rig = make_rig(form, 1024)
    base = rig.layout.areas["used" if form == "split" else "desc"].address
    logged.watch(rig.queue, base)
    for _ in range(1024):
        rig.driver.add([(0x100000, 0)])
    assert rig.queue.pop() is None
    last = base + (4 + 8 * 1024 if form == "split" else 16 * 1024) - 1
    assert logged.new() == set(range(base // PAGE, last // PAGE + 1))
    assert rig.queue.malformed == {"zero_length": 1024}


@pytest.mark.parametrize("form", FORMATS)
def test_data(logged: Logged, form: str) -> None:
    rig = make_rig(form, 8)
    logged.watch(rig.queue, None)
    room = [(0x100FFF, 2), (0x105000, 3 * PAGE), (BORDER - 1, 2)]
    rig.driver.add([(0x180000, PAGE)], room)
    chain = pop(rig.queue)
    for data, offset, expected in (
        (b"1", 0, {0x100}),
        (b"1", 1, {0x101}),
        (b"12", 1, {0x105}),
        (b"1", 2 + 3 * PAGE - 1, {0x107}),
        (b"", 2 + PAGE, set[int]()),
        (b"1" * (PAGE + 2), 2, {0x106}),
        (b"1", 2 + 3 * PAGE + 1, {0x200}),
        (b"11", 2 + 3 * PAGE, {0x1FF}),
    ):
        chain.write(data, offset)
        assert logged.new() == expected
    chain.readable_views()
    rig.queue.push(chain, 0)
    assert logged.new() == set()


@pytest.mark.parametrize("form", FORMATS)
def test_views_mark_the_whole_writable_part(logged: Logged, form: str) -> None:
    rig = make_rig(form, 8)
    rig.driver.add([(0x180000, PAGE)], [(0x100FFF, 2), (BORDER - 1, 2)])
    chain = pop(rig.queue)
    views = chain.writable_views()
    logged.watch(rig.queue, None)
    assert logged.new() == set()
    rig.queue.push(chain, 0)
    assert logged.new() == {0x100, 0x101, 0x1FF, 0x200}
    views.clear()


@pytest.mark.parametrize("form", FORMATS)
def test_a_write_that_fails_is_marked_all_the_same(logged: Logged, form: str) -> None:
    """What came before the piece that is gone may be written."""
    rig = make_rig(form, 8)
    logged.watch(rig.queue, None)
    rig.driver.add([], [(0x100000, PAGE), (BORDER, PAGE)])
    chain = pop(rig.queue)
    rig.memory.remove(rig.memory.regions[1])
    with pytest.raises(PeerError):
        chain.write(b"1" * 2 * PAGE)
    assert 0x100 in logged.new()


def test_packed_ring_that_the_log_has_elsewhere(logged: Logged) -> None:
    """QEMU gives the Device Area's address: the descriptor that is written is marked where it lies, too."""
    rig = make_rig("packed", 512)
    device = rig.layout.areas["device"].address
    assert device // PAGE == RING // PAGE + 2
    logged.watch(rig.queue, device)
    for at in range(257):
        rig.driver.add([(0x100000, 1)])
        rig.queue.push(pop(rig.queue), 0)
        assert rig.driver.get_used() is not None
        if at < 255:
            assert logged.new() <= {RING // PAGE, device // PAGE}
    assert logged.new() == {RING // PAGE + 1, device // PAGE + 1}
    rig.queue.disable_notifications()
    assert logged.new() == set(), "the Device Area's page is marked already"
