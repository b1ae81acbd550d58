"""A machine from options to its end: zones, layout, devices, QEMU.

This process makes the memory and keeps it; it stays as the supervisor of the worker that serves the devices
(virtio_mem/serve/daemon.py), and has QEMU as a child. QEMU inherits the zones' files and one end of the monitor's
connection, whose other end the worker gets. When QEMU ends, all ends, with its status (process.py).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vhost_user.errors import FieldError, UsageError
from vhost_user.mapping import PAGE_SIZE
from vhost_user.owned_fd import OwnedFd
from vhost_user.supervisor import Supervisor
from virtio_mem.boot.cpus import CpusConfig
from virtio_mem.boot.find import find_qemu
from virtio_mem.boot.guest import default_initrd, find_kernel
from virtio_mem.boot.layout import MachineLayout, lay_out_machine
from virtio_mem.boot.process import QemuProcess
from virtio_mem.boot.qemu import BackingFile, QemuOptions, qemu_arguments
from virtio_mem.config import HotplugMethod, VmMemoryConfig, ZonePlan
from virtio_mem.control.options import memory_options, zone_options
from virtio_mem.geometry import default_block_size
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.layout import Placement, ZoneSize
from virtio_mem.serve.daemon import notify_service_manager, serve
from virtio_mem.serve.files import check_traces
from virtio_mem.serve.logs import log_to_stderr
from virtio_mem.serve.plan import ServedZone, ServePlan
from virtio_mem.sharing import require_shareable
from virtio_mem.zone import Zone

log = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "virtio_mem.boot.worker")

DEFAULT_CMDLINE = "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable"
"""Messages on the terminal; a kernel that panics resets the machine; what is plugged can be unplugged again."""


@dataclass(frozen=True, kw_only=True)
class BootOptions:
    """What the user asked for. `kernel` and `initrd` of None are the guest that is there; see guest.py.

    `hide_by` is `mem` or `memmap`, see layout.py. `trace` is where traces go, see `serve.files.trace_path`. `extra` is
    added to QEMU's command line.
    """

    config: VmMemoryConfig
    cpus: CpusConfig
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str = DEFAULT_CMDLINE
    accel: str = "auto"
    qemu: str | None = None
    api_socket: str | None = None
    hide_by: str = "mem"
    unrequested_unplug: bool = True
    trace: str | None = None
    verbose: int = 0
    extra: Sequence[str] = field(default_factory=tuple)


def boot(options: BootOptions) -> int:
    """Boot a machine, and serve it to its end; the exit status is QEMU's. UsageError, HostError as of all its parts."""
    log_to_stderr(options.verbose)
    _check(options)
    qemu = find_qemu(options.qemu)
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="virtio-mem-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        kernel, initrd = _payload(options, directory)
        plans = options.config.zone_plans()
        zones = {plan.spec.id: stack.enter_context(_zone(plan)) for plan in plans}
        sizes = [_size(plan, zones[plan.spec.id]) for plan in plans]
        layout = lay_out_machine(sizes, options.config.numa, options.cpus.boot)
        plan = _serve_plan(options, layout, zones, {size.id: size for size in sizes})
        for warning in (*options.config.warnings, *layout.warnings):  # not of a machine that is refused
            log.warning("%s", warning)
        sockets = {zone.id: directory / f"{number}.sock" for number, zone in enumerate(plan.zones)}
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        qemu_options = QemuOptions(
            nb_cpus=options.cpus.boot,
            accel=_accelerator(options.accel),
            kernel=kernel,
            initrd=initrd,
            append=options.cmdline,
            files=_files(zones),
            sockets=sockets,
            qmp_fd=theirs.fileno(),
            hide_by=options.hide_by,
            extra=options.extra,
        )
        arguments = qemu_arguments(layout, qemu_options)
        child = stack.enter_context(
            QemuProcess(qemu, arguments, [file.fd for file in qemu_options.files.values()], theirs)
        )
        files = qemu_options.files
        machine = json.dumps(_described(options, layout) | {"places": _places(layout, files)}).encode()

        def prepare(supervisor: Supervisor) -> None:
            supervisor.kept.put("machine", machine)
            supervisor.kept.put_fd("qmp", OwnedFd.duplicate_of(ours.fileno()))
            for number, file in enumerate(files.values()):
                supervisor.kept.put_fd(f"memory{number}", OwnedFd.duplicate_of(file.fd))
            child.start(supervisor)

        status = serve(
            plan, sockets, api_socket=options.api_socket, worker=WORKER, prepare=prepare, announce=_tell_service_manager
        )
        return status or child.end()


def _tell_service_manager() -> None:
    """The terminal is the guest's console, so nothing is written there."""
    notify_service_manager("READY=1")


# What is asked for.


def _check(options: BootOptions) -> None:
    """UsageError for what this machine can't have."""
    config = options.config
    require_shareable(config)  # QEMU is another process
    for section in config.sgx_epc:
        raise section.error("id", "needs Cloud Hypervisor's enclave page cache, which QEMU has not", "leave it out")
    for plan, option in zip(config.zone_plans(), config.zones or (config.memory,), strict=True):
        if plan.spec.hotplug_size and plan.hotplug_method is HotplugMethod.ACPI:
            limit = "can be plugged by virtio-mem only: resizing by ACPI is not there"
            raise option.error("hotplug_size", limit, "add hotplug_method=virtio-mem to --memory")


