"""How a trained classifier answers to the weights of its training rows.

:func:`objective` opens the weighted training objective of a model in its head, in some of its
parameters or in all of them. It gives per-sample influences in one pass, weighted gradients, solves
with the curvature, and refits; per-sample gradients are never stored.

Influence functions: Koh and Liang, *Understanding Black-box Predictions via Influence Functions*
(ICML 2017, arXiv 1703.04730). For a criterion f of θ, the change of f that is predicted for the
removal of row j is F_j = ∇f(θ)ᵀ H_e⁻¹ ∇l_j(θ):

>>> from unsc_plugin.rows import Rows
>>> from torch import nn
>>> class Logistic(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.head = nn.Linear(2, 2)
...     def features(self, features):
...         return features
...     def forward(self, features):
...         return self.head(features)
>>> rows = Rows.of({"features": torch.randn(8, 2)}, torch.arange(8) % 2)
>>> here = objective(Logistic(), rows, scope="head", ridge=1.0)
>>> refit = here.refit(torch.zeros(8), here.theta)
>>> bool((refit.theta == here.theta).all()), refit.stats["steps"]
(True, 0)
>>> u = here.factor(here.theta, torch.ones(8)).solve(torch.ones(here.p, 1))
>>> here.along(here.theta, u).shape
torch.Size([1, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unsc_plugin._ggn import Network
from unsc_plugin._head_curvature import LinearHead
from unsc_plugin._objective import Objective as Objective
from unsc_plugin._objective import calm, unwrapped
from unsc_plugin._solves import Curvature as Curvature
from unsc_plugin._solves import Factor as Factor
from unsc_plugin._solves import Kind as Kind
from unsc_plugin._solves import Refit as Refit
from unsc_plugin.errors import ConfigError, NotApplicable, nearest
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Recipe

RIDGE_FLOOR = 1e-4
"""Least ridge of a linear head as a share of tr(X̃ᵀX̃)/D: without any, separable rows have no fit."""
CACHE_BYTES = 2**31
"""Features of more bytes than this are computed anew in every pass."""
HEAD_TOLERANCE = 1e-4


def ridge_of(recipe: Recipe, n: int) -> float:
    """Return the ridge μ = n·wd that weight decay `wd` on a mean loss over `n` rows stands for.

    For AdamW, whose decay is decoupled from the loss, that is an approximation.

    >>> ridge_of(Recipe(weight_decay=0.01), 200)
    2.0
    """
    return n * recipe.weight_decay


def objective(
    model: nn.Module,
    rows: Rows,
    *,
    scope: str | Sequence[str] = "head",
    ridge: float,
    label_smoothing: float = 0.0,
    batch_size: int = 256,
    floor: float = RIDGE_FLOOR,
    cache_bytes: int = CACHE_BYTES,
) -> Objective:
    """Return the weighted training objective of `model` over its training `rows`.

    `scope`: `head` (all trainable parameters of `model.head`), `full` (all trainable parameters),
    or names of parameters. Where these are the weights of a linear head and nothing else, all is in
    closed form on features that are computed once; the ridge is then raised to
    `floor`·tr(X̃ᵀX̃)/D. Otherwise passes go through the network, `batch_size` rows at a time.
    The model is only read; it must not change outside of the scope while the objective is used.

    Raises:
        ConfigError: an unknown scope or parameter name, or a ridge below 0.
        NotApplicable: no head, or nothing trainable in the scope.
        DataError: no rows, or labels outside the outputs.
    """
    model = unwrapped(model)
    names = _names(model, scope)
    shared: dict[str, Any] = {
        "ridge": ridge,
        "smoothing": label_smoothing,
        "batch_size": batch_size,
    }
    if len(rows) and is_linear_head(model, names) and _gives_logits(model, rows):
        return LinearHead(model, rows, cache_bytes=cache_bytes, floor=floor, **shared)
    return Network(model, rows, names, **shared)


def is_linear_head(model: nn.Module, names: Sequence[str] | None = None) -> bool:
    """Return whether `names` (default: scope `head`) are all of a linear head and shared with none.

    Raises:
        NotApplicable: no head, or nothing trainable in it.
    """
    model = unwrapped(model)
    names = _names(model, "head") if names is None else names
    head = getattr(model, "head", None)
    if type(head) is not nn.Linear or not hasattr(model, "features"):
        return False
    own = set(head.parameters())
    known = dict(model.named_parameters())
    elsewhere = {p for m in model.modules() if m is not head for p in m.parameters(recurse=False)}
    return {known[name] for name in names} == own and not own & elsewhere


def _names(model: nn.Module, scope: str | Sequence[str]) -> list[str]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if scope == "full":
        chosen = list(trainable)
    elif scope == "head":
        chosen = _head_names(model, trainable)
    elif isinstance(scope, str):
        raise ConfigError(f"scope: expected head, full or names of parameters, got {scope!r}")
    else:
        everything = dict(model.named_parameters(remove_duplicate=False))
        for name in scope:
            if name not in everything:
                close = ", ".join(nearest(name, everything)) or "none is near"
                raise ConfigError(f"scope: unknown parameter {name!r}; nearest: {close}")
        wanted = {everything[name] for name in scope}
        chosen = [name for name, p in trainable.items() if p in wanted]
    if not chosen:
        raise NotApplicable(f"scope {scope!r}: expected trainable parameters, found none there")
    return chosen


def _head_names(model: nn.Module, trainable: dict[str, nn.Parameter]) -> list[str]:
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module):
        raise NotApplicable(
            f"scope 'head': {type(model).__name__} has no module `head`; wrap the model, or use "
            "scope 'full'"
        )
    own = set(head.parameters())
    return [name for name, p in trainable.items() if p in own]


def _gives_logits(model: nn.Module, rows: Rows) -> bool:
    """Return whether logits = head(features) on the first rows."""
    place = next(model.parameters()).device
    batch = rows.gather(list(range(min(4, len(rows))))).to(place)
    with calm(model), torch.no_grad():
        logits: Tensor = model(**batch.inputs)
        features: Tensor = model.features(**batch.inputs)  # type: ignore[operator]
        if features.ndim != 2 or features.shape[1] != model.head.in_features:  # type: ignore[union-attr]
            return False
        again: Tensor = model.head(features.to(model.head.weight.dtype))  # type: ignore[operator, union-attr, arg-type]
    return again.shape == logits.shape and torch.allclose(
        again.double(), logits.double(), rtol=HEAD_TOLERANCE, atol=HEAD_TOLERANCE, equal_nan=True
    )
