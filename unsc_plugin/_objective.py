"""What both kinds of training objective share: losses and their curvature in the outputs, solves.

A subclass of :class:`Objective` brings passes over its rows (gradients, products with directions);
factorisations, conjugate gradients and refits are made of them here.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from unsc_plugin._solves import (
    ACCEPTABLE,
    Curvature,
    Factor,
    Kind,
    Refit,
    cholesky,
    conjugate_gradients,
    finite,
)
from unsc_plugin.errors import ConfigError, DataError, NotApplicable, NumericalError
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import quiet

STATIONARY = 1e-9
"""A refit ends where no entry of the gradient exceeds this times n."""
NEWTON_STEPS, HALVINGS = 50, 40
ARMIJO = 1e-4


# --------------------------------------------------------------------------- losses and outputs


def soft_targets(labels: Tensor, outputs: int, smoothing: float) -> Tensor:
    """Return the smoothed targets y, float64 (m, K); K = 1 is the chance of label 1.

    >>> soft_targets(torch.tensor([0, 1]), 2, 0.2).tolist()
    [[0.9, 0.1], [0.1, 0.9]]
    """
    if outputs == 1:
        return ((1 - smoothing) * labels.double() + smoothing / 2)[:, None]
    hot = functional.one_hot(labels, outputs).double()
    return (1 - smoothing) * hot + smoothing / outputs


def row_losses(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of every row, (m, K) to (m,); one output is a logit of label 1."""
    if logits.shape[1] == 1:
        target = soft_targets(labels, 1, smoothing).to(logits.dtype)[:, 0]
        return functional.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none")
    return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


def probabilities(logits: Tensor) -> Tensor:
    """Return π, (m, K) to (m, K): softmax, or the logistic function of a single output."""
    return torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, dim=1)


