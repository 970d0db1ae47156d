"""Noise on the weights that the retained data leave free (Fisher forgetting)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.errors import NotApplicable
from unsc_plugin.method import Rows, Scenario, Split, UnlearningMethod, UnlearningTask, option
from unsc_plugin.methods import _per_sample as single

FLOOR, LARGEST, LARGEST_IN_HEAD = 1e-8, 1e3, 1e2
"""Bounds of 1/F."""
AMPLIFIED = 10.0
"""Factor of the variance of head parameters, and of parameters with one dimension."""
FORGOTTEN_VARIANCE = 1e-3
"""Variance of the head rows of forgotten classes, 1e-4 × 10 in published code."""


class Fisher(UnlearningMethod):
    """θ = μ + √var·N(0, 1), μ = θ_O, var = α·min(1/(F + 1e-8), 1e3).

    Golatkar, Achille and Soatto, *Eternal Sunshine of the Spotless Net* (CVPR 2020, arXiv
    1911.04933). F = mean over at most `max_samples` retained x of Σ_y p_y(x)·(∇ℓ(x, y))²,
    elementwise, one row at a time, in eval mode. The variance is averaged over dim 1 of tensors
    with two or more dimensions; for parameters of a linear head 1/F is at most 1e2 and the variance
    × 10, for other parameters with one dimension (norm layers, biases) × 10. Head row and bias of a
    class that is forgotten as a whole get μ = 0 and var = 1e-3. Weighted: F = Σ a·(…)/n over the n
    rows used, a = max(1 + ε, 0).
    Deviations: the rows are a random sample, not the first ones, which may all have one label; the
    head is the model's final layer, not whatever has K rows. Without a linear head there is no rule
    for it. `fisher.unsc_*`: α as tuned for class-wise forgetting by the reference code of Chen et
    al. (2024, arXiv 2404.13588).
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of `fisher`."""

        alpha: float = option(1e-6, "scale of the variance", low=0, search=(1e-8, 1e-4, "log"))
        max_samples: int = option(2000, "retained rows that F is measured on", low=1, probe=8)

    name = "fisher"
    needs = frozenset({Split.RETAIN})
    scenarios = frozenset(
        {Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.WEIGHTED, Scenario.SEQUENTIAL}
    )
    supports_weights = True
    config: Config

    def prepare(self, model: nn.Module, task: UnlearningTask) -> single.Named:
        """Return F by parameter.

        Raises:
            DivergedError: F is not finite.
        """
        retain = single.in_order(task.rows("retain"))
        order = torch.randperm(len(retain), generator=task.generator)
        sample = retain.subset(order[: self.config.max_samples])
        found, route = information(model, task, sample)
        task.stats |= {"gradients": route, "samples": len(sample)}
        return found

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model with noise where the retained data allow it."""
        head = linear_head(model)
        owned = set() if head is None else set(head.parameters())
        task.stats["head_rule"] = "linear" if head is not None else "none: no single linear layer"
        gone = sorted(task.forget_classes) if head is not None else []
        with torch.no_grad():
            for name, parameter in single.trainable(model).items():
                spread = variance(task.prepared[name], self.config.alpha, parameter in owned)
                mean = parameter.to(spread.dtype, copy=True)
                if parameter in owned and gone:
                    mean[gone], spread[gone] = 0.0, FORGOTTEN_VARIANCE
                draw = torch.randn(parameter.shape, generator=task.generator)
                parameter.copy_(mean + spread.sqrt() * draw.to(spread))
        return model


def information(
    model: nn.Module, task: UnlearningTask, rows: Rows
) -> tuple[single.Named, single.Route]:
    """Return F = Σ_x a(x) Σ_y p_y(x)·(∇ℓ(x, y))² / n by parameter, and the route of the gradients.

    Raises:
        DivergedError: F is not finite.
    """
    squares = single.Squares(model, single.cross_entropy)
    with engine.quiet(model):
        for batch in single.chunks(model, task, rows, "fisher"):
            with torch.no_grad():
                logits = model(**batch.inputs)
                chance = logits.to(single.wide(logits)).softmax(dim=1)
            for label in range(chance.shape[1]):
                labels = torch.full_like(batch.labels, label)
                squares.add(batch.inputs, labels, batch.weight * chance[:, label])
    total = squares.total(task)
    return {name: value / len(rows) for name, value in total.items()}, squares.route


def variance(information: Tensor, alpha: float, in_head: bool) -> Tensor:
    """Return the variance of the noise on a parameter with Fisher information F, of F's shape.

    >>> variance(torch.tensor([[1.0, 0.0]]), 1e-6, in_head=False)  # mean of 1 and 1e3
    tensor([[0.0005, 0.0005]])
    >>> variance(torch.tensor([1.0, 0.0]), 1e-6, in_head=False)
    tensor([1.0000e-05, 1.0000e-02])
    """
    inverse = (1 / (information + FLOOR)).clamp(max=LARGEST_IN_HEAD if in_head else LARGEST)
    found = alpha * inverse
    if found.ndim > 1:
        found = found.mean(dim=1, keepdim=True).expand_as(found).clone()
    return found * AMPLIFIED if in_head or found.ndim <= 1 else found


def linear_head(model: nn.Module) -> nn.Linear | None:
    """Return the final layer where it is a single linear one."""
    try:
        head = getattr(model, "head", None)
    except NotApplicable:  # a wrapped module without a layer of K outputs
        return None
    return head if isinstance(head, nn.Linear) else None
