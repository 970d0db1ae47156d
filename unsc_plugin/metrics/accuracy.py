"""Accuracy: the share of rows whose arg-max is the label (micro), a fraction, never rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from unsc_plugin.metrics import _arrays


def correct(
    logits: Any, labels: Any, *, metric: str = "accuracy", split: str = "data"
) -> npt.NDArray[np.bool_]:
    """Return for every row whether arg-max_k z_k equals the label, shape (B,).

    Ties go to the smallest class number, for arrays and tensors alike. `metric` and `split` only
    name the numbers in an error.

    Args:
        logits: (B, K).
        labels: (B,), integers in [0, K).
        metric: name of the metric in errors.
        split: name of the split in errors.
    """
    z, y = _arrays.labelled(logits, labels, f"{metric} on {split}")
    hits: npt.NDArray[np.bool_] = z.argmax(axis=1) == y
    return hits


def accuracy(logits: Any, labels: Any, *, metric: str = "accuracy", split: str = "data") -> float:
    """Return (1/B) Σ_i [arg-max_k z_ik = y_i], a fraction in [0, 1].

    Every example counts the same (micro average): a rare class weighs as much as it has rows.
    Direction: up for test and retained test accuracy; forget and retain accuracy have no direction
    of their own, their target is the value of a retrained model.

    Args:
        logits: (B, K).
        labels: (B,), integers in [0, K).
        metric: name of the metric in errors.
        split: name of the split in errors.

    >>> accuracy([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]], [0, 1, 0, 0])
    0.75
    """
    return float(correct(logits, labels, metric=metric, split=split).mean())
