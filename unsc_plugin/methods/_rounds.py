"""Small steps towards a measured goal: linearise, ask for a part of the gap, move, measure again.

What moves is left open (per-sample weights, or the parameters themselves): a :class:`Move` says how
much of a request is attainable to first order and where the smallest such change leads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unsc_plugin.attacks import Space, full_attack, open_space, pgd
from unsc_plugin.errors import NotApplicable, NumericalError
from unsc_plugin.influence import Objective
from unsc_plugin.method import Rows
from unsc_plugin.methods._correction_settings import Attack, CorrectionConfig
from unsc_plugin.methods._criteria import Criterion, mean_loss

NEAR, WIDE = 0.25, 4.0
"""A step stands if what it brought lies between these shares of what was asked."""
GOOD = 0.75
"""A step that brought at least this share may be followed by a wider one."""
CAUTION = 0.9
"""Share of what is attainable that is asked for: at the whole of it all weights sit on the box."""
NOTHING = 0.02
"""Attainable share of a gap below which a plan is exhausted."""


# --------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Point:
    """Parameters θ, the criteria f (k,) and the utility loss u there, u on the selection rows."""

    theta: Tensor
    f: Tensor
    u: float
    u_selection: float | None
    adversarial: Rows | None = None


class Ground:
    """What every point of a plan is measured on.

    `criteria` live on the rows for fitting; those named `robust` are moved to adversarial inputs
    that are made anew for every θ.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        criteria: Sequence[Criterion],
        fit: Rows,
        selection: Rows | None,
        attack: Attack,
        smoothing: float = 0.0,
    ) -> None:
        self.model, self.objective, self.criteria = model, objective, tuple(criteria)
        self.utility = mean_loss(fit, smoothing=smoothing)
        self.selection = None if selection is None else mean_loss(selection, smoothing=smoothing)
        self.attack = attack

    def at(self, theta: Tensor) -> Point:
        """Return what holds at θ."""
        adversarial = None
        if any(one.name == "robust" for one in self.criteria):
            adversarial = self._attacked(theta)
        found = [self._moved(one, adversarial) for one in self.criteria]
        f = torch.tensor([self._value(one, theta) for one in found], dtype=torch.float64)
        u_selection = None if self.selection is None else self._value(self.selection, theta)
        return Point(theta, f, self._value(self.utility, theta), u_selection, adversarial)

    def slopes(self, point: Point) -> Tensor:
        """Return ∇f_1..∇f_k and ∇u at a point as columns (p, k + 1); attacks are held fixed.

        Danskin's theorem: the gradient of a maximum is that at the maximiser.
        """
        criteria = [*(self._moved(one, point.adversarial) for one in self.criteria), self.utility]
        columns = []
        for one in criteria:
            cotangent = one.cotangent(self._logits(point.theta, one.rows))
            columns.append(self.objective.pullback(point.theta, one.rows, cotangent))
        return torch.stack(columns, dim=1)

    def errors(self, point: Point) -> Tensor:
        """Return the standard errors of the criteria (k,); of a loss, of its excess over u."""
        found = []
        for one in self.criteria:
            moved = self._moved(one, point.adversarial)
            logits = self._logits(point.theta, moved.rows)
            if not one.loss:
                found.append(moved.standard_error(logits))
                continue
            clean = self.utility.per_row(self._logits(point.theta, self.utility.rows))
            excess = moved.per_row(logits) - clean
            found.append(float(excess.std(correction=0)) / math.sqrt(len(excess)))
        return torch.tensor(found, dtype=torch.float64)

    def _value(self, one: Criterion, theta: Tensor) -> float:
        return one.value(self._logits(theta, one.rows))

    def _logits(self, theta: Tensor, rows: Rows) -> Tensor:
        """Return the logits (m, K) of rows.

        Raises:
            NumericalError: some are not finite.
        """
        logits = self.objective.outputs(theta, rows)
        wrong = torch.nonzero(~torch.isfinite(logits).all(dim=1))[:5, 0]
        if len(wrong):
            raise NumericalError(
                "expected finite outputs on the validation rows, got others for samples "
                f"{rows.index[wrong].tolist()}; check the inputs and the weights of the model"
            )
        return logits

    def _moved(self, one: Criterion, adversarial: Rows | None) -> Criterion:
        return one if one.name != "robust" or adversarial is None else one.on(adversarial)

    def _attacked(self, theta: Tensor) -> Rows:
        self.objective.write(self.model, theta)
        return attacked(self.model, self.utility.rows, self.attack)


