"""What each method must equal: another method, a closed form, or a loop written out by hand.

The identities of a method that comes later go into its own file, `test_identities_<name>.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import METHODS
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn import functional
from toy_runs import PLAIN, SAME, SEED, Logistic, State, differing, state, unlearn

from unsc_plugin import engine
from unsc_plugin.conformance._toys import BATCH, FULL, SHORT, original, problem, request, split
from unsc_plugin.errors import ForgetSetError
from unsc_plugin.method import Result, UnlearningTask, Weights
from unsc_plugin.methods import _last_modules
from unsc_plugin.methods.random_label import random_labels
from unsc_plugin.registry import create, load
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Scenario, Split, derive

torch.set_num_threads(1)

ITERATIVE = ("finetune", "neggrad", "neggrad_plus", "random_label", "cf_k")
HARSH = SHORT.model_copy(update={"weight_decay": 0.1, "momentum": 0.9})


# --------------------------------------------------------------------------- a model in closed form


def logistic_task(weights: Weights | None = None) -> tuple[Logistic, UnlearningTask, Rows]:
    rows, model = problem("mlp").train, Logistic()
    more = {"weights": weights} if weights else {}
    task = request(
        problem("mlp"), Scenario.RANDOM, recipe=PLAIN, fresh_model=lambda _: model, **more
    )
    return model, task, rows


def gradient(model: Logistic, rows: Rows, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ∇ of the mean of w·CE over rows with w ≠ 0: (p − onehot)ᵀ X, and its column sums."""
    inputs = rows.gather(torch.arange(len(rows))).inputs["features"].double()
    with torch.no_grad():
        residual = (inputs @ model.head.weight.T + model.head.bias).softmax(1)
    residual[torch.arange(len(rows)), rows.labels] -= 1
    residual *= (weight.double() / int((weight != 0).sum()))[:, None]
    return residual.T @ inputs, residual.sum(0)


def moved(model: Logistic, result: Result) -> tuple[Tensor, Tensor]:
    head = result.model.head
    assert isinstance(head, nn.Linear)
    return head.weight - model.head.weight, head.bias - model.head.bias


def assert_step(model: Logistic, result: Result, factor: float, by: tuple[Tensor, Tensor]) -> None:
    for step, expected in zip(moved(model, result), by, strict=True):
        torch.testing.assert_close(step.detach(), factor * expected, rtol=1e-7, atol=1e-7)


def test_one_step_of_neggrad_climbs_the_forget_loss() -> None:
    model, task, rows = logistic_task()
    forget = rows.subset(split(rows, Scenario.RANDOM)[0])
    result = create("neggrad", passes=1, lr=0.3).unlearn(model, task, SEED)
    assert_step(model, result, 0.3, gradient(model, forget, forget.weight))


def test_one_step_of_finetune_descends_the_retain_loss() -> None:
    model, task, rows = logistic_task()
    retain = rows.subset(split(rows, Scenario.RANDOM)[1])
    result = create("finetune", epochs=1, lr=0.3).unlearn(model, task, SEED)
    assert_step(model, result, -0.3, gradient(model, retain, retain.weight))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_step_of_neggrad_plus_follows_the_joint_formula(alpha: float) -> None:
    model, task, rows = logistic_task()
    forget, retain = (rows.subset(part) for part in split(rows, Scenario.RANDOM))
    result = create("neggrad_plus", epochs=1, lr=0.3, alpha=alpha).unlearn(model, task, SEED)
    kept = gradient(model, retain, retain.weight)
    gone = gradient(model, forget, forget.weight)
    joint = tuple(alpha * r - (1 - alpha) * f for r, f in zip(kept, gone, strict=True))
    assert_step(model, result, -0.3, joint)


@pytest.mark.parametrize("name", ["neggrad", "finetune"])
def test_soft_weights_weigh_the_gradient(name: str) -> None:
    eps = torch.linspace(-1, 0.5, 96, dtype=torch.float64)
    eps[::7] = 0
    model, task, rows = logistic_task(Weights(eps))
    result = create(name, epochs=1, lr=0.3).unlearn(model, task, SEED)
    # neggrad climbs what falls and descends what rises; finetune descends what is kept
    weight = eps if name == "neggrad" else 1 + eps
    assert_step(model, result, -0.3, gradient(model, rows, weight))


@pytest.mark.parametrize("name", ["neggrad", "finetune", "neggrad_plus"])
def test_a_method_fades_with_its_weights(name: str) -> None:
    """Weights near 0 are near no change: a step is not scaled up to that of a deletion."""
    settings = {"lr": 0.3, "epochs": 1}
    nothing = torch.zeros(96, dtype=torch.float64)
    nothing[:5] = -1e-9
    model, task, _ = logistic_task(Weights(nothing))
    faint = moved(model, create(name, **settings).unlearn(model, task, SEED))[0]
    plain = gradient(model, problem("mlp").train, torch.ones(96))[0]
    expected = {"neggrad": 0.0, "finetune": -0.3, "neggrad_plus": -0.3 * 0.95}[name] * plain
    torch.testing.assert_close(faint.detach(), expected, rtol=1e-6, atol=1e-8)


