"""A device's state in a file: what one process leaves another one finds, and what is damaged is refused."""

from __future__ import annotations

import errno
import os
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import counts
from tests.serve.killed import SLOTS
from tests.serve.rig import ADDR, BLOCK_SIZE, NB_BLOCKS, zone
from vhost_user.errors import HostError, UsageError
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import Effect, EffectType
from virtio_mem.geometry import Geometry
from virtio_mem.protocol import BlockState, Request, RequestType
from virtio_mem.serve import files
from virtio_mem.serve.intent import MOST_CHAINS, ChainKey, Chains, Phase
from virtio_mem.serve.state import DeviceState, state_size

GEOMETRY = zone().geometry
WHOLE = Run(BlockIndex(0), NB_BLOCKS)
CHAIN = ChainKey(3, 7, Request(RequestType.PLUG, ADDR, 2))
MAGIC, BITS, RECORD = 0, 4096, 256


@pytest.fixture
def file() -> Iterator[OwnedFd]:
    with files.state_memfd("test", state_size(GEOMETRY)) as fd:
        yield fd


def load(file: OwnedFd, geometry: Geometry = GEOMETRY) -> DeviceState:
    return DeviceState(file.fileno(), geometry, requested_size=8 * BLOCK_SIZE)


def effect(type_: EffectType, run: Run) -> Effect:
    return Effect(type_, run, HostOffset(run.first * BLOCK_SIZE), ByteCount(run.nb_blocks * BLOCK_SIZE))


def put(file: OwnedFd, at: int, *words: int) -> None:
    os.pwrite(file.fileno(), struct.pack(f"={len(words)}Q", *words), at)


def test_a_blank_file_becomes_a_new_device(file: OwnedFd) -> None:
    state = load(file)
    assert state.blank
    assert state.device.config.requested_size == 8 * BLOCK_SIZE
    assert state.device.plugged_size == 0
    assert state.intent is None
    state.close()


def test_everything_is_found_again(file: OwnedFd) -> None:
    state = load(file)
    state.counters = lambda: (5, 3)
    state.device.resize(NB_BLOCKS * BLOCK_SIZE)
    state.device.blocks.plug(Run(BlockIndex(3), 9))
    state.device.pause()
    state.changed()
    config = state.device.config
    state.close()
    again = load(file)
    assert not again.blank
    assert again.device.config == config
    assert list(again.device.blocks.plugged_runs()) == [(3, 9)]
    assert again.device.paused
    assert again.counted == (5, 3)
    again.close()


def test_sizes_are_written_when_they_change(file: OwnedFd) -> None:
    state = load(file)

    def slots() -> bytes:
        return os.pread(file.fileno(), RECORD - SLOTS[0], SLOTS[0])

    before = slots()
    state.device.blocks.plug(Run(BlockIndex(3), 2))
    state.changed()
    assert slots() == before
    state.counters = lambda: (5, 3)
    state.changed()
    assert slots() != before
    state.device.pause()
    state.changed()
    state.close()
    again = load(file)
    assert again.counted == (5, 3)
    assert again.device.paused
    again.close()


@pytest.mark.parametrize("slot", SLOTS)
def test_one_of_the_two_slots_is_enough(file: OwnedFd, slot: int) -> None:
    state = load(file)
    for blocks in (2, 4):
        state.device.resize(blocks * BLOCK_SIZE)
        state.changed()
    newest = max(SLOTS, key=lambda at: int.from_bytes(os.pread(file.fileno(), 8, at), "little"))
    state.close()
    put(file, slot + 8, 6 * BLOCK_SIZE)  # torn: the checksum is another's
    again = load(file)
    assert again.device.requested_size == (2 if slot == newest else 4) * BLOCK_SIZE
    again.close()


def test_what_has_no_room_changes_nothing_that_was_saved(file: OwnedFd) -> None:
    state = load(file)
    for count in (5, 7):
        state.counters = lambda count=count: (count, 0)  # type: ignore[misc]
        state.changed()
    saved = os.pread(file.fileno(), RECORD, 0)
    state.counters = lambda: (2**64, 0)
    for _ in SLOTS:
        with pytest.raises(struct.error):
            state.changed()
    assert os.pread(file.fileno(), RECORD, 0) == saved
    state.close()
    again = load(file)
    assert again.counted == (7, 0)
    again.close()


def put_slot(file: OwnedFd, slot: int, *values: int) -> None:
    put(file, slot, *values, 0, zlib.crc32(struct.pack("=6Q", *values)))


