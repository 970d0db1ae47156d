"""Gram algebra against singular values of the raw columns, and what the projectors promise."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from unsc_plugin import linalg
from unsc_plugin.linalg import (
    Basis,
    Gram,
    Projector,
    balanced_basis,
    complement,
    drift,
    drift_bound,
    energy,
    energy_rank,
    gpm_basis,
    largest_sine,
    moved,
    pooled_basis,
    residual,
    spectral_norms,
    worst_energy,
)

torch.set_num_threads(1)

DOUBLE = torch.float64


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


def decaying(d: int, count: int, power: float = 1.0, seed: int = 0) -> Tensor:
    """Return columns [d, count] whose energies fall like i^(-2·power) along random directions."""
    turn = torch.linalg.qr(draws(d, d, seed=seed))[0]
    scale = torch.arange(1, d + 1, dtype=DOUBLE) ** -power
    return (turn * scale) @ draws(d, count, seed=seed + 1)


def gram_of(columns: Tensor) -> Gram:
    """Return the Gram of columns [d, N] or [g, d, N]."""
    columns = columns if columns.ndim == 3 else columns[None]
    gram = Gram.zeros(columns.shape[0], columns.shape[1])
    gram.add(columns)
    return gram


def dense(projector: Projector) -> Tensor:
    """Return P [g, d, d]."""
    groups, d, _ = projector.factor.shape
    eye = torch.eye(d, dtype=projector.factor.dtype).expand(groups, d, d)
    return projector.apply(eye)


def span_of(basis: Basis, group: int = 0) -> Tensor:
    return basis.vectors[group][:, : basis.ranks[group]]


def relative(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


def orthonormal(vectors: Tensor) -> bool:
    eye = torch.eye(vectors.shape[-1], dtype=vectors.dtype)
    return bool(torch.allclose(vectors.mT @ vectors, eye, rtol=0, atol=1e-12))


@functools.cache
def classes(d: int = 30, count: int = 5) -> tuple[Tensor, ...]:
    """Return columns of classes of unlike size, scale and spectrum."""
    return tuple(
        (10.0**place) * decaying(d, 40 + 9 * place, power=0.6 + 0.2 * place, seed=10 * place)
        for place in range(count)
    )


# --------------------------------------------------------------------------- Gram matrices


def test_a_gram_holds_the_second_moment_the_sum_and_the_count():
    columns = draws(3, 5, 40)
    gram = gram_of(columns)
    assert relative(gram.matrix, columns @ columns.mT) <= 1e-14
    assert relative(gram.total, columns.sum(-1)) <= 1e-14
    assert gram.count == 40
    assert relative(gram.trace, (columns**2).sum((1, 2))) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_gram_is_float64_whatever_the_columns_are(dtype):
    columns = draws(1, 6, 50, dtype=dtype)
    gram = gram_of(columns)
    exact = columns.double()
    assert gram.matrix.dtype == gram.total.dtype == DOUBLE
    assert relative(gram.matrix, exact @ exact.mT) <= 4 * torch.finfo(dtype).eps
    assert relative(gram.total, exact.sum(-1)) <= 1e-14


@pytest.mark.parametrize("chunk", [1, 7, 64, 8192])
@pytest.mark.parametrize("order", ["as they come", "turned round"])
def test_chunks_and_order_do_not_change_a_gram(monkeypatch, chunk, order):
    columns = draws(2, 8, 300)
    whole = columns @ columns.mT
    monkeypatch.setattr(linalg, "CHUNK", chunk)
    gram = Gram.zeros(2, 8)
    for part in torch.split(columns if order == "as they come" else columns.flip(-1), 113, dim=-1):
        gram.add(part)
    assert relative(gram.matrix, whole) <= 1e-14
    assert relative(gram.total, columns.sum(-1)) <= 1e-14
    assert gram.count == 300


def test_long_sums_are_not_kept_in_the_precision_of_the_columns():
    ones = torch.ones(1, 1, linalg.CHUNK)
    gram = Gram.zeros(1, 1)
    gram.matrix += 2.0**24  # where float32 stops counting in steps of one
    for _ in range(3):
        gram.add(ones[..., :1])
    assert float(gram.matrix) == 2.0**24 + 3


def test_no_columns_change_nothing():
    gram = gram_of(draws(4, 9))
    before = gram.matrix.clone()
    gram.add(torch.zeros(1, 4, 0))
    assert torch.equal(gram.matrix, before)
    assert gram.count == 9


def test_merge_and_subtract_are_sums_over_columns():
    first, second = draws(2, 6, 40), draws(2, 6, 25, seed=1)
    whole, part, rest = gram_of(torch.cat([first, second], -1)), gram_of(second), gram_of(first)
    merged = gram_of(first)
    merged.merge(part)
    assert relative(merged.matrix, whole.matrix) <= 1e-14
    assert relative(merged.total, whole.total) <= 1e-14
    assert merged.count == whole.count
    whole.subtract(part)
    assert relative(whole.matrix, rest.matrix) <= 1e-14
    assert relative(whole.total, rest.total) <= 1e-13
    assert whole.count == rest.count
    assert torch.equal(part.matrix, gram_of(second).matrix)


def test_a_downdated_gram_has_no_negative_directions_to_speak_of():
    columns = decaying(24, 60, power=2).float()
    whole = gram_of(columns)
    whole.subtract(gram_of(columns[:, :45]))
    wanted = gram_of(columns[:, 45:])
    values = torch.linalg.eigvalsh(whole.matrix[0])
    assert relative(whole.matrix, wanted.matrix) <= 1e-6
    assert float(values[0]) >= -1e-5 * float(values[-1])
    assert float(linalg.eigh(whole.matrix)[0].min()) >= 0
    assert linalg.eigh(-whole.matrix)[0].max() <= 1e-6 * whole.trace


@pytest.mark.parametrize("groups", [1, 3])
def test_augmented_is_the_gram_of_columns_with_a_constant(groups):
    columns, scale = draws(groups, 5, 17), 0.3
    constant = torch.full((groups, 1, 17), scale, dtype=DOUBLE)
    wanted, found = gram_of(torch.cat([columns, constant], 1)), gram_of(columns).augmented(scale)
    assert relative(found.matrix, wanted.matrix) <= 1e-14
    assert relative(found.total, wanted.total) <= 1e-14
    assert found.count == wanted.count == 17


@pytest.mark.parametrize(("groups", "d"), [(1, 1), (1, 6), (4, 5)])
def test_packing_keeps_the_upper_triangle_bit_for_bit(groups, d):
    gram = gram_of(draws(groups, d, 11))
    gram.matrix = (gram.matrix + gram.matrix.mT) / 2
    packed = gram.pack()
    assert packed.shape == (groups, d * (d + 1) // 2)
    assert torch.equal(packed[:, :d], gram.matrix[:, 0])  # row by row
    back = Gram.unpack(packed, gram.total, gram.count)
    assert torch.equal(back.matrix, gram.matrix)
    assert torch.equal(back.total, gram.total)
    assert back.count == gram.count
    back.add(torch.ones(groups, d, 1, dtype=DOUBLE))
    assert torch.equal(gram.pack(), packed), "the copy shares memory with what it was made of"
    assert not torch.equal(back.total, gram.total)


def test_a_lopsided_matrix_unpacks_symmetric():
    gram = gram_of(draws(4, 9))
    gram.matrix[0, 2, 1] += 1e-3
    back = Gram.unpack(gram.pack(), gram.total, gram.count)
    assert torch.equal(back.matrix, back.matrix.mT)


def test_a_device_without_float64_counts_on_the_cpu():
    assert Gram.zeros(1, 2, "mps").matrix.device.type == "cpu"
    assert Gram.zeros(1, 2, torch.device("mps", 0)).matrix.dtype == DOUBLE


# --------------------------------------------------------------------------- eigenspaces


def test_eigenvalues_fall_and_are_never_negative():
    gram = gram_of(draws(3, 8, 5))  # rank 5 of 8
    values, vectors = linalg.eigh(gram.matrix)
    assert (values.diff(dim=-1) <= 0).all()
    assert (values >= 0).all()
    assert relative(vectors * values[:, None] @ vectors.mT, gram.matrix) <= 1e-13


def test_a_solver_that_gives_up_is_asked_once_more(monkeypatch):
    gram, solve, calls = gram_of(draws(4, 9)), torch.linalg.eigh, []

    def moody(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("no convergence")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", moody)
    values, _ = linalg.eigh(gram.matrix)
    assert len(calls) == 2
    assert float(values.sum()) == pytest.approx(float(gram.trace))


@pytest.mark.parametrize(
    ("eps", "rule", "rank"),
    [
        (0.97, "reach", 1),
        (0.97, "below", 0),
        (0.985, "reach", 2),
        (0.985, "below", 1),
        (0.99, "reach", 2),
        (1.0, "reach", 3),
        (1e-9, "reach", 1),
    ],
)
def test_ranks_of_a_known_spectrum(eps, rule, rank):
    assert energy_rank(torch.tensor([0.98, 0.01, 0.01]), eps, rule) == rank


@pytest.mark.parametrize("held", range(1, 11))
def test_a_threshold_met_exactly_is_met(held):
    equal = torch.full((10,), 0.1, dtype=DOUBLE)
    assert energy_rank(equal, held / 10) == held
    assert energy_rank(equal, held / 10 - 1e-9) == held
    assert energy_rank(equal, min(held / 10 + 1e-9, 1.0)) == min(held + 1, 10)


@pytest.mark.parametrize("rule", ["reach", "below"])
@pytest.mark.parametrize("eps", [0.5, 0.999, 1.0])
def test_nothing_has_rank_zero(eps, rule):
    assert energy_rank(torch.zeros(4), eps, rule) == 0


def test_everything_counts_what_is_no_rounding():
    values = torch.tensor([1.0, 1e-3, 2e-12, 5e-13, 0.0], dtype=DOUBLE)
    assert energy_rank(values, 1.0) == 3


@pytest.mark.parametrize(("dtype", "sine"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("seed", range(3))
def test_eigenvectors_of_the_gram_are_singular_vectors_of_the_columns(dtype, sine, seed):
    columns = decaying(48, 400, power=1.5, seed=seed)
    left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    basis = pooled_basis(gram_of(columns.to(dtype)), 0.99)
    rank = energy_rank(singular**2, 0.99)
    assert basis.ranks == (rank,)
    assert 1 < rank < 47
    assert largest_sine(left[:, :rank], span_of(basis)) < sine


@pytest.fixture(scope="module")
def wide() -> tuple[Tensor, Tensor, Tensor]:
    """Return 7,680 columns of width 864 with their singular vectors and energies, through QR."""
    columns = decaying(864, 7680, power=1.2)
    triangle = torch.linalg.qr(columns.mT, mode="r")[1]
    left, singular, _ = torch.linalg.svd(triangle.mT)
    return columns, left, singular**2


def sines(found: Tensor, left: Tensor, energies: Tensor) -> list[float]:
    ranks = [energy_rank(energies, eps) for eps in (0.97, 0.99, 0.999, 0.9999)]
    return [largest_sine(left[:, :rank], found[:, :rank]) for rank in ranks]


def test_float32_products_cost_what_is_written(wide):
    columns, left, energies = wide
    found = linalg.eigh(gram_of(columns.float()).matrix)[1][0]
    for seen, wanted in zip(sines(found, left, energies), (7e-7, 3e-6, 2e-4, 2e-2), strict=True):
        assert wanted / 10 <= seen <= wanted * 10
    for eps in (0.97, 0.99, 0.999, 0.9999):
        span = left.mT @ found[:, : energy_rank(energies, eps)]
        lost = 1 - float(((span**2).T @ energies).sum() / energies.sum())
        best = 1 - float(energies[: span.shape[1]].sum() / energies.sum())
        assert lost == pytest.approx(best, rel=0.01)
        assert lost <= 1.01 * (1 - eps)


def test_bfloat16_columns_are_far_too_coarse(wide):
    columns, left, energies = wide
    rounded = gram_of(columns.bfloat16().float())
    seen = sines(linalg.eigh(rounded.matrix)[1][0], left, energies)
    assert all(now >= floor for now, floor in zip(seen, (5e-5, 1e-4, 3e-3, 2.6e-2), strict=True))


# --------------------------------------------------------------------------- the balanced merge


def shares(columns: Tensor, basis: Basis) -> list[float]:
    """Return C(r) of one class for every r, from the raw columns."""
    total = float((columns**2).sum())
    kept = ((basis.vectors[0].mT @ columns) ** 2).sum(1).cumsum(0)
    return (kept / total).tolist()


@pytest.mark.parametrize("eps", [0.3, 0.9, 0.97, 0.99, 0.9999])
@pytest.mark.parametrize("d", [30, 200])  # more than one block of vectors
def test_the_worst_class_keeps_its_share_and_one_direction_less_is_not_enough(eps, d):
    groups = classes(d)
    basis = balanced_basis([gram_of(columns) for columns in groups], [1.0] * len(groups), eps)
    worst = [min(at) for at in zip(*(shares(columns, basis) for columns in groups), strict=True)]
    (rank,) = basis.ranks
    assert 0 < rank <= d
    assert worst[rank - 1] >= eps - 1e-11
    assert rank == 1 or worst[rank - 2] < eps
    wanted = torch.tensor([shares(columns, basis)[rank - 1] for columns in groups])
    assert torch.allclose(basis.energies.float(), wanted, atol=1e-6)
    assert worst_energy(basis) == pytest.approx(worst[rank - 1], abs=1e-12)


@pytest.mark.parametrize(("eps", "rank"), [(0.4, 1), (0.7, 2), (0.9, 3), (0.9 + 1e-9, 4)])
def test_a_share_met_exactly_is_enough_for_a_class(eps, rank):
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=DOUBLE)
    gram = Gram(torch.diag(values)[None], torch.zeros(1, 4, dtype=DOUBLE), 4)
    assert balanced_basis([gram, gram], [1.0, 2.0], eps).ranks == (rank,)


def test_the_merged_matrix_weighs_every_class_alike():
    groups, weights = classes(), [1.0, 2.0, 1.0, 3.0, 1.0]
    merged = sum(
        weight * (columns @ columns.mT) / (columns**2).sum()
        for columns, weight in zip(groups, weights, strict=True)
    )
    basis = balanced_basis([gram_of(columns) for columns in groups], weights, 0.9)
    values = torch.linalg.eigvalsh(merged).flip(-1)
    assert torch.allclose(basis.eigenvalues[0], values, rtol=0, atol=1e-13)
    turned = basis.vectors[0].mT @ merged @ basis.vectors[0]
    assert torch.allclose(turned, torch.diag(values), rtol=0, atol=1e-13)


@pytest.mark.parametrize("eps", [0.9, 0.97, 0.999, 1.0])
def test_the_order_of_the_classes_does_not_matter(eps):
    grams = [gram_of(columns) for columns in classes()]
    weights = [1.0, 2.0, 1.0, 1.0, 3.0]
    wanted = balanced_basis(grams, weights, eps)
    for shift in range(1, 5):
        turned = balanced_basis(
            grams[shift:] + grams[:shift], weights[shift:] + weights[:shift], eps
        )
        assert turned.ranks == wanted.ranks
        difference = dense(Projector.from_basis(turned)) - dense(Projector.from_basis(wanted))
        assert float(difference.abs().max()) <= 1e-10


def test_the_scale_of_a_class_does_not_matter():
    plain = [gram_of(columns) for columns in classes()]
    scaled = [gram_of(columns * 7.0**place) for place, columns in enumerate(classes())]
    one, other = (balanced_basis(grams, [1.0] * 5, 0.95) for grams in (plain, scaled))
    assert one.ranks == other.ranks
    assert largest_sine(span_of(one), span_of(other)) <= 1e-10


def test_class_grams_add_up_to_the_pooled_gram():
    total = Gram.zeros(1, 30)
    for columns in classes():
        total.merge(gram_of(columns))
    pooled = gram_of(torch.cat(classes(), dim=-1))
    assert relative(total.matrix, pooled.matrix) <= 1e-14
    assert relative(total.total, pooled.total) <= 1e-14
    assert total.count == pooled.count


@pytest.mark.parametrize("eps", [0.5, 0.9])
def test_groups_are_solved_one_by_one(eps):
    columns = [torch.stack([decaying(12, 30, power, seed) for power in (0.4, 1.0, 1.6)])
               for seed in (0, 5)]  # fmt: skip
    together = balanced_basis([gram_of(part) for part in columns], [1.0, 1.0], eps)
    projector = dense(Projector.from_basis(together))
    for group in range(3):
        alone = balanced_basis([gram_of(part[group]) for part in columns], [1.0, 1.0], eps)
        assert together.ranks[group] == alone.ranks[0]
        assert torch.allclose(projector[group], dense(Projector.from_basis(alone))[0], atol=1e-12)
    assert len(set(together.ranks)) > 1
    assert together.free == 36 - sum(together.ranks)


def test_an_eigenspace_is_never_cut():
    turn = torch.linalg.qr(draws(8, 8))[0]
    values = torch.tensor([4.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.0, 0.0], dtype=DOUBLE)
    gram = Gram(((turn * values) @ turn.mT)[None], torch.zeros(1, 8, dtype=DOUBLE), 8)
    ranks = {eps: balanced_basis([gram], [1.0], eps).ranks[0] for eps in (0.5, 0.6, 0.98, 1.0)}
    assert ranks == {0.5: 1, 0.6: 4, 0.98: 6, 1.0: 6}


@pytest.mark.parametrize(("gap", "rank"), [(1e-11, 2), (1e-6, 1)])
def test_what_counts_as_one_eigenspace(gap, rank):
    values = torch.tensor([1.0 + gap, 1.0, 0.5], dtype=DOUBLE)
    gram = Gram(torch.diag(values)[None], torch.zeros(1, 3, dtype=DOUBLE), 3)
    assert balanced_basis([gram], [1.0], 0.2).ranks == (rank,)


@pytest.mark.parametrize("eps", [0.01, 0.5, 1.0])
def test_an_isotropic_class_leaves_nothing_free(eps):
    gram = Gram(3 * torch.eye(7, dtype=DOUBLE)[None], torch.zeros(1, 7, dtype=DOUBLE), 21)
    basis = balanced_basis([gram], [1.0], eps)
    assert basis.ranks == (7,)
    assert basis.free == Projector.from_basis(basis).free == 0
    assert worst_energy(basis) == pytest.approx(1)
    assert float(Projector.from_basis(basis).apply(draws(1, 2, 7)).abs().max()) <= 1e-15


@pytest.mark.parametrize("eps", [0.5, 1.0])
def test_a_class_without_energy_has_rank_zero(eps):
    basis = balanced_basis([Gram.zeros(2, 5)], [1.0], eps)
    assert basis.ranks == (0, 0)
    assert basis.free == 10
    assert math.isnan(worst_energy(basis))
    rows = draws(2, 3, 5)
    assert torch.equal(Projector.from_basis(basis).apply(rows), rows)


@pytest.mark.parametrize("eps", [0.9, 1.0])
def test_an_empty_bucket_does_not_count(eps):
    full = [gram_of(columns) for columns in classes()[:2]]
    wanted = balanced_basis(full, [1.0, 1.0], eps)
    found = balanced_basis([full[0], Gram.zeros(1, 30), full[1]], [1.0, 4.0, 1.0], eps)
    assert found.ranks == wanted.ranks
    assert largest_sine(span_of(found), span_of(wanted)) <= 1e-12
    assert found.energies.isnan().tolist() == [False, True, False]


def test_rounding_left_by_a_subtraction_does_not_count():
    full = [gram_of(columns) for columns in classes()[:2]]
    left = Gram.zeros(1, 30)
    left.matrix[0, 0, 1] = left.matrix[0, 1, 0] = 0.3
    left.matrix[0, 2, 2] = -1e-3
    wanted = balanced_basis(full, [1.0, 1.0], 0.9)
    found = balanced_basis([*full, left], [1.0, 1.0, 1.0], 0.9)
    assert torch.allclose(found.eigenvalues, wanted.eigenvalues, atol=1e-12)
    assert found.ranks == wanted.ranks


def test_one_empty_group_stays_free_beside_a_full_one():
    columns = torch.stack([draws(4, 9), torch.zeros(4, 9, dtype=DOUBLE)])
    basis = balanced_basis([gram_of(columns)], [1.0], 0.999999)
    assert basis.ranks == (4, 0)
    projector = dense(Projector.from_basis(basis))
    assert float(projector[0].abs().max()) <= 1e-14
    assert torch.allclose(projector[1], torch.eye(4, dtype=DOUBLE), atol=1e-14)


def test_everything_means_the_rank_of_all_classes_together():
    columns = [draws(20, 3, seed=seed) @ draws(3, 50, seed=seed + 9) for seed in range(4)]
    basis = balanced_basis([gram_of(part) for part in columns], [1.0] * 4, 1.0)
    assert basis.ranks == (12,)
    for part in columns:
        assert float(residual(basis, gram_of(part)).sum()) <= 1e-14 * float((part**2).sum())


def test_the_grams_may_come_lazily_and_are_left_alone():
    grams = [gram_of(columns) for columns in classes()]
    before = [gram.pack() for gram in grams]

    class Lazy(Sequence[Gram]):
        taken = 0

        def __len__(self) -> int:
            return len(grams)

        def __getitem__(self, place):
            return grams[place]

        def __iter__(self) -> Iterator[Gram]:
            for gram in grams:
                Lazy.taken += 1
                yield Gram(gram.matrix.clone(), gram.total, gram.count)

    found, wanted = (balanced_basis(these, [1.0] * 5, 0.9) for these in (Lazy(), grams))
    assert Lazy.taken == 15
    assert torch.equal(found.vectors, wanted.vectors)
    assert all(torch.equal(gram.pack(), old) for gram, old in zip(grams, before, strict=True))


def test_no_gram_at_all_is_an_error():
    with pytest.raises(ValueError, match="at least one Gram"):
        balanced_basis([], [], 0.9)


def test_weights_and_grams_must_be_as_many():
    with pytest.raises(ValueError, match="shorter"):
        balanced_basis([Gram.zeros(1, 2), Gram.zeros(1, 2)], [1.0], 0.9)


# --------------------------------------------------------------------------- published merges


def raw_merge(columns: Sequence[Tensor], thresholds: Sequence[float], rule: str) -> Tensor:
    """Return the sequentially merged subspace from singular values of the raw matrices."""
    d = columns[0].shape[0]
    span = torch.zeros(d, 0, dtype=DOUBLE)
    for place, (part, eps) in enumerate(zip(columns, thresholds, strict=True)):
        total = float((part**2).sum())
        rest = part - span @ (span.mT @ part)
        left, singular, _ = torch.linalg.svd(rest, full_matrices=False)
        held = 1 - float((rest**2).sum()) / total
        count = 0
        for value in (singular**2 / total).tolist():
            if held >= eps or (place == 0 and rule == "below" and held + value >= eps):
                break
            held, count = held + value, count + 1
        span = torch.cat([span, left[:, :count]], dim=1)[:, :d]
    return span


@pytest.mark.parametrize("rule", ["below", "reach"])
@pytest.mark.parametrize("eps", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_the_sequential_merge_equals_singular_values_of_raw_columns(rule, eps, seed):
    columns = [decaying(40, 60 + 20 * k, power=0.7, seed=100 * seed + k) for k in range(4)]
    thresholds = [eps + 0.003 * k for k in (0, 1, 5, 9)]
    wanted = raw_merge(columns, thresholds, rule)
    basis = gpm_basis([gram_of(part) for part in columns], thresholds, rule)
    assert basis.ranks == (wanted.shape[1],)
    assert orthonormal(span_of(basis))
    assert largest_sine(wanted, span_of(basis)) <= 1e-8
    kept = [float(((wanted.mT @ part) ** 2).sum() / (part**2).sum()) for part in columns]
    assert basis.energies.tolist() == pytest.approx(kept, abs=1e-10)


@pytest.mark.parametrize("rule", ["below", "reach"])
def test_the_sequential_merge_of_few_columns_stays_in_their_span(rule):
    columns = [decaying(50, 6, power=0.3, seed=k) for k in range(5)]
    thresholds = [0.9 + 0.01 * k for k in range(5)]
    wanted = raw_merge(columns, thresholds, rule)
    basis = gpm_basis([gram_of(part) for part in columns], thresholds, rule)
    assert basis.ranks == (wanted.shape[1],)
    assert largest_sine(wanted, span_of(basis)) <= 1e-8


@pytest.mark.parametrize("rule", ["below", "reach"])
@pytest.mark.parametrize("eps", [0.5, 0.97, 0.99])
def test_the_pooled_subspace_equals_singular_values_of_raw_columns(rule, eps):
    columns = torch.cat(classes(), dim=-1)
    wanted = raw_merge([columns], [eps], rule)
    basis = pooled_basis(gram_of(columns), eps, rule)
    assert basis.ranks == (wanted.shape[1],)
    assert largest_sine(wanted, span_of(basis)) <= 1e-8


def test_counting_below_the_threshold_leaves_one_direction_out():
    gram = gram_of(classes()[0])
    assert pooled_basis(gram, 0.9, "below").ranks[0] == pooled_basis(gram, 0.9).ranks[0] - 1
    assert (
        worst_energy(pooled_basis(gram, 0.9, "below"))
        < 0.9
        <= worst_energy(pooled_basis(gram, 0.9))
    )


def test_the_sequential_merge_depends_on_the_order():
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=DOUBLE).T / 8 - 1
    grams = [gram_of(pixels[:, torch.tensor(digits.target == k)]) for k in range(10)]
    up, down = gpm_basis(grams, [0.97] * 10), gpm_basis(grams[::-1], [0.97] * 10)
    width = min(up.ranks[0], down.ranks[0])
    cosine = torch.linalg.svdvals(span_of(up)[:, :width].mT @ span_of(down))[width - 1]
    assert float(cosine) < 0.9
    up, down = (balanced_basis(order, [1.0] * 10, 0.97) for order in (grams, grams[::-1]))
    assert largest_sine(span_of(up), span_of(down)) <= 1e-10


def test_thresholds_beyond_everything_keep_at_most_d_directions():
    columns = [decaying(8, 30, seed=k) for k in range(3)]
    basis = gpm_basis([gram_of(part) for part in columns], [0.97, 1.2, 1.27])
    assert basis.ranks == (8,)
    assert orthonormal(span_of(basis))


@pytest.mark.parametrize("seed", range(8))
def test_thresholds_beyond_everything_stay_orthonormal_on_thin_classes(seed):
    turn = torch.linalg.qr(draws(9, 9, seed=seed))[0]
    columns = [turn[:, :width] @ draws(width, 12, seed=seed + width) for width in (2, 3, 4)]
    basis = gpm_basis([gram_of(part) for part in columns], [0.97, 1.0, 1.2])
    assert basis.ranks == (9,)
    assert orthonormal(span_of(basis))


def test_a_merge_of_empty_classes_has_rank_zero():
    basis = gpm_basis([Gram.zeros(1, 5), Gram.zeros(1, 5)], [0.9, 0.9], "below")
    assert basis.ranks == pooled_basis(Gram.zeros(1, 5), 0.9, "below").ranks == (0,)
    rows = draws(1, 2, 5)
    assert torch.equal(Projector.from_basis(basis).apply(rows), rows)


def test_an_empty_class_changes_no_merge():
    one, two = (gram_of(columns) for columns in classes()[:2])
    with_it = gpm_basis([one, Gram.zeros(1, 30), two], [0.9, 0.95, 0.9])
    without = gpm_basis([one, two], [0.9, 0.9])
    assert with_it.ranks == without.ranks
    assert largest_sine(span_of(with_it), span_of(without)) <= 1e-12


@pytest.mark.parametrize("widths", [(2, 3, 5), (1, 6, 2)])  # 6 of 6 leaves that group nothing
def test_the_sequential_merge_of_ragged_groups_is_that_of_each_group(widths):
    columns = [
        torch.stack([draws(6, w, seed=w + at) @ draws(w, 20, seed=at) for w in widths])
        for at in (50, 60)
    ]
    columns[1] = columns[0] + 1e-3 * columns[1]
    thresholds = [0.999999, 0.99]
    together = gpm_basis([gram_of(part) for part in columns], thresholds)
    projector = dense(Projector.from_basis(together))
    for group, rank in enumerate(together.ranks):
        alone = gpm_basis([gram_of(part[group]) for part in columns], thresholds)
        assert alone.ranks == (rank,)
        single = dense(Projector.from_basis(alone))[0]
        assert torch.allclose(projector[group], single, rtol=0, atol=1e-10)
    assert len(set(together.ranks)) == 3


# --------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("eps", [0.5, 0.99, 0.9999999, 1.0])
def test_the_residual_is_the_energy_outside(eps):
    columns = torch.stack([decaying(20, 60, power=2.5), decaying(20, 60, power=1.5, seed=3)])
    basis = pooled_basis(gram_of(columns), eps)
    for group, left in enumerate(residual(basis, gram_of(columns)).tolist()):
        span = span_of(basis, group)
        outside = columns[group] - span @ (span.mT @ columns[group])
        wanted = float((outside**2).sum())
        assert left == pytest.approx(wanted, rel=1e-6, abs=1e-14 * float((columns**2).sum()))


def test_a_residual_far_below_the_energy_does_not_cancel():
    """A difference of traces would be wrong by a half here."""
    errors = []
    for seed in range(20):
        turn = torch.linalg.qr(draws(12, 12, seed=seed))[0]
        strong = turn[:, :4] @ draws(4, 50, seed=seed + 100)
        basis = pooled_basis(gram_of(strong), 1.0)
        assert basis.ranks == (4,)
        columns = strong + 3e-8 * turn[:, 4:] @ draws(8, 50, seed=seed + 200)
        outside = columns - span_of(basis) @ (span_of(basis).mT @ columns)
        found = float(residual(basis, gram_of(columns)).sum())
        errors.append(abs(found / float((outside**2).sum()) - 1))
    assert max(errors) <= 0.15


def test_energies_add_up_over_groups():
    columns = torch.stack([decaying(10, 30), 5 * decaying(10, 30, power=0.2, seed=4)])
    basis = pooled_basis(gram_of(columns), 0.8)
    kept = sum(float(((span_of(basis, g).mT @ columns[g]) ** 2).sum()) for g in range(2))
    assert float(energy(basis, gram_of(columns))) == pytest.approx(kept / float((columns**2).sum()))


@pytest.mark.parametrize("merge", ["pooled", "sequential"])
def test_the_complement_is_the_rest_of_an_orthonormal_basis(merge):
    widths = (2, 7, 5)
    columns = torch.stack([draws(7, w, seed=w) @ draws(w, 30, seed=w + 1) for w in widths])
    columns[1, :] *= 1e-1
    eps = [0.999999]
    gram = gram_of(columns)
    basis = pooled_basis(gram, eps[0]) if merge == "pooled" else gpm_basis([gram], eps)
    assert basis.ranks == widths
    rest = complement(basis)
    assert rest.shape == (3, 7, 5)
    for group, rank in enumerate(widths):
        used = rest[group][:, : 7 - rank]
        assert not rest[group][:, 7 - rank :].any()
        assert orthonormal(torch.cat([span_of(basis, group), used], dim=1))


# --------------------------------------------------------------------------- projectors


@dataclass(frozen=True)
class Case:
    """A linear layer, 500 retained rows of rank 40 in 64 dimensions and 100 forget rows."""

    retained: Tensor
    forget: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor
    gram: Gram

    @functools.cached_property
    def basis(self) -> Basis:
        return balanced_basis([self.gram], [1.0], 1.0)

    @functools.cached_property
    def projector(self) -> Projector:
        return Projector.from_basis(self.basis)

    def moves(self, weight: Tensor, bias: Tensor | None = None) -> tuple[float, float]:
        """Return how far retained and forget outputs move, the largest entry of each."""
        step = weight - self.weight
        shift = 0 if bias is None else bias - self.bias
        return tuple(float((rows @ step.mT + shift).abs().max())
                     for rows in (self.retained, self.forget))  # fmt: skip


def linear_case(constant: bool = False) -> Case:
    retained = draws(500, 40, seed=1) @ draws(40, 64, seed=2) / 40**0.5
    if constant:
        retained[:, 0] = 1
    forget = draws(100, 64, seed=3) + 1
    labels = torch.randint(0, 5, (100,), generator=torch.Generator().manual_seed(4))
    weight, bias = draws(5, 64, seed=5) / 8, draws(5, seed=6) / 8
    return Case(retained, forget, labels, weight, bias, gram_of(retained.mT))


@pytest.fixture(scope="module")
def case() -> Case:
    return linear_case()


Make = Callable[[list[Tensor]], torch.optim.Optimizer]
OPTIMISERS: dict[str, Make] = {
    "sgd": lambda leaves: torch.optim.SGD(leaves, lr=0.05),
    "momentum": lambda leaves: torch.optim.SGD(leaves, lr=0.05, momentum=0.9),
    "nesterov": lambda leaves: torch.optim.SGD(leaves, lr=0.05, momentum=0.9, nesterov=True),
    "decayed": lambda leaves: torch.optim.SGD(leaves, lr=0.05, weight_decay=1e-2),
    "adam": lambda leaves: torch.optim.Adam(leaves, lr=0.01),
    "adamw": lambda leaves: torch.optim.AdamW(leaves, lr=0.01, weight_decay=0.1),
}


def trained(case: Case, name: str, guard: str, clip: float | None = None) -> Tensor:
    """Return the weights after 60 full-batch steps on the forget rows."""
    weight = case.weight.clone().requires_grad_()
    rest = complement(case.basis)[0]
    inner = torch.zeros(5, rest.shape[1], dtype=DOUBLE, requires_grad=True)
    leaf = inner if guard == "reparam" else weight
    optimizer = OPTIMISERS[name]([leaf])
    for _ in range(60):
        used = case.weight + inner @ rest.mT if guard == "reparam" else weight
        optimizer.zero_grad()
        functional.cross_entropy(case.forget @ used.mT + case.bias, case.labels).backward()
        if guard in ("gradient", "project"):
            leaf.grad = case.projector.apply(leaf.grad[None])[0]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([leaf], clip)
        optimizer.step()
        if guard == "project":
            with torch.no_grad():
                step = case.projector.apply((weight - case.weight)[None])[0]
                weight.copy_(case.weight + step)
    return (case.weight + inner @ rest.mT if guard == "reparam" else weight).detach()


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_retained_outputs_stay_while_forget_outputs_move(case, name):
    kept, changed = case.moves(trained(case, name, "gradient"))
    assert kept <= 1e-12
    assert changed > 0.5


def test_without_a_projector_retained_outputs_move(case):
    kept, _ = case.moves(trained(case, "sgd", "none"))
    assert kept > 0.05


@pytest.mark.parametrize(("name", "least"), [("decayed", 0.05), ("adam", 1.0)])
def test_projected_gradients_alone_do_not_hold(case, name, least):
    assert case.moves(trained(case, name, "gradient"))[0] > least


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_projected_updates_hold_for_every_optimiser(case, name, clip):
    kept, changed = case.moves(trained(case, name, "project", clip))
    assert kept <= 1e-11
    assert changed > 0.1


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
def test_three_ways_to_hold_give_the_same_weights(case, name):
    wanted = trained(case, name, "project")
    for guard in ("gradient", "reparam"):
        assert torch.allclose(trained(case, name, guard), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_clipping_sees_allowed_directions_only(case, name):
    wanted = trained(case, name, "project", clip=0.1)
    assert torch.allclose(trained(case, name, "reparam", clip=0.1), wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(trained(case, name, "project"), wanted, rtol=0, atol=1e-3)


def trained_with_bias(case: Case, how: str) -> tuple[Tensor, Tensor]:
    """Return weight and bias after 60 steps; the bias is `free`, `frozen` or `augmented`."""
    scale = float((case.gram.trace.sum() / (case.gram.count * 64)).sqrt())
    wide = case.gram.augmented(scale)
    projector = case.projector
    if how == "augmented":
        projector = Projector.from_basis(balanced_basis([wide], [1.0], 1.0))
    weight, bias = case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()
    for _ in range(60):
        loss = functional.cross_entropy(case.forget @ weight.mT + bias, case.labels)
        down, tilt = torch.autograd.grad(loss, (weight, bias))
        if how == "augmented":
            joint = projector.apply(torch.cat([down, scale * tilt[:, None]], dim=1)[None])[0]
            down, tilt = joint[:, :-1], scale * joint[:, -1]
        else:
            down = projector.apply(down[None])[0]
        with torch.no_grad():
            weight -= 0.05 * down
            if how != "frozen":
                bias -= 0.05 * tilt
    return weight.detach(), bias.detach()


def test_a_free_bias_breaks_what_the_weights_keep(case):
    kept, _ = case.moves(*trained_with_bias(case, "free"))
    assert kept > 0.02


def test_a_frozen_bias_keeps_it(case):
    weight, bias = trained_with_bias(case, "frozen")
    assert case.moves(weight, bias)[0] <= 1e-12
    assert torch.equal(bias, case.bias)


@pytest.mark.parametrize("constant", [False, True])
def test_an_augmented_bias_moves_as_far_as_the_retained_columns_let_it(constant):
    case = linear_case(constant)
    weight, bias = trained_with_bias(case, "augmented")
    kept, changed = case.moves(weight, bias)
    assert kept <= 1e-12
    assert changed > 0.5
    assert (float((bias - case.bias).abs().max()) > 1e-3) == constant


@pytest.mark.parametrize(("constant", "alone"), [(False, 24), (True, 23)])
def test_free_dimensions_with_and_without_the_bias(constant, alone):
    gram = linear_case(constant).gram
    bases = [balanced_basis([these], [1.0], 1.0) for these in (gram, gram.augmented(1.0))]
    assert [basis.free for basis in bases] == [alone, 24]


def test_the_projector_is_one(case):
    (matrix,) = dense(case.projector)
    assert float((matrix @ matrix - matrix).abs().max()) <= 1e-14
    assert float((matrix - matrix.mT).abs().max()) <= 1e-14
    assert float(matrix.trace()) == pytest.approx(24, abs=1e-9)
    assert case.projector.free == case.basis.free == 24
    assert case.projector.ranks == (40,)
    retained = case.retained.mT
    assert float((matrix @ retained).norm() / retained.norm()) <= 1e-13


def test_applying_twice_is_applying_once(case):
    rows = draws(1, 7, 64)
    once = case.projector.apply(rows)
    assert torch.allclose(case.projector.apply(once), once, rtol=0, atol=1e-14)
    assert float((rows - once).norm()) > 1


def two_forms(basis: Basis) -> tuple[Projector, Projector]:
    """Return the projector through the span and through the complement, whatever is thinner."""
    span = torch.zeros_like(basis.vectors[..., : max(basis.ranks)])
    for group, rank in enumerate(basis.ranks):
        span[group, :, :rank] = basis.vectors[group][:, :rank]
    return Projector(span, False, basis.ranks), Projector(complement(basis), True, basis.ranks)


@pytest.mark.parametrize("eps", [0.3, 0.9, 0.999])
def test_both_forms_of_the_projector_agree(case, eps):
    columns = torch.stack([decaying(16, 40, power) for power in (0.3, 0.8, 1.4)])
    basis = balanced_basis([gram_of(columns)], [1.0], eps)
    by_span, by_rest = two_forms(basis)
    rows = draws(3, 5, 16)
    assert torch.allclose(by_span.apply(rows), by_rest.apply(rows), rtol=0, atol=1e-13)
    chosen = Projector.from_basis(basis)
    assert torch.allclose(chosen.apply(rows), by_rest.apply(rows), rtol=0, atol=1e-13)
    for group in range(3):
        outside = chosen.apply(rows)[group] @ span_of(basis, group)
        assert float(outside.abs().max()) <= 1e-14


@pytest.mark.parametrize(("rank", "width"), [(0, 0), (3, 3), (5, 5), (6, 4), (10, 0)])
def test_the_thinner_factor_is_kept(rank, width):
    diagonal = torch.zeros(10, dtype=DOUBLE)
    diagonal[:rank] = torch.arange(rank, 0, -1)
    gram = Gram(torch.diag(diagonal)[None], torch.zeros(1, 10, dtype=DOUBLE), 10)
    projector = Projector.from_basis(balanced_basis([gram], [1.0], 1.0))
    assert projector.factor.shape == (1, 10, width)
    assert projector.keeps_free == (rank > 5)
    assert projector.free == 10 - rank
    wanted = torch.ones(10, dtype=DOUBLE)
    wanted[:rank] = 0
    assert torch.allclose(dense(projector)[0], torch.diag(wanted), atol=1e-14)


def test_the_factor_of_a_basis_without_an_end_is_found(case):
    """A sequential merge keeps its span only, so the complement must be completed."""
    basis = gpm_basis([gram_of(decaying(20, 60))], [0.993])
    assert 10 < basis.ranks[0] < 20
    by_span, by_rest = two_forms(basis)
    assert Projector.from_basis(basis).keeps_free
    assert torch.allclose(dense(by_span), dense(by_rest), rtol=0, atol=1e-13)
    assert torch.allclose(dense(Projector.from_basis(basis)), dense(by_rest), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_a_projector_is_at_least_single(case, asked, given):
    projector = Projector.from_basis(case.basis, asked)
    assert projector.factor.dtype == given
    rows = draws(1, 3, 64, dtype=given)
    out = projector.apply(rows)
    assert out.dtype == given
    assert torch.allclose(out.double(), case.projector.apply(rows.double()), atol=1e-5)


def test_a_projector_moves_and_changes_precision(case):
    single = case.projector.to("cpu", torch.float32)
    assert single.factor.dtype == torch.float32
    assert (single.keeps_free, single.ranks) == (True, (40,))
    assert torch.equal(case.projector.to("cpu").factor, case.projector.factor)


# --------------------------------------------------------------------------- drift


@pytest.mark.parametrize("groups", [1, 3])
def test_an_update_moves_the_response_by_what_its_gram_says(groups):
    columns, update = draws(groups, 9, 50), draws(groups, 4, 9, seed=2)
    found = moved(update, gram_of(columns))
    assert found**2 == pytest.approx(float(((update @ columns) ** 2).sum()), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_updates_are_measured_in_float64(dtype):
    columns, update = draws(1, 9, 50), draws(1, 4, 9, seed=2, dtype=dtype)
    exact = float(((update.double() @ columns) ** 2).sum()) ** 0.5
    assert moved(update, gram_of(columns)) == pytest.approx(exact, rel=1e-13)
    left = gram_of(columns).trace
    wide = float(drift_bound(update.double(), left))
    assert float(drift_bound(update, left)) == pytest.approx(wide, rel=1e-13)


def test_training_only_the_head_drifts_by_what_is_measured(case):
    weight = trained(case, "sgd", "none")
    before = case.retained @ case.weight.mT + case.bias
    after = case.retained @ weight.mT + case.bias
    wanted = float((after - before).norm() / (before - case.bias).norm())
    assert wanted > 0.01
    found = drift((weight - case.weight)[None], case.weight[None], case.gram)
    assert found == pytest.approx(wanted, rel=1e-6)


def test_drift_of_silent_layers():
    gram, nothing, something = gram_of(draws(3, 5)), torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert drift(nothing, nothing, gram) == 0
    assert drift(nothing, something, gram) == 0
    assert drift(something, nothing, gram) == math.inf
    assert drift(something, something, Gram.zeros(1, 3)) == 0


@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 8, 3), (4, 5, 5), (2, 1, 6), (2, 6, 1)])
def test_spectral_norms_are_largest_singular_values(shape):
    update = draws(*shape)
    wanted = torch.linalg.matrix_norm(update, ord=2)
    assert torch.allclose(spectral_norms(update), wanted, rtol=1e-13)
    assert spectral_norms(torch.zeros(shape)).tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("eps", [0.9, 0.99])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_bound_is_above_what_a_projected_update_moves(eps, groups):
    per_class = [
        torch.stack([decaying(14, 40, power=0.8, seed=20 * k + g) for g in range(groups)])
        for k in range(4)
    ]
    grams = [gram_of(columns) for columns in per_class]
    basis = balanced_basis(grams, [1.0] * 4, eps)
    projector = Projector.from_basis(basis)
    for seed in range(5):
        update = projector.apply(draws(groups, 6, 14, seed=seed))
        for columns, gram in zip(per_class, grams, strict=True):
            truth = float((update @ columns).norm())
            bound = drift_bound(update, residual(basis, gram))
            assert truth <= bound * (1 + 1e-12)
            assert moved(update, gram) == pytest.approx(truth, rel=1e-9)


def test_the_bound_is_reached_by_the_worst_update():
    columns = decaying(6, 30)
    gram = gram_of(columns)
    basis = pooled_basis(gram, 1.0)
    loose = Basis(basis.vectors, basis.eigenvalues, (5,), basis.energies, basis.left)
    update = basis.vectors[:, :, 5:].mT * 3
    left = residual(loose, gram)
    found = float(drift_bound(update, left))
    assert found == pytest.approx(float((update @ columns).norm()), rel=1e-9)


# --------------------------------------------------------------------------- angles


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-6, 0.3, math.pi / 2])
def test_the_largest_angle_is_found_however_small(angle):
    turn = torch.linalg.qr(draws(7, 7))[0]
    first = turn[:, :3]
    second = first.clone()
    second[:, 1] = math.cos(angle) * turn[:, 1] + math.sin(angle) * turn[:, 5]
    mixed = second @ torch.linalg.qr(draws(3, 3, seed=1))[0]
    assert largest_sine(first, mixed) == pytest.approx(math.sin(angle), rel=1e-3, abs=2e-15)


def test_angles_between_unlike_widths_are_right_ones():
    eye = torch.eye(4)
    assert largest_sine(eye[:, :2], eye[:, :3]) == 1.0
    assert largest_sine(eye[:, :0], eye[:, :0]) == 0.0
    assert largest_sine(eye[:, :2], eye[:, :2].flip(1)) == 0.0
