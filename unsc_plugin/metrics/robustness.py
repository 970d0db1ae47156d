"""Robustness: accuracy and loss when every input may be moved within its budget."""

from __future__ import annotations

from typing import Any

import numpy as np

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays
from unsc_plugin.metrics.accuracy import correct
from unsc_plugin.metrics.membership import cross_entropy


def robust_block(clean_logits: Any, adversarial_logits: Any, labels: Any) -> dict[str, float]:
    """Return `robust_acc` and `robust_nll`, over the worse of two points of every row's ball.

    robust_acc = (1/B) Σ_i [right at x_i and right at x_i + δ_i], a fraction;
    robust_nll = −(1/B) Σ_i min(log p_y(x_i), log p_y(x_i + δ_i)), in nats.

    The input itself lies in the ball, so an attack can only lower accuracy and raise the loss: a
    δ that helps the model, such as one made for another model, does not make it look robust. For
    the plain accuracy at x + δ see :func:`transfer_block`. Directions: up and down.

    Args:
        clean_logits: (B, K) at x.
        adversarial_logits: (B, K) at x + δ, δ made by an attack on this very model.
        labels: (B,).

    Raises:
        DataError: logits of two shapes.

    >>> robust_block([[0.0, 2.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]], [1, 0])["robust_acc"]
    0.5
    """
    shapes = [_arrays.logits(z, "robustness").shape for z in (clean_logits, adversarial_logits)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"robustness: expected clean and adversarial logits of the same rows, got {shapes[0]} "
            f"and {shapes[1]}"
        )
    both = (clean_logits, adversarial_logits)
    right = [correct(z, labels, metric="robust_acc", split="test") for z in both]
    losses = [cross_entropy(z, labels, split="test") for z in both]
    return {
        "robust_acc": float((right[0] & right[1]).mean()),
        "robust_nll": float(np.maximum(*losses).mean()),
    }


def transfer_block(transferred_logits: Any, labels: Any) -> dict[str, float]:
    """Return `transfer_acc`, the accuracy at inputs that were moved against another model.

    transfer_acc = (1/B) Σ_i [right at x_i + δ_i], a fraction, δ made for the original model. It can
    rise above the clean accuracy, and a model that differs from the original has a high one without
    being robust: beside `robust_acc` it says how much of an attack is due to the model attacked.

    Args:
        transferred_logits: (B, K) at x + δ.
        labels: (B,).

    >>> transfer_block([[0.0, 1.0], [0.0, 1.0]], [1, 0])
    {'transfer_acc': 0.5}
    """
    right = correct(transferred_logits, labels, metric="transfer_acc", split="test")
    return {"transfer_acc": float(right.mean())}
