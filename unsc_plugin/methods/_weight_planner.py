"""Per-sample weights that reach a goal: influences, a quadratic problem per round, a refit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unsc_plugin.errors import InfeasibleError, NumericalError
from unsc_plugin.influence import Objective
from unsc_plugin.linalg import attainable_fraction, solve_weight_qp
from unsc_plugin.methods._correction_settings import CorrectionConfig
from unsc_plugin.methods._ground import Ground, Point
from unsc_plugin.methods._rounds import CAUTION, Course, Request, follow, slack_of

Infinite = float("inf")


@dataclass(frozen=True)
class Effects:
    """First-order effects of every sample: gains F̃ = s·F (k, n) of the goals, U (n,) of utility.

    F_j = ∇fᵀ H_e⁻¹ g_j is the predicted change of f if sample j is removed.
    """

    gains: Tensor
    utility: Tensor
    notes: dict[str, Any]


def effects(
    objective: Objective, theta: Tensor, e: Tensor, slopes: Tensor, config: CorrectionConfig
) -> Effects:
    """Return the effects at θ for slopes (p, k + 1): one solve, one pass over the samples.

    Raises:
        NumericalError: an influence that is not finite, or a curvature that cannot be solved.
    """
    factor = objective.factor(theta, 1 + e, config.solver_settings)
    found = objective.along(theta, factor.solve(slopes))
    wrong = torch.nonzero(~torch.isfinite(found).all(dim=0))[:5, 0]
    if len(wrong):
        names = objective.index[wrong].tolist()
        raise NumericalError(f"expected finite influences, got others for samples {names}")
    return Effects(found[:-1], found[-1], dict(factor.stats))


class WeightMove:
    """Weights e (n,) in a box; samples in `fixed` stay at −1."""

    def __init__(
        self,
        objective: Objective,
        config: CorrectionConfig,
        box: tuple[float, float],
        trust: float,
        *,
        fixed: Tensor,
        theta: Tensor,
        linear: float = Infinite,
        form: str = "reach",
    ) -> None:
        self.objective, self.config, self.box, self.trust = objective, config, box, trust
        self.fixed, self.theta, self.linear, self.form = fixed, theta, linear, form
        self.e = torch.where(fixed, -1.0, 0.0).double()
        self.proposed = (self.e, theta)
        self.begun = self.e
        self.effects: Effects | None = None

    def linearise(self, point: Point, slopes: Tensor) -> None:
        """Take the effects of every sample at a point."""
        self.begun = self.e
        self.effects = effects(self.objective, point.theta, self.e, slopes, self.config)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the box of the round: within the trust radius, fixed samples where they are."""
        lower = (self.e - self.trust).clamp(min=self.box[0])
        upper = (self.e + self.trust).clamp(max=self.box[1])
        return torch.where(self.fixed, self.e, lower), torch.where(self.fixed, self.e, upper)

    def attainable(self, asked: Tensor, slack: float) -> float:
        """Return the largest common share of the requests that can be met; inf without a box."""
        known = self._effects
        lower, upper = (bound - self.e for bound in self.bounds())
        if not bool((lower.isfinite() & upper.isfinite()).all()):
            return Infinite
        return attainable_fraction(known.gains, asked, known.utility, slack, lower, upper)

    def in_the_box(self, asked: Tensor, slack: float) -> float:
        """Return the largest common share that could be met from where the effects were taken.

        Whatever the trust radius; inf without a box.
        """
        known, (low, high) = self._effects, self.box
        if not (math.isfinite(low) and math.isfinite(high)):
            return Infinite
        lower = torch.where(self.fixed, 0.0, low - self.begun)
        upper = torch.where(self.fixed, 0.0, high - self.begun)
        return attainable_fraction(known.gains, asked, known.utility, slack, lower, upper)

    def propose(self, asked: Tensor, slack: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return θ refitted with the smallest weights that have at least the effects asked for."""
        known = self._effects
        lower, upper = self.bounds()
        sign = 1.0 if self.form == "reach" else -1.0
        rows = torch.cat([sign * known.gains, known.utility[None]])
        targets = torch.cat([sign * asked, torch.tensor([-slack], dtype=torch.float64)])
        linear = known.gains.sum(dim=0) / (2 * self.linear) if math.isfinite(self.linear) else None
        solved = solve_weight_qp(rows, targets + rows @ self.e, lower, upper, linear)
        refit = self.objective.refit(solved.e, self.theta, self.config.solver_settings)
        self.proposed = (solved.e, refit.theta)
        free = ~self.fixed
        return (
            refit.theta,
            known.gains @ (solved.e - self.e),
            {
                "dual": solved.dual.tolist(),
                "norm": float(solved.e.norm()),
                "at_lower": int((solved.e <= lower)[free & (lower < upper)].sum()),
                "at_upper": int((solved.e >= upper)[free & (lower < upper)].sum()),
                "trust": self.trust if math.isfinite(self.trust) else "inf",
                "curvature": known.notes,
                "refit": dict(refit.stats),
            },
        )

    def accept(self) -> None:
        """Stand on the weights that were proposed."""
        self.e, self.theta = self.proposed

    def shrink(self) -> bool:
        """Halve the trust radius; where there was none, the largest change of the last step."""
        if not math.isfinite(self.trust):
            self.trust = float((self.proposed[0] - self.e).abs().max())
        self.trust /= 2
        return self.trust >= self.config.trust_min

    def widen(self, cut: bool) -> None:
        """Double the trust radius where it may have cut the request, up to 1."""
        if cut:
            self.trust = max(self.trust, min(1.0, 2 * self.trust))

    def at_rest(self) -> bool:
        """Return whether every weight that is free is 0."""
        return not bool(self.e[~self.fixed].any())

    @property
    def _effects(self) -> Effects:
        assert self.effects is not None
        return self.effects


@dataclass(frozen=True)
class Plan:
    """Weights e (n,) in the order of the objective's rows, how they were found, and what they do.

    `kept` (k,) says which goals were significant; `course` holds the points before and after, and
    why the plan ended; `noop` says why there is none.
    """

    e: Tensor
    course: Course
    request: Request
    kept: Tensor
    noop: str | None = None

    @property
    def shortfall(self) -> list[float]:
        """Share of every gap that is missing at the plan's own parameters, 0 where reached."""
        left = self.request.remaining(self.course.end.f)
        missing = left.clamp(min=0) / self.request.size.clamp(min=1e-300)
        return [0.0 if self.course.reason == "reached" else share for share in missing.tolist()]

    @property
    def shortfall_predicted(self) -> list[float]:
        """Share of every gap that was not even asked for: the request less all accepted steps."""
        asked = self.course.asked / self.request.size.clamp(min=1e-300)
        missing = (self.request.target - asked).clamp(min=0)
        return [0.0 if self.course.reason == "reached" else share for share in missing.tolist()]


def one_step(
    objective: Objective,
    ground: Ground,
    request: Request,
    first: Point,
    choose: Callable[[Effects, Tensor], tuple[Tensor, dict[str, Any]]],
    config: CorrectionConfig,
    *,
    linear: bool = False,
) -> tuple[Tensor, Course]:
    """Return the weights that `choose` takes from the effects at θ̂, and where a refit leads.

    `linear`: instead of the refit θ̂ − H_0⁻¹ Σ e_j g_j. With weights below −1 there may be no fit.
    """
    slopes = ground.slopes(first)
    slopes[:, :-1] *= request.sign.to(slopes)
    known = effects(objective, first.theta, torch.zeros(objective.n).double(), slopes, config)
    asked = request.remaining(first.f)
    e, notes = choose(known, asked)
    if linear:
        factor = objective.factor(first.theta, torch.ones_like(e), config.solver_settings)
        theta = first.theta - factor.solve(objective.gradient(first.theta, e))
    else:
        theta = objective.refit(e, first.theta, config.solver_settings).theta
    there = ground.at(theta)
    predicted = known.gains @ e
    notes |= {"asked": asked.tolist(), "predicted": predicted.tolist()}
    notes |= {"predicted_utility": float(-(known.utility @ e)), "curvature": known.notes}
    notes |= {"f": there.f.tolist(), "u": there.u, "u_selection": there.u_selection}
    course = Course(first, there, "one_step", torch.minimum(predicted, asked), [notes])
    return e, course


def rounds(
    move: WeightMove, ground: Ground, request: Request, config: CorrectionConfig, first: Point
) -> Course:
    """Return the course of the rounds; fixed deletions are refitted before the first.

    Raises:
        InfeasibleError: with `strict`, if the goal cannot be attained.
    """
    now = first
    if bool(move.fixed.any()):
        move.theta = move.objective.refit(move.e, move.theta, config.solver_settings).theta
        now = ground.at(move.theta)
    course = follow(move, ground, request, config, first, now)
    if config.strict and course.cut and course.reason != "reached":
        raise InfeasibleError(_beyond(move, request, config, course))
    return course


def _beyond(move: WeightMove, request: Request, config: CorrectionConfig, course: Course) -> str:
    """Return what was asked for, what is attainable to first order, and what came of it."""
    begun = course.begun
    assert begun is not None
    slack = slack_of(course.start, begun, config)
    left = request.remaining(begun.f)
    more = torch.where(left > 0, move.in_the_box(left, slack) * left, 0.0)
    best = request.removed(begun.f) + more
    asked, got = request.target * request.size, request.removed(course.end.f)
    share = float((CAUTION * best / request.size).min())
    advice = f"lower target (to {share:.3g}, say)" if share < request.target else "lower target"
    return (
        f"expected to remove {request.target:g} of the gap, {_row(asked)}, got {_row(got)} "
        f"({course.reason}); attainable within the box and the utility constraint, to first order: "
        f"A* = {_row(best)}, of which at most {CAUTION:g} is asked for; {advice}, widen eps_min "
        "and eps_max, or allow utility_slack"
    )


def _row(values: Tensor) -> str:
    return ", ".join(f"{value:.6g}" for value in values.tolist())


def audit(e: Tensor, labels: Tensor, groups: Tensor | None, index: Tensor) -> dict[str, Any]:
    """Return what a reader wants to know of weights: histogram, means per cell, extremes."""
    edges = [-1.0, -0.75, -0.5, -0.25, -0.05, -1e-9, 1e-9, 0.05, 0.25, 0.5, 0.75, 1.0]
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(e, inner), minlength=len(edges) - 1)
    order = torch.argsort(e, stable=True)
    ends = {
        name: [[int(index[at]), round(float(e[at]), 6)] for at in places.tolist() if e[at] != 0]
        for name, places in (("lowest", order[:20]), ("highest", order.flip(0)[:20]))
    }
    a = (1 + e).clamp(min=0)
    return {
        "edges": edges,
        "histogram": counts.tolist(),
        "cells": _cells(e, labels, groups),
        "norm": float(e.norm()),
        "changed": int((e != 0).sum()),
        "effective_n": float(a.sum() ** 2 / (a**2).sum()),
        **ends,
    }


def _cells(e: Tensor, labels: Tensor, groups: Tensor | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    codes: Sequence[int] = [0] if groups is None else torch.unique(groups).tolist()
    for code in codes:
        for label in torch.unique(labels).tolist():
            inside = labels == label
            inside = inside if groups is None else inside & (groups == code)
            if bool(inside.any()):
                row = {"label": label, "n": int(inside.sum()), "mean": float(e[inside].mean())}
                found.append(row if groups is None else {"group": code, **row})
    return found
