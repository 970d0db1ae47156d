"""`ssd` and `fisher`: squared gradients against closed forms and loops, and what they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toy_runs import (
    DOUBLE,
    EIGHTHS,
    PLAIN,
    SEED,
    Logistic,
    State,
    differing,
    state,
    table,
    unlearn,
)

from unsc_plugin.conformance._toys import original, problem, request, split
from unsc_plugin.errors import (
    ConfigError,
    DivergedError,
    ForgetSetError,
    NotApplicable,
    WeightsNotSupported,
)
from unsc_plugin.method import UnlearningTask, Weights
from unsc_plugin.methods import _per_sample as single
from unsc_plugin.methods import fisher, ssd
from unsc_plugin.registry import create
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Scenario, Split, derive

torch.set_num_threads(1)


def guarded(net: Any = "mlp", **case: Any) -> UnlearningTask:
    """Return a task that opens everything."""
    return request(problem(net), Scenario.RANDOM, **case).guarded(frozenset(Split), SEED)


def apart(found: State, expected: State) -> float:
    """Return the largest difference as a share of the largest expected value of all tensors."""
    assert found.keys() == expected.keys()
    largest = max(float(value.detach().abs().max()) for value in expected.values())
    gaps = [(found[name] - expected[name]).detach().abs().max() for name in expected]
    return float(max(gaps)) / largest


class Branching(Logistic):
    """A model that looks at its values, which no batched gradient can do."""

    def forward(self, **inputs: Tensor) -> Tensor:
        if bool((inputs["features"] > 1e6).any()):
            return super().forward(**inputs) * 0
        return super().forward(**inputs)


def squared_gradients(model: Logistic, inputs: Tensor, residual: Tensor) -> dict[str, Tensor]:
    """Return (∂/∂W)² (n, K, D) and (∂/∂b)² (n, K) of heights with ∂h/∂z = residual (n, K)."""
    square = residual.detach() ** 2
    return {"head.weight": square[:, :, None] * inputs[:, None, :] ** 2, "head.bias": square}


# --------------------------------------------------------------------------- squares of single rows


def one_by_one(model: nn.Module, rows: Rows, height: single.Height) -> dict[str, Tensor]:
    """Return Σ w (∂h/∂θ)² by a backward pass per row."""
    model.eval()
    total = {name: torch.zeros_like(p, dtype=DOUBLE) for name, p in model.named_parameters()}
    for at in range(len(rows)):
        model.zero_grad(set_to_none=True)
        batch = rows.gather([at])
        height(model(**batch.inputs), batch.labels).sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += float(batch.weight) * p.grad.double() ** 2
    return total


@pytest.mark.parametrize("height", [single.cross_entropy, single.squared_norm])
@pytest.mark.parametrize(
    ("net", "way"), [("conv", "vmap"), ("mlp", "vmap"), ("vit", "vmap"), ("bert", "loop")]
)
def test_squares_are_those_of_a_loop(net: Any, way: str, height: single.Height) -> None:
    rows = problem(net).train.subset(torch.arange(20)).weighted(torch.arange(20) / 8)
    found, route = single.weighted_squares(original(net), guarded(net), rows, "all", height, 7)
    assert route == way
    assert apart(found, one_by_one(original(net), rows, height)) <= 1e-5


def test_a_model_that_branches_goes_row_by_row() -> None:
    rows, task = problem("mlp").train.weighted(torch.arange(96) / 8), guarded()
    found, route = single.weighted_squares(Branching(), task, rows, "all", single.cross_entropy)
    assert route == "loop"
    plain, _ = single.weighted_squares(Logistic(), task, rows, "all", single.cross_entropy)
    assert apart(found, plain) <= 1e-10
    assert unlearn("ssd").stats["gradients"] == unlearn("fisher").stats["gradients"] == "vmap"
    for name in ("ssd", "fisher"):
        result = create(name).unlearn(Branching(), guarded(), SEED)
        assert result.stats["gradients"] == "loop"


def test_running_out_of_memory_is_no_reason_to_go_row_by_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(single, "vmap", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        unlearn("ssd")


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_squares_depend_neither_on_the_batch_size_nor_on_the_order(net: Any) -> None:
    rows, task, model = problem(net).train, guarded(net), original(net)
    found = [
        single.weighted_squares(model, task, rows, "all", single.cross_entropy, size)[0]
        for size in (1, 7, 96)
    ]
    assert apart(found[0], found[2]) <= 1e-5  # float32 convolutions depend on the batch
    assert apart(found[1], found[2]) <= 1e-5
    mixed = rows.subset(torch.randperm(96, generator=torch.Generator().manual_seed(0)))
    again, _ = single.weighted_squares(model, task, mixed, "all", single.cross_entropy, 7)
    assert differing(found[1], again) == []


def test_chunks_are_no_larger_than_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = Logistic(), guarded()
    rows = problem("mlp").train
    assert single.chunks(model, task, rows, "all").batch_size == task.recipe.batch_size
    monkeypatch.setattr(single, "CHUNK_BYTES", 5 * 21 * 8)  # 18 weights and 3 biases in float64
    assert single.chunks(model, task, rows, "all").batch_size == 5


def test_frozen_parameters_have_no_squares_and_tied_ones_a_single_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
            self.second.weight = self.first.weight
            self.head = nn.Linear(6, 3).double()
            self.head.bias.requires_grad_(False)

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.head(self.second(self.first(inputs["features"].double()).tanh()).tanh())

    torch.manual_seed(0)
    model, rows = Tied(), problem("mlp").train.subset(torch.arange(9))
    found, route = single.weighted_squares(model, guarded(), rows, "all", single.cross_entropy)
    assert set(found) == {"first.weight", "first.bias", "second.bias", "head.weight"}
    loop = one_by_one(model, rows, single.cross_entropy)
    assert apart(found, {name: loop[name] for name in found}) <= 1e-10
    assert route == "vmap"


@pytest.mark.parametrize("name", ["ssd", "ssd.paper", "fisher"])
def test_importances_that_are_not_finite_end_the_run(name: str) -> None:
    data = problem("mlp").train
    nan = Rows.of({"features": torch.full_like(data.storage["features"], torch.nan)}, data.labels)
    result = unlearn(name, train=nan)
    assert result.status == "diverged"
    assert "not finite" in result.reason
    assert differing(state(result), original("mlp").state_dict()) == []
    task = request(problem("mlp"), Scenario.RANDOM, train=nan)
    with pytest.raises(DivergedError, match="not finite"):
        create(name).prepared(original("mlp"), task, SEED)


# --------------------------------------------------------------------------- ssd


def reference_ssd(
    weights: Weights | None, alpha: float, lam: float, label_free: bool
) -> dict[str, Tensor]:
    """Return the dampened weights of the logistic model from the closed form of its gradients."""
    model = Logistic()
    inputs, labels, r, a = table(weights)
    logits = model(features=inputs).detach()
    residual = 2 * logits if label_free else logits.softmax(1) - functional.one_hot(labels, 3)
    kappa = float((r**2).sum() / r.sum())
    expected = {}
    for name, square in squared_gradients(model, inputs, residual).items():
        gone, kept = (torch.tensordot(mass, square, dims=1) for mass in (r, a))
        own, everything = gone / r.sum(), (gone + kept) / (r.sum() + a.sum())
        theta = model.state_dict()[name]
        dampened = theta * (lam * everything / own).clamp(max=1)
        dampened = torch.where(own > alpha * everything, dampened, theta)
        expected[name] = (1 - kappa) * theta + kappa * dampened
    return expected


@pytest.mark.parametrize("label_free", [False, True])
@pytest.mark.parametrize("weights", [None, EIGHTHS], ids=["sets", "soft"])
@pytest.mark.parametrize(("alpha", "lam"), [(0.0, 1.0), (1.05, 0.5), (1.1, 1.0)])
def test_ssd_has_a_closed_form_on_a_linear_model(
    alpha: float, lam: float, weights: Weights | None, label_free: bool
) -> None:
    task = request(problem("mlp"), Scenario.RANDOM, recipe=PLAIN, weights=weights)
    method = create("ssd", alpha=alpha, lam=lam, label_free=label_free)
    result = method.unlearn(Logistic(), task, SEED)
    expected = reference_ssd(weights, alpha, lam, label_free)
    assert apart(state(result), expected) <= 1e-10
    changed = sum(int((expected[n] != p).sum()) for n, p in Logistic().state_dict().items())
    assert 0 < result.stats["dampened_share"] * 21 == pytest.approx(changed)


def test_all_of_d_counts_a_row_of_both_streams_as_often_as_it_weighs() -> None:
    """With e > 0 a row counts 1 + e times, with −1 < e < 0 once: Σ(1 + max(e, 0)) g²."""
    inputs, labels, r, a = table(EIGHTHS)
    residual = Logistic()(features=inputs).softmax(1) - functional.one_hot(labels, 3)
    task = request(problem("mlp"), Scenario.RANDOM, recipe=PLAIN, weights=EIGHTHS)
    found = create("ssd").prepared(Logistic(), task, SEED).state
    times = 1 + EIGHTHS.eps.clamp(min=0)
    torch.testing.assert_close(r + a, times)
    for name, square in squared_gradients(Logistic(), inputs, residual).items():
        expected = torch.tensordot(times, square, dims=1) / times.sum()
        torch.testing.assert_close(found.everything[name], expected, rtol=1e-10, atol=0)
    assert found.kappa == pytest.approx(float((r**2).sum() / r.sum()))
    assert found.bound == pytest.approx(float(times.sum() / r.sum()))


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_a_threshold_that_nothing_reaches_is_the_identity(net: Any) -> None:
    result = unlearn("ssd", net, settings={"alpha": 1e30})
    assert differing(state(result), original(net).state_dict()) == []
    assert result.stats["dampened_share"] == 0
    assert "no weight is dampened" in result.stats["warnings"][0]
    own = torch.tensor([0.0, 1.0, 1e30])
    assert ssd.shrinkage(own, torch.ones(3), torch.inf, 1.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("weights", [None, EIGHTHS], ids=["sets", "soft"])
@pytest.mark.parametrize("settings", [{}, {"alpha": 0.0, "lam": 1.2}, {"alpha": 1.0, "lam": 0.0}])
def test_no_weight_grows(settings: Any, weights: Weights | None) -> None:
    result = unlearn("ssd", "conv", settings=settings, weights=weights)
    before = dict(original("conv").named_parameters())
    for name, after in result.model.named_parameters():
        assert bool((after.abs() <= before[name].abs()).all())
    assert not result.stats.get("warnings")


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_ssd_does_not_depend_on_the_batch_size(net: Any) -> None:
    one, other = (unlearn("ssd", net, settings={"batch_size": size}) for size in (5, 96))
    assert apart(dict(one.model.named_parameters()), dict(other.model.named_parameters())) <= 1e-6
    batches = [
        unlearn("ssd", net, settings={"batch_size": size, "per_sample": False, "alpha": 1.5})
        for size in (5, 24)
    ]
    assert differing(*map(state, batches))


def test_ssd_does_not_depend_on_the_order_of_the_rows_or_on_the_seed() -> None:
    gone, kept = split(problem("conv").train, Scenario.RANDOM)
    one = unlearn("ssd", "conv")
    other = unlearn("ssd", "conv", positions=(gone.flip(0), kept.flip(0)), seed=SEED + 1)
    assert differing(state(one), state(other)) == []
    settings = {"per_sample": False, "alpha": 1.5}
    one = unlearn("ssd", "conv", settings=settings)
    flipped = (gone.flip(0), kept.flip(0))
    other = unlearn("ssd", "conv", settings=settings, positions=flipped, seed=SEED + 1)
    assert differing(state(one), state(other)) == []


def test_importance_of_the_forget_set_is_bounded_by_its_share() -> None:
    found = (
        create("ssd")
        .prepared(original("conv"), request(problem("conv"), Scenario.RANDOM), SEED)
        .state
    )
    ratios = [
        found.forget[name][value > 0] / value[value > 0] for name, value in found.everything.items()
    ]
    assert found.bound == 4
    assert 2 < float(torch.cat(ratios).max()) <= 4 * (1 + 1e-12)


@pytest.mark.parametrize(("size", "alpha"), [(24, 2.0), (6, 8.0), (4, 10.0), (1, 10.0)])
def test_the_default_threshold_follows_the_share_of_the_forget_set(size: int, alpha: float) -> None:
    positions = split(problem("mlp").train, Scenario.RANDOM, size)
    assert unlearn("ssd", positions=positions).stats["alpha"] == alpha
    assert unlearn("ssd", settings={"alpha": 3.0}, positions=positions).stats["alpha"] == 3.0


def test_faint_weights_hardly_change_anything() -> None:
    gone = split(problem("mlp").train, Scenario.RANDOM)[0]
    before, moved = original("mlp").state_dict(), []
    for weight in (2.0**-10, 2.0**-2, 1.0):
        eps = torch.zeros(96, dtype=DOUBLE)
        eps[gone] = -weight
        after = state(unlearn("ssd", weights=Weights(eps), settings={"alpha": 1.1, "lam": 0.5}))
        moved.append(max(float((after[name] - before[name]).abs().max()) for name in before))
    assert moved[0] < moved[1] / 50 < moved[2]


def test_squares_of_batches_are_those_of_their_mean_gradient() -> None:
    model, (inputs, labels, r, _) = Logistic(), table()
    residual = (model(features=inputs).softmax(1) - functional.one_hot(labels, 3)).detach()
    task = request(problem("mlp"), Scenario.RANDOM, recipe=PLAIN)
    found = create("ssd", per_sample=False).prepared(model, task, SEED).state
    for part, mass in ((found.forget, r), (found.everything, torch.ones(96).double())):
        gradient = (residual * mass[:, None]).T @ inputs / mass.sum()
        torch.testing.assert_close(part["head.weight"], gradient**2, rtol=1e-9, atol=1e-15)
        bias = (residual * mass[:, None]).sum(0) / mass.sum()
        torch.testing.assert_close(part["head.bias"], bias**2, rtol=1e-9, atol=1e-15)
    assert found.route == "batches"


def test_squares_of_several_batches_are_averaged() -> None:
    rows, settings = problem("mlp").train, {"per_sample": False, "batch_size": 12}
    task = request(problem("mlp"), Scenario.RANDOM, recipe=PLAIN)
    found = create("ssd", **settings).prepared(Logistic(), task, SEED).state
    gone = rows.subset(split(rows, Scenario.RANDOM)[0])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(3, 6, dtype=DOUBLE)
    for part in order.split(12):
        model, batch = Logistic(), gone.gather(part)
        functional.cross_entropy(model(**batch.inputs), batch.labels).backward()
        total += model.head.weight.grad**2 / 2
    torch.testing.assert_close(found.forget["head.weight"], total, rtol=1e-9, atol=1e-15)


def test_squares_of_batches_know_sets_only() -> None:
    with pytest.raises(WeightsNotSupported, match=r"per_sample=True.*harden"):
        unlearn("ssd", settings={"per_sample": False}, weights=EIGHTHS)
    hard = torch.zeros(96, dtype=DOUBLE)
    hard[split(problem("mlp").train, Scenario.RANDOM)[0]] = -1
    settings = {"per_sample": False, "alpha": 1.5}
    by_eps = unlearn("ssd", settings=settings, weights=Weights(hard))
    assert differing(state(by_eps), state(unlearn("ssd", settings=settings))) == []


# --------------------------------------------------------------------------- fisher


@pytest.mark.parametrize("weights", [None, EIGHTHS], ids=["sets", "soft"])
def test_fisher_information_of_a_softmax_head_has_a_closed_form(weights: Weights | None) -> None:
    """F of W_kd is the mean of a·x_d²·p_k(1 − p_k), of b_k that without x_d²."""
    model, (inputs, _, _, a) = Logistic(), table(weights)
    task = request(problem("mlp"), Scenario.RANDOM, recipe=PLAIN, weights=weights)
    found = create("fisher").prepared(model, task, SEED).state
    p = model(features=inputs).softmax(1).detach()
    spread, count = a[:, None] * p * (1 - p), int((a > 0).sum())
    expected = {"head.weight": spread.T @ inputs**2 / count, "head.bias": spread.sum(0) / count}
    assert apart(found, expected) <= 1e-6


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_fisher_information_is_that_of_a_loop(net: Any) -> None:
    data = problem(net).train
    rows = data.subset(split(data, Scenario.RANDOM)[1])
    found = (
        create("fisher").prepared(original(net), request(problem(net), Scenario.RANDOM), SEED).state
    )
    model = original(net)
    inputs = rows.gather(torch.arange(len(rows))).inputs
    chance = model(**inputs).softmax(1).detach()
    total = {name: torch.zeros_like(p, dtype=DOUBLE) for name, p in model.named_parameters()}
    for label in range(3):
        labelled = rows.relabelled(torch.full((len(rows),), label)).weighted(chance[:, label])
        for name, value in one_by_one(model, labelled, single.cross_entropy).items():
            total[name] += value / len(rows)
    assert apart(found, total) <= 1e-5


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_no_noise_is_the_identity(net: Any) -> None:
    result = unlearn("fisher", net, settings={"alpha": 0.0})
    assert differing(state(result), original(net).state_dict()) == []


def test_a_forgotten_class_loses_its_head_row() -> None:
    before = original("conv").state_dict()
    after = state(unlearn("fisher", "conv", settings={"alpha": 0.0}, scenario=Scenario.CLASS))
    assert set(differing(after, before)) == {"head.weight", "head.bias"}
    assert torch.equal(after["head.weight"][1:], before["head.weight"][1:])
    assert torch.equal(after["head.bias"][1:], before["head.bias"][1:])
    drawn = torch.cat([
        state(unlearn("fisher", "conv", scenario=Scenario.CLASS, seed=seed))["head.weight"][0]
        for seed in range(10)
    ])  # fmt: skip
    assert float(drawn.square().mean()) == pytest.approx(1e-3, rel=0.2)
    assert abs(float(drawn.mean())) < 5e-3


def test_the_noise_has_the_variance_of_the_reference_rules() -> None:
    model, settings = original("conv"), {"alpha": 1e-5}
    task = request(problem("conv"), Scenario.RANDOM)
    information = create("fisher", **settings).prepared(model, task, SEED).state
    after = state(unlearn("fisher", "conv", settings=settings))
    generator = torch.Generator().manual_seed(derive(SEED, "method"))
    for name, before in model.named_parameters():
        inverse = 1 / (information[name] + 1e-8)
        limit = 1e2 if name.startswith("head") else 1e3
        inverse = torch.where(inverse > limit, torch.full_like(inverse, limit), inverse)
        spread = 1e-5 * inverse
        if before.ndim >= 2:
            spread = spread.sum(1, keepdim=True) / before.shape[1]
        if name.startswith("head") or before.ndim == 1:
            spread = 10 * spread
        draw = torch.randn(before.shape, generator=generator)
        expected = before.detach().double() + spread.sqrt() * draw
        torch.testing.assert_close(after[name], expected.float(), rtol=0, atol=1e-6)


def test_a_scalar_parameter_counts_as_one_of_few_dimensions() -> None:
    assert float(fisher.variance(torch.tensor(1.0), 1e-6, in_head=False)) == pytest.approx(1e-5)


def test_information_is_measured_on_a_random_sample_of_the_retain_set() -> None:
    seen: set[int] = set()
    data = problem("mlp").train
    order = torch.argsort(data.labels, stable=True)
    rows = {key: column[order] for key, column in data.storage.items()}

    def decode(positions: Tensor) -> dict[str, Tensor]:
        seen.update(positions.tolist())
        return {key: column[positions] for key, column in rows.items()}

    sorted_rows = Rows.of({}, data.labels[order], decode=decode)
    result = unlearn("fisher", settings={"max_samples": 12}, train=sorted_rows)
    assert result.stats["samples"] == len(seen) == 12
    assert set(data.labels[order][sorted(seen)].tolist()) == {0, 1, 2}
    first = set(seen)
    seen.clear()
    unlearn("fisher", settings={"max_samples": 12}, train=sorted_rows, seed=SEED + 1)
    assert seen != first
    assert unlearn("fisher").stats["samples"] == 72


class Odd(nn.Module):
    """A model whose last layer is no linear one, or which has none at all."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.last = kind, nn.Linear(6, 3)

    @property
    def head(self) -> nn.Module:
        if self.kind == "none":
            raise NotApplicable("no final layer")
        return nn.ModuleList([self.last]) if self.kind == "list" else self.last

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.last(inputs["features"])


