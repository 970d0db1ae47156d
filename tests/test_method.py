"""What the base of all methods holds an author to, whoever the author is."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from unsc_plugin import engine
from unsc_plugin.errors import (
    ArchitectureChanged,
    ConfigError,
    DivergedError,
    ForgetSetError,
    FrozenChanged,
    ScenarioNotSupported,
    SplitAccessError,
    UnscError,
    WeightsNotSupported,
)
from unsc_plugin.method import (
    Budget,
    NoConfig,
    Progress,
    Recipe,
    Result,
    Scenario,
    Split,
    TrainingConfig,
    UnlearningMethod,
    UnlearningTask,
    Weights,
    build_config,
    from_function,
    option,
)
from unsc_plugin.methods.finetune import Finetune
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import state_sha256

Make = Callable[..., UnlearningTask]
Net = Callable[..., nn.Module]


def method(
    run: Callable[[nn.Module, UnlearningTask], Any],
    *,
    needs: tuple[str, ...] = ("forget", "retain"),
    prepare: Callable[[nn.Module, UnlearningTask], Any] | None = None,
    config: type = NoConfig,
    **settings: Any,
) -> UnlearningMethod:
    """Return a method made of plain functions."""

    class Made(UnlearningMethod):
        name = "made"
        scenarios = frozenset({Scenario.RANDOM, Scenario.CLASS})
        Config = config

        def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
            return run(model, task)

        def prepare(self, model: nn.Module, task: UnlearningTask) -> Any:
            return prepare(model, task) if prepare else None

    Made.needs = frozenset(Split(split) for split in needs)
    return Made(**settings)


def noisy(model: nn.Module, task: UnlearningTask) -> nn.Module:
    """Move every weight by a draw from each source of chance."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
            parameter.add_(torch.randn(parameter.shape, generator=task.generator))
            parameter.mul_(random.random() + np.random.rand())
    return model


def train(model: nn.Module, task: UnlearningTask) -> nn.Module:
    """Train for the recipe's epochs on the retain set."""
    engine.fit_recipe(model, task, task.loader("retain"))
    return model


# --------------------------------------------------------------------------- the public call


def test_the_original_and_the_process_stay_as_they_are(normed: Net, make_task: Make) -> None:
    model = normed()
    model.norm.eval()
    model.body.bias.requires_grad_(False)
    before, modes = state_sha256(model), [m.training for m in model.modules()]
    generators = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())

    def run(inner: nn.Module, task: UnlearningTask) -> nn.Module:
        assert inner is not model
        assert all(m.training for m in inner.modules())
        train(inner, task)
        for parameter in inner.parameters():
            parameter.requires_grad_(True)
            parameter.grad = torch.ones_like(parameter)
        return noisy(inner, task)

    result = method(run).unlearn(model, make_task(), seed=3)
    assert state_sha256(model) == before
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.random.get_state()[1].tolist() == generators[2]
    assert not model._forward_hooks
    assert not result.model._forward_hooks
    assert state_sha256(result.model) != before
    assert not any(m.training for m in result.model.modules())
    assert not result.model.body.bias.requires_grad
    assert result.model.head.weight.requires_grad
    assert all(p.grad is None for p in result.model.parameters())
    assert result.status == "ok"
    assert result.reason is None
    shared = {p.data_ptr() for p in model.parameters()}
    assert not shared & {p.data_ptr() for p in result.model.parameters()}


def test_the_seed_decides_everything(normed: Net, make_task: Make) -> None:
    made = method(lambda model, task: noisy(train(model, task), task))
    task = make_task()
    first = made.unlearn(normed(), task, seed=1)
    torch.rand(5)
    assert state_sha256(made.unlearn(normed(), task, seed=1).model) == state_sha256(first.model)
    assert state_sha256(made.unlearn(normed(), task, seed=2).model) != state_sha256(first.model)


def test_seeds_of_any_size_work_or_say_why(mlp: Net, make_task: Make) -> None:
    made = method(train)
    assert made.unlearn(mlp(), make_task(), seed=2**32 - 1).status == "ok"
    with pytest.raises(UnscError, match="seed"):
        made.unlearn(mlp(), make_task(), seed=-1)


