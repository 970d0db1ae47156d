"""Gram algebra of layer inputs: subspaces, projectors and drift. Tensors in, tensors out.

A layer that is linear in its input columns is `Y = W X` with W [g, o, d] and X [g, d, N]; g groups
(1 unless a convolution is grouped), o outputs per group, d inputs per column, N columns. All that
null-space methods need of X is its Gram matrix `G = X Xᵀ` [g, d, d], which adds up over samples and
can be subtracted again. Everything is float64 and acts per group.

Chen, Zhu, Yu, Zhou, *Machine Unlearning via Null Space Calibration* (IJCAI 2024, arXiv 2404.13588)
use the subspaces; Saha, Garg, Roy, *Gradient Projection Memory for Continual Learning* (ICLR 2021,
arXiv 2103.09762) the sequential merge.

Also the quadratic and linear problems of per-sample weights in a box, whose rows are influences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unsc_plugin._box_lp import attainable_fraction as attainable_fraction
from unsc_plugin._box_lp import max_linear_under_box as max_linear_under_box
from unsc_plugin._box_qp import BoxSolution as BoxSolution
from unsc_plugin._box_qp import Case as Case
from unsc_plugin._box_qp import Form as Form
from unsc_plugin._box_qp import analytic_weights as analytic_weights
from unsc_plugin._box_qp import solve_weight_qp as solve_weight_qp

CHUNK = 8192
"""Columns per product: what is added in the columns' own precision before float64 takes over."""
SLACK = 1e-12
"""Energies are compared up to this, and smaller eigenvalues than this share of the first are 0."""
CLUSTER = 1e-9
"""Eigenvalues closer than this (relative) are one eigenspace, which is never cut in two."""
CENTRED = 0.2
"""Share of the energy that a mean must hold to be taken out of products in float32."""
NARROW = 128
"""Widest columns that are multiplied in float64 always, which costs little for them."""
GPU_EIGH = 2000
"""Matrices wider than this are decomposed on the GPU if they lie there."""

Rule = Literal["reach", "below"]


# --------------------------------------------------------------------------- Gram matrices


