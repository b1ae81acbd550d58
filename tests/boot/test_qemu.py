"""The command line, word by word where it matters; whether QEMU takes it is for test_guest.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhost_user.units import GIB, MIB, TIB, ByteCount
from virtio_mem.boot.cpus import CpusConfig
from virtio_mem.boot.layout import MachineLayout, lay_out_machine
from virtio_mem.boot.qemu import BackingFile, QemuOptions, cpu_model, kernel_command_line, qemu_arguments
from virtio_mem.config import ConfigError, NumaConfig, NumaDistance
from virtio_mem.layout import ZoneSize

NUMA = (
    NumaConfig(guest_numa_id=0, cpus=(0, 1, 2, 5), memory_zones=("a",), distances=(NumaDistance(1, 15),)),
    NumaConfig(guest_numa_id=1, memory_zones=("b",)),
)
PAGE = ByteCount(4096)


def machine(numa: tuple[NumaConfig, ...] = NUMA) -> MachineLayout:
    zones = [
        ZoneSize("a", ByteCount(GIB + 64 * MIB), ByteCount(GIB), PAGE, ByteCount(2 * MIB)),
        ZoneSize("b", ByteCount(0), ByteCount(GIB), ByteCount(2 * MIB), ByteCount(2 * MIB)),
    ]
    return lay_out_machine(zones, numa, 6)


def words(layout: MachineLayout, *, accel: str = "tcg", initrd: str | None = None) -> list[tuple[str, str]]:
    """Options with their values."""
    options = QemuOptions(
        nb_cpus=6,
        accel=accel,
        kernel="vmlinuz",
        initrd=initrd,
        append="console=ttyS0",
        files={
            ("a", False): BackingFile(5, 0, False),
            ("a", True): BackingFile(6, 4096, False),
            ("b", True): BackingFile(7, 0, True),
        },
        sockets={"a": Path("/tmp/x,y.sock"), "b": Path("/tmp/b.sock")},
        qmp_fd=9,
        extra=("-device", "virtio-rng-pci"),
    )
    arguments = qemu_arguments(layout, options)
    return [(word, arguments[index + 1]) for index, word in enumerate(arguments[:-1]) if word.startswith("-")]


def test_each_part_is_a_file_that_is_inherited() -> None:
    found = words(machine())
    file = "memory-backend-file,id={},size={},share=on,mem-path=/proc/self/fd/{}"
    assert ("-object", file.format("ram0", GIB + 64 * MIB, 5)) in found
    assert ("-object", file.format("ram2", GIB, 6) + ",offset=4096") in found
    assert ("-object", file.format("ram3", GIB, 7) + ",reserve=off") in found
    assert ("-m", f"size={(3 * GIB + 64 * MIB) // 1024}k") in found
    assert ("-machine", f"q35,accel=tcg,max-ram-below-4g={GIB + 64 * MIB}") in found


def test_nodes_processors_and_distances() -> None:
    found = words(machine())
    assert [value for name, value in found if name == "-numa" and value.startswith("node")] == [
        "node,nodeid=0,memdev=ram0,cpus=0-5",
        "node,nodeid=1",
        "node,nodeid=2,memdev=ram2",
        "node,nodeid=3,memdev=ram3",
    ]
    assert ("-numa", "dist,src=0,dst=1,val=15") in found
    assert ("-numa", "dist,src=3,dst=0,val=15") in found
    assert ("-object", "acpi-generic-initiator,id=initiator1,pci-dev=vmem1,node=1") in found


def test_processors_in_runs() -> None:
    numa = (NUMA[0], NumaConfig(guest_numa_id=1, cpus=(3, 4), memory_zones=("b",)))
    found = [value for name, value in words(machine(numa)) if name == "-numa"]
    assert found[:2] == ["node,nodeid=0,memdev=ram0,cpus=0-2,cpus=5", "node,nodeid=1,cpus=3-4"]


def test_a_device_for_each_hotpluggable_zone() -> None:
    found = words(machine())
    assert ("-chardev", "socket,id=vmem0-socket,path=/tmp/x,,y.sock") in found
    device = (
        "vhost-user-test-device-pci,id=vmem1,chardev=vmem1-socket,virtio-id=24,num_vqs=1,vq_size=128,config_size=56"
    )
    assert ("-device", device) in found
    assert ("-chardev", "socket,id=qmp,fd=9") in found
    assert ("-device", "vmcoreinfo") in found
    assert found[-1] == ("-device", "virtio-rng-pci")


def test_the_initrd_is_left_out_where_there_is_none() -> None:
    assert "-initrd" not in dict(words(machine()))
    assert dict(words(machine(), initrd="i"))["-initrd"] == "i"


def test_the_guest_is_told_what_it_has() -> None:
    boot_end = GIB + 64 * MIB
    assert kernel_command_line(machine(), "quiet", "mem", "kvm") == f"quiet mem={boot_end}"
    assert kernel_command_line(machine(), "", "memmap", "kvm") == f"memmap={2 * GIB:#x}%{4 * GIB:#x}-1"
    assert kernel_command_line(machine(()), "quiet", "mem", "kvm") == f"quiet mem={boot_end} numa=off"
    plain = lay_out_machine([ZoneSize("a", ByteCount(GIB), ByteCount(0), PAGE, PAGE)], NUMA[:1], 6)
    assert kernel_command_line(plain, "quiet", "mem", "kvm") == "quiet"


def test_an_emulated_processor_that_is_late_is_no_broken_clock() -> None:
    plain = machine(())
    assert kernel_command_line(plain, "quiet", "mem", "tcg").endswith(" numa=off no_timer_check tsc=reliable")
    for own in ("tsc=unstable", "quiet notsc"):
        assert kernel_command_line(plain, own, "mem", "tcg").endswith(" numa=off no_timer_check")
    assert kernel_command_line(plain, "atsc=1", "mem", "tcg").endswith("tsc=reliable")
    assert dict(words(plain))["-append"].endswith("tsc=reliable")


@pytest.mark.parametrize(
    ("append", "told"),
    [
        ("quiet -- single", "quiet mem={} numa=off -- single"),
        ("--", "mem={} numa=off --"),
        ('a--b c="d -- e"', 'a--b c="d -- e" mem={} numa=off'),
    ],
)
def test_what_is_for_init_stays_last(append: str, told: str) -> None:
    assert kernel_command_line(machine(()), append, "mem", "kvm") == told.format(GIB + 64 * MIB)


@pytest.mark.parametrize(
    ("accel", "end", "model"),
    [
        ("tcg", 6 * GIB, "max"),
        ("tcg", TIB - 64 * GIB, "max"),
        ("tcg", TIB - 63 * GIB, "max,vendor=GenuineIntel,phys-bits=41"),
        ("tcg", 60 * TIB, "max,vendor=GenuineIntel,phys-bits=46"),
        ("kvm", 6 * GIB, "host"),
    ],
)
def test_processors_have_address_bits_for_all_memory(accel: str, end: int, model: str) -> None:
    assert cpu_model(accel, end) == model


def test_cpus() -> None:
    assert CpusConfig.parse("boot=4").boot == 4
    assert CpusConfig.parse("boot=4,max=4").max == 4
    assert CpusConfig.parse("boot=4096").boot == 4096
    for text in ("boot=0", "max=0", "boot=4097"):
        with pytest.raises(ConfigError, match="must be a whole number from 1 to 4096"):
            CpusConfig.parse(text)
    with pytest.raises(ConfigError, match="can't be added later"):
        CpusConfig.parse("boot=2,max=4")
