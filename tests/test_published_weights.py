"""`soft_weighted.reference`: the published formulas and the frozen attack, and what that shows.

Weights are compared with the closed form written out in numpy on the biased table.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import synthetic_bias as bias
import torch
from conftest import Mlp
from corrections import (
    FITTED,
    GAIN,
    GAP,
    TEST,
    TRAIN,
    UTILITY,
    VAL,
    Linear,
    N,
    accuracy,
    corrected,
    logistic,
    loss,
    request,
    two_classes,
    weights_of,
)

from unsc_plugin.attacks import linear_margin, linear_overshoot
from unsc_plugin.errors import ConfigError, NotApplicable
from unsc_plugin.linalg import analytic_weights
from unsc_plugin.registry import create, load

NAME = "soft_weighted.reference"
FROZEN = {"goals": ["robust"], "attack": {"kind": "reference_overshoot"}}


def published(task=None, **settings):
    """Run the preset as it is registered."""
    return create(NAME, **settings).unlearn(two_classes(FITTED), task or request(), 0)


def overshot(x, theta, factor=1.3):
    return x - factor * (x @ theta / (theta @ theta))[:, None] * theta


def closed_form(gain, utility, target, lam, case):
    """Return the published weights of a case, the projection taken directly."""
    neutral = gain - (gain @ utility) / (utility @ utility) * utility
    direction = neutral if case in ("utility", "both") else gain
    length = target / (direction @ direction) if case in ("metric", "both") else 1 / (2 * lam)
    return length * direction


# --------------------------------------------------------------------------- the closed form


def test_the_preset_is_the_whole_gap_in_one_step():
    result = published()
    e, theta = weights_of(result), logistic(result.model)
    assert np.linalg.norm(e) == pytest.approx(22.7295, abs=5e-5)
    assert (e.min(), e.max()) == pytest.approx((-1.7062, 3.0755), abs=5e-5)
    assert bias.parity(VAL, theta) == pytest.approx(-0.1335, abs=5e-5)
    assert accuracy(VAL, theta) == 0.6075
    plan = result.stats["plan"]
    assert (plan["protocol"], plan["stop"], plan["noop"]) == ("reference", "one_step", None)
    assert plan["rows"] == {"train": N, "fit": len(VAL.y)}
    [row] = plan["rounds"]
    assert (row["case"], row["norm"]) == ("both", pytest.approx(22.7295, abs=5e-5))
    assert row["predicted"][0] == pytest.approx(GAP, abs=1e-10)
    json.dumps(dict(result.stats), allow_nan=False)


@pytest.mark.parametrize("form", ["cap", "reach"])
@pytest.mark.parametrize("case", ["none", "metric", "utility", "both"])
def test_every_case_is_taken_as_it_is_chosen(case, form):
    e = weights_of(published(case=case, lam=1e-3, form=form, target=0.5))
    expected = closed_form(GAIN, UTILITY, 0.5 * GAP, 1e-3, case)
    np.testing.assert_allclose(e, expected, rtol=0, atol=1e-9)


def test_the_tests_of_the_cases_may_choose():
    result = published(case="auto", lam=1e-3, target=0.5)
    expected, case, _ = analytic_weights(
        torch.tensor(GAIN), torch.tensor(UTILITY), 0.5 * GAP, lam=1e-3, form="cap"
    )
    assert result.stats["plan"]["rounds"][0]["case"] == case == "utility"
    np.testing.assert_allclose(weights_of(result), expected, rtol=0, atol=1e-9)


def test_a_gap_below_zero_grows():
    turned = request(s=1 - VAL.s)
    result = published(turned)
    assert result.stats["plan"]["gap"] == [pytest.approx(GAP)]
    found = bias.parity(VAL, logistic(result.model), 1 - VAL.s)
    assert found == pytest.approx(-0.763, abs=5e-4)


def test_the_loss_gap_is_a_goal_like_any_other():
    result = published(goals=["eop_loss"])
    assert result.stats["plan"]["gap"] == [pytest.approx(0.7127, abs=5e-5)]
    e = weights_of(result)
    assert UTILITY @ e == pytest.approx(0, abs=1e-9)


# --------------------------------------------------------------------------- the frozen attack


def test_a_robust_loss_is_a_sum_that_is_to_go_to_zero():
    moved = bias.Part(overshot(VAL.x, FITTED), VAL.y, VAL.s)
    before = loss(moved, FITTED)
    result = published(**FROZEN, case="none", lam=10.0)
    plan = result.stats["plan"]
    assert plan["gap"] == [pytest.approx(before, abs=1e-9)]
    assert plan["rounds"][0]["asked"] == [pytest.approx(before, abs=1e-9)]
    slope = moved.x.T @ (bias.sigmoid(moved.x @ FITTED) - VAL.y)  # of the sum over the rows
    gradients = (bias.sigmoid(TRAIN.x @ FITTED) - TRAIN.y)[:, None] * TRAIN.x
    matrix = bias.hessian(TRAIN.x, FITTED, bias.RIDGE, np.ones(N))
    gain = gradients @ np.linalg.solve(matrix, slope)
    np.testing.assert_allclose(weights_of(result), gain / 20, rtol=0, atol=1e-7)
    # where the constraint binds, neither λ nor the sum is seen
    for lam in (0.1, 1000.0, None):
        both = weights_of(published(**FROZEN, lam=lam))
        expected = closed_form(gain, UTILITY, len(VAL.y) * before, lam, "both")
        np.testing.assert_allclose(both, expected, rtol=0, atol=1e-6)


def test_the_attack_stays_where_the_original_was():
    result = published(**FROZEN, case="none", lam=1.0)
    moved = bias.Part(overshot(VAL.x, FITTED), VAL.y, VAL.s)
    theta = logistic(result.model)
    assert np.abs(theta - FITTED).max() > 0.1
    assert result.stats["realised_values"]["fit"]["f"] == [pytest.approx(loss(moved, theta))]
    # the plan follows the base of the publication: no fit is asked for, which may not exist
    planned = result.stats["plan"]["planned"]["f"][0]
    assert planned == pytest.approx(loss(moved, theta), abs=1e-7)


def test_a_loss_of_zero_in_one_step_ruins_the_classifier():
    assert accuracy(VAL, logistic(published(**FROZEN).model)) == pytest.approx(0.31, abs=0.01)


@pytest.mark.parametrize(("factor", "right"), [(1.3, 0.22375), (1.01, 0.22375), (0.99, 0.77625)])
def test_beyond_the_boundary_every_answer_turns_over(factor, right):
    moved = linear_overshoot(torch.tensor(FITTED), 0.0, torch.tensor(VAL.x), factor).numpy()
    np.testing.assert_allclose(moved, overshot(VAL.x, FITTED, factor), rtol=0, atol=1e-12)
    assert accuracy(bias.Part(moved, VAL.y, VAL.s), FITTED) == right
    assert accuracy(VAL, FITTED) == 0.77625


def test_overshooting_scales_the_margin():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 4, generator=generator), torch.randn(6, 3, 4, generator=generator)
    before = x.flatten(1) @ weight.flatten() + 0.7
    after = linear_overshoot(weight, 0.7, x).flatten(1) @ weight.flatten() + 0.7
    torch.testing.assert_close(after, -0.3 * before, rtol=1e-4, atol=1e-5)
    nowhere = linear_overshoot(torch.zeros(3, 4), 0.7, x)
    assert bool(torch.isfinite(nowhere).all())


def test_the_margin_of_a_model_that_standardises_its_columns():
    class Scaled(Linear):
        def features(self, features):
            return (features - 2.0) / 3.0

    torch.manual_seed(0)
    model, x = Scaled(4, 2, bias=True).double().train(), torch.randn(9, 4, dtype=torch.float64)
    key, weight, offset = linear_margin(model, {"features": x})
    logits = model(x).detach()
    assert (key, model.training) == ("features", True)
    torch.testing.assert_close(x @ weight + offset, logits[:, 1] - logits[:, 0])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_linear_classifiers_of_two_classes_can_be_overshot():
    x = {"features": torch.randn(9, 4, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(NotApplicable, match="linear in its inputs"):
        linear_margin(Mlp(4, 2), x)
    with pytest.raises(NotApplicable, match="two classes"):
        linear_margin(Linear(4, 3), x)
    task = request()
    with pytest.raises(NotApplicable, match="linear in its inputs"):
        create(NAME, **FROZEN).unlearn(Mlp(20, 2).double(), task, 0)
    create(NAME).unlearn(Mlp(20, 2).double(), task, 0)  # nothing is attacked


def test_a_frozen_attack_rewards_a_heavier_ridge_and_an_adaptive_one_does_not():
    """Why robustness is measured anew for every model: ReLU features, two ridges, same rows."""
    rng = np.random.default_rng(9)
    weight = rng.standard_normal((20, 100)) / np.sqrt(20)
    offset = 0.3 * rng.standard_normal(100)
    train, test = (
        bias.Part(np.maximum(part.x @ weight + offset, 0), part.y, part.s) for part in (TRAIN, TEST)
    )
    light, heavy = (bias.fit(train.x, train.y, mu=mu) for mu in (1e-4, 10.0))

    def right(theta, at):
        moved = linear_overshoot(torch.tensor(at), 0.0, torch.tensor(test.x)).numpy()
        return accuracy(bias.Part(moved, test.y, test.s), theta)

    clean = [accuracy(test, theta) for theta in (light, heavy)]
    frozen = [right(theta, at=light) for theta in (light, heavy)]
    adaptive = [right(theta, at=theta) for theta in (light, heavy)]
    assert clean == [0.76475, 0.7725]
    assert frozen == [0.23525, 0.73225]
    assert adaptive == [0.23525, 0.2275]


# --------------------------------------------------------------------------- robustness, adaptive


def robust(part, theta, budget=0.1):
    """Return robust accuracy and mean loss under linf, in closed form."""
    margin = (2 * part.y - 1) * (part.x @ theta) - budget * np.abs(theta).sum()
    return float((margin > 0).mean()), float(np.logaddexp(0, -margin).mean())


def test_a_heavier_ridge_is_a_rival_of_weights_for_robustness():
    heavy = bias.fit(TRAIN.x, TRAIN.y, mu=100.0)
    assert robust(TEST, heavy) == pytest.approx((0.6485, 0.6336), abs=5e-5)
    assert accuracy(TEST, heavy) == pytest.approx(0.774, abs=5e-4)
    e = weights_of(corrected(goals=["robust"], target=0.3))
    soft = bias.fit(TRAIN.x, TRAIN.y, weight=1 + e)
    assert accuracy(TEST, soft) == pytest.approx(accuracy(TEST, heavy), abs=0.002)
    # against linf weights give more right answers, the flatter model the lower loss
    assert robust(TEST, soft)[0] - robust(TEST, heavy)[0] == pytest.approx(0.0145, abs=0.004)
    assert robust(TEST, soft)[1] - robust(TEST, heavy)[1] == pytest.approx(0.011, abs=0.004)


# --------------------------------------------------------------------------- the protocol


def test_the_preset_says_where_it_comes_from():
    preset = load().methods["soft_weighted"].entry.presets["reference"]
    assert preset.source == "reference_code"
    assert create(NAME).config.published


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"protocol": "ours"}, ["protocol reference (got ours)"]),
        ({"eps_min": -1.0}, ["eps_min null (got -1.0)"]),
        ({"eps_max": 1.0, "trust": 0.5}, ["eps_max null (got 1.0)", "trust null (got 0.5)"]),
        ({"step": None}, ["step 1.0 (got null)"]),
        ({"max_rounds": 20}, ["max_rounds 1 (got 20)"]),
        ({"solver": "hard"}, ["solver qp (got hard)"]),
        ({"utility_slack": 0.1}, ["utility_slack 0.0 (got 0.1)"]),
        ({"strict": True}, ["strict false (got true)"]),
        ({"goals": ["dp", "eop"]}, ["one goal (got 2)"]),
        ({"case": "none"}, ["lam"]),
        ({"case": "utility"}, ["lam"]),
        ({"case": "neither"}, ["case"]),
    ],
)
def test_what_the_closed_form_does_not_have_is_refused(settings, named):
    if settings.get("protocol") == "ours":
        settings = {**settings, "eps_min": -1.0}
    with pytest.raises(ConfigError) as told:
        create(NAME, **settings)
    assert all(words in str(told.value) for words in named)


@pytest.mark.parametrize("case", ["auto", "none", "metric", "utility", "both"])
def test_our_protocol_has_no_case(case):
    with pytest.raises(ConfigError, match="protocol reference"):
        create("soft_weighted", case=case)


def test_a_goal_that_turns_out_to_be_several_is_refused():
    with pytest.raises(ConfigError, match="one goal"):
        published(goals=["eo"])


def test_forced_deletions_stand_beside_the_closed_form():
    e, free = weights_of(published(request(torch.arange(5)))), weights_of(published())
    assert (e[:5] == -1).all()
    np.testing.assert_allclose(e[5:], free[5:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["soft_weighted", "constrained_step"])
def test_the_frozen_attack_is_of_the_reference_protocol_only(name):
    with pytest.raises(ConfigError, match="reference_overshoot"):
        corrected(name, **FROZEN)


def test_what_is_attainable_without_a_box_stays_open():
    [row] = create(NAME).preflight(two_classes(FITTED), request(), 0)["table"]
    assert row["asked"] == pytest.approx(GAP)
    assert row["attainable"] is row["attainable at no utility cost"] is None
