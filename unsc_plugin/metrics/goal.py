"""What a request asked for, instance by instance: at its goal, still there, back again.

Goal success is another lens than closeness to retraining: a retrained model still gets much of the
forget set right, so a forget set that is wholly wrong is stronger than, and different from, a model
that behaves as if retrained. Neither is folded into the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays

LEVELS = (0.25, 0.5, 0.75, 1.0)
"""Forgotten shares at which methods are compared."""


def at_goal(logits: Any, labels: Any, targets: Any = None) -> npt.NDArray[np.bool_]:
    """Return for every row whether the request's goal holds, shape (B,).

    arg-max_k z_k ≠ y where the request was to forget, arg-max_k z_k = y* where it gave the label y*
    to answer instead. Ties of the arg-max go to the smallest class number, as in accuracy. A logit
    that is not finite never counts as forgotten: it is an error.

    Args:
        logits: (B, K).
        labels: (B,), the recorded labels y, integers in [0, K).
        targets: (B,), the labels y* that were asked for, or None.

    >>> at_goal([[2.0, 0.0], [0.0, 1.0]], [0, 0]).tolist()
    [False, True]
    """
    z, y = _arrays.labelled(logits, labels, "at_goal")
    predicted = z.argmax(axis=1)
    if targets is None:
        wrong: npt.NDArray[np.bool_] = predicted != y
        return wrong
    wanted = _arrays.labels(targets, "at_goal: targets", rows=len(z), classes=z.shape[1])
    corrected: npt.NDArray[np.bool_] = predicted == wanted
    return corrected


def came_back(own: Any, now: Any) -> npt.NDArray[np.bool_]:
    """Return which instances were at their goal after their own request and are not now, (B,).

    Args:
        own: (B,) whether each was at its goal right after its own request.
        now: (B,) whether it is after a later one.

    Raises:
        DataError: if the two are not of the same instances.

    >>> came_back([True, True, False], [True, False, False]).tolist()
    [False, True, False]
    """
    before, after = np.asarray(own, dtype=bool), np.asarray(now, dtype=bool)
    if before.shape != after.shape:
        raise DataError(
            f"came_back: expected the same instances twice, got shapes {before.shape} and "
            f"{after.shape}; compare one request with itself"
        )
    returned: npt.NDArray[np.bool_] = before & ~after
    return returned


def forgotten_share(acc_forget: float) -> float:
    """Return 1 − acc_forget, the share of the forget set whose recorded label is not given.

    >>> forgotten_share(0.25)
    0.75
    """
    return 1.0 - acc_forget


def first_reaching(shares: Iterable[float], level: float) -> int | None:
    """Return the index of the first share that is at least `level`, None if none is.

    It is the first crossing that counts: a trajectory that falls back later has reached the level.
    No tolerance is needed, since the levels are dyadic: c/k and 1 − c/k are exact there.

    >>> first_reaching([0.0, 0.3, 0.6, 0.4], 0.5)
    2
    """
    return next((at for at, share in enumerate(shares) if share >= level), None)


def kl_bits(first: Any, logits: Any) -> float:
    """Return the mean over rows of KL(softmax z_first || softmax z), in bits, at least 0.

    KL(p || q) = Σ_k p_k (log₂ p_k − log₂ q_k), taken row by row and averaged after. To base 2, as
    the divergences of this package are; ∞ where a class that p gives weight has none in q.

    Args:
        first: logits of the model that is compared with, (B, K).
        logits: of the same rows, (B, K).

    Raises:
        DataError: if the shapes differ.

    >>> round(kl_bits([[0.0, 0.0]], [[0.0, np.log(3.0)]]), 6)  # ½ log₂ ½/¼ + ½ log₂ ½/¾
    0.207519
    """
    z_first = _arrays.logits(first, "kl: first")
    z = _arrays.logits(logits, "kl")
    if z_first.shape != z.shape:
        raise DataError(
            f"kl: expected two arrays of one shape, got {z_first.shape} and {z.shape}; compare the "
            "same rows"
        )
    log_p = z_first - _arrays.log_sum_exp(z_first)[:, None]
    log_q = z - _arrays.log_sum_exp(z)[:, None]
    nats = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return max(float(nats.mean()) / float(np.log(2.0)), 0.0)
