"""What QEMU is told, and what a user may say of it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from vhost_user.errors import UsageError
from vhost_user.units import GIB, MIB
from virtio_mem.boot.find import Qemu
from virtio_mem.conformance.target import Wish
from virtio_mem.conformance.targets.qtest.command_line import (
    MemoryKind,
    QemuOptions,
    Shape,
    command_line,
    require_options,
    shape_of,
)
from virtio_mem.conformance.targets.qtest.machine import Program
from virtio_mem.conformance.targets.qtest.memory import Private, Ram

PAGE = Path(__file__).parents[3] / "docs/conformance-targets.md"
OLD_OPTIONS = frozenset({"prealloc", "packed"})
OLD = Program(Qemu(("qemu",), release="7.2.22"), False, OLD_OPTIONS)
NEW = Program(Qemu(("qemu",), release="11.1.3"), True, OLD_OPTIONS | {"ioeventfd", "dynamic-memslots"})
ANY = Wish()


def told(program: Program, text: str = "", wish: Wish = ANY) -> str:
    options, ram = QemuOptions.parse(text), Ram()
    try:
        return " ".join(command_line(program, options, shape_of(wish, options), ram, Private(wish.region_size)))
    finally:
        ram.close()


@pytest.mark.parametrize(
    ("wish", "options", "shape"),
    [
        (Wish(1 * GIB, 2 * MIB, 64 * MIB), "", Shape(1 * GIB, 2 * MIB, 64 * MIB, None)),
        (Wish(1 * GIB, 2 * MIB, 6 * MIB), "block_size=4M", Shape(1 * GIB, 4 * MIB, 8 * MIB, None)),
        (Wish(10 * MIB + 1, 4096, 0, node_id=2), "", Shape(11 * MIB, MIB, 0, 2)),
        (Wish(1 * GIB, 1 * GIB, 0, node_id=128), "", Shape(1 * GIB, 1 * GIB, 0, 127)),
    ],
)
def test_what_comes_nearest_to_a_wish(wish: Wish, options: str, shape: Shape) -> None:
    assert shape_of(wish, QemuOptions.parse(options)) == shape


def test_a_qemu_without_the_accelerator_is_started_stopped() -> None:
    assert "accel=tcg" in told(OLD)
    assert told(OLD).split().count("-S") == 1
    assert "-S" not in told(NEW).split()


def test_only_options_that_it_has() -> None:
    assert "ioeventfd=off" in told(NEW, "prealloc=on")
    assert "ioeventfd" not in told(OLD)
    assert told(NEW, "prealloc=on,packed=on,dynamic_memslots=on").endswith(
        ",dynamic-memslots=on,prealloc=on,packed=on,ioeventfd=off"
    )
    assert "unplugged-inaccessible" not in told(NEW, "unplugged_inaccessible=on")
    assert told(NEW, "unplugged_inaccessible=off").endswith(",unplugged-inaccessible=off,ioeventfd=off")
    require_options(QemuOptions.parse("prealloc=on"), OLD)
    with pytest.raises(UsageError, match=r"qemu dynamic-memslots=on: QEMU 7\.2\.22 does not have it"):
        require_options(QemuOptions.parse("dynamic_memslots=on"), OLD)
    with pytest.raises(UsageError, match=r"qemu unplugged-inaccessible=off: QEMU 7\.2\.22 does not have it"):
        require_options(QemuOptions.parse("unplugged_inaccessible=off"), OLD)


def test_nodes_up_to_the_one_that_is_wished() -> None:
    words = told(NEW, wish=Wish(node_id=2)).split()
    assert [word for word in words if word.startswith("node,")] == [
        "node,nodeid=0,memdev=ram",
        "node,nodeid=1",
        "node,nodeid=2",
    ]
    assert "memory-backend=ram" not in " ".join(words)


def test_the_page_has_every_option() -> None:
    page = PAGE.read_text()
    keys = {field.name.replace("_", "-") for field in fields(QemuOptions)} - {"-written", "memory"}
    wanted = [f"memory={memory}" for memory in MemoryKind] + [f"{key}=" for key in sorted(keys)]
    assert [text for text in wanted if f"`{text}" not in page] == []
