"""Importance of weights for some rows, and the freedom that follows from it, against closed forms.

The reference takes one backward pass per row of the output norm; batch forms are compared with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unsc_plugin.conformance._toys import Net, original, problem
from unsc_plugin.methods import _importance as importance
from unsc_plugin.rows import Rows

torch.set_num_threads(1)

DOUBLE = torch.float64


class Flat(nn.Module):
    """z = Wx, with or without a bias."""

    def __init__(self, weight: Tensor, bias: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
        self.head.weight.data.copy_(weight)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)


class Tied(nn.Module):
    """z = V tanh(V x) with one matrix V under two names; a scale, and a weight of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False, dtype=DOUBLE)
        self.second = nn.Linear(4, 4, bias=False, dtype=DOUBLE)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor([1.3], dtype=DOUBLE))
        self.idle = nn.Parameter(torch.ones(3, dtype=DOUBLE))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * self.second(torch.tanh(self.first(features)))


class Branching(Flat):
    """A model that looks at its values, which no batched gradient can do."""

    def forward(self, features: Tensor) -> Tensor:
        if bool((features > 1e6).any()):
            return self.head(features) * 0
        return self.head(features)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def table(inputs: Tensor) -> Rows:
    return Rows.of({"features": inputs}, torch.zeros(len(inputs), dtype=torch.int64))


