"""QEMU's command line for a machine whose memory is ours.

Each part of a zone is one `memory-backend-file` on a file descriptor that QEMU inherits, shared, at the part's offset
in the file. QEMU must neither touch nor reserve what is not plugged: nothing is preallocated, and hotplug regions of
huge pages have reserve=off. Each zone with a hotplug region has a `vhost-user-test-device-pci`: QEMU's generic
vhost-user device, to which we say all that a virtio-mem device is (its number is 24, it has one queue, and 56 bytes of
configuration). By the device `vmcoreinfo` Linux tells where it has what debuggers of a core dump look for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vhost_user.units import GIB, GuestAddress
from virtio_mem.boot.layout import Backend, MachineLayout
from virtio_mem.protocol import CONFIG_SIZE, QUEUE_COUNT, VIRTIO_ID_MEM

VRING_SIZE = 128
"""Entries of a device's ring: Linux's driver has one request on it at a time."""

DEFAULT_PHYS_BITS = 40
"""Those of QEMU's emulated processor."""

_ABOVE_RAM = 64 * GIB
"""What QEMU wants of guest-physical space behind RAM for PCI devices: 32 GiB, and to come to a boundary."""

EMULATED_CLOCKS = ("no_timer_check", "tsc=reliable")
"""For the command line of a kernel whose processors are emulated. All its clocks are the host's, and all processors
have the same; to judge one by another, or by when another processor reads it, is to judge how busy the host is, and may
hold up a boot. What is lost with that: a rate that the kernel misjudged when it booted is not found out later."""

_WORD = re.compile(r'(?:[^\s"]|"[^"]*"?)+')
"""Of a kernel's command line."""

CONSOLE = (
    *("-chardev", "stdio,id=console,mux=on,signal=off"),
    *("-serial", "chardev:console", "-monitor", "chardev:console"),
)
"""The guest's console and QEMU's own monitor on the terminal; Ctrl-A h lists what Ctrl-A does, x of it quits."""


@dataclass(frozen=True)
class BackingFile:
    """The file behind a part of a zone: a descriptor that QEMU inherits, and where in it the part begins."""

    fd: int
    offset: int
    huge: bool


@dataclass(frozen=True, kw_only=True)
class QemuOptions:
    """What the command line depends on besides the layout.

    `files` are those of boot memory and of hotplug regions, by zone and whether it is the latter; `sockets` are where
    each hotpluggable zone's device is served, in the order of the devices. `qmp_fd` is a connected socket.
    """

    nb_cpus: int
    accel: str
    kernel: str
    initrd: str | None
    append: str
    files: Mapping[tuple[str, bool], BackingFile]
    sockets: Mapping[str, Path]
    qmp_fd: int
    hide_by: str = "mem"
    extra: Sequence[str] = field(default_factory=tuple)


def qemu_arguments(layout: MachineLayout, options: QemuOptions) -> list[str]:
    """What follows the program's name."""
    return [
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", f"q35,accel={options.accel},max-ram-below-4g={layout.low_size}"),
        *("-cpu", cpu_model(options.accel, layout.end)),
        *("-smp", str(options.nb_cpus)),
        *("-m", f"size={layout.size // 1024}k"),
        *_nodes(layout, options.files),
        *_devices(layout, options.sockets),
        *("-chardev", f"socket,id=qmp,fd={options.qmp_fd}", "-qmp", "chardev:qmp"),
        *("-device", "vmcoreinfo"),
        *CONSOLE,
        *("-kernel", options.kernel),
        *(("-initrd", options.initrd) if options.initrd else ()),
        *("-append", kernel_command_line(layout, options.append, options.hide_by, options.accel)),
        *options.extra,
    ]


