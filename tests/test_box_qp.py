"""Weights in a box: closed forms, other solvers, known answers of a synthetic table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import synthetic_bias as bias
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from unsc_plugin import _box_lp, _box_qp
from unsc_plugin._box_lp import feasibility_gap
from unsc_plugin.errors import ConfigError, DataError, InfeasibleError, NumericalError
from unsc_plugin.linalg import (
    analytic_weights,
    attainable_fraction,
    max_linear_under_box,
    solve_weight_qp,
)

torch.set_num_threads(1)

DOUBLE = torch.float64
NO_BOX = (-math.inf, math.inf)
BOXES = [(-1.0, 0.0), (-1.0, 1.0), (-1.0, 3.0)]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def pair(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return F and U of different lengths with a correlation that depends on the seed."""
    f, u = draws(2, n, seed=seed)
    return 10 ** float(draws(1, seed=seed)) * f, 3 * (u + math.cos(seed) * f)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


@pytest.fixture(scope="module")
def synthetic() -> tuple[Tensor, Tensor, float]:
    """Return F of the parity gap, U of the summed loss, and the gap, on validation rows."""
    train, val, _ = bias.draw(0)
    theta = bias.fit(train.x, train.y)
    f, u = bias.influences(train, val, theta)
    return torch.from_numpy(f), torch.from_numpy(u), bias.parity(val, theta)


# --------------------------------------------------------------------------- the table itself


def test_the_table_is_the_one_the_numbers_are_about():
    raw = bias.raw_part(np.random.default_rng(1), 1500)
    train, val, test = bias.draw(0)
    assert raw.x[:3].sum() == pytest.approx(6.958932010, abs=1e-8)
    assert train.y.mean() == pytest.approx(0.5580, abs=5e-5)
    assert train.s.mean() == pytest.approx(0.66533, abs=5e-6)
    assert train.y[train.s == 1].mean() == pytest.approx(0.72345, abs=5e-6)
    assert train.y[train.s == 0].mean() == pytest.approx(0.22908, abs=5e-6)
    theta = bias.fit(train.x, train.y)
    assert np.linalg.norm(theta) == pytest.approx(1.774237, abs=5e-7)
    assert ((val.x @ theta > 0) == val.y).mean() == 0.77625
    assert bias.log_loss(val.x, val.y, theta).sum() == pytest.approx(375.99, abs=5e-3)
    assert bias.parity(val, theta) == pytest.approx(0.457674, abs=5e-7)
    assert bias.loss_gap(val, theta) == pytest.approx(0.7127, abs=5e-5)
    assert ((test.x @ theta > 0) == test.y).mean() == 0.77025
    assert bias.log_loss(test.x, test.y, theta).mean() == pytest.approx(0.4741, abs=5e-5)
    assert bias.parity(test, theta) == pytest.approx(0.4731, abs=5e-5)


def test_its_influences(synthetic):
    f, u, _ = synthetic
    assert float(f.norm()) == pytest.approx(0.0213430, abs=5e-8)
    assert float(u.norm()) == pytest.approx(4.62394, abs=5e-6)
    assert float(f @ u / f.norm() / u.norm()) == pytest.approx(-0.33156, abs=5e-6)
    assert int((f < 0).sum()) == 1109
    assert int(((f < 0) & (u < 0)).sum()) == 635


# --------------------------------------------------------------------------- without a box

FORMS = {"cap": -1.0, "reach": 1.0}
CASES = {"none", "metric", "utility", "both"}


def published_table(f: Tensor, u: Tensor, tau: float, c: float, form: str) -> dict[str, Tensor]:
    """Return the weights of every case whose two tests pass."""
    perp = f - (f @ u) / (u @ u) * u
    rows = {
        "none": (c * f, f @ u >= 0, c * f @ f - tau),
        "metric": (tau * f / (f @ f), f @ u >= 0, tau - c * f @ f),
        "utility": (c * perp, f @ u < 0, c * perp @ perp - tau),
        "both": (tau * perp / (perp @ perp), f @ u < 0, tau - c * perp @ perp),
    }
    return {k: e for k, (e, first, gap) in rows.items() if first and FORMS[form] * gap >= 0}


