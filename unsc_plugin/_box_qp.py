"""The quadratic problem of per-sample weights: smallest change under a few rows and a box.

    min ½|e|² − q·e    subject to    A e ≥ r,   lo ≤ e ≤ hi,

with n weights e (up to millions) and m rows (a few). Its dual has m variables: with the rows scaled
to unit length and e(y) = clip(q + Aᵀy, lo, hi),

    min_{y ≥ 0} φ(y) = Σ_j ((q + Aᵀy)_j e_j − ½e_j²) − y·r,   ∇φ = A e − r,   ∇²φ ∋ A_free A_freeᵀ,

which is convex and piecewise quadratic. It is solved by Newton steps projected onto y ≥ 0
(Bertsekas, *Projected Newton methods for optimization problems with simple constraints*, SIAM J.
Control Optim. 20, 1982); free are the weights that the box does not clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

import torch
from scipy.optimize import minimize
from torch import Tensor

from unsc_plugin._box_lp import bound, feasibility_gap, vector
from unsc_plugin.errors import ConfigError, InfeasibleError, NumericalError

TOLERANCE = 1e-12
"""Largest projected gradient at a solution, relative to the length of e (rows of length 1)."""
ROUNDING = 1e-15
"""What rounding leaves of the gradient, relative to |y|₁."""
WORST = 1e-8
"""Largest residual, relative as above, that rounding may excuse."""
ARMIJO = 1e-4
STEPS = 100
"""Most Newton steps, before and after L-BFGS-B."""
FLAT = 1e-13
"""Eigenvalues of the generalised Hessian below this count as this."""
STRETCH = 100.0
"""A step is at most this many times as long as the point and the weights together."""
FAR = 1e13
"""Duals this many times longer than e are not followed further: rounding rules there."""
PARALLEL = 1e-8
"""Relative length of F⊥ below which no direction is neutral for utility."""

Form = Literal["reach", "cap"]
Case = Literal["auto", "none", "metric", "utility", "both"]


@dataclass(frozen=True)
class BoxSolution:
    """Weights `e` (n,), multipliers `dual` (m,), Newton steps, and how exact the solution is.

    e = clip(q + Aᵀdual, lo, hi) up to rounding, in the units of the given rows. `residual` is the
    largest component of the projected dual gradient, for rows of unit length: how far e is from
    the half-spaces, and from those whose multiplier is not 0.
    """

    e: Tensor
    dual: Tensor
    iterations: int
    residual: float


# --------------------------------------------------------------------------- the box


def solve_weight_qp(
    rows: Tensor,
    targets: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    linear: Tensor | None = None,
) -> BoxSolution:
    """Return argmin ½|e|² − q·e subject to A e ≥ r and lo ≤ e ≤ hi.

    `rows` A (m, n), `targets` r (m,), bounds (n,) or one number, infinite ones included, `linear` q
    (n,) or None for 0. Scaling a row together with its target changes nothing.

    >>> solve_weight_qp(torch.tensor([[1.0, 2.0]]), torch.tensor([1.25]), -1.0, 0.5).e
    tensor([0.2500, 0.5000], dtype=torch.float64)

    Raises:
        InfeasibleError: no e in the box meets all rows.
        NumericalError: input that is not finite, or no solution to the precision above.
    """
    problem, lengths = _problem(rows, targets, lower, upper, linear)
    point, steps = _newton(problem, problem.at(torch.zeros_like(problem.r)))
    if not (problem.solved(point) or problem.lost(point)):
        point, more = _newton(problem, _quasi_newton(problem, point))
        steps += more
    if not problem.solved(point):
        _explain(problem, point)
    dual = torch.zeros_like(lengths)
    dual[lengths > 0] = point.y / lengths[lengths > 0]
    return BoxSolution(point.e, dual, steps, point.residual)


@dataclass(frozen=True)
class _Point:
    """A dual point y with z = q + Aᵀy, e = clip(z), φ(y), its gradient, and their sizes."""

    y: Tensor
    z: Tensor
    e: Tensor
    value: float
    gradient: Tensor
    residual: float
    scale: float


@dataclass(frozen=True)
class _Problem:
    """Rows of unit length, none of them 0; bounds (n,) or 0-d; q (n,)."""

    rows: Tensor
    r: Tensor
    lower: Tensor
    upper: Tensor
    linear: Tensor
    span: float = 0.0
    """Length of what is given: how long multipliers may well be."""
    highest: float = math.inf
    """Largest primal value in the box: a dual value above it proves that nothing is feasible."""

    def at(self, y: Tensor) -> _Point:
        z = y @ self.rows + self.linear
        e = torch.clamp(z, self.lower, self.upper)
        gradient = self.rows @ e - self.r
        value = float(z @ e - e @ e / 2 - y @ self.r)
        residual = float(torch.minimum(y, gradient).abs().max()) if len(y) else 0.0
        scale = max([float(e.norm()), *self.r.tolist()])
        point = _Point(y, z, e, value, gradient, residual, scale)
        if -value > self.highest + 1e-12 * (float(y.sum()) * scale + self.highest):
            raise InfeasibleError(_lacking(point))
        return point

    def solved(self, point: _Point) -> bool:
        rounding = min(ROUNDING * float(point.y.sum()), WORST * point.scale)
        return point.residual <= max(TOLERANCE * point.scale, rounding)

    def lost(self, point: _Point) -> bool:
        """Whether the multipliers have left the range where they can be followed."""
        return not float(point.y.sum()) <= FAR * max(point.scale, self.span)

    def curvature(self, point: _Point) -> Tensor:
        free = (point.z >= self.lower) & (point.z <= self.upper)
        return (self.rows * free) @ self.rows.T


def _problem(
    rows: Tensor,
    targets: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    linear: Tensor | None,
) -> tuple[_Problem, Tensor]:
    """Return the problem with rows of length 1, those of length 0 left out, and all lengths.

    Raises:
        InfeasibleError: a row of zeros with a target above 0.
        NumericalError: input that is not finite.
    """
    a = rows.detach().to("cpu", torch.float64).contiguous()
    r = vector(targets, len(a), "targets")
    n = a.shape[1]
    lo, hi = bound(lower, upper, n)
    q = torch.zeros((), dtype=torch.float64) if linear is None else vector(linear, n, "linear")
    lengths = torch.linalg.vector_norm(a, dim=1)
    if not bool(lengths.isfinite().all()):
        for number, row in enumerate(a):
            vector(row, n, f"row {number}")
        raise NumericalError("rows: lengths overflow float64\nGive them in other units.")
    empty = lengths == 0
    if bool((r[empty] > 0).any()):
        raise InfeasibleError("no weights meet a row of zeros with a target above 0")
    kept = _Problem(
        a[~empty] / lengths[~empty, None], r[~empty] / lengths[~empty], lo, hi, q.expand(n)
    )
    highest = torch.maximum(lo * lo / 2 - q * lo, hi * hi / 2 - q * hi).expand(n).sum()
    finite = bool(lo.isfinite().all()) and bool(hi.isfinite().all())
    start = kept.at(torch.zeros_like(kept.r))
    span = float(start.z.norm() + start.e.norm() + start.gradient.abs().sum())
    return replace(kept, highest=float(highest) if finite else math.inf, span=span), lengths


def _newton(problem: _Problem, point: _Point) -> tuple[_Point, int]:
    """Take projected Newton steps until the point is a solution or they get nowhere."""
    for count in range(STEPS):
        if problem.solved(point) or problem.lost(point):
            return point, count
        found = _searched(problem, point, _direction(problem, point))
        if found is None:
            return point, count
        point = found
    return point, STEPS


def _direction(problem: _Problem, point: _Point) -> Tensor:
    """Return −H⁻¹∇φ over the multipliers that may move, −∇φ over those held at 0."""
    held = (point.y <= min(point.residual, 1e-3 * point.scale)) & (point.gradient > 0)
    moving = ~held
    step = -point.gradient.clone()
    values, vectors = torch.linalg.eigh(problem.curvature(point)[moving][:, moving])
    step[moving] = vectors @ ((vectors.T @ step[moving]) / values.clamp(min=FLAT))
    longest = STRETCH * (float(point.y.norm()) + max(point.scale, problem.span))
    return step * min(1.0, longest / float(step.norm()))


def _searched(problem: _Problem, point: _Point, direction: Tensor) -> _Point | None:
    """Return max(y + t·d, 0) for the first t = 1, ½, ¼, ... that lowers φ enough.

    Where rounding hides the change of φ, halving the residual counts instead.
    """
    slack = 1e-14 * (abs(point.value) + float(point.y.sum()) * point.scale)
    for halvings in range(60):
        trial = problem.at((point.y + 0.5**halvings * direction).clamp(min=0))
        promised = float(point.gradient @ (trial.y - point.y))
        if promised < 0 and trial.value <= point.value + ARMIJO * promised:
            return trial
        if trial.value <= point.value + slack and trial.residual <= point.residual / 2:
            return trial
    return None


def _quasi_newton(problem: _Problem, point: _Point) -> _Point:
    """Return where L-BFGS-B takes the point."""

    def value(y: object) -> tuple[float, object]:
        found = problem.at(torch.as_tensor(y, dtype=torch.float64))
        return found.value, found.gradient.numpy()

    found = minimize(
        value,
        point.y.numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * len(point.y),
        options={"maxiter": 500, "ftol": 0.0, "gtol": TOLERANCE * point.scale},
    )
    return problem.at(torch.as_tensor(found.x, dtype=torch.float64))


def _explain(problem: _Problem, point: _Point) -> NoReturn:
    """Tell an infeasible problem from one that only rounding keeps from its solution.

    Raises:
        InfeasibleError: the former.
        NumericalError: the latter.
    """
    if feasibility_gap(problem.rows, problem.r, problem.lower, problem.upper) < 0:
        raise InfeasibleError(_lacking(point))
    raise NumericalError(
        f"weight problem: expected a residual of {TOLERANCE * point.scale:.1e}, "
        f"got {point.residual:.1e}\nAsk for less than what is just attainable, "
        "and leave out rows that all but oppose each other."
    )


def _lacking(point: _Point) -> str:
    lacking = (-point.gradient / point.scale).clamp(min=0).tolist()
    return (
        "no weights in the box meet the rows together; closest found, missing per row relative to "
        f"|e|: {[float(f'{value:.3g}') for value in lacking]}\nAsk for less, or widen the box."
    )


# --------------------------------------------------------------------------- without a box


def analytic_weights(
    gain: Tensor,
    utility: Tensor,
    target: float,
    lam: float = math.inf,
    form: Form = "reach",
    case: Case = "auto",
) -> tuple[Tensor, Case, tuple[float, float]]:
    """Return argmin ½|e|² − c F·e, c = 1/(2λ), without a box, in closed form.

    Subject to F·e ≥ τ (`form="reach"`) or F·e ≤ τ ("cap", as published), and U·e ≥ 0. F `gain` and
    U `utility` (n,), τ `target` ≥ 0, λ `lam` in (0, ∞]. With F⊥ = F − (F·U/|U|²)U the solution is

    ======== ============= ========= ======================================
    case     e             F·U       other test (cap; reach: the other way)
    ======== ============= ========= ======================================
    none     cF            ≥ 0       c|F|² ≤ τ
    metric   τF/|F|²       ≥ 0       c|F|² ≥ τ
    utility  cF⊥           < 0       c|F⊥|² ≤ τ
    both     τF⊥/|F⊥|²     < 0       c|F⊥|² ≥ τ
    ======== ============= ========= ======================================

    `case="auto"` takes the one whose tests pass; a named case is taken without them. Returned are
    e (n,), the case, and the multipliers of the two rows, which are below 0 only in a case that is
    not the solution. Qiao et al., *Soft-Weighted Machine Unlearning* (AAAI 2026, arXiv 2505.18783).

    >>> F, U = torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 0.0])
    >>> analytic_weights(F, U, 2.0)
    (tensor([0., 2.], dtype=torch.float64), 'both', (2.0, 2.0))

    Raises:
        ConfigError: λ or τ outside its range.
        InfeasibleError: F is 0, or F⊥ is needed and is 0 to rounding.
        NumericalError: F or U not finite.
    """
    if not (lam > 0 and 0 <= target < math.inf):
        raise ConfigError(f"expected lam > 0 and a finite target >= 0, got {lam}, {target}")
    f, u = vector(gain, len(gain), "gain"), vector(utility, len(gain), "utility")
    c, target, length = 1 / (2 * lam), float(target), float(f.norm())
    unit = u / u.norm().clamp(min=1e-300)
    along = float(f @ unit)
    uses_perp = along < 0 if case == "auto" else case in ("utility", "both")
    direction = f
    if uses_perp:
        direction = f - along * unit
        direction = direction - (direction @ unit) * unit  # once more: exact where F⊥ is short
    size = float(direction.norm())
    if uses_perp and size <= PARALLEL * length:
        raise InfeasibleError(
            f"no direction is neutral for utility: |F⊥| / |F| = {size / max(length, 1e-300):.1e}, "
            f"needed above {PARALLEL}\nAllow some utility loss, or pick another goal."
        )
    if case == "auto":
        beyond = c * size**2 > target if form == "cap" else c * size**2 < target
        case = _NAMES[uses_perp, beyond]
    if case in ("metric", "both") and size == 0:
        raise InfeasibleError("gain: expected a row that is not 0, which no weights can change")
    stretch = target / size**2 if case in ("metric", "both") else c
    pull = stretch - c if form == "reach" else c - stretch
    balance = -stretch * along / float(u.norm()) if uses_perp and along else 0.0
    return stretch * direction, case, (pull, balance)


_NAMES: dict[tuple[bool, bool], Case] = {
    (False, False): "none",
    (False, True): "metric",
    (True, False): "utility",
    (True, True): "both",
}