def attacked(model: nn.Module, rows: Rows, attack: Attack, batch_size: int = 2048) -> Rows:
    """Return the rows with adversarial inputs: untargeted PGD of the loss, all steps taken.

    Raises:
        NotApplicable: inputs that are no numbers, such as texts.
    """
    cfg = full_attack(attack.norm, attack.budget, attack.steps, attack.starts)
    parts: list[Tensor] = []
    place = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        positions = torch.arange(start, min(start + batch_size, len(rows)))
        batch = rows.gather(positions).to(place)
        space: Space = open_space(model, batch.inputs)
        if space.key == "input_ids":
            raise NotApplicable(
                "criterion robust: expected pixels or table columns, got texts, whose embeddings "
                "cannot be kept as inputs; use a criterion of groups or utility"
            )
        seeds = [int(i) % 2**32 for i in batch.index]
        found = pgd(model, batch.inputs, batch.labels, cfg, space=space, seeds=seeds)
        parts.append((space.x + found.delta).to(batch.inputs[space.key].dtype))
        key = space.key
    inputs = torch.cat(parts)
    return Rows.of({key: inputs}, rows.labels, rows.index, group=rows.group)


# --------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Request:
    """Signs s, natural zeros z and sizes |f_0 − z| of the goals (k,), and the share t to remove."""

    sign: Tensor
    zero: Tensor
    size: Tensor
    target: float

    @classmethod
    def of(
        cls, criteria: Sequence[Criterion], start: Point, target: float, signed: bool
    ) -> Request:
        """Return the request to remove the share `target` of the gaps at `start`.

        A gap has the sign of its value and zero 0; a loss has sign + and the utility loss as zero.
        Not `signed`: every gap is to fall by the share of |f_0|, also one below 0, as published.
        """
        loss = torch.tensor([one.loss for one in criteria])
        zero = torch.where(loss, torch.full_like(start.f, start.u), 0.0)
        size, below = (start.f - zero).abs(), ~loss & (start.f < 0)
        sign = torch.ones_like(start.f)
        if signed:
            sign = torch.where(below, -sign, sign)
        else:
            zero = torch.where(below, start.f - size, zero)
        return cls(sign, zero, size, target)

    def only(self, kept: Tensor) -> Request:
        """Return the request for some of the goals, `kept` (k,)."""
        return Request(self.sign[kept], self.zero[kept], self.size[kept], self.target)

    def remaining(self, f: Tensor) -> Tensor:
        """Return how far s·f lies above its target (k,): z + (1 − t)·size."""
        return self.sign * f - (self.zero + (1 - self.target) * self.size)