@pytest.mark.parametrize("form", FORMS)
def test_four_cases_are_the_solution_of_the_quadratic_problem(form):
    hit = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        f, u = pair(80, seed)
        c = 10 ** rng.uniform(-2, 2)
        tau = c * float(f @ f) * 10 ** rng.uniform(-1, 1)
        e, case, multipliers = analytic_weights(f, u, tau, 1 / (2 * c), form)
        valid = published_table(f, u, tau, c, form)
        assert set(valid) == {case}
        assert float((valid[case] - e).norm()) <= 1e-12 * float(e.norm())
        sign = FORMS[form]
        found = solve_weight_qp(torch.stack([sign * f, u]), column(sign * tau, 0), *NO_BOX, c * f)
        assert float((found.e - e).norm()) <= 1e-8 * float(e.norm())
        y = column(*multipliers)
        assert bool((y >= 0).all())
        rows = torch.stack([sign * f, u])
        assert float((e - c * f - y @ rows).norm()) <= 1e-12 * (
            float(e.norm()) + c * float(f.norm())
        )
        left = (rows @ e - column(sign * tau, 0)) / rows.norm(dim=1)
        assert bool((left >= -1e-12 * e.norm()).all())
        assert float((y * rows.norm(dim=1) * left).abs().max()) <= 1e-10 * float(e.norm()) ** 2
        hit.add(case)
    assert hit == CASES


def test_both_meets_two_equations_and_does_not_depend_on_lambda(synthetic):
    f, u, gap = synthetic
    e, case, _ = analytic_weights(f, u, gap)
    assert case == "both"
    assert abs(float(e @ u)) <= 1e-12 * float(e.norm() * u.norm())
    assert float(e @ f) == pytest.approx(gap, rel=1e-12)
    assert float(e.norm()) == pytest.approx(22.7295, abs=5e-5)
    assert float(e.min()) == pytest.approx(-1.7062, abs=5e-5)
    assert float(e.max()) == pytest.approx(3.0755, abs=5e-5)
    assert float((e < -1).double().mean()) == pytest.approx(0.020, abs=5e-4)
    for form in FORMS:
        weak, strong = (analytic_weights(f, u, gap, lam, form, "both")[0] for lam in (0.1, 1000))
        assert float((weak - strong).abs().max()) <= 1e-14
        assert float((weak - e).abs().max()) <= 1e-14


def test_a_case_taken_by_name_shows_that_it_is_wrong_by_its_multipliers():
    f, u = column(2, 2), column(-1, 0)
    assert analytic_weights(f, u, 4, case="metric")[0].tolist() == pytest.approx(
        [1, 1]
    )  # breaks U·e ≥ 0
    e, _, multipliers = analytic_weights(f, -u, 4, case="both")
    assert e.tolist() == [0, 2]
    assert multipliers == (1, -2)
    assert analytic_weights(f, u, 2, 0.25, case="none")[0].tolist() == [4, 4]
    assert analytic_weights(f, u, 2, 0.25, case="utility")[0].tolist() == [0, 4]


def test_no_neutral_direction_is_told_by_relative_length():
    f, other = draws(2, 50)
    for scale in (1e-6, 1.0, 1e6):
        with pytest.raises(InfeasibleError, match="neutral"):
            analytic_weights(scale * f, -f + 1e-9 * other, 1.0)
        e, case, _ = analytic_weights(scale * f, -f + 1e-6 * other, 1.0)
        assert case == "both"
        assert float(scale * f @ e) == pytest.approx(1.0, rel=1e-6)
        assert abs(float((-f + 1e-6 * other) @ e)) <= 1e-14 * float(f.norm() * e.norm())
    with pytest.raises(InfeasibleError, match="not 0"):
        analytic_weights(0 * f, other, 1.0)
    assert analytic_weights(0 * f, other, 1.0, form="cap")[1] == "none"
    assert analytic_weights(f, 0 * f, 1.0)[1] == "metric"


