"""The configuration space: layout, what never changes, what follows from what."""

from __future__ import annotations

from collections.abc import Iterator

from vhost_user.units import GIB, MIB, is_power_of_two
from virtio_mem.conformance.check import WISH, allowed, check, expect, granted, need_feature, ready, set_target
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Wish
from virtio_mem.protocol import ConfigSpace, Feature, RequestType

PLUG, UNPLUG = RequestType.PLUG, RequestType.UNPLUG

WITH_NODE = Wish(region_size=1 * GIB, block_size=2 * MIB, requested_size=64 * MIB, node_id=3)
ODD_BLOCKS = Wish(region_size=96 * MIB, block_size=6 * MIB, requested_size=24 * MIB)
NO_BLOCKS = Wish(region_size=0, block_size=2 * MIB, requested_size=0)


def life(session: Session) -> Iterator[ConfigSpace]:
    """The configuration space at each turn of an ordinary life: plugged, unplugged, resized where possible, reset."""
    first = session.config()
    ready(session)
    yield first
    if not allowed(session, 8):
        yield from poor_life(session)
        return
    yield session.config()
    for type_, block, nb_blocks in ((PLUG, 0, 4), (PLUG, 6, 2), (UNPLUG, 1, 2)):
        granted(session, session.ask(type_, session.addr(block), nb_blocks))
        yield session.config()
    if session.can(Capability.SET_TARGET):
        for blocks in (0, min(session.nb_blocks, 200), 1, 8):
            set_target(session, blocks)
            yield session.config()
    session.device_reset()
    yield session.config()
    session.begin()
    granted(session, session.unplug_all())
    yield session.config()


def poor_life(session: Session) -> Iterator[ConfigSpace]:
    """The same where nothing can be plugged, since the host's target does not allow it."""
    session.plug(0)
    yield session.config()
    granted(session, session.unplug_all())
    yield session.config()
    session.device_reset()
    yield session.config()


@check("MEM-CONF-9", "MEM-CONF-10", "MEM-CONF-11", "MEM-CONF-15", wishes=(WISH, ODD_BLOCKS))
def region_is_made_of_blocks(session: Session) -> None:
    """Block size a power of two, address and region in whole blocks.

    Blocks of 6 MiB had guests use memory that was not plugged (cloud-hypervisor issue 985).
    """
    config = session.config()
    size = config.block_size
    expect("MEM-CONF-9", is_power_of_two(size), f"block_size {size}", "a power of two")
    expect("MEM-CONF-10", config.addr % size == 0, f"addr {config.addr:#x}", f"a multiple of {size}")
    expect("MEM-CONF-11", config.region_size % size == 0, f"region_size {config.region_size}", f"a multiple of {size}")
    end = config.addr + config.region_size
    expect("MEM-CONF-15", end <= 2**64, f"a region that ends at {end:#x}", "one that ends at 2**64 or below")


@check("MEM-CONF-15", needs=Capability.WISH, wishes=(NO_BLOCKS,))
def region_without_blocks(session: Session) -> None:
    """A region of no blocks still answers. One broke the VMM (cloud-hypervisor issue 1564)."""
    config = session.config()
    expect("MEM-CONF-15", config.region_size == 0, f"region_size {config.region_size}", "0, as wished")
    ready(session)
    answer = session.unplug_all()
    expect("MEM-CONF-15", answer.type is not None, f"the answer {answer}", "any response")


@check("MEM-CONF-3", "MEM-CONF-4", "MEM-CONF-5", "MEM-CONF-6", wishes=(WISH, WITH_NODE))
def what_never_changes(session: Session) -> None:
    """block_size, node_id, addr and region_size, whatever driver and host do."""
    first = session.config()
    for config in life(session):
        for clause, name in (
            ("MEM-CONF-3", "block_size"),
            ("MEM-CONF-4", "node_id"),
            ("MEM-CONF-5", "addr"),
            ("MEM-CONF-6", "region_size"),
        ):
            was, should = getattr(config, name), getattr(first, name)
            expect(clause, was == should, f"{name} {was}", f"{should}, as before")


@check("MEM-CONF-8", "MEM-CONF-12", "MEM-CONF-13", "MEM-CONF-14", "MEM-LAYOUT-3")
def sizes_fit_each_other(session: Session) -> None:
    """All sizes in whole blocks, and requested_size <= usable_region_size <= region_size, at each turn."""
    for config in life(session):
        size = config.block_size
        for clause, name in (
            ("MEM-CONF-12", "usable_region_size"),
            ("MEM-CONF-13", "plugged_size"),
            ("MEM-CONF-14", "requested_size"),
        ):
            value = getattr(config, name)
            whole = size > 0 and value % size == 0
            expect(clause, whole, f"{name} {value}", f"a multiple of block_size, {size}")
        usable, requested = config.usable_region_size, config.requested_size
        expect("MEM-CONF-8", usable >= requested, f"usable_region_size {usable}", f"requested_size {requested} or more")
        region = config.region_size
        expect("MEM-LAYOUT-3", usable <= region, f"usable_region_size {usable}", f"region_size {region} or less")