def test_the_result_tells_what_it_cost(mlp: Net, make_task: Make) -> None:
    def prepare(model: nn.Module, task: UnlearningTask) -> int:
        with torch.no_grad():
            for batch in task.loader("forget", train=False):
                model(**batch.inputs)
        return 7

    def run(model: nn.Module, task: UnlearningTask) -> nn.Module:
        task.stats["prepared"] = task.prepared
        return train(model, task)

    result = method(run, prepare=prepare).unlearn(mlp(), make_task(), seed=0)
    assert result.stats == {"prepared": 7}
    assert result.read == {Split.FORGET: 6, Split.RETAIN: 32}
    assert result.work == 6 + 3 * 32
    assert result.steps == len(result.losses) == 6  # 16 rows: 5, 5, 5 + 1
    assert result.epochs == 2
    assert result.seconds_unlearn > 0
    assert result.seconds_prepare > 0


def test_a_task_serves_many_runs(mlp: Net, make_task: Make) -> None:
    task = make_task()
    first = method(train).unlearn(mlp(), task, seed=0)
    second = method(train).unlearn(mlp(), task, seed=0)
    assert state_sha256(first.model) == state_sha256(second.model)
    assert first.losses == second.losses
    assert (first.read, first.work) == (second.read, second.work)
    assert (task.steps, task.losses, task.stats, task.read) == (0, [], {}, {})


def test_work_of_fresh_models_and_copies_counts(mlp: Net, make_task: Make) -> None:
    def run(model: nn.Module, task: UnlearningTask) -> nn.Module:
        teacher, fresh = copy.deepcopy(model), task.fresh_model()
        with torch.no_grad():
            for batch in task.loader("forget"):
                teacher(**batch.inputs)
                fresh(**batch.inputs)
        return model

    assert method(run).unlearn(mlp(), make_task(), seed=0).work == 12


def test_no_gradient_outside_does_not_reach_in(mlp: Net, make_task: Make) -> None:
    with torch.no_grad():
        result = method(train).unlearn(mlp(), make_task(), seed=0)
        assert not torch.is_grad_enabled()
    assert result.steps == 6


# --------------------------------------------------------------------------- guards


@pytest.mark.parametrize("split", ["forget", "retain", "val"])
@pytest.mark.parametrize("way", ["loader", "rows"])
def test_a_split_that_is_not_declared_cannot_be_opened(
    mlp: Net, make_task: Make, split: str, way: str
) -> None:
    others = tuple({"forget", "retain", "val"} - {split})
    made = method(lambda model, task: getattr(task, way)(split) and model, needs=others)
    with pytest.raises(SplitAccessError, match=f"split {split}.*{others[0]}"):
        made.unlearn(mlp(), make_task(), seed=0)
    with pytest.raises(SplitAccessError):
        make_task().loader(split)


def test_sizes_and_label_counts_are_no_opening(mlp: Net, make_task: Make) -> None:
    def run(model: nn.Module, task: UnlearningTask) -> nn.Module:
        assert (task.size("forget"), task.size("retain"), task.size("val")) == (6, 16, 5)
        assert int(task.label_counts("forget").sum()) == 6
        assert task.label_counts("retain").shape == (3,)
        return model

    assert method(run, needs=()).unlearn(mlp(), make_task(), seed=0).read == {}


def test_a_test_split_does_not_exist(make_task: Make) -> None:
    with pytest.raises(ValueError, match="test"):
        make_task().loader("test")


def test_opened_splits_are_told_even_if_nothing_is_read(mlp: Net, make_task: Make) -> None:
    made = method(lambda model, task: task.loader("val") and model, needs=("val",))
    assert made.unlearn(mlp(), make_task(), seed=0).read == {Split.VAL: 0}


def test_forget_and_retain_do_not_overlap(make_task: Make, make_rows: Callable[..., Rows]) -> None:
    rows = make_rows(10)
    with pytest.raises(ForgetSetError, match=r"2 samples.*first: 3"):
        make_task(forget=rows.subset([1, 3, 4]), retain=rows.subset([3, 4, 5]))


@pytest.mark.parametrize("gone", ["forget", "retain", "val"])
def test_a_needed_split_must_be_there(mlp: Net, make_task: Make, gone: str) -> None:
    ran: list[int] = []
    made = method(lambda model, task: ran.append(1) or model, needs=(gone,))
    with pytest.raises(ForgetSetError, match=f"needs split {gone}"):
        made.unlearn(mlp(), make_task(**{gone: None}), seed=0)
    assert not ran


