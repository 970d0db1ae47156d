"""Group fairness: how much a model's answers differ between groups, hard and soft, with intervals.

Groups are codes ≥ 0, 1 the privileged one by convention; rows of code −1 are in no group: they
count for accuracy and loss only. Hard numbers compare predicted labels and come from fairlearn; the
soft ones compare mean probabilities, are signed and move smoothly with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays
from unsc_plugin.metrics._arrays import FloatArray, IntArray
from unsc_plugin.metrics._group_bootstrap import bootstrap as bootstrap  # part of the public face
from unsc_plugin.metrics._group_bootstrap import bootstrap_values as bootstrap_values
from unsc_plugin.metrics._groups import NAMES as NAMES
from unsc_plugin.metrics._groups import groups_of, positive_of
from unsc_plugin.metrics._groups import missing as missing
from unsc_plugin.metrics.membership import cross_entropy


@dataclass(frozen=True)
class _Answers:
    """The rows that lie in a group, and what a model says of them."""

    groups: IntArray
    labels: IntArray
    positive: npt.NDArray[np.bool_]
    predicted: npt.NDArray[np.bool_]
    probability: FloatArray
    right: npt.NDArray[np.bool_]


def _answers(
    name: str, logits: Any, labels: Any, groups: Any, positive_class: int | None
) -> _Answers:
    """Return the grouped rows.

    Raises:
        DataError: the number `name` cannot be computed from them; says why.
    """
    z, y = _arrays.labelled(logits, labels, name)
    classes = z.shape[1]
    reason = missing(y, groups, num_classes=classes, positive_class=positive_class).get(name)
    if reason is not None:
        raise DataError(f"{name} cannot be computed: {reason}")
    g = groups_of(groups, len(y))
    kept, chosen, wanted = g >= 0, z.argmax(axis=1), positive_of(positive_class, classes) or 0
    return _Answers(
        groups=g[kept],
        labels=y[kept],
        positive=(y == wanted)[kept],
        predicted=(chosen == wanted)[kept],
        probability=_arrays.softmax(z)[kept, wanted],
        right=(chosen == y)[kept],
    )


def _by_fairlearn(function: str, rows: _Answers) -> float:
    from fairlearn import metrics

    compare = getattr(metrics, function)
    groups = rows.groups
    return float(
        compare(rows.positive.astype(int), rows.predicted.astype(int), sensitive_features=groups)
    )


def dp_diff(logits: Any, labels: Any, groups: Any, positive_class: int | None = None) -> float:
    """Return max_g P(ŷ=pos | g) − min_g P(ŷ=pos | g), demographic parity of decisions, in [0, 1].

    Direction: to 0. By fairlearn's `demographic_parity_difference`. Arguments as in :func:`block`;
    a DataError says why a number cannot be computed.

    >>> dp_diff([[0, 1], [1, 0], [0, 1], [0, 1]], [1, 0, 1, 0], [0, 0, 1, 1])
    0.5
    """
    rows = _answers("dp_diff", logits, labels, groups, positive_class)
    return _by_fairlearn("demographic_parity_difference", rows)


def dp_ratio(logits: Any, labels: Any, groups: Any, positive_class: int | None = None) -> float:
    """Return min_g P(ŷ=pos | g) / max_g P(ŷ=pos | g), in [0, 1]; 1 where nobody is selected.

    Direction: up. By fairlearn's `demographic_parity_ratio`. Arguments as in :func:`block`.

    >>> dp_ratio([[0, 1], [1, 0], [0, 1], [0, 1]], [1, 0, 1, 0], [0, 0, 1, 1])
    0.5
    """
    rows = _answers("dp_ratio", logits, labels, groups, positive_class)
    if not rows.predicted.any():
        return 1.0
    return _by_fairlearn("demographic_parity_ratio", rows)


def eop_diff(logits: Any, labels: Any, groups: Any, positive_class: int | None = None) -> float:
    """Return max_g P(ŷ=pos | y=pos, g) − min_g of the same: equality of opportunity, in [0, 1].

    Direction: to 0. By fairlearn's `true_positive_rate_difference`. Source: Hardt, Price and
    Srebro, NeurIPS 2016. Arguments as in :func:`block`.
    """
    rows = _answers("eop_diff", logits, labels, groups, positive_class)
    return _by_fairlearn("true_positive_rate_difference", rows)


def eo_diff(logits: Any, labels: Any, groups: Any, positive_class: int | None = None) -> float:
    """Return the larger of the gaps in true and in false positive rates: equalised odds, in [0, 1].

    Direction: to 0. By fairlearn's `equalized_odds_difference`, worst case. Arguments as in
    :func:`block`.
    """
    rows = _answers("eo_diff", logits, labels, groups, positive_class)
    return _by_fairlearn("equalized_odds_difference", rows)


def dp_soft(logits: Any, labels: Any, groups: Any, positive_class: int | None = None) -> float:
    """Return mean p₊ of group 1 minus mean p₊ of group 0, in [−1, 1]; p₊ by softmax.

    Direction: to 0; the sign says whom the model favours. With more than two groups it is
    max_g |mean p₊ of g − mean p₊ of all grouped rows|, without a sign. Arguments as in
    :func:`block`.

    >>> round(dp_soft([[0.0, 0.0], [0.0, np.log(3.0)]], [0, 1], [0, 1]), 12)
    0.25
    """
    rows = _answers("dp_soft", logits, labels, groups, positive_class)
    return _soft_gap(rows.probability, rows.groups)


def eop_soft(logits: Any, labels: Any, groups: Any, positive_class: int | None = None) -> float:
    """Return :func:`dp_soft` over the rows of the positive label only.

    Direction: to 0. Arguments as in :func:`block`.
    """
    rows = _answers("eop_soft", logits, labels, groups, positive_class)
    return _soft_gap(rows.probability[rows.positive], rows.groups[rows.positive])


def _soft_gap(probability: FloatArray, groups: IntArray) -> float:
    mean = np.bincount(groups, probability) / np.bincount(groups)
    if len(mean) == 2:
        return float(mean[1] - mean[0])
    return float(np.abs(mean - probability.mean()).max())


def worst_group_acc(
    logits: Any, labels: Any, groups: Any, positive_class: int | None = None
) -> float:
    """Return the smallest accuracy over all (label, group) cells that have rows, in [0, 1].

    Direction: up. Cells and not groups: a model that answers by a spurious feature is right on
    average in every group, and wrong where the feature misleads. Source: Sagawa et al., ICLR 2020.
    Arguments as in :func:`block`; any number of classes.

    >>> worst_group_acc([[0, 1], [1, 0], [0, 1], [0, 1]], [1, 0, 1, 0], [0, 0, 1, 1])
    0.0
    """
    rows = _answers("worst_group_acc", logits, labels, groups, positive_class)
    cells = rows.labels * (rows.groups.max() + 1) + rows.groups
    _, cells = np.unique(cells, return_inverse=True)
    return float((np.bincount(cells, rows.right) / np.bincount(cells)).min())


def group_acc_gap(
    logits: Any, labels: Any, groups: Any, positive_class: int | None = None
) -> float:
    """Return the largest minus the smallest accuracy of a group (labels taken together), in [0, 1].

    Direction: to 0. Arguments as in :func:`block`; any number of classes.
    """
    rows = _answers("group_acc_gap", logits, labels, groups, positive_class)
    accuracy = np.bincount(rows.groups, rows.right) / np.bincount(rows.groups)
    return float(accuracy.max() - accuracy.min())


def nll(logits: Any, labels: Any) -> float:
    """Return −(1/B) Σ_i log p_{y_i}, the mean negative log-likelihood in nats. Direction: down.

    >>> round(nll([[0.0, 0.0]], [1]), 6)
    0.693147
    """
    return float(cross_entropy(logits, labels).mean())


_ALONE: Mapping[str, Callable[..., float]] = {
    "dp_soft": dp_soft,
    "dp_diff": dp_diff,
    "dp_ratio": dp_ratio,
    "eop_soft": eop_soft,
    "eop_diff": eop_diff,
    "eo_diff": eo_diff,
    "worst_group_acc": worst_group_acc,
    "group_acc_gap": group_acc_gap,
}


def block(
    logits: Any, labels: Any, groups: Any, positive_class: int | None = None
) -> dict[str, float]:
    """Return every number of :data:`NAMES` that the rows allow; :func:`missing` has the others.

    Args:
        logits: (B, K).
        labels: (B,), integers in [0, K).
        groups: (B,), codes ≥ 0, −1 for a row of no group; None for data without groups.
        positive_class: the label whose rates are compared; None: 1 if K = 2.
    """
    z, y = _arrays.labelled(logits, labels, "fairness")
    absent = missing(y, groups, num_classes=z.shape[1], positive_class=positive_class)
    found = {"acc": float((z.argmax(axis=1) == y).mean()), "nll": nll(z, y)}
    for name, function in _ALONE.items():
        if name not in absent:
            found[name] = function(z, y, groups, positive_class)
    return found