@pytest.mark.parametrize("kind", ["none", "list"])
def test_without_a_linear_head_there_is_no_rule_for_it(kind: str) -> None:
    torch.manual_seed(0)
    odd, plain = Odd(kind), Odd("linear")
    plain.load_state_dict(odd.state_dict())
    task = request(problem("mlp"), Scenario.CLASS)
    method = create("fisher", alpha=0.0)
    result = method.unlearn(odd, task, SEED)
    assert differing(state(result), odd.state_dict()) == []
    assert result.stats["head_rule"].startswith("none")
    ruled = method.unlearn(plain, task, SEED)
    assert ruled.stats["head_rule"] == "linear"
    assert differing(state(ruled), plain.state_dict())


@pytest.mark.parametrize("name", ["ssd", "fisher"])
def test_parameters_that_arrive_frozen_stay(name: str) -> None:
    model = original("mlp", dead_stem=True)
    result = create(name).unlearn(model, request(problem("mlp"), Scenario.RANDOM), SEED)
    changed = differing(state(result), model.state_dict())
    assert changed
    assert not [entry for entry in changed if entry.startswith("stem")]


# --------------------------------------------------------------------------- bad input

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("ssd", {"alpha": -1.0}, "alpha"),
    ("ssd", {"lam": -0.1}, "lam"),
    ("ssd", {"batch_size": 0}, "batch_size"),
    ("ssd", {"per_sample": "yes"}, "per_sample"),
    ("ssd", {"lambda": 1.0}, "lam"),
    ("fisher", {"alpha": -1e-6}, "alpha"),
    ("fisher", {"max_samples": 0}, "max_samples"),
    ("fisher", {"max_sample": 10}, "max_samples"),
]


@pytest.mark.parametrize(("name", "settings", "field"), BAD)
def test_bad_settings_are_refused_by_name(name: str, settings: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        create(name, **settings)


def test_missing_splits_and_other_preparations_are_refused() -> None:
    gone, kept = split(problem("mlp").train, Scenario.RANDOM)
    nothing = torch.empty(0, dtype=torch.int64)
    for name in ("ssd", "fisher"):
        with pytest.raises(ForgetSetError, match="retain"):
            unlearn(name, positions=(gone, nothing))
        with pytest.raises(ForgetSetError, match="forget"):
            unlearn(name, positions=(nothing, kept))
        method, task = create(name), request(problem("mlp"), Scenario.RANDOM)
        prepared = method.prepared(original("mlp"), task, SEED)
        with pytest.raises(ConfigError, match="another model"):
            method.unlearn(original("mlp", epochs=1), task, SEED, prepared)
