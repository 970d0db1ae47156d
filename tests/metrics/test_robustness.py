"""Robust accuracy and loss, the closed form of linear classifiers, and PGD against it."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import nn

from unsc_plugin import metrics
from unsc_plugin.attacks import PGD, linear_worst_case, open_space, pgd
from unsc_plugin.data import biased_draws
from unsc_plugin.errors import ConfigError, DataError, NotApplicable
from unsc_plugin.metrics import METRICS
from unsc_plugin.metrics.accuracy import accuracy
from unsc_plugin.metrics.membership import cross_entropy
from unsc_plugin.metrics.robustness import robust_block


class Linear(nn.Module):
    """A linear classifier of table columns, in float64."""

    def __init__(self, columns=5, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(2, columns, generator=generator, dtype=torch.float64)
        self.head = nn.Linear(columns, 2, dtype=torch.float64)
        self.head.weight.data, self.head.bias.data = weight, weight[:, 0].clone()

    def forward(self, features):
        return self.head(features)


def rows_of(count=40, columns=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (count,), generator=generator)


def margins(logits, labels):
    sign = 2 * labels - 1
    return sign * (logits[:, 1] - logits[:, 0])


# --------------------------------------------------------------------------- the block


def test_the_worse_of_both_points_counts():
    clean = np.array([[0.0, 2.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    attacked = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
    labels = np.array([1, 0, 0, 1])
    found = robust_block(clean, attacked, labels)
    # right and right; right and wrong; wrong and wrong; wrong and, by a harmless attack, right
    assert found["robust_acc"] == 0.25
    losses = [np.log(1 + np.exp(-1)), np.log(1 + np.e), np.log(1 + np.e**3), np.log(1 + np.e**2)]
    assert found["robust_nll"] == pytest.approx(np.mean(losses))
    assert found["robust_nll"] >= cross_entropy(clean, labels).mean()


def test_both_logits_must_be_of_the_same_rows():
    with pytest.raises(DataError, match=r"\(2, 2\) and \(1, 2\)"):
        robust_block(np.eye(2), np.eye(2)[:1], [0, 1])


@pytest.mark.parametrize("path", ["fast", "arrow"])
def test_the_class_is_the_block(path):
    rng = np.random.default_rng(0)
    clean, attacked = rng.normal(size=(2, 30, 3))
    labels = rng.integers(3, size=30)
    metric = metrics.Robustness()
    columns = {"predictions": clean, "references": labels, "adversarial": attacked}
    if path == "arrow":
        metric.add_batch(**{k: torch.tensor(v) for k, v in columns.items()})
        columns = {}
    found = metric.compute(**columns)
    assert found == robust_block(clean, attacked, labels)
    assert all(METRICS[name].direction == metric.directions[name] for name in found)


# --------------------------------------------------------------------------- the closed form


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("movable", [None, [True, False, True, True, False]])
def test_the_margin_falls_by_the_dual_norm(norm, movable):
    model, (x, labels) = Linear(), rows_of()
    mask = None if movable is None else torch.tensor(movable)
    logits = linear_worst_case(
        model.head.weight, model.head.bias, x, labels, eps=0.3, norm=norm, movable=mask
    )
    w = (model.head.weight[1] - model.head.weight[0]).detach()
    w = w if mask is None else w[mask]
    dual = w.abs().sum() if norm == "linf" else w.square().sum().sqrt()
    expected = margins(model(x), labels) - 0.3 * dual
    torch.testing.assert_close(margins(logits, labels), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_point_of_the_ball_is_worse(norm):
    model, (x, labels) = Linear(3), rows_of(6, 3)
    logits = linear_worst_case(model.head.weight, model.head.bias, x, labels, eps=0.5, norm=norm)
    worst = margins(logits, labels)
    if norm == "linf":
        tries = torch.tensor(list(itertools.product((-0.5, 0.5), repeat=3)), dtype=torch.float64)
    else:
        tries = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).double()
        tries = 0.5 * tries / tries.norm(dim=1, keepdim=True)
    reached = torch.stack([margins(model(x + delta), labels) for delta in tries]).amin(dim=0)
    assert (reached >= worst - 1e-12).all()
    torch.testing.assert_close(reached, worst, rtol=0, atol=1e-12 if norm == "linf" else 0.02)


def test_pgd_reaches_the_closed_form_in_linf():
    model, (x, labels) = Linear(), rows_of()
    model.feature_numeric = torch.tensor([True, True, False, True, True])
    cfg = PGD(norm="linf", eps=0.1, steps=50, targeted=False, stop_confidence=None)
    found = pgd(model, {"features": x}, labels, cfg)
    closed = linear_worst_case(
        model.head.weight, model.head.bias, x, labels, eps=0.1, movable=model.feature_numeric
    )
    reached = margins(model(x + found.delta), labels)
    torch.testing.assert_close(reached, margins(closed, labels), rtol=0, atol=1e-6)


def test_in_a_box_every_coordinate_is_clipped():
    model, (x, labels) = Linear(), rows_of()
    x = x.sigmoid()
    closed = linear_worst_case(
        model.head.weight, model.head.bias, x, labels, eps=0.3, box=(0.0, 1.0)
    )
    free = linear_worst_case(model.head.weight, model.head.bias, x, labels, eps=0.3)
    model.feature_bounds = torch.tensor([[0.0] * 5, [1.0] * 5], dtype=torch.float64)
    assert open_space(model, {"features": x}).lo is not None
    cfg = PGD(norm="linf", eps=0.3, steps=50, targeted=False, stop_confidence=None)
    reached = margins(model(x + pgd(model, {"features": x}, labels, cfg).delta), labels)
    torch.testing.assert_close(reached, margins(closed, labels), rtol=0, atol=1e-6)
    assert (margins(closed, labels) > margins(free, labels) + 1e-3).any()


def test_gradients_are_those_of_the_worst_case():
    model, (x, labels) = Linear(), rows_of(8)

    def worst(weight):
        logits = linear_worst_case(weight, model.head.bias, x, labels, eps=0.2)
        return nn.functional.cross_entropy(logits, labels)

    weight = model.head.weight.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(worst, (weight,), eps=1e-6, atol=1e-7)


def test_known_answers_of_the_biased_table():
    parts = biased_draws()
    x, y = parts["train"].x, parts["train"].y
    theta = np.zeros(20)
    for _ in range(30):
        p = expit(x @ theta)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 2 * np.eye(20)
        theta -= np.linalg.solve(hessian, x.T @ (p - y) + 2 * theta)
    weight = torch.stack([torch.zeros(20), torch.tensor(theta)]).double()
    x, labels = torch.tensor(parts["test"].x), torch.tensor(parts["test"].y)
    clean = x @ weight.T
    for norm, eps, acc, nll in (("linf", 0.1, 0.6392, 0.7024), ("l2", 0.3, 0.665, 0.654)):
        attacked = linear_worst_case(weight, None, x, labels, eps=eps, norm=norm)
        found = robust_block(clean, attacked, labels)
        assert found["robust_acc"] == pytest.approx(acc, abs=5.1e-4 if norm == "l2" else 6e-5)
        assert found["robust_nll"] == pytest.approx(nll, abs=5e-4 if norm == "l2" else 5e-5)
    # A frozen step over the boundary turns every answer round: no measure of robustness.
    score = (x @ weight[1])[:, None]
    flipped = (x - 1.3 * score * weight[1] / weight[1].square().sum()) @ weight.T
    val = torch.tensor(parts["val"].x) @ weight.T
    assert accuracy(val, torch.tensor(parts["val"].y)) == 0.77625
    assert accuracy(flipped, labels) == 1 - accuracy(clean, labels)
    assert robust_block(clean, flipped, labels)["robust_acc"] == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(3, 5)}, NotApplicable, r"weights \(2, D\), got \(3, 5\)"),
        ({"norm": "l2", "box": (0.0, 1.0)}, NotApplicable, "no closed form"),
        ({"box": (0.0, 0.1)}, DataError, "x within"),
        ({"eps": -0.1}, ConfigError, "eps ≥ 0"),
        ({"labels": torch.tensor([0, 2])}, DataError, "labels 0 and 1"),
        ({"labels": torch.tensor([0])}, DataError, r"\(2, 5\), \(1,\)"),
        ({"movable": torch.ones(4, dtype=torch.bool)}, DataError, r"and \(4,\)"),
    ],
)
def test_bad_input(changes, error, message):
    given = {"weight": torch.ones(2, 5), "labels": torch.tensor([0, 1]), "eps": 0.1} | changes
    weight, labels = given.pop("weight"), given.pop("labels")
    with pytest.raises(error, match=message):
        linear_worst_case(weight, None, torch.full((2, 5), 0.5), labels, **given)
