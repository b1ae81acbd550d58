"""Any legal sequence of messages, with rings running in between, ends in the state that a model has of it.

The front end and the back end are ours, each at one end of a socket; the model is a few plain values. After each step
what the back end has is compared with it: regions, rings, configuration, status, and every request that was answered.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.backend.devices import Echo
from tests.backend.rig import EVENT_IDX, INDIRECT_DESC, RING_PACKED, VERSION_1, Ram, Running, start_ring
from vhost_user.backend import Server
from vhost_user.backend.session import Session
from vhost_user.connection import Connection
from vhost_user.device_status import Status
from vhost_user.errors import Refused
from vhost_user.frontend import Frontend
from vhost_user.message import (
    U64,
    FrontendRequest,
    ProtocolFeature,
    SingleMemoryRegion,
    VringState,
)
from vhost_user.units import GuestAddress

RINGS = 2
EXTRA_REGIONS = 3
ring_indices = st.integers(0, RINGS - 1)
extra_indices = st.integers(0, EXTRA_REGIONS - 1)


class Ends(RuleBasedStateMachine):
    """One front end after another, at one device."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.device = Echo()
        self.server = self.stack.enter_context(Server())
        self.rams = [Ram(guest=at << 32, user=(at + 1) << 40) for at in range(1 + EXTRA_REGIONS)]
        for ram in self.rams:
            self.stack.callback(ram.close)
        self.frontend: Frontend | None = None
        self.config = bytearray(self.device.config)
        self.stack.enter_context(self.server.in_thread())
        self.served = 0

    @property
    def front(self) -> Frontend:
        assert self.frontend is not None
        return self.frontend

    @property
    def session(self) -> Session:
        (endpoint,) = self.server.endpoints
        assert endpoint.link is not None
        return endpoint.link.session

    @initialize(packed=st.booleans(), event_idx=st.booleans(), slots=st.booleans())
    def connect(self, packed: bool, event_idx: bool, slots: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        if self.server.endpoints:
            (endpoint,) = self.server.endpoints
            self.server.loop.call_soon(lambda: endpoint.serve(theirs))
        else:
            self.server.loop.call_soon(lambda: self.server.serve(theirs, self.device))
        self.features = VERSION_1 | INDIRECT_DESC | packed * RING_PACKED | event_idx * EVENT_IDX
        wanted = ProtocolFeature(0x1FFFFF) & ~ProtocolFeature.INBAND_NOTIFICATIONS
        if not slots:
            wanted &= ~ProtocolFeature.CONFIGURE_MEM_SLOTS
        self.frontend = Frontend(Connection(ours), features=self.features, protocol_features=wanted)
        self.front.regions.share([self.rams[0].region])
        self.shared = {0}
        self.rings: dict[int, Running] = {}
        self.started: set[int] = set()
        self.enabled: set[int] = set()
        self.status = 0
        self.logging = False

    # Memory.

    @rule(at=extra_indices)
    def add_or_remove_region(self, at: int) -> None:
        ram = self.rams[1 + at]
        if 1 + at in self.shared:
            self.front.regions.remove(ram.region)
        else:
            self.front.regions.add(ram.region)
        self.shared ^= {1 + at}

    @rule()
    @precondition(lambda self: self.started and self.front.regions.by_region)
    def remove_the_region_of_a_ring(self) -> None:
        with pytest.raises(Refused):
            self.front.regions.remove(self.rams[0].region)

    @rule()
    @precondition(lambda self: self.front.regions.by_region)
    def add_a_region_twice(self) -> None:
        region = SingleMemoryRegion(self.rams[0].region.wire)
        with pytest.raises(Refused):
            self.front.requests.tell(FrontendRequest.ADD_MEM_REG, region, [self.rams[0].fd])

    # Rings.

    @rule(index=ring_indices, size=st.sampled_from([4, 16, 64]), enabled=st.booleans())
    def start(self, index: int, size: int, enabled: bool) -> None:
        if index in self.started:
            return
        ring = self.rings.get(index)
        if ring is None:
            self.rings[index] = start_ring(self.front, self.rams[0], index, size, enabled=enabled)
        else:
            ring.vring.start(ring.layout, ring.vring.base, enabled=enabled)
        self.started.add(index)
        if enabled:
            self.enabled.add(index)

    @rule(index=ring_indices)
    def stop(self, index: int) -> None:
        if index in self.started:
            self.rings[index].vring.stop()
            self.started.remove(index)

    @rule(index=ring_indices, enabled=st.booleans())
    def enable(self, index: int, enabled: bool) -> None:
        self.front.vring(index).enable(enabled)
        self.enabled = self.enabled | {index} if enabled else self.enabled - {index}

    @rule(index=ring_indices, count=st.integers(1, 8))
    def send(self, index: int, count: int) -> None:
        ring = self.rings.get(index)
        if ring is None:
            return
        for each in range(count):
            if ring.driver.free >= 2:
                ring.send(b"%d" % each)
        ring.vring.kick.signal()

    @rule(index=ring_indices)
    def collect(self, index: int) -> None:
        ring = self.rings.get(index)
        if ring is not None and index in self.started & self.enabled:
            self.served += len(ring.sent)
            ring.collect(len(ring.sent))

    @rule(index=ring_indices)
    @precondition(lambda self: self.started)
    def set_what_runs(self, index: int) -> None:
        if index in self.started:
            with pytest.raises(Refused):
                self.front.requests.tell(FrontendRequest.SET_VRING_NUM, VringState(index, 8))

    # The device.

    @rule(offset=st.integers(0, 20), size=st.integers(1, 20))
    def get_config(self, offset: int, size: int) -> None:
        if offset + size <= len(self.config):
            assert self.front.get_config(offset, size) == self.config[offset : offset + size]
        else:
            with pytest.raises(Refused):
                self.front.get_config(offset, size)

    @rule(offset=st.integers(0, 20), data=st.binary(min_size=1, max_size=8), migration=st.booleans())
    def set_config(self, offset: int, data: bytes, migration: bool) -> None:
        if offset + len(data) <= len(self.config) and (offset >= 8 or migration):
            self.front.set_config(offset, data, migration=migration)
            self.config[offset : offset + len(data)] = data
        else:
            with pytest.raises(Refused):
                self.front.set_config(offset, data, migration=migration)

    @rule(status=st.integers(0, 300))
    def set_status(self, status: int) -> None:
        if status <= 255:
            self.front.status = self.status = status
        else:
            with pytest.raises(Refused):
                self.front.status = status
        assert self.front.status == self.status & ~Status.NEEDS_RESET

    @rule()
    def reset_device(self) -> None:
        self.front.reset_device()
        self.started.clear()
        self.enabled.clear()
        self.rings.clear()
        self.status = 0
        self.config[8:] = b"writable"

    @rule()
    def toggle_logging(self) -> None:
        if self.logging:
            self.front.stop_logging()
        else:
            self.front.start_logging(GuestAddress((1 + EXTRA_REGIONS) << 32))
        self.logging = not self.logging

    @rule()
    def ack_what_was_not_offered(self) -> None:
        with pytest.raises(Refused):
            self.front.requests.tell(FrontendRequest.SET_FEATURES, U64(1 << 50))

    @rule(packed=st.booleans(), event_idx=st.booleans(), slots=st.booleans())
    def go_and_come_again(self, packed: bool, event_idx: bool, slots: bool) -> None:
        self.front.close()
        (endpoint,) = self.server.endpoints
        while endpoint.connected:
            pass
        self.connect(packed, event_idx, slots)

    # What is true after each step.

    @invariant()
    def back_end_is_as_modelled(self) -> None:
        if self.frontend is None:
            return
        self.front.requests.confirm()
        negotiated = self.session.negotiated
        regions = {int(region.guest_address) >> 32 for region in negotiated.memory.guest_memory.regions}
        assert regions == self.shared
        assert {vring.index for vring in self.session.rings.vrings if vring.started} == self.started
        assert {vring.index for vring in self.session.rings.vrings if vring.enabled} == self.enabled
        assert self.device.config == self.config
        assert negotiated.status in (self.device.status & ~Status.NEEDS_RESET, 0)
        assert (negotiated.active_log is not None) == self.logging
        for index in self.started:
            queue = self.session.rings.vrings[index].queue
            assert queue is not None
            assert queue.broken is None
            assert (queue.log is not None) == self.logging

    def teardown(self) -> None:
        if self.frontend is not None:
            self.frontend.close()
        self.stack.close()


def test_any_legal_sequence_ends_in_the_modelled_state() -> None:
    run_state_machine_as_test(Ends)
