"""Entries at many strengths: the Pareto set, values at a matched metric, the point to deploy.

An entry that moves a metric further also loses more, so numbers of two entries are comparable at
an equal metric only, or over the whole front.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import entr

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays
from unsc_plugin.metrics._arrays import FloatArray


def pareto_set(points: Any) -> list[int]:
    """Return the positions of the points that no other point dominates, by rising first number.

    Both numbers are better when smaller: p dominates q if it is at most q in both and less in one.
    Of equal points the first is kept.

    Args:
        points: (m, 2): |metric| and loss; m may be 0.

    >>> pareto_set([(0.3, 0.4), (0.1, 0.6), (0.2, 0.7), (0.1, 0.6)])
    [1, 0]
    """
    array = _points(points)
    order = np.lexsort((np.arange(len(array)), array[:, 1], array[:, 0]))
    found, lowest = [], np.inf
    for place in order.tolist():
        if array[place, 1] < lowest:
            lowest = array[place, 1]
            found.append(place)
    return found


def hypervolume(points: Any, reference: tuple[float, float]) -> float:
    """Return the area that points dominate below `reference`, over the area r₁·r₂; in [0, 1].

    Direction: up. 0 where no point is better than the reference in both numbers, 1 for a point at
    the origin. Source: Zitzler and Thiele, IEEE Transactions on Evolutionary Computation 3 (1999).

    Args:
        points: (m, 2): |metric| and loss, both ≥ 0.
        reference: |metric| of the original model, and :func:`prior_nll`.

    Raises:
        DataError: a reference that is not positive, or a negative point.

    >>> hypervolume([(0.5, 0.5)], (1.0, 1.0))
    0.25
    """
    if not all(0 < end < np.inf for end in reference):
        raise DataError(
            f"hypervolume: expected a reference of two numbers > 0, got {reference}; without a gap "
            "in the original model there is nothing to win"
        )
    array = _points(points)
    if (array < 0).any():
        raise DataError("hypervolume: expected |metric| and loss ≥ 0, got a negative one")
    inside = array[(array < np.asarray(reference)).all(axis=1)]
    front = inside[pareto_set(inside)]
    right = np.append(front[1:, 0], reference[0])
    area = ((right - front[:, 0]) * (reference[1] - front[:, 1])).sum()
    return float(area / (reference[0] * reference[1]))


def prior_nll(labels: Any) -> float:
    """Return −Σ_k π_k log π_k, π = class shares: the loss of the best constant answer, in nats.

    Args:
        labels: (B,), integers ≥ 0.

    Raises:
        DataError: a negative label.

    >>> round(prior_nll([0, 1, 0, 1]), 6)
    0.693147
    """
    found = _arrays.integers(labels, "prior_nll")
    if found.min() < 0:
        raise DataError(f"prior_nll: expected labels ≥ 0, got {found.min()}")
    return float(entr(np.bincount(found) / len(found)).sum())


def matched(
    original: Sequence[float], curve: Sequence[Sequence[float]], level: float
) -> tuple[float, ...] | None:
    """Return an entry's values where its metric first reaches `level`·|metric of the original|.

    Rows are (metric, value, ...); the path leads from the original along the strengths in their
    order, linear in between, with the sign of the metric. So a strength that overshoots, to a gap
    of the other sign, has passed every smaller gap. None: the level is not reached.

    Args:
        original: the row of the original model, strength 0.
        curve: a row per strength, rising.
        level: share of the original's gap that is left, in [0, 1).

    Returns:
        The interpolated values, without the metric.

    Raises:
        DataError: rows of different lengths or not finite, an original without a gap, or a level
            outside [0, 1).

    >>> matched((0.4, 8.0), [(0.3, 7.5), (0.1, 6.5)], 0.5)
    (7.0,)
    """
    if not 0 <= level < 1:
        raise DataError(f"matched: expected a level in [0, 1), got {level}")
    if any(len(row) != len(original) for row in curve):
        lengths = sorted({len(original), *map(len, curve)})
        raise DataError(f"matched: expected rows of one length, got {lengths}")
    path = _arrays.finite(np.asarray([original, *curve], np.float64), "matched")
    if path[0, 0] == 0:
        raise DataError("matched: expected an original model with a gap, got 0; nothing to match")
    gap = path[:, 0] * np.sign(path[0, 0])
    target = level * gap[0]
    for before, after in itertools.pairwise(range(len(path))):
        if gap[after] <= target:
            share = (gap[before] - target) / (gap[before] - gap[after])
            values = path[before, 1:] + share * (path[after, 1:] - path[before, 1:])
            return tuple(float(value) for value in values)
    return None


def deployed(
    strengths: Sequence[float],
    metric: Sequence[float],
    loss: Sequence[float],
    original_loss: float,
    *,
    allowance: float = 1.05,
) -> float | None:
    """Return the strength one would deploy: the smallest |metric| at a loss that is still allowed.

    argmin_t |metric_t| among loss_t ≤ allowance·original_loss; of equal ones the weakest. None: no
    strength is allowed. Everything is measured on selection rows, never on test rows.

    Args:
        strengths: (m,).
        metric: (m,), signed or not.
        loss: (m,), ≥ 0.
        original_loss: of the original model on the same rows.
        allowance: the factor.

    Raises:
        DataError: lists of different lengths, or numbers that are not finite.

    >>> deployed([0.25, 0.5, 1.0], [0.3, -0.1, 0.0], [0.40, 0.41, 0.60], 0.40)
    0.5
    """
    if not len(strengths) == len(metric) == len(loss):
        raise DataError(
            f"deployed: expected a metric and a loss per strength, got {len(strengths)}, "
            f"{len(metric)} and {len(loss)}"
        )
    if not strengths:
        return None
    table = _arrays.finite(np.column_stack([strengths, np.abs(metric), loss]), "deployed")
    allowed = table[table[:, 2] <= allowance * original_loss]
    if not len(allowed):
        return None
    return float(allowed[np.lexsort((allowed[:, 0], allowed[:, 1]))[0], 0])


def _points(points: Any) -> FloatArray:
    array = np.asarray(points, np.float64)
    if array.size == 0:
        return np.empty((0, 2))
    if array.ndim != 2 or array.shape[1] != 2:
        raise DataError(f"pareto: expected points (m, 2), got shape {array.shape}")
    return _arrays.finite(array, "pareto")
