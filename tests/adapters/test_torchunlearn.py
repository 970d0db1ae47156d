"""The bridge to torchunlearn, on a stand-in of it; what needs the real one says so."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchunlearn_stand_in as stand_in
import yaml
from command_line import BOARD, unsc
from torch import nn

from unsc_plugin import registry
from unsc_plugin.adapters import _torchunlearn_trainer as trainers
from unsc_plugin.adapters import torchunlearn
from unsc_plugin.errors import (
    ConfigError,
    InputDomainError,
    MissingOptional,
    NotApplicable,
    ScenarioNotSupported,
)
from unsc_plugin.method import Budget, Scenario, Split, UnlearningTask
from unsc_plugin.models import wrap
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Recipe

HOME = os.environ.get(trainers.HOME)
REAL = pytest.mark.skipif(
    HOME is None, reason=f"{trainers.HOME} is not set to a checkout of machine-unlearning-pytorch"
)
NAMES = [name for name in registry.load().methods if name.startswith("torchunlearn_")]
CLASSES = [getattr(torchunlearn, name) for name in torchunlearn.__all__ if name[0].isupper()]


def clean() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "torchunlearn"]:
        del sys.modules[name]


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither installed nor checked out."""
    monkeypatch.delenv(trainers.HOME, raising=False)
    clean()
    yield
    clean()


