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
from torch import Tensor

from unsc_plugin.methods._correction_settings import CorrectionConfig
from unsc_plugin.methods._criteria import Criterion
from unsc_plugin.methods._ground import Ground, Point

NEAR, WIDE = 0.25, 4.0
"""A step stands if what it brought lies between these shares of what was asked."""
GOOD = 0.75
"""A step that brought at least this share may be followed by a wider one."""
CAUTION = 0.9
"""Share of what is attainable that is asked for: at the whole of it all weights sit on the box."""
NOTHING = 0.02
"""Attainable share of a gap below which a plan is exhausted."""


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
        Not `signed`: everything is to fall by the share of |f_0|, as published: a gap below 0 too,
        and a loss towards 0.
        """
        loss = torch.tensor([one.loss for one in criteria])
        zero = torch.where(loss & signed, torch.full_like(start.f, start.u), 0.0)
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

    def removed(self, f: Tensor) -> Tensor:
        """Return what is gone of the gaps at f (k,): z + size − s·f."""
        return self.zero + self.size - self.sign * f

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
    """How the rounds went: the last point, why they ended, and a row of notes per round.

    `begun` is the point that the last round is linear at; `cut`: that round could not be asked for
    all that was wanted.
    """

    start: Point
    end: Point
    reason: str
    asked: Tensor
    rounds: list[dict[str, Any]] = field(default_factory=list)
    cut: bool = False
    begun: Point | None = None


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
            course.begun = now
        slack = slack_of(first, now, config)
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


def slack_of(first: Point, now: Point, config: CorrectionConfig) -> float:
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
