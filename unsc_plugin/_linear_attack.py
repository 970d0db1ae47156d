"""Attacks of a binary linear classifier without a search: the worst case, and an overshoot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unsc_plugin._spaces import TINY, Inputs, Norm, open_space
from unsc_plugin.errors import ConfigError, DataError, NotApplicable
from unsc_plugin.runtime import quiet

OVERSHOOT = 1.3
"""How far beyond the boundary the published attack goes, as a multiple of the way there."""


def linear_worst_case(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    movable: Tensor | None = None,
    box: tuple[float, float] | None = None,
) -> Tensor:
    """Return the logits (n, 2) of z(x) = Wx + b at the worst point of every row's ball.

    With w = W₁ − W₀ and s = ±1 for label 1 or 0, the margin s·(z₁ − z₀) falls by eps·‖w‖_dual at
    most: by eps·Σ|w_j| (linf) or eps·√Σw_j² (L2) over the movable columns j, at

        δ* = −s·eps·sign w   (linf),       δ* = −s·eps·w/‖w‖₂   (L2).

    A box clips every coordinate of x + δ* (linf only: there the coordinates do not depend on each
    other, so the clipped point is the worst one). Differentiable in W, b and x with δ* held fixed,
    which is the gradient of the worst case (Danskin).

    Args:
        weight: W (2, D).
        bias: b (2,), or None.
        x: (n, D).
        labels: (n,), 0 or 1.
        eps: radius of the ball, ≥ 0.
        norm: of the ball.
        movable: which columns may move, bool (D,); None for all.
        box: lowest and highest value of a coordinate; it must hold x.

    Raises:
        NotApplicable: more than two classes, or L2 within a box, where no closed form exists.
        DataError: shapes that do not fit, a label other than 0 and 1, or x outside the box.
        ConfigError: a negative radius.

    >>> weight, x = torch.tensor([[0.0, 0.0], [3.0, -4.0]]), torch.ones(1, 2)
    >>> linear_worst_case(weight, None, x, torch.tensor([1]), eps=1.0, norm="l2")
    tensor([[ 0., -6.]])
    """
    _require(weight, x, labels, movable, eps)
    if box is not None and norm == "l2":
        raise NotApplicable("linear worst case: no closed form for L2 in a box; attack with pgd")
    contrast = (weight[1] - weight[0]).detach()
    if movable is not None:
        contrast = torch.where(movable, contrast, contrast.new_zeros(()))
    length = contrast.norm().clamp(min=TINY)
    direction = contrast.sign() if norm == "linf" else contrast / length
    delta = (1 - 2 * labels.to(x))[:, None] * eps * direction.to(x)
    if box is not None:
        delta = _clipped(x.detach(), delta, *box)
    return torch.nn.functional.linear(x + delta, weight, bias)


def _clipped(x: Tensor, delta: Tensor, lo: float, hi: float) -> Tensor:
    if bool(((x < lo) | (x > hi)).any()):
        raise DataError(
            f"linear worst case: expected x within [{lo}, {hi}], got [{x.min()}, {x.max()}]"
        )
    return (x + delta).clamp(lo, hi) - x


def linear_overshoot(
    weight: Tensor, bias: Tensor | float, x: Tensor, factor: float = OVERSHOOT
) -> Tensor:
    """Return x' = x − ρ·(w·x + b)/|w|²·w: across the boundary of a linear classifier, no budget.

    The margin w·x' + b is (1 − ρ) times that of x. So beyond ρ = 1 every prediction of that very
    classifier turns over, whatever it is worth, and its accuracy becomes 1 less the clean one;
    below ρ = 1 none does. Made once and kept, the points say nothing about another classifier.
    Qiao et al., *Soft-Weighted Machine Unlearning* (AAAI 2026, arXiv 2505.18783), published code.

    Args:
        weight: w, of the shape of a row.
        bias: b.
        x: (n, ...).
        factor: ρ.

    >>> linear_overshoot(torch.tensor([2.0, 0.0]), -2.0, torch.tensor([[2.0, 5.0]]), factor=2.0)
    tensor([[0., 5.]])
    """
    flat, w = x.flatten(1), weight.flatten().to(x)
    margin = flat @ w + torch.as_tensor(bias).to(x)
    squared = (w @ w).clamp(min=TINY**2)
    return (flat - factor * (margin / squared)[:, None] * w).view_as(x)


def linear_margin(model: nn.Module, inputs: Inputs) -> tuple[str, Tensor, Tensor]:
    """Return the key of the inputs, and w, b with z₁ − z₀ = w·x + b for all rows of a classifier.

    Raises:
        NotApplicable: texts, more than two classes, or a margin that is not linear in the inputs.
    """
    space = open_space(model, inputs)
    if space.key == "input_ids":
        raise NotApplicable("linear margin: expected pixels or table columns, got texts")
    x = space.x.detach().clone().requires_grad_()
    with quiet(model), torch.enable_grad():
        logits = model(**{**inputs, space.key: x})
        if logits.shape[1:] != (2,):
            raise NotApplicable(
                f"linear margin: expected logits of two classes, got {tuple(logits.shape)}"
            )
        margin = logits[:, 1] - logits[:, 0]
        slope = torch.autograd.grad(margin.sum(), x)[0]
    weight = slope[0]
    if not torch.allclose(slope, weight.expand_as(slope), rtol=1e-4, atol=1e-7):
        raise NotApplicable(
            f"linear margin: expected a classifier that is linear in its inputs, got "
            f"{type(model).__name__}; attack with pgd, or classify features that are kept as inputs"
        )
    return space.key, weight, (margin[0] - (weight * x[0]).sum()).detach()


def _require(weight: Tensor, x: Tensor, labels: Tensor, movable: Tensor | None, eps: float) -> None:
    if weight.ndim != 2 or weight.shape[0] != 2:
        raise NotApplicable(
            f"linear worst case: expected weights (2, D), got {tuple(weight.shape)}; "
            "attack with pgd"
        )
    columns = weight.shape[1]
    fits = x.ndim == 2 and x.shape[1] == columns and labels.shape == x.shape[:1]
    if not fits or (movable is not None and movable.shape != (columns,)):
        told = None if movable is None else tuple(movable.shape)
        raise DataError(
            f"linear worst case: expected x (n, {columns}), labels (n,) and movable ({columns},), "
            f"got {tuple(x.shape)}, {tuple(labels.shape)} and {told}"
        )
    if bool(((labels != 0) & (labels != 1)).any()):
        raise DataError("linear worst case: expected labels 0 and 1, got another one")
    if not 0 <= eps < float("inf"):
        raise ConfigError(f"linear worst case: expected a radius eps ≥ 0, got {eps}")
