"""A transport's state goes into another one, and its driver goes on as if nothing had been."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.device.helpers import ADDR, BLOCK, REGION, make_device
from tests.machine.helpers import RING, Rig, guest_ram
from vhost_user.device_status import Status
from vhost_user.errors import UsageError
from vhost_user.units import MIB, GuestAddress
from virtio_mem.config import VmMemoryConfig
from virtio_mem.guest.virtio_mmio import WANTED, MmioDevice
from virtio_mem.manager import MemoryManager
from virtio_mem.mmio import MmioTransport
from virtio_mem.mmio_registers import Interrupt, Register
from virtio_mem.mmio_state import MmioState, require_state
from virtio_mem.protocol import Feature, Request, RequestType, ResponseType
from virtio_mem.snapshot import restore, save

PLUG_FIRST = Request(RequestType.PLUG, GuestAddress(ADDR), 1)
UNPLUG_FIRST = Request(RequestType.UNPLUG, GuestAddress(ADDR), 1)
FEATURES = [WANTED, WANTED & ~Feature.EVENT_IDX, WANTED | Feature.RING_PACKED]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with guest_ram() as memory:
        yield Rig(memory)


def stored(state: MmioState) -> MmioState:
    """As it comes back from a file."""
    return MmioState(*json.loads(json.dumps(state)))


def move(driver: MmioDevice, rig: Rig) -> None:
    """The driver's registers and kicks are `rig`'s from here on: the VMM is another one."""
    driver._registers, driver._kick = rig.transport, rig.serve


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("turns", [0, 1, 63, 64, 65, 200])
def test_a_driver_goes_on_behind_another_transport(rig: Rig, features: Feature, turns: int) -> None:
    driver = rig.driver(features)
    for turn in range(turns):
        assert driver.request(PLUG_FIRST if turn % 2 == 0 else UNPLUG_FIRST).type is ResponseType.ACK
    for _ in range(2):
        state, other = rig.transport.state(), Rig(rig.memory)
        other.transport.restore(stored(state))
        assert other.transport.read(Register.STATUS) == 15
        assert other.device.acked_features == rig.device.acked_features
        after = other.transport.state()
        assert after._replace(interrupt_status=0, generation=0) == state._replace(interrupt_status=0, generation=0)
        move(driver, other)
        for turn in range(100):
            assert driver.request(PLUG_FIRST if turn % 2 == 0 else UNPLUG_FIRST).type is ResponseType.ACK
        rig = other


@pytest.mark.parametrize("features", FEATURES)
def test_a_request_that_waits_is_served_then(rig: Rig, features: Feature) -> None:
    driver = rig.driver(features)
    driver._kick = lambda: None
    other = Rig(rig.memory)

    def wait() -> None:
        other.transport.restore(stored(rig.transport.state()))
        move(driver, other)

    driver._wait = wait
    assert driver.request(PLUG_FIRST).type is ResponseType.ACK
    assert (rig.device.plugged_size, other.device.plugged_size) == (0, BLOCK)


def test_the_driver_has_a_notice_and_reads_the_configuration_anew(rig: Rig) -> None:
    rig.driver()
    rig.service.resize(REGION // 2)
    state, other = rig.transport.state(), Rig(rig.memory)
    assert state.interrupt_status == 0
    other.transport.restore(state)
    assert other.interrupts == 1
    assert other.transport.read(Register.INTERRUPT_STATUS) == Interrupt.CONFIG_CHANGE
    assert other.transport.read(Register.CONFIG_GENERATION) != state.generation


def test_a_driver_that_is_half_way_goes_on_setting_up(rig: Rig) -> None:
    for register, value in ((0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x14, 1), (0x38, 16), (0x80, 4096)):
        rig.transport.write(register, value)
    state, other = rig.transport.state(), Rig(rig.memory)
    other.transport.restore(stored(state))
    assert other.transport.state()._replace(generation=0) == state._replace(generation=0)
    assert (other.interrupts, other.transport.read(Register.DEVICE_FEATURES)) == (0, 5)


def test_a_device_that_needs_a_reset_needs_it_there_too(rig: Rig) -> None:
    driver = rig.driver()
    rig.transport.fail()
    other = Rig(rig.memory)
    other.transport.restore(stored(rig.transport.state()))
    assert other.transport.read(Register.STATUS) & Status.NEEDS_RESET
    assert other.interrupts == 1
    move(driver, other)
    driver.reset()
    assert other.driver().request(PLUG_FIRST).type is ResponseType.ACK


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": 256},
        {"status": "15"},
        {"status": True},
        {"status": 7},
        {"status": -1},
        {"interrupt_status": 4},
        {"driver_features": 1 << 64},
        {"driver_features": int(WANTED | Feature(1 << 40))},
        {"driver_features": 0},
        {"generation": None},
        {"queue_sel": 1 << 32},
        {"queue_size": 48},
        {"queue_size": 0},
        {"desc": 8},
        {"desc": 1 << 40},
        {"queue": [1]},
        {"queue": ["0", 0]},
        {"queue": 7},
        {"queue": [1 << 16, 0]},
        {"queue": [65, 0]},
        {"queue": [0, True, 0, True]},
        {"queue": b"00"},
        {"queue": range(2)},
    ],
)
def test_what_no_transport_can_be_like_is_refused_and_changes_nothing(rig: Rig, wrong: dict[str, object]) -> None:
    rig.driver()
    other = Rig(rig.memory)
    before, state = other.transport.state(), rig.transport.state()
    with pytest.raises(UsageError):
        other.transport.restore(state._replace(**wrong))  # type: ignore[arg-type]
    assert other.transport.state() == before
    assert (other.interrupts, int(other.device.acked_features)) == (0, 0)
    other.transport.restore(state)


@pytest.mark.parametrize("queue", [[5, 1 << 70, 5, 1 << 70], [5, -1, 5, -1], [5, 2, 5, 1], [2, 0, 7, 3], [0, 0]])
def test_a_wrap_counter_is_0_or_1(queue: list[int]) -> None:
    features = int(WANTED | Feature.RING_PACKED)
    state = MmioState(15, features, 0, 0, 0, 64, 0, 0x1000, 0x2000, queue, 0, 0)
    with pytest.raises(UsageError, match=r"^queue=.*: has to be 4 numbers up to 65535, 1, 65535, 1"):
        require_state(state)
    require_state(state._replace(queue=[5, 1, 5, False]))


@pytest.mark.parametrize("state", [None, "{}", [0] * 12, (0,) * 12])
def test_what_is_no_state_is_refused(rig: Rig, state: MmioState) -> None:
    with pytest.raises(UsageError, match="has to be an MmioState"):
        rig.transport.restore(state)


def test_features_that_the_device_does_not_offer_are_refused(rig: Rig) -> None:
    first = Rig(rig.memory, make_device(node_id=3))
    first.driver()
    before = rig.transport.state()
    with pytest.raises(UsageError, match=r"^driver_features=0x.*: have to be acceptable"):
        rig.transport.restore(first.transport.state())
    assert rig.transport.state() == before


def test_a_transport_that_a_driver_has_is_left_to_it(rig: Rig) -> None:
    driver = rig.driver()
    with pytest.raises(UsageError, match=r"^status=0xf: has to be 0"):
        rig.transport.restore(rig.transport.state())
    assert driver.request(PLUG_FIRST).type is ResponseType.ACK


def test_a_snapshot_and_the_state_beside_it_are_the_whole_machine(tmp_path: Path) -> None:
    config = VmMemoryConfig.parse(
        "--memory size=8M,shared=on,hotplug_method=virtio-mem,hotplug_size=128M,hotplugged_size=64M"
    )

    def transport_of(manager: MemoryManager) -> MmioTransport:
        service = manager.zones["mem0"].service
        return MmioTransport(service, manager.guest_memory, interrupt=lambda: None, notified=lambda: None)

    def kick_of(transport: MmioTransport) -> Callable[[], None]:
        def kick() -> None:
            transport.process()

        return kick

    with MemoryManager(config, block_size=2 * MIB) as manager:
        transport, hotplug = transport_of(manager), manager.zones["mem0"].hotplug
        assert hotplug is not None
        driver = MmioDevice(transport, manager.guest_memory, RING, kick=kick_of(transport), wait=lambda: None)
        for block in range(4):
            addr = GuestAddress(hotplug.addr + block * 2 * MIB)
            assert driver.request(Request(RequestType.PLUG, addr, 1)).type is ResponseType.ACK
        manager.pause()
        save(manager, tmp_path / "snapshot")
        state = stored(transport.state())
    with restore(tmp_path / "snapshot") as manager:
        other = transport_of(manager)
        other.restore(state)
        manager.resume()
        driver._registers, driver._memory, driver._kick = other, manager.guest_memory, kick_of(other)
        driver._queue._memory = manager.guest_memory
        for type_ in (RequestType.UNPLUG, RequestType.PLUG):
            assert driver.request(Request(type_, hotplug.addr, 4)).type is ResponseType.ACK
