from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from unsc_plugin import registry
from unsc_plugin.adapters.neurips import NOTE, as_deepmind, as_neurips, from_neurips
from unsc_plugin.errors import ArchitectureChanged, ConfigError, DataError, DivergedError
from unsc_plugin.method import Scenario, Split, UnlearningTask
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Recipe

MEAN, STD = (0.5,), (0.25,)


class Counting(Dataset):
    """Rows that say how often they were read."""

    def __init__(self, count: int, start: int = 0, classes: int = 3, size: int = 4) -> None:
        generator = torch.Generator().manual_seed(start)
        self.inputs = (torch.rand(count, 1, size, size, generator=generator) - 0.5) / 0.25
        self.labels = torch.arange(count) % classes
        self.reads = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return self.inputs[at], self.labels[at]


def net(seed: int = 0) -> nn.Module:
    """Three layers with BatchNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)
        )


def loaders(batch: int = 8) -> dict[str, DataLoader]:
    return {
        "retain": DataLoader(Counting(20, 1), batch_size=batch, shuffle=True, drop_last=True),
        "forget": DataLoader(Counting(7, 2), batch_size=batch),
        "validation": DataLoader(Counting(9, 3), batch_size=batch),
    }


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


# --------------------------------------------------------------------------- ours for the kit


def test_the_net_itself_comes_back_changed_and_in_eval_mode() -> None:
    unlearning, model, given = as_neurips("neggrad_plus"), net(), loaders()
    model.train()
    before = state(model)
    assert unlearning(model, given["retain"], given["forget"], given["validation"]) is model
    assert not any(part.training for part in model.modules())
    assert not same(state(model), before)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert unlearning.result is not None
    assert unlearning.result.status == "ok"
    assert given["validation"].dataset.reads == 0, "the method does not use it"
    assert NOTE not in unlearning.result.stats


def test_validation_may_be_test_data_and_the_notes_say_so() -> None:
    unlearning, given = as_neurips("scrub", config={"rewind": True, "epochs": 1}), loaders()
    unlearning(net(), **given)
    assert unlearning.result.stats[NOTE] is True
    assert unlearning.result.read[Split.VAL] > 0


class Spy:
    """Stands in for a method's `run`, and keeps the task."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks: list[UnlearningTask] = []
        kind = registry.load().method_class("neggrad_plus")
        monkeypatch.setattr(kind, "run", self.run)

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        self.tasks.append(task)
        self.model = model
        return model


def test_rows_are_counted_from_the_forget_loader_on_and_none_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy = Spy(monkeypatch)
    as_neurips("neggrad_plus", num_classes=3)(net(), **loaders(batch=6))
    (task,) = spy.tasks
    assert task.samples("forget")[0].tolist() == list(range(7))
    assert task.samples("retain")[0].tolist() == list(range(7, 27))
    assert (task.recipe.batch_size, task.scenario, task.num_classes) == (6, Scenario.RANDOM, 3)
    assert not spy.model.pixel_domain


def test_with_statistics_pixels_are_restored_and_normalised_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy, model, given = Spy(monkeypatch), net(), loaders()
    recipe = Recipe(epochs=1, batch_size=3)
    unlearning = as_neurips("neggrad_plus", mean=MEAN, std=STD, scenario="class", recipe=recipe)
    unlearning(model, **given)
    (task,) = spy.tasks
    batch = task.rows("forget").gather(range(7))  # type: ignore[arg-type]
    pixels = batch.inputs["pixel_values"]
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
    assert spy.model.pixel_domain
    expected = model(given["forget"].dataset.inputs)
    torch.testing.assert_close(spy.model.eval()(pixel_values=pixels), expected)
    assert (task.scenario, task.recipe) == (Scenario.CLASS, recipe)


def test_a_run_that_diverges_leaves_the_net_alone() -> None:
    model = net()
    before = state(model)
    unlearning = as_neurips("finetune", config={"lr": 1e30, "epochs": 3})
    with pytest.raises(DivergedError, match="the model is as it was"):
        unlearning(model, **loaders())
    assert same(state(model), before)
    assert unlearning.result.status == "diverged"


def rows(inputs: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(inputs, torch.arange(len(inputs)) % 3), batch_size=4)


class Unlabelled(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, at: int) -> Tensor:
        return torch.zeros(1, 4, 4)


