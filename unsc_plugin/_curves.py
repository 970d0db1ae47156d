"""What is measured between the requests of a sequence and between the steps of a run.

Both curves are measured by the runner, never by the method, with the same predict loop as the
evaluation. What they hold is evidence: a run that diverged keeps what was measured until then.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.evaluation import CLASS_KINDS, Frame
from unsc_plugin.method import Past, Result
from unsc_plugin.metrics.accuracy import accuracy
from unsc_plugin.metrics.goal import (
    LEVELS,
    at_goal,
    came_back,
    first_reaching,
    forgotten_share,
    kl_bits,
)
from unsc_plugin.rows import Rows

WATCHED = 1024
"""A forget set of at most this many rows is predicted after every step, to find exact crossings."""

Goals = npt.NDArray[np.bool_]


# --------------------------------------------------------------------------- within a run


class Trajectory:
    """Forget, retained and test accuracy along the steps of a run; an observer of a task.

    Points are taken before the first step, after steps 1, 2, 3, 4, 6, 8, 11, 16, 23, ... (ratio
    √2), and at the first step at which a quarter, half, three quarters or all of the forget set is
    forgotten (for more than :data:`WATCHED` rows: the first of the regular steps). A point whose
    logits are not finite is left out.

    Steps that start anew mean that what went before was preparation, and other modules than the
    model (a network that makes noise, say) are trained without being looked at.
    """

    def __init__(self, original: nn.Module, frame: Frame, device: Any = None) -> None:
        self._kind, self._frame, self._device = type(original), frame, device
        self._every = len(frame.forget) <= WATCHED
        self._start = self._point(original, 0)
        self._reset()

    def _reset(self) -> None:
        self._points = [] if self._start is None else [self._start]
        shares = [forgotten_share(point["acc_forget"]) for point in self._points]
        self._open = [level for level in LEVELS if first_reaching(shares, level) is None]
        self._last = 0

    def __call__(self, model: nn.Module, step: int) -> None:
        """Look at the model after a step."""
        if type(model) is not self._kind:
            return
        if step < self._last or step == 1:
            self._reset()
        self._last = step
        due = engine.is_mark(step)
        if not due and not (self._every and self._open):
            return
        acc_forget = self._accuracy(model, self._frame.forget)
        if acc_forget is None:
            return
        share = forgotten_share(acc_forget)
        crossed = [level for level in self._open if share >= level]
        if (due or crossed) and (point := self._point(model, step)) is not None:
            self._open = [level for level in self._open if level not in crossed]
            self._points.append(point)

    def found(self, steps: int, model: nn.Module | None) -> list[dict[str, float]]:
        """Return the points of a run of so many steps; the last is `model`, the one evaluated."""
        points = [point for point in self._points if point["step"] <= steps]
        end = None if model is None else self._point(model, steps)
        if end is not None and points[-1:] != [end]:
            points.append(end)
        return points

    def _point(self, model: nn.Module, step: int) -> dict[str, float] | None:
        frame = self._frame
        found: dict[str, float] = {"step": step}
        for name in ("forget", "retain_eval", "test"):
            logits = _logits(model, getattr(frame, name), self._device)
            if logits is None:
                return None
            labels = getattr(frame, name).labels
            found[f"acc_{name.removesuffix('_eval')}"] = accuracy(logits, labels)
            if name == "test" and frame.kind in CLASS_KINDS and not bool(frame.forgotten.all()):
                kept = ~frame.forgotten
                found["acc_test_retained"] = accuracy(logits[kept], labels[kept])
        return found

    def _accuracy(self, model: nn.Module, rows: Rows) -> float | None:
        logits = _logits(model, rows, self._device)
        return None if logits is None else accuracy(logits, rows.labels)


def _logits(model: nn.Module, rows: Rows, device: Any) -> Tensor | None:
    """Return the logits on `rows`, None if one is not finite."""
    logits = engine.predict(model, rows, device=device).logits
    return logits if bool(torch.isfinite(logits).all()) else None


# --------------------------------------------------------------------------- over the requests


class Rounds:
    """The requests of a sequence: what each left behind, and what became of the earlier ones.

    After request t the instances of every request j ≤ t are predicted again: c_{t,j} counts those
    at their goal. `retained` and test rows are the same in all rounds.
    """

    def __init__(self, first: nn.Module, forget: Rows, frame: Frame, device: Any = None) -> None:
        self._first, self._all, self._frame, self._device = first, forget, frame, device
        self._first_test = _logits(first, frame.test, device)
        self._past: list[Past] = []
        self._own: list[Goals] = []
        self._rounds: list[dict[str, Any]] = []
        self._back: list[list[int]] = []

    @property
    def past(self) -> tuple[Past, ...]:
        """The requests so far, as the task of the next one has them."""
        return tuple(self._past)

    def close(self, result: Result, before: nn.Module, positions: Any) -> Result:
        """Measure what a request left behind; its result comes back.

        The result is `diverged` where the method says so in its notes, or a logit is not finite.
        `before` is the model that the request started from, `positions` are those of its rows.
        """
        rows, number = self._all.subset(positions), len(self._past)
        self._past.append(Past(rows, result.stats, result.targets))
        status = str(result.stats.get("status", result.status))
        reason, measured = result.reason or f"diverged at request {number}", None
        if "diverged" not in (status, result.status):
            measured = self._measured(result.model, before)
            reason = f"a logit is not finite after request {number}"
        self._rounds.append(
            {
                "request": number,
                "k": len(rows),
                "status": "diverged" if measured is None else status,
                "steps": result.steps,
                "seconds": result.seconds_prepare + result.seconds_unlearn,
                **(measured or {}),
            }
        )
        if measured is None:
            return dataclasses.replace(result, status="diverged", reason=reason)
        return result

    def found(self) -> list[dict[str, Any]]:
        """Return one entry per request; the last that was measured names the instances back."""
        rounds = [dict(one) for one in self._rounds]
        measured = [one for one in rounds if "at_goal" in one]
        if measured:
            measured[-1]["came_back_index"] = self._back
        return rounds

    def _measured(self, model: nn.Module, before: nn.Module) -> dict[str, Any] | None:
        """Return what is measured after a request, None if a logit is not finite."""
        frame, device = self._frame, self._device
        parts = [_logits(model, past.rows, device) for past in self._past]
        retain = _logits(model, frame.retain_eval, device)
        test = _logits(model, frame.test, device)
        if retain is None or test is None or any(part is None for part in parts):
            return None
        pairs = list(zip(self._past, parts, strict=True))
        now = [at_goal(part, past.rows.labels, past.targets) for past, part in pairs]
        self._own.append(now[-1])
        back = [came_back(own, here) for own, here in zip(self._own, now, strict=True)]
        self._back = [
            past.rows.index[torch.from_numpy(mask)].tolist()
            for past, mask in zip(self._past[:-1], back[:-1], strict=True)
        ]
        found = {
            "at_goal": [int(one.sum()) for one in now],
            "came_back": int(sum(mask.sum() for mask in back)),
            "acc_forget": [accuracy(part, past.rows.labels) for past, part in pairs],
            "acc_retain": accuracy(retain, frame.retain_eval.labels),
            "acc_test": accuracy(test, frame.test.labels),
            "distance_previous": distance(model, before),
            "distance_first": distance(model, self._first),
        }
        if self._first_test is not None:
            found["kl_test"] = kl_bits(self._first_test, test)
        return {k: v for k, v in found.items() if not isinstance(v, float) or math.isfinite(v)}


def distance(model: nn.Module, other: nn.Module) -> float:
    """Return ‖θ − θ'‖₂ over the parameters of two models of one architecture, shared ones once."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    parts = [(a.detach().cpu().double() - b.detach().cpu().double()).norm() for a, b in pairs]
    return math.hypot(*(float(part) for part in parts))
