"""Fronts, areas, matched values and the deployed strength against drawings and grids by hand."""

import numpy as np
import pytest
from scipy.stats import entropy

from unsc_plugin.errors import DataError, DivergedError
from unsc_plugin.metrics.pareto import deployed, hypervolume, matched, pareto_set, prior_nll


def test_the_pareto_set_has_no_dominated_point():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 8, (60, 2)) / 8
    found = pareto_set(points)

    def dominated(q):
        return any((p <= q).all() and (p < q).any() for p in points)

    wanted = {tuple(q) for q in points if not dominated(q)}
    assert {tuple(points[at]) for at in found} == wanted
    assert len(found) == len(wanted)
    assert (np.diff(points[found, 0]) > 0).all()
    assert pareto_set([]) == []
    assert pareto_set([(1, 1), (1, 1), (1, 2)]) == [0]


def test_hypervolume_against_a_grid():
    rng = np.random.default_rng(1)
    for _ in range(5):
        points = rng.random((7, 2)) * [0.5, 0.9]
        reference = (0.4, 0.7)
        side = (np.arange(800) + 0.5) / 800
        a, b = np.meshgrid(side * reference[0], side * reference[1])
        covered = np.zeros_like(a, bool)
        for metric, loss in points:
            covered |= (a >= metric) & (b >= loss)
        assert hypervolume(points, reference) == pytest.approx(covered.mean(), abs=3e-3)


def test_hypervolume_by_hand():
    assert hypervolume([(0.0, 0.0)], (2.0, 5.0)) == 1.0
    assert hypervolume([(1.0, 4.0)], (2.0, 4.0)) == 0.0
    assert hypervolume([], (2.0, 4.0)) == 0.0
    # two steps: 1·(4−2) and 0.5·(4−1) of 8
    assert hypervolume([(0.5, 2.0), (1.5, 1.0)], (2.0, 4.0)) == (1.0 * 2 + 0.5 * 3) / 8
    assert hypervolume([(0.5, 2.0), (1.5, 1.0), (1.6, 1.5)], (2.0, 4.0)) == 3.5 / 8


@pytest.mark.parametrize(
    ("points", "reference", "error", "message"),
    [
        ([(0.1, 0.1)], (0.0, 1.0), DataError, "two numbers > 0"),
        ([(-0.1, 0.1)], (1.0, 1.0), DataError, "negative one"),
        ([(0.1, np.nan)], (1.0, 1.0), DivergedError, "NaN"),
        ([(0.1, 0.2, 0.3), (1, 2, 3)], (1.0, 1.0), DataError, r"points \(m, 2\)"),
    ],
)
def test_hypervolume_refuses(points, reference, error, message):
    with pytest.raises(error, match=message):
        hypervolume(points, reference)


def test_the_prior_is_the_best_constant_answer():
    labels = [0] * 7 + [2] * 3
    assert prior_nll(labels) == pytest.approx(entropy([0.7, 0.3]))
    constant = np.linspace(0.01, 0.99, 99)
    losses = -(0.7 * np.log(constant) + 0.3 * np.log(1 - constant))
    assert losses.min() == pytest.approx(prior_nll(labels), abs=1e-4)
    assert prior_nll([1, 1, 1]) == 0
    with pytest.raises(DataError, match="labels ≥ 0"):
        prior_nll([-1, 0])


CURVE = [(0.36, 0.79, 1.0), (0.20, 0.77, 2.0), (0.04, 0.70, 4.0)]


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0.75, (0.79 - 0.02 * 0.06 / 0.16, 1.375)),
        (0.5, (0.77, 2.0)),
        (0.25, (0.77 - 0.07 * 0.1 / 0.16, 3.25)),
        (0.95, (0.80 - 0.01 * 0.5, 0.5)),
        (0.05, None),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_values_where_a_share_of_the_gap_is_left(level, expected, sign):
    curve = [(sign * gap, *values) for gap, *values in CURVE]
    found = matched((sign * 0.4, 0.80, 0.0), curve, level)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_an_overshoot_has_passed_every_smaller_gap():
    assert matched((0.4, 0.0), [(-0.4, 8.0)], 0.25) == pytest.approx((3.0,))
    assert matched((0.4, 0.0), [(-0.4, 8.0)], 0.0) == pytest.approx((4.0,))


def test_the_first_crossing_counts():
    curve = [(0.1, 1.0), (0.39, 2.0), (0.0, 3.0)]
    assert matched((0.4, 0.0), curve, 0.5) == pytest.approx((2 / 3,))
    assert matched((0.4, 0.0), [(0.5, 1.0), (0.3, 2.0)], 0.5) is None
    assert matched((0.4, 0.0), [], 0.5) is None


@pytest.mark.parametrize(
    ("original", "curve", "level", "error", "message"),
    [
        ((0.4, 1.0), [(0.3,)], 0.5, DataError, r"one length, got \[1, 2\]"),
        ((0.0, 1.0), [(0.3, 1.0)], 0.5, DataError, "with a gap"),
        ((0.4, 1.0), [(0.3, 1.0)], 1.0, DataError, r"level in \[0, 1\)"),
        ((0.4, 1.0), [(0.3, np.inf)], 0.5, DivergedError, "finite"),
    ],
)
def test_matched_refuses(original, curve, level, error, message):
    with pytest.raises(error, match=message):
        matched(original, curve, level)


def test_the_deployed_strength():
    strengths, metric = [0.1, 0.25, 0.5, 0.75], [0.4, -0.2, 0.1, 0.0]
    assert deployed(strengths, metric, [0.4, 0.41, 0.42, 0.43], 0.4) == 0.5
    assert deployed(strengths, metric, [0.4, 0.41, 0.43, 0.43], 0.4) == 0.25
    assert deployed(strengths, metric, [0.4, 0.41, 0.43, 0.43], 0.4, allowance=1.1) == 0.75
    assert deployed(strengths, metric, [0.5] * 4, 0.4) is None
    assert deployed([0.5, 0.1], [0.1, -0.1], [0.4, 0.4], 0.4) == 0.1
    assert deployed([], [], [], 0.4) is None
    with pytest.raises(DataError, match="2, 1 and 1"):
        deployed([0.1, 0.2], [0.1], [0.4], 0.4)
    with pytest.raises(DivergedError):
        deployed([0.1], [np.nan], [0.4], 0.4)
