# SPDX-License-Identifier: Apache-2.0
"""The cost model: finds true coefficients through noise, follows drift, ignores nonsense, never predicts any."""

from __future__ import annotations

import math
import random
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanocp.placement.cost import Coefficients, CostModel, StepLoad

SLOW = Coefficients(base=20e-3, kv_token=6e-8, query=3e-4, guest=5e-5, exchange=6e-3)

loads = st.builds(StepLoad, st.integers(0, 10**9), st.integers(0, 10**5), st.integers(0, 10**5))
seconds = st.one_of(
    st.floats(1e-5, 100.0), st.floats(), st.sampled_from([-1.0, 0.0, 5e-324, 1e308, math.nan, math.inf])
)


def truth(load: StepLoad, c: Coefficients) -> float:
    return (
        c.base + c.kv_token * load.kv_tokens + c.query * load.batch + c.guest * load.guests + c.exchange * load.exchange
    )


def ranks(dice: random.Random, count: int = 4) -> list[StepLoad]:
    exchange = dice.random() < 0.5
    return [
        StepLoad(dice.randint(0, 10**6), dice.randint(0, 256), dice.randint(0, 256), exchange) for _ in range(count)
    ]


def teach(model: CostModel, c: Coefficients, steps: int, seed: int = 0, noise: float = 0.03, stalls: float = 0) -> None:
    """Measured steps: the slowest rank's time with noise; some of them stalls of seconds, and none but numbers."""
    dice = random.Random(seed)
    for _ in range(steps):
        work = ranks(dice)
        model.observe(work, max(truth(load, c) for load in work) * dice.gauss(1, noise))
        if dice.random() < stalls:
            model.observe(work, dice.uniform(1, 20))
            for nonsense in (math.nan, math.inf, -1.0, 0.0):
                assert not model.observe(work, nonsense)


def worst_error(model: CostModel, c: Coefficients) -> float:
    """Largest relative error of a step's prediction over fresh loads."""
    dice = random.Random(99)
    errors = []
    for _ in range(200):
        work = ranks(dice)
        true = max(truth(load, c) for load in work)
        errors.append(abs(model.predict_step(work) / true - 1))
    return max(errors)


@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_it_finds_the_true_coefficients(scale: float) -> None:
    """Also where the machine is many times faster or slower than the prior."""
    true = Coefficients(*(c * scale for c in astuple(SLOW)[:-1]))
    model = CostModel()
    teach(model, true, 2000)
    found = model.coefficients()
    for name in ("base", "kv_token", "query", "exchange"):
        assert getattr(found, name) * found.feedback == pytest.approx(getattr(true, name), rel=0.15), name
    assert worst_error(model, true) < 0.05


def test_the_prior_is_usable_before_any_measurement() -> None:
    model = CostModel()
    assert model.coefficients() == Coefficients()
    # Measured: 400,000 tokens of KV add 9 ms.
    more = model.predict(StepLoad(400_000, 16)) - model.predict(StepLoad(0, 16))
    assert more == pytest.approx(9e-3, rel=0.01)


def test_it_follows_drift() -> None:
    """Half as much for KV, twice as much for queries: known again after as many steps as it remembers, or two."""
    model = CostModel()
    teach(model, SLOW, 2000)
    changed = Coefficients(SLOW.base, SLOW.kv_token / 2, SLOW.query * 2, SLOW.guest)
    assert worst_error(model, changed) > 0.2
    teach(model, changed, 1500, seed=1)
    assert worst_error(model, changed) < 0.07


def test_stalls_and_nonsense_do_little() -> None:
    model = CostModel()
    teach(model, SLOW, 2000, stalls=0.02)
    assert worst_error(model, SLOW) < 0.08


def test_one_stall_changes_nothing_to_speak_of() -> None:
    model = CostModel()
    teach(model, SLOW, 500)
    work = ranks(random.Random(5))
    before = model.predict_step(work)
    model.observe(work, 30.0)
    assert model.predict_step(work) == pytest.approx(before, rel=0.02)


def test_a_load_that_never_changes_does_not_undo_what_was_learnt() -> None:
    """Forgetting without news would let the fit drift at random; and the variance would grow."""
    model = CostModel()
    teach(model, SLOW, 2000)
    dice = random.Random(3)
    same = [StepLoad(500_000, 32, 4)] * 3
    for _ in range(20_000):
        model.observe(same, truth(same[0], SLOW) * dice.gauss(1, 0.03))
    assert worst_error(model, SLOW) < 0.35
    assert model.predict(same[0]) == pytest.approx(truth(same[0], SLOW), rel=0.05)
    teach(model, SLOW, 1000, seed=4)
    assert worst_error(model, SLOW) < 0.06


