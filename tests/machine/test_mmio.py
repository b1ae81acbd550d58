"""The registers, as a driver uses them and as a hostile one does."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.device.helpers import ADDR, BLOCK, REGION, make_device, plug
from tests.machine.helpers import RAM_SIZE, RING, Rig, guest_ram
from vhost_user.device_status import Status
from vhost_user.errors import PeerError, UsageError
from vhost_user.units import GuestAddress
from vhost_user.vring import SplitDriver, SplitLayout
from virtio_mem.config import VmMemoryConfig
from virtio_mem.geometry import UsableRegion
from virtio_mem.guest.virtio_mmio import WANTED, MmioDevice
from virtio_mem.manager import MemoryManager
from virtio_mem.mmio import MmioTransport
from virtio_mem.mmio_registers import MAGIC, REGISTER_SPACE, Interrupt, Register
from virtio_mem.protocol import BlockState, ConfigSpace, Feature, Request, RequestType, Response, ResponseType

PLUG_FIRST = Request(RequestType.PLUG, GuestAddress(ADDR), 1)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with guest_ram() as memory:
        yield Rig(memory)


def test_a_zone_without_a_device_has_no_registers() -> None:
    with guest_ram() as memory, pytest.raises(UsageError, match=r"^service=None: .*hotplug_method=virtio-mem$"):
        MmioTransport(None, memory, interrupt=lambda: None, notified=lambda: None)


def test_a_zone_is_no_service() -> None:
    config = VmMemoryConfig.parse("--memory size=2M,hotplug_method=virtio-mem,hotplug_size=128M")
    with MemoryManager(config) as manager, pytest.raises(UsageError, match=r"^service=ManagedZone: has to be"):
        MmioTransport(
            manager.zones["mem0"],  # type: ignore[arg-type]
            manager.guest_memory,
            interrupt=lambda: None,
            notified=lambda: None,
        )


ACCEPTABLE = int(Feature.VERSION_1 | Feature.UNPLUGGED_INACCESSIBLE)


def set_up_by_hand(
    rig: Rig, features: int, size: int = 64, layout: SplitLayout | None = None, last_status: int = 15
) -> None:
    """The steps of a driver up to DRIVER_OK, without looking whether they succeed."""
    write = rig.transport.write
    for status in (0, 1, 3):
        write(Register.STATUS, status)
    for half in (0, 1):
        write(Register.DRIVER_FEATURES_SEL, half)
        write(Register.DRIVER_FEATURES, features >> 32 * half & 0xFFFFFFFF)
    write(Register.STATUS, 11)
    layout = layout or SplitLayout.place(64, RING)
    write(Register.QUEUE_SEL, 0)
    write(Register.QUEUE_SIZE, size)
    for low, area in zip((0x80, 0x90, 0xA0), layout.areas.values(), strict=True):
        write(low, area.address & 0xFFFFFFFF)
        write(low + 4, area.address >> 32)
    write(Register.QUEUE_READY, 1)
    write(Register.STATUS, last_status)


@pytest.mark.clause("MMIO-1", "MMIO-2")
def test_identity(rig: Rig) -> None:
    read = rig.transport.read
    assert read(Register.MAGIC_VALUE) == MAGIC == 0x74726976
    assert read(Register.VERSION) == 2
    assert read(Register.DEVICE_ID) == 24
    assert read(Register.QUEUE_SIZE_MAX) == 256
    rig.transport.write(Register.QUEUE_SEL, 1)
    assert read(Register.QUEUE_SIZE_MAX) == 0
    assert [read(offset) for offset in range(0xB0, 0xC0, 4)] == [0xFFFFFFFF] * 4, "there is no shared memory region"


@pytest.mark.clause("FEAT-2", "FEAT-4", "FEAT-7")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_driver_brings_the_device_up_and_drives_it(rig: Rig, packed: bool, event_idx: bool) -> None:
    features = Feature.VERSION_1 | Feature.UNPLUGGED_INACCESSIBLE
    features |= Feature.RING_PACKED if packed else Feature(0)
    features |= Feature.EVENT_IDX if event_idx else Feature(0)
    driver = rig.driver(features)
    assert driver.features == features
    assert rig.device.acked_features == Feature.UNPLUGGED_INACCESSIBLE
    for turn in range(200):
        type_ = RequestType.PLUG if turn % 2 == 0 else RequestType.UNPLUG
        assert driver.request(Request(type_, GuestAddress(ADDR + 5 * BLOCK), 3)).type is ResponseType.ACK
        state = driver.request(Request(RequestType.STATE, GuestAddress(ADDR + 5 * BLOCK), 3)).state
        assert state is (BlockState.PLUGGED if turn % 2 == 0 else BlockState.UNPLUGGED)


@pytest.mark.clause("MEM-LAYOUT-1", "MEM-LAYOUT-2", "CFG-1", "CFG-3")
def test_the_configuration_reads_the_same_in_every_size_and_is_read_only(rig: Rig) -> None:
    plug(rig.device, 0, 3)
    expected = rig.device.config
    for size in (1, 2, 4, 8):
        parts = [rig.transport.read(Register.CONFIG + at, size).to_bytes(size, "little") for at in range(0, 56, size)]
        assert ConfigSpace.decode(b"".join(parts)) == expected
    for at in range(56):
        for size in (1, 2, 4, 8):
            rig.transport.write(Register.CONFIG + at, 0xFFFFFFFFFFFFFFFF, size)
    assert rig.device.config == expected
    assert rig.transport.read(Register.CONFIG + 56, 4) == 0
    assert rig.transport.read(Register.CONFIG + 2, 4) == 0
    assert rig.transport.read(Register.CONFIG, 3) == 0


@pytest.mark.clause("CFG-2", "MMIO-7")
def test_the_generation_changes_with_the_configuration(rig: Rig) -> None:
    before = rig.transport.read(Register.CONFIG_GENERATION)
    assert rig.transport.read(Register.CONFIG_GENERATION) == before
    rig.service.resize(REGION // 2)
    after = rig.transport.read(Register.CONFIG_GENERATION)
    assert after != before
    plug(rig.device)
    assert rig.transport.read(Register.CONFIG_GENERATION) != after


def test_a_driver_reads_one_configuration_though_it_changes_meanwhile(rig: Rig) -> None:
    driver = rig.driver()
    reads = 0

    class Changing:
        def read(self, offset: int, size: int = 4) -> int:
            nonlocal reads
            reads += 1
            if reads == 8:
                rig.service.resize(REGION // 2)
            return rig.transport.read(offset, size)

        def write(self, offset: int, value: int, size: int = 4) -> None:
            rig.transport.write(offset, value, size)

    driver._registers = Changing()
    assert driver.config() == rig.device.config
    assert reads > 16


def test_a_configuration_that_never_stands_still_is_the_peers_error(rig: Rig) -> None:
    driver = rig.driver()

    class Restless:
        value = 0

        def read(self, offset: int, size: int = 4) -> int:
            self.value += 1
            return self.value

        def write(self, offset: int, value: int, size: int = 4) -> None:
            raise AssertionError

    driver._registers = Restless()
    with pytest.raises(PeerError, match="ConfigGeneration"):
        driver.config()


@pytest.mark.clause("FEAT-3", "FEAT-8", "MEM-INIT-1")
@pytest.mark.parametrize(
    "features",
    [
        Feature.UNPLUGGED_INACCESSIBLE,  # no VERSION_1
        Feature.VERSION_1,  # no UNPLUGGED_INACCESSIBLE
        WANTED | Feature.ACPI_PXM,  # not offered
        Feature.VERSION_1 | Feature.UNPLUGGED_INACCESSIBLE | Feature(1 << 40),
    ],
)
def test_features_that_cannot_be_accepted_leave_features_ok_unset(rig: Rig, features: Feature) -> None:
    set_up_by_hand(rig, int(features))
    assert rig.transport.read(Register.STATUS) == Status.ACKNOWLEDGE | Status.DRIVER
    assert rig.transport.read(Register.QUEUE_READY) == 0
    assert rig.device.acked_features == 0


def test_the_drivers_refusal_is_the_peers_error(rig: Rig) -> None:
    with pytest.raises(PeerError, match="features"):
        rig.driver(Feature.VERSION_1)
    assert rig.transport.read(Register.STATUS) & Status.FAILED


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (0, None),
        (48, None),
        (257, None),
        (512, None),
        (64, SplitLayout(64, GuestAddress(8), GuestAddress(4096), GuestAddress(8192))),
        (64, SplitLayout(64, GuestAddress(1 << 40), GuestAddress(4096), GuestAddress(8192))),
        (64, SplitLayout(64, GuestAddress(4096), GuestAddress((4 << 20) - 8), GuestAddress(8192))),
    ],
)
def test_a_queue_that_cannot_be_used_is_not_made_ready(rig: Rig, size: int, layout: SplitLayout | None) -> None:
    set_up_by_hand(rig, ACCEPTABLE, size, layout)
    assert rig.transport.read(Register.QUEUE_READY) == 0
    rig.transport.write(Register.QUEUE_NOTIFY, 0)
    assert rig.driver().request(PLUG_FIRST).type is ResponseType.ACK


def test_a_ready_queue_cannot_be_moved(rig: Rig) -> None:
    driver = rig.driver()
    for register in (Register.QUEUE_SIZE, Register.QUEUE_DESC_LOW, Register.QUEUE_READY):
        rig.transport.write(register, 1)
    assert driver.request(PLUG_FIRST).type is ResponseType.ACK


@pytest.mark.parametrize("value", [2, 3, 0x80000000, 0xFFFFFFFF])
def test_a_queue_is_ready_or_not_and_nothing_else(rig: Rig, value: int) -> None:
    driver = rig.driver()
    rig.transport.write(Register.QUEUE_READY, value)
    assert rig.transport.read(Register.QUEUE_READY) == 1
    assert driver.request(PLUG_FIRST).type is ResponseType.ACK
    rig.transport.write(Register.QUEUE_READY, 0)
    rig.transport.write(Register.QUEUE_READY, value)
    assert rig.transport.read(Register.QUEUE_READY) == 0


def post_a_request(rig: Rig) -> SplitDriver:
    """A request in the ring at RING, as a driver would leave it that doesn't kick."""
    ring = SplitDriver(rig.memory, SplitLayout.place(64, RING))
    rig.memory.write(GuestAddress(RING + 0x8000), PLUG_FIRST.encode())
    ring.add([(RING + 0x8000, 24)], [(RING + 0x9000, 10)])
    return ring