@pytest.mark.parametrize(("target", "lam"), [(-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, -1.0)])
def test_settings_of_the_closed_form_are_checked(target, lam):
    with pytest.raises(ConfigError, match="expected lam > 0"):
        analytic_weights(column(1, 2), column(0, 1), target, lam)


# --------------------------------------------------------------------------- with a box


def by_slsqp(rows: Tensor, r: Tensor, lower: float, upper: float) -> np.ndarray:
    a = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    b = (r / rows.norm(dim=1)).numpy()
    found = minimize(
        lambda e: (e @ e / 2, e),
        np.zeros(rows.shape[1]),
        jac=True,
        method="SLSQP",
        bounds=[(lower, upper)] * rows.shape[1],
        constraints=[{"type": "ineq", "fun": lambda e: a @ e - b, "jac": lambda e: a}],
        options={"ftol": 1e-20, "maxiter": 200},
    )
    return found.x


@pytest.mark.parametrize("upper", [0.0, 1.0, 3.0])
def test_against_slsqp(upper):
    for seed in range(100):
        f, u = pair(60, seed)
        share = np.random.default_rng(seed).uniform(0.02, 0.98)
        r = column(share * max_linear_under_box(f, u, 0.0, -1.0, upper)[0], 0)
        found = solve_weight_qp(torch.stack([f, u]), r, -1.0, upper)
        expected = by_slsqp(torch.stack([f, u]), r, -1.0, upper)
        assert np.linalg.norm(found.e.numpy() - expected) <= 1e-9 * np.linalg.norm(expected)


def assert_optimal(found, a: Tensor, r: Tensor, lo: Tensor, hi: Tensor, q: Tensor) -> None:
    """Hold a solution to all conditions of Karush, Kuhn and Tucker."""
    size, lengths = float(found.e.norm()) + 1e-9, a.norm(dim=1)
    expected = torch.clamp(q + found.dual @ a, lo, hi)
    assert bool((found.dual >= 0).all())
    assert float((found.e - expected).abs().max()) <= 1e-11 * (1 + float((found.dual @ a).norm()))
    left = (a @ found.e - r) / lengths
    assert bool((left >= -1e-10 * size).all())
    active = found.dual * lengths > 1e-9 * size
    assert bool((left[active].abs() <= 1e-10 * size).all())
    assert found.residual <= 1e-10 * size


@pytest.mark.parametrize("seed", range(40))
def test_many_rows_infinite_bounds_and_a_linear_term(seed):
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(20, 80)), int(rng.integers(1, 9))
    a = draws(m, n, seed=seed) * torch.tensor(10 ** rng.uniform(-4, 4, m))[:, None]
    lower, upper = ((-1, 0), (-1, 3), NO_BOX, (-1, math.inf))[seed % 4]
    lo, hi = (
        torch.full((n,), float(lower), dtype=DOUBLE),
        torch.full((n,), float(upper), dtype=DOUBLE),
    )
    fixed = torch.from_numpy(rng.random(n) < 0.2 * (seed % 3))
    lo[fixed] = hi[fixed] = -1.0
    q = draws(n, seed=seed + 100) * (seed % 5)
    inside = torch.clamp(draws(n, seed=seed + 200), lo, hi)
    r = a @ inside - torch.from_numpy(rng.random(m)) * (a @ inside).abs()
    found = solve_weight_qp(a, r, lo, hi, q)
    assert_optimal(found, a, r, lo, hi, q)
    assert bool((found.e[fixed] == -1).all())


@pytest.mark.parametrize(
    ("t", "norm", "lowest", "highest"),
    [(0.25, 5.68237, 0, 0), (0.5, 11.41776, 0, 19), (0.75, 17.86031, None, None),
     (1.0, 27.33771, 286, 247)],
)  # fmt: skip
def test_known_weights(synthetic, t, norm, lowest, highest):
    f, u, gap = synthetic
    found = solve_weight_qp(torch.stack([f, u]), column(t * gap, 0), -1.0, 1.0)
    assert float(found.e.norm()) == pytest.approx(norm, abs=5e-6)
    assert float(f @ found.e) == pytest.approx(t * 0.457674260742, abs=1e-10)
    assert abs(float(u @ found.e)) <= 1e-10
    assert found.iterations <= 10
    if lowest is not None:
        assert (int((found.e == -1).sum()), int((found.e == 1).sum())) == (lowest, highest)


