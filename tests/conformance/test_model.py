"""The naive model: what it allows, what it doesn't, and by which clause it says so."""

from __future__ import annotations

import pytest

from virtio_mem.conformance.model import ACK, BUSY, ERROR, NACK, Model, finding_of
from virtio_mem.protocol import BlockState, ConfigSpace, Request, RequestType, ResponseType

MIB = 1 << 20
ADDR = 64 * MIB
PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType


def model(requested_size: int = 8 * MIB) -> Model:
    """16 blocks of 1 MiB, of which 12 are usable and 8 wanted; blocks 2 and 3 are plugged."""
    one = Model(ADDR, 16 * MIB, MIB, requested_size, 12 * MIB)
    one.apply(ask(PLUG, 2, 2), ACK)
    return one


def ask(type_: int, block: int = 0, nb_blocks: int = 1, shift: int = 0) -> Request:
    return Request(type_, ADDR + block * MIB + shift, nb_blocks)  # type: ignore[arg-type]


def clause_of(one: Model, request: Request, answer: ResponseType) -> str:
    finding = finding_of(one.expect(request), answer)
    return finding.clause if finding else ""


def config_of(one: Model, **changes: int) -> ConfigSpace:
    fields = {name: getattr(one, name) for name in ConfigSpace._fields} | changes
    return ConfigSpace(**fields)


WRONG = [
    (ask(PLUG, shift=1), ACK, "MEM-PLUG-3"),
    (ask(PLUG, nb_blocks=0), ACK, "MEM-PLUG-4"),
    (ask(PLUG, -1), NACK, "MEM-PLUG-5"),
    (ask(PLUG, 11, 2), ACK, "MEM-PLUG-5"),
    (ask(PLUG, 1, 2), ACK, "MEM-PLUG-6"),
    (ask(PLUG, 1, 2), BUSY, "MEM-PLUG-6"),
    (ask(PLUG), ERROR, "MEM-PLUG-8"),
    (ask(PLUG), NACK, "MEM-PLUG-8"),
    (ask(PLUG, 4, 7), ACK, "DEP-NACK-2"),
    (ask(PLUG, 4, 7), ERROR, "DEP-NACK-2"),
    (ask(UNPLUG, 2, shift=4096), ACK, "MEM-UNPLUG-3"),
    (ask(UNPLUG, 2, 0), ACK, "MEM-UNPLUG-4"),
    (ask(UNPLUG, 12), ACK, "MEM-UNPLUG-5"),
    (ask(UNPLUG, 3, 2), ACK, "MEM-UNPLUG-6"),
    (ask(UNPLUG, 2, 2), NACK, "MEM-UNPLUG-8"),
    (ask(UNPLUG_ALL, 700, 0), ERROR, "MEM-UNPLUGALL-4"),
    (ask(STATE, 1, 0), ACK, "MEM-STATE-4"),
    (ask(STATE, 15), ACK, "MEM-STATE-5"),
    (ask(STATE, 1), BUSY, "MEM-STATE-6"),
    (ask(7), ACK, "DEP-UNKNOWN-1"),
]


@pytest.mark.parametrize(("request_", "answer", "clause"), WRONG)
def test_a_wrong_answer_violates_a_clause(request_: Request, answer: ResponseType, clause: str) -> None:
    finding = finding_of(model().expect(request_), answer)
    assert finding is not None
    assert finding.clause == clause
    assert finding.was == answer.name


@pytest.mark.parametrize(
    ("block", "nb_blocks", "right"),
    [(2, 2, BlockState.PLUGGED), (4, 8, BlockState.UNPLUGGED), (1, 2, BlockState.MIXED)],
)
def test_the_state_of_a_range(block: int, nb_blocks: int, right: BlockState) -> None:
    expectation = model().expect(ask(STATE, block, nb_blocks))
    for state in (None, *BlockState):
        finding = finding_of(expectation, ACK, state)
        assert (finding is None) == (state is right)
        if finding is not None:
            assert finding.clause in {"MEM-STATE-7", "MEM-STATE-8", "MEM-STATE-9"}


def test_with_the_target_reached_no_plug_is_granted() -> None:
    one = model(requested_size=2 * MIB)
    assert clause_of(one, ask(PLUG), ACK) == "MEM-TARGET-1"
    assert clause_of(one, ask(PLUG), BUSY) == "DEP-NACK-1"
    one.paused = True
    assert clause_of(one, ask(PLUG), BUSY) == "DEP-ORDER-1"


