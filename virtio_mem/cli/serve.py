"""`virtio-mem serve`: virtio-mem devices for VMMs that have the memory, one vhost-user socket a zone."""

from __future__ import annotations

import argparse

EXAMPLE = """\
A guest that has 2 GiB for itself, and up to 2 GiB more by virtio-mem:

  virtio-mem serve --zone id=mem0,socket=/tmp/mem0.sock,addr=4G,hotplug_size=2G,hotplugged_size=1G \\
                   --api-socket /tmp/mem.api

  qemu-system-x86_64 -machine q35,memory-backend=ram0 -m 4G -nographic \\
    -object memory-backend-memfd,id=ram0,size=4G,share=on \\
    -kernel vmlinuz -initrd initrd -append "console=ttyS0 mem=2G memhp_default_state=online_movable" \\
    -chardev socket,id=c0,path=/tmp/mem0.sock \\
    -device vhost-user-test-device-pci,chardev=c0,virtio-id=24,num_vqs=1,vq_size=128,config_size=56
"""

_MORE = """\
QEMU has to be 10.2 or later. Its machine q35 puts what is above 2 GiB of RAM at 4 GiB. mem=2G has the guest leave that
alone until it is plugged. The memory is QEMU's, and has to be share=on; the zone, from addr to addr + hotplug_size,
has to be RAM that QEMU has. `ready` is printed when every socket listens: start QEMU then. Without KVM, as here, append
`no_timer_check tsc=reliable` as well on a busy host: an emulated processor that is late looks like a broken clock.

The guest's kernel needs the driver virtio_mem, as a module, of Linux 5.16 or later; of an older one, from 5.8 on, with
unplugged_inaccessible=off. This process needs no privileges, but QEMU's user has to be allowed to write to the socket.

keys of --zone:
  id=NAME                        the zone's name
  socket=PATH                    where the VMM connects; who may is for the umask and the directory to say
  addr=SIZE                      the region's guest-physical address, such as 4G
  hotplug_size=SIZE              the region's size
  hotplugged_size=SIZE           how much of it the guest is asked to plug at first (0)
  block_size=SIZE                the unit in which memory comes and goes (2M)
  guest_numa_id=N                the guest's NUMA node for it, an ACPI proximity domain (none)
  prefault=on|off                have the host allocate memory before the guest is told that it has it (off). What this
                                 process populates is charged to its own memory cgroup, not to the VMM's
  unrequested_unplug=on|off      let a guest give back blocks that nobody asked back (on). Off, an UNPLUG that leaves
                                 less than the target is BUSY: a guest that picks the pages that the host gets may
                                 mean harm
  unplugged_inaccessible=on|off  offer VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE, which a driver then has to accept (on)

signals:
  TERM, INT                      end
  HUP                            start the code that serves anew, as after an upgrade; no VMM notices

exit status:
  0    ended by TERM or INT
  1    the host refused a socket, the state directory or memory
  2    an argument, a snapshot or a state that can't be: one line says which, and its limit
  130  interrupted by Ctrl-C before `ready`, or 143 by TERM
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.epilog = f"{EXAMPLE}\n{_MORE}"
    parser.add_argument(
        "--zone", action="append", nargs="+", metavar="KEY=VALUE,...", required=True, help="a device each: see below"
    )
    parser.add_argument(
        "--api-socket", metavar="PATH", help="serve the HTTP API at this socket, with mode 0600 (with the extra `api`)"
    )
    parser.add_argument("--state-dir", metavar="DIR", help="keep each zone's state in a file in this directory")
    parser.add_argument("--restore", metavar="DIR", help="begin with the snapshot in this directory, paused")
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="append what the guest asks and gets to FILE, a line for each request, however many they are; {zone} "
        "in it stands for a zone's name. `virtio-mem conformance TARGET --replay FILE` compares with another device",
    )
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say who asked what; twice: each message")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; the exit status."""
    # Not before the arguments are known to be good: --help is for people who wait.
    from virtio_mem.serve.daemon import forks_first, serve  # noqa: PLC0415
    from virtio_mem.serve.ending import in_order  # noqa: PLC0415
    from virtio_mem.serve.files import check_traces, require_given  # noqa: PLC0415
    from virtio_mem.serve.plan import ServePlan  # noqa: PLC0415
    from virtio_mem.serve.zone_option import ServedZoneOption, check_together  # noqa: PLC0415

    zones = [ServedZoneOption.parse(text) for group in arguments.zone for text in group]
    check_together(zones)
    require_given("--state-dir", arguments.state_dir)
    require_given("--restore", arguments.restore)
    if arguments.trace is not None:
        check_traces(arguments.trace, [zone.id for zone in zones])
    plan = ServePlan(
        zones=tuple(zone.planned() for zone in zones),
        api=arguments.api_socket is not None,
        state_dir=arguments.state_dir,
        trace=arguments.trace,
        options=" ".join(f"--zone {zone}" for zone in zones),
        verbose=arguments.verbose,
    )
    sockets = {zone.id: zone.socket for zone in zones}
    with in_order():
        return serve(plan, sockets, api_socket=arguments.api_socket, worker=forks_first(), snapshot=arguments.restore)