def loss_slopes(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return π − y of every row, the gradient of its loss in its logits; (m, K) to (m, K)."""
    return probabilities(logits) - soft_targets(labels, logits.shape[1], smoothing)


def output_curvature(pi: Tensor, moves: Tensor) -> Tensor:
    """Return (diag π − ππᵀ)·u of every row, π (m, K) and u (m, K, k) to (m, K, k).

    That is the Hessian of the cross-entropy in its logits; for one output it is π(1 − π).
    """
    scaled = pi[:, :, None] * moves
    if pi.shape[1] == 1:
        return (1 - pi)[:, :, None] * scaled
    return scaled - pi[:, :, None] * scaled.sum(dim=1, keepdim=True)


# --------------------------------------------------------------------------- the state of a pass


@contextlib.contextmanager
def calm(model: nn.Module) -> Iterator[None]:
    """Let the body differentiate `model` twice or forward: eval mode, plain attention, no autocast.

    Off are fused attention kernels (they have no forward-mode rule), the fast path of transformer
    layers and gradient checkpointing; everything is put back after.
    """
    switched = [
        (module, name)
        for module in model.modules()
        for name in ("fused_attn", "grad_checkpointing")
        if getattr(module, name, None) is True
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    place = next((p.device.type for p in model.parameters()), "cpu")
    with quiet(model), sdpa_kernel(SDPBackend.MATH), torch.autocast(place, enabled=False):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module, name in switched:
                setattr(module, name, False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, name in switched:
                setattr(module, name, True)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers of `torch.compile` and of data-parallel training."""
    inner = getattr(model, "_orig_mod", None)
    if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module
    return model if inner is None else unwrapped(inner)


# --------------------------------------------------------------------------- the objective


class Objective(abc.ABC):
    """J_e(θ) = Σ_j a_j l_j(θ) + (μ/2)|θ|², a = 1 + e, over training rows in their order.

    l_j is the (smoothed) cross-entropy of row j without augmentation, the model in eval mode; e_j
    is 0 to keep a row, −1 to delete it. A trained model is no exact optimum, so refits use the
    tilted objective J_e(θ) − r0·θ with r0 = ∇J_0(θ̂), whose optimum at e = 0 is θ̂ itself.

    What has one value per row lies on the CPU, what has one per parameter on `device`, all in
    float64; arguments may come from anywhere. A pass reads the rows in order, so that neither the
    batch size nor the order of a loader changes more than the last digits.

    Attributes:
        n, p, num_outputs: rows, parameters in scope, outputs K (1: a logit of label 1).
        ridge: μ, on all parameters in scope.
        theta: θ̂, the parameters of the given model, float64 (p,).
        index, labels: of the rows, int64 (n,).
        stats: notes on how it is computed (`jvp_mode`, a raised ridge, ...).
    """

    dense = False
    """Whether H can be formed."""
    precise = True
    """Whether passes are made in float64."""

    def __init__(
        self, rows: Rows, theta: Tensor, outputs: int, ridge: float, smoothing: float
    ) -> None:
        if not len(rows):
            raise DataError("objective: expected training rows, got none")
        if not 0 <= ridge < float("inf"):
            raise ConfigError(f"objective: expected a finite ridge >= 0, got {ridge}")
        classes = max(outputs, 2)
        if int(rows.labels.min()) < 0 or int(rows.labels.max()) >= classes:
            span = f"{int(rows.labels.min())}..{int(rows.labels.max())}"
            raise DataError(f"objective: expected labels 0..{classes - 1}, got {span}")
        self.rows, self.n, self.p = rows, len(rows), len(theta)
        self.index, self.labels = rows.index, rows.labels
        self.theta, self.device = theta, theta.device
        self.num_outputs, self.ridge, self.smoothing = outputs, float(ridge), smoothing
        self.stats: dict[str, Any] = {}

    # -- passes over rows, brought by the subclass

    @abc.abstractmethod
    def losses(self, theta: Tensor) -> Tensor:
        """Return l_j(θ) of all rows, (n,).

        Raises:
            NumericalError: some are not finite.
        """

    @abc.abstractmethod
    def gradient(self, theta: Tensor, c: Tensor) -> Tensor:
        """Return Σ_j c_j ∇l_j(θ), (p,): the data term only, for any real c (n,).

        Raises:
            NumericalError: an entry is not finite.
        """

    @abc.abstractmethod
    def along(self, theta: Tensor, directions: Tensor) -> Tensor:
        """Return ∇l_j(θ)·v of all rows for all directions, (p, k) to (k, n), in one pass.

        Raises:
            NumericalError: some are not finite.
        """

    @abc.abstractmethod
    def outputs(self, theta: Tensor, rows: Rows) -> Tensor:
        """Return the logits of any rows, (m, K)."""

    @abc.abstractmethod
    def pullback(self, theta: Tensor, rows: Rows, cotangent: Tensor) -> Tensor:
        """Return Σ_v J_vᵀ c_v over any rows; c (m, K) to (p,), or (m, K, k) to (p, k)."""

    @abc.abstractmethod
    def write(self, model: nn.Module, theta: Tensor) -> None:
        """Put θ into the parameters of a model of the same architecture."""

    @property
    @abc.abstractmethod
    def stationarity(self) -> float | None:
        """|r0| / Σ_j |g_j|, 0 at an exact optimum; None where it would cost a pass per row."""

    @abc.abstractmethod
    def ggn_product(self, theta: Tensor, a: Tensor, directions: Tensor) -> Tensor:
        """Return Σ_j a_j GGN_j·v, (p, k) to (p, k)."""

    @abc.abstractmethod
    def ggn_trace(self, theta: Tensor, a: Tensor) -> float:
        """Return tr(Σ_j a_j GGN_j)."""

    @abc.abstractmethod
    def ggn_diagonal(self, theta: Tensor, a: Tensor) -> Tensor:
        """Return the diagonal of Σ_j a_j GGN_j, (p,)."""

    def ggn_matrix(self, theta: Tensor, a: Tensor) -> Tensor:
        """Return Σ_j a_j GGN_j, (p, p).

        Raises:
            NotApplicable: H is not formed for this model and scope.
        """
        raise NotApplicable(
            "exact curvature: expected a linear head and scope 'head'; use kind 'auto' or 'ggn_cg'"
        )

    # -- made of them

    @cached_property
    def r0(self) -> Tensor:
        """∇J_0(θ̂), (p,): what the tilt takes off every gradient."""
        return self.gradient(self.theta, torch.ones(self.n)) + self.ridge * self.theta

    def tilted_gradient(self, theta: Tensor, e: Tensor) -> Tensor:
        """Return ∇J_e(θ) − r0, (p,); at θ̂ that is Σ_j e_j g_j."""
        if torch.equal(theta, self.theta):
            return self.gradient(theta, e)
        return self.gradient(theta, 1 + e) + self.ridge * theta - self.r0

    def tilted_value(self, theta: Tensor, e: Tensor) -> float:
        """Return J_e(θ) − r0·θ."""
        data = ((1 + e).cpu() * self.losses(theta)).sum()
        return float(data) + float(theta @ (0.5 * self.ridge * theta - self.r0))

    def kind(self, settings: Curvature) -> Kind:
        """Return the kind of curvature that `settings` mean here."""
        if settings.kind == "auto":
            return "exact" if self.dense and self.p <= settings.exact_max else "ggn_cg"
        return settings.kind

    def factor(self, theta: Tensor, a: Tensor, settings: Curvature | None = None) -> Factor:
        """Return H_e = Σ_j a_j GGN_j + μI at θ, plus λI for `ggn_cg`, ready for solves.

        Raises:
            NumericalError: no Cholesky factor at the largest jitter, or a value is not finite.
            NotApplicable: `exact` where H is not formed.
        """
        settings = settings or Curvature()
        kind = self.kind(settings)
        stats: dict[str, Any] = {"kind": kind, "p": self.p, "ridge": self.ridge} | self.stats
        if kind == "identity":
            return Factor(torch.clone, self.device, stats)
        if kind == "diag":
            diagonal = self.ggn_diagonal(theta, a)[:, None] + self.ridge
            return Factor(lambda rhs: rhs / diagonal, self.device, stats)
        if kind == "exact":
            matrix = self.ggn_matrix(theta, a)
            matrix.diagonal().add_(self.ridge)
            lower, stats["jitter"] = cholesky(finite(matrix, "H"))
            return Factor(lambda rhs: torch.cholesky_solve(rhs, lower), self.device, stats)
        damping = settings.damping * self.ggn_trace(theta, a) / self.p if settings.damping else 0.0
        stats["damping"] = damping
        shift = self.ridge + damping

        def product(directions: Tensor) -> Tensor:
            return self.ggn_product(theta, a, directions) + shift * directions

        solve = partial(self._by_cg, product, settings, stats)
        return Factor(solve, self.device, stats)

    def _by_cg(
        self,
        product: Callable[[Tensor], Tensor],
        settings: Curvature,
        stats: dict[str, Any],
        rhs: Tensor,
    ) -> Tensor:
        tol = settings.cg_tol or (1e-10 if self.precise else 1e-6)
        found, iterations, residual = conjugate_gradients(product, rhs, tol, settings.cg_max_iter)
        stats |= self.stats | {"iterations": iterations, "residual": residual}
        if not residual <= ACCEPTABLE:
            raise NumericalError(
                f"conjugate gradients: expected a relative residual of {tol:g}, got {residual:.1e} "
                f"after {iterations} iterations; raise damping or cg_max_iter"
            )
        if residual > 10 * tol:
            stats["warning"] = f"CG residual {residual:.1e} after {iterations} iterations"
        return found

    def refit(self, e: Tensor, start: Tensor, settings: Curvature | None = None) -> Refit:
        """Return the minimiser of the tilted objective from `start`.

        `exact`: Newton with step halving until |∇|_∞ ≤ 1e-9·n. Other curvature: one step with it.

        Raises:
            NumericalError: Newton does not converge, or a solve fails.
        """
        settings = settings or Curvature()
        gradient = self.tilted_gradient(start, e)
        if self.kind(settings) == "exact":
            return self._newton(e, start, gradient, settings)
        if not bool(gradient.any()):
            return Refit(start, {"steps": 0, "gradient_max": 0.0})
        factor = self.factor(start, 1 + e, settings)
        theta = start - factor.solve(gradient)
        height = float(self.tilted_gradient(theta, e).abs().max())
        return Refit(theta, {"steps": 1, "gradient_max": height, "curvature": factor.stats})

    def _newton(self, e: Tensor, theta: Tensor, gradient: Tensor, settings: Curvature) -> Refit:
        jitter = 0.0
        for step in range(NEWTON_STEPS + 1):
            height = float(gradient.abs().max())
            if height <= STATIONARY * self.n:
                return Refit(theta, {"steps": step, "gradient_max": height, "jitter": jitter})
            factor = self.factor(theta, 1 + e, settings)
            jitter = max(jitter, factor.stats["jitter"])
            theta = self._halved(e, theta, gradient, -factor.solve(gradient))
            gradient = self.tilted_gradient(theta, e)
        raise NumericalError(
            f"refit: expected |gradient| <= {STATIONARY * self.n:.1e}, got {height:.1e} after "
            f"{NEWTON_STEPS} Newton steps; raise the ridge, or keep weights above -1"
        )

    def _halved(self, e: Tensor, theta: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        """Return θ + t·step with the first t = 1, ½, ¼, ... that lowers the tilted objective.

        Raises:
            NumericalError: no such t.
        """
        value, slope = self.tilted_value(theta, e), float(gradient @ step)
        noise = 1e-12 * max(1.0, abs(value))
        for halving in range(HALVINGS):
            share = 0.5**halving
            after = theta + share * step
            if self.tilted_value(after, e) <= value + ARMIJO * share * slope + noise:
                return after
        raise NumericalError(
            f"refit: expected a step that lowers the objective, found none in {HALVINGS} halvings; "
            "raise the ridge, or keep weights above -1"
        )
