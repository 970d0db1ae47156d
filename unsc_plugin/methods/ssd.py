"""Weights that matter more for the forget set than for all data are shrunk (SSD)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.errors import DivergedError, WeightsNotSupported
from unsc_plugin.method import Rows, Scenario, Split, UnlearningMethod, UnlearningTask, option
from unsc_plugin.methods import _per_sample as single

LARGEST_ALPHA = 10.0
"""Published threshold."""


@dataclass(frozen=True)
class Importances:
    """I_f and I_D by parameter, and of the request: κ and the largest ratio I_f / I_D there is."""

    forget: single.Named
    everything: single.Named
    kappa: float
    bound: float
    route: str


class SSD(UnlearningMethod):
    """Where I_f > α·I_D: θ ← θ·min(1, λ·I_D/I_f). No training.

    Foster, Schoepf and Brintrup, *Fast Machine Unlearning Without Retraining Through Selective
    Synaptic Dampening* (AAAI 2024, arXiv 2308.07707). I_f and I_D are means of (∇ℓ)² over D_f and
    over all of D at θ_O, elementwise, in eval mode. `label_free` takes ∇‖z(x)‖₂² instead of the
    loss gradient (the same authors, *Loss-Free Machine Unlearning*, 2024, arXiv 2402.19308).
    Weighted, with r = max(−ε, 0) and a = max(1 + ε, 0): I_f = Σ r g²/Σ r,
    I_D = (Σ a g² + Σ r g²)/(Σ a + Σ r), and θ ← (1 − κ)θ + κθ_d, κ = Σ r²/Σ r, which is 1 for sets.
    Deviations: squares of single rows' gradients, the diagonal of the Fisher information, where
    published code squares gradients of batches (`per_sample=False`; sets only). Since D holds D_f,
    I_f/I_D then never exceeds n/n_f: the default threshold is the published 10, but at most half of
    that bound, or nothing at all would be dampened where D_f is a tenth of D. `ssd.paper`: α 10,
    batches. `ssd.vit`: the published α 5 for transformers (50 and λ .1 are published for faces).
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of `ssd`."""

        alpha: float | None = option(
            None,
            "threshold of I_f/I_D; default 10, at most half of n/n_f",
            low=0,
            search=(1.0, 100.0, "log"),
            probe=1.2,
        )
        lam: float = option(1.0, "dampening constant", low=0, search=(0.1, 10.0, "log"), probe=0.1)
        per_sample: bool = option(True, "squares of single rows, not of batches")
        label_free: bool = option(False, "gradients of the squared output norm, not of the loss")
        batch_size: int | None = option(
            None,
            "rows at a time; default: the recipe's",
            low=1,
            inert="speed and memory, unless per_sample is off",
        )

    name = "ssd"
    needs = frozenset({Split.RETAIN, Split.FORGET})
    scenarios = frozenset(
        {Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.WEIGHTED, Scenario.SEQUENTIAL}
    )
    supports_weights = True
    deterministic = True
    config: Config

    def prepare(self, model: nn.Module, task: UnlearningTask) -> Importances:
        """Return the importances.

        Raises:
            WeightsNotSupported: soft weights, but squares of batches.
            DivergedError: an importance is not finite.
        """
        soft = task.weights is not None and not task.weights.hard
        if soft and not self.config.per_sample:
            raise WeightsNotSupported(
                "ssd with per_sample=False squares whole batches and knows sets only, got soft "
                "weights; set per_sample=True, or harden them explicitly (Weights.harden)"
            )
        forget, retain = task.rows("forget"), task.rows("retain")
        removed, kept = (float(rows.weight.double().sum()) for rows in (forget, retain))
        own, everything, route = (
            self._by_rows(model, task, forget, retain)
            if self.config.per_sample
            else self._by_batches(model, task, forget, retain)
        )
        kappa = float(forget.weight.double().square().sum()) / removed
        return Importances(own, everything, kappa, (removed + kept) / removed, route)

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model with what matters for the forget set dampened."""
        found: Importances = task.prepared
        alpha = self.config.alpha
        if alpha is None:
            alpha = min(LARGEST_ALPHA, found.bound / 2)
        dampened = total = 0
        with torch.no_grad():
            for name, parameter in single.trainable(model).items():
                factor = shrinkage(
                    found.forget[name], found.everything[name], alpha, self.config.lam
                )
                chosen = factor < 1
                kept = torch.where(chosen, 1 - found.kappa + found.kappa * factor, factor)
                parameter.copy_(parameter.to(kept.dtype) * kept)
                dampened, total = dampened + int(chosen.sum()), total + chosen.numel()
        task.stats |= {
            "alpha": alpha,
            "dampened_share": dampened / max(total, 1),
            "gradients": found.route,
        }
        if not dampened:
            task.warn(
                f"no weight is dampened: none matters more than {max(alpha, self.config.lam):g} "
                "times as much for the forget set as for all data; set a smaller alpha and lam"
            )
        return model

    def _height(self) -> single.Height:
        return single.squared_norm if self.config.label_free else single.cross_entropy

    def _by_rows(
        self, model: nn.Module, task: UnlearningTask, forget: Rows, retain: Rows
    ) -> tuple[single.Named, single.Named, str]:
        """Return I_f, I_D and the route of the gradients; the forget set is read once for both."""
        size, height = self.config.batch_size, self._height()
        gone, first = single.weighted_squares(model, task, forget, "forget", height, size)
        rest, second = single.weighted_squares(model, task, retain, "retain", height, size)
        removed, kept = (float(rows.weight.double().sum()) for rows in (forget, retain))
        own = {name: value / removed for name, value in gone.items()}
        everything = {name: (gone[name] + rest[name]) / (removed + kept) for name in gone}
        return own, everything, single.combined([first, second])

    def _by_batches(
        self, model: nn.Module, task: UnlearningTask, forget: Rows, retain: Rows
    ) -> tuple[single.Named, single.Named, str]:
        """Return the published form: means of squared gradients of batches, in one fixed order."""
        parts = [self._of_batches(model, task, rows) for rows in (forget, forget.merged(retain))]
        return parts[0], parts[1], "batches"

    def _of_batches(self, model: nn.Module, task: UnlearningTask, rows: Rows) -> single.Named:
        moving, height = single.trainable(model), self._height()
        mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        loader = task.loader_over(
            single.in_order(rows).subset(mixed),
            "batches",
            train=False,
            shuffle=False,
            batch_size=self.config.batch_size,
        )
        total = {name: torch.zeros_like(p, dtype=single.wide(p)) for name, p in moving.items()}
        with engine.quiet(model):
            for batch in loader:
                loss = engine.weighted_mean(height(model(**batch.inputs), batch.labels), batch)
                found = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
                for name, gradient in zip(moving, found, strict=True):
                    if gradient is not None:
                        shared = engine.reduce_sum(gradient.to(total[name].dtype), task.accelerator)
                        total[name] += shared.square() / len(loader)
        for name, value in total.items():
            if not bool(torch.isfinite(value).all()):
                raise DivergedError(f"squared gradients of {name} are not finite")
        return total


def shrinkage(forget: Tensor, everything: Tensor, alpha: float, lam: float) -> Tensor:
    """Return the factor of every weight: min(1, λ·I_D/I_f) where I_f > α·I_D, else 1.

    >>> shrinkage(torch.tensor([1.0, 5.0, 20.0]), torch.ones(3), alpha=2.0, lam=10.0).tolist()
    [1.0, 1.0, 0.5]
    """
    chosen = forget > alpha * everything
    ratio = lam * everything / torch.where(chosen, forget, torch.ones_like(forget))
    return torch.where(chosen, ratio.clamp(max=1), torch.ones_like(ratio))
