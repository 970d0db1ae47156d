"""Influence unlearning: one (or a few) Newton-like steps instead of retraining."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unsc_plugin import influence
from unsc_plugin.errors import ConfigError, ForgetSetError, NotApplicable
from unsc_plugin.influence import Curvature, Objective
from unsc_plugin.method import Rows, Scenario, Split, UnlearningMethod, UnlearningTask, option

NO_CURVATURE = "the recursion knows neither curvature objects nor refits"


class Influence(UnlearningMethod):
    """θ ← θ_O + α·k, where k moves the parameters as if the forget set had weighed less.

    With ε_j = −1 on D_f and 0 on D_r (or the given weights), a = 1 + ε, n rows in all and
    v = −(1/n) Σ ε∇ℓ + (Σε / (n·Σa)) Σ a∇ℓ, that is (1/n) Σ_f ∇ℓ − (n_f/(n·n_r)) Σ_r ∇ℓ for sets:

    * `recursion` (called IU in the field; Izzo et al., AISTATS 2021, arXiv 2002.10077, with the
      WoodFisher update of Singh and Alistarh, NeurIPS 2020): k ← v, o ← g_1, and for the gradients
      g_2..g_N of N retained rows, drawn from the seed, with τ = o·g:
      k ← k − (k·g)/(N + τ)·o, then o ← o − τ/(N + τ)·o.
    * `cg`: k = (GGN + λI)⁻¹v by conjugate gradients, GGN the mean over all rows, λ = `damping`.
    * `auto`, `exact`: sums instead of means, with the recipe's weight decay as ridge μ = n·wd. Mode
      `if`: k = −H_0⁻¹ Σ ε_j g_j (Koh and Liang, ICML 2017, arXiv 1703.04730). Mode `newton`: step 1
      k = −H_ε⁻¹ Σ ε_j g_j, further ones −H_ε(θ)⁻¹(∇J_ε(θ) − ∇J_0(θ_O)), each times α. A linear
      head has its Hessian in closed form; else H is the GGN, by conjugate gradients with
      λ = `damping`·tr(GGN)/p. `exact` refuses what has no closed form.

    The model is in eval mode throughout; ε = 0 everywhere returns it bit-identical. N is the number
    of retained rows where there are fewer than `samples`. The IU of public code takes N = 1000
    whatever the number of rows, and tunes α per case.
    `influence.head`: closed form on the head. `influence.newton`: the same with H_ε.
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of `influence`."""

        solver: Literal["recursion", "auto", "exact", "cg"] = option(
            "recursion", "how k is computed", probe="auto"
        )
        mode: Literal["if", "newton"] = option(
            "if", "H of the original objective or of the weighted one", inert=NO_CURVATURE
        )
        scope: Literal["full", "head"] = option("full", "parameters that move")
        steps: int = option(1, "Newton steps of mode newton", low=1, inert=NO_CURVATURE)
        alpha: float = option(1.0, "length of the step", low=0, search=(0.1, 10.0, "log"))
        samples: int = option(1000, "most retained rows N of the recursion", low=1, probe=10)
        damping: float = option(
            1e-3, "cg: λ; auto: λ as a share of tr(GGN)/p", low=0, inert=NO_CURVATURE
        )
        batch_size: int | None = option(
            None,
            "rows per pass; default: the recipe's",
            low=1,
            probe=5,
            inert="passes add up to the same sums",
        )

        def __post_init__(self) -> None:
            curved = self.solver in ("auto", "exact")
            if self.mode == "newton" and not curved:
                raise ConfigError(
                    f"mode: newton needs solver auto or exact, got solver {self.solver!r}"
                )
            if self.steps > 1 and self.mode != "newton":
                raise ConfigError(f"steps: {self.steps} steps need mode newton, got {self.mode!r}")
            if self.solver == "exact" and self.scope == "full":
                raise ConfigError("solver: exact needs scope head; use auto or cg for scope full")

    name = "influence"
    needs = frozenset({Split.RETAIN, Split.FORGET})
    optional = frozenset({Split.FORGET})
    scenarios = frozenset(
        {Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.WEIGHTED, Scenario.SEQUENTIAL}
    )
    supports_weights = True
    config: Config

    def prepare(self, model: nn.Module, task: UnlearningTask) -> None:
        """Check that the request and the model can be served.

        Raises:
            ForgetSetError: neither a forget set nor weights.
            NotApplicable: no head, or `exact` without a linear head of a size that fits.
        """
        if task.weights is None and not task.size("forget"):
            raise ForgetSetError("influence needs a forget set or weights, got neither")
        if self.config.scope == "full":
            return
        linear = influence.is_linear_head(model)
        if self.config.solver == "exact":
            head: Any = model.head
            size = sum(p.numel() for p in head.parameters())
            if not linear or size > Curvature().exact_max:
                raise NotApplicable(
                    f"solver exact: expected a linear head of at most {Curvature().exact_max} "
                    f"parameters, got {type(head).__name__} of {size}; use solver auto"
                )

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model after the step."""
        config = self.config
        rows, e = weighted_rows(task)
        if config.scope == "head":
            head = {p for p in model.head.parameters()}  # type: ignore[union-attr]
            names = dict(model.named_parameters(remove_duplicate=False))
            task.promise_frozen(name for name, p in names.items() if p not in head)
        if not bool(e.any()) or config.alpha == 0:
            return model
        here = self._objective(model, rows, task)
        if config.solver == "recursion":
            theta = here.theta + config.alpha * self._by_recursion(here, e, task)
        elif config.solver == "cg":
            theta = here.theta + config.alpha * self._by_cg(here, e, task)
        else:
            theta = self._by_curvature(here, e, task)
        here.write(model, theta)
        task.stats |= {"parameters": here.p, **{f"passes_{k}": v for k, v in here.stats.items()}}
        return model

    def _objective(self, model: nn.Module, rows: Rows, task: UnlearningTask) -> Objective:
        config, recipe = self.config, task.recipe
        mean = config.solver in ("recursion", "cg")
        if not mean and recipe.optimizer == "adamw":
            task.stats["ridge_is_approximate"] = True
        return influence.objective(
            model,
            rows,
            scope=config.scope,
            ridge=len(rows) * config.damping if mean else influence.ridge_of(recipe, len(rows)),
            label_smoothing=recipe.label_smoothing,
            batch_size=config.batch_size or recipe.batch_size,
            floor=0.0 if mean else influence.RIDGE_FLOOR,
        )

    def _by_recursion(self, here: Objective, e: Tensor, task: UnlearningTask) -> Tensor:
        kept = torch.nonzero(e > -1)[:, 0]
        count = min(self.config.samples, len(kept))
        drawn = kept[torch.randperm(len(kept), generator=task.generator)[:count]]
        task.stats["samples"] = count

        def gradient(number: int) -> Tensor:
            return here.gradient(here.theta, torch.zeros_like(e).index_fill(0, drawn[number], 1.0))

        return recursion(direction(here, e), gradient, count)

    def _by_cg(self, here: Objective, e: Tensor, task: UnlearningTask) -> Tensor:
        settings = Curvature("ggn_cg", damping=0.0)  # λ is the ridge of this objective
        factor = here.factor(here.theta, torch.ones_like(e), settings)
        found = here.n * factor.solve(direction(here, e))
        task.stats["curvature"] = factor.stats
        return found

    def _by_curvature(self, here: Objective, e: Tensor, task: UnlearningTask) -> Tensor:
        config = self.config
        kind: influence.Kind = "exact" if config.solver == "exact" else "auto"
        settings = Curvature(kind, damping=config.damping)
        a = torch.ones_like(e) if config.mode == "if" else 1 + e
        theta = here.theta
        for _ in range(config.steps):
            factor = here.factor(theta, a, settings)
            theta = theta - config.alpha * factor.solve(here.tilted_gradient(theta, e))
        task.stats |= {"curvature": factor.stats, "ridge": here.ridge}
        if here.stationarity is not None:
            task.stats["stationarity"] = here.stationarity
        return theta


