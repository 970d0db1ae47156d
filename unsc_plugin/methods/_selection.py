"""Which rows to drop, and other rules that give weights without the quadratic problem.

All take influences: `gain` F (n,) with F·e the predicted improvement of the metric for weights e,
and `utility` U (n,) with −U·e the predicted rise of the utility loss. So dropping row j (e_j = −1)
improves the metric where F_j < 0 and utility where U_j < 0. Ties go to the lower index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from unsc_plugin.errors import ConfigError, DataError, NumericalError


@dataclass(frozen=True)
class Selection:
    """Weights `e` (n,) float64 and what the influences predict for them."""

    e: Tensor
    size: int
    """Rows whose weight is below 0."""
    improvement: float
    """F·e, in units of the metric."""
    utility: float | None
    """−U·e, the rise of the utility loss; None without U."""
    shortfall: float
    """What is missing to the target, in units of the metric, at least 0."""
    threshold: float | None = None
    """Every row with e ≤ −threshold was dropped, before ties; None where there was no such rule."""
    relaxed: bool = False
    """The constraints could not be met, and the weaker problem was solved instead."""


def selection(
    e: Tensor, gain: Tensor, target: float, utility: Tensor | None = None, **notes: float | None
) -> Selection:
    """Return weights with what influences predict for them; `notes` are further fields.

    Raises:
        DataError: vectors of different lengths.
    """
    for name, values in (("gain", gain), ("utility", utility)):
        if values is not None and values.shape != e.shape:
            raise DataError(f"{name}: expected {tuple(e.shape)}, got {tuple(values.shape)}")
    reached = float(gain.double() @ e)
    change = None if utility is None else -float(utility.double() @ e)
    missing = max(0.0, target - reached)
    return Selection(e, int((e < 0).sum()), reached, change, missing, **notes)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- whole rows


def hard(
    gain: Tensor, target: float, fraction: float | None = None, utility: Tensor | None = None
) -> Selection:
    """Drop the rows that harm the metric, the worst first, until −Σ F_j reaches the target.

    `fraction` drops ⌊fraction·n⌋ rows instead, fewer where fewer harm. U only adds its prediction.

    >>> hard(torch.tensor([-1.0, 2.0, -3.0, -2.0]), target=4.0).e.tolist()
    [0.0, 0.0, -1.0, -1.0]

    Raises:
        ConfigError: a fraction outside [0, 1].
    """
    return _worst_first(gain, gain < 0, target, fraction, utility)


def hard_utility(
    gain: Tensor, utility: Tensor, target: float, fraction: float | None = None
) -> Selection:
    """Do as :func:`hard` among the rows that harm the metric and utility alike.

    They may run out before the target is reached, which the shortfall says.

    Raises:
        ConfigError: a fraction outside [0, 1].
    """
    return _worst_first(gain, (gain < 0) & (utility < 0), target, fraction, utility)


def _worst_first(
    gain: Tensor, eligible: Tensor, target: float, fraction: float | None, utility: Tensor | None
) -> Selection:
    order = torch.argsort(gain, stable=True)
    order = order[eligible[order]]
    if fraction is None:
        count = _first_reaching(-gain.double()[order], target)
        count = len(order) if count is None else count
    elif 0 <= fraction <= 1:
        count = int(fraction * len(gain) + 1e-9)
    else:
        raise ConfigError(f"fraction: expected 0..1, got {fraction}")
    return selection(_dropped(len(gain), order[:count]), gain, target, utility)


def harden(
    e: Tensor, gain: Tensor, utility: Tensor | None = None, threshold: float | None = None
) -> Selection:
    """Return the set form of soft weights, for methods that know sets only.

    Without a threshold it is matched: of the rows with e < 0 in ascending order of e, the fewest
    whose predicted improvement −Σ F_j reaches F·e of the soft weights, which is the target here.
    If none do, those with the largest. With a threshold h: all rows with e ≤ −h.

    >>> harden(torch.tensor([-0.5, 0.2, -0.1, -0.3]), torch.tensor([-0.5, 1.0, -1.0, 0.0])).e
    tensor([-1., 0., -1., -1.], dtype=torch.float64)

    Raises:
        ConfigError: a threshold that is not above 0.
    """
    soft = float(gain.double() @ e.double())
    order = torch.argsort(e, stable=True)
    if threshold is None:
        order = order[e[order] < 0]
        steps = -gain.double()[order]
        count = _first_reaching(steps, soft)
        if count is None:
            count = int(torch.cat([steps.new_zeros(1), steps.cumsum(0)]).argmax())
        threshold = -float(e[order[count - 1]]) if count else None
    elif threshold > 0:
        count = int((e <= -threshold).sum())
    else:
        raise ConfigError(f"threshold: expected a number above 0, got {threshold}")
    return selection(_dropped(len(e), order[:count]), gain, soft, utility, threshold=threshold)


def _first_reaching(steps: Tensor, target: float) -> int | None:
    """Return the fewest first steps whose sum is at least the target; None if no sum is."""
    if target <= 0:
        return 0
    reached = (steps.cumsum(0) >= target).nonzero()
    return int(reached[0]) + 1 if len(reached) else None


def _dropped(n: int, rows: Tensor) -> Tensor:
    e = torch.zeros(n, dtype=torch.float64)
    e[rows] = -1.0
    return e


# --------------------------------------------------------------------------- linear programme


def li_liu(
    gain: Tensor, utility: Tensor, target: float, gamma: float = 0.0, alpha: float = 0.2
) -> Selection:
    """Return the weights e = −x, x in [0, 1], of the linear programme of Li & Liu.

        min Σ x   subject to   F·x ≤ −τ,   U·x ≤ γ Σ_{U<0} U,

    and where that has no solution (`relaxed`), min F·x subject to U·x ≤ 0, Σ x ≤ αn. *Achieving
    Fairness at No Utility Cost via Data Reweighing with Influence* (ICML 2022); solved by HiGHS.

    Raises:
        ConfigError: γ or α outside [0, 1].
        NumericalError: HiGHS gives up.
    """
    if not (0 <= gamma <= 1 and 0 <= alpha <= 1):
        raise ConfigError(f"gamma, alpha: expected numbers in 0..1, got {gamma}, {alpha}")
    f, u = (np.asarray(v.detach().cpu().double().numpy()) for v in (gain, utility))
    ones = np.ones(len(f))
    x = None
    if target < -f[f < 0].sum():
        x = _least(ones, [(f, -target), (u, gamma * u[u < 0].sum())])
    relaxed = x is None
    if x is None:
        x = _least(f / (np.abs(f).max() or 1.0), [(u, 0.0), (ones, alpha * len(f))])
    if x is None:
        raise NumericalError("HiGHS: expected a solution where x = 0 is one, found none")
    e = -torch.from_numpy(np.clip(x, 0, 1))
    return selection(e + 0.0, gain, target, utility, relaxed=relaxed)


def _least(cost: np.ndarray, rows: list[tuple[np.ndarray, float]]) -> np.ndarray | None:
    """Return argmin cost·x, x in [0, 1], row·x ≤ limit; None if nothing is feasible.

    Raises:
        NumericalError: HiGHS gives up.
    """
    sizes = [np.abs(row).max() or 1.0 for row, _ in rows]
    found = linprog(
        cost,
        A_ub=np.stack([row / size for (row, _), size in zip(rows, sizes, strict=True)]),
        b_ub=[limit / size for (_, limit), size in zip(rows, sizes, strict=True)],
        bounds=(0, 1),
        method="highs",
    )
    if found.status not in (0, 2):
        raise NumericalError(f"HiGHS: expected an optimum, got {found.message!r}")
    return np.asarray(found.x) if found.status == 0 else None


# --------------------------------------------------------------------------- without influences


def reweighing(labels: Tensor, groups: Tensor, num_classes: int) -> Tensor:
    """Return e = P(g)P(y)/P(g, y) − 1 (n,), which makes label and group independent; 0 where g < 0.

    `labels` and `groups` int64 (n,); frequencies over the rows with g ≥ 0. Kamiran & Calders, *Data
    preprocessing techniques for classification without discrimination*, KAIS 33 (2012).

    >>> reweighing(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]), 2).tolist()
    [-0.5, 0.5, -0.25, -0.25]

    Raises:
        DataError: different lengths, a label outside 0..num_classes−1, or no group at all.
    """
    known = groups >= 0
    if labels.shape != groups.shape or not bool(known.any()):
        raise DataError(
            f"groups: expected {tuple(labels.shape)} with some at least 0, got "
            f"{tuple(groups.shape)}, {int(known.sum())} of them\nName a column with groups."
        )
    y, g = labels[known].long(), groups[known].long()
    if bool(((y < 0) | (y >= num_classes)).any()):
        raise DataError(
            f"labels: expected 0..{num_classes - 1}, got {int(y.min())}..{int(y.max())}"
        )
    cells = torch.bincount(g * num_classes + y, minlength=(int(g.max()) + 1) * num_classes)
    table = cells.double().view(-1, num_classes)
    expected = table.sum(1, keepdim=True) * table.sum(0) / len(y)
    e = torch.zeros(len(labels), dtype=torch.float64)
    e[known] = (expected / table)[g, y] - 1
    return e


def permuted(e: Tensor, seed: int) -> Tensor:
    """Return the weights in an order drawn from `seed`: the same values, no information."""
    generator = torch.Generator().manual_seed(seed)
    return e[torch.randperm(len(e), generator=generator)]