def test_a_needed_split_must_have_rows(
    mlp: Net, make_task: Make, make_rows: Callable[..., Rows]
) -> None:
    task = make_task(retain=make_rows(3).subset([]))
    with pytest.raises(ForgetSetError, match="retain"):
        method(train).unlearn(mlp(), task, seed=0)


def test_an_empty_forget_set_is_refused_whatever_the_method_needs(
    mlp: Net, make_task: Make, make_rows: Callable[..., Rows]
) -> None:
    def run() -> Result:
        task = make_task(forget=make_rows(3).subset([]))
        return method(train, needs=("retain",)).unlearn(mlp(), task, seed=0)

    with pytest.raises(ForgetSetError):
        run()


def test_scenarios_are_held(mlp: Net, make_task: Make) -> None:
    task = make_task(scenario=Scenario.SEQUENTIAL)
    with pytest.raises(ScenarioNotSupported, match=r"sequential.*class, random"):
        method(train).unlearn(mlp(), task, seed=0)


def test_forget_classes_have_no_retained_rows(make_task: Make, make_rows: Any) -> None:
    rows = make_rows(22)
    gone = rows.labels == 1
    task = make_task(
        forget=rows.subset(torch.nonzero(gone)[:, 0]),
        retain=rows.subset(torch.nonzero(~gone)[:, 0]),
    )
    assert task.forget_classes == frozenset({1})
    assert make_task().forget_classes == frozenset()


def test_labels_beyond_the_classes_are_refused(make_task: Make, make_rows: Any) -> None:
    rows = make_rows(22).relabelled(torch.arange(22) % 5)
    with pytest.raises(UnscError, match="label"):
        make_task(forget=rows.subset([0, 1, 2, 3, 4]), retain=rows.subset([5, 6, 7]))


# --------------------------------------------------------------------------- broken methods


def test_a_diverged_run_returns_the_original(mlp: Net, make_task: Make) -> None:
    def run(model: nn.Module, task: UnlearningTask) -> nn.Module:
        stage = engine.Stage(
            task.loader("retain"),
            lambda m, b: engine.cross_entropy(m, b) * (math.nan if task.steps == 2 else 1),
        )
        engine.fit(model, task, [stage], epochs=3, lr=0.1)
        return model

    model = mlp()
    result = method(run).unlearn(model, make_task(), seed=0)
    assert result.status == "diverged"
    assert result.reason is not None
    assert "nan" in result.reason
    assert "step 2" in result.reason
    assert result.steps == 2
    assert state_sha256(result.model) == state_sha256(model)
    assert result.model is not model
    assert not result.model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_a_divergence(
    mlp: Net, make_task: Make, value: float
) -> None:
    def run(model: nn.Module, task: UnlearningTask) -> nn.Module:
        with torch.no_grad():
            model.head.bias[0] = value
        return model

    result = method(run).unlearn(mlp(), make_task(), seed=0)
    assert result.status == "diverged"
    assert "head.bias" in str(result.reason)


def test_a_divergence_in_prepare_is_one_too(mlp: Net, make_task: Make) -> None:
    def prepare(model: nn.Module, task: UnlearningTask) -> None:
        raise DivergedError("loss nan at step 0", step=0, loss=math.nan)

    result = method(train, prepare=prepare).unlearn(mlp(), make_task(), seed=0)
    assert result.status == "diverged"


def test_a_constant_that_was_infinite_before_is_no_divergence(mlp: Net, make_task: Make) -> None:
    model = mlp()
    model.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
    assert method(train).unlearn(model, make_task(), seed=0).status == "ok"


BREAKAGES: dict[str, Callable[[nn.Module], object]] = {
    "shape": lambda m: setattr(m, "head", nn.Linear(8, 4)),
    "dtype": lambda m: m.head.double(),
    "new name": lambda m: m.register_buffer("extra", torch.zeros(1)),
    "lost name": lambda m: setattr(m, "body", nn.Linear(6, 8, bias=False)),
}


@pytest.mark.parametrize("case", BREAKAGES)
def test_the_architecture_stays(mlp: Net, make_task: Make, case: str) -> None:
    def run(model: nn.Module, task: UnlearningTask) -> nn.Module:
        BREAKAGES[case](model)
        return model

    with pytest.raises(ArchitectureChanged, match=r"head|extra|body"):
        method(run).unlearn(mlp(), make_task(), seed=0)