def kernel_command_line(layout: MachineLayout, append: str, hide_by: str, accel: str) -> str:
    """`append`, with what keeps the guest away from memory that is not plugged, see layout.py; and with EMULATED_CLOCKS
    where processors are, unless it speaks of the TSC itself. What follows `--` in it is for init, and stays last."""
    words = _WORD.findall(append)
    inits = words[words.index("--") :] if "--" in words else []
    words = words[: len(words) - len(inits)]
    if layout.placements.hotplug:
        words.append(hiding(layout.boot_end, layout.end, hide_by))
    if not layout.numa:
        words.append("numa=off")
    if not accel.startswith("kvm"):
        of_its_own = any(word == "notsc" or word.startswith("tsc=") for word in words)
        words += (word for word in EMULATED_CLOCKS if not (of_its_own and word.startswith("tsc=")))
    return " ".join([*words, *inits])


def hiding(boot_end: GuestAddress, end: GuestAddress, hide_by: str) -> str:
    """The kernel's option that keeps memory from `boot_end` to `end` out of its sight: `mem`'s or `memmap`'s."""
    start = max(boot_end, 4 * GIB)
    return f"mem={boot_end}" if hide_by == "mem" else f"memmap={end - start:#x}%{start:#x}-1"


def cpu_model(accel: str, end: int) -> str:
    """The processor for RAM that ends at guest address `end`.

    Above 1 TiB the emulated one needs more address bits than it has by itself, and must not be AMD's, for whose
    IOMMU's sake QEMU would leave a hole below 1 TiB and put RAM elsewhere.
    """
    if accel.startswith("kvm"):
        return "host"
    bits = (end + _ABOVE_RAM - 1).bit_length()
    return "max" if bits <= DEFAULT_PHYS_BITS else f"max,vendor=GenuineIntel,phys-bits={bits}"


def _nodes(layout: MachineLayout, files: Mapping[tuple[str, bool], BackingFile]) -> Iterator[str]:
    for number, node in enumerate(layout.nodes):
        option = f"node,nodeid={number}"
        if node.backend:
            yield from ("-object", _backend(f"ram{number}", node.backend, files))
            option += f",memdev=ram{number}"
        yield from ("-numa", option + "".join(f",cpus={cpus}" for cpus in _runs(node.cpus)))
    for source, row in layout.distances.items():
        for destination, distance in row.items():
            yield from ("-numa", f"dist,src={source},dst={destination},val={distance}")


def _backend(name: str, backend: Backend, files: Mapping[tuple[str, bool], BackingFile]) -> str:
    if not backend.zone:
        return f"memory-backend-ram,id={name},size={backend.size},reserve=off"
    file = files[backend.zone, backend.hotplug]
    option = f"memory-backend-file,id={name},size={backend.size},share=on,mem-path=/proc/self/fd/{file.fd}"
    if file.offset:
        option += f",offset={file.offset}"
    return option + ",reserve=off" if file.huge and backend.hotplug else option


def _devices(layout: MachineLayout, sockets: Mapping[str, Path]) -> Iterator[str]:
    """One for each hotpluggable zone, by its number: a zone's name may have any letters."""
    for number, (zone, path) in enumerate(sockets.items()):
        yield from ("-chardev", f"socket,id=vmem{number}-socket,path={escaped(path)}")
        device = f"vhost-user-test-device-pci,id=vmem{number},chardev=vmem{number}-socket"
        form = f"virtio-id={VIRTIO_ID_MEM},num_vqs={QUEUE_COUNT},vq_size={VRING_SIZE},config_size={CONFIG_SIZE}"
        yield from ("-device", f"{device},{form}")
        for node, wanted in enumerate(layout.nodes):
            if wanted.initiator == zone:
                yield from ("-object", f"acpi-generic-initiator,id=initiator{node},pci-dev=vmem{number},node={node}")


def escaped(path: Path) -> str:
    """A path as the value of one of QEMU's options, in which a comma is written twice."""
    return str(path).replace(",", ",,")


def _runs(numbers: Sequence[int]) -> Iterator[str]:
    """`3` or `3-7` for each run of ascending numbers."""
    start = 0
    for index in range(1, len(numbers) + 1):
        if index == len(numbers) or numbers[index] != numbers[index - 1] + 1:
            yield str(numbers[start]) if index - start == 1 else f"{numbers[start]}-{numbers[index - 1]}"
            start = index
