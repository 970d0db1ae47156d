"""Membership of the forget set, read from the outputs: confidence score, ROC attack, logistic.

None of these numbers has 0.5 as its goal. A model retrained without the forget set has its own
value, which depends on how hard the forget examples are; that value is the target.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays
from unsc_plugin.metrics._arrays import FloatArray

CONFIDENCE_LIMIT = 100.0
MIN_NONMEMBERS = 100  # below it one non-member is more than 1 % and TPR at 1 % FPR says nothing
_SMALLEST_SIDE = 10  # a tenth is held out per split, and both classes must be in it
_ROUNDING = 1e-12


def confidence(logits: Any, labels: Any, *, split: str = "data") -> FloatArray:
    """Return conf(z, y) = z_y − log Σ_{k≠y} exp z_k = log(p_y / (1 − p_y)), shape (B,).

    Computed from logits, so that it stays exact where p_y rounds to 1; clipped to [−100, 100]. A
    logit of −∞ (a class shut off) is allowed: a label that is shut off has −100. Unit: nats (a
    log-odds). Source: Carlini et al., "Membership inference attacks from first principles",
    IEEE S&P 2022, section V-A.

    Args:
        logits: (B, K), K ≥ 2.
        labels: (B,), integers in [0, K).
        split: name of the split in errors.

    >>> confidence([[1.0, 0.0, 0.0]], [0]).round(6).tolist()
    [0.306853]
    """
    what = f"confidence on {split}"
    z = _arrays.logits(logits, what, masked=True)
    y = _arrays.labels(labels, what, rows=z.shape[0], classes=z.shape[1])
    rows = np.arange(len(z))
    own = z[rows, y]
    others = z.copy()
    others[rows, y] = -np.inf
    rest = _arrays.log_sum_exp(others)
    shut = np.isneginf(own)
    score = np.where(shut, -np.inf, np.where(shut, 0.0, own) - rest)
    return np.clip(score, -CONFIDENCE_LIMIT, CONFIDENCE_LIMIT)


def cross_entropy(logits: Any, labels: Any, *, split: str = "data") -> FloatArray:
    """Return −log p_y = log Σ_k exp z_k − z_y of every row, in nats, shape (B,).

    Args:
        logits: (B, K).
        labels: (B,), integers in [0, K).
        split: name of the split in errors.
    """
    z, y = _arrays.labelled(logits, labels, f"cross entropy on {split}")
    return _arrays.log_sum_exp(z) - z[np.arange(len(z)), y]


def label_histogram_weights(nonmember_labels: Any, forget_labels: Any) -> FloatArray:
    """Return weights of the non-members that give them the label histogram of the forget set.

    w_i = (n_f(y_i) / n_f) · (n / n(y_i)) for n non-members, so the mean weight is 1. Labels that
    the forget set lacks get weight 0; for a forgotten class only its own test images are left.
    Without the weights an attack on a shifted label distribution detects the shift.

    Args:
        nonmember_labels: (n,).
        forget_labels: (n_f,).

    Raises:
        DataError: if a label of the forget set has no non-member.

    >>> label_histogram_weights([0, 0, 1], [0, 1]).tolist()
    [0.75, 0.75, 1.5]
    """
    outside = _arrays.integers(nonmember_labels, "membership weights on non-members")
    forget = _arrays.integers(forget_labels, "membership weights on forget")
    values, inverse, count = np.unique(outside, return_inverse=True, return_counts=True)
    wanted, wanted_count = np.unique(forget, return_counts=True)
    missing = np.setdiff1d(wanted, values)
    if len(missing):
        raise DataError(
            "membership weights: expected non-members of every label of the forget set, got none "
            f"for label(s) {missing.tolist()}; add test examples of these labels"
        )
    share = np.zeros(len(values))
    share[np.searchsorted(values, wanted)] = wanted_count / len(forget)
    weights: FloatArray = (share * len(outside) / count)[inverse]
    return weights


def umia_auc(forget_conf: Any, nonmember_conf: Any, nonmember_weight: Any = None) -> float:
    """Return P(forget score > non-member score) + ½ P(equal), a probability in [0, 1].

    The area under the ROC curve of the attack "a high confidence means trained on". Direction:
    towards the retrained model's value; a value below it leaks as much as a value above it.

    Args:
        forget_conf: scores of the forget set, (n_f,), as of :func:`confidence`.
        nonmember_conf: scores of examples no model was trained on, (n,).
        nonmember_weight: weights (n,), see :func:`label_histogram_weights`; None: all equal.

    >>> umia_auc([1.0, 2.0], [1.0, 2.0])
    0.5
    """
    from sklearn.metrics import roc_auc_score

    member, score, weight = _sides("umia_auc", forget_conf, nonmember_conf, nonmember_weight)
    return float(roc_auc_score(member, score, sample_weight=weight))


def umia_tpr1(
    forget_conf: Any, nonmember_conf: Any, nonmember_weight: Any = None, fpr: float = 0.01
) -> float | None:
    """Return the largest true-positive rate over thresholds with false-positive rate ≤ `fpr`.

    No interpolation between thresholds. A fraction; direction: towards the retrained model's value.
    None (not measurable) with fewer than 100 non-members of positive weight.

    Args:
        forget_conf: scores of the forget set, (n_f,).
        nonmember_conf: scores of the non-members, (n,).
        nonmember_weight: weights (n,); None: all equal.
        fpr: largest false-positive rate, a fraction.

    Raises:
        DataError: if `fpr` does not lie in [0, 1].
    """
    from sklearn.metrics import roc_curve

    if not 0.0 <= fpr <= 1.0:
        raise DataError(f"umia_tpr1: expected fpr in [0, 1], got {fpr}; give a fraction")
    member, score, weight = _sides("umia_tpr1", forget_conf, nonmember_conf, nonmember_weight)
    if np.count_nonzero(weight[member == 0]) < MIN_NONMEMBERS:
        return None
    false_rate, true_rate, _ = roc_curve(
        member, score, sample_weight=weight, drop_intermediate=False
    )
    return float(true_rate[false_rate <= fpr + _ROUNDING].max())


def logistic_mia(forget_loss: Any, test_loss: Any, *, seed: int) -> float:
    """Return the accuracy of a logistic regression that tells forget losses from test losses.

    Mean over 10 stratified splits that hold out a tenth; the larger side is cut to the size of the
    smaller one by a seeded draw. A fraction; direction: towards the retrained model's value (it is
    not 0.5 for retraining). Source: the attack of the NeurIPS 2023 unlearning challenge's starting
    kit. Both sides are sorted first, so that the order of the rows does not matter.

    Args:
        forget_loss: cross entropies of the forget set, (n_f,), as of :func:`cross_entropy`.
        test_loss: cross entropies of test examples, (n_t,).
        seed: of the cut and of the splits.

    Raises:
        DataError: if a side has fewer than 10 examples.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    inside = np.sort(_arrays.scores(forget_loss, "umia_logistic on forget"))
    outside = np.sort(_arrays.scores(test_loss, "umia_logistic on non-members"))
    size = min(len(inside), len(outside))
    if size < _SMALLEST_SIDE:
        raise DataError(
            f"umia_logistic: expected at least {_SMALLEST_SIDE} examples per side, got "
            f"{len(inside)} forget and {len(outside)} test examples; leave the metric out"
        )
    rng = np.random.default_rng(seed)
    sides = [rng.choice(side, size=size, replace=False) for side in (inside, outside)]
    splits = StratifiedShuffleSplit(
        n_splits=10, test_size=0.1, random_state=int(rng.integers(2**32))
    )
    member = np.repeat([1, 0], size)
    features = np.concatenate(sides)[:, None]
    hits = cross_val_score(LogisticRegression(), features, member, cv=splits, scoring="accuracy")
    return float(hits.mean())


def _sides(
    metric: str, forget_conf: Any, nonmember_conf: Any, nonmember_weight: Any
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return membership (1 forget, 0 non-member), scores and weights of both sides.

    Raises:
        DataError: if the weights do not fit the non-members or leave none of them.
    """
    inside = _arrays.scores(forget_conf, f"{metric} on forget")
    outside = _arrays.scores(nonmember_conf, f"{metric} on non-members")
    weight = np.ones(len(outside))
    if nonmember_weight is not None:
        weight = _arrays.scores(nonmember_weight, f"{metric} weights")
    if weight.shape != outside.shape:
        raise DataError(
            f"{metric}: expected one weight per non-member, got weights {weight.shape} for scores "
            f"{outside.shape}; weigh the same rows"
        )
    if weight.min() < 0 or weight.max() == 0:
        raise DataError(
            f"{metric}: expected weights ≥ 0 that are not all 0, got {weight.min():.6g} to "
            f"{weight.max():.6g}; without non-members the metric does not exist"
        )
    return (
        np.repeat([1.0, 0.0], [len(inside), len(outside)]),
        np.concatenate([inside, outside]),
        np.concatenate([np.ones(len(inside)), weight]),
    )