@pytest.mark.parametrize("returned", [None, 3, {"a": 1}])
def test_a_run_that_returns_no_model_is_told_so(
    mlp: Net, make_task: Make, returned: object
) -> None:
    with pytest.raises(UnscError, match=r"return"):
        method(lambda model, task: returned).unlearn(mlp(), make_task(), seed=0)


def test_promises_are_held(mlp: Net, make_task: Make) -> None:
    def run(model: nn.Module, task: UnlearningTask) -> nn.Module:
        task.promise_frozen(["body.weight", "body.bias"])
        return train(model, task)

    with pytest.raises(FrozenChanged, match=r"2 moved \(first: body\.bias\)"):
        method(run).unlearn(mlp(), make_task(), seed=0)

    def honest(model: nn.Module, task: UnlearningTask) -> nn.Module:
        model.body.requires_grad_(False)
        return run(model, task)

    assert method(honest).unlearn(mlp(), make_task(), seed=0).status == "ok"


def test_a_promise_about_an_unknown_entry_is_an_error(mlp: Net, make_task: Make) -> None:
    def run(model: nn.Module, task: UnlearningTask) -> nn.Module:
        task.promise_frozen(["body.weigth"])
        return model

    with pytest.raises(UnscError, match=r"body\.weigth"):
        method(run).unlearn(mlp(), make_task(), seed=0)


# --------------------------------------------------------------------------- limits and callbacks


@pytest.mark.parametrize(
    ("budget", "steps", "epochs"),
    [(Budget(steps=4), 4, 1), (Budget(epochs=1), 3, 1), (Budget(seconds=0.0), 0, 0)],
)
def test_a_budget_ends_a_run(
    mlp: Net, make_task: Make, budget: Budget, steps: int, epochs: int
) -> None:
    result = method(train).unlearn(mlp(), make_task(budget=budget), seed=0)
    assert (result.status, result.steps, result.epochs) == ("budget", steps, epochs)
    assert result.reason


def test_a_budget_that_is_just_enough_is_no_limit(mlp: Net, make_task: Make) -> None:
    result = method(train).unlearn(mlp(), make_task(budget=Budget(steps=6, epochs=2)), seed=0)
    assert result.status == "ok"


def test_callbacks_are_told_and_not_timed(mlp: Net, make_task: Make) -> None:
    told: list[Progress] = []

    def progress(news: Progress) -> None:
        told.append(news)
        time.sleep(0.03)

    result = method(train).unlearn(mlp(), make_task(progress=progress), seed=0)
    assert [news.steps for news in told] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [news.epoch_end for news in told] == [*[False] * 3, True] * 2
    assert [news.loss for news in told if not news.epoch_end] == list(result.losses)
    assert result.seconds_unlearn < 0.15 < 8 * 0.03