class Uneven(Counting):
    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, 4, 4 + at % 2), self.labels[at]


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ([], "got none"),
        (DataLoader(Counting(0)), "got none"),
        (DataLoader(Unlabelled(), batch_size=2), "expected items"),
        (rows(torch.zeros(4, 1, 5, 5)), "look like"),
        (DataLoader(Uneven(4), batch_size=2), "make one batch"),
    ],
    ids=["no batches", "no rows", "no labels", "other width", "widths of its own"],
)
def test_loaders_that_cannot_be_used(forget: Any, message: str) -> None:
    model = net()
    before = state(model)
    with pytest.raises(DataError, match=message) as raised:
        as_neurips("neggrad_plus")(model, rows(torch.zeros(6, 1, 4, 4)), forget, None)
    assert raised.value.exit_code == 2
    assert same(state(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": MEAN}, "both mean and std"),
        ({"scenario": "clas"}, "expected one of class"),
        ({"config": {"epoch": 1}}, "did you mean 'epochs'"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_neurips("finetune", **settings)


def test_a_method_that_is_made_takes_no_further_settings() -> None:
    made = registry.create("finetune", epochs=1)
    assert as_neurips(made).method is made
    with pytest.raises(ConfigError, match="inside the method"):
        as_neurips(made, config={"epochs": 2})


def test_the_same_seed_gives_the_same_net() -> None:
    nets = [as_neurips("finetune", seed=seed)(net(), **loaders()) for seed in (0, 0, 1)]
    states = [state(model) for model in nets]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


# --------------------------------------------------------------------------- named batches


class Named(Counting):
    def __getitem__(self, at: int) -> dict[str, Any]:  # type: ignore[override]
        inputs, label = super().__getitem__(at)
        return {"image": inputs, "image_id": f"id{at}", "age": label.float(), "age_group": label}


def test_deepminds_function_leaves_the_original_as_it_is(capsys: pytest.CaptureFixture) -> None:
    original = net()
    before = state(original)
    do_unlearning = as_deepmind("neggrad_plus", seed=3)
    parts = [DataLoader(Named(count), batch_size=4) for count in (20, 7, 9)]
    found = do_unlearning(*parts, torch.ones(3), original, print_accuracy=True)
    assert same(state(original), before)
    assert not same(state(found), before)
    assert type(found) is type(original)
    assert "forget accuracy: " in capsys.readouterr().out


def test_batches_that_are_no_loader_are_read_once() -> None:
    batches = [list(DataLoader(Named(count), batch_size=4)) for count in (20, 7)]
    found = as_deepmind("finetune")(*batches, None, None, net())
    assert not same(state(found), state(net()))


def test_missing_names_are_named() -> None:
    parts = [DataLoader(Named(count), batch_size=4) for count in (20, 7)]
    with pytest.raises(DataError, match=r"'pixels' and 'age_group'.*input_key"):
        as_deepmind("finetune", input_key="pixels")(*parts, None, None, net())


# --------------------------------------------------------------------------- theirs for us


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a test registers end with it."""
    monkeypatch.setattr(registry, "_session", [])


def descend(net: nn.Module, retain: Any, forget: Any, validation: Any) -> nn.Module:
    """Step on the retained batches, and count all of them."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for inputs, targets in retain:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    assert sum(len(targets) for _, targets in forget) == 6
    assert len(validation) == 1
    return net


def test_their_function_is_a_method_of_ours(make_task: Any, mlp: Any) -> None:
    kind = from_neurips(descend, "descend-once")
    assert kind.needs == {Split.FORGET, Split.RETAIN, Split.VAL}
    made = registry.create("descend-once")
    assert type(made) is kind
    assert registry.load().methods["descend-once"].summary.startswith("Step on the retained")
    model = mlp()
    result = made.unlearn(model, make_task(), 0)
    assert result.status == "ok"
    assert result.read == {Split.FORGET: 6, Split.RETAIN: 16, Split.VAL: 0}
    assert not same(state(result.model), state(model))
    assert list(result.model.state_dict()) == list(model.state_dict())


def test_a_copy_of_the_net_may_come_back(make_task: Any, mlp: Any) -> None:
    def copied(net: nn.Module, retain: Any, forget: Any, validation: Any) -> nn.Module:
        twin = copy.deepcopy(net)
        with torch.no_grad():
            twin.head.weight.mul_(0.5)  # a layer of the model itself
        return twin

    model = mlp()
    result = from_neurips(copied, "copied")().unlearn(model, make_task(), 0)
    torch.testing.assert_close(result.model.head.weight, model.head.weight / 2)


def other_net(net: nn.Module, retain: Any, forget: Any, validation: Any) -> nn.Module:
    return nn.Linear(6, 3)


def new_layer(net: nn.Module, retain: Any, forget: Any, validation: Any) -> nn.Module:
    net.head = nn.Linear(8, 3)
    return net


@pytest.mark.parametrize("function", [other_net, new_layer])
def test_another_net_is_refused(make_task: Any, mlp: Any, function: Any) -> None:
    with pytest.raises(ArchitectureChanged, match="change weights, not modules"):
        from_neurips(function, "other")().unlearn(mlp(), make_task(), 0)


def test_names_follow_the_rule() -> None:
    with pytest.raises(ConfigError, match="expected a name"):
        from_neurips(descend, "Not Allowed")


def test_its_rows_are_pairs_of_tensors(make_task: Any, mlp: Any) -> None:
    rows = Rows.of({"features": torch.zeros(4, 6), "extra": torch.zeros(4)}, torch.arange(4) % 3)
    task = make_task(forget=rows.subset([0]), retain=rows.subset([1, 2, 3]))
    with pytest.raises(ValueError, match="extra, features"):
        from_neurips(descend, "descend")().unlearn(mlp(), task, 0)
