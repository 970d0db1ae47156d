"""The parameters moved straight to the goal: the ablation of all weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.errors import InfeasibleError, NotApplicable
from unsc_plugin.influence import Factor, Objective
from unsc_plugin.linalg import BoxSolution, solve_weight_qp
from unsc_plugin.method import Scenario, Split, UnlearningMethod, UnlearningTask
from unsc_plugin.methods._correction_settings import CorrectionConfig
from unsc_plugin.methods._corrections import set_up, told
from unsc_plugin.methods._ground import Point
from unsc_plugin.methods._rounds import Request, follow

PARALLEL = 1e-8
"""Squared relative length below which a direction that helps and leaves utility alone is none."""


class ConstrainedStep(UnlearningMethod):
    """θ' = θ̂ + Δ with the smallest ΔᵀHΔ such that −s∇f·Δ ≥ τ and −∇u·Δ ≥ −δ, round by round.

    H is the curvature of the training objective. With A the rows −s∇f and −∇u, Δ = H⁻¹Aᵀλ where
    λ ≥ 0 solves the dual in A H⁻¹ Aᵀ. Same criteria, splits, rounds and tolerances as
    `soft_weighted`, whose first-order update lies in the span of the same directions with the
    empirical Fisher matrix as metric: what weights are worth beyond this has to be shown.
    """

    @dataclass(frozen=True)
    class Config(CorrectionConfig):
        """Settings of `constrained_step`."""

    name = "constrained_step"
    needs = frozenset({Split.RETAIN, Split.VAL})
    scenarios = frozenset({Scenario.CORRECTION})
    config: Config

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model with the parameters of the scope moved.

        Raises:
            InfeasibleError: with `strict`, if the goal cannot be attained.
            NotApplicable: a request that also forgets samples.
        """
        if task.size("forget"):
            raise NotApplicable(
                "constrained_step moves parameters and removes no sample, got a forget set of "
                f"{task.size('forget')}; use soft_weighted"
            )
        setup = set_up(model, task, self.config)
        first = setup.ground.at(setup.objective.theta)
        request = Request.of(setup.ground.criteria, first, self.config.target, True)
        kept, reason = setup.worth_correcting(request, first, self.config)
        setup, request = setup.only(kept), request.only(kept)
        first = replace(first, f=first.f[kept])
        if reason is not None:
            task.stats["plan"] = {"noop": reason, "before": {"f": first.f.tolist(), "u": first.u}}
            return model
        move = StepMove(setup.objective, self.config)
        course = follow(move, setup.ground, request, self.config, first, first)
        task.stats["plan"] = told(setup, course, request) | {"noop": None}
        if self.config.strict and course.reason == "exhausted":
            got = ", ".join(f"{gone:.6g}" for gone in request.removed(course.end.f).tolist())
            raise InfeasibleError(
                f"expected to remove {request.target:g} of the gap, got A* = {got}: no direction "
                "beyond that closes it and leaves the utility loss alone; lower target, or allow "
                "utility_slack"
            )
        setup.objective.write(model, course.end.theta)
        rows = {"fit": setup.fit, "selection": setup.selection}
        logits = {
            name: engine.predict(model, part, device=task.accelerator).logits
            for name, part in rows.items()
            if part is not None
        }
        task.stats["realised_values"] = setup.measure(logits, model, task.accelerator)
        return model


class StepMove:
    """Δ in the metric of the curvature; a step that fails is asked for half as far."""

    def __init__(self, objective: Objective, config: CorrectionConfig) -> None:
        self.objective, self.config, self.share = objective, config, 1.0
        self.delta = torch.zeros_like(objective.theta)
        self.proposed = self.delta
        self.rows: Tensor
        self.pulled: Tensor
        self.factor: Factor

    def linearise(self, point: Point, slopes: Tensor) -> None:
        """Take the curvature and the slopes at a point."""
        ones = torch.ones(self.objective.n, dtype=torch.float64)
        self.factor = self.objective.factor(point.theta, ones, self.config.solver_settings)
        self.rows = -slopes.T
        self.pulled = self.factor.solve(slopes) * -1  # H⁻¹Aᵀ, columns

    def attainable(self, asked: Tensor, slack: float) -> float:
        """Return how far a step may go: without a box any length, 0 if no direction helps."""
        try:
            self._solved(asked, slack)
        except InfeasibleError:
            return 0.0
        return torch.inf

    def propose(self, asked: Tensor, slack: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return θ̂ + Δ with the smallest total Δ, for `share` of what is asked."""
        asked = torch.where(asked > 0, self.share * asked, asked)
        solved, scale = self._solved(asked, slack)
        dual = (solved.dual / scale).to(self.pulled)
        self.proposed = self.pulled @ dual
        predicted = (self.rows @ (self.proposed - self.delta))[:-1].cpu()
        return (
            self.objective.theta + self.proposed,
            predicted,
            {
                "dual": dual.tolist(),
                "share": self.share,
                "curvature": dict(self.factor.stats),
            },
        )

    def _solved(self, asked: Tensor, slack: float) -> tuple[BoxSolution, Tensor]:
        """Return the smallest w = H^½Δ, by the solver of the weights, and the lengths of the rows.

        With rows of length 1 in the metric of H⁻¹ and R Rᵀ = A H⁻¹ Aᵀ, AΔ ≥ r is R w ≥ r; what is
        all but parallel counts as parallel.

        Raises:
            InfeasibleError: no direction helps all goals and leaves utility alone.
        """
        targets = torch.cat([asked, torch.tensor([-slack], dtype=torch.float64)])
        targets = targets + (self.rows @ self.delta).cpu()
        gram = (self.rows @ self.pulled).cpu()
        scale = gram.diagonal().clamp(min=1e-300).sqrt()
        values, vectors = torch.linalg.eigh(gram / scale[:, None] / scale)
        root = vectors * torch.where(values > PARALLEL, values, 0.0).sqrt()
        return solve_weight_qp(root, targets / scale, -torch.inf, torch.inf), scale

    def accept(self) -> None:
        """Stand on the step that was proposed."""
        self.delta = self.proposed

    def shrink(self) -> bool:
        """Ask for half as much."""
        self.share /= 2
        return self.share >= self.config.trust_min

    def widen(self, cut: bool) -> None:
        """Ask for twice as much, up to all."""
        self.share = min(1.0, 2 * self.share)

    def at_rest(self) -> bool:
        """Return whether nothing has moved."""
        return not bool(self.delta.any())
