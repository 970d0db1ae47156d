"""How far weights in a box can go: linear problems with one goal, solved exactly, or several."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from unsc_plugin.errors import ConfigError, DataError, InfeasibleError, NumericalError

TINY = 1e-12
"""What rounding may leave of a sum, relative to the sum of its absolute terms."""
LP_TOLERANCE = 1e-10
"""HiGHS meets rows and optimality up to this; it takes nothing smaller."""
EXACT = {"primal_feasibility_tolerance": LP_TOLERANCE, "dual_feasibility_tolerance": LP_TOLERANCE}
LARGE = 20_000
"""Above so many weights HiGHS, whose time grows with their square, sees a few vertices only."""
MOST_VERTICES = 1000
CLOSE = 1e-8
"""Bounds of the fraction, relative to its ceiling, that count as equal."""


# --------------------------------------------------------------------------- what is given


def vector(values: Tensor, count: int, name: str) -> Tensor:
    """Return `values` (count,) as float64 on the CPU.

    Raises:
        DataError: another shape.
        NumericalError: entries that are not finite.
    """
    wide = values.detach().to("cpu", torch.float64).contiguous()
    if wide.shape != (count,):
        raise DataError(f"{name}: expected shape ({count},), got {tuple(wide.shape)}")
    bad = (~wide.isfinite()).nonzero()[:5, 0].tolist()
    if bad:
        raise NumericalError(f"{name}: expected finite numbers, got others at {bad}")
    return wide


def bound(lower: Tensor | float, upper: Tensor | float, n: int) -> tuple[Tensor, Tensor]:
    """Return both bounds as float64, each (n,) or 0-d.

    Raises:
        DataError: a bound of another shape.
        ConfigError: NaN, or a lower bound above the upper one.
    """
    both = [torch.as_tensor(b, dtype=torch.float64, device="cpu") for b in (lower, upper)]
    for name, b in zip(("lower", "upper"), both, strict=True):
        if b.ndim and b.shape != (n,):
            raise DataError(f"{name}: expected one number or shape ({n},), got {tuple(b.shape)}")
    lo, hi = both
    possible = (lo <= hi) & (lo < math.inf) & (hi > -math.inf)
    if not bool(possible.all()):
        at = (~possible).expand(n).nonzero()[:5, 0].tolist()
        raise ConfigError(f"bounds: expected lower <= upper, not so at {at}")
    return lo, hi


# --------------------------------------------------------------------------- one goal


def max_linear_under_box(
    gain: Tensor,
    utility: Tensor | None,
    slack: float,
    lower: Tensor | float,
    upper: Tensor | float,
) -> tuple[float, Tensor]:
    """Return max F·e subject to U·e ≥ −δ and lo ≤ e ≤ hi, and an e (n,) that attains it.

    F `gain` and U `utility` (n,), δ `slack`, finite bounds. Without U every weight sits where F
    wants it. Weights then move to where U wants them, the cheapest first: by |F/U|, the points
    where F + bU changes sign as the multiplier b of the row grows. Exact, O(n log n); at most one
    weight ends inside its bounds. Weights with F = 0 stay as near to 0 as they can.

    >>> max_linear_under_box(torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 1.0]), 0.0, -1.0, 0.5)
    (1.5, tensor([0.5000, 0.5000], dtype=torch.float64))

    Raises:
        ConfigError: a bound that is not finite.
        DataError: vectors of different lengths.
        InfeasibleError: no e in the box has U·e ≥ −δ.
        NumericalError: F or U not finite.
    """
    n = len(gain)
    f = vector(gain, n, "gain")
    lo, hi = (b.expand(n) for b in bound(lower, upper, n))
    if not bool((lo.isfinite() & hi.isfinite()).all()):
        raise ConfigError("bounds: expected finite ones; without a box there may be no maximum")
    rest = torch.clamp(torch.zeros_like(f), lo, hi)
    e = torch.where(f > 0, hi, torch.where(f < 0, lo, rest))
    if utility is not None:
        e = _moved_for_utility(f, vector(utility, n, "utility"), slack, e, lo, hi)
    return float(f @ e), e


def _moved_for_utility(
    f: Tensor, u: Tensor, slack: float, start: Tensor, lo: Tensor, hi: Tensor
) -> Tensor:
    """Return the weights moved from `start`, in the order of what they cost, until U·e = −δ.

    Raises:
        InfeasibleError: they all moved, and it was not enough.
    """
    missing = -slack - float(u @ start)
    if missing <= 0:
        return start
    end = torch.where(u > 0, hi, lo)
    room = torch.where(u == 0, torch.zeros_like(u), u * (end - start))
    movable = (room > 0).nonzero()[:, 0]
    order = movable[torch.argsort((f[movable] / u[movable]).abs(), stable=True)]
    total = room[order].cumsum(0)
    count = int(torch.searchsorted(total, missing))
    e = start.clone()
    e[order[:count]] = end[order[:count]]
    if count < len(order):
        last = order[count]
        left = missing - (float(total[count - 1]) if count else 0.0)
        e[last] = start[last] + (end[last] - start[last]) * left / room[last]
    elif missing - float(room.sum()) > TINY * (float(u.abs() @ e.abs()) + abs(slack)):
        raise InfeasibleError(
            f"utility: no weights in the box reach {-slack:.6g}, at most {float(u @ e):.6g}"
            "\nAllow more slack, or widen the box."
        )
    return e


# --------------------------------------------------------------------------- several goals


def attainable_fraction(
    gains: Tensor,
    targets: Tensor,
    utility: Tensor | None,
    slack: float,
    lower: Tensor | float,
    upper: Tensor | float,
) -> float:
    """Return the largest φ for which F_i·e ≥ φ·τ_i for all goals i, U·e ≥ −δ, lo ≤ e ≤ hi.

    F `gains` (k, n), τ `targets` (k,), U `utility` (n,), δ `slack`. φ is not cut at 1: 2 means that
    twice every target can be had. It is infinite where no target is above 0. One goal is solved by
    :func:`max_linear_under_box`, several by HiGHS, above 20,000 weights
    from vertices of the box; both are exact to 1e-7 or better.

    >>> attainable_fraction(torch.eye(2), torch.tensor([1.0, 2.0]), None, 0.0, -1.0, 1.0)
    0.5

    Raises:
        ConfigError: a bound that is not finite.
        DataError: shapes that do not fit.
        InfeasibleError: no e in the box has U·e ≥ −δ, or no φ fits all goals.
        NumericalError: input that is not finite, or HiGHS gives up.
    """
    tau = vector(targets, len(gains), "targets")
    alone = [max_linear_under_box(f, utility, slack, lower, upper) for f in gains]
    wanted = [best / t for (best, _), t in zip(alone, tau.tolist(), strict=True) if t > 0]
    if not wanted:
        return math.inf
    if len(alone) == 1:
        return float(wanted[0])
    unit, n = abs(min(wanted)) or 1.0, gains.shape[1]
    rows, asked = gains.detach().to("cpu", torch.float64), tau * unit
    least = torch.zeros_like(tau)
    if utility is not None:
        rows = torch.cat([rows, vector(utility, n, "utility")[None]])
        asked, least = (
            torch.cat([v, v.new_full((1,), x)]) for v, x in ((asked, 0), (least, -slack))
        )
    found = None
    if n > LARGE:
        found = _by_vertices(rows, asked, least, lower, upper, [e for _, e in alone])
    if found is None:
        found = _by_highs(rows, asked, least, lower, upper)
    return unit * found


def _by_vertices(
    rows: Tensor,
    asked: Tensor,
    least: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    start: list[Tensor],
) -> float | None:
    """Return the largest x with A e ≥ least + x·asked in a finite box, from a few vertices.

    The best mix of the vertices known so far, a problem with as many unknowns, bounds x from below.
    Its multipliers y bound x from above by (max_e y·Ae − y·least) / y·asked, and the e of that
    maximum is the next vertex (Dantzig & Wolfe, *Decomposition principle for linear programs*,
    Operations Research 8, 1960). None where no mix of the first ones meets the rows.

    Raises:
        NumericalError: the bounds do not meet.
    """
    lo, hi = (b.expand(rows.shape[1]) for b in bound(lower, upper, rows.shape[1]))
    length = torch.linalg.vector_norm(rows, dim=1)
    length = torch.where(length > 0, length, torch.ones_like(length))
    a, step, floor = rows / length[:, None], asked / length, least / length
    values = [a @ e for e in (*start, torch.clamp(torch.zeros_like(lo), lo, hi))]
    for _ in range(MOST_VERTICES):
        mix = _best_mix(torch.stack(values, 1).numpy(), step.numpy(), floor.numpy())
        if mix is None:
            return None
        low, y = mix
        z = y @ a
        e = torch.where(z > 0, hi, lo)
        high = float(z @ e - y @ floor) / float(y @ step)
        if high - low <= CLOSE * max(1.0, abs(low)):
            return low
        values.append(a @ e)
    raise NumericalError(
        f"attainable fraction: expected bounds within {CLOSE} of each other, got {low}..{high}"
        "\nLeave out goals that contradict each other."
    )


def _best_mix(
    values: np.ndarray, step: np.ndarray, floor: np.ndarray
) -> tuple[float, Tensor] | None:
    """Return max x of values·λ ≥ floor + x·step, λ ≥ 0, Σλ = 1, and the multipliers of the rows."""
    count = values.shape[1]
    found = linprog(
        np.append(np.zeros(count), -1.0),
        A_ub=np.c_[-values, step],
        b_ub=-floor,
        A_eq=np.append(np.ones(count), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * count + [(None, None)],
        method="highs",
        options=EXACT,
    )
    if found.status != 0:
        return None
    return -float(found.fun), torch.from_numpy(-found.ineqlin.marginals)


def feasibility_gap(rows: Tensor, targets: Tensor, lower: Tensor, upper: Tensor) -> float:
    """Return the largest t ≤ 1 with A e ≥ r + t·scale in the box, 0 where HiGHS cannot tell.

    The scale is |r|∞ or the length of the e nearest to 0, whichever is larger.
    """
    start = torch.clamp(torch.zeros(rows.shape[1], dtype=torch.float64), lower, upper)
    scale = max(float(targets.abs().max()), float(start.norm())) or 1.0
    try:
        gap = _by_highs(rows, torch.full_like(targets, scale), targets, lower, upper)
    except NumericalError:
        return 0.0
    return gap if abs(gap) > 10 * LP_TOLERANCE else 0.0


def _by_highs(
    rows: Tensor,
    asked: Tensor,
    least: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
) -> float:
    """Return the largest x ≤ 1 with A e ≥ least + x·asked in the box.

    Raises:
        InfeasibleError: nothing satisfies the rows, whatever x is.
        NumericalError: any other failure.
    """
    n = rows.shape[1]
    lo, hi = (b.expand(n).numpy() for b in bound(lower, upper, n))
    size = rows.abs().amax(1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    found = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.c_[-(rows / size[:, None]).numpy(), (asked / size).numpy()],
        b_ub=-(least / size).numpy(),
        bounds=np.c_[np.append(lo, -np.inf), np.append(hi, 1.0)],
        method="highs",
        options=EXACT,
    )
    if found.status == 2:
        raise InfeasibleError("no weights in the box meet all rows, whatever the goals ask")
    if found.status != 0:
        raise NumericalError(f"HiGHS: expected an optimum, got {found.message!r}")
    return -float(found.fun)