def test_weights_that_start_at_their_bound(synthetic):
    f, u, _ = synthetic
    rows, r = torch.stack([f, u]), column(0.2, 0)
    found = solve_weight_qp(rows, r, -1.0, 0.0)
    assert found.iterations <= 8
    assert_optimal(found, rows, r, *(column(x).expand(1500) for x in (-1, 0)), 0 * f)


def test_a_box_that_does_not_bind_changes_nothing(synthetic):
    f, u, gap = synthetic
    e, _, _ = analytic_weights(f, u, gap)
    for box in (NO_BOX, (-1.71, 3.08)):
        found = solve_weight_qp(torch.stack([f, u]), column(gap, 0), *box)
        assert float((found.e - e).norm()) <= 1e-12 * float(e.norm())


@pytest.mark.parametrize("c", [1e-3, 0.5, 1e3])
def test_units_do_not_matter(synthetic, c):
    f, u, gap = synthetic
    rows = torch.stack([f, u])
    expected = solve_weight_qp(rows, column(gap, 0), -1.0, 1.0).e
    for scale, tau in ((column(c, 1), c * gap), (column(1, c), gap), (column(c, 1 / c), c * gap)):
        found = solve_weight_qp(scale[:, None] * rows, column(tau, 0), -1.0, 1.0)
        assert float((found.e - expected).abs().max()) <= 1e-12
        free, _, _ = analytic_weights(scale[0] * f, scale[1] * u, tau)
        assert float((free - analytic_weights(f, u, gap)[0]).abs().max()) <= 1e-12
        best, _ = max_linear_under_box(scale[0] * f, scale[1] * u, 0.0, -1.0, 1.0)
        assert best == pytest.approx(float(scale[0]) * 0.506083114668, rel=1e-10)


def test_order_and_sign_of_what_is_given(synthetic):
    f, u, gap = synthetic
    order = torch.randperm(len(f), generator=torch.Generator().manual_seed(3))
    e = solve_weight_qp(torch.stack([f, u]), column(gap, 0), -1.0, 1.0).e
    moved = solve_weight_qp(torch.stack([f, u])[:, order], column(gap, 0), -1.0, 1.0).e
    assert float((moved - e[order]).abs().max()) <= 1e-12
    alone = solve_weight_qp(f[None], column(gap), -1.0, 1.0).e
    mirrored = solve_weight_qp(-f[None], column(gap), -1.0, 1.0).e
    assert torch.equal(mirrored, -alone)


def test_after_steps_that_get_nowhere_another_solver_takes_over(synthetic, monkeypatch):
    f, u, gap = synthetic
    rows, r = torch.stack([f, u]), column(gap, 0)
    expected = solve_weight_qp(rows, r, -1.0, 1.0)
    monkeypatch.setattr(_box_qp, "STEPS", 1)  # seven are needed
    found = solve_weight_qp(rows, r, -1.0, 1.0)
    assert found.iterations <= 2
    assert float((found.e - expected.e).abs().max()) <= 1e-9
    monkeypatch.setattr(_box_qp, "_quasi_newton", lambda problem, point: point)
    with pytest.raises(NumericalError, match="expected a residual"):
        solve_weight_qp(rows, r, -1.0, 1.0)


def test_multipliers_that_run_away_hide_nothing():
    problem, _ = _box_qp._problem(-torch.ones(1, 4), column(4.0), -1.0, math.inf, None)
    assert problem.at(column(0.0)).residual == 2.0
    short, _ = _box_qp._problem(-torch.ones(1, 4), column(5.0), -1.0, math.inf, None)
    point = short.at(column(1e20))
    assert point.residual == 0.5
    assert short.lost(point)
    assert not short.solved(point)


