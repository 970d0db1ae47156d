"""A linear head on fixed features: every derivative in closed form, float64, H as a matrix.

With x̃ the features (and a 1 where the head has a bias), z = V x̃, π = softmax(z) and y the target:
∇l = (π − y) ⊗ x̃ and ∇²l = (diag π − ππᵀ) ⊗ x̃x̃ᵀ. θ is V (K, D) or (K, D + 1), row by row.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

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
from unsc_plugin.rows import Batch, Loader, Rows

CHUNK = 2**22
"""Entries of the largest temporary of a pass, 32 MiB in float64."""


class Features:
    """x̃ of rows in chunks: computed once per `Rows` object, or again in every pass if too large.

    Rows are known by identity and held weakly. The backbone must not change meanwhile.
    """

    def __init__(self, model: nn.Module, batch_size: int, cache_bytes: int) -> None:
        self.model, self.batch_size, self.cache_bytes = model, batch_size, cache_bytes
        head: Any = model.head
        self.bias: bool = head.bias is not None
        self.width: int = head.in_features
        self.place = head.weight.device
        self.device = torch.device("cpu") if self.place.type == "mps" else self.place
        self._known: dict[int, tuple[weakref.ref[Rows], Tensor]] = {}

    @property
    def columns(self) -> int:
        """Columns of x̃."""
        return self.width + self.bias

    def chunks(self, rows: Rows, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield (place, x̃) with so many rows that temporaries of `width` entries each are small."""
        if 8 * len(rows) * self.columns > self.cache_bytes:
            yield from self._computed(rows)
            return
        whole, size = self._cached(rows), max(1, CHUNK // max(width, self.columns))
        for start in range(0, len(rows), size):
            yield slice(start, start + size), whole[start : start + size]

    def _cached(self, rows: Rows) -> Tensor:
        held = self._known.get(id(rows))
        if held is not None and held[0]() is rows:
            return held[1]
        found = torch.empty(len(rows), self.columns, dtype=torch.float64, device=self.device)
        for place, part in self._computed(rows):
            found[place] = part
        self._known = {key: pair for key, pair in self._known.items() if pair[0]() is not None}
        self._known[id(rows)] = (weakref.ref(rows), found)
        return found

    def _computed(self, rows: Rows) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for batch in Loader(rows, self.batch_size, device=self.place):
            yield slice(start, start + len(batch)), self._of(batch)
            start += len(batch)

    def _of(self, batch: Batch) -> Tensor:
        with calm(self.model), torch.no_grad():
            features = self.model.features(**batch.inputs)  # type: ignore[operator]
        wide = finite(features.to(self.device).double(), "features", batch.index)
        return torch.cat([wide, wide.new_ones(len(wide), 1)], dim=1) if self.bias else wide


class LinearHead(Objective):
    """The objective of a linear head; see :class:`Objective`.

    `floor`: μ is raised to floor·tr(X̃ᵀX̃)/D where it is smaller, which `stats` then say.
    """

    dense = True

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        *,
        ridge: float,
        smoothing: float,
        batch_size: int,
        cache_bytes: int,
        floor: float,
    ) -> None:
        model = unwrapped(model)
        self.features = Features(model, batch_size, cache_bytes)
        head: Any = model.head
        parts = [head.weight] if head.bias is None else [head.weight, head.bias[:, None]]
        matrix = torch.cat([p.detach().to(self.features.device).double() for p in parts], dim=1)
        super().__init__(rows, matrix.reshape(-1), head.out_features, ridge, smoothing)
        least = floor * self._square_sum() / self.features.width if floor else 0.0
        if self.ridge < least:
            self.stats["ridge_asked"], self.ridge = self.ridge, least

    # -- shapes

    def _matrix(self, theta: Tensor) -> Tensor:
        return theta.to(self.device).view(self.num_outputs, self.features.columns)

    def _mine(self, values: Tensor) -> Tensor:
        return values.to(self.device).double()

    def _forward(self, theta: Tensor, rows: Rows, width: int = 1) -> Iterator[Any]:
        """Yield (place, x̃, logits) with room for `width` more entries per output."""
        matrix, room = self._matrix(theta), self.num_outputs * width
        for place, x in self.features.chunks(rows, room):
            yield place, x, x @ matrix.T

    def _residuals(self, place: slice, logits: Tensor) -> Tensor:
        return loss_slopes(logits, self.labels[place].to(self.device), self.smoothing)

    # -- passes

    def losses(self, theta: Tensor) -> Tensor:
        """Return l_j(θ) of all rows, (n,).

        Raises:
            NumericalError: some are not finite.
        """
        found = torch.empty(self.n, dtype=torch.float64)
        for place, _, logits in self._forward(theta, self.rows):
            labels = self.labels[place].to(self.device)
            found[place] = row_losses(logits, labels, self.smoothing).cpu()
        return finite(found, "losses", self.index)

    def gradient(self, theta: Tensor, c: Tensor) -> Tensor:
        """Return Σ_j c_j (π − y)_j ⊗ x̃_j, (p,).

        Raises:
            NumericalError: an entry is not finite.
        """
        weight, total = self._mine(c), torch.zeros_like(self._matrix(self.theta))
        for place, x, logits in self._forward(theta, self.rows):
            total += (weight[place, None] * self._residuals(place, logits)).T @ x
        return finite(total.reshape(-1), "gradient")

    def along(self, theta: Tensor, directions: Tensor) -> Tensor:
        """Return Σ_k (π − y)_jk (V_k·x̃_j) for every direction V, (p, k) to (k, n).

        Raises:
            NumericalError: some are not finite.
        """
        count = directions.shape[1]
        found = torch.empty(count, self.n, dtype=torch.float64)
        for place, x, logits in self._forward(theta, self.rows, count):
            moved = self._moved(x, directions)
            residuals = self._residuals(place, logits)
            found[:, place] = (moved * residuals[:, :, None]).sum(dim=1).T.cpu()
        finite(found.T, "influences", self.index)
        return found

    def _moved(self, x: Tensor, directions: Tensor) -> Tensor:
        """Return J·v of every row, (m, K, k)."""
        columns = self._mine(directions).T.reshape(-1, self.features.columns)
        return (x @ columns.T).view(len(x), -1, self.num_outputs).transpose(1, 2)

    def outputs(self, theta: Tensor, rows: Rows) -> Tensor:
        """Return the logits of any rows, (m, K)."""
        found = torch.empty(len(rows), self.num_outputs, dtype=torch.float64)
        for place, _, logits in self._forward(theta, rows):
            found[place] = logits.cpu()
        return found

    def pullback(self, theta: Tensor, rows: Rows, cotangent: Tensor) -> Tensor:
        """Return Σ_v c_v ⊗ x̃_v over any rows; c (m, K) to (p,), or (m, K, k) to (p, k)."""
        wide = self._mine(cotangent).reshape(len(rows), self.num_outputs, -1)
        count = wide.shape[2]
        total = self.theta.new_zeros(self.num_outputs, count, self.features.columns)
        for place, x in self.features.chunks(rows, self.num_outputs * count):
            total += torch.einsum("mKk,md->Kkd", wide[place], x)
        found = total.transpose(1, 2).reshape(self.p, count)
        return found[:, 0] if cotangent.ndim == 2 else found

    def write(self, model: nn.Module, theta: Tensor) -> None:
        """Put θ into the head of a model of the same architecture."""
        head: Any = unwrapped(model).head
        matrix = self._matrix(theta)
        with torch.no_grad():
            head.weight.copy_(matrix[:, : self.features.width])
            if self.features.bias:
                head.bias.copy_(matrix[:, -1])

    @cached_property
    def stationarity(self) -> float:
        """|r0| / Σ_j |π_j − y_j|·|x̃_j|, 0 at an exact optimum."""
        total = 0.0
        for place, x, logits in self._forward(self.theta, self.rows):
            lengths = self._residuals(place, logits).norm(dim=1) * x.norm(dim=1)
            total += float(lengths.sum())
        return float(self.r0.norm()) / total if total else 0.0

    # -- curvature

    def ggn_matrix(self, theta: Tensor, a: Tensor) -> Tensor:
        """Return Σ_j a_j (diag π − ππᵀ)_j ⊗ x̃_j x̃_jᵀ, (p, p).

        Rows of diag π − ππᵀ sum to 0, so that blocks of two different classes give the diagonal
        ones: K(K − 1)/2 weighted products. Beyond the result one chunk is held.
        """
        if self.num_outputs == 1:
            return self._single_output(theta, a)
        weight, size = self._mine(a), self.features.columns
        total = self.theta.new_zeros(self.p, self.p)
        for place, x, logits in self._forward(theta, self.rows, size):
            pi, scale = probabilities(logits), weight[place]
            for k in range(self.num_outputs - 1):
                pairs = (scale * pi[:, k])[:, None] * pi[:, k + 1 :]
                scaled = (pairs[:, :, None] * x[:, None]).flatten(1)
                total[k * size : (k + 1) * size, (k + 1) * size :].addmm_(x.T, scaled, alpha=-1)
        blocks = total.view(self.num_outputs, size, self.num_outputs, size)
        for k in range(self.num_outputs):
            for other in range(k + 1, self.num_outputs):
                block = blocks[k, :, other]
                blocks[other, :, k] = block.T
                blocks[k, :, k] -= block
                blocks[other, :, other] -= block
        return total

    def _single_output(self, theta: Tensor, a: Tensor) -> Tensor:
        weight, total = self._mine(a), self.theta.new_zeros(self.p, self.p)
        for place, x, logits in self._forward(theta, self.rows):
            total.addmm_(x.T, (weight[place] * self._spread(logits)[:, 0])[:, None] * x)
        return total

    def _spread(self, logits: Tensor) -> Tensor:
        pi = probabilities(logits)
        return pi * (1 - pi)

    def ggn_product(self, theta: Tensor, a: Tensor, directions: Tensor) -> Tensor:
        """Return Σ_j a_j GGN_j·v, (p, k) to (p, k)."""
        weight, count = self._mine(a), directions.shape[1]
        total = self.theta.new_zeros(self.num_outputs, count, self.features.columns)
        for place, x, logits in self._forward(theta, self.rows, count):
            curved = output_curvature(probabilities(logits), self._moved(x, directions))
            total += torch.einsum("mKk,md->Kkd", weight[place, None, None] * curved, x)
        return total.transpose(1, 2).reshape(self.p, count)

    def ggn_trace(self, theta: Tensor, a: Tensor) -> float:
        """Return tr(Σ_j a_j GGN_j), exactly."""
        return float(self.ggn_diagonal(theta, a).sum())

    def ggn_diagonal(self, theta: Tensor, a: Tensor) -> Tensor:
        """Return the diagonal of Σ_j a_j GGN_j, (p,)."""
        weight, total = self._mine(a), torch.zeros_like(self._matrix(self.theta))
        for place, x, logits in self._forward(theta, self.rows):
            total += (weight[place, None] * self._spread(logits)).T @ x**2
        return total.reshape(-1)

    def _square_sum(self) -> float:
        return sum(float((x**2).sum()) for _, x in self.features.chunks(self.rows, 1))
