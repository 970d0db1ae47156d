"""How far predictions lie from those of retrained models: Jensen-Shannon and disagreement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.special import entr

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays
from unsc_plugin.metrics._arrays import FloatArray

_SUM_TOLERANCE = 1e-4  # probabilities saved as float16 still pass


def js_bits(p: Any, q: Any) -> FloatArray:
    """Return JS₂(p, q) = H₂((p + q)/2) − (H₂(p) + H₂(q))/2 of every row, in bits, shape (B,).

    H₂ is the entropy to base 2 with 0·log 0 = 0. Every value lies in [0, 1]; 1 means that the two
    distributions share no class. Source: Lin, "Divergence measures based on the Shannon entropy",
    IEEE Transactions on Information Theory 37 (1991), with equal weights.

    Args:
        p: probabilities (B, K).
        q: probabilities (B, K).

    Raises:
        DataError: if the shapes differ or a row is not a distribution.

    >>> js_bits([[0.9, 0.1]], [[0.1, 0.9]]).round(6).tolist()
    [0.531004]
    """
    left, right = _distributions(p, "js: p"), _distributions(q, "js: q")
    if left.shape != right.shape:
        raise DataError(
            f"js: expected two arrays of one shape, got {left.shape} and {right.shape}; "
            "compare the same rows"
        )
    bits: FloatArray = _js_nats(left, right, _entropy(left)) / np.log(2.0)
    return bits


def js_examples(
    logits: Any, pool_logits: Iterable[Any], *, metric: str = "js", split: str = "data"
) -> FloatArray:
    """Return the mean over pool members of JS₂(softmax z_U, softmax z_R), in bits, shape (B,).

    Args:
        logits: of the subject, (B, K).
        pool_logits: of the retrained models, (m, B, K) or m arrays (B, K).
        metric: name of the metric in errors.
        split: name of the split in errors.
    """
    what = f"{metric} on {split}"
    z = _arrays.logits(logits, what)
    p = _arrays.softmax(z)
    entropy = _entropy(p)
    total, count = np.zeros(len(z)), 0
    for member in _arrays.members(pool_logits, what, z.shape):
        total += _js_nats(p, _arrays.softmax(member), entropy)
        count += 1
    total /= count * np.log(2.0)
    return total


def js_to_pool(
    logits: Any, pool_logits: Iterable[Any], *, metric: str = "js", split: str = "data"
) -> float:
    """Return the mean over rows and members of JS₂(p_U(x), p_R(x)), in bits, in [0, 1].

    Divergences are taken row by row and averaged after (a divergence of averaged predictions hides
    differences that cancel). Direction: down, to the value that retrained models have against each
    other (not to 0). Formula: :func:`js_bits`.

    Args:
        logits: of the subject, (B, K).
        pool_logits: of the retrained models, (m, B, K) or m arrays (B, K).
        metric: name of the metric in errors.
        split: name of the split in errors.

    >>> js_to_pool([[0.0, 0.0]], [[[0.0, 0.0]]])
    0.0
    """
    return float(js_examples(logits, pool_logits, metric=metric, split=split).mean())


def disagree_examples(
    logits: Any, pool_logits: Iterable[Any], *, metric: str = "disagree", split: str = "data"
) -> FloatArray:
    """Return for every row the share of pool members with another arg-max, shape (B,).

    Args:
        logits: of the subject, (B, K).
        pool_logits: of the retrained models, (m, B, K) or m arrays (B, K).
        metric: name of the metric in errors.
        split: name of the split in errors.
    """
    what = f"{metric} on {split}"
    z = _arrays.logits(logits, what)
    predicted = z.argmax(axis=1)
    total, count = np.zeros(len(z)), 0
    for member in _arrays.members(pool_logits, what, z.shape):
        total += member.argmax(axis=1) != predicted
        count += 1
    return total / count


def disagree(
    logits: Any, pool_logits: Iterable[Any], *, metric: str = "disagree", split: str = "data"
) -> float:
    """Return the share of rows whose arg-max differs from R's, mean over members, in [0, 1].

    Direction: down, to the value that retrained models have against each other.

    Args:
        logits: of the subject, (B, K).
        pool_logits: of the retrained models, (m, B, K) or m arrays (B, K).
        metric: name of the metric in errors.
        split: name of the split in errors.

    >>> disagree([[1.0, 0.0], [0.0, 1.0]], [[[1.0, 0.0], [1.0, 0.0]]])
    0.5
    """
    return float(disagree_examples(logits, pool_logits, metric=metric, split=split).mean())


def _entropy(p: FloatArray) -> FloatArray:
    """Return −Σ_k p_k ln p_k of every row."""
    total: FloatArray = entr(p).sum(axis=1)
    return total


def _js_nats(p: FloatArray, q: FloatArray, entropy_p: FloatArray) -> FloatArray:
    """Return the divergence in nats; rounding can leave −1e-17 for equal rows, hence the floor."""
    middle = p + q
    middle *= 0.5
    return np.maximum(_entropy(middle) - 0.5 * (entropy_p + _entropy(q)), 0.0)


def _distributions(values: Any, what: str) -> FloatArray:
    array = _arrays.finite(_arrays.floats(values, what, ndim=2), what)
    sums = array.sum(axis=1)
    wrong = np.flatnonzero((array.min(axis=1) < 0) | (np.abs(sums - 1.0) > _SUM_TOLERANCE))
    if len(wrong):
        raise DataError(
            f"{what}: expected non-negative rows that sum to 1, got sum {sums[wrong[0]]:.6g} and "
            f"smallest entry {array[wrong[0]].min():.6g} in row {wrong[0]}; apply softmax first"
        )
    return array