@pytest.fixture
def there(nowhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that holds the stand-in."""
    root = stand_in.checkout(tmp_path / "checkout")
    monkeypatch.setenv(trainers.HOME, str(root))
    stand_in.journal.clear()
    return root


def images(count: int, classes: int = 3, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 1, 4, 4, generator=generator)
    return Rows.of({"pixel_values": pixels}, torch.arange(count) % classes)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    return wrap(body, num_classes=3, modality="image", pixel_domain=True)


def task(kind: str = "random", gone_rows: int = 6, **changes: Any) -> UnlearningTask:
    rows = images(30)
    gone = rows.labels == 0 if kind == "class" else torch.arange(30) < gone_rows
    settings: dict[str, Any] = {
        "forget": rows.subset(gone),
        "retain": rows.subset(~gone),
        "num_classes": 3,
        "recipe": Recipe(epochs=2, lr=0.05, batch_size=5),
        "fresh_model": net,
        "scenario": Scenario(kind),
    }
    return UnlearningTask(**{**settings, **changes})


def of(kind: str) -> list[Any]:
    return [entry for entry in stand_in.journal if entry[0] == kind]


# --------------------------------------------------------------------------- names


def test_all_thirteen_are_registered_and_absent_without_the_package(nowhere: None) -> None:
    names = registry.load()
    assert len(NAMES) == len(CLASSES) == 13
    assert {names.methods[name].status for name in NAMES} == {"unavailable"}
    reason = "torchunlearn>=0.1.1 is not installed and TORCHUNLEARN_HOME is not set"
    assert {names.methods[name].reason for name in NAMES} == {reason}
    with pytest.raises(MissingOptional, match="TORCHUNLEARN_HOME") as raised:
        names.create("torchunlearn_salun")
    assert raised.value.exit_code == 3


def test_the_list_hides_them_and_tells_why_when_asked(nowhere: None) -> None:
    assert not [row for row in unsc("list", "--json").json if row["name"] in NAMES]
    rows = {row["name"]: row for row in unsc("list", "--all", "--json").json}
    assert all("TORCHUNLEARN_HOME is not set" in rows[name]["reason"] for name in NAMES)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_agrees_with_its_entry(there: Path, kind: Any) -> None:
    assert registry.load().method_class(kind.name) is kind
    settings = {item.name: item.default for item in dataclasses.fields(kind.Config)}
    if kind is not torchunlearn.MuMis:
        assert [settings[key] for key in ("epochs", "lr", "momentum", "weight_decay")] == [
            5,
            0.01,
            0.9,
            5e-4,
        ]


def test_the_registry_says_ok_with_a_checkout(there: Path) -> None:
    rows = {row["name"]: row["status"] for row in unsc("list", "--json").json}
    assert {rows[name] for name in NAMES} == {"ok"}


def test_unknown_settings_are_refused_with_the_nearest(there: Path) -> None:
    with pytest.raises(ConfigError, match="saliency_threshold"):
        registry.create("torchunlearn_salun", saliency_treshold=0.5)
    with pytest.raises(ConfigError, match="unknown setting 'omit_label'"):
        registry.create("torchunlearn_aru", omit_label=2)


# --------------------------------------------------------------------------- where the package is


def test_a_module_without_trainers_is_not_enough(
    nowhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = stand_in.checkout(tmp_path, stand_in.BEFORE_TRAINERS)
    monkeypatch.syspath_prepend(str(root))
    with pytest.raises(MissingOptional, match=r"no trainers.*0\.1\.0 wheel") as raised:
        torchunlearn.Finetune()
    assert raised.value.exit_code == 3


def test_a_checkout_stands_in_for_such_a_module(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = stand_in.checkout(tmp_path / "old", stand_in.BEFORE_TRAINERS)
    monkeypatch.syspath_prepend(str(old))
    assert trainers.package().RobModel is stand_in.RobModel
    assert trainers.package() is sys.modules["torchunlearn"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected a checkout with torchunlearn/unlearn, found none"),
        (stand_in.BEFORE_TRAINERS, r"expected trainers and a BenchmarkSuite.*as in 0\.1\.0"),
        ({**stand_in.PACKAGE, "__init__.py": "import not_there"}, "not_there.*install what"),
    ],
)
def test_a_checkout_of_no_use(
    nowhere: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setenv(trainers.HOME, str(stand_in.checkout(tmp_path, files)))
    with pytest.raises(MissingOptional, match=message):
        torchunlearn.Finetune()
    assert "torchunlearn" not in sys.modules


def test_the_checkout_stays_as_it_is(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # whatever the environment says
    before, path = {str(p): p.stat().st_mtime_ns for p in there.rglob("*")}, list(sys.path)
    registry.create("torchunlearn_finetune", epochs=1).unlearn(net(), task(), 0)
    assert {str(p): p.stat().st_mtime_ns for p in there.rglob("*")} == before
    assert sys.path == path


# --------------------------------------------------------------------------- a run


def test_finetune_steps_on_the_retained_rows_only(there: Path) -> None:
    model, made = net(), registry.create("torchunlearn_finetune", epochs=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = made.unlearn(model, task(), 0)
    assert (result.status, result.steps, result.epochs) == ("ok", 10, 2)
    assert result.read == {Split.RETAIN: 48}
    assert len(result.losses) == 10
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    after = result.model.state_dict()
    assert list(after) == list(before)
    assert not torch.equal(after["backbone.1.weight"], before["backbone.1.weight"])
    assert result.work == 48 * 3


def test_the_optimiser_is_an_object_and_nothing_is_recorded(there: Path) -> None:
    registry.create("torchunlearn_neggrad", epochs=1, lr=0.02).unlearn(net(), task(), 0)
    (_, optimizer, epochs), (_, record_type, again) = of("setup")[0], of("fit")[0]
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("lr", "momentum", "weight_decay")] == [0.02, 0.9, 5e-4]
    assert (epochs, again, record_type) == (1, 1, None)


def test_an_epoch_is_as_long_as_the_longer_loader_and_no_row_is_dropped(there: Path) -> None:
    result = registry.create("torchunlearn_neggrad", epochs=1).unlearn(net(), task(gone_rows=7), 0)
    assert [entry[1] for entry in of("rows")] == [5, 5, 5, 5, 3]
    assert [entry[2] for entry in of("rows")] == [5, 2, 5, 2, 5]
    assert result.steps == 5


def test_salun_gets_its_mask_first(there: Path) -> None:
    registry.create("torchunlearn_salun", epochs=1).unlearn(net(), task(gone_rows=7), 0)
    kinds = [entry[0] for entry in stand_in.journal]
    assert kinds.index("mask") < kinds.index("fit")
    assert of("mask") == [("mask", [5, 2])]


def test_mumis_sees_forget_rows_alone(there: Path) -> None:
    result = registry.create("torchunlearn_mumis", epochs=2).unlearn(net(), task(), 0)
    assert result.read == {Split.FORGET: 12}
    assert result.steps == result.epochs * len(of("forget")) / 2 == len(of("forget"))


def test_a_batch_of_one_row_is_given_twice(there: Path) -> None:
    result = registry.create("torchunlearn_mumis").unlearn(net(), task(gone_rows=1), 0)
    assert of("forget") == [("forget", 2)]
    assert result.status == "ok"


def test_aru_gets_the_label_of_the_forgotten_class_and_our_device(there: Path) -> None:
    made = registry.create("torchunlearn_aru", epochs=1)
    assert made.unlearn(net(), task("class"), 0).status == "ok"
    assert of("omit_label") == [("omit_label", 0)]
    with pytest.raises(ScenarioNotSupported, match="class"):
        made.unlearn(net(), task(), 0)


def test_two_forgotten_classes_are_one_too_many(there: Path) -> None:
    rows = images(30)
    gone = rows.labels < 2
    two = task("class", forget=rows.subset(gone), retain=rows.subset(~gone))
    with pytest.raises(ScenarioNotSupported, match="one whole class, got 2"):
        registry.create("torchunlearn_aru").unlearn(net(), two, 0)


def test_attacks_need_pixels(there: Path) -> None:
    model = net()
    model.pixel_domain = False
    with pytest.raises(InputDomainError, match=r"pixels in \[0, 1\]"):
        registry.create("torchunlearn_aru").unlearn(model, task("class"), 0)


def test_rows_of_several_tensors_are_refused(there: Path) -> None:
    rows = Rows.of(
        {"input_ids": torch.ones(4, 3).long(), "attention_mask": torch.ones(4, 3).long()},
        torch.tensor([0, 1, 0, 1]),
    )
    text = task(forget=rows.subset([0, 1]), retain=rows.subset([2, 3]), modality="text")
    with pytest.raises(NotApplicable, match="attention_mask, input_ids"):
        registry.create("torchunlearn_finetune").unlearn(net(), text, 0)


def test_a_loss_that_is_not_finite_is_a_result(there: Path) -> None:
    result = registry.create("torchunlearn_rfe").unlearn(net(), task(), 0)
    assert result.status == "diverged"
    assert "loss nan at step 0" in str(result.reason)


@pytest.mark.parametrize(("limit", "steps"), [(Budget(steps=3), 3), (Budget(epochs=1), 5)])
def test_the_budget_ends_their_loop(there: Path, limit: Budget, steps: int) -> None:
    made = registry.create("torchunlearn_finetune")
    result = made.unlearn(net(), task(budget=limit), 0)
    assert (result.status, result.steps) == ("budget", steps)
    assert result.read[Split.RETAIN] <= 5 * steps


def test_the_same_seed_gives_the_same_bits(there: Path) -> None:
    made = registry.create("torchunlearn_salun", epochs=1)
    one, same, other = (made.unlearn(net(), task(), seed).model for seed in (0, 0, 1))
    weights = [model.state_dict()["backbone.1.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_run_of_the_command_line(there: Path, tmp_path: Path) -> None:
    done = unsc(
        "run", "torchunlearn_salun", "--data", "wine", "--model", "logistic", "--forget", "class:0",
        "--set", "epochs=1", "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["status"] == "ok"


# --------------------------------------------------------------------------- their suite


def test_the_suite_takes_our_models(there: Path) -> None:
    models = {"ours": net(), "plain": nn.Sequential(nn.Flatten(), nn.Linear(16, 3))}
    modes = {name: model.training for name, model in models.items()}
    state = torch.get_rng_state()
    suite, found = torchunlearn.to_benchmark_suite(
        models, task(), retrained=net(1), test=images(9, seed=3)
    )
    assert isinstance(suite, stand_in.BenchmarkSuite)
    assert set(suite.results) == set(found) == {"ours", "plain"}
    assert suite.n_limit is None
    for name, row in found.items():
        theirs = suite.results[name]
        assert list(row) == [
            "retain_accuracy",
            "forget_accuracy",
            "test_accuracy",
            "tu_retain_gap",
            "tu_nonmember_share",
            "tu_cosine",
        ]
        assert row["retain_accuracy"] == pytest.approx(theirs["RA"] / 100)
        assert row["tu_retain_gap"] == pytest.approx(theirs["UG"] / 100)
        assert row["tu_nonmember_share"] == 0.25
        assert row["tu_cosine"] is None, "they dropped it"
    assert {name: model.training for name, model in models.items()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_reference_there_is_no_gap(there: Path) -> None:
    pair = (torch.rand(9, 1, 4, 4), torch.arange(9) % 3)
    _, found = torchunlearn.to_benchmark_suite({"ours": net()}, task(), n_limit=5, test=pair)
    assert "tu_retain_gap" not in found["ours"]


# --------------------------------------------------------------------------- the real one


@pytest.fixture(scope="module")
def real() -> Iterator[Any]:
    """The package of the checkout."""
    clean()
    yield trainers.package()
    clean()


STAND_INS = {"Finetune": stand_in.Trainer} | {
    name: getattr(stand_in, name) for name in ("NegGrad", "SalUn", "ARU", "MUMis", "RFE")
}


def keywords(function: Any) -> dict[str, Any]:
    found = list(inspect.signature(function).parameters.values())[2:]
    return {one.name: one.default for one in found if one.name != "device"}


@REAL
@pytest.mark.parametrize("name", STAND_INS)
def test_the_stand_in_has_their_keywords(real: Any, name: str) -> None:
    theirs = keywords(getattr(real.unlearn, name).__init__)
    assert keywords(STAND_INS[name].__init__) == theirs, "update the stand-in"


@REAL
@pytest.mark.parametrize("name", ["setup", "fit"])
def test_the_stand_in_takes_what_their_loop_takes(real: Any, name: str) -> None:
    ours, theirs = (
        list(inspect.signature(getattr(kind, name)).parameters)
        for kind in (stand_in.Trainer, real.unlearn.Trainer)
    )
    assert set(ours) <= set(theirs), "update the stand-in"


@REAL
@pytest.mark.parametrize("kind", CLASSES)
def test_settings_are_their_keywords_with_their_defaults(real: Any, kind: Any) -> None:
    theirs = keywords(getattr(real.unlearn, kind.trainer).__init__)
    assert ("omit_label" in theirs) == kind.one_class
    theirs.pop("omit_label", None)
    base = {item.name for item in dataclasses.fields(trainers.Training)}
    own = {i.name: i.default for i in dataclasses.fields(kind.Config) if i.name not in base}
    assert own == theirs


@REAL
@pytest.mark.parametrize("name", NAMES)
def test_every_trainer_makes_a_step(real: Any, name: str) -> None:
    changes = {"steps": 2} if name in ("torchunlearn_aru", "torchunlearn_amun") else {}
    made = registry.create(name, epochs=1, **changes)
    one = task("class", budget=Budget(steps=1))
    result = made.unlearn(net(), one, 0)
    assert (result.status, result.steps) == ("budget", 1)
    before, after = net().state_dict(), result.model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


@REAL
@pytest.mark.slow
def test_three_trainers_on_a_board(real: Any, tmp_path: Path) -> None:
    board = yaml.safe_load(BOARD)
    scenario = board["scenarios"][0]
    scenario |= {"data": "digits", "model": "tiny-digits", "name": "digits"}
    scenario["recipe"] = {"epochs": 8, "lr": 0.05, "batch_size": 32}
    chosen = ["torchunlearn_finetune", "torchunlearn_salun", "torchunlearn_scrub"]
    board["entries"] = ["retrain", "original", *chosen]
    path = tmp_path / "board.yaml"
    path.write_text(yaml.safe_dump(board), encoding="utf-8")
    done = unsc("bench", path)
    assert done.code == 0, done.err
    table = (tmp_path / "LEADERBOARD.md").read_text(encoding="utf-8")
    assert all(name in table for name in chosen)


@REAL
def test_their_suite_measures_our_models(real: Any) -> None:
    _, found = torchunlearn.to_benchmark_suite(
        {"ours": net()}, task(), retrained=net(1), test=images(30, seed=3)
    )
    row = found["ours"]
    assert all(value is not None and 0 <= value <= 1 for value in row.values()), row