def test_a_linear_term_far_outside_the_box():
    a, q = draws(2, 200), 1e4 * draws(200, seed=1)
    r = column(0.6 * max_linear_under_box(a[0], a[1], 0.0, -1.0, 1.0)[0], 0)
    found = solve_weight_qp(a, r, -1.0, 1.0, q)
    assert_optimal(found, a, r, *(column(x).expand(200) for x in (-1, 1)), q)


def test_fixed_weights_stay_and_the_others_make_up_for_them(synthetic):
    f, u, gap = synthetic
    fixed = torch.zeros(len(f), dtype=torch.bool)
    fixed[torch.argsort(f)[-40:]] = True  # dropping these widens the gap
    lo, hi = torch.full_like(f, -1.0), torch.ones_like(f)
    hi[fixed] = -1.0
    found = solve_weight_qp(torch.stack([f, u]), column(0.25 * gap, 0), lo, hi)
    assert bool((found.e[fixed] == -1).all())
    assert float(f @ found.e) == pytest.approx(0.25 * gap, abs=1e-10)
    assert float(u @ found.e) >= -1e-10


def test_rows_that_ask_for_nothing_cost_nothing():
    q = column(2.0, -3.0, 0.25)
    for rows, r in (
        (torch.zeros(0, 3), column()),
        (torch.zeros(1, 3), column(-1)),
        (torch.ones(1, 3), column(-9)),
    ):
        found = solve_weight_qp(rows, r, -1.0, 1.0, q)
        assert found.e.tolist() == [1, -1, 0.25]
        assert (found.dual.tolist(), found.iterations) == ([0.0] * len(r), 0)


def test_float32_rows_are_widened():
    f, u = (v.float() for v in pair(40, 1))
    found = solve_weight_qp(torch.stack([f, u]), torch.tensor([1.0, 0.0]), -1.0, 1.0)
    assert found.e.dtype == DOUBLE
    assert float(f.double() @ found.e) == pytest.approx(1.0, abs=1e-12)


# --------------------------------------------------------------------------- what cannot be met


@pytest.mark.parametrize("beyond", [1 + 1e-6, 1.01, 100.0])
@pytest.mark.parametrize("box", BOXES)
def test_more_than_the_box_holds_is_infeasible(synthetic, beyond, box, monkeypatch):
    monkeypatch.delattr(_box_qp, "feasibility_gap")  # slow, and not needed in a finite box
    f, u, _ = synthetic
    best, _ = max_linear_under_box(f, u, 0.0, *box)
    with pytest.raises(InfeasibleError, match="no weights in the box meet"):
        solve_weight_qp(torch.stack([f, u]), column(beyond * best, 0), *box)


@pytest.mark.parametrize("share", [0.999, 1 - 1e-6])
def test_almost_all_that_the_box_holds_is_feasible(synthetic, share):
    f, u, _ = synthetic
    best, _ = max_linear_under_box(f, u, 0.0, -1.0, 1.0)
    found = solve_weight_qp(torch.stack([f, u]), column(share * best, 0), -1.0, 1.0)
    assert float(f @ found.e) == pytest.approx(share * best, rel=1e-10)


def test_rows_that_contradict_each_other():
    f = draws(30)
    rows, r = torch.stack([f, -f]), column(2, -1)
    for box in (*BOXES, (-1.0, math.inf), NO_BOX):
        with pytest.raises(InfeasibleError):
            solve_weight_qp(rows, r, *box)
    with pytest.raises(InfeasibleError, match="row of zeros"):
        solve_weight_qp(0 * rows, r, -1.0, 1.0)
    found = solve_weight_qp(rows, column(1, -2), *NO_BOX)  # 1 ≤ F·e ≤ 2
    assert float((found.e - f / (f @ f)).abs().max()) <= 1e-14