def test_a_generation_that_can_not_be_counted_on_is_none(file: OwnedFd) -> None:
    load(file).close()
    put_slot(file, SLOTS[0], 2**63, 0, 0, 0, 0, 0)
    put_slot(file, SLOTS[1], 7, BLOCK_SIZE, BLOCK_SIZE, 0, 5, 3)
    state = load(file)
    assert (state.device.requested_size, state.counted) == (BLOCK_SIZE, (5, 3))
    state.close()
    put_slot(file, SLOTS[1], 2**64 - 1, 0, 0, 0, 0, 0)
    with pytest.raises(UsageError, match="sizes"):
        load(file)


def test_counts_beyond_what_clients_can_follow_are_of_a_version_before(file: OwnedFd) -> None:
    load(file).close()
    put_slot(file, SLOTS[0], 7, BLOCK_SIZE, BLOCK_SIZE, 1, 2**63, 2**64 - 1)
    state = load(file)
    assert state.device.requested_size == BLOCK_SIZE
    assert state.device.paused
    assert state.counted == (2**63 - 1, 2**63 - 1)
    state.changed()
    state.close()


@pytest.mark.parametrize("type_", [EffectType.PLUG, EffectType.UNPLUG, EffectType.UNPLUG_ALL])
def test_what_was_granted_is_made_whole(file: OwnedFd, type_: EffectType) -> None:
    state = load(file)
    run = WHOLE if type_ is EffectType.UNPLUG_ALL else Run(BlockIndex(2), 4)
    if type_ is not EffectType.PLUG:
        state.device.blocks.plug(Run(BlockIndex(1), 7))
    state.serving = Chains.of(CHAIN)
    state.opening(effect(type_, run))
    state.granted(effect(type_, run))
    state.device.blocks.put(
        Run(BlockIndex(2), 2), BlockState.PLUGGED if type_ is EffectType.PLUG else BlockState.UNPLUGGED
    )
    state.close()
    again = load(file)
    expected = {
        EffectType.PLUG: [(2, 4)],
        EffectType.UNPLUG: [(1, 1), (6, 2)],
        EffectType.UNPLUG_ALL: [],
    }
    assert list(again.device.blocks.plugged_runs()) == expected[type_]
    assert again.granted_before(CHAIN)
    again.done()
    assert not again.granted_before(CHAIN)
    again.close()


def test_what_was_opened_waits_for_the_memory(file: OwnedFd) -> None:
    state = load(file)
    state.serving = Chains.of(CHAIN)
    state.opening(effect(EffectType.PLUG, Run(BlockIndex(2), 4)))
    state.close()
    again = load(file)
    assert again.intent is not None
    assert (again.intent.phase, again.intent.chains) == (Phase.OPEN, (CHAIN,))
    assert again.device.plugged_size == 0
    again.close()


