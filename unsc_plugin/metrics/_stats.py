"""Intervals, ranks, tiers and tests of a board: numpy and scipy in, numbers out.

Few training seeds are the normal case, so a scenario uses Student t (for S a jackknife with t), and
only the board as a whole is resampled. Every function is pure; the one that draws takes a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

Array = NDArray[np.float64]
Statistic = Callable[[Array, Array], Array]

MIN_SCENARIOS_RESAMPLED = 5
MIN_DRAWS_RESAMPLED = 3


class Interval(NamedTuple):
    """An estimate with its limits; without limits when one sample cannot give any."""

    estimate: float
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half the width, or None without limits."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


class RankSummary(NamedTuple):
    """Where one entry lands over the bootstrap replicates; rank 1 is best."""

    median: float
    low: float
    high: float
    p_best: float


class VarianceComponents(NamedTuple):
    """Standard deviations of y = mean + train seed + draw + residual."""

    seed: float
    draw: float
    residual: float


def t_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student interval of a mean: mean ± t_{1-α/2, n-1} · s / √n, s with n − 1.

    Args:
        values: (n,) one number per train seed.
        confidence: 1 − α.

    Returns:
        The interval; n = 1 gives the value without limits.

    Raises:
        ValueError: for an empty sample.

    >>> t_interval([0.89, 0.90, 0.91]).half
    0.02484...
    """
    sample = np.asarray(values, dtype=np.float64).ravel()
    if sample.size == 0:
        raise ValueError("expected at least one value for an interval, got none; pass one per seed")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean)
    error = float(sample.std(ddof=1)) / math.sqrt(sample.size)
    half = _t_quantile(confidence, sample.size) * error
    return Interval(mean, mean - half, mean + half)


def jackknife_interval(
    estimate: float, leave_one_out: ArrayLike, confidence: float = 0.95
) -> Interval:
    """Delete-one interval of a non-linear statistic; the point estimate stays as it is.

    Pseudo-values are p_i = n·θ − (n − 1)·θ₍₋ᵢ₎; the half-width is t_{n-1} · sd(p) / √n.

    Args:
        estimate: θ on all seeds.
        leave_one_out: (n,) θ without seed i.
        confidence: 1 − α.

    >>> jackknife_interval(0.90, [0.905, 0.900, 0.895]).half  # the jackknife of a mean
    0.02484...
    """
    deleted = np.asarray(leave_one_out, dtype=np.float64).ravel()
    if deleted.size < 2:
        return Interval(float(estimate))
    pseudo = deleted.size * float(estimate) - (deleted.size - 1) * deleted
    half = t_interval(pseudo, confidence).half
    assert half is not None
    return Interval(float(estimate), float(estimate) - half, float(estimate) + half)