# --------------------------------------------------------------------------- between methods


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("name", ITERATIVE)
def test_no_epochs_is_the_identity(name: str, net: str) -> None:
    result = unlearn(name, net, settings={"epochs": 0})
    assert differing(state(result), original(net).state_dict()) == []
    assert result.steps == 0


def test_neggrad_plus_with_alpha_1_is_finetune() -> None:
    joint = unlearn("neggrad_plus", settings=SAME | {"alpha": 1.0})
    assert differing(state(joint), state(unlearn("finetune", settings=SAME))) == []


def test_neggrad_plus_with_alpha_0_raises_the_forget_loss() -> None:
    data = problem("mlp")
    forget = data.train.subset(split(data.train, Scenario.RANDOM)[0])
    result = unlearn("neggrad_plus", settings=SAME | {"alpha": 0.0})
    losses = [
        functional.cross_entropy(engine.predict(model, forget).logits, forget.labels)
        for model in (original("mlp"), result.model)
    ]
    assert losses[1] > losses[0]


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_cf_k_of_all_modules_is_finetune(net: str) -> None:
    all_modules = unlearn("cf_k", net, settings=SAME | {"k": 1.0}, recipe=HARSH)
    finetune = unlearn("finetune", net, settings=SAME, recipe=HARSH)
    assert differing(state(all_modules), state(finetune)) == []


@pytest.mark.parametrize("recipe", [HARSH, HARSH.model_copy(update={"optimizer": "adamw"})])
@pytest.mark.parametrize("name", ["cf_k", "eu_k"])
@pytest.mark.parametrize(
    ("k", "trained"), [(1, {"head"}), (2, {"head", "body.1"}), (0.25, {"head", "body.1"})]
)
def test_only_the_last_k_modules_change(name: str, k: Any, trained: set[str], recipe: Any) -> None:
    result = unlearn(name, "conv", settings={"k": k, "epochs": 2}, recipe=recipe)
    changed = differing(state(result), original("conv").state_dict())
    assert {entry.rpartition(".")[0] for entry in changed} == trained
    assert set(result.stats["trained_modules"]) == trained


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_eu_k_of_all_modules_at_the_full_rate_is_retrain(net: str) -> None:
    settings = {"k": 1.0, "lr_scale": 1.0, "epochs": FULL.epochs}
    anew = unlearn("eu_k", net, settings=settings, recipe=FULL)
    assert differing(state(anew), state(unlearn("retrain", net, recipe=FULL))) == []


def test_eu_k_without_epochs_only_resets_its_modules() -> None:
    result = unlearn("eu_k", "conv", settings={"k": 2, "epochs": 0})
    fresh = problem("conv").build(derive(SEED, "init")).state_dict()
    expected = {
        name: (fresh if name.startswith(("head", "body.1")) else old)[name]
        for name, old in ((n, original("conv").state_dict()) for n in fresh)
    }
    assert differing(state(result), expected) == []


