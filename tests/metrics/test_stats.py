"""Intervals, ranks, tiers and tests against numbers worked out elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from unsc_plugin.metrics import _stats as stats


def test_t_interval_of_three_values():
    interval = stats.t_interval([0.89, 0.90, 0.91])
    assert interval.estimate == pytest.approx(0.90)
    assert interval.half == pytest.approx(0.02484, abs=1e-5)


def test_one_value_has_no_interval():
    assert stats.t_interval([0.5]) == (0.5, None, None)
    assert stats.jackknife_interval(0.5, [0.5]).half is None
    with pytest.raises(ValueError, match="at least one value"):
        stats.t_interval([])


def test_jackknife_of_a_mean_is_the_t_interval():
    values = np.random.default_rng(0).normal(size=7)
    deleted = (values.sum() - values) / 6
    ours = stats.jackknife_interval(values.mean(), deleted)
    assert ours == pytest.approx(stats.t_interval(values), abs=1e-12)


def test_t_interval_covers_as_often_as_it_says():
    samples = np.random.default_rng(1).normal(size=(4000, 5))
    found = [stats.t_interval(row) for row in samples]
    assert np.mean([i.low <= 0 <= i.high for i in found]) == pytest.approx(0.95, abs=0.015)


def test_percentile_limits():
    interval = stats.percentile_interval(0.5, np.linspace(0, 1, 1001))
    assert interval == pytest.approx((0.5, 0.025, 0.975))


def weighted_mean(table):
    """Statistic of (n, n_d, E) data that is linear in both weightings."""
    return lambda seeds, draws: np.einsum("bn,nde,bd->be", seeds, table, draws)


def test_bootstrap_has_the_spread_of_the_mean_over_seeds():
    table = np.random.default_rng(2).normal(size=(20, 1, 3))
    replicates = stats.hierarchical_bootstrap([weighted_mean(table)], [20], [1], seed=4)
    assert replicates.shape == (2000, 3)
    expected = table[:, 0].std(axis=0, ddof=0) / np.sqrt(20)
    assert replicates.std(axis=0) == pytest.approx(expected, rel=0.1)


def test_bootstrap_resamples_scenarios_from_five_on_and_draws_from_three_on():
    def constant(value):
        return lambda seeds, draws: np.full((len(seeds), 1), float(value))

    four = stats.hierarchical_bootstrap([constant(i) for i in range(4)], [5] * 4, [2] * 4)
    assert np.ptp(four) == 0
    five = stats.hierarchical_bootstrap([constant(i) for i in range(5)], [5] * 5, [2] * 5)
    assert five.std() == pytest.approx(np.std(range(5)) / np.sqrt(5), rel=0.1)
    by_draw = np.array([[[0.0], [1.0]]])
    assert np.ptp(stats.hierarchical_bootstrap([weighted_mean(by_draw)], [1], [2])) == 0
    by_draw = np.array([[[0.0], [1.0], [2.0]]])
    assert np.ptp(stats.hierarchical_bootstrap([weighted_mean(by_draw)], [1], [3])) > 0


def test_bootstrap_is_repeatable_and_the_same_for_all_entries():
    column = np.random.default_rng(5).normal(size=(6, 2, 1))
    table = np.concatenate([column, column], axis=2)
    first = stats.hierarchical_bootstrap([weighted_mean(table)], [6], [2], seed=9)
    again = stats.hierarchical_bootstrap([weighted_mean(table)], [6], [2], seed=9)
    other = stats.hierarchical_bootstrap([weighted_mean(table)], [6], [2], seed=10)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(first[:, 0], first[:, 1])
    with pytest.raises(ValueError, match="at least one scenario"):
        stats.hierarchical_bootstrap([], [], [])


def test_rank_summaries():
    scores = [[0.9, 0.5, 0.1]] * 60 + [[0.5, 0.9, 0.1]] * 40
    first, second, third = stats.rank_summaries(scores)
    assert first == pytest.approx((1, 1, 2, 0.6))
    assert second == pytest.approx((2, 1, 2, 0.4))
    assert third == pytest.approx((3, 3, 3, 0))


def test_a_tie_for_the_first_place_is_shared():
    tied = stats.rank_summaries([[0.5, 0.5 + 1e-15]])
    assert [r.median for r in tied] == [1.5, 1.5]
    assert [r.p_best for r in tied] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(1, 2), (1, 3), (3, 4), (4, 5)], [1, 1, 2, 2]),
        ([(1, 2), (2, 4), (3, 5), (5, 5)], [1, 1, 2, 2]),  # no chaining through the second
        ([(1, 1)], [1]),
        ([], []),
    ],
)
def test_tiers(intervals, expected):
    assert stats.tiers(intervals) == expected


def test_equivalence_needs_evidence_not_its_absence():
    assert stats.equivalent([0.001, -0.001, 0.0, 0.001, -0.001], 0.01)
    assert not stats.equivalent([0.05, -0.05, 0.0, 0.04, -0.04], 0.01)
    assert not stats.equivalent([0.02, 0.021, 0.02, 0.019, 0.02], 0.01)
    assert not stats.equivalent([0.0], 0.01)


def test_equivalence_is_two_one_sided_t_tests():
    values = np.random.default_rng(3).normal(0.003, 0.004, size=6)
    for margin in (0.004, 0.006, 0.008):
        upper = scipy_stats.ttest_1samp(values, margin, alternative="less").pvalue
        lower = scipy_stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        assert stats.equivalent(values, margin) == (max(upper, lower) < 0.05)


def test_equivalence_margin():
    assert stats.equivalence_margin([0.9, 0.94], [0.92, 0.92]) == pytest.approx(0.04)
    assert stats.equivalence_margin([0.92, 0.92], [0.92, 0.92], least=0.01) == 0.01


def test_variance_components_of_a_simulated_layout():
    generator = np.random.default_rng(6)
    seed, draw = generator.normal(0, 3, (400, 1)), generator.normal(0, 2, (1, 400))
    found = stats.variance_components(seed + draw + generator.normal(0, 1, (400, 400)))
    assert found == pytest.approx((3, 2, 1), rel=0.1)
    with pytest.raises(ValueError, match="at least 2 seeds"):
        stats.variance_components([[1.0, 2.0]])


def test_friedman_of_three_identical_rankings():
    statistic, p = stats.friedman([[3, 2, 1], [30, 20, 10], [0.3, 0.2, 0.1]])
    assert statistic == pytest.approx(6.0)
    assert p == pytest.approx(0.0498, abs=1e-4)


def test_nemenyi_critical_difference():
    assert stats.nemenyi_cd(5, 10) == pytest.approx(1.9288, abs=1e-4)
    assert stats.nemenyi_cd(5, 10) / np.sqrt(5 * 6 / 60) == pytest.approx(2.7278, abs=1e-4)
    assert stats.nemenyi_cd(20, 10) == pytest.approx(9.4, abs=0.05)


def test_wilcoxon_is_adjusted_by_holm():
    table = np.random.default_rng(7).normal([0, 0, 2], size=(9, 3))
    raw = [
        scipy_stats.wilcoxon(table[:, i], table[:, j]).pvalue for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    order = np.argsort(raw)
    adjusted = np.minimum(np.maximum.accumulate(np.sort(raw) * [3, 2, 1]), 1)
    expected = np.empty(3)
    expected[order] = adjusted
    found = stats.wilcoxon_holm(table)
    assert found[np.triu_indices(3, 1)] == pytest.approx(expected)
    assert np.array_equal(found, found.T)


def test_wilcoxon_of_equal_entries_is_one_and_five_scenarios_are_refused():
    assert np.all(stats.wilcoxon_holm(np.ones((6, 2))) == 1)
    with pytest.raises(ValueError, match="five scenarios cannot"):
        stats.wilcoxon_holm(np.ones((5, 2)))