@check("MEM-CONF-8", "MEM-LAYOUT-3", needs=Capability.SET_TARGET)
def targets_that_can_not_be(session: Session) -> None:
    """Whatever becomes of a target that no region can hold, the sizes fit each other.

    2**44 MiB was taken for 0 bytes (firecracker pull request 6076).
    """
    ready(session)
    region = session.first_config.region_size
    for size in (region + session.block_size, 2**32 * MIB, 2**64 - session.block_size, session.block_size // 2):
        session.set_target(size)
        config = session.config()
        usable, requested = config.usable_region_size, config.requested_size
        expect("MEM-CONF-8", usable >= requested, f"usable_region_size {usable}", f"requested_size {requested} or more")
        expect("MEM-LAYOUT-3", usable <= region, f"usable_region_size {usable}", f"region_size {region} or less")


@check("MEM-CONF-7")
def plugged_size_follows_the_blocks(session: Session) -> None:
    """Counted by this check, through requests granted and refused."""
    ready(session, 8)
    plugged = 0
    for type_, block, nb_blocks, change in (
        (PLUG, 0, 4, 4),
        (PLUG, 3, 2, 0),
        (PLUG, 5, 3, 3),
        (UNPLUG, 4, 2, 0),
        (UNPLUG, 1, 2, -2),
        (PLUG, 2, 1, 1),
    ):
        answer = session.ask(type_, session.addr(block), nb_blocks)
        if change:
            granted(session, answer)
        plugged += change
        was = session.config().plugged_size
        expect("MEM-CONF-7", was == plugged * session.block_size, f"plugged_size {was}", f"{plugged} blocks")


@check("MEM-CONF-16", needs=Capability.SET_TARGET)
def usable_region_does_not_shrink(session: Session) -> None:
    """Not with the target, not with a PLUG, an UNPLUG or a device reset: only with UNPLUG ALL."""
    ready(session, 8)
    most = session.config().usable_region_size

    def look() -> None:
        nonlocal most
        usable = session.config().usable_region_size
        expect("MEM-CONF-16", usable >= most, f"usable_region_size {usable}", f"{most}, as it was, or more")
        most = usable

    for blocks in (session.nb_blocks, 16, 8, 0, 4):
        set_target(session, min(blocks, session.nb_blocks))
        look()
    granted(session, session.plug(0, 4))
    look()
    granted(session, session.unplug(0, 4))
    look()
    session.device_reset()
    look()
    session.begin()
    look()


@check("MEM-LAYOUT-1", "CFG-1", needs=Capability.SET_TARGET)
def each_field_is_where_it_belongs(session: Session) -> None:
    """What the host wishes and what the driver plugs shows in the field of that name, and in no other."""
    ready(session, 8)
    before = session.config()
    if session.can(Capability.WISH):
        wish = session.wish.region_size
        expect("MEM-LAYOUT-1", before.region_size == wish, f"region_size {before.region_size}", wish)
    granted(session, session.plug(0, 3))
    set_target(session, 7)
    after = session.config()
    should = before._replace(
        plugged_size=type(before.plugged_size)(3 * session.block_size),
        requested_size=type(before.requested_size)(7 * session.block_size),
        usable_region_size=after.usable_region_size,
    )
    expect("MEM-LAYOUT-1", after == should, after, should)
    expect("CFG-1", 0 < after.block_size <= after.region_size, f"block_size {after.block_size}", "at most region_size")


@check("CFG-3")
def fields_are_there_before_features_are_taken(session: Session) -> None:
    """The configuration space reads the same before FEATURES_OK and after it."""
    before = session.config()
    ready(session)
    after = session.config()
    expect("CFG-3", before == after, f"before FEATURES_OK {before}", after)


@check("MEM-FEAT-1", needs=Capability.WISH, wishes=(WITH_NODE,))
def node_id(session: Session) -> None:
    """With ACPI_PXM, node_id is the node that the host chose."""
    need_feature(session, Feature.ACPI_PXM)
    node_id = session.config().node_id
    expect("MEM-FEAT-1", node_id == session.wish.node_id, f"node_id {node_id}", session.wish.node_id)


@check("MEM-START-1", needs=Capability.RESTART)
def nothing_is_plugged_at_first(session: Session) -> None:
    """A new device has plugged_size 0."""
    plugged = session.config().plugged_size
    expect("MEM-START-1", plugged == 0, f"plugged_size {plugged}", 0)