def serve_and_see_nothing(rig: Rig) -> None:
    """Kicked or not, the device leaves the ring's memory alone and keeps still."""
    before = rig.memory.read(GuestAddress(0), RAM_SIZE)
    rig.take_interrupts()
    rig.transport.write(Register.QUEUE_NOTIFY, 0)
    assert not rig.transport.process()
    assert rig.memory.read(GuestAddress(0), RAM_SIZE) == before
    assert rig.take_interrupts() == 0
    assert rig.device.plugged_size == 0


@pytest.mark.clause("MMIO-8")
def test_a_queue_that_is_stopped_is_not_served(rig: Rig) -> None:
    rig.driver()
    rig.transport.write(Register.QUEUE_READY, 0)
    post_a_request(rig)
    serve_and_see_nothing(rig)
    assert rig.transport.read(Register.QUEUE_READY) == 0


@pytest.mark.clause("STATUS-2", "STATUS-3")
def test_a_request_that_waits_is_served_from_driver_ok_on_and_not_before(rig: Rig) -> None:
    set_up_by_hand(rig, ACCEPTABLE, last_status=11)
    ring = post_a_request(rig)
    serve_and_see_nothing(rig)
    rig.transport.write(Register.STATUS, 15)
    assert ring.get_used() is not None
    assert rig.transport.read(Register.INTERRUPT_STATUS) == Interrupt.USED_BUFFER
    assert rig.device.plugged_size == BLOCK