@pytest.mark.parametrize("upper", [1.0, math.inf])
def test_random_infeasible_problems_never_return(upper):
    told = 0
    for seed in range(60):
        a = draws(7, 12, seed=seed) + (0.7 if upper > 1 else 0)
        r = 1.5 * draws(7, seed=seed + 500) * a.norm(dim=1)
        a[seed % 7 :] *= -1 if upper > 1 else 1
        lo, hi = torch.full((12,), -1.0, dtype=DOUBLE), torch.full((12,), upper, dtype=DOUBLE)
        best = linprog(
            np.r_[np.zeros(12), -1.0],
            A_ub=np.c_[-a.numpy(), np.ones(7)],
            b_ub=-r.numpy(),
            bounds=[(-1, upper)] * 12 + [(None, 1)],
        ).x[-1]
        assert (feasibility_gap(a, r, lo, hi) >= 0) == (best >= 0)
        if best >= 0:
            assert_optimal(solve_weight_qp(a, r, lo, hi), a, r, lo, hi, torch.zeros(12))
            continue
        told += 1
        with pytest.raises(InfeasibleError):
            solve_weight_qp(a, r, lo, hi)
    assert 10 <= told <= 50


def test_what_is_given_is_checked():
    f, bad = draws(2, 8)
    bad[[1, 5]] = math.nan
    with pytest.raises(NumericalError, match=r"row 1.*\[1, 5\]"):
        solve_weight_qp(torch.stack([f, bad]), column(1, 0), -1.0, 1.0)
    with pytest.raises(NumericalError, match="targets"):
        solve_weight_qp(f[None], column(math.inf), -1.0, 1.0)
    with pytest.raises(NumericalError, match="utility"):
        max_linear_under_box(f, bad, 0.0, -1.0, 1.0)
    with pytest.raises(DataError, match="targets"):
        solve_weight_qp(f[None], column(1, 0), -1.0, 1.0)
    with pytest.raises(DataError, match="upper"):
        solve_weight_qp(f[None], column(1), -1.0, torch.ones(3))
    with pytest.raises(ConfigError, match=r"lower <= upper.*\[0, 1, 2, 3, 4\]"):
        solve_weight_qp(f[None], column(1), 1.0, -1.0)
    with pytest.raises(ConfigError, match="finite"):
        max_linear_under_box(f, None, 0.0, -1.0, math.inf)


# --------------------------------------------------------------------------- how far it goes


@pytest.mark.parametrize(
    ("box", "free", "neutral"),
    [(BOXES[0], 0.280541, 0.254579), (BOXES[1], 0.559140, 0.506083),
     (BOXES[2], 1.116337, 1.009085)],
)  # fmt: skip
def test_known_attainable_improvement(synthetic, box, free, neutral):
    f, u, gap = synthetic
    assert max_linear_under_box(f, None, 0.0, *box)[0] == pytest.approx(free, abs=5e-7)
    best, e = max_linear_under_box(f, u, 0.0, *box)
    assert best == pytest.approx(neutral, abs=5e-7)
    assert best == pytest.approx(float(f @ e), rel=1e-14)
    assert abs(float(u @ e)) <= 1e-12 * float(u.abs().sum())
    assert attainable_fraction(f[None], column(gap), u, 0.0, *box) == best / gap


def by_highs(f: Tensor, u: Tensor, slack: float, lo: Tensor, hi: Tensor) -> float | None:
    found = linprog(
        -f.numpy(), A_ub=-u.numpy()[None], b_ub=[slack], bounds=np.c_[lo.numpy(), hi.numpy()]
    )
    return -found.fun if found.status == 0 else None


def test_one_goal_against_highs():
    infeasible = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        f, u = draws(2, 50, seed=seed)
        u = u + math.cos(seed) * f
        f[rng.random(50) < 0.1], u[rng.random(50) < 0.1] = 0.0, 0.0
        lo = torch.from_numpy(rng.uniform(-1, 0.2, 50))
        hi = lo + torch.from_numpy(rng.random(50) * (rng.random(50) < 0.9))
        slack = float(rng.uniform(-12, 6))
        expected = by_highs(f, u, slack, lo, hi)
        if expected is None:
            infeasible += 1
            with pytest.raises(InfeasibleError, match="at most"):
                max_linear_under_box(f, u, slack, lo, hi)
            continue
        best, e = max_linear_under_box(f, u, slack, lo, hi)
        assert best == pytest.approx(expected, abs=1e-7)
        assert bool(((e >= lo) & (e <= hi)).all())
        assert float(u @ e) >= -slack - 1e-12
        assert int(((e > lo) & (e < hi) & (f != 0)).sum()) <= 1
    assert 5 <= infeasible <= 60


