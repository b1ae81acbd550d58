"""Targets by pressure: who is short gets, who is calm gives, nobody goes to and fro, and the budget holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_user.errors import UsageError
from virtio_mem.policy import Machine, Policy

STEP, LEAST, MOST = 10, 20, 100


def policy(budget: int = 1000) -> Policy:
    return Policy(budget, step=STEP)


def one(pressure: float | None, target: int = 50, *, size: int | None = None, name: str = "a") -> Machine:
    return Machine(name, target if size is None else size, target, LEAST, MOST, pressure)


def test_who_is_short_gets_a_step_and_then_has_time() -> None:
    decides = policy()
    assert decides.decide(0, [one(0.5)]) == {"a": 60}
    assert decides.decide(decides.settle - 1, [one(0.5, 60)]) == {}
    assert decides.decide(decides.settle, [one(0.5, 60)]) == {"a": 70}
    assert policy().decide(0, [one(0.1, MOST - 3)]) == {"a": MOST}
    assert policy().decide(0, [one(1.0, MOST)]) == {}


def test_who_is_calm_for_long_gives_step_by_step() -> None:
    decides = policy()
    assert decides.decide(0, [one(0.0)]) == {}
    assert decides.decide(decides.calm - 1, [one(0.0)]) == {}
    assert decides.decide(decides.calm, [one(0.0)]) == {"a": 40}
    assert decides.decide(2 * decides.calm - 1, [one(0.0, 40)]) == {}
    assert decides.decide(2 * decides.calm, [one(0.0, 40, size=41)]) == {}, "the guest has not come so far yet"
    assert decides.decide(2 * decides.calm + 1, [one(0.0, 40)]) == {"a": 30}
    assert policy().decide(0, [one(0.0, LEAST)]) == {}


@pytest.mark.parametrize("between", [0.02, 0.09, None])
def test_a_break_begins_the_calm_anew_and_what_lies_between_changes_nothing(between: float | None) -> None:
    decides = policy()
    decides.decide(0, [one(0.0)])
    assert decides.decide(decides.calm - 1, [one(between)]) == {}
    assert decides.decide(decides.calm + 1, [one(0.0)]) == {}
    assert decides.decide(2 * decides.calm + 1, [one(0.0)]) == {"a": 40}


def test_the_budget_goes_to_who_is_short_most_and_calm_ones_make_room_at_once() -> None:
    decides = policy(budget=165)
    machines = [one(0.2, name="a"), one(0.9, name="b"), one(0.0, name="c")]
    assert decides.decide(0, machines) == {"b": 60, "c": 40}
    given_back = [one(0.2, name="a"), one(0.9, 60, size=55, name="b"), one(0.0, 40, name="c")]
    assert decides.decide(1, [*given_back[:2], one(0.0, 40, size=50, name="c")]) == {}, "c has not given it back yet"
    assert decides.decide(2, given_back) == {"a": 60}


def test_over_the_budget_the_calm_give_at_once() -> None:
    assert policy(budget=90).decide(0, [one(0.05, name="a"), one(0.0, name="b")]) == {"b": 40}


def test_as_many_give_at_once_as_have_to_and_in_turn() -> None:
    decides = policy(budget=200)
    calm = [one(0.0, name=name) for name in "bcd"]
    assert decides.decide(0, [one(0.5), *calm]) == {"b": 40}
    gives = one(0.0, 40, size=50, name="b")
    assert decides.decide(1, [one(0.5), gives, *calm[1:]]) == {}, "what is lacking is on its way"
    assert decides.decide(decides.settle, [one(0.5), gives, *calm[1:]]) == {"c": 40}, "it does not come"


def test_a_guest_that_does_not_come_to_its_target_is_given_no_more() -> None:
    decides = policy()
    assert decides.decide(0, [one(0.5)]) == {"a": 60}
    assert decides.decide(decides.settle, [one(0.5, 60, size=59)]) == {}
    assert decides.decide(decides.settle + 1, [one(0.5, 60)]) == {"a": 70}


def test_who_is_short_while_it_gives_back_keeps_what_is_in_the_budget_as_its_own() -> None:
    machines = [one(0.5, 50, size=80), one(0.0, name="b")]
    assert policy(budget=130).decide(0, machines) == {"a": 60}


def test_a_machine_that_is_gone_is_forgotten() -> None:
    decides = policy()
    decides.decide(0, [one(0.5), one(0.0, name="b")])
    decides.decide(1, [])
    assert decides.decide(2, [one(0.5)]) == {"a": 60}
    assert decides.decide(decides.calm + 1, [one(0.0, name="b")]) == {}


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Policy(100, step=0), "step"),
        (lambda: Policy(100, shrink_at=0.1), "shrink_at"),
        (lambda: Policy(100, grow_at=2), "grow_at"),
        (lambda: Policy(100, grow_at=float("nan")), "grow_at"),
        (lambda: Policy(100, settle=-1), "settle"),
        (lambda: Policy(100, calm=float("nan")), "calm"),
        (lambda: policy().decide(0, [one(0.0), one(0.0)]), "name"),
        (lambda: policy().decide(0, [one(float("nan"))]), "a pressure"),
        (lambda: policy().decide(0, [one(-0.1)]), "a pressure"),
        (lambda: policy().decide(0, [one(12.5)]), "a pressure"),
        (lambda: policy(39).decide(0, [one(0.0, name="a"), one(0.0, name="b")]), "budget"),
    ],
)
def test_what_can_not_be(make: object, field: str) -> None:
    assert callable(make)
    with pytest.raises(UsageError) as refused:
        make()
    assert refused.value.field == field


PRESSURE = st.none() | st.floats(0, 1)


@given(
    rounds=st.lists(st.tuples(st.floats(0, 400), st.lists(st.tuples(PRESSURE, st.booleans()), min_size=4, max_size=4)))
)
def test_targets_are_within_limits_and_the_budget_is_never_passed(
    rounds: list[tuple[float, list[tuple[float | None, bool]]]],
) -> None:
    budget, now = 190, 0.0
    decides = policy(budget)
    sizes, targets = [40] * 4, [40] * 4
    for later, looks in rounds:
        now += later
        sizes = [target if follows else size for target, size, (_, follows) in zip(targets, sizes, looks, strict=True)]
        machines = [
            Machine(str(number), sizes[number], targets[number], LEAST, MOST, pressure)
            for number, (pressure, _) in enumerate(looks)
        ]
        for name, target in decides.decide(now, machines).items():
            pressure = looks[int(name)][0]
            assert pressure is not None
            assert target > targets[int(name)] if pressure >= decides.grow_at else pressure <= decides.shrink_at
            targets[int(name)] = target
        assert all(LEAST <= target <= MOST for target in targets)
        assert sum(map(max, sizes, targets)) <= budget
