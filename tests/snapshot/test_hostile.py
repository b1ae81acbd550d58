"""Snapshots that somebody cut, changed or made up: refused with the reason, and nothing is left open."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from tests import counts
from tests.snapshot.helpers import BLOCK, HOTPLUG, config, content, fill
from vhost_user.errors import FieldError, UsageError
from virtio_mem.manager import MemoryManager
from virtio_mem.snapshot import restore, save
from virtio_mem.snapshot.manifest import Manifest

FILES = ("snapshot.json", "mem0.boot", "mem0.hotplug", "mem0.blocks")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    with MemoryManager(config("memfd", tmp_path)) as manager:
        fill(manager, random.Random(5))
        manager.pause()
        save(manager, tmp_path / "snapshot")
    return tmp_path / "snapshot"


def change(snapshot: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = snapshot / "snapshot.json"
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_cut_or_too_long(snapshot: Path, name: str) -> None:
    path = snapshot / name
    whole = path.read_bytes()
    for spoilt in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"x"):
        path.write_bytes(spoilt)
        with pytest.raises(UsageError):
            restore(snapshot)
    path.unlink()
    with pytest.raises(UsageError, match="No such file"):
        restore(snapshot)
    path.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="symbolic links"):
        restore(snapshot)
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="regular file"):
        restore(snapshot)


def test_a_file_that_is_another_each_time_that_it_is_opened(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the right size, and its successor the right digest."""
    digest = blake2b(b"", digest_size=32).hexdigest()
    change(snapshot, lambda top: top["zones"][0]["device"].update(blocks=digest))
    real, path = os.open, snapshot / "mem0.blocks"

    def open_and_replace(name: Any, flags: int, *more: Any) -> int:
        fd = real(name, flags, *more)
        if name == path:
            (snapshot / "empty").touch()
            (snapshot / "empty").replace(path)
        return fd

    monkeypatch.setattr(os, "open", open_and_replace)
    with pytest.raises(UsageError, match="digest"):
        restore(snapshot)


@pytest.mark.parametrize("name", FILES[1:])
def test_one_bit_that_is_not_as_it_was(snapshot: Path, name: str, rng: random.Random) -> None:
    data = bytearray((snapshot / name).read_bytes())
    looked_at = range(len(data))
    if name == "mem0.hotplug":  # what is in unplugged blocks is nobody's
        blocks = (snapshot / "mem0.blocks").read_bytes()
        plugged = [block for block in range(HOTPLUG // BLOCK) if blocks[block // 8] >> block % 8 & 1]
        block = rng.choice(plugged)
        looked_at = range(block * BLOCK, (block + 1) * BLOCK)
    data[rng.choice(looked_at)] ^= 1 << rng.randrange(8)
    (snapshot / name).write_bytes(data)
    with pytest.raises(UsageError, match="digest"):
        restore(snapshot)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda top: top.update(version=1), "version=1: must be 2"),
        (lambda top: top.update(format="other"), "format"),
        (lambda top: top.update(more=1), "snapshot=more"),
        (lambda top: top.pop("options"), "snapshot=options"),
        (lambda top: top.update(zones={}), "zones=dict: must be a list"),
        (lambda top: top.update(zones=[]), "zones=: must be those of the options"),
        (lambda top: top["zones"].append(top["zones"][0]), "zones=mem0, mem0"),
        (lambda top: top["zones"].append(7), r"zones\[1\]=int"),
        (lambda top: top["zones"][0].update(id="../../etc/passwd"), "must be those of the options"),
        (lambda top: top["zones"][0].update(boot=None), "zone mem0 boot=missing"),
        (lambda top: top["zones"][0].update(boot=3), r"zones\[0\]\.boot=int: must be an object"),
        (lambda top: top["zones"][0].update(device=None), "zone mem0 device=missing"),
        (lambda top: top["zones"][0]["boot"].update(size=1), "zone mem0 size=1: must be 4194304"),
        (lambda top: top["zones"][0]["boot"].update(size=True), "must be int"),
        (lambda top: top["zones"][0]["boot"].update(size=-1), "must be from 0 to"),
        (lambda top: top["zones"][0]["boot"].update(digest=None), "zone mem0 content"),
        (lambda top: top["zones"][0]["device"].update(addr=0), "zone mem0 addr=0: has to be"),
        (lambda top: top["zones"][0]["device"].update(node_id=None), "zone mem0 node_id"),
        (lambda top: top["zones"][0]["device"].update(block_size=1 << 20), "zone mem0 block_size"),
        (lambda top: top["zones"][0]["device"].update(requested_size=3), "zone mem0 requested_size=3"),
        (lambda top: top["zones"][0]["device"].update(requested_size=1 << 60), "at most region_size"),
        (lambda top: top["zones"][0]["device"].update(usable_region_size=BLOCK), "zone mem0 usable_region_size"),
        (lambda top: top["zones"][0]["device"].update(usable_region_size=1 << 50), "zone mem0 usable_region_size"),
        (lambda top: top["zones"][0]["device"].update(plugged_size=0), "zone mem0 plugged_size=0"),
        (lambda top: top.update(usable_region="all"), "usable_region=all"),
        (lambda top: top.update(block_size=3), "block_size"),
        (lambda top: top.update(options="--memory size=lots"), "size"),
        (lambda top: top.update(options="--memory 'size"), "size"),
        (lambda top: top.update(options=top["options"].replace("id=mem0", "id=\ud800")), "memory-zone id"),
        (lambda top: top.update(options=top["options"].replace("id=mem0", "id=a\0b")), "memory-zone id"),
        (lambda top: top.update(options=top["options"].replace("id=mem0", "id=mem0,file=/\ud800")), "file"),
        (lambda top: top.update(options=top["options"].replace("id=mem0", "id=mem0,file=/a\0b")), "file"),
        (lambda top: top.update(options="--memory " + "a" * 300_000), "options=300009 letters: must be at most"),
        (lambda top: top.update(version="x" * 300_000), "version=x{60}: must be 2"),
        (lambda top: top.update(options="--memory size=64M"), "zone mem0 hotplug=there: must be what the options make"),
    ],
)
def test_a_manifest_that_says_something_else(
    snapshot: Path, edit: Callable[[dict[str, Any]], object], reason: str
) -> None:
    change(snapshot, edit)
    with pytest.raises(FieldError, match=reason):
        restore(snapshot)