@dataclass
class Gram:
    """Second moments of columns: `matrix` X Xᵀ [g, d, d], `total` X·1 [g, d], `count` N; float64.

    >>> gram = Gram.zeros(1, 2)
    >>> gram.add(torch.tensor([[[1.0, 1.0], [0.0, 2.0]]]))
    >>> gram.matrix.tolist(), gram.total.tolist(), gram.count
    ([[[2.0, 2.0], [2.0, 4.0]]], [[2.0, 2.0]], 2)
    """

    matrix: Tensor
    total: Tensor
    count: int

    @classmethod
    def zeros(cls, groups: int, d: int, device: torch.device | str | None = None) -> Gram:
        """Return the Gram of no columns; a device without float64 is replaced by the CPU."""
        if device is not None and torch.device(device).type == "mps":
            device = "cpu"
        matrix = torch.zeros(groups, d, d, dtype=torch.float64, device=device)
        return cls(matrix, matrix.new_zeros(groups, d), 0)

    @property
    def trace(self) -> Tensor:
        """Energy of every group, tr G [g]."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)

    def add(self, columns: Tensor) -> None:
        """Add columns [g, d, N], multiplied in their own precision, summed in float64.

        Narrow columns (d ≤ 128) are multiplied in float64 too. Columns that :func:`centre_of` says
        have a large mean are multiplied without it.
        """
        where = self.matrix.device
        for part in torch.split(columns, CHUNK, dim=-1):
            if part.shape[1] <= NARROW:
                part = part.to(summing(part))
            total = part.sum(-1, dtype=summing(part)).to(where)
            centre = centre_of(part, total)
            if centre is None:
                self.put(torch.bmm(part, part.mT), total, part.shape[-1])
            else:
                spread = part - centre[..., None]
                self.put(torch.bmm(spread, spread.mT), total, part.shape[-1], centre)

    def put(self, product: Tensor, total: Tensor, count: int, centre: Tensor | None = None) -> None:
        """Add `count` columns x with sum `total` by their product Σ x xᵀ, or Σ (x−c)(x−c)ᵀ.

        With a `centre` c [g, d]: Σ x xᵀ = Σ (x−c)(x−c)ᵀ + m cᵀ + c mᵀ − N c cᵀ, m the total.
        """
        self.matrix += product.to(self.matrix.device)
        total = total.to(self.total)
        if centre is not None:
            c = centre.to(self.total)
            sides = torch.stack([total - count / 2 * c, c], -1)
            self.matrix.baddbmm_(sides, sides.flip(-1).mT)
        self.total += total
        self.count += count

    def merge(self, other: Gram) -> None:
        """Add the columns that `other` holds."""
        self.matrix += other.matrix
        self.total += other.total
        self.count += other.count

    def subtract(self, other: Gram) -> None:
        """Take the columns that `other` holds out again."""
        self.matrix -= other.matrix
        self.total -= other.total
        self.count -= other.count

    def augmented(self, scale: float) -> Gram:
        """Return the Gram of the columns [x; s] that a bias b/s sees: [[G, s·m], [s·mᵀ, s²·N]]."""
        groups, d = self.total.shape
        wide = Gram.zeros(groups, d + 1, self.matrix.device)
        wide.matrix[:, :d, :d] = self.matrix
        wide.matrix[:, :d, d] = wide.matrix[:, d, :d] = scale * self.total
        wide.matrix[:, d, d] = scale**2 * self.count
        wide.total[:, :d] = self.total
        wide.total[:, d] = scale * self.count
        wide.count = self.count
        return wide

    def pack(self) -> Tensor:
        """Return the upper triangle [g, d(d+1)/2], row by row."""
        row, column = _triangle(self.matrix.shape[-1], self.matrix.device)
        return self.matrix[:, row, column]

    @classmethod
    def unpack(cls, packed: Tensor, total: Tensor, count: int) -> Gram:
        """Return the exactly symmetric Gram of a packed triangle."""
        groups, d = total.shape
        row, column = _triangle(d, packed.device)
        matrix = packed.new_zeros(groups, d, d)
        matrix[:, row, column] = packed
        matrix[:, column, row] = packed
        return cls(matrix, total.clone(), int(count))


def centre_of(columns: Tensor, total: Tensor) -> Tensor | None:
    """Return the mean c [g, d] of columns [g, d, N] if they are to be centred before a product.

    What a float32 product rounds away is relative to what it multiplies: where the mean holds a
    fifth of the energy or more, products of x − c are closer to exact. Float64 needs none of it.
    """
    count = columns.shape[-1]
    if columns.dtype == torch.float64 or not count:
        return None
    centre = (total / count).to(columns)
    energy = float(torch.linalg.vector_norm(columns)) ** 2
    held = count * float(torch.linalg.vector_norm(centre)) ** 2
    return centre if held > CENTRED * energy else None


def summing(part: Tensor) -> torch.dtype:
    """Return the precision in which the device of a tensor can sum: float64 but on MPS."""
    return torch.float32 if part.device.type == "mps" else torch.float64


@functools.lru_cache(maxsize=2)  # one layer's buckets are unpacked one after the other
def _triangle(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    row, column = torch.triu_indices(d, d, device=device)
    return row, column


# --------------------------------------------------------------------------- eigenspaces


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [g, d] falling, negative ones set to 0, and eigenvectors [g, d, d].

    Float64 always; on the GPU only where it pays. Inputs that are always 0 (borders of small maps,
    dead channels) are eigenvectors of their own and left out of the solver's work.
    """
    home = matrix.device
    if home.type != "cpu" and not (home.type == "cuda" and matrix.shape[-1] > GPU_EIGH):
        matrix = matrix.cpu()
    live = (matrix.diagonal(dim1=-2, dim2=-1) > 0).any(0)
    count = int(live.sum())
    if count in (0, len(live)):
        values, vectors = _solved(matrix)
    else:
        values, vectors = matrix.new_zeros(matrix.shape[:-1]), torch.zeros_like(matrix)
        inner, turned = _solved(matrix[:, live][..., live])
        values[:, -count:] = inner  # rising, so the zeros come first
        vectors[:, live, -count:] = turned
        vectors[:, ~live, :-count] = torch.eye(len(live) - count).to(matrix)
    return values.flip(-1).clamp(min=0).to(home), vectors.flip(-1).to(home)