def test_weights_that_do_not_matter_stay_at_rest():
    f, u = column(1, 0, 0), column(1, 0, 1)
    assert max_linear_under_box(f, u, 0.0, -1.0, 1.0)[1].tolist() == [1, 0, 0]
    assert max_linear_under_box(f, u, -1.5, -1.0, 1.0)[1].tolist() == [1, 0, 0.5]


@pytest.fixture(params=[10**9, 0], ids=["highs", "vertices"])
def both_ways(request, monkeypatch):
    monkeypatch.setattr(_box_lp, "LARGE", request.param)


@pytest.mark.usefixtures("both_ways")
def test_several_goals_against_highs_and_what_the_fraction_means():
    for seed in range(20):
        gains, u = draws(3, 40, seed=seed), draws(40, seed=seed + 50)
        tau = column(1.0, 5.0, 0.2) * 10 ** float(draws(1, seed=seed))
        phi = attainable_fraction(gains, tau, u, 0.1, -1.0, 1.0)
        found = linprog(
            np.r_[np.zeros(40), -1.0],
            A_ub=np.c_[-np.r_[gains.numpy(), u.numpy()[None]], np.r_[tau.numpy(), 0.0]],
            b_ub=[0, 0, 0, 0.1],
            bounds=[(-1, 1)] * 40 + [(None, None)],
        )
        assert phi == pytest.approx(-found.fun, rel=1e-7)
        rows, r = torch.cat([gains, u[None]]), torch.cat([phi * tau, column(-0.1)])
        solve_weight_qp(rows, 0.999 * r, -1.0, 1.0)
        with pytest.raises(InfeasibleError):
            solve_weight_qp(rows, torch.cat([1.001 * phi * tau, column(-0.1)]), -1.0, 1.0)


@pytest.mark.usefixtures("both_ways")
def test_the_fraction_of_goals_that_are_met_already():
    gains, u = draws(2, 40), draws(40, seed=9)
    assert attainable_fraction(gains, column(-1, 0), u, 0.0, -1.0, 1.0) == math.inf
    alone = attainable_fraction(gains[:1], column(1), u, 0.0, -1.0, 1.0)
    both = attainable_fraction(gains, column(1, -100), u, 0.0, -1.0, 1.0)
    assert both == pytest.approx(alone, rel=1e-9)  # the second may give way
    same = attainable_fraction(gains[[0, 0]], column(1, 1), u, 0.0, -1.0, 1.0)
    assert same == pytest.approx(alone, rel=1e-9)
    assert attainable_fraction(0 * gains, column(1, 1), u, 0.0, -1.0, 1.0) == 0
    with pytest.raises(InfeasibleError):
        attainable_fraction(gains, column(1, 1), u, -1e3, -1.0, 1.0)


@pytest.mark.usefixtures("both_ways")
def test_a_fraction_below_zero_where_fixed_weights_have_done_harm():
    gains, lo, hi = (
        draws(2, 40),
        torch.full((40,), -0.1, dtype=DOUBLE),
        torch.zeros(40, dtype=DOUBLE),
    )
    lo[:20] = hi[:20] = -1.0
    gains[:, :20] = gains[:, :20].abs()
    found = linprog(
        np.r_[np.zeros(40), -1.0],
        A_ub=np.c_[-gains.numpy(), np.array([1.0, 2.0])],
        b_ub=[0, 0],
        bounds=[*zip(lo.tolist(), hi.tolist(), strict=True), (None, None)],
    )
    phi = attainable_fraction(gains, column(1, 2), None, 0.0, lo, hi)
    assert phi == pytest.approx(-found.fun, rel=1e-7)
    assert phi < 0
    with pytest.raises(InfeasibleError, match="whatever"):
        attainable_fraction(gains, column(1, 0), None, 0.0, lo, hi)