def test_a_callback_may_stop_by_an_exception(mlp: Net, make_task: Make) -> None:
    def progress(news: Progress) -> None:
        if news.steps == 2:
            raise KeyboardInterrupt

    model, before = mlp(), torch.get_rng_state()
    digest, made, task = state_sha256(model), method(train), make_task(progress=progress)
    with pytest.raises(KeyboardInterrupt):
        made.unlearn(model, task, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert state_sha256(model) == digest
    task.progress = None
    assert made.unlearn(model, task, seed=0).status == "ok"


# --------------------------------------------------------------------------- prepared state


def test_prepared_state_is_used_and_its_cost_kept(mlp: Net, make_task: Make) -> None:
    calls: list[int] = []

    def prepare(model: nn.Module, task: UnlearningTask) -> int:
        calls.append(1)
        with torch.no_grad():
            model(next(iter(task.loader("forget"))).inputs["features"])
        return 5

    def run(model: nn.Module, task: UnlearningTask) -> nn.Module:
        task.stats["state"] = task.prepared
        return train(model, task)

    made, task, model = method(run, prepare=prepare), make_task(), mlp()
    ready = made.prepared(model, task, seed=4)
    results = [made.unlearn(model, task, 4, ready) for _ in range(2)]
    assert len(calls) == 1
    assert [r.stats for r in results] == [{"state": 5}] * 2
    assert results[0].seconds_prepare == ready.seconds
    assert results[0].work == made.unlearn(model, task, 4).work


def test_prepared_state_changes_the_cost_only(normed: Net, make_task: Make) -> None:
    def prepare(model: nn.Module, task: UnlearningTask) -> float:
        model.eval()
        with torch.no_grad():
            model.head.weight.zero_()
        torch.randn(3)
        return float(torch.randn((), generator=task.generator))

    def run(model: nn.Module, task: UnlearningTask) -> nn.Module:
        return noisy(train(model, task), task)

    made, task, model = method(run, prepare=prepare), make_task(), normed()
    ready = made.prepared(model, task, seed=4)
    alone, handed = made.unlearn(model, task, 4), made.unlearn(model, task, 4, ready)
    assert state_sha256(alone.model) == state_sha256(handed.model)


def test_what_prepare_promised_and_read_survives(mlp: Net, make_task: Make) -> None:
    def prepare(model: nn.Module, task: UnlearningTask) -> None:
        task.promise_frozen(["body.weight"])
        task.stats["masked"] = 3
        task.rows("forget")

    made, task, model = method(train, prepare=prepare), make_task(), mlp()
    ready = made.prepared(model, task, seed=0)
    with pytest.raises(FrozenChanged):
        made.unlearn(model, task, 0)
    with pytest.raises(FrozenChanged):
        made.unlearn(model, task, 0, ready)


@dataclass(frozen=True)
class Strength:
    strength: float = option(0.5, "how much")


def test_prepared_state_of_another_kind_is_refused(
    mlp: Net, make_task: Make, make_rows: Callable[..., Rows]
) -> None:
    made, task, model = method(train, config=Strength), make_task(), mlp()
    ready = made.prepared(model, task, seed=0)
    assert made.unlearn(model, task, 0, ready).status == "ok"
    other = method(train, config=Strength, strength=0.6)
    rows = make_rows(22)
    forget = rows.subset(list(range(6)))
    wrong: dict[str, tuple[UnlearningMethod, nn.Module, UnlearningTask, int]] = {
        "model": (made, mlp(1), task, 0),
        "seed": (made, model, task, 1),
        "config": (other, model, task, 0),
        "rows": (made, model, make_task(forget=rows.subset([0, 1])), 0),
        "scenario": (made, model, make_task(scenario=Scenario.CLASS), 0),
        "data": (made, model, make_task(data_fingerprint="x"), 0),
        "labels": (made, model, make_task(forget=forget.relabelled((forget.labels + 1) % 3)), 0),
        "weights": (made, model, make_task(forget=forget.weighted(torch.full((6,), 0.5))), 0),
        "recipe": (made, model, make_task(recipe=Recipe(batch_size=3)), 0),
    }
    accepted = []
    for case, (who, net, request, seed) in wrong.items():
        try:
            who.unlearn(net, request, seed, ready)
        except ConfigError:
            continue
        accepted.append(case)
    assert accepted == []


# --------------------------------------------------------------------------- weights


def test_weights_split_into_two_streams() -> None:
    weights = Weights(torch.tensor([0.0, -1.0, -0.25, 0.5, -2.0]))
    assert weights.multiplicity.tolist() == [1.0, 0.0, 0.75, 1.5, 0.0]
    assert weights.removal.tolist() == [0.0, 1.0, 0.25, 0.0, 2.0]
    assert not weights.hard
    hard = weights.harden(0.25)
    assert hard.hard
    assert hard.eps.tolist() == [0.0, -1.0, -1.0, 0.0, -1.0]
    assert "0.25" in hard.source


def test_hardening_what_is_hard_changes_nothing() -> None:
    weights = Weights(torch.tensor([0.0, -1.0, 0.0]))
    assert weights.hard
    assert weights.harden(0.5).sha256 == weights.sha256


@pytest.mark.parametrize("threshold", [0.0, -0.5, math.nan])
def test_a_threshold_that_would_forget_everything_is_refused(threshold: float) -> None:
    weights = Weights(torch.tensor([0.0, -1.0]))
    with pytest.raises(ValueError, match="threshold"):
        weights.harden(threshold)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_are_finite(make_task: Make, make_rows: Any, value: float) -> None:
    eps = torch.zeros(22)
    eps[3], eps[4] = value, -1

    def build() -> UnlearningTask:
        rest = {"num_classes": 3, "recipe": Recipe(), "fresh_model": lambda seed: nn.Identity()}
        return UnlearningTask.from_weights(make_rows(22), Weights(eps), **rest)

    with pytest.raises(UnscError):
        build()


def weighted_task(rows: Rows, eps: torch.Tensor, like: UnlearningTask) -> UnlearningTask:
    return UnlearningTask.from_weights(
        rows, Weights(eps), num_classes=3, recipe=like.recipe, fresh_model=like._fresh
    )


def test_soft_weights_need_a_method_that_knows_them(
    mlp: Net, make_task: Make, make_rows: Callable[..., Rows]
) -> None:
    eps = torch.zeros(22)
    eps[:6] = -0.5
    task = weighted_task(make_rows(22), eps, make_task())
    with pytest.raises(WeightsNotSupported, match=r"forget\.threshold"):
        method(train).unlearn(mlp(), task, seed=0)
    assert Finetune(epochs=1).unlearn(mlp(), task, seed=0).status == "ok"
    assert task.size("forget") == 6
    assert task.size("retain") == 22


def test_hard_weights_equal_the_sets_to_the_bit(
    mlp: Net, make_task: Make, make_rows: Callable[..., Rows]
) -> None:
    eps = torch.zeros(22)
    eps[:6] = -1
    task = weighted_task(make_rows(22), eps, make_task())
    for made in (method(train), Finetune(epochs=2)):
        left = made.unlearn(mlp(), make_task(), seed=0)
        right = made.unlearn(mlp(), task, seed=0)
        assert state_sha256(left.model) == state_sha256(right.model)
        assert left.losses == right.losses


def test_weights_are_one_per_training_sample(make_task: Make, make_rows: Any) -> None:
    with pytest.raises(ForgetSetError, match="20 values for index 21"):
        weighted_task(make_rows(22), torch.zeros(20), make_task())


# --------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Settings:
    count: int = option(3, "a number", low=1, high=9)
    rate: float = option(0.5, "a share", above=0, high=1)
    either: int | float = option(0.25, "a number or a share")
    maybe: int | None = option(None, "a number or nothing", low=1)
    flag: bool = option(False, "yes or no")
    kind: Literal["a", "b"] = option("a", "one of two")
    word: str = option("x", "text", choices=("x", "y"))
    layers: tuple[str, ...] = option((), "names")
    sizes: tuple[int, ...] = option((), "numbers")


GOOD = [
    ("count", 4, 4),
    ("rate", 1, 1.0),
    ("either", 2, 2),
    ("either", 0.5, 0.5),
    ("maybe", None, None),
    ("maybe", 2, 2),
    ("flag", True, True),
    ("kind", "b", "b"),
    ("word", "y", "y"),
    ("layers", ["a", "b"], ("a", "b")),
    ("sizes", (1, 2), (1, 2)),
]
BAD = [
    ("count", 3.0, "int"),
    ("count", True, "int"),
    ("count", "3", "int"),
    ("count", None, "int"),
    ("count", 0, ">= 1"),
    ("count", 10, "<= 9"),
    ("rate", "0.5", "float"),
    ("rate", False, "float"),
    ("rate", 0.0, "> 0"),
    ("rate", -1, "> 0"),
    ("rate", 1.5, "<= 1"),
    ("rate", math.nan, "nan"),
    ("rate", math.inf, "inf"),
    ("either", "x", "int"),
    ("maybe", 0, ">= 1"),
    ("maybe", 0.5, "int"),
    ("flag", 1, "bool"),
    ("flag", "yes", "bool"),
    ("kind", "c", "'a', 'b'"),
    ("word", 3, "str"),
    ("word", "z", "'x', 'y'"),
    ("layers", "abc", "tuple"),
    ("layers", [1], "str"),
    ("layers", {"a": 1}, "tuple"),
    ("sizes", ["1"], "int"),
]


@pytest.mark.parametrize(("key", "value", "expected"), GOOD)
def test_settings_of_the_right_type(key: str, value: object, expected: object) -> None:
    found = getattr(build_config(Settings, {key: value}), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("key", "value", "expected"), BAD)
def test_settings_of_the_wrong_type_or_range(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_config(Settings, {key: value})
    said = str(raised.value)
    assert said.startswith(f"{key}: expected ")
    assert expected in said
    assert repr(value) in said


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'rat'; did you mean 'rate'"):
        build_config(Settings, {"rat": 1})
    with pytest.raises(ConfigError, match="unknown setting 'zzzz'; known: count, rate"):
        build_config(Settings, {"zzzz": 1})
    with pytest.raises(ConfigError, match="known: none"):
        build_config(NoConfig, {"zzzz": 1})


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"epochs": -1}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"lr_scale": -0.1}, "lr_scale"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
    ],
)
def test_training_settings_have_their_ranges(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: expected a value >"):
        Finetune(**settings)


@pytest.mark.parametrize(
    ("epochs", "cost", "expected"),
    [(20, 1.0, 3), (20, 2.0, 1), (1, 1.0, 1), (0, 1.0, 1), (40, 1.5, 4), (100, 1.0, 15)],
)
def test_the_share_of_passes(epochs: int, cost: float, expected: int) -> None:
    assert TrainingConfig().passes_for(Recipe(epochs=epochs), cost) == expected
    assert TrainingConfig(epochs=7).passes_for(Recipe(epochs=epochs), cost) == 7


def test_the_learning_rate() -> None:
    assert TrainingConfig(lr_scale=0.1).learning_rate(Recipe(lr=0.5)) == 0.05
    assert TrainingConfig(lr_scale=0.1, lr=0.3).learning_rate(Recipe(lr=0.5)) == 0.3


def test_a_config_is_frozen() -> None:
    made = Finetune()
    with pytest.raises(AttributeError):
        made.config.lr = 3  # type: ignore[misc]
    assert set(Finetune.search_space()) == {"lr_scale"}


# --------------------------------------------------------------------------- the function form

EVERYWHERE = frozenset(Scenario)


def test_the_signature_says_what_a_function_needs(mlp: Net, make_task: Make) -> None:
    def only_forget(model: Any, forget: Any) -> Any:
        return model

    def full(
        model: Any, retain: Any, forget: Any, val: Any = None, *, ctx: Any, rate: float = 0.5
    ) -> Any:
        """Do something with everything."""
        ctx.stats["seen"] = [next(iter(x)).labels.shape[0] for x in (retain, forget, val)]
        ctx.stats["rate"] = rate
        return model

    kinds = [from_function(f, "mine", scenarios=EVERYWHERE) for f in (only_forget, full)]
    assert [k.needs for k in kinds] == [frozenset({Split.FORGET}), frozenset(Split)]
    assert kinds[1].__doc__ == "Do something with everything."
    assert kinds[1].name == "mine"
    result = kinds[1](rate=0.25).unlearn(mlp(), make_task(), seed=0)
    assert result.stats == {"seen": [5, 6, 5], "rate": 0.25}
    with pytest.raises(ConfigError, match="did you mean 'rate'"):
        kinds[1](rat=1)
    with pytest.raises(ConfigError, match="rate: expected float"):
        kinds[1](rate="x")


def test_settings_of_functions_take_the_types_they_declare(mlp: Net, make_task: Make) -> None:
    def annotated(
        model: Any,
        *,
        ctx: Any,
        lr: float | None = None,
        scale: float = 1,
        names: tuple[str, ...] = (),
    ) -> Any:
        ctx.stats["got"] = (lr, scale, names)
        return model

    kind = from_function(annotated, "mine", scenarios=EVERYWHERE)
    made = kind(lr=0.1, scale=0.5, names=["a"])
    assert made.unlearn(mlp(), make_task(), seed=0).stats["got"] == (0.1, 0.5, ("a",))


def test_settings_without_annotation_and_default_none(mlp: Net, make_task: Make) -> None:
    def plain(model, *, lr=None):
        return model

    made = from_function(plain, "mine", scenarios=EVERYWHERE)(lr=0.1)
    assert made.config.lr == 0.1


@pytest.mark.parametrize(
    "function",
    [
        lambda retain, forget: retain,
        lambda model, rate: model,
        lambda model, *args: model,
        lambda model, **more: model,
        lambda model, names=[]: model,
    ],
)
def test_functions_of_another_form_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="mine: "):
        from_function(function, "mine", scenarios=EVERYWHERE)


def test_a_val_that_may_be_left_out_is_not_demanded(mlp: Net, make_task: Make) -> None:
    def mine(model: Any, retain: Any, forget: Any, val: Any = None) -> Any:
        assert val is None
        return model

    kind = from_function(mine, "mine", scenarios=EVERYWHERE)
    assert kind().unlearn(mlp(), make_task(val=None), seed=0).status == "ok"