@pytest.mark.parametrize(
    "other",
    [
        ChainKey(4, 7, CHAIN.request),
        ChainKey(3, 8, CHAIN.request),
        ChainKey(3, 7, Request(RequestType.PLUG, ADDR, 3)),
        ChainKey(3, 7, Request(RequestType.UNPLUG, ADDR, 2)),
    ],
)
def test_an_answer_is_for_its_chain_alone(file: OwnedFd, other: ChainKey) -> None:
    state = load(file)
    state.serving = Chains.of(CHAIN)
    state.opening(effect(EffectType.PLUG, Run(BlockIndex(0), 2)))
    state.granted(effect(EffectType.PLUG, Run(BlockIndex(0), 2)))
    assert not state.granted_before(other)
    assert not state.granted_before(CHAIN), "the record is gone"
    state.close()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"block_size": ByteCount(2 * BLOCK_SIZE)}, "size|block_size"),
        ({"addr": 2 * ADDR}, "addr"),
        ({"region_size": ByteCount(NB_BLOCKS // 2 * BLOCK_SIZE)}, "region_size"),
        ({"node_id": 0}, "node_id"),
    ],
)
def test_the_state_of_another_device_is_refused(file: OwnedFd, change: dict[str, int], field: str) -> None:
    load(file).close()
    values = {name: getattr(GEOMETRY, name) for name in ("addr", "region_size", "block_size", "node_id")}
    with pytest.raises(UsageError, match=field):
        load(file, Geometry(**values | change))


@pytest.mark.parametrize(
    ("at", "words", "field"),
    [
        (MAGIC, [1], "magic"),
        (8, [3], "checksum"),
        (56, [1], "checksum"),
        (SLOTS[0], [0] * 16, "sizes"),
        (RECORD, [3], "phase"),
        (RECORD + 40, [3], "phase"),
        (RECORD, [1, 4, 0, 1], "effect"),
        (RECORD, [1, 1, 0, 0], "blocks"),
        (RECORD, [1, 1, 0, NB_BLOCKS + 1], "blocks"),
        (RECORD, [1, 1, 2**63, 2**63], "blocks"),
        (RECORD, [2, 3, 1, 2], "blocks.*all blocks"),
        (RECORD, [1, 1, 0, 1, MOST_CHAINS + 1], "chains"),
        (RECORD, [1, 1, 0, 1, 1, 0, 0, 0, 1 << 16], "chain"),
        (RECORD, [2, 2, 0, 1, 0, 0, 2**63], "unplugged"),
        (RECORD, [0, 0, 0, 0, 0, 1, 0, 2**63], "unplugged"),
        (RECORD, [1, 1, 0, 1, 2, 0, 0, 0, 1, 1 << 48], "chain"),
        (BITS, [1 << NB_BLOCKS], "bits"),
        (BITS + 2048, [1], "bits"),
    ],
)
def test_damage_is_refused(file: OwnedFd, at: int, words: list[int], field: str) -> None:
    load(file).close()
    put(file, at, *words)
    before = os.pread(file.fileno(), 1 << 14, 0)
    with pytest.raises(UsageError, match=r"has to be.*; remove the state: it is damaged"):
        load(file)
    with pytest.raises(UsageError, match=field):
        load(file)
    assert os.pread(file.fileno(), 1 << 14, 0) == before


def test_blocks_beyond_the_usable_region_are_refused(file: OwnedFd) -> None:
    geometry = zone(1024).geometry
    with files.state_memfd("large", state_size(geometry)) as large:
        load(large, geometry).close()
        put(large, BITS + 64, 1)
        with pytest.raises(UsageError, match="usable_region_size"):
            load(large, geometry)
        put(large, BITS + 64, 0)
        put(large, RECORD, 2, 1, 512, 1)
        with pytest.raises(UsageError, match="intent"):
            load(large, geometry)


@pytest.mark.parametrize("size", [0, 4096, 1 << 20])
def test_a_file_of_another_size_is_refused(size: int) -> None:
    with files.state_memfd("test", size) as fd, pytest.raises(UsageError, match="size"):
        load(fd)


def test_random_damage_is_refused_or_harmless(file: OwnedFd, rng: random.Random) -> None:
    load(file).close()
    good = os.pread(file.fileno(), state_size(GEOMETRY), 0)
    refused = 0
    for _ in range(counts.DAMAGED_STATES):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.choice([rng.randrange(64), rng.randrange(128, 384), rng.randrange(4096, 4104)])
            bad[at] = rng.choice([0, 1, 2, 3, 4, 0xFF, rng.randrange(256)])
        os.pwrite(file.fileno(), bad, 0)
        try:
            state = load(file)
        except UsageError:
            refused += 1
            continue
        device = state.device
        assert device.plugged_size <= device.usable_region_size <= device.geometry.region_size
        assert device.requested_size <= device.usable_region_size
        state.close()
    assert refused > counts.DAMAGED_STATES // 4


def test_files_in_a_directory(tmp_path: Path) -> None:
    size = state_size(GEOMETRY)
    with files.state_file(tmp_path, "a/b ü", size) as fd:
        assert os.fstat(fd.fileno()).st_size == size
        assert os.fstat(fd.fileno()).st_mode & 0o777 == 0o600
        load(fd).close()
    assert [path.name for path in tmp_path.iterdir()] == ["a%2fb%20%c3%bc.state"]
    with files.state_file(tmp_path, "a/b ü", size) as fd:
        state = load(fd)
        assert not state.blank
        state.close()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dir.state").mkdir()
    (tmp_path / "link.state").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe.state")
    for name in ("dir", "link"):
        with pytest.raises(HostError, match="state"):
            files.state_file(tmp_path, name, 8192)
    with pytest.raises(UsageError, match="regular file"):
        files.state_file(tmp_path, "pipe", 8192)
    with pytest.raises(HostError, match="ENOENT"):
        files.state_file(tmp_path / "missing", "mem0", 8192)


def test_a_directory_is_one_services(tmp_path: Path) -> None:
    with files.lock(tmp_path), pytest.raises(HostError, match="another service"):
        files.lock(tmp_path)
    files.lock(tmp_path).close()
    with pytest.raises(HostError, match="ENOENT"):
        files.lock(tmp_path / "missing")


def test_a_directory_without_room_is_told_as_that_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, _: int, size: int) -> None:
        os.ftruncate(fd, size // 2)  # a file system may keep what it had room for
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(HostError, match=r"fallocate failed: ENOSPC .*; make room for 8192 bytes there"):
            files.state_file(tmp_path, "mem0", 8192)
    with files.state_file(tmp_path, "mem0", 8192) as fd:
        assert os.fstat(fd.fileno()).st_size == 8192