def one_by_one(model: nn.Module, rows: Rows, squared: bool = False) -> dict[str, Tensor]:
    """Return the mean absolute gradient of every parameter, a backward pass per row."""
    model = copy.deepcopy(model).eval()
    names = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in names.items()}
    for row in range(len(rows)):
        model.zero_grad(set_to_none=True)
        logits = model(**rows.gather([row]).inputs)[0]
        (logits.dot(logits) if squared else torch.linalg.vector_norm(logits)).backward()
        for name, p in names.items():
            if p.grad is not None:
                total[name] += p.grad.abs() / len(rows)
    return total


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference as a share of the largest expected value of all tensors."""
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    return worst / largest


# --------------------------------------------------------------------------- closed forms


def test_a_linear_map_has_the_closed_form() -> None:
    weight, x = drawn(3, 5), drawn(1, 5, seed=1)
    z = weight @ x[0]
    model = Flat(weight, bias=True)
    model.head.bias.data.zero_()
    found, route = importance.per_sample(model, table(x))
    assert route == "vmap"
    torch.testing.assert_close(
        found["head.weight"], torch.outer(z / z.norm(), x[0]).abs(), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(found["head.bias"], (z / z.norm()).abs(), rtol=0, atol=1e-10)
    squared, _ = importance.per_sample(model, table(x), squared=True)
    torch.testing.assert_close(
        squared["head.weight"], 2 * torch.outer(z, x[0]).abs(), rtol=0, atol=1e-10
    )


def test_several_rows_are_averaged_after_the_absolute_value() -> None:
    weight, x = drawn(3, 5), drawn(4, 5, seed=1)
    z = x @ weight.T
    unit = z / z.norm(dim=1, keepdim=True)
    expected = torch.stack([torch.outer(u, row).abs() for u, row in zip(unit, x, strict=True)])
    found, _ = importance.per_sample(Flat(weight), table(x))
    torch.testing.assert_close(found["head.weight"], expected.mean(0), rtol=0, atol=1e-10)


def test_opposing_rows_do_not_cancel() -> None:
    weight = torch.eye(2, dtype=DOUBLE)
    model = Flat(weight, bias=True)
    model.head.bias.data.zero_()
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=DOUBLE)  # bias gradients z/‖z‖ are opposite
    found, _ = importance.per_sample(model, table(x))
    expected = torch.tensor([1.0, 2.0], dtype=DOUBLE) / 5**0.5
    torch.testing.assert_close(found["head.bias"], expected, rtol=0, atol=1e-10)
    height = importance.output_norm(model(x)).mean()
    batch = dict(
        zip(
            ("head.weight", "head.bias"),
            torch.autograd.grad(height, model.parameters()),
            strict=True,
        )
    )
    for name, gradient in batch.items():
        assert bool((gradient.abs() <= found[name] + 1e-12).all())
    assert float(batch["head.bias"].abs().max()) < 1e-12


def test_a_row_without_any_output_counts_nothing() -> None:
    found, _ = importance.per_sample(Flat(drawn(3, 5)), table(torch.zeros(2, 5, dtype=DOUBLE)))
    assert torch.equal(found["head.weight"], torch.zeros(3, 5, dtype=DOUBLE))


def test_the_published_form_follows_its_formula() -> None:
    weight, x = drawn(3, 4), drawn(5, 4, seed=1)
    model = Flat(weight)
    gradients = []
    for start in (0, 2, 4):
        part = model(x[start : start + 2]).square().sum(dim=1).sqrt().mean()
        gradients.append(torch.autograd.grad(part, model.head.weight)[0])
    g1, g2, g3 = gradients
    expected = (2 * g1.abs() + 2 * (g1 + g2).abs() + (g1 + g2 + g3).abs()) / 6
    found = importance.by_batches(model, table(x), 2)
    torch.testing.assert_close(found["head.weight"], expected, rtol=0, atol=1e-12)


def test_the_published_form_divides_by_a_batch_too_many() -> None:
    x = drawn(4, 4, seed=1)
    model = Flat(drawn(3, 4))
    height = model(x).norm(dim=1).mean()
    expected = 4 * torch.autograd.grad(height, model.head.weight)[0].abs() / 8
    found = importance.by_batches(model, table(x), 4)
    torch.testing.assert_close(found["head.weight"], expected, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------- routes


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_both_routes_agree_in_double_precision(net: Net, squared: bool) -> None:
    model = original(net).double()
    rows = problem(net).train.subset(list(range(7)))
    if net == "conv":
        pixels = rows.gather(torch.arange(7)).inputs["pixel_values"].double()
        rows = Rows.of({"pixel_values": pixels}, rows.labels)
    else:
        rows = Rows.of({"features": rows.storage["features"][:7].double()}, rows.labels)
    expected = one_by_one(model, rows, squared)
    found, route = importance.per_sample(model, rows, squared=squared)
    assert route == "vmap"
    assert apart(found, expected) <= 1e-10
    model.eval()
    assert apart(importance._by_loop(model, rows, squared), expected) <= 1e-10


@pytest.mark.parametrize("net", ["conv", "vit", "bert"])
def test_every_architecture_has_the_importance_of_single_rows(net: Net) -> None:
    model = original(net).train()
    rows = problem(net).train.subset(list(range(6)))
    found, route = importance.per_sample(model, rows)
    assert route in (("loop", "vmap") if net == "bert" else ("vmap",))
    assert apart(found, one_by_one(model, rows)) <= 1e-5
    assert all(module.training for module in model.modules())


def test_a_model_that_branches_goes_row_by_row() -> None:
    weight, x = drawn(3, 5), drawn(4, 5, seed=1)
    found, route = importance.per_sample(Branching(weight), table(x))
    assert route == "loop"
    assert apart(found, importance.per_sample(Flat(weight), table(x))[0]) <= 1e-12


@pytest.mark.parametrize("size", [1, 400, 10_000])
def test_chunks_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = Flat(drawn(3, 5)), table(drawn(7, 5, seed=1))
    whole, _ = importance.per_sample(model, rows)
    monkeypatch.setattr(importance, "CHUNK_BYTES", size)
    parts, route = importance.per_sample(model, rows)
    assert route == "vmap"
    assert apart(parts, whole) <= 1e-14


def test_dropout_and_batch_statistics_stay_out_of_it(normed: Any, make_rows: Any) -> None:
    model, rows = normed(0, DOUBLE).train(), make_rows(9, 0, DOUBLE)
    before = copy.deepcopy(model.state_dict())
    first, _ = importance.per_sample(model, rows)
    second, _ = importance.per_sample(model, rows)
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert apart(first, one_by_one(model, rows)) <= 1e-10
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_published_form_leaves_the_model_alone(normed: Any, make_rows: Any) -> None:
    model, rows = normed(0, DOUBLE).eval(), make_rows(8, 0, DOUBLE)
    before = copy.deepcopy(model.state_dict())
    importance.by_batches(model, rows, 4)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not model.training


def test_parameters_without_gradient_are_skipped_and_idle_ones_count_nothing() -> None:
    model = Tied()
    model.scale.requires_grad_(False)
    found, _ = importance.per_sample(model, table(drawn(3, 4)))
    assert sorted(found) == ["first.weight", "idle"]
    assert not found["idle"].any()
    assert torch.equal(importance.freedom(found)["idle"], torch.ones(3, dtype=DOUBLE))


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_a_tied_matrix_counts_once_with_the_gradients_of_both_places(route: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tied()
    rows = table(drawn(3, 4))
    moving = importance._by_vmap if route == "vmap" else importance._by_loop
    found = moving(model, rows, False)
    assert [name for name in found if name.endswith("weight")] == ["first.weight"]
    total = torch.zeros(4, 4, dtype=DOUBLE)
    for x in rows.storage["features"]:
        matrix = model.first.weight.detach().clone().requires_grad_()
        (1.3 * matrix @ torch.tanh(matrix @ x)).norm().backward()
        assert matrix.grad is not None
        total += matrix.grad.abs() / 3
    torch.testing.assert_close(found["first.weight"], total, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------- freedom


def test_every_tensor_is_stretched_over_zero_to_one_the_most_important_weight_at_zero() -> None:
    values = {"a": drawn(4, 5).abs(), "b": 1e-3 * drawn(7, seed=1).abs()}
    free = importance.freedom(values)
    for name, value in values.items():
        assert float(free[name].min()) == 0 == float(free[name].flatten()[value.argmax()])
        assert float(free[name].max()) == 1 == float(free[name].flatten()[value.argmin()])
        expected = (value.max() - value) / (value.max() - value.min())
        torch.testing.assert_close(free[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["minmax", "rank", "ones"])
def test_tensors_without_an_order_are_pulled_in_full(mode: Any) -> None:
    values = {
        "wide": torch.tensor([0.0, 1.0, 3.0]),
        "constant": torch.full((4,), 2.0),
        "zero": torch.zeros(2, 2),
        "scalar": torch.tensor(5.0),
        "single": torch.tensor([7.0]),
        "planted": 1e-8 * torch.tensor([0.0, 1.0, 2.0]),
        "empty": torch.zeros(0),
    }
    free = importance.freedom(values, mode)
    for name in values.keys() - {"wide"}:
        assert torch.equal(free[name], torch.ones_like(values[name])), name
    assert (float(free["wide"].min()) == 0) == (mode != "ones")


@pytest.mark.parametrize(("share", "counts"), [(0.9e-6, False), (1.1e-6, True)])
def test_the_floor_is_a_millionth_of_the_largest_importance(share: float, counts: bool) -> None:
    values = {
        "largest": torch.tensor([0.0, 8.0], dtype=DOUBLE),
        "small": torch.tensor([0.0, 8.0 * share], dtype=DOUBLE),
    }
    assert (float(importance.freedom(values)["small"].min()) == 0) == counts


def test_nothing_but_zeros_is_no_division_by_zero() -> None:
    free = importance.freedom({"a": torch.zeros(3), "b": torch.zeros(2)})
    assert all(torch.equal(value, torch.ones_like(value)) for value in free.values())
    assert importance.freedom({}) == {}


@pytest.mark.parametrize("mode", ["minmax", "rank"])
@pytest.mark.parametrize("scale", [1e-9, 0.3, 1e6])
def test_the_unit_of_importance_does_not_matter(mode: Any, scale: float) -> None:
    values = {"a": drawn(4, 5).abs(), "b": 1e-3 * drawn(7, seed=1).abs(), "c": torch.ones(2)}
    scaled = {name: scale * value for name, value in values.items()}
    free, again = importance.freedom(values, mode), importance.freedom(scaled, mode)
    assert all(torch.allclose(free[n], again[n], rtol=0, atol=1e-7) for n in values)


def test_ranks_share_their_mean_where_importances_tie() -> None:
    free = importance.freedom({"a": torch.tensor([[5.0, 1.0], [1.0, 9.0]])}, "rank")["a"]
    assert free.tolist() == [
        pytest.approx([1 - 2 / 3, 1 - 0.5 / 3]),
        pytest.approx([1 - 0.5 / 3, 0]),
    ]


def test_the_summary_counts_weights_and_constant_tensors() -> None:
    values = {"a": torch.tensor([0.0, 0.2, 1.0]), "b": torch.ones(2)}
    found = importance.summary(importance.freedom(values), values)
    assert found["mean"] == pytest.approx((1 + 0.8 + 0 + 2) / 5)
    assert found["median"] == 1
    assert found["share_below_half"] == pytest.approx(1 / 5)
    assert found["constant_tensors"] == 1