class Tied(nn.Module):
    """Two layers share a weight; the head is a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def features(self, **inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs["features"]).relu()).relu()

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.features(**inputs))


@pytest.mark.parametrize("name", ["cf_k", "eu_k"])
def test_a_tied_weight_with_a_frozen_use_stays(name: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    task = request(problem("mlp"), Scenario.RANDOM, recipe=HARSH, fresh_model=lambda _: Tied())
    result = create(name, k=2, epochs=2).unlearn(model, task, SEED)
    changed = differing(state(result), model.state_dict())
    assert set(changed) == {"second.bias", "head.weight", "head.bias"}


def test_modules_are_counted_in_execution_order() -> None:
    task = request(problem("conv"), Scenario.RANDOM).guarded(frozenset({Split.RETAIN}), SEED)
    order = _last_modules.in_execution_order(original("conv"), task)
    assert order == ["stem.0", "stem.1", "body.0", "body.1", "head"]


# --------------------------------------------------------------------------- retrain, controls


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_retrain_is_training_on_the_retain_set(net: Any) -> None:
    result = unlearn("retrain", net, recipe=FULL)
    data = problem(net)
    model = data.build(derive(SEED, "init"))
    retain = data.train.subset(split(data.train, Scenario.RANDOM)[1])
    engine.train(model, retain, FULL, seed=SEED)
    assert differing(state(result), model.state_dict()) == []
    assert set(result.read) == {Split.RETAIN}
    assert differing(state(result), state(unlearn("retrain", net, recipe=FULL))) == []


def test_random_init_is_the_backbone_before_training() -> None:
    fresh = problem("conv").build(derive(SEED, "init"))
    assert differing(state(unlearn("random_init", "conv")), fresh.state_dict()) == []


def test_noise_is_scaled_by_the_spread_of_each_tensor() -> None:
    result = unlearn("noise", "mlp", settings={"scale": 0.3})
    generator = torch.Generator().manual_seed(derive(SEED, "method"))
    for name, before in original("mlp").named_parameters():
        draw = torch.randn(before.shape, generator=generator)
        expected = before + 0.3 * before.std(unbiased=False) * draw
        torch.testing.assert_close(state(result)[name], expected.detach())


def test_no_noise_is_the_identity() -> None:
    result = unlearn("noise", "conv", settings={"scale": 0.0})
    assert differing(state(result), original("conv").state_dict()) == []


def test_logit_mask_takes_the_class_and_leaves_every_other_logit() -> None:
    result = unlearn("logit_mask", "conv", scenario=Scenario.CLASS)
    rows = problem("conv").train
    before, after = (engine.predict(m, rows).logits for m in (original("conv"), result.model))
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert not (after.argmax(1) == 0).any()
    assert bool((after.softmax(1)[:, 0] == 0).all())
    assert set(differing(state(result), original("conv").state_dict())) == {
        "head.weight",
        "head.bias",
    }


# --------------------------------------------------------------------------- random labels


@pytest.mark.parametrize("classes", [3, 4, 10])
@pytest.mark.parametrize("exclude_true", [False, True])
def test_random_labels_are_uniform(classes: int, exclude_true: bool) -> None:
    truth = torch.zeros(5000, dtype=torch.int64)
    drawn = random_labels(truth, classes, torch.Generator().manual_seed(1), exclude_true)
    counts = torch.bincount(drawn, minlength=classes)[exclude_true:]
    assert drawn.max() < classes
    assert chisquare(counts.numpy()).pvalue > 0.001
    assert not exclude_true or not (drawn == truth).any()


def test_random_labels_need_two_classes() -> None:
    data = problem("mlp")
    task = request(data, Scenario.RANDOM, num_classes=3)
    task.num_classes = 1
    with pytest.raises(ValueError, match="K >= 2"):
        create("random_label").unlearn(original("mlp"), task, SEED)


def test_one_epoch_of_random_label_reads_both_sets_once() -> None:
    for order in ("forget_then_retain", "mixed"):
        result = unlearn("random_label", settings={"epochs": 1, "order": order})
        assert result.read == {Split.FORGET: 24, Split.RETAIN: 72}


# --------------------------------------------------------------------------- BatchNorm


def statistics(result: Result) -> State:
    return dict(result.model.named_buffers())


def test_ascent_leaves_running_statistics_alone() -> None:
    before = dict(original("conv").named_buffers())
    assert differing(statistics(unlearn("neggrad", "conv")), before) == []
    moving = unlearn("neggrad", "conv", settings={"move_statistics": True})
    assert differing(statistics(moving), before) == list(before)


@pytest.mark.parametrize("name", ["neggrad_plus", "random_label"])
def test_only_retain_passes_move_running_statistics(name: str) -> None:
    no_step = {"epochs": 2, "lr": 1e-30}  # weights stay, so only the passes themselves count
    retain_only = statistics(unlearn("finetune", "conv", settings=no_step))
    assert differing(statistics(unlearn(name, "conv", settings=no_step)), retain_only) == []
    moving = no_step | {"move_statistics": True}
    assert differing(statistics(unlearn(name, "conv", settings=moving)), retain_only)


def test_cf_k_leaves_frozen_statistics_alone() -> None:
    result = unlearn("cf_k", "conv", settings={"k": 1})
    assert differing(statistics(result), dict(original("conv").named_buffers())) == []


# --------------------------------------------------------------------------- weights and order

WEIGHTED = [name for name in METHODS if getattr(load().methods[name].entry, "supports_weights", 0)]


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_of_0_and_minus_1_are_the_two_sets(name: str, net: Any) -> None:
    eps = torch.zeros(96, dtype=torch.float64)
    eps[split(problem(net).train, Scenario.RANDOM)[0]] = -1
    by_eps, by_sets = unlearn(name, net, weights=Weights(eps)), unlearn(name, net)
    assert differing(state(by_eps), state(by_sets)) == []
    assert (by_eps.steps, by_eps.losses) == (by_sets.steps, by_sets.losses)


DETERMINISTIC = [name for name in METHODS if load().method_class(name).deterministic]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_order_of_the_rows_changes_nothing(name: str) -> None:
    rows = problem("conv").train
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    storage = {key: column[shuffled] for key, column in rows.storage.items()}
    moved_rows = Rows.of(storage, rows.labels[shuffled], rows.index[shuffled])
    one = unlearn(name, "conv", scenario=Scenario.CLASS)
    other = unlearn(name, "conv", scenario=Scenario.CLASS, train=moved_rows)
    assert differing(state(one), state(other)) == []


def test_an_empty_forget_set_is_refused() -> None:
    nothing = (torch.empty(0, dtype=torch.int64), torch.arange(96))
    for name in METHODS:
        kind = load().method_class(name)
        if Split.FORGET in kind.needs - kind.optional:
            with pytest.raises(ForgetSetError, match="forget"):
                unlearn(name, positions=nothing)


def test_the_batch_of_the_recipe_is_the_default() -> None:
    assert unlearn("finetune", settings={"epochs": 1}).steps == -(-72 // BATCH)
