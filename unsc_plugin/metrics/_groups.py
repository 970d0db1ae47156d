"""Which numbers about groups some rows allow, and their groups and positive class, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays
from unsc_plugin.metrics._arrays import IntArray

UNGROUPED = ("acc", "nll")
SELECTIONS = ("dp_soft", "dp_diff", "dp_ratio")
OPPORTUNITIES = ("eop_soft", "eop_diff")
ODDS = ("eo_diff",)
ACCURACIES = ("worst_group_acc", "group_acc_gap")
NAMES = (*UNGROUPED, *SELECTIONS, *OPPORTUNITIES, *ODDS, *ACCURACIES)


def missing(
    labels: Any, groups: Any, *, num_classes: int = 2, positive_class: int | None = None
) -> dict[str, str]:
    """Return the numbers of `block` that these rows do not allow, each with the reason.

    A gap needs at least two groups, each with rows; `eop_*` rows of the positive label in every
    group, `eo_diff` rows of both kinds. With more than two classes all gaps but those of accuracy
    need a `positive_class`. `acc` and `nll` need nothing.

    Args:
        labels: (B,).
        groups: (B,), codes ≥ 0, −1 for none; or None.
        num_classes: K.
        positive_class: the label that is wished for; None: 1 if K = 2.

    Raises:
        DataError: groups that do not fit the rows, or a positive class outside [0, K).

    >>> missing([0, 1, 0], [0, 0, 1])["eop_diff"]
    'no rows of label 1 in group 1'
    """
    y = _arrays.integers(labels, "fairness labels")
    _arrays.labels(y, "fairness", rows=len(y), classes=num_classes)
    positive = positive_of(positive_class, num_classes)
    grouped = (*SELECTIONS, *OPPORTUNITIES, *ODDS, *ACCURACIES)
    if groups is None:
        return dict.fromkeys(grouped, "the data have no groups")
    g = groups_of(groups, len(y))
    count = int(g.max()) + 1
    if count < 2:
        return dict.fromkeys(grouped, f"expected two groups or more, got {max(count, 0)}")
    empty = np.flatnonzero(np.bincount(g[g >= 0], minlength=count) == 0)
    if len(empty):
        return dict.fromkeys(grouped, f"no rows of group {empty[0]}")
    if positive is None:
        reason = f"no positive class is named among {num_classes}"
        return dict.fromkeys((*SELECTIONS, *OPPORTUNITIES, *ODDS), reason)
    reasons: dict[str, str] = {}
    for told, rows, names in (
        (f"label {positive}", y == positive, (*OPPORTUNITIES, *ODDS)),
        (f"labels other than {positive}", y != positive, ODDS),
    ):
        empty = np.flatnonzero(np.bincount(g[rows & (g >= 0)], minlength=count) == 0)
        if len(empty):
            for name in names:
                reasons.setdefault(name, f"no rows of {told} in group {empty[0]}")
    return reasons


def positive_of(positive_class: int | None, num_classes: int) -> int | None:
    """Return the positive class, 1 of two classes by default; None where it is not named.

    Raises:
        DataError: a class outside [0, K).
    """
    if positive_class is None:
        return 1 if num_classes == 2 else None
    if not 0 <= positive_class < num_classes:
        raise DataError(
            f"fairness: expected a positive class in [0, {num_classes}), got {positive_class}"
        )
    return positive_class


def groups_of(groups: Any, rows: int) -> IntArray:
    """Return group codes as int64 (rows,).

    Raises:
        DataError: another number of codes, or one below −1.
    """
    g = _arrays.integers(groups, "fairness groups")
    if len(g) != rows or g.min() < -1:
        raise DataError(
            f"fairness: expected a group code ≥ −1 for each of {rows} rows, got {len(g)} codes "
            f"from {g.min()}; pass the groups of the same rows"
        )
    return g
