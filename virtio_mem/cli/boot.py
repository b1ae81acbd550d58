"""`virtio-mem boot`: a Linux guest whose memory is ours and whose processors are QEMU's."""

from __future__ import annotations

import argparse

EXAMPLE = """\
A guest with 1 GiB, and up to 2 GiB more by virtio-mem, 512 MiB of them at once; no kernel is named, so it is the one
that scripts/peers got, with a shell on this terminal (Ctrl-A x ends it):

  virtio-mem boot --memory size=1G,shared=on,hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=512M \\
                  --api-socket /tmp/mem.api

  virtio-mem resize 2G --wait --api-socket /tmp/mem.api        (in another terminal)

Two zones on two NUMA nodes:

  virtio-mem boot --cpus boot=2 --memory size=0,hotplug_method=virtio-mem \\
      --memory-zone id=mem0,size=512M,shared=on,hotplug_size=1G id=mem1,size=512M,shared=on,hotplug_size=1G \\
      --numa guest_numa_id=0,cpus=[0],memory_zones=mem0,distances=[1@15] guest_numa_id=1,cpus=[1],memory_zones=mem1 \\
      --kernel vmlinuz --initrd initrd --cmdline "console=ttyS0 memhp_default_state=online_movable"
"""

_MORE = """\
--memory, --memory-zone and --numa have Cloud Hypervisor's keys. Memory has to be shared (shared=on, or huge pages):
QEMU is another process. A NUMA node has boot memory of one zone at most; device_id, sgx_epc_sections, and pci_segments
but for segment 0 are refused, since QEMU has nothing of the kind. Of the keys of --cpus there are boot and max, and max
can be left out or be the same as boot: processors can't be added later. spec-notes/cloud-hypervisor.md has the rules
that are not Cloud Hypervisor's. QEMU has to be 10.2 or later.

The memory is laid out so that what is not plugged comes last, and the guest is kept away from it by mem= on its command
line, which is added to --cmdline; so is numa=off, without --numa, and, without KVM, no_timer_check tsc=reliable, unless
--cmdline has a tsc= of its own: an emulated processor that is late, on a busy host, looks like a broken clock. The
guest's kernel needs the driver virtio_mem, of Linux 5.16 or later. If it is built in and no module, use --hide-by
memmap: such a driver comes before the kernel lifts the limit of mem=.

What comes after -- is added to QEMU's command line, disks for example:

  virtio-mem boot --memory size=1G,shared=on -- -drive file=disk.raw,format=raw,if=virtio

signals:
  TERM, INT   end QEMU, then this
  HUP         start the code that serves the devices anew, as after an upgrade; the guest does not notice

exit status: QEMU's, which is 0 when the guest powers off, and 128 and the number of a signal that ended it. Without
QEMU: 1 where there is none, or no kernel, or the host refuses; 2 for an argument that can't be
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.epilog = f"{EXAMPLE}\n{_MORE}"
    # Of these two only one is taken, which is to be said and not left to argparse: it would take the last.
    parser.add_argument("--cpus", action="append", default=[], metavar="boot=N", help="the guest's processors (boot=1)")
    parser.add_argument(
        "--memory",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="all memory, or size=0 and zones (size=512M,shared=on)",
    )
    parser.add_argument(
        "--memory-zone",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE,...",
        help="a part of the memory each",
    )
    parser.add_argument(
        "--numa", nargs="+", action="extend", default=[], metavar="KEY=VALUE,...", help="a NUMA node of the guest each"
    )
    parser.add_argument("--kernel", metavar="FILE", help="a bzImage (the one of scripts/peers)")
    parser.add_argument("--initrd", metavar="FILE", help="an initrd (busybox with a shell, if --kernel is left out)")
    parser.add_argument("--cmdline", metavar="TEXT", help="the kernel's command line, to which more is added")
    parser.add_argument("--hide-by", choices=("mem", "memmap"), default="mem", help="see below (mem)")
    parser.add_argument(
        "--unrequested-unplug",
        choices=("on", "off"),
        default="on",
        help="let the guest give back blocks that nobody asked back, as `serve` does (on)",
    )
    parser.add_argument("--accel", choices=("auto", "tcg", "kvm"), default="auto", help="KVM where it is there (auto)")
    parser.add_argument("--qemu", metavar="PATH", help="QEMU's program (that in PATH, or that of scripts/peers)")
    parser.add_argument(
        "--api-socket", metavar="PATH", help="serve the HTTP API at this socket, with mode 0600 (with the extra `api`)"
    )
    parser.add_argument("--trace", metavar="FILE", help="append what the guest asks and gets to FILE, as `serve` does")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say who asked what; twice: each message")
    parser.add_argument("extra", nargs="*", metavar="-- QEMU'S OPTIONS", help="added to QEMU's command line")


def run(arguments: argparse.Namespace) -> int:
    """Boot; the exit status is QEMU's."""
    # Not before the arguments are known to be good: --help is for people who wait.
    from virtio_mem.boot.cpus import CpusConfig  # noqa: PLC0415
    from virtio_mem.boot.machine import DEFAULT_CMDLINE, BootOptions, boot  # noqa: PLC0415
    from virtio_mem.config import VmMemoryConfig  # noqa: PLC0415
    from virtio_mem.config.args import only_value  # noqa: PLC0415
    from virtio_mem.config.vm import DEFAULT_MEMORY, only_memory  # noqa: PLC0415
    from virtio_mem.serve.ending import in_order  # noqa: PLC0415

    memory = only_memory(arguments.memory, DEFAULT_MEMORY + ",shared=on")
    cpus = only_value(CpusConfig.OPTION, arguments.cpus, "boot=1", "write one boot=N")
    options = BootOptions(
        config=VmMemoryConfig.from_options(memory, arguments.memory_zone, arguments.numa),
        cpus=CpusConfig.parse(cpus),
        kernel=arguments.kernel,
        initrd=arguments.initrd,
        cmdline=DEFAULT_CMDLINE if arguments.cmdline is None else arguments.cmdline,
        accel=arguments.accel,
        qemu=arguments.qemu,
        api_socket=arguments.api_socket,
        hide_by=arguments.hide_by,
        unrequested_unplug=arguments.unrequested_unplug == "on",
        trace=arguments.trace,
        verbose=arguments.verbose,
        extra=arguments.extra,
    )
    with in_order():
        return boot(options)
