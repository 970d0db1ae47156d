"""Rules that pick rows or weights, against brute force, definitions and known answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import synthetic_bias as bias
import torch
from torch import Tensor

from unsc_plugin.errors import ConfigError, DataError
from unsc_plugin.methods._selection import (
    hard,
    hard_utility,
    harden,
    li_liu,
    permuted,
    reweighing,
    selection,
)

DOUBLE = torch.float64


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


@pytest.fixture(scope="module")
def synthetic() -> tuple[Tensor, Tensor, float]:
    train, val, _ = bias.draw(0)
    theta = bias.fit(train.x, train.y)
    f, u = bias.influences(train, val, theta)
    return torch.from_numpy(f), torch.from_numpy(u), float(bias.parity(val, theta))


def refitted(k: int, e: Tensor) -> tuple[float, float, float]:
    """Return accuracy, mean loss and parity gap on test after a fit with multiplicities 1 + e."""
    train, _, test = bias.draw(k)
    theta = bias.fit(train.x, train.y, weight=1 + e.numpy())
    accuracy = ((test.x @ theta > 0) == test.y).mean()
    return accuracy, bias.log_loss(test.x, test.y, theta).mean(), bias.parity(test, theta)


# --------------------------------------------------------------------------- whole rows


def test_hard_takes_the_fewest_of_the_worst():
    for seed in range(30):
        f, u = draws(2, 25, seed=seed)
        target = 0.3 * float(-f[f < 0].sum())
        found = hard(f, target, utility=u)
        chosen = found.e == -1
        assert set(found.e.tolist()) == {0.0, -1.0}
        assert float(f[chosen].max()) < float(f[~chosen].min())
        assert -float(f[chosen].sum()) >= target
        assert -float(f[chosen].sum()) + float(f[chosen].max()) < target  # one less is not enough
        assert found.size == int(chosen.sum())
        assert found.improvement == pytest.approx(-float(f[chosen].sum()), rel=1e-14)
        assert found.utility == pytest.approx(float(u[chosen].sum()), rel=1e-12)
        assert found.shortfall == 0


def test_hard_never_drops_a_row_that_helps():
    f = column(-1, 2, 0, -3)
    found = hard(f, 100)
    assert found.e.tolist() == [-1, 0, 0, -1]
    assert (found.improvement, found.shortfall, found.utility) == (4, 96, None)
    assert hard(f, 100, fraction=1).e.tolist() == [-1, 0, 0, -1]
    assert hard(f, 0).size == 0


def test_ties_go_to_the_lower_index():
    f = -torch.ones(40, dtype=DOUBLE)
    assert hard(f, 17).e.tolist() == [-1] * 17 + [0] * 23
    assert harden(-torch.ones(40) / 2, f).e.tolist() == [-1] * 20 + [0] * 20


@pytest.mark.parametrize(("fraction", "size"), [(0.1, 60), (0.2, 120), (0.001, 0), (0.0, 0)])
def test_a_fraction_is_of_all_rows(fraction, size):
    assert hard(-draws(600).abs(), 1.0, fraction).size == size
    assert hard(-draws(100).abs(), 1.0, 0.29).size == 29  # 0.29 · 100 < 29 in floating point


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_a_fraction_outside_its_range(fraction):
    with pytest.raises(ConfigError, match="fraction"):
        hard(draws(5), 1.0, fraction)


def test_hard_utility_takes_only_rows_that_harm_both():
    f, u = draws(2, 200)
    both = (f < 0) & (u < 0)
    found = hard_utility(f, u, 10.0)
    assert bool(both[found.e < 0].all())
    assert found.size < int(both.sum())
    assert found.utility < 0
    out = hard_utility(f, u, 1e3)
    assert torch.equal(out.e == -1, both)
    assert out.shortfall == pytest.approx(1e3 + float(f[both].sum()), rel=1e-12)
    assert hard_utility(f, u, 10.0, fraction=0.02).size == 4


def test_hard_on_the_synthetic_table(synthetic):
    f, u, gap = synthetic
    found = hard(f, 0.5 * gap, utility=u)
    assert found.size == 483
    _, nll, parity = refitted(0, found.e)
    assert nll == pytest.approx(0.957, abs=5e-4)
    assert parity == pytest.approx(-0.03, abs=5e-3)
    assert hard_utility(f, u, gap).size == 635
    assert hard(f, 9.0).size == 1109


def test_lengths_are_checked():
    with pytest.raises(DataError, match="utility"):
        hard(draws(5), 1.0, utility=draws(4))
    with pytest.raises(DataError, match="gain"):
        selection(draws(5), draws(4), 1.0)


# --------------------------------------------------------------------------- soft to hard


def test_matched_threshold_is_the_shortest_prefix_that_reaches_the_soft_weights():
    reached = 0
    for seed in range(40):
        e, f, u = draws(3, 12, seed=seed)
        soft = float(f @ e)
        found = harden(e, f, u)
        order = [i for i in np.argsort(e.numpy(), kind="stable") if e[i] < 0]
        gains = [float(-f[order[:k]].sum()) for k in range(len(order) + 1)]
        hits = [k for k, gain in enumerate(gains) if gain >= soft]
        k = hits[0] if hits else int(np.argmax(gains))
        assert sorted(order[:k]) == (found.e == -1).nonzero()[:, 0].tolist()
        assert found.shortfall == pytest.approx(max(0.0, soft - gains[k]), abs=1e-12)
        assert found.improvement == pytest.approx(gains[k], abs=1e-12)
        assert found.threshold == (-float(e[order[k - 1]]) if k else None)
        reached += bool(hits and k)
    assert 5 <= reached < 40


def test_a_given_threshold_cuts_there():
    e, f = column(-1, -0.5, -0.49, 0.7), column(-1, -1, -1, 1)
    assert harden(e, f, threshold=0.5).e.tolist() == [-1, -1, 0, 0]
    assert harden(e, f, threshold=2.0).size == 0
    with pytest.raises(ConfigError, match="threshold"):
        harden(e, f, threshold=0.0)


def test_weights_that_are_a_set_stay_that_set(synthetic):
    f, u, gap = synthetic
    dropped = hard(f, 0.25 * gap).e
    assert torch.equal(harden(dropped, f, u, threshold=1.0).e, dropped)
    assert torch.equal(harden(dropped, f, u).e, dropped)
    assert harden(0 * dropped, f).size == 0


# --------------------------------------------------------------------------- linear programme


def by_vertices(f: Tensor, u: Tensor, target: float, gamma: float) -> float:
    """Return the least Σ x over all vertices; infinite if none is feasible."""
    n, limits = len(f), np.array([-target, gamma * float(u[u < 0].sum())])
    rows, best = np.stack([f.numpy(), u.numpy()]), math.inf
    for inner in itertools.chain.from_iterable(
        itertools.combinations(range(n), k) for k in (0, 1, 2)
    ):
        outer = [i for i in range(n) if i not in inner]
        for ends in itertools.product((0.0, 1.0), repeat=len(outer)):
            x = np.zeros(n)
            x[outer] = ends
            left = limits - rows @ x
            for tight in itertools.combinations((0, 1), len(inner)):
                pick = np.ix_(tight, inner)
                if inner:
                    x[list(inner)] = np.linalg.solve(rows[pick], left[list(tight)])
                inside = (x >= -1e-12).all() and (x <= 1 + 1e-12).all()
                if inside and (rows @ x <= limits + 1e-9).all():
                    best = min(best, x.sum())
    return best


@pytest.mark.parametrize("gamma", [0.0, 0.2])
def test_li_liu_against_all_vertices(gamma):
    relaxed = 0
    for seed in range(12):
        f, u = draws(2, 6, seed=seed)
        target = 0.5 * float(-f[f < 0].sum())
        found, least = li_liu(f, u, target, gamma), by_vertices(f, u, target, gamma)
        assert found.relaxed == math.isinf(least)
        relaxed += found.relaxed
        if not found.relaxed:
            assert -float(found.e.sum()) == pytest.approx(least, abs=1e-7)
            assert found.shortfall <= 1e-7
            assert found.utility <= gamma * float(u[u < 0].sum()) + 1e-7
        assert bool(((found.e <= 0) & (found.e >= -1)).all())
    assert 1 <= relaxed < 12


def test_li_liu_without_utility_fills_up_the_worst_rows():
    f = column(-3, 1, -2, -2)
    found = li_liu(f, torch.zeros(4, dtype=DOUBLE), 4.0)
    assert float(found.e[0]) == pytest.approx(-1, abs=1e-9)
    assert float(found.e.sum()) == pytest.approx(-1.5, abs=1e-9)
    assert found.improvement == pytest.approx(4, abs=1e-9)


def test_li_liu_asked_for_too_much_spends_alpha(synthetic):
    f, u, gap = synthetic
    for target in (-float(f[f < 0].sum()), 5 * gap):
        found = li_liu(f, u, target, alpha=0.1)
        assert found.relaxed
        assert float(found.e.sum()) == pytest.approx(-150, abs=1e-6)
        assert found.utility <= 1e-7
        assert found.shortfall == pytest.approx(target - found.improvement, rel=1e-12)
    assert not li_liu(f, u, 0.25 * gap).relaxed
    more = li_liu(f, u, 5 * gap, alpha=0.2)
    assert more.improvement > found.improvement


@pytest.mark.parametrize("c", [1e-3, 1e3])
def test_li_liu_in_other_units(synthetic, c):
    f, u, gap = synthetic
    expected = li_liu(f, u, 0.5 * gap)
    for found in (li_liu(c * f, u, c * 0.5 * gap), li_liu(f, c * u, 0.5 * gap)):
        assert float((found.e - expected.e).abs().max()) <= 1e-6


@pytest.mark.parametrize("settings", [{"gamma": -0.1}, {"gamma": 2}, {"alpha": 1.5}])
def test_li_liu_settings_are_checked(settings):
    with pytest.raises(ConfigError, match="gamma, alpha"):
        li_liu(draws(5), draws(5, seed=1), 1.0, **settings)


# --------------------------------------------------------------------------- without influences


def test_reweighing_makes_label_and_group_independent():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (500,), generator=generator)
    g = torch.randint(-1, 3, (500,), generator=generator)
    e = reweighing(y, g, 4)
    known = g >= 0
    assert bool((e[~known] == 0).all())
    table = torch.zeros(3, 4, dtype=DOUBLE)
    table.index_put_((g[known], y[known]), 1 + e[known], accumulate=True)
    total = table.sum()
    assert float(total) == pytest.approx(int(known.sum()), rel=1e-12)
    assert (
        float((table / total - table.sum(1)[:, None] * table.sum(0) / total**2).abs().max()) < 1e-15
    )
    share = [float((v[known] == 1).double().mean()) for v in (y, g)]
    cell = known & (y == 1) & (g == 1)
    joint = float(cell.sum() / known.sum())
    assert float(e[cell][0]) == pytest.approx(share[0] * share[1] / joint - 1, rel=1e-6)


def test_reweighing_on_eight_draws_of_the_synthetic_table():
    found = []
    for k in range(8):
        train, _, _ = bias.draw(k)
        e = reweighing(torch.from_numpy(train.y), torch.from_numpy(train.s), 2)
        found.append(refitted(k, e))
    assert np.mean(found, 0) == pytest.approx([0.714, 0.548, 0.147], abs=5e-4)


def test_reweighing_with_an_empty_cell_and_one_group():
    e = reweighing(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]), 3)
    assert e.tolist() == pytest.approx([-1 / 3, -1 / 3, -2 / 3])
    assert reweighing(torch.tensor([0, 1, 1]), torch.tensor([2, 2, -1]), 2).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [([0, 1], [-1, -1], "groups"), ([0, 1], [0, 1, 1], "groups"), ([0, 5], [0, 1], "labels"),
     ([-1, 1], [0, 1], "labels")],
)  # fmt: skip
def test_reweighing_checks_its_columns(labels, groups, message):
    with pytest.raises(DataError, match=message):
        reweighing(torch.tensor(labels), torch.tensor(groups), 2)


def test_permuted_keeps_the_values_and_follows_its_seed():
    e = draws(100)
    first = permuted(e, 1)
    assert torch.equal(first.sort().values, e.sort().values)
    assert torch.equal(first, permuted(e, 1))
    assert not torch.equal(first, permuted(e, 2))
    assert not torch.equal(first, e)
