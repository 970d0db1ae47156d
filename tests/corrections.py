"""What the tests of corrections share: the biased table as models, rows and requests of ours.

The logistic regression of `synthetic_bias` is here a classifier of two classes with weights −θ/2
and θ/2 and twice its ridge, which is the same function with the same influences.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import synthetic_bias as bias
import torch
from torch import Tensor, nn

from unsc_plugin.method import Recipe, Result, UnlearningTask
from unsc_plugin.methods._corrections import Setup, set_up
from unsc_plugin.registry import create
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Scenario

DOUBLE = torch.float64
TRAIN, VAL, TEST = bias.draw()
FITTED = bias.fit(TRAIN.x, TRAIN.y)
GAP = bias.parity(VAL, FITTED)
GAIN, UTILITY = bias.influences(TRAIN, VAL, FITTED)
N = len(TRAIN.y)
WHOLE = {"fit_fraction": 1.0, "utility_stop": None}
"""All validation rows for fitting, as the known answers have it."""
REFITTED = {"method": "influence", "set": {"solver": "auto", "scope": "head", "mode": "newton"}}
"""A base that retrains the head, to the curvature's precision."""


class Linear(nn.Module):
    """A head on the inputs themselves, without bias."""

    def __init__(self, dim: int = 20, classes: int = 2, bias: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(dim, classes, bias=bias)

    def features(self, features: Tensor) -> Tensor:
        return features

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)


def two_classes(theta: np.ndarray) -> Linear:
    """Return the logistic model with weights θ (20,) as one of two classes."""
    model = Linear(len(theta)).double()
    half = torch.tensor(theta) / 2
    model.head.weight.data = torch.stack([-half, half])
    return model


def logistic(model: nn.Module) -> np.ndarray:
    """Return θ (20,) of :func:`two_classes`."""
    weight = model.head.weight.detach().numpy()
    return weight[1] - weight[0]


def rows_of(part: bias.Part, s: np.ndarray | None = None) -> Rows:
    inputs = {"features": torch.tensor(part.x)}
    group = torch.tensor(part.s if s is None else s)
    return Rows.of(inputs, torch.tensor(part.y), group=group)


def recipe(**changes: Any) -> Recipe:
    """Return the recipe whose weight decay is the ridge of the table's fit."""
    settings = {"epochs": 1, "lr": 0.1, "weight_decay": 2 * bias.RIDGE / N, "batch_size": 256}
    return Recipe(**{**settings, **changes})


def request(
    forget: Tensor | None = None, s: np.ndarray | None = None, **changes: Any
) -> UnlearningTask:
    """Return a correction on the table; `forget` are positions that must go, `s` other groups."""
    train = changes.pop("train", rows_of(TRAIN))
    kept = torch.ones(len(train), dtype=torch.bool)
    if forget is not None:
        kept[forget] = False
    settings: dict[str, Any] = {
        "forget": None if forget is None else train.subset(forget),
        "retain": train.subset(kept.nonzero()[:, 0]),
        "val": rows_of(VAL, s),
        "num_classes": 2,
        "recipe": recipe(),
        "fresh_model": lambda _: two_classes(np.zeros(20)),
        "scenario": Scenario.CORRECTION,
        "modality": "tabular",
    }
    return UnlearningTask(**{**settings, **changes})


def corrected(
    name: str = "soft_weighted",
    task: UnlearningTask | None = None,
    *,
    seed: int = 0,
    theta: np.ndarray = FITTED,
    **settings: Any,
) -> Result:
    """Run a method on the table with all validation rows for fitting, unless settings say else."""
    method = create(name, **{**WHOLE, **settings})
    return method.unlearn(two_classes(theta), task or request(), seed)


def weights_of(result: Result) -> np.ndarray:
    assert result.weights is not None
    return result.weights.eps.numpy()


def retrained(e: np.ndarray) -> np.ndarray:
    """Return θ of the fit with multiplicities 1 + e, by the explicit reference."""
    return bias.fit(TRAIN.x, TRAIN.y, weight=1 + e)


def accuracy(part: bias.Part, theta: np.ndarray) -> float:
    return float(((part.x @ theta > 0) == part.y).mean())


def loss(part: bias.Part, theta: np.ndarray) -> float:
    return float(bias.log_loss(part.x, part.y, theta).mean())


def setup_of(
    name: str = "soft_weighted", task: UnlearningTask | None = None, **settings: Any
) -> Setup:
    """Return what a method's plan begins with."""
    method = create(name, **{**WHOLE, **settings})
    guarded = (task or request()).guarded(method.opens, 0)
    return set_up(two_classes(FITTED), guarded, method.config)  # type: ignore[arg-type]