def test_a_hotplug_region_that_was_in_a_file(snapshot: Path) -> None:
    """As versions before had it, whose file is not asked for: it may be anybody's."""
    named = {"digest": None, "path": "/zone", "inode": 1, "file_size": 1, "device": 1, "file_offset": 0}
    change(snapshot, lambda top: top["zones"][0]["hotplug"].update(named))
    with pytest.raises(UsageError, match=r"file=/zone: .*restore it with the version that made it"):
        restore(snapshot)


def test_blocks_outside_the_usable_region(snapshot: Path) -> None:
    """All plugged in the file, and the digest to go with it, but the usable region ends before."""
    import hashlib  # noqa: PLC0415

    data = b"\xff" * (HOTPLUG // BLOCK // 8)
    (snapshot / "mem0.blocks").write_bytes(data)
    digest = hashlib.blake2b(data, digest_size=32).hexdigest()
    changes = {"blocks": digest, "requested_size": 0, "plugged_size": HOTPLUG, "usable_region_size": BLOCK}
    change(snapshot, lambda top: top["zones"][0]["device"].update(changes))
    with pytest.raises(UsageError, match="within usable_region_size"):
        restore(snapshot)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"x"', "[" * 100_000, "\xff", "NaN", '{"format": 1}'])
def test_what_is_no_manifest(snapshot: Path, text: str) -> None:
    (snapshot / "snapshot.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError):
        restore(snapshot)


@pytest.mark.parametrize("directory", ["a\0b", "\ud800", Path("a\0b"), Path("\ud800"), b"a", 5, None])
def test_what_is_no_directory(tmp_path: Path, directory: Any) -> None:
    with pytest.raises(UsageError, match=r"directory=.* has to be a path"):
        restore(directory)
    with MemoryManager(config("memfd", tmp_path)) as manager:
        manager.pause()
        with pytest.raises(UsageError, match=r"directory=.* has to be a path"):
            save(manager, directory)


def test_a_manifest_without_end(snapshot: Path) -> None:
    with (snapshot / "snapshot.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="at most"):
        restore(snapshot)


def test_a_manifest_is_read_back_as_it_was_written(snapshot: Path) -> None:
    data = (snapshot / "snapshot.json").read_bytes()
    assert Manifest.decode(data).encode() == data


def test_random_damage_is_refused_or_harmless(snapshot: Path, tmp_path: Path, rng: random.Random) -> None:
    """Bytes of any file changed, cut or added. What is restored all the same has the content that was saved."""
    with restore(snapshot) as manager:
        expected = content(manager)
    whole = {name: (snapshot / name).read_bytes() for name in FILES}
    refusals = 0
    for _ in range(counts.SPOILT_SNAPSHOTS):
        name = rng.choices(FILES, weights=[5, 1, 1, 3])[0]
        data = bytearray(whole[name])
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        (snapshot / name).write_bytes(data)
        try:
            with restore(snapshot) as manager:
                found = content(manager)
        except FieldError:
            refusals += 1
        else:
            assert found == expected
        (snapshot / name).write_bytes(whole[name])
    assert refusals
    shutil.rmtree(snapshot)
