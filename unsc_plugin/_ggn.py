"""Matrix-free objective of any network: forward and backward products, nothing of size n·p.

Σ a_j J_jᵀ(diag π − ππᵀ)J_j·v (generalised Gauss-Newton; Schraudolph, Neural Computation 2002)
takes one forward-mode and one reverse-mode pass. Where an operation has no forward rule, J·v comes
from two reverse passes: J·v = ∂(Jᵀw · v)/∂w.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from unsc_plugin._objective import (
    Objective,
    calm,
    loss_slopes,
    output_curvature,
    probabilities,
    row_losses,
    unwrapped,
)
from unsc_plugin._solves import finite
from unsc_plugin.errors import NotApplicable, NumericalError
from unsc_plugin.rows import Batch, Loader, Rows

TOGETHER = 4
"""Directions pushed through the network at once: activations are held so many times."""
PROBES = 10
"""Random vectors of the trace estimate."""
AGREEMENT = 1e-3
"""Relative gap up to which forward and reverse mode agree; a wrong rule is off by far more."""

Named = dict[str, Tensor]
Function = Callable[[Named], Tensor]
Mode = Literal["jvp", "double_vjp"]


# --------------------------------------------------------------------------- derivatives


def forward_mode(function: Function, at: Named, tangents: Named) -> tuple[Tensor, Tensor]:
    """Return f and J·v for k tangents (k, *shape) at once, (*output) and (k, *output).

    The value is computed once for all tangents.
    """

    def one(tangent: Named) -> tuple[Tensor, Tensor]:
        value, moved = jvp(function, (at,), (tangent,))  # type: ignore[misc]
        return value, moved

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operations without a batching rule are only slower
        found: tuple[Tensor, Tensor]
        found = vmap(one, out_dims=(None, 0))(tangents)  # type: ignore[arg-type]
        return found


def double_reverse(function: Function, at: Named, tangents: Named) -> tuple[Tensor, Tensor]:
    """Return the same by two reverse passes: Jᵀw is linear in w, and its slope along v is J·v."""
    leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
    with torch.enable_grad():
        output = function(leaves)
        dummy = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(
            output, list(leaves.values()), dummy, create_graph=True, allow_unused=True
        )
        rows = []
        for number in range(len(next(iter(tangents.values())))):
            parts = [
                (p * tangents[name][number]).sum()
                for name, p in zip(leaves, pulled, strict=True)
                if p is not None
            ]
            [slope] = torch.autograd.grad(torch.stack(parts).sum(), dummy, retain_graph=True)
            rows.append(slope)
    return output.detach(), torch.stack(rows).detach()


PUSH: dict[Mode, Callable[[Function, Named, Named], tuple[Tensor, Tensor]]] = {
    "jvp": forward_mode,
    "double_vjp": double_reverse,
}


def disagreement(function: Function, at: Named, tangents: Named, pushed: Tensor) -> float:
    """Return |w·(Jv) − (Jᵀw)·v| over the sum of the sizes of their terms; 0 where modes agree."""
    leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
    sign = torch.ones_like(pushed[0])
    sign.view(-1)[::2] = -1
    with torch.enable_grad():
        output = function(leaves)
        pulled = gradients(output, leaves, sign)
    terms = [(p * tangents[name][0]).double() for name, p in zip(leaves, pulled, strict=True)]
    forward = (sign * pushed[0]).double()
    scale = float(forward.abs().sum()) + sum(float(t.abs().sum()) for t in terms)
    gap = float(forward.sum()) - sum(float(t.sum()) for t in terms)
    return abs(gap) / scale if scale else 0.0


def gradients(output: Tensor, leaves: Named, cotangent: Tensor, keep: bool = False) -> list[Tensor]:
    """Return Jᵀw for every leaf, zeros where the output does not depend on it."""
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves.values()]
    found = torch.autograd.grad(
        output, list(leaves.values()), cotangent, retain_graph=keep, allow_unused=True
    )
    return [
        torch.zeros_like(leaf) if part is None else part
        for leaf, part in zip(leaves.values(), found, strict=True)
    ]


# --------------------------------------------------------------------------- the objective


class Network(Objective):
    """The objective in the parameters `names` of any classifier; see :class:`Objective`.

    Tied parameters count once, under their first name. Passes are made in the model's precision
    (losses and sums in float64) and read rows of weight 0 not at all.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        names: Sequence[str],
        *,
        ridge: float,
        smoothing: float,
        batch_size: int,
    ) -> None:
        self.model, self.batch_size = unwrapped(model), batch_size
        known = dict(self.model.named_parameters())
        self.shapes = {name: known[name].shape for name in names}
        self.sizes = [known[name].numel() for name in names]
        first = known[names[0]]
        self.place = first.device
        self.dtypes = {name: known[name].dtype for name in names}
        self.precise = all(dtype == torch.float64 for dtype in self.dtypes.values())
        wide = torch.device("cpu") if self.place.type == "mps" else self.place
        theta = torch.cat([known[name].detach().to(wide).double().view(-1) for name in names])
        super().__init__(rows, theta, self._count_outputs(rows), ridge, smoothing)
        self.stats["jvp_mode"] = None

    def _count_outputs(self, rows: Rows) -> int:
        if not len(rows):
            return 2
        batch = rows.gather([0]).to(self.place)
        with calm(self.model), torch.no_grad():
            logits = self.model(**batch.inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise NotApplicable(f"objective: expected logits (rows, outputs), got {got}; wrap it")
        return int(logits.shape[1])

    # -- flat and named parameters

    def _named(self, theta: Tensor) -> Named:
        """Return θ (p,) as tensors of the model, or directions (p, k) as tangents (k, *shape)."""
        lead = theta.shape[1:]
        rows = theta.to(self.device).T if lead else theta.to(self.device)
        parts = torch.split(rows, self.sizes, dim=-1)
        return {
            name: part.reshape(*lead, *shape).to(self.dtypes[name]).to(self.place)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.detach().reshape(-1).to(self.device).double() for part in parts])

    def write(self, model: nn.Module, theta: Tensor) -> None:
        """Put θ into the parameters of a model of the same architecture."""
        known = dict(unwrapped(model).named_parameters())
        with torch.no_grad():
            for name, value in self._named(theta).items():
                known[name].copy_(value)

    # -- functions of the parameters

    def _logits(self, inputs: Named) -> Function:
        def function(parameters: Named) -> Tensor:
            logits: Tensor = functional_call(self.model, parameters, (), inputs)
            return logits.to(self.device).double()

        return function

    def _losses(self, parameters: Named, batch: Batch) -> Tensor:
        logits = self._logits(batch.inputs)(parameters)
        return row_losses(logits, batch.labels.to(self.device), self.smoothing)

    def _batches(self, rows: Rows) -> Iterator[tuple[slice, Batch]]:
        start = 0
        for batch in Loader(rows, self.batch_size, device=self.place):
            yield slice(start, start + len(batch)), batch
            start += len(batch)

    def _weighted(self, c: Tensor) -> tuple[Rows, Tensor]:
        """Return the rows with a weight other than 0, and their weights."""
        at = torch.nonzero(c.cpu())[:, 0]
        return self.rows.subset(at), c.cpu()[at].to(self.device).double()

    def _push(self, inputs: Named, at: Named, tangents: Named) -> tuple[Tensor, Tensor]:
        """Return logits (m, K) and J·v (m, K, k) of a batch; the first call finds out how."""
        function, count = self._logits(inputs), len(next(iter(tangents.values())))
        groups = [
            {name: value[start : start + TOGETHER] for name, value in tangents.items()}
            for start in range(0, count, TOGETHER)
        ]
        if self.stats["jvp_mode"] is None:
            self.stats["jvp_mode"] = self._probe(function, at, groups[0])
        push = PUSH[self.stats["jvp_mode"]]
        found = [push(function, at, group) for group in groups]
        return found[0][0], torch.cat([moved for _, moved in found]).permute(1, 2, 0)

    def _probe(self, function: Function, at: Named, tangents: Named) -> Mode:
        """Return how J·v is computed: forward mode where it works and agrees with reverse mode."""
        try:
            _, pushed = forward_mode(function, at, tangents)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            self.stats["jvp_reason"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            return "double_vjp"
        gap = disagreement(function, at, tangents, pushed)
        if gap > AGREEMENT:
            self.stats["jvp_reason"] = f"forward and reverse mode differ by {gap:.1e}"
            return "double_vjp"
        return "jvp"

    # -- passes

    def losses(self, theta: Tensor) -> Tensor:
        """Return l_j(θ) of all rows, (n,).

        Raises:
            NumericalError: some are not finite.
        """
        at, found = self._named(theta), torch.empty(self.n, dtype=torch.float64)
        with calm(self.model), torch.no_grad():
            for place, batch in self._batches(self.rows):
                found[place] = self._losses(at, batch).cpu()
        return finite(found, "losses", self.index)

    def gradient(self, theta: Tensor, c: Tensor) -> Tensor:
        """Return Σ_j c_j ∇l_j(θ), (p,), by one reverse pass over the rows with c_j ≠ 0.

        Raises:
            NumericalError: an entry is not finite.
        """
        rows, weight = self._weighted(c)
        leaves, total = self._leaves(theta), torch.zeros_like(self.theta)
        with calm(self.model), torch.enable_grad():
            for place, batch in self._batches(rows):
                losses = self._losses(leaves, batch)
                finite(losses.detach(), "losses", batch.index)
                total += self._flat(gradients(losses, leaves, weight[place]))
        return finite(total, "gradient")

    def _leaves(self, theta: Tensor) -> Named:
        return {name: value.requires_grad_() for name, value in self._named(theta).items()}

    def along(self, theta: Tensor, directions: Tensor) -> Tensor:
        """Return ∇l_j(θ)·v = (π − y)_j·(J_j v) for all directions, (p, k) to (k, n), in one pass.

        Raises:
            NumericalError: some are not finite.
        """
        at, tangents = self._named(theta), self._named(directions)
        found = torch.empty(directions.shape[1], self.n, dtype=torch.float64)
        with calm(self.model):
            for place, batch in self._batches(self.rows):
                logits, moved = self._push(batch.inputs, at, tangents)
                labels = batch.labels.to(self.device)
                slopes = loss_slopes(logits, labels, self.smoothing)
                found[:, place] = (slopes[:, :, None] * moved).sum(dim=1).T.cpu()
        finite(found.T, "influences", self.index)
        return found

    def outputs(self, theta: Tensor, rows: Rows) -> Tensor:
        """Return the logits of any rows, (m, K)."""
        at = self._named(theta)
        found = torch.empty(len(rows), self.num_outputs, dtype=torch.float64)
        with calm(self.model), torch.no_grad():
            for place, batch in self._batches(rows):
                found[place] = self._logits(batch.inputs)(at).cpu()
        return found

    def pullback(self, theta: Tensor, rows: Rows, cotangent: Tensor) -> Tensor:
        """Return Σ_v J_vᵀ c_v over any rows; c (m, K) to (p,), or (m, K, k) to (p, k)."""
        wide = cotangent.to(self.device).double().reshape(len(rows), self.num_outputs, -1)
        leaves, total = self._leaves(theta), self.theta.new_zeros(self.p, wide.shape[2])
        with calm(self.model), torch.enable_grad():
            for place, batch in self._batches(rows):
                total += self._pulled(self._logits(batch.inputs)(leaves), leaves, wide[place])
        return total[:, 0] if cotangent.ndim == 2 else total

    def _pulled(self, logits: Tensor, leaves: Named, cotangents: Tensor) -> Tensor:
        """Return Jᵀc for all cotangents (m, K, k) of a batch, (p, k)."""
        last = cotangents.shape[2] - 1
        columns = [
            self._flat(gradients(logits, leaves, cotangents[:, :, d], keep=d < last))
            for d in range(last + 1)
        ]
        return torch.stack(columns, dim=1)

    @property
    def stationarity(self) -> None:
        """None: Σ_j |g_j| would take one backward pass per row."""
        return None

    # -- curvature

    def ggn_product(self, theta: Tensor, a: Tensor, directions: Tensor) -> Tensor:
        """Return Σ_j a_j GGN_j·v, (p, k) to (p, k)."""
        rows, weight = self._weighted(a)
        at, leaves = self._named(theta), self._leaves(theta)
        tangents, total = self._named(directions), torch.zeros_like(directions)
        with calm(self.model), torch.enable_grad():
            for place, batch in self._batches(rows):
                values, moved = self._push(batch.inputs, at, tangents)
                curved = output_curvature(probabilities(values), moved)
                logits = self._logits(batch.inputs)(leaves)
                total += self._pulled(logits, leaves, weight[place, None, None] * curved)
        return total

    def ggn_trace(self, theta: Tensor, a: Tensor) -> float:
        """Return tr(Σ_j a_j GGN_j) as a mean of vᵀGGN·v over random signs v (Hutchinson 1989).

        Raises:
            NumericalError: it is not finite.
        """
        rows, weight = self._weighted(a)
        at, total = self._named(theta), 0.0
        generator = torch.Generator().manual_seed(0)
        with calm(self.model):
            for start in range(0, PROBES, TOGETHER):
                count = min(TOGETHER, PROBES - start)
                signs = torch.randint(0, 2, (self.p, count), generator=generator)
                tangents = self._named((2 * signs - 1).to(torch.int8))
                for place, batch in self._batches(rows):
                    logits, moved = self._push(batch.inputs, at, tangents)
                    curved = output_curvature(probabilities(logits), moved)
                    total += float((weight[place, None, None] * moved * curved).sum())
        if total != total:
            raise NumericalError("tr(GGN): expected a number, got NaN; check the inputs")
        return total / PROBES

    def ggn_diagonal(self, theta: Tensor, a: Tensor) -> Tensor:
        """Return the diagonal of Σ_j a_j GGN_j, (p,): one backward pass per row and class.

        GGN_j = Σ_y π_y s_y s_yᵀ with s_y = Jᵀ(onehot_y − π) the score of class y.
        """
        rows, weight = self._weighted(a)
        leaves, total = self._leaves(theta), torch.zeros_like(self.theta)
        with calm(self.model), torch.enable_grad():
            for at in range(len(rows)):
                batch = rows.gather([at]).to(self.place)
                logits = self._logits(batch.inputs)(leaves)
                scores = self._pulled(logits, leaves, class_scores(logits.detach()))
                total += weight[at] * (scores**2).sum(dim=1)
        return total


def class_scores(logits: Tensor) -> Tensor:
    """Return √π_y·(onehot_y − π) for every class y, logits (m, K) to (m, K, K).

    They are the columns of a root of diag π − ππᵀ. One output has the single score √(π(1 − π)).
    """
    pi = probabilities(logits)
    if pi.shape[1] == 1:
        return (pi * (1 - pi)).sqrt()[:, :, None]
    hot = torch.eye(pi.shape[1], dtype=pi.dtype, device=pi.device)
    return (hot - pi[:, :, None]) * pi[:, None, :].sqrt()