def _solved(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return rising eigenvalues and eigenvectors; a solver that gives up gets M + c·1 instead."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # LinAlgError is one
        shift = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None].cpu()
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
        values, vectors = torch.linalg.eigh(matrix.cpu() + shift[..., None] * eye)
        values = values - shift
    return values.to(matrix.device), vectors.to(matrix.device)


def energy_rank(eigenvalues: Tensor, eps: float, rule: Rule = "reach") -> int:
    """Return how many of the falling eigenvalues λ (d,) hold the share `eps` of their sum.

    `reach`: the smallest r with Σ_{i≤r} λ_i ≥ eps·Σλ; eps = 1 counts all λ_i > 1e-12·λ_1. `below`:
    the number of r with Σ_{i≤r} λ_i < eps·Σλ, one less, as published code counts.

    >>> [energy_rank(torch.tensor([0.98, 0.01, 0.01]), eps) for eps in (0.97, 0.985, 1.0)]
    [1, 2, 3]
    >>> energy_rank(torch.tensor([0.98, 0.01, 0.01]), 0.97, "below")
    0
    """
    values = eigenvalues.double()
    total = float(values.sum())
    if total <= 0:
        return 0
    kept = values.cumsum(0) / total
    if rule == "below":
        return int((kept < eps).sum())
    if eps >= 1:
        return int((values > SLACK * values[0]).sum())
    return min(int((kept < eps - SLACK).sum()) + 1, len(values))


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis per group whose first `ranks[i]` vectors span what must be kept.

    `vectors` [g, d, d]; `eigenvalues` [g, d] of the merged Gram, falling (empty for a sequential
    merge); `energies` [B] the share of tr G_b that the span keeps of every bucket (NaN for an empty
    one); `left` [B, g] the energy outside it.
    """

    vectors: Tensor
    eigenvalues: Tensor
    ranks: tuple[int, ...]
    energies: Tensor
    left: Tensor

    @property
    def d(self) -> int:
        """Width of a column."""
        return self.vectors.shape[1]

    @property
    def free(self) -> int:
        """Directions left to updates, summed over the groups."""
        return sum(self.d - rank for rank in self.ranks)


def balanced_basis(grams: Sequence[Gram], weights: Sequence[float], eps: float) -> Basis:
    """Return the class-balanced subspace that keeps the share `eps` of every bucket's energy.

    M = Σ_b k_b·G_b / tr G_b with `weights` k; V its eigenvectors, eigenvalues falling;
    C_b(r) = Σ_{i≤r} v_iᵀ G_b v_i / tr G_b; r the smallest with min_b C_b(r) ≥ eps − 1e-12
    (eps = 1: the rank of M), raised to the end of an eigenspace that the cut would split. The sum
    does not depend on the order of the buckets. Buckets without energy do not count; a group where
    no bucket has any gets rank 0.

    `grams` is read three times, one item at a time, so a lazy sequence saves memory.

    Raises:
        ValueError: no Gram at all.
    """
    merged: Tensor | None = None
    for gram, weight in zip(grams, weights, strict=True):
        if merged is None:
            merged = torch.zeros_like(gram.matrix)
        merged.addcmul_(gram.matrix, _per_energy(gram.trace, weight)[:, None, None])
    if merged is None:
        raise ValueError("balanced_basis: expected at least one Gram, got none")
    values, vectors = eigh(merged)
    groups = len(values)
    ranks = [energy_rank(row, 1.0) for row in values] if eps >= 1 else [0] * groups
    if eps < 1:
        for gram in grams:
            found = _ranks_of(gram, vectors, eps)
            ranks = [max(pair) for pair in zip(ranks, found, strict=True)]
    ranks = [_whole_eigenspace(row, rank) for row, rank in zip(values.tolist(), ranks, strict=True)]
    return _with_energies(vectors, values, tuple(ranks), grams)


def _with_energies(
    vectors: Tensor, values: Tensor, ranks: tuple[int, ...], grams: Sequence[Gram]
) -> Basis:
    basis = Basis(vectors, values, ranks, torch.empty(0), torch.empty(0))
    left, energies = [], []
    for gram in grams:
        left.append(residual(basis, gram))
        energies.append(_share(gram, left[-1]))
    return Basis(vectors, values, ranks, torch.stack(energies), torch.stack(left))


def _share(gram: Gram, left: Tensor) -> Tensor:
    total = gram.trace.sum()
    return 1 - left.sum() / total if total > 0 else total.new_tensor(math.nan)


def _per_energy(trace: Tensor, weight: float) -> Tensor:
    """Return weight / tr G, 0 for groups without energy or with what a subtraction left of it."""
    return torch.where(trace > 0, weight / trace, torch.zeros_like(trace))


def _ranks_of(gram: Gram, vectors: Tensor, eps: float) -> list[int]:
    """Return per group the smallest r with Σ_{i≤r} v_iᵀ G v_i ≥ (eps − 1e-12)·tr G.

    Vectors are tried in growing blocks, because a small part of them holds most of the energy.
    """
    trace, d = gram.trace, vectors.shape[-1]
    goal = (eps - SLACK) * trace
    held = torch.zeros_like(trace)
    ranks = torch.zeros_like(trace, dtype=torch.int64)
    open_ = trace > 0
    start, width = 0, 64
    while bool(open_.any()) and start < d:
        block = vectors[..., start : start + width]
        kept = held[:, None] + ((gram.matrix @ block) * block).sum(-2).cumsum(-1)
        ranks = torch.where(open_, ranks + (kept < goal[:, None]).sum(-1), ranks)
        held = kept[:, -1]
        reached = held >= goal
        ranks = torch.where(open_ & reached, ranks + 1, ranks)
        open_ = open_ & ~reached
        start, width = start + width, 2 * width
    return ranks.clamp(max=d).tolist()


def _whole_eigenspace(values: Sequence[float], rank: int) -> int:
    while 0 < rank < len(values) and values[rank] >= (1 - CLUSTER) * values[rank - 1]:
        rank += 1
    return rank


def semidefinite(gram: Gram, tolerance: float) -> bool:
    """Return whether no eigenvalue lies below −tolerance·λ_1, by a Cholesky factorisation.

    λ_1 is estimated from below, by 20 steps of the power method.
    """
    largest = torch.linalg.matrix_norm(gram.matrix, ord="fro")  # between λ_1 and √d·λ_1
    some = largest > 0
    if not bool(some.any()):
        return True
    vector = gram.matrix.sum(-1, keepdim=True) + 1e-3 * largest[:, None, None]
    for _ in range(20):
        vector = gram.matrix @ vector
        vector = vector / vector.norm(dim=1, keepdim=True).clamp(min=1e-300)
    top = (vector.mT @ gram.matrix @ vector)[:, 0, 0].clamp(min=0)
    shift = tolerance * torch.where(top > 0, top, largest)
    eye = torch.eye(gram.matrix.shape[-1], dtype=torch.float64, device=gram.matrix.device)
    _, info = torch.linalg.cholesky_ex((gram.matrix + shift[:, None, None] * eye)[some])
    return bool((info == 0).all())


def pooled_basis(gram: Gram, eps: float, rule: Rule = "reach") -> Basis:
    """Return the leading eigenspace of one Gram by :func:`energy_rank`, group by group."""
    values, vectors = eigh(gram.matrix)
    ranks = tuple(energy_rank(row, eps, rule) for row in values)
    return _with_energies(vectors, values, ranks, [gram])


def gpm_basis(grams: Sequence[Gram], thresholds: Sequence[float], rule: Rule = "reach") -> Basis:
    """Return the sequentially merged subspace of Gram matrices in their given order.

    First: the leading eigenvectors of G_1 by `rule`. Then, with P = I − U Uᵀ and G' = P G_c P:
    a = 1 − tr G'/tr G_c; the eigenvectors of G' are appended in falling order while a < thresholds
    [c], each adding its eigenvalue / tr G_c to a; at most d in all. From the Gram matrices alone
    this is what an SVD of the raw columns gives. The result depends on the order.
    """
    groups = range(len(grams[0].total))
    merged = [_merged([gram.matrix[at] for gram in grams], thresholds, rule) for at in groups]
    vectors = torch.stack([found for found, _ in merged])
    ranks = tuple(rank for _, rank in merged)
    return _with_energies(vectors, vectors.new_zeros(len(groups), 0), ranks, grams)


def _merged(
    matrices: Sequence[Tensor], thresholds: Sequence[float], rule: Rule
) -> tuple[Tensor, int]:
    """Return a basis [d, d] whose first r vectors are the span of a sequential merge, and r.

    With N the complement of the span so far, P G P = N (Nᵀ G N) Nᵀ: only the small matrix is
    decomposed, and the rotated N is split into what joins the span and what is left.
    """
    rest = torch.eye(len(matrices[0])).to(matrices[0])
    span = rest[:, :0]
    for at, (matrix, eps) in enumerate(zip(matrices, thresholds, strict=True)):
        total = float(matrix.diagonal().sum())
        if total <= 0 or span.shape[1] == len(span):
            continue
        small = rest.mT @ (matrix @ rest) if at else matrix
        values, vectors = (found[0] for found in eigh((small + small.mT)[None] / 2))
        turned = rest @ vectors
        if at == 0:
            count = energy_rank(values, eps, rule)
        else:
            held = 1 - float(small.diagonal().sum()) / total
            before = held + (values.cumsum(0) - values) / total
            count = int((before < eps).sum())
        span, rest = torch.cat([span, turned[:, :count]], 1), turned[:, count:]
    return torch.cat([span, rest], 1), span.shape[1]


def energy(basis: Basis, gram: Gram) -> Tensor:
    """Return the share of a Gram's energy that the span keeps, Σ_groups tr(UᵀGU) / Σ tr G."""
    return _share(gram, residual(basis, gram))


