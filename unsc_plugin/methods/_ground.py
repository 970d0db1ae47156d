"""What the points of a plan are measured on: criteria and utility, at parameters θ, also attacked.

Adversarial inputs are made anew for every θ. The published code froze those of the original model;
that is here too, to show what it measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from unsc_plugin.attacks import (
    full_attack,
    linear_margin,
    linear_overshoot,
    open_space,
    pgd,
)
from unsc_plugin.errors import NotApplicable, NumericalError
from unsc_plugin.influence import Objective
from unsc_plugin.method import Batch, Rows
from unsc_plugin.methods._correction_settings import Attack
from unsc_plugin.methods._criteria import Criterion, mean_loss

Adversary = Callable[[nn.Module, Rows], Rows]
"""Returns rows with the inputs that a model is attacked by."""
BATCH = 2048


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

    `criteria` live on the rows for fitting; those named `robust` are moved to adversarial inputs.
    `model` is at θ̂ when it is given and belongs to the ground from then on.
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
        self.adversary = adversary(attack, model, fit) if self._attacks else None

    @property
    def _attacks(self) -> bool:
        return any(one.name == "robust" for one in self.criteria)

    def at(self, theta: Tensor) -> Point:
        """Return what holds at θ."""
        adversarial = self._attacked(theta) if self._attacks else None
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
        assert self.adversary is not None
        self.objective.write(self.model, theta)
        return self.adversary(self.model, self.utility.rows)


# --------------------------------------------------------------------------- adversarial inputs


def adversary(attack: Attack, original: nn.Module, rows: Rows) -> Adversary:
    """Return what makes adversarial inputs: for the model at hand, or frozen at the original.

    Raises:
        NotApplicable: the frozen attack of a model that is not linear in the inputs of `rows`.
    """
    if attack.kind == "adaptive":
        return partial(attacked, attack=attack)
    place = next(original.parameters()).device
    first = rows.gather(torch.arange(min(len(rows), BATCH))).to(place)
    return partial(_overshot, *linear_margin(original, first.inputs))


def attacked(model: nn.Module, rows: Rows, attack: Attack, batch_size: int = BATCH) -> Rows:
    """Return the rows with adversarial inputs: untargeted PGD of the loss, all steps taken.

    Raises:
        NotApplicable: inputs that are no numbers, such as texts.
    """
    cfg = full_attack(attack.norm, attack.budget, attack.steps, attack.starts)

    def move(batch: Batch) -> tuple[str, Tensor]:
        space = open_space(model, batch.inputs)
        if space.key == "input_ids":
            raise NotApplicable(
                "criterion robust: expected pixels or table columns, got texts, whose embeddings "
                "cannot be kept as inputs; use a criterion of groups or utility"
            )
        seeds = [int(i) % 2**32 for i in batch.index]
        found = pgd(model, batch.inputs, batch.labels, cfg, space=space, seeds=seeds)
        return space.key, space.x + found.delta

    return _moved(rows, move, next(model.parameters()).device, batch_size)


def _overshot(key: str, weight: Tensor, bias: Tensor, _: nn.Module, rows: Rows) -> Rows:
    """Return the rows beyond the boundary of a linear classifier, whatever the model is by now."""
    return _moved(
        rows, lambda batch: (key, linear_overshoot(weight, bias, batch.inputs[key])), weight.device
    )


def _moved(
    rows: Rows,
    move: Callable[[Batch], tuple[str, Tensor]],
    place: torch.device,
    batch_size: int = BATCH,
) -> Rows:
    """Return the rows with the inputs that `move` gives for every batch, under their key."""
    parts: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        positions = torch.arange(start, min(start + batch_size, len(rows)))
        batch = rows.gather(positions).to(place)
        key, moved = move(batch)
        parts.append(moved.to(batch.inputs[key].dtype))
    return Rows.of({key: torch.cat(parts)}, rows.labels, rows.index, group=rows.group)
