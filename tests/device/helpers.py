"""A device without host memory: every effect is carried out at once, by doing nothing."""

from __future__ import annotations

from vhost_user.units import GIB, MIB, ByteCount, GuestAddress
from virtio_mem.device import Effect, VirtioMemDevice
from virtio_mem.geometry import Geometry, UsableRegion
from virtio_mem.protocol import BlockState, Request, RequestType, Response, ResponseType

BLOCK = 2 * MIB
ADDR = 4 * GIB
REGION = 1 * GIB
BLOCKS = REGION // BLOCK


def make_device(
    *,
    requested: int = REGION,
    region: int = REGION,
    addr: int = ADDR,
    block: int = BLOCK,
    node_id: int | None = None,
    usable: UsableRegion = UsableRegion.WHOLE_REGION,
    unplugged_inaccessible: bool = True,
) -> VirtioMemDevice:
    geometry = Geometry(
        addr=GuestAddress(addr),
        region_size=ByteCount(region),
        block_size=ByteCount(block),
        node_id=node_id,
        usable_region=usable,
    )
    return VirtioMemDevice(geometry, requested_size=requested, unplugged_inaccessible=unplugged_inaccessible)


def ask(device: VirtioMemDevice, type_: int, block: int = 0, nb_blocks: int = 1, *, shift: int = 0) -> Response:
    """Send a request for `nb_blocks` from block number `block` (of the device, may be negative), `shift` bytes on."""
    geometry = device.geometry
    addr = GuestAddress(geometry.addr + block * geometry.block_size + shift)
    outcome = device.request(Request(type_, addr, nb_blocks))
    return device.commit(outcome) if isinstance(outcome, Effect) else outcome


def plug(device: VirtioMemDevice, block: int = 0, nb_blocks: int = 1) -> None:
    """Plug blocks; they must be grantable."""
    assert ask(device, RequestType.PLUG, block, nb_blocks).type is ResponseType.ACK


def states(device: VirtioMemDevice) -> list[BlockState]:
    """The state of each block, asked of the device one by one."""
    usable = device.usable_region_size // device.geometry.block_size
    return [ask(device, RequestType.STATE, block).state for block in range(usable)]


def snapshot(device: VirtioMemDevice) -> tuple[object, ...]:
    """All that a refusal must leave alone."""
    return device.config, list(device.blocks.plugged_runs()), device.acked_features, device.paused