def worst_energy(basis: Basis) -> float:
    """Return the smallest share that any bucket keeps; NaN without a bucket of energy."""
    known = basis.energies[~basis.energies.isnan()]
    return float(known.min()) if len(known) else math.nan


def residual(basis: Basis, gram: Gram) -> Tensor:
    """Return the energy outside the span per group [g], tr G − tr(UᵀGU) = ‖P X‖²_F, at least 0.

    Summed over the complement where that has fewer vectors or the difference would cancel.
    """
    width, total = max(basis.ranks, default=0), gram.trace
    if width <= basis.d - min(basis.ranks, default=0):
        span = _spans(basis.vectors[..., :width], basis.ranks)
        left = total - ((gram.matrix @ span) * span).sum((-2, -1))
        if not bool((left < 1e-6 * total).any()):
            return left
    rest = complement(basis)
    return ((gram.matrix @ rest) * rest).sum((-2, -1)).clamp(min=0)


def _spans(vectors: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return the vectors [g, d, w] with the columns from `ranks[i]` on set to 0."""
    used = torch.tensor(ranks, device=vectors.device)[:, None]
    inside = torch.arange(vectors.shape[-1], device=vectors.device)[None] < used
    return torch.where(inside[:, None], vectors, torch.zeros_like(vectors))


def complement(basis: Basis) -> Tensor:
    """Return a basis N of what is left [g, d, w]; ragged groups are filled up with zero columns."""
    return _beyond(basis.vectors, basis.ranks)


def _beyond(vectors: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return the vectors [g, d, d] of each group from `ranks[i]` on."""
    d = vectors.shape[-1]
    rest = vectors.new_zeros(len(vectors), d, max((d - rank for rank in ranks), default=0))
    for group, rank in enumerate(ranks):
        rest[group, :, : d - rank] = vectors[group, :, rank:]
    return rest


# --------------------------------------------------------------------------- projectors


@dataclass(frozen=True)
class Projector:
    """P = I − U Uᵀ = N Nᵀ, kept as the thinner factor [g, d, w] and never as a d×d matrix.

    `apply` costs 4·o·d·w flops instead of 2·o·d².
    """

    factor: Tensor
    keeps_free: bool
    ranks: tuple[int, ...]

    @classmethod
    def from_basis(cls, basis: Basis, dtype: torch.dtype = torch.float64) -> Projector:
        """Return the projector onto the complement of the basis, in at least float32."""
        if dtype not in (torch.float32, torch.float64):
            dtype = torch.float32
        free = max((basis.d - rank for rank in basis.ranks), default=0)
        span = max(basis.ranks, default=0)
        if span <= free:
            factor = _spans(basis.vectors[..., :span], basis.ranks)
            return cls(factor.to(dtype), False, basis.ranks)
        return cls(complement(basis).to(dtype), True, basis.ranks)

    @property
    def free(self) -> int:
        """Directions left, summed over the groups."""
        return sum(self.factor.shape[1] - rank for rank in self.ranks)

    def apply(self, rows: Tensor) -> Tensor:
        """Return M P for rows M [g, o, d]."""
        inside = (rows @ self.factor) @ self.factor.mT
        return inside if self.keeps_free else rows - inside

    def free_directions(self) -> Tensor:
        """Return N [g, d, w]; ragged groups are filled up with zero columns."""
        if self.keeps_free:
            return self.factor
        spans = [span[:, :rank] for span, rank in zip(self.factor, self.ranks, strict=True)]
        whole = [torch.linalg.qr(span, mode="complete")[0] for span in spans]
        return _beyond(torch.stack(whole), self.ranks)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Projector:
        """Return the projector on another device or in another precision."""
        return Projector(self.factor.to(device, dtype), self.keeps_free, self.ranks)


# --------------------------------------------------------------------------- drift


def moved(update: Tensor, gram: Gram) -> float:
    """Return ‖ΔW X‖_F = √tr(ΔW G ΔWᵀ) for an update [g, o, d], from the Gram alone."""
    wide = update.to(gram.matrix.device, torch.float64)
    return math.sqrt(max(float(((wide @ gram.matrix) * wide).sum()), 0.0))


def drift(update: Tensor, weight: Tensor, gram: Gram) -> float:
    """Return δ = ‖ΔW X‖_F / ‖W X‖_F, the relative change of a layer's response to the columns.

    A response of 0 that starts to move gives infinity; one that stays 0 gives 0.
    """
    return _relative(moved(update, gram), moved(weight, gram))


def drifts(update: Tensor, weight: Tensor, grams: Iterable[Gram]) -> list[float]:
    """Return δ for several Gram matrices, by ‖ΔW X‖²_F = ⟨ΔWᵀΔW, G⟩ with one product in all."""
    change = update.double().mT @ update.double()
    response = weight.double().mT @ weight.double()
    found = []
    for gram in grams:
        here = gram.matrix.device
        sizes = [float((square.to(here) * gram.matrix).sum()) for square in (change, response)]
        found.append(_relative(*(math.sqrt(max(size, 0.0)) for size in sizes)))
    return found


def _relative(change: float, response: float) -> float:
    if response > 0:
        return change / response
    return math.inf if change > 0 else 0.0


def spectral_norms(update: Tensor) -> Tensor:
    """Return ‖ΔW‖₂ per group [g], float64."""
    wide = update.double()
    if wide.shape[-2] > wide.shape[-1]:
        wide = wide.mT
    largest: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)[..., -1]
    return largest.clamp(min=0).sqrt()


