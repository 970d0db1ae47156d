"""Distances to retraining of numbers that are already measured, and costs relative to it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays


def mean_of_pool(values: Iterable[float], *, metric: str = "pool") -> float:
    """Return the mean of a metric over the retrained models, in the metric's unit.

    The mean over a pool, not one retrained model: against a single one, two equal distributions
    already lie 1.13 standard deviations apart.
    """
    return float(_arrays.scores(list(values), f"{metric} of the retrained pool").mean())


def gap(value: float, pool_values: Iterable[float], *, metric: str = "gap") -> float:
    """Return |value − mean over the pool|, in the unit of the metric.

    Used for `gap_umia_auc`, `gap_relearn` and `gap_probe5`. Direction: down, to the value that
    retrained models have.

    Args:
        value: the subject's number.
        pool_values: the same number of every retrained model.
        metric: name of the metric in errors.
    """
    return abs(value - mean_of_pool(pool_values, metric=metric))


def delta(accuracy: float, pool_accuracies: Iterable[float], *, metric: str = "delta") -> float:
    """Return 100 · (accuracy − mean over the pool), in percentage points; the target is 0.

    Args:
        accuracy: a fraction in [0, 1].
        pool_accuracies: the same accuracy of every retrained model, fractions.
        metric: name of the metric in errors.

    >>> round(delta(0.93, [0.90, 0.92]), 9)
    2.0
    """
    return 100.0 * (accuracy - mean_of_pool(pool_accuracies, metric=metric))


def tow(forget: float, retain: float, test: float) -> float:
    """Return the tug of war (1 − |Δf|)(1 − |Δr|)(1 − |Δt|), in [0, 1]; direction up.

    Δ is a difference of accuracies to retraining as a *fraction*, not in percentage points; class
    kinds give the difference of retained test accuracy as Δt. Source: Zhao et al., "What makes
    unlearning hard and what to do about it", NeurIPS 2024.

    Args:
        forget: Δf in [−1, 1].
        retain: Δr in [−1, 1].
        test: Δt in [−1, 1].

    Raises:
        DataError: if a difference lies outside [−1, 1] (percentage points by mistake) or is NaN.

    >>> round(tow(0.1, -0.02, 0.05), 4)
    0.8379
    """
    product = 1.0
    for name, difference in (("forget", forget), ("retain", retain), ("test", test)):
        if not abs(difference) <= 1.0:
            raise DataError(
                f"tow on {name}: expected a difference of fractions in [−1, 1], got {difference}; "
                "divide percentage points by 100"
            )
        product *= 1.0 - abs(difference)
    return float(product)


def avg_gap(*deltas: float) -> float:
    """Return the mean of |Δ| over the given differences, in their unit (pp); direction down.

    The usual three are Δf, Δr and Δt of :func:`delta`. Source: Fan et al., "SalUn", ICLR 2024
    (there with the gap of a membership attack as a fourth).

    >>> round(avg_gap(2.39, 0.38, -0.33, 1.51), 4)
    1.1525
    """
    return float(np.abs(_arrays.scores(deltas, "avg_gap")).mean())


def cost_ratio(cost: float, retrain_cost: float) -> float:
    """Return cost / cost of retraining, without unit; direction down.

    For `time_ratio` both are seconds on the same device (preparation included), for `work_ratio`
    both are sample passes.

    Args:
        cost: of the method, ≥ 0.
        retrain_cost: of retraining, > 0.

    Raises:
        DataError: if the cost is negative or retraining costs nothing.

    >>> cost_ratio(30.0, 300.0)
    0.1
    """
    if not (cost >= 0 and 0 < retrain_cost < float("inf")):
        raise DataError(
            f"cost ratio: expected a cost ≥ 0 and a retraining cost > 0, got {cost} and "
            f"{retrain_cost}; measure retraining first"
        )
    return float(cost / retrain_cost)
