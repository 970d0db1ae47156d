"""Differentiable criteria of a correction: fairness gaps and losses as weighted sums over rows.

Every criterion is f(θ) = Σ_v c_v φ_v(θ) over fixed rows v, with coefficients c from one count over
labels and groups. One pass of logits gives its value and its cotangent ∂f/∂z, exact for any batch
size. A gap is signed: the group that is named first (code 1 where nothing is named) counts plus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from unsc_plugin.errors import ConfigError, DataError
from unsc_plugin.method import Rows

CRITERIA = ("utility", "dp", "eop", "eo", "eop_loss", "group_loss", "robust")
LEAST_ROWS = 10
"""Fewest rows of a cell that a gap may be estimated from."""


@dataclass(frozen=True)
class Goal:
    """What is to be corrected.

    `criterion` is one of :data:`CRITERIA`; `groups` = (counted plus, counted minus), by default
    (1, 0), or every group against all of them where the data have more than two; `positive_class`
    is the class whose probability is compared, 1 in a problem of two classes.
    """

    criterion: str
    groups: tuple[int, int] | None = None
    positive_class: int | None = None


@dataclass(frozen=True)
class Criterion:
    """f(θ) = Σ_v c_v φ_v(θ) with φ the probability of class `of`, or the loss.

    Attributes:
        name: the criterion, with its group or class where there are several.
        rows: what f is measured on.
        coefficient: c, float64 (m,).
        cell: which mean a row belongs to, −1 for none, int64 (m,); for standard errors.
        of: the class whose probability φ is; None: φ is the cross-entropy.
        smoothing: label smoothing of that cross-entropy.
        loss: whether f is a loss, whose natural zero is the clean loss, and not a gap.
    """

    name: str
    rows: Rows
    coefficient: Tensor
    cell: Tensor
    of: int | None = None
    smoothing: float = 0.0
    loss: bool = False

    def per_row(self, logits: Tensor) -> Tensor:
        """Return φ (m,) of the logits (m, K) of the rows."""
        if self.of is not None:
            return logits.softmax(dim=1)[:, self.of]
        return functional.cross_entropy(
            logits, self.rows.labels, reduction="none", label_smoothing=self.smoothing
        )

    def value(self, logits: Tensor) -> float:
        """Return f."""
        return float(self.coefficient @ self.per_row(logits.double()))

    def cotangent(self, logits: Tensor) -> Tensor:
        """Return ∂f/∂z, float64 (m, K): c p_k (e_k − p), or c (p − y) with y the smoothed label."""
        p = logits.double().softmax(dim=1)
        if self.of is not None:
            one = functional.one_hot(torch.tensor(self.of), p.shape[1]).double()
            return (self.coefficient * p[:, self.of])[:, None] * (one - p)
        hot = functional.one_hot(self.rows.labels, p.shape[1]).double()
        target = (1 - self.smoothing) * hot + self.smoothing / p.shape[1]
        return self.coefficient[:, None] * (p - target)

    def standard_error(self, logits: Tensor) -> float:
        """Return √(Σ_cells var φ · Σ_{v in cell} c_v²): of a difference of means √(Σ var φ/n)."""
        phi = self.per_row(logits.double())
        total = 0.0
        for cell in torch.unique(self.cell[self.cell >= 0]):
            inside = self.cell == cell
            total += float(phi[inside].var(correction=0)) * float(
                (self.coefficient[inside] ** 2).sum()
            )
        return math.sqrt(total)

    def on(self, rows: Rows) -> Criterion:
        """Return the same criterion on other inputs of the same rows."""
        return replace(self, rows=rows)


def build(goal: Goal, rows: Rows, num_classes: int, smoothing: float = 0.0) -> list[Criterion]:
    """Return the criteria of a goal on rows: one, or one per group or class.

    Raises:
        ConfigError: an unknown criterion, or a positive class that is not there or not given.
        DataError: no groups, a group that does not occur, or too few rows of one.
    """
    if goal.criterion not in CRITERIA:
        raise ConfigError(
            f"goals: expected a criterion of {', '.join(CRITERIA)}, got {goal.criterion!r}"
        )
    if goal.criterion in ("utility", "robust"):
        return [mean_loss(rows, goal.criterion, smoothing)]
    positive = _positive(goal, num_classes)
    contrasts = _contrasts(goal, rows)
    if goal.criterion == "eo":
        kinds = [(label, label if num_classes > 2 else positive) for label in range(num_classes)]
        return [
            _gap(f"eo[y={label}]{name}", rows, sides, label=label, of=of)
            for name, sides in contrasts
            for label, of in kinds
        ]
    losses = goal.criterion in ("eop_loss", "group_loss")
    label = positive if goal.criterion in ("eop", "eop_loss") else None
    found = [
        _gap(goal.criterion + name, rows, sides, label=label, of=None if losses else positive)
        for name, sides in contrasts
    ]
    if not losses:
        return found
    # A loss that is higher for the group counted minus is what is unfair: the sign turns around.
    return [replace(one, coefficient=-one.coefficient, smoothing=smoothing) for one in found]


def mean_loss(rows: Rows, name: str = "utility", smoothing: float = 0.0) -> Criterion:
    """Return the mean cross-entropy over the rows."""
    count = len(rows)
    coefficient = torch.full((count,), 1 / count, dtype=torch.float64)
    cell = torch.zeros(count, dtype=torch.int64)
    return Criterion(name, rows, coefficient, cell, smoothing=smoothing, loss=True)


Sides = tuple[Tensor, Tensor]


def _contrasts(goal: Goal, rows: Rows) -> list[tuple[str, Sides]]:
    """Return (name, masks of the rows that count plus and minus) of every contrast.

    Raises:
        DataError: no groups, or one that does not occur.
    """
    group = rows.group
    if group is None:
        raise DataError(
            f"criterion {goal.criterion} compares groups, but the validation rows have none; name "
            "the group column of the data set (columns.group)"
        )
    there = [int(code) for code in torch.unique(group[group >= 0])]
    if goal.groups is None and len(there) > 2:
        among = group >= 0
        return [(f"[group {code}]", (group == code, among)) for code in there]
    plus, minus = goal.groups or (1, 0)
    for code in (plus, minus):
        if code not in there:
            raise DataError(
                f"criterion {goal.criterion}: expected rows of groups {plus} and {minus}, got "
                f"{_counts(rows)}; one group is empty"
            )
    return [("", (group == plus, group == minus))]


def _gap(name: str, rows: Rows, sides: Sides, *, label: int | None, of: int | None) -> Criterion:
    """Return the mean of φ over one side less that over the other, of one label if given.

    Raises:
        DataError: too few rows on a side.
    """
    inside = torch.ones(len(rows), dtype=torch.bool) if label is None else rows.labels == label
    coefficient = torch.zeros(len(rows), dtype=torch.float64)
    cell = torch.full((len(rows),), -1, dtype=torch.int64)
    for sign, side in ((1.0, sides[0]), (-1.0, sides[1])):
        chosen = side & inside
        count = int(chosen.sum())
        if count < LEAST_ROWS:
            raise DataError(
                f"criterion {name}: expected at least {LEAST_ROWS} rows in each cell, got {count}; "
                f"the rows are {_counts(rows)}: give more validation rows, or another goal"
            )
        coefficient[chosen] += sign / count
        cell[chosen & (cell < 0)] = 0 if sign > 0 else 1
    return Criterion(name, rows, coefficient, cell, of)


def _positive(goal: Goal, num_classes: int) -> int:
    if goal.positive_class is None:
        needed = goal.criterion in ("dp", "eop", "eop_loss")
        if num_classes > 2 and needed:
            raise ConfigError(
                f"goals: criterion {goal.criterion} needs positive_class with {num_classes} classes"
            )
        return 1
    if not 0 <= goal.positive_class < num_classes:
        raise ConfigError(
            f"goals: expected positive_class within 0..{num_classes - 1}, got {goal.positive_class}"
        )
    return goal.positive_class


def _counts(rows: Rows) -> str:
    """Return how many rows every (group, label) cell has, as text."""
    group = rows.group
    assert group is not None
    pairs = [
        (code, label, int(((group == code) & (rows.labels == label)).sum()))
        for code in torch.unique(group).tolist()
        for label in torch.unique(rows.labels).tolist()
    ]
    return ", ".join(f"(group {code}, label {label}): {count}" for code, label, count in pairs)


def cut(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows | None]:
    """Return the rows for fitting and those for selection, cut within every (label, group) cell.

    ⌈fraction·n⌉ of the n rows of a cell are for fitting; a fraction of 1 leaves no selection rows.
    """
    if fraction >= 1:
        return rows, None
    generator = torch.Generator().manual_seed(seed)
    group = rows.group if rows.group is not None else torch.zeros_like(rows.labels)
    key = group * (int(rows.labels.max()) + 1) + rows.labels
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    for cell in torch.unique(key):
        here = torch.nonzero(key == cell)[:, 0]
        order = torch.randperm(len(here), generator=generator)
        chosen[here[order[: math.ceil(fraction * len(here))]]] = True
    rest = torch.nonzero(~chosen)[:, 0]
    return rows.subset(torch.nonzero(chosen)[:, 0]), rows.subset(rest) if len(rest) else None


def values(criteria: Sequence[Criterion], logits: Sequence[Tensor]) -> Tensor:
    """Return f of every criterion, float64 (k,)."""
    pairs = zip(criteria, logits, strict=True)
    return torch.tensor([one.value(z) for one, z in pairs], dtype=torch.float64)