def drift_bound(update: Tensor, left: Tensor) -> Tensor:
    """Return √Σ_groups ‖ΔW‖₂²·left ≥ ‖ΔW P X‖_F, `left` [..., g] from :func:`residual`; [...]."""
    norms = spectral_norms(update)
    return (norms**2 * left.to(norms.device)).sum(-1).sqrt()


def largest_sine(first: Tensor, second: Tensor) -> float:
    """Return the sine of the largest principal angle between two orthonormal bases [d, r].

    Computed as ‖(I − A Aᵀ) B‖₂, which is exact for small angles; bases of unequal width give 1.

    >>> largest_sine(torch.eye(3)[:, :1], torch.eye(3)[:, 1:2])
    1.0
    """
    if first.shape != second.shape:
        return 1.0
    if first.shape[1] == 0:
        return 0.0
    a, b = first.double(), second.double()
    return float(torch.linalg.matrix_norm(b - a @ (a.mT @ b), ord=2))


# --------------------------------------------------------------------------- logits


def margin(logits: Tensor, index: Tensor) -> Tensor:
    """Return m(x, c) = z_c − max_{j≠c} z_j of every row, float32 or wider, (n,).

    `logits` (n, C) with C ≥ 2, `index` int64 (n,) holds c. Positive where c is predicted, 0 at a
    tie, NaN where a logit of the row is.

    >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])).tolist()
    [1.0]
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    own = wide.gather(1, index[:, None])[:, 0]
    return own - wide.scatter(1, index[:, None], -math.inf).amax(dim=1)