@pytest.mark.clause("RESET-1", "RESET-2", "RESET-3", "MMIO-5", "MMIO-6", "STATUS-1")
@pytest.mark.parametrize("system", [False, True])
def test_after_a_reset_the_device_keeps_still_until_it_is_started(rig: Rig, system: bool) -> None:
    assert rig.transport.read(Register.STATUS) == 0
    rig.driver()
    rig.service.resize(REGION // 2)
    rig.transport.notify_config()
    if system:
        rig.transport.system_reset()
    else:
        rig.transport.write(Register.STATUS, 0)
    for register in (Register.STATUS, Register.INTERRUPT_STATUS, Register.QUEUE_READY):
        assert rig.transport.read(register) == 0
    post_a_request(rig)
    rig.service.resize(REGION)
    rig.transport.notify_config()
    serve_and_see_nothing(rig)


@pytest.mark.clause("FEAT-5", "FEAT-6")
@pytest.mark.parametrize("features", [WANTED, WANTED | Feature.RING_PACKED])
def test_features_that_were_accepted_once_are_accepted_again(rig: Rig, features: Feature) -> None:
    first = rig.driver(features)
    first.reset()
    second = rig.driver(features)
    rig.transport.system_reset()
    assert first.features == second.features == rig.driver(features).features


def test_before_driver_ok_nothing_is_served_and_no_notice_is_given_or_lost(rig: Rig) -> None:
    set_up_by_hand(rig, ACCEPTABLE)
    rig.transport.write(Register.STATUS, 0)
    rig.service.resize(REGION // 2)
    rig.transport.notify_config()
    assert rig.take_interrupts() == 0
    driver = rig.driver()
    assert rig.take_interrupts() == 1
    driver.acknowledge()
    assert driver.config_changed


@pytest.mark.clause("MEM-CONF-17", "MEM-CONF-18", "MMIO-3", "MMIO-4")
def test_a_resize_interrupts(rig: Rig) -> None:
    driver = rig.driver()
    rig.service.resize(REGION // 2)
    rig.transport.notify_config()
    assert rig.take_interrupts() == 1
    assert rig.transport.read(Register.INTERRUPT_STATUS) == Interrupt.CONFIG_CHANGE
    rig.transport.write(Register.INTERRUPT_ACK, Interrupt.USED_BUFFER)
    assert rig.transport.read(Register.INTERRUPT_STATUS) == Interrupt.CONFIG_CHANGE
    driver.acknowledge()
    assert rig.transport.read(Register.INTERRUPT_STATUS) == 0
    rig.transport.notify_config()
    assert rig.take_interrupts() == 0


def test_a_notice_is_passed_on_with_the_next_request(rig: Rig) -> None:
    driver = rig.driver()
    rig.service.resize(REGION // 2)
    driver.request(PLUG_FIRST)
    driver.acknowledge()
    assert driver.config_changed


def test_a_driver_cannot_say_that_the_device_needs_a_reset(rig: Rig) -> None:
    driver = rig.driver()
    rig.transport.write(Register.STATUS, 15 | Status.NEEDS_RESET)
    assert rig.transport.read(Register.STATUS) == 15
    assert driver.request(PLUG_FIRST).type is ResponseType.ACK


def test_a_reset_forgets_the_queue_that_was_set_up(rig: Rig) -> None:
    rig.driver()
    write = rig.transport.write
    for status in (0, 1, 3):
        write(Register.STATUS, status)
    write(Register.DRIVER_FEATURES, ACCEPTABLE & 0xFFFFFFFF)
    write(Register.DRIVER_FEATURES_SEL, 1)
    write(Register.DRIVER_FEATURES, ACCEPTABLE >> 32)
    write(Register.STATUS, 11)
    write(Register.QUEUE_READY, 1)
    assert rig.transport.read(Register.QUEUE_READY) == 0


@pytest.mark.parametrize("how", ["STATUS", "QUEUE_READY", "system reset"])
def test_a_ring_that_is_being_served_is_not_taken_away(rig: Rig, how: str) -> None:
    rig.driver()
    post_a_request(rig)
    inside, go_on, done = threading.Event(), threading.Event(), threading.Event()
    real = rig.service.request

    def request(request: Request) -> Response:
        inside.set()
        assert go_on.wait(30)
        return real(request)

    rig.service.request = request  # type: ignore[method-assign]

    def take_away() -> None:
        if how == "system reset":
            rig.transport.system_reset()
        else:
            rig.transport.write(Register[how], 0)
        done.set()

    threads = [threading.Thread(target=rig.transport.process), threading.Thread(target=take_away)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    assert not done.wait(0.05), "the ring was taken away in the middle of a request"
    go_on.set()
    for thread in threads:
        thread.join()
    assert rig.transport.read(Register.QUEUE_READY) == 0


@pytest.mark.clause("MEM-INIT-2")
def test_a_reset_forgets_the_driver_and_keeps_the_blocks(rig: Rig) -> None:
    driver = rig.driver()
    driver.request(PLUG_FIRST)
    driver.reset()
    assert rig.transport.read(Register.STATUS) == 0
    assert rig.transport.read(Register.QUEUE_READY) == 0
    assert rig.transport.read(Register.INTERRUPT_STATUS) == 0
    assert rig.device.plugged_size == BLOCK
    assert rig.driver().request(PLUG_FIRST).type is ResponseType.ERROR


def test_a_system_reset_forgets_the_driver_and_the_blocks(rig: Rig) -> None:
    rig.driver().request(PLUG_FIRST)
    assert rig.transport.system_reset()
    assert rig.transport.read(Register.STATUS) == 0
    assert rig.device.plugged_size == 0


@pytest.mark.clause("STATUS-4", "STATUS-5")
def test_a_broken_ring_needs_a_reset_and_a_reset_mends_it(rig: Rig) -> None:
    driver = rig.driver()
    layout = SplitLayout.place(64, RING)
    rig.take_interrupts()
    rig.memory.store16(GuestAddress(layout.avail + 2), 500)
    rig.serve()
    assert rig.transport.read(Register.STATUS) & Status.NEEDS_RESET
    assert rig.take_interrupts() == 1
    with pytest.raises(PeerError, match="DEVICE_NEEDS_RESET"):
        driver.acknowledge()
    rig.serve()
    assert rig.take_interrupts() == 0
    assert rig.driver().request(PLUG_FIRST).type is ResponseType.ACK


@pytest.mark.parametrize("field", ["MAGIC_VALUE", "VERSION", "DEVICE_ID"])
def test_a_driver_takes_no_other_device(rig: Rig, field: str) -> None:
    class Other:
        def read(self, offset: int, size: int = 4) -> int:
            return rig.transport.read(offset, size) + (offset == Register[field])

        def write(self, offset: int, value: int, size: int = 4) -> None:
            raise AssertionError

    with pytest.raises(PeerError, match=field):
        MmioDevice(Other(), rig.memory, RING, kick=rig.serve, wait=rig.serve)


def test_a_queue_set_up_after_driver_ok_is_served(rig: Rig) -> None:
    """No driver may do that, but nothing must break where one does."""
    driver = rig.driver()
    rig.transport.write(Register.QUEUE_READY, 0)
    rig.transport.write(Register.QUEUE_READY, 1)
    assert rig.transport.read(Register.QUEUE_READY) == 1
    assert driver.request(PLUG_FIRST).type is ResponseType.ACK


accesses = st.tuples(
    st.booleans(),
    st.one_of(st.sampled_from(list(Register)), st.integers(0, REGISTER_SPACE + 16)),
    st.one_of(st.integers(0, 15), st.integers(0, 2**64 - 1)),
    st.sampled_from([1, 2, 4, 8]),
)


@pytest.mark.clause("MEM-LAYOUT-2")
@given(st.lists(accesses, max_size=60))
def test_any_sequence_of_accesses_leaves_a_device_that_a_driver_can_drive(
    sequence: list[tuple[bool, int, int, int]],
) -> None:
    with guest_ram() as memory:
        rig = Rig(memory, make_device(usable=UsableRegion.WHOLE_REGION))
        for write, offset, value, size in sequence:
            if write:
                rig.transport.write(offset, value, size)
            else:
                assert 0 <= rig.transport.read(offset, size) < 2 ** (8 * size)
        assert rig.driver().request(PLUG_FIRST).type is ResponseType.ACK