def percentile_interval(
    estimate: float, replicates: ArrayLike, confidence: float = 0.95
) -> Interval:
    """Percentile limits of bootstrap replicates (R,) around a full-sample estimate."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.asarray(replicates, dtype=np.float64), [tail, 100 - tail])
    return Interval(float(estimate), float(low), float(high))


def hierarchical_bootstrap(
    statistics: Sequence[Statistic],
    seeds: Sequence[int],
    draws: Sequence[int],
    *,
    replicates: int = 2000,
    seed: int = 0,
) -> Array:
    """Resample scenarios, then train seeds, then draws; the same resamples for all entries.

    Scenarios are resampled from five on and draws from three on; below that they are kept as they
    are. A scenario that is picked twice in one replicate gets two independent resamples of seeds.

    Args:
        statistics: one per scenario; (B, n) seed weights and (B, n_d) draw weights, rows summing
            to 1, give (B, E) scores of E entries.
        seeds: n of every scenario.
        draws: n_d of every scenario.
        replicates: R.
        seed: of the generator.

    Returns:
        (R, E) mean over scenarios.

    Raises:
        ValueError: without scenarios or replicates.
    """
    count = len(statistics)
    if count == 0 or replicates < 1:
        raise ValueError(
            f"expected at least one scenario and one replicate, got {count} and {replicates}; "
            "skip the bootstrap when no scenario is admitted"
        )
    generator = np.random.default_rng(seed)
    chosen = np.tile(np.arange(count), (replicates, 1))
    if count >= MIN_SCENARIOS_RESAMPLED:
        chosen = generator.integers(0, count, size=(replicates, count))
    parts: list[tuple[NDArray[np.intp], Array]] = []
    for scenario, statistic in enumerate(statistics):
        rows = np.nonzero(chosen == scenario)[0]
        seed_weights = _bootstrap_weights(generator, rows.size, seeds[scenario])
        draw_weights = np.full((rows.size, draws[scenario]), 1 / draws[scenario])
        if draws[scenario] >= MIN_DRAWS_RESAMPLED:
            draw_weights = _bootstrap_weights(generator, rows.size, draws[scenario])
        parts.append((rows, statistic(seed_weights, draw_weights)))
    total = np.zeros((replicates, parts[0][1].shape[1]))
    for rows, scores in parts:
        np.add.at(total, rows, scores)
    return total / count


def rank_replicates(scores: ArrayLike) -> Array:
    """Ranks (R, E) of scores (R, E), the highest score first, ties averaged.

    >>> rank_replicates([[0.5, 0.9, 0.5]]).tolist()
    [[2.5, 1.0, 2.5]]
    """
    # Twelve decimals: rounding noise of another machine must not break a tie.
    ranks: Array = scipy_stats.rankdata(-np.round(np.asarray(scores), 12), axis=-1)
    return ranks


def rank_summaries(scores: ArrayLike, confidence: float = 0.95) -> list[RankSummary]:
    """Median rank, rank interval and P(best) of every entry from bootstrap scores (R, E).

    A replicate won by k tied entries counts 1/k for each. The limits are ranks that occurred.
    """
    ranks = rank_replicates(scores)
    tail = 50 * (1 - confidence)
    low = np.percentile(ranks, tail, axis=0, method="lower")
    high = np.percentile(ranks, 100 - tail, axis=0, method="higher")
    winners = ranks == ranks.min(axis=1, keepdims=True)
    best = (winners / winners.sum(axis=1, keepdims=True)).mean(axis=0)
    medians = np.median(ranks, axis=0)
    return [
        RankSummary(float(m), float(lo), float(hi), float(p))
        for m, lo, hi, p in zip(medians, low, high, best, strict=True)
    ]


def tiers(rank_intervals: Sequence[tuple[float, float]]) -> list[int]:
    """Tier of every entry, given closed rank intervals in the order of falling score.

    An entry joins the tier while its interval overlaps the *leader's*; there is no chaining through
    entries in the middle.

    >>> tiers([(1, 2), (1, 3), (3, 4), (4, 5)])
    [1, 1, 2, 2]
    """
    result: list[int] = []
    leader = (0.0, 0.0)
    for low, high in rank_intervals:
        if not result:
            result.append(1)
            leader = (low, high)
        elif low <= leader[1] and leader[0] <= high:
            result.append(result[-1])
        else:
            result.append(result[-1] + 1)
            leader = (low, high)
    return result


def equivalence_margin(floor: ArrayLike, reference: ArrayLike, least: float = 0.0) -> float:
    """δ = 2 · root mean square of R_B about the mean of R_A, at least `least`."""
    spread = np.asarray(floor, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    return max(2 * float(np.sqrt(np.mean(spread**2))), least)


def equivalent(differences: ArrayLike, margin: float, alpha: float = 0.05) -> bool:
    """Two one-sided t tests: the (1 − 2α) interval of the mean difference lies inside ±margin.

    A difference that is merely not significant is not equivalence; one value never is.

    >>> equivalent([0.001, -0.002, 0.000, 0.001, -0.001], 0.01)
    True
    >>> equivalent([0.001, -0.020, 0.030, 0.010, -0.015], 0.01)
    False
    """
    interval = t_interval(differences, 1 - 2 * alpha)
    if interval.low is None or interval.high is None:
        return False
    return -margin < interval.low and interval.high < margin


def variance_components(values: ArrayLike) -> VarianceComponents:
    """Standard deviations of seed, draw and residual of a (n, n_d) table, by moments.

    Balanced two-way layout without replication: σ²_seed = (MS_seed − MS_res)/n_d and
    σ²_draw = (MS_draw − MS_res)/n; a negative estimate counts as 0.

    Raises:
        ValueError: unless both sides have at least two levels.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(
            f"expected at least 2 seeds and 2 draws, got shape {table.shape}; "
            "run more units before asking for variance components"
        )
    n, n_d = table.shape
    by_seed, by_draw, mean = table.mean(axis=1), table.mean(axis=0), table.mean()
    residual = table - by_seed[:, None] - by_draw[None, :] + mean
    noise = float((residual**2).sum()) / ((n - 1) * (n_d - 1))
    seed = (n_d * float(((by_seed - mean) ** 2).sum()) / (n - 1) - noise) / n_d
    draw = (n * float(((by_draw - mean) ** 2).sum()) / (n_d - 1) - noise) / n
    return VarianceComponents(*(float(np.sqrt(max(v, 0.0))) for v in (seed, draw, noise)))


