"""What the transport says of the device: its identity, its status, the count of its configurations.

And what a driver may do there that it has no reason to: write to the configuration space, read unplugged memory.
"""

from __future__ import annotations

from vhost_user.device_status import Status
from vhost_user.units import is_power_of_two
from virtio_mem.conformance.check import (
    Unsuitable,
    allowed,
    check,
    expect,
    expect_answer,
    granted,
    need_feature,
    ready,
    set_target,
    usable_blocks,
)
from virtio_mem.conformance.checks.notices import PATIENCE
from virtio_mem.conformance.checks.notifications import OPEN, split
from virtio_mem.conformance.session import KNOWN_FEATURES, Session
from virtio_mem.conformance.target import Capability, TargetFailure
from virtio_mem.protocol import CONFIG_SIZE, QUEUE_COUNT, VIRTIO_ID_MEM, BlockState, Feature, ResponseType

MOST_ENTRIES = 32768


def there(value: int | None, what: str) -> int:
    """A register's value. Unsuitable where the transport has no such register."""
    if value is None:
        raise Unsuitable(f"the transport has no register for {what}")
    return value


def status(session: Session) -> Status:
    """The device status."""
    return Status(there(session.registers().status, "the device status"))


@check("MEM-ID-1", needs=Capability.REGISTERS)
def device_type(session: Session) -> None:
    """By this number a driver finds the device."""
    virtio_id = there(session.registers().virtio_id, "the device type")
    expect("MEM-ID-1", virtio_id == VIRTIO_ID_MEM, f"device type {virtio_id}", VIRTIO_ID_MEM)


@check("MEM-ID-2", needs=Capability.REGISTERS)
def virtqueues(session: Session) -> None:
    """The queue of requests, and no other."""
    queues = there(session.registers().queues, "the number of virtqueues")
    expect("MEM-ID-2", queues == QUEUE_COUNT, f"{queues} virtqueues", QUEUE_COUNT)


@check("RING-SPLIT-1", needs=Capability.REGISTERS)
def size_of_a_split_ring(session: Session) -> None:
    """The most entries that the queue can have; a device that has packed rings as well may say more of those."""
    size = there(session.registers().queue_size, "the queue's size")
    expect("RING-SPLIT-1", 0 < size <= MOST_ENTRIES, f"a queue of {size} entries", f"1 to {MOST_ENTRIES}")
    if not session.subject.offered_features & Feature.RING_PACKED:
        expect("RING-SPLIT-1", is_power_of_two(size), f"a queue of {size} entries", "a power of two")


@check("RING-PACKED-1", needs=Capability.REGISTERS)
def size_of_a_packed_ring(session: Session) -> None:
    """The most entries that the queue can have."""
    need_feature(session, Feature.RING_PACKED)
    size = there(session.registers().queue_size, "the queue's size")
    expect("RING-PACKED-1", 0 < size <= MOST_ENTRIES, f"a queue of {size} entries", f"1 to {MOST_ENTRIES}")


@check("STATUS-1", needs=Capability.REGISTERS | Capability.RESTART)
def status_at_first(session: Session) -> None:
    """Before anybody drives it."""
    found = status(session)
    expect("STATUS-1", found == 0, f"status {found:#x}", "0")


@check("RESET-1", needs=Capability.REGISTERS)
def status_after_a_reset(session: Session) -> None:
    """Also a second time, and with something plugged where that can be."""
    ready(session)
    for _ in range(2):
        if allowed(session, 1):
            session.plug(0)
        session.device_reset()
        found = status(session)
        expect("RESET-1", found == 0, f"status {found:#x}", "0")
        session.begin()


def broken(session: Session) -> bool:
    """Have a split ring's index run ahead by more than its size, and kick; whether the device wants to be reset.

    Unsuitable where it makes something of such a ring all the same.
    """
    split(session, event_idx=False)
    if session.can(Capability.NOTICES):
        session.notices()
    session.offer([])
    session.overrun()
    session.kick()
    try:
        session.look(whole=False)
    except TargetFailure:
        session.device_reset()
        raise Unsuitable("the device goes on with an available index that runs ahead") from None
    return bool(status(session) & Status.NEEDS_RESET)


@check("STATUS-4", needs=OPEN | Capability.REGISTERS)
def error_that_takes_a_reset(session: Session) -> None:
    """The driver finds out from the status, and a reset ends it."""
    wants = broken(session)
    expect("STATUS-4", wants, f"status {status(session):#x}", "DEVICE_NEEDS_RESET (0x40) set")
    session.device_reset()
    session.begin(session.subject.offered_features & KNOWN_FEATURES)
    expect_answer("STATUS-4", session.unplug_all(), ResponseType.ACK)


@check("STATUS-5", needs=OPEN | Capability.REGISTERS | Capability.NOTICES)
def notice_of_an_error(session: Session) -> None:
    """A driver that waits for an answer would wait for ever."""
    if not broken(session):
        raise Unsuitable("the device does not ask for a reset")
    notices = session.notices()
    for _ in range(PATIENCE):
        if not notices:
            session.advance(1)
            notices = session.notices()
    expect("STATUS-5", notices > 0, "no configuration change notice", "one")


@check("CFG-2", needs=Capability.REGISTERS | Capability.SET_TARGET)
def generation(session: Session) -> None:
    """A driver that reads before and after a new target sees by the count that its reads don't fit together."""
    ready(session, 4)
    for blocks in (8, 2, 5):
        before = session.config()
        count = there(session.registers().generation, "a generation")
        set_target(session, blocks)
        again = there(session.registers().generation, "a generation")
        if session.config() != before:
            expect("CFG-2", again != count, f"generation {again} as before", "another one, with another target")


@check("MEM-LAYOUT-2", needs=Capability.CONFIG_WRITES)
def writes_to_the_configuration_space(session: Session) -> None:
    """Zeros, ones, and what would be another target, by a driver that took the least and by one that took all."""
    everything = session.subject.offered_features & KNOWN_FEATURES
    for features in (everything, everything & int(Feature.VERSION_1 | Feature.UNPLUGGED_INACCESSIBLE)):
        ready(session, features=features)
        has_blocks = allowed(session, 1)
        before = session.config()
        for at in range(0, CONFIG_SIZE, 8):
            for data in (bytes(8), b"\xff" * 8, before.block_size.to_bytes(8, "little")):
                session.write_config(at, data)
                after = session.config()
                expect("MEM-LAYOUT-2", after == before, after, f"{before}, as it was")
        expect_answer("MEM-LAYOUT-2", session.plug(0) if has_blocks else session.unplug_all(), ResponseType.ACK)
        granted(session, session.unplug_all())


@check("MEM-OP-8", needs=Capability.UNPLUGGED)
def unplugged_memory_can_be_read(session: Session) -> None:
    """By a driver that left UNPLUGGED_INACCESSIBLE: blocks that were never plugged, and some that were."""
    features = session.subject.offered_features & KNOWN_FEATURES & ~Feature.UNPLUGGED_INACCESSIBLE
    if not session.begin(features):
        raise Unsuitable("the device insists on UNPLUGGED_INACCESSIBLE")
    ready(session, 4, features=features)
    for block in {0, 3, usable_blocks(session) - 1}:
        session.peek(block)
    granted(session, session.plug(0, 2))
    granted(session, session.unplug(0))
    session.peek(0)
    expect_answer("MEM-OP-8", session.state(0), ResponseType.ACK, BlockState.UNPLUGGED)
