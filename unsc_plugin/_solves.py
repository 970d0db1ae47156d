"""Curvature settings, and solves with a symmetric positive definite H: Cholesky, CG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from unsc_plugin.errors import ConfigError, NumericalError

Kind = Literal["auto", "exact", "ggn_cg", "diag", "identity"]

JITTERS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Shares of tr(H)/p that are added to the diagonal, in turn, until H has a Cholesky factor."""
ACCEPTABLE = 1e-2
"""Relative residual of conjugate gradients up to which a solve is used, with a warning."""


# --------------------------------------------------------------------------- settings and results


@dataclass(frozen=True)
class Curvature:
    """How H_e = Σ a_j GGN_j + μI is represented.

    Attributes:
        kind: `exact` (linear heads: dense, Cholesky), `ggn_cg` (products only, conjugate
            gradients), `diag`, `identity`; `auto` takes `exact` for a linear head with at most
            `exact_max` parameters, else `ggn_cg`.
        exact_max: most parameters of a dense H; 8192 take 0.5 GiB.
        damping: `ggn_cg` adds λ = damping·tr(Σ a_j GGN_j)/p to the diagonal.
        cg_tol: relative residual asked for; None is 1e-10 in float64, else 1e-6.
        cg_max_iter: most products with H of a solve.

    Raises:
        ConfigError: an unknown kind, or a value outside its range.
    """

    kind: Kind = "auto"
    exact_max: int = 8192
    damping: float = 1e-3
    cg_tol: float | None = None
    cg_max_iter: int = 200

    def __post_init__(self) -> None:
        kinds = ("auto", "exact", "ggn_cg", "diag", "identity")
        tolerance = 1.0 if self.cg_tol is None else self.cg_tol
        wanted = {
            "kind": (self.kind in kinds, "one of " + ", ".join(kinds)),
            "exact_max": (self.exact_max >= 0, ">= 0"),
            "damping": (0 <= self.damping < float("inf"), "a finite number >= 0"),
            "cg_tol": (0 < tolerance <= 1, "within (0, 1], or None"),
            "cg_max_iter": (self.cg_max_iter >= 1, ">= 1"),
        }
        for name, (holds, expected) in wanted.items():
            if not holds:
                found = getattr(self, name)
                raise ConfigError(f"Curvature: expected {name} {expected}, got {found!r}")


@dataclass(frozen=True)
class Factor:
    """H_e, ready for solves; `stats` says how it is represented and how the last solve went."""

    apply: Callable[[Tensor], Tensor]
    device: torch.device
    stats: dict[str, Any] = field(default_factory=dict)

    def solve(self, rhs: Tensor) -> Tensor:
        """Return H_e⁻¹·rhs; (p,) or (p, k) to the same shape, float64.

        Raises:
            NumericalError: conjugate gradients did not converge, or a value is not finite.
        """
        wide = rhs.to(self.device).double().reshape(len(rhs), -1)
        found = self.apply(finite(wide, "right-hand side of a solve"))
        return finite(found, "solve").reshape(rhs.shape)


@dataclass(frozen=True)
class Refit:
    """Parameters (p,) after a refit; `stats` holds steps and the largest entry of the gradient."""

    theta: Tensor
    stats: dict[str, Any]


def finite(values: Tensor, stage: str, index: Tensor | None = None) -> Tensor:
    """Return `values`, one per row; `index` names the rows.

    Raises:
        NumericalError: some are not finite; the message names the first five.
    """
    good = torch.isfinite(values)
    if bool(good.all()):
        return values
    rows = torch.nonzero(~good.reshape(len(values), -1).all(dim=1))[:5, 0].cpu()
    where = "entries" if index is None else "samples"
    named = (rows if index is None else index[rows]).tolist()
    raise NumericalError(
        f"{stage}: expected finite values, got NaN or infinity at {where} {named}; check the "
        "inputs and the weights of the model"
    )


# --------------------------------------------------------------------------- solvers


def cholesky(matrix: Tensor) -> tuple[Tensor, float]:
    """Return the lower factor of `matrix` (p, p) and what had to be added to its diagonal.

    Raises:
        NumericalError: not positive definite even with the largest of :data:`JITTERS`.
    """
    mean = float(matrix.diagonal().mean())
    for share in JITTERS:
        shifted = matrix.clone() if share else matrix
        shifted.diagonal().add_(share * mean)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return factor, share * mean
    raise NumericalError(
        f"Cholesky: expected a positive definite H of size {len(matrix)}, found none even with "
        f"{JITTERS[-1]:g}·tr(H)/p on its diagonal; raise the ridge, or keep weights above -1"
    )


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], rhs: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, int, float]:
    """Return X with H·X ≈ rhs, the iterations made and the true relative residual.

    `product` maps (p, k) to H·(p, k) with H symmetric positive definite; all columns go through it
    together, each with its own steps. The residual is max_k |b_k − H x_k| / |b_k|.

    >>> conjugate_gradients(lambda v: 2 * v, torch.ones(3, 1), 1e-6, 9)[1:]
    (1, 0.0)
    """
    size = torch.linalg.vector_norm(rhs, dim=0)
    scale = torch.where(size > 0, size, 1.0)
    found, rest, way = torch.zeros_like(rhs), rhs.clone(), rhs.clone()
    height = (rest**2).sum(dim=0)
    iterations = 0
    while iterations < max_iter:
        moving = height.sqrt() > tol * scale
        if not bool(moving.any()):
            break
        image = product(way)
        slope = (way * image).sum(dim=0)
        moving &= slope > 0
        if not bool(moving.any()):
            break
        step = torch.where(moving, height / slope, 0.0)
        found += step * way
        rest -= step * image
        after = (rest**2).sum(dim=0)
        way = rest + torch.where(moving, after / height, 0.0) * way
        height = torch.where(moving, after, height)
        iterations += 1
    if iterations == 0:
        return found, 0, float((height.sqrt() / scale).max())
    left = torch.linalg.vector_norm(rhs - product(found), dim=0) / scale
    return found, iterations, float(left.max())