def weighted_rows(task: UnlearningTask) -> tuple[Rows, Tensor]:
    """Return all training rows of a request by ascending index, and their ε, float64 (n,).

    A row may be in both streams of a weighted request; it comes once.
    """
    parts = [task.rows(split) for split in (Split.RETAIN, Split.FORGET) if task.size(split)]
    rows = parts[0] if len(parts) == 1 else parts[0].merged(parts[1])
    order = torch.argsort(rows.index, stable=True)
    index = rows.index[order]
    first = torch.ones(len(index), dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    rows = rows.subset(order[first])
    if task.weights is not None:
        return rows, task.weights.of(rows.index)
    gone, _ = task.samples(Split.FORGET)
    return rows, -torch.isin(rows.index, gone).double()


def direction(here: Objective, e: Tensor) -> Tensor:
    """Return v = −(1/n) Σ ε∇ℓ + (Σε / (n·Σa)) Σ a∇ℓ at θ̂, (p,)."""
    a = (1 + e).clamp(min=0)
    return here.gradient(here.theta, e.sum() / (here.n * a.sum()) * a - e / here.n)


def recursion(v: Tensor, gradient: Callable[[int], Tensor], count: int) -> Tensor:
    """Return k after the gradients 0..N−1: o ← g_0, then per g, with τ = o·g, both as below.

    k ← k − (k·g)/(N + τ)·o and o ← o − τ/(N + τ)·o.

    >>> recursion(torch.ones(1), lambda number: torch.ones(1), 1)
    tensor([1.])
    >>> recursion(torch.ones(1), lambda number: torch.ones(1), 3)
    tensor([0.6000])
    """
    k, o = v.clone(), gradient(0)
    for number in range(1, count):
        g = gradient(number)
        tau = o @ g
        k -= (k @ g) / (count + tau) * o
        o = o - tau / (count + tau) * o
    return k