def wilcoxon_holm(scores: ArrayLike) -> Array:
    """Pairwise signed-rank p-values over scenarios, Holm-adjusted: (K, E) scores to (E, E).

    The diagonal is 1. Fewer than six scenarios cannot reach 0.05 whatever the scores are.

    Raises:
        ValueError: for fewer than six scenarios.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 6:
        raise ValueError(
            f"expected scores (scenarios >= 6, entries), got shape {table.shape}; "
            "five scenarios cannot reach p = 0.05"
        )
    pairs = list(zip(*np.triu_indices(table.shape[1], k=1), strict=True))
    adjusted = _holm([_signed_rank_p(table[:, i] - table[:, j]) for i, j in pairs])
    result = np.ones((table.shape[1], table.shape[1]))
    for (i, j), p in zip(pairs, adjusted, strict=True):
        result[i, j] = result[j, i] = p
    return result


def friedman(scores: ArrayLike) -> tuple[float, float]:
    """Friedman statistic and p-value of scores (scenarios, entries).

    >>> [round(v, 4) for v in friedman([[3, 2, 1], [3, 2, 1], [3, 2, 1]])]
    [6.0, 0.0498]
    """
    statistic, p = scipy_stats.friedmanchisquare(*np.asarray(scores, dtype=np.float64).T)
    return float(statistic), float(p)


def nemenyi_cd(entries: int, scenarios: int, alpha: float = 0.05) -> float:
    """Critical difference of mean ranks, q_α · √(k(k + 1)/(6N)).

    q_α is the studentized range quantile for k groups and infinite degrees of freedom, over √2.

    >>> round(nemenyi_cd(5, 10), 4)
    1.9288
    """
    quantile = float(scipy_stats.studentized_range.ppf(1 - alpha, entries, np.inf)) / np.sqrt(2)
    return float(quantile * np.sqrt(entries * (entries + 1) / (6 * scenarios)))


def _t_quantile(confidence: float, n: int) -> float:
    return float(scipy_stats.t.ppf((1 + confidence) / 2, n - 1))


def _bootstrap_weights(generator: np.random.Generator, rows: int, count: int) -> Array:
    """Shares (rows, count) of each item when `count` items are drawn with replacement."""
    return generator.multinomial(count, np.full(count, 1 / count), size=rows) / count


def _signed_rank_p(differences: Array) -> float:
    if not np.any(differences):
        return 1.0
    return float(scipy_stats.wilcoxon(differences).pvalue)


def _holm(p_values: Sequence[float]) -> list[float]:
    """Step-down adjustment: the i-th smallest p times (m − i + 1), made monotone, at most 1."""
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for step, position in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - step) * p_values[position]))
        adjusted[position] = running
    return adjusted
