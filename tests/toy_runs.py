"""What the tests of single methods share: runs on the toys, states compared, softmax regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unsc_plugin.conformance._toys import original, problem, request, split
from unsc_plugin.method import Result, Weights
from unsc_plugin.registry import create
from unsc_plugin.spec import Recipe, Scenario

SEED = 11
DOUBLE = torch.float64
SAME = {"epochs": 2, "lr": 0.01, "batch_size": 10}
PLAIN = Recipe(epochs=1, lr=0.3, momentum=0.0, weight_decay=0.0, batch_size=1000)
EIGHTHS = Weights(torch.linspace(-1, 0.5, 13, dtype=DOUBLE).repeat(8)[:96])
"""Soft weights that float32 holds exactly: steps of 1/8."""

State = Mapping[str, Tensor]


def unlearn(
    name: str, net: Any = "mlp", *, seed: int = SEED, settings: Any = None, **case: Any
) -> Result:
    """Run a method on a toy; `case` goes to the request."""
    scenario = case.pop("scenario", Scenario.RANDOM)
    task = request(problem(net), scenario, **case)
    return create(name, **(settings or {})).unlearn(original(net), task, seed)


def state(result: Result) -> State:
    return result.model.state_dict()


def differing(one: State, other: State) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


class Logistic(nn.Module):
    """Softmax regression in float64 on the table of the toy `mlp`: 6 columns, 3 classes."""

    def __init__(self, seed: int = 0, columns: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(columns, classes).double()
        draw = torch.randn(classes, columns + 1, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.head.weight.copy_(draw[:, 1:])
            self.head.bias.copy_(draw[:, 0])

    def features(self, **inputs: Tensor) -> Tensor:
        return inputs["features"].double()

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.features(**inputs))


def table(weights: Weights | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs and labels of all rows of that table, and their weights r and a.

    Without weights those of the sets: r is 1 on the forget set, a on the retain set.
    """
    rows = problem("mlp").train
    removal, multiplicity = torch.zeros(96).double(), torch.zeros(96).double()
    if weights is None:
        gone, kept = split(rows, Scenario.RANDOM)
        removal[gone], multiplicity[kept] = 1, 1
    else:
        removal, multiplicity = weights.removal, weights.multiplicity
    inputs = rows.gather(torch.arange(96)).inputs["features"].double()
    return inputs, rows.labels, removal, multiplicity