def test_what_stands_against_a_request_in_order() -> None:
    one = model()
    one.paused = True
    assert clause_of(one, ask(PLUG), BUSY) == ""
    assert clause_of(one, ask(PLUG), ACK) == "DEP-BUSY-1"
    assert clause_of(one, ask(UNPLUG, 2), ERROR) == "DEP-BUSY-2"
    assert clause_of(one, ask(UNPLUG_ALL), ERROR) == "DEP-BUSY-3"
    one.paused, one.host_refuses = False, True
    assert clause_of(one, ask(UNPLUG, 2), BUSY) == ""
    assert clause_of(one, ask(UNPLUG, 2), ACK) == ""
    assert clause_of(one, ask(UNPLUG, 2), ERROR) == "DEP-BUSY-2"


def test_where_nothing_is_plugged_nothing_stands_against_unplug_all() -> None:
    one = model()
    one.apply(ask(UNPLUG_ALL), ACK)
    one.paused = True
    assert [clause_of(one, ask(UNPLUG_ALL), answer) for answer in (ACK, BUSY)] == ["", ""]
    assert clause_of(one, ask(UNPLUG_ALL), ERROR) == "MEM-UNPLUGALL-4"
    one.paused = False
    assert clause_of(one, ask(UNPLUG_ALL), BUSY) == ""


def test_busy_is_allowed_at_any_time() -> None:
    """MEM-PLUG-7, MEM-UNPLUG-7, MEM-UNPLUGALL-3: that it passes is for the referee to see."""
    one = model()
    assert [clause_of(one, request, BUSY) for request in (ask(PLUG), ask(UNPLUG, 2), ask(UNPLUG_ALL))] == [""] * 3


def test_only_a_granted_request_changes_anything() -> None:
    one = model()
    for answer in (NACK, BUSY, ERROR):
        one.apply(ask(PLUG), answer)
        one.apply(ask(UNPLUG_ALL), answer)
    assert list(one.runs()) == [(0, 2, False), (2, 2, True), (4, 8, False)]
    one.apply(ask(UNPLUG, 3), ACK)
    assert list(one.runs()) == [(0, 2, False), (2, 1, True), (3, 9, False)]
    one.apply(ask(STATE, 2), ACK)
    assert one.plugged_size == MIB


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({"block_size": 2 * MIB}, "MEM-CONF-3"),
        ({"node_id": 1}, "MEM-CONF-4"),
        ({"addr": 0}, "MEM-CONF-5"),
        ({"region_size": 17 * MIB}, "MEM-CONF-6"),
        ({"plugged_size": MIB}, "MEM-CONF-7"),
        ({"requested_size": MIB}, "DEP-TARGET-4"),
        ({"usable_region_size": 7 * MIB}, "MEM-CONF-8"),
        ({"usable_region_size": 12 * MIB + 4096}, "MEM-CONF-12"),
        ({"usable_region_size": 17 * MIB}, "MEM-LAYOUT-3"),
        ({"usable_region_size": 11 * MIB}, "MEM-CONF-16"),
        ({"usable_region_size": MIB}, "MEM-REGION-1"),
    ],
)
def test_a_wrong_configuration_violates_a_clause(changes: dict[str, int], clause: str) -> None:
    one = model()
    assert clause in {finding.clause for finding in one.look(config_of(one, **changes))}


def test_the_usable_region_is_for_the_device_to_choose() -> None:
    one = model()
    assert not list(one.look(config_of(one, usable_region_size=16 * MIB)))
    assert one.usable_blocks == 16
    one.apply(ask(UNPLUG_ALL), ACK)
    assert not list(one.look(config_of(one, usable_region_size=8 * MIB)))
    assert list(one.look(config_of(one, usable_region_size=8 * MIB))) == []
    one.system_reset(config_of(one), unplugged=True)
    one.resize(0)
    assert not list(one.look(config_of(one, usable_region_size=0)))
    assert list(one.runs()) == []


def test_a_vast_region_has_few_runs() -> None:
    """They follow from what is plugged, and are not looked for block by block."""
    one = model()
    one.region_size = one.usable_region_size = 1 << 62
    assert list(one.runs()) == [(0, 2, False), (2, 2, True), (4, (1 << 42) - 4, False)]


def test_a_machine_that_is_reset_may_keep_its_blocks() -> None:
    one = model()
    one.system_reset(config_of(one), unplugged=False)
    assert one.plugged_size == 2 * MIB
    assert Model.of(config_of(one)).plugged_size == 0
