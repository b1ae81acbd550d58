"""The device in service, on each backing of real memory, never disagrees with the naive model."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.counts import REQUESTS_PER_BACKING
from tests.device.arena import BACKINGS, MAX_PLUGGED, NB_BLOCKS, Arena, random_move
from tests.host import HugePagePool
from vhost_user.units import MIB
from virtio_mem.protocol import RequestType, ResponseType

CHECK_EVERY = 250
"""Requests between two looks at every block."""

backings = pytest.mark.parametrize(
    "backing",
    [pytest.param(name, marks=pytest.mark.needs_hugetlb) if name == "hugetlb" else name for name in BACKINGS],
)


@pytest.fixture
def pool(backing: str, hugepages: Callable[[int, int], HugePagePool]) -> None:
    if backing == "hugetlb":
        hugepages(2 * MIB, MAX_PLUGGED)


@backings
@pytest.mark.parametrize("whole_region", [False, True])
@pytest.mark.usefixtures("pool")
@pytest.mark.clause("MEM-CONF-7", "MEM-CONF-8", "MEM-LAYOUT-3", "MEM-REGION-1")
def test_random_requests(
    backing: str, whole_region: bool, tmp_path: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    arena = Arena(backing, tmp_path, whole_region=whole_region)
    next_check = 0
    while arena.requests < REQUESTS_PER_BACKING // 2:
        random_move(arena, rng)
        if arena.requests >= next_check:
            arena.check_everything()
            next_check += CHECK_EVERY
    arena.check_everything()
    answers = arena.service.answers
    assert all(answers[type_, "ACK"] for type_ in ("PLUG", "UNPLUG", "STATE", "UNPLUG_ALL"))
    assert all(answers["PLUG", refusal] for refusal in ("NACK", "BUSY", "ERROR"))
    figure(f"random requests on {backing}{', whole region usable' if whole_region else ''}", arena.requests)
    arena.close()


class DeviceMachine(RuleBasedStateMachine):
    """Host and guest move as Hypothesis likes; what fails is shrunk to the shortest sequence."""

    backing = "anonymous"

    @initialize(whole_region=st.booleans())
    def start(self, whole_region: bool) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.arena = Arena(self.backing, Path(self.directory.name), whole_region=whole_region)

    @rule(type_=st.sampled_from(list(RequestType)), block=st.integers(0, NB_BLOCKS), nb_blocks=st.integers(1, 16))
    def ask(self, type_: int, block: int, nb_blocks: int) -> None:
        self.arena.request(type_, block, nb_blocks)

    @rule(
        type_=st.integers(0, 0xFFFF),
        block=st.integers(-NB_BLOCKS, 2 * NB_BLOCKS),
        nb_blocks=st.integers(0, 0xFFFF),
        shift=st.integers(-(2**63), 2**63),
    )
    def ask_nonsense(self, type_: int, block: int, nb_blocks: int, shift: int) -> None:
        self.arena.request(type_, block, nb_blocks, shift)

    @rule(data=st.data())
    def unplug_something(self, data: st.DataObject) -> None:
        runs = list(self.arena.device.blocks.plugged_runs())
        if runs:
            first, nb_blocks = data.draw(st.sampled_from(runs))
            assert self.arena.request(RequestType.UNPLUG, first, nb_blocks) in (ResponseType.ACK, ResponseType.BUSY)

    @rule(blocks=st.integers(0, MAX_PLUGGED))
    def resize(self, blocks: int) -> None:
        self.arena.resize(blocks)

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.arena.pause(paused)

    @rule(refuses=st.booleans())
    def refuse(self, refuses: bool) -> None:
        self.arena.refuse(refuses)

    @rule()
    def device_reset(self) -> None:
        self.arena.device.device_reset()

    @rule()
    def system_reset(self) -> None:
        self.arena.system_reset()

    @invariant()
    def nothing_differs(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check_bytes()

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check_everything()
            self.arena.close()
            self.directory.cleanup()


@backings
@pytest.mark.usefixtures("pool")
def test_any_sequence_of_moves(backing: str) -> None:
    machine = type("Machine", (DeviceMachine,), {"backing": backing})
    run_state_machine_as_test(machine)