def _payload(options: BootOptions, directory: Path) -> tuple[str, str | None]:
    """The files that QEMU boots."""
    for option, path in (("--kernel", options.kernel), ("--initrd", options.initrd)):
        if path is not None and not os.access(path, os.R_OK):
            raise UsageError(option, path, "is not a file that can be read", "name one, or leave --kernel out")
    if options.kernel is not None:
        return options.kernel, options.initrd
    kernel = find_kernel()
    if options.initrd is not None:
        return str(kernel / "vmlinuz"), options.initrd
    initrd = directory / "initrd"
    initrd.write_bytes(default_initrd(kernel))
    return str(kernel / "vmlinuz"), str(initrd)


def _accelerator(wanted: str) -> str:
    """`auto` is KVM where the processor has it and it may be used; what only emulates it is no gain."""
    if wanted != "auto":
        return wanted
    flags = set(Path("/proc/cpuinfo").read_text().split()) & {"vmx", "svm"}
    return "kvm" if flags and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


# Memory and devices.


@contextmanager
def _zone(plan: ZonePlan) -> Iterator[Zone]:
    try:
        zone = Zone(plan.spec)
    except FieldError as error:
        error.locate(f"zone {plan.spec.id}")
        raise
    with zone:
        yield zone


def _size(plan: ZonePlan, zone: Zone) -> ZoneSize:
    spec = plan.spec
    return ZoneSize(spec.id, spec.size, spec.hotplug_size, zone.page_size, default_block_size(zone.page_size))


def _files(zones: Mapping[str, Zone]) -> dict[tuple[str, bool], BackingFile]:
    return {
        (name, part is zone.hotplug): BackingFile(part.backing.fd, part.backing.offset, zone.page_size > PAGE_SIZE)
        for name, zone in zones.items()
        for part in (zone.boot, zone.hotplug)
        if part is not None
    }


def _hotplug(zone: Zone) -> HostMemory:
    assert zone.hotplug is not None
    return zone.hotplug


def _serve_plan(
    options: BootOptions, layout: MachineLayout, zones: Mapping[str, Zone], sizes: Mapping[str, ZoneSize]
) -> ServePlan:
    plans = {plan.spec.id: plan for plan in options.config.zone_plans()}
    served = tuple(
        ServedZone(
            id=place.zone,
            addr=place.addr,
            hotplug_size=place.size,
            block_size=sizes[place.zone].block_size,
            hotplugged_size=plans[place.zone].hotplugged_size,
            guest_numa_id=layout.zone_nodes[place.zone],
            prefault=plans[place.zone].spec.prefault,
            unplugged_inaccessible=not _hotplug(zones[place.zone]).has_shared_zero_page,
            unrequested_unplug=options.unrequested_unplug,
            boot_size=plans[place.zone].spec.size,
        )
        for place in layout.placements.hotplug
    )
    for zone in served:
        _check_served(zone)
    if options.trace is not None:
        check_traces(options.trace, [zone.id for zone in served])
    return ServePlan(
        zones=served,
        user_zones=options.config.user_zones,
        api=options.api_socket is not None,
        qmp=True,
        options=str(options.config),
        trace=options.trace,
        verbose=options.verbose,
    )


def _check_served(zone: ServedZone) -> None:
    """What a worker would refuse: sizes that are no whole blocks. Better before QEMU runs."""
    for name, size in (("hotplug_size", zone.hotplug_size), ("hotplugged_size", zone.hotplugged_size)):
        if size % zone.block_size:
            limit = f"must be a multiple of the block size, {zone.block_size}"
            down = size // zone.block_size * zone.block_size
            raise UsageError(f"zone {zone.id} {name}", size, limit, f"use {down} or {down + zone.block_size}")


def _described(options: BootOptions, layout: MachineLayout) -> dict[str, Any]:
    """What `vm.info` says besides, with Cloud Hypervisor's names."""
    zones = [
        {
            "id": plan.spec.id,
            "boot_size": plan.spec.size,
            "guest_numa_id": layout.zone_nodes[plan.spec.id],
            "options": zone_options(plan),
        }
        for plan in options.config.zone_plans()
    ]
    cpus = {"boot_vcpus": options.cpus.boot, "max_vcpus": options.cpus.boot}
    return {"cpus": cpus, "memory": memory_options(options.config), "zones": zones}


def _places(layout: MachineLayout, files: Mapping[tuple[str, bool], BackingFile]) -> dict[str, Any]:
    """Where the guest's memory is in which file, by its number, for a core dump."""
    numbers = {key: number for number, key in enumerate(files)}

    def place(placed: Placement, hotplug: bool) -> dict[str, int]:
        key = placed.zone, hotplug
        offset = files[key].offset + placed.offset
        return {"file": numbers[key], "offset": offset, "addr": placed.addr, "size": placed.size}

    boot = [place(placed, hotplug=False) for placed in layout.placements.boot]
    return {"boot": boot, "hotplug": {placed.zone: place(placed, hotplug=True) for placed in layout.placements.hotplug}}