class Move(Protocol):
    """What can be changed to move θ."""

    def linearise(self, point: Point, slopes: Tensor) -> None:
        """Take the first-order effects at a point, slopes (p, k + 1) of s·f and u."""

    def attainable(self, asked: Tensor, slack: float) -> float:
        """Return the largest common share of the positive requests that can be met."""

    def propose(self, asked: Tensor, slack: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return θ after the smallest change with at least those effects, its effects, notes."""

    def accept(self) -> None:
        """Stand on what was proposed."""

    def shrink(self) -> bool:
        """Trust the next step less far; False where it would be too short."""

    def widen(self, cut: bool) -> None:
        """Trust the next step farther; `cut`: the last one was for less than was wanted."""

    def at_rest(self) -> bool:
        """Return whether nothing that may be changed is changed."""


@dataclass
class Course:
    """How the rounds went: the last point, why they ended, and a row of notes per round."""

    start: Point
    end: Point
    reason: str
    asked: Tensor
    rounds: list[dict[str, Any]] = field(default_factory=list)
    cut: bool = False


def follow(
    move: Move, ground: Ground, request: Request, config: CorrectionConfig, first: Point, now: Point
) -> Course:
    """Take rounds until every goal is reached, or no further step is possible.

    `first` is the point of the original parameters, `now` where the rounds begin. Where only one
    round is allowed its step stands whatever it brought.
    """
    course = Course(first, now, "max_rounds", torch.zeros_like(request.size))
    most, near = _largest_steps(ground, config) * request.size, config.tol * request.size
    fresh = True
    for _ in range(config.max_rounds):
        now = course.end
        left = request.remaining(now.f)
        if _reached(left, near, move.at_rest()):
            course.reason = "reached"
            return course
        if fresh:
            slopes = ground.slopes(now)
            slopes[:, :-1] *= request.sign.to(slopes)
            move.linearise(now, slopes)
        slack = _slack(first, now, config)
        asked, wanting = torch.minimum(left, most), left > 0
        share = move.attainable(asked, slack) if bool(wanting.any()) else math.inf
        if bool(wanting.any()) and bool((share * asked <= NOTHING * request.size)[wanting].all()):
            course.reason, course.cut = "exhausted", True
            return course
        cut = share * CAUTION < 1
        if cut:
            asked = torch.where(asked > 0, CAUTION * share * asked, asked)
        theta, predicted, notes = move.propose(asked, slack)
        there = ground.at(theta)
        brought = request.sign * (now.f - there.f)
        ratio = torch.where(predicted == 0, 0.0, brought / predicted)
        stop = _judged(ratio, (brought - predicted).abs() <= near, there, first, config)
        told = {"asked": asked, "predicted": predicted, "ratio": ratio, "f": there.f}
        notes |= {name: values.tolist() for name, values in told.items()}
        limit = share if math.isfinite(share) else "inf"
        notes |= {"attainable": limit, "cut": cut, "accepted": stop is None}
        course.rounds.append(notes | {"u": there.u, "u_selection": there.u_selection})
        fresh = stop is None
        if stop == "trust_region" and move.shrink():
            continue
        if stop is not None:
            course.reason = stop
            return course
        move.accept()
        course.end, course.cut, course.asked = there, cut, course.asked + asked
        if bool((ratio > GOOD)[asked > 0].all()):
            move.widen(cut)
    if _reached(request.remaining(course.end.f), near, move.at_rest()):
        course.reason = "reached"
    return course


def _largest_steps(ground: Ground, config: CorrectionConfig) -> Tensor:
    """Return the largest share of every gap that one round may ask for (k,)."""
    shares = [0.1 if one.loss else 0.25 for one in ground.criteria]
    step = torch.tensor(shares, dtype=torch.float64)
    return step if config.step is None else torch.full_like(step, config.step)


def _reached(left: Tensor, near: Tensor, at_rest: bool) -> bool:
    """Return whether no goal is farther off than `near`, and not all are overshot needlessly.

    A goal that another one drags along may end beyond its target; a change that overshoots all of
    them is larger than it need be, unless there is none.
    """
    return bool((left <= near).all()) and (at_rest or bool((left >= -near).any()))


def _slack(first: Point, now: Point, config: CorrectionConfig) -> float:
    """Return how far the utility loss may rise in a round; 0: first-order neutral every time."""
    if config.utility_slack == 0:
        return 0.0
    return max(0.0, first.u * (1 + config.utility_slack) - now.u)


def _judged(
    ratio: Tensor, close: Tensor, there: Point, first: Point, config: CorrectionConfig
) -> str | None:
    """Return why a step is not taken, None if it is.

    Of several goals one that comes `close` to its prediction is not held to the share of nearly
    nothing.
    """
    kept = (ratio >= NEAR) & (ratio <= WIDE)
    if len(kept) > 1:
        kept |= close
    if config.max_rounds > 1 and not bool(kept.all()):
        return "trust_region"
    if config.utility_stop is None or there.u_selection is None or first.u_selection is None:
        return None
    costly = there.u_selection > (1 + config.utility_stop) * first.u_selection
    return "utility_stop" if costly else None