def test_the_slowest_rank_is_the_one_that_is_fitted() -> None:
    model = CostModel()
    work = [StepLoad(10, 1), StepLoad(900_000, 3), StepLoad(900_000, 3), StepLoad(0, 9)]
    assert model.slowest(work) == 1
    assert model.predict_step(work) == model.predict(work[1])
    idle = CostModel()
    model.observe(work, 0.05)
    idle.observe([work[1]], 0.05)
    assert model.coefficients() == idle.coefficients()


def test_the_feedback_takes_up_what_a_line_cannot() -> None:
    """A time that is no linear function, in a place where the loads hardly vary: the prediction is still right."""
    model = CostModel()
    dice = random.Random(0)
    for _ in range(1500):
        load = StepLoad(dice.randint(400_000, 500_000), dice.randint(30, 40))
        model.observe([load], 5e-3 + 1e-6 * load.batch**3 + 1e-14 * load.kv_tokens**2)
    load = StepLoad(450_000, 35)
    assert model.predict(load) == pytest.approx(5e-3 + 1e-6 * 35**3 + 1e-14 * 450_000**2, rel=0.05)


@given(st.lists(st.tuples(st.lists(loads, min_size=1, max_size=4), seconds), max_size=40), loads, loads)
def test_predictions_are_finite_monotone_and_not_negative(
    steps: list[tuple[list[StepLoad], float]], load: StepLoad, more: StepLoad
) -> None:
    """Whatever it was taught."""
    model = CostModel()
    for work, time in steps:
        model.observe(work, time)
    assert all(math.isfinite(c) and c >= 0 for c in astuple(model.coefficients()))
    here = model.predict(load)
    assert math.isfinite(here) and here >= 0
    assert model.predict(StepLoad(load.kv_tokens + more.kv_tokens, load.batch, load.guests)) >= here
    assert model.predict(StepLoad(load.kv_tokens, load.batch + more.batch, load.guests)) >= here
    assert model.predict(StepLoad(load.kv_tokens, load.batch, load.guests + more.guests)) >= here


@given(st.lists(st.tuples(st.lists(loads, min_size=1, max_size=3), seconds), max_size=10))
def test_it_is_deterministic(steps: list[tuple[list[StepLoad], float]]) -> None:
    one, two = CostModel(), CostModel()
    for work, time in steps:
        assert one.observe(work, time) == two.observe(work, time)
    assert one.coefficients() == two.coefficients()


def test_a_coefficient_that_would_be_negative_is_zero_and_the_rest_fits() -> None:
    """Guests that make a step shorter: not believed; and what they cost the fit is spread over the others."""
    model = CostModel()
    dice = random.Random(0)
    for _ in range(2000):
        load = StepLoad(dice.randint(0, 10**6), dice.randint(0, 256), dice.randint(0, 100))
        model.observe([load], 0.05 + 3e-8 * load.kv_tokens - 1e-4 * load.guests)
    found = model.coefficients()
    assert found.guest == 0
    assert found.base * found.feedback == pytest.approx(0.05 - 1e-4 * 50, rel=0.02)
    assert found.kv_token * found.feedback == pytest.approx(3e-8, rel=0.03)


def test_empty_or_impossible_loads_are_ignored() -> None:
    model = CostModel()
    assert not model.observe([], 1.0)
    assert not model.observe([StepLoad(-5, 1)], 1.0)
    assert model.coefficients() == Coefficients()
    assert model.predict(StepLoad(-5, -1, -1)) == model.predict(StepLoad(0, 0, 0))
    with pytest.raises(ValueError):
        model.slowest([])


@pytest.mark.parametrize(
    ("prior", "forgetting"),
    [
        (Coefficients(base=0.0), 0.99),
        (Coefficients(query=-1.0), 0.99),
        (Coefficients(guest=math.nan), 0.99),
        (Coefficients(), 0.0),
        (Coefficients(), 1.1),
        (Coefficients(), math.nan),
    ],
)
def test_bad_settings_are_refused(prior: Coefficients, forgetting: float) -> None:
    with pytest.raises(ValueError):
        CostModel(prior, forgetting)
