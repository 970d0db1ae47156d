"""The bridge to ERASURE, on a stand-in of it; what needs the real one says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import erasure_stand_in as stand_in
import pytest
import torch
from torch import nn

from unsc_plugin import registry
from unsc_plugin.adapters import _foreign, erasure
from unsc_plugin.errors import ConfigError, DataError, DivergedError, MissingOptional, UnknownName
from unsc_plugin.method import Scenario, Split, UnlearningTask

HOME = os.environ.get(erasure.HOME)
REAL = pytest.mark.skipif(HOME is None, reason=f"{erasure.HOME} is not set to a checkout of it")


def clean() -> None:
    _foreign.forget("erasure")
    erasure._plugin_unlearner.cache_clear()


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither importable nor checked out."""
    monkeypatch.delenv(erasure.HOME, raising=False)
    clean()
    yield
    clean()


@pytest.fixture
def there(nowhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that holds the stand-in."""
    root = stand_in.checkout(tmp_path / "checkout")
    monkeypatch.setenv(erasure.HOME, str(root))
    return root


class Spy:
    """Stands in for the run of `neggrad_plus`, and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry.load().method_class("neggrad_plus"), "run", self.run)

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        self.model, self.task = model, task
        self.forget = task.rows("forget")
        task.rows("retain")
        return model


# --------------------------------------------------------------------------- the unlearner


def test_the_class_needs_the_package_when_it_is_asked_for(nowhere: None) -> None:
    with pytest.raises(MissingOptional, match="ERASURE_HOME to the checkout") as raised:
        _ = erasure.PluginUnlearner
    assert raised.value.exit_code == 3
    with pytest.raises(AttributeError, match="no attribute 'Unlearner'"):
        _ = erasure.Unlearner


def test_a_partial_batch_is_read_to_the_last_row(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, manager = Spy(monkeypatch), stand_in.Manager(batch_size=64)
    assert len(manager.get_loader_for("forget")[0]) == 0, "its own loader gives no row"
    unlearner = stand_in.make({"method": "neggrad_plus"}, dataset=manager)
    assert unlearner.unlearn() is unlearner.predictor
    assert spy.task.samples("forget")[0].tolist() == [31, 4, 8, 12, 20]
    assert spy.task.samples("retain")[0].tolist() == manager.partitions["retain"]
    found = spy.forget.gather([0]).inputs["features"][0]
    torch.testing.assert_close(found, manager.rows.inputs[31])
    assert unlearner.result.read == {Split.FORGET: 5, Split.RETAIN: 20}
    assert not set(manager.rows.seen) & set(manager.partitions["test"])


def test_the_recipe_is_the_predictors_and_the_seed_the_global_one(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    stand_in.make({"method": "neggrad_plus"}).unlearn()
    recipe, task = spy.task.recipe, spy.task
    assert (recipe.optimizer, recipe.lr, recipe.epochs) == ("adam", 0.02, 7)
    assert (recipe.batch_size, task.seed, task.scenario) == (64, 5, Scenario.RANDOM)
    given = {"method": "neggrad_plus", "batch_size": 4, "seed": 9, "val": "test"}
    stand_in.make(given).unlearn()
    assert (spy.task.recipe.batch_size, spy.task.seed, spy.task.size("val")) == (4, 9, 12)


@pytest.mark.parametrize("pair", [True, False])
def test_the_predictor_comes_back_changed_and_its_outputs_stay_what_they_were(
    there: Path, pair: bool
) -> None:
    host = stand_in.predictor(pair)
    before = {key: value.clone() for key, value in host.model.state_dict().items()}
    unlearner = stand_in.make(
        {"method": "neggrad_plus", "args": {"epochs": 1}, "cached": False, "alias": "x"},
        predictor=host,
    )
    found = unlearner.unlearn()
    assert found is host
    assert isinstance(found.model(torch.zeros(2, 6)), tuple) == pair
    assert not found.model.training
    assert any(not torch.equal(found.model.state_dict()[key], before[key]) for key in before)


def test_logits_are_the_second_item(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy, host = Spy(monkeypatch), stand_in.predictor()
    stand_in.make({"method": "neggrad_plus"}, predictor=host).unlearn()
    inputs = torch.randn(3, 6)
    features, logits = host.model.eval()(inputs)
    model = spy.model.eval()
    torch.testing.assert_close(model(features=inputs), logits)
    torch.testing.assert_close(model.features(features=inputs), features)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({}, ConfigError, "expected the parameter method"),
        ({"method": "unsc", "arg": {}}, ConfigError, "'arg'; did you mean 'args'"),
        ({"method": "neggrad_pluss"}, UnknownName, "neggrad_plus"),
        ({"method": "finetune", "args": {"epoch": 1}}, ConfigError, "did you mean 'epochs'"),
    ],
)
def test_a_wrong_configuration_fails_before_anything_runs(
    there: Path, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stand_in.make(parameters)


def test_partitions_are_named_when_one_is_not_there(there: Path) -> None:
    unlearner = stand_in.make({"method": "finetune", "forget": "forgotten"})
    with pytest.raises(ConfigError, match="'forgotten'; there are all, forget, retain, test"):
        unlearner.unlearn()


def test_a_run_that_diverges_is_an_error_there_too(there: Path) -> None:
    unlearner = stand_in.make({"method": "finetune", "args": {"lr": 1e30, "epochs": 5}})
    with pytest.raises(DivergedError):
        unlearner.unlearn()


# --------------------------------------------------------------------------- a model, results


def test_any_backbone_is_a_model_of_theirs() -> None:
    model = erasure.TupleModel("timm:test_resnet", n_classes=4, input_shape=(3, 16, 16)).eval()
    model.device = "cpu"  # they note it on the model
    pixels = torch.rand(2, 3, 16, 16)
    features, logits = model(pixels)
    classifier = model.classifier
    torch.testing.assert_close(logits, classifier(pixel_values=pixels))
    torch.testing.assert_close(features, classifier.features(pixel_values=pixels))
    assert not [part for part in model.modules() if part._forward_pre_hooks]


def test_the_number_of_classes_that_is_given_wins() -> None:
    made = erasure.TupleModel("timm:test_vit", 5, n_classes=3, input_shape=(1, 8, 8))
    assert made.classifier.num_classes == 5
    with pytest.raises(ConfigError, match="num_classes"):
        erasure.TupleModel("timm:test_vit", input_shape=(1, 8, 8))


def saved(path: Path, *runs: dict[str, Any]) -> Path:
    """Write as they do: every object is followed by a comma."""
    path.write_text("".join(json.dumps(run, indent=4) + "," for run in runs), encoding="utf-8")
    return path


def test_two_runs_are_read_and_a_dropped_measure_is_named(tmp_path: Path) -> None:
    first = {"unlearner": "PluginUnlearner", "RunTime": 1.5, "UMIA": 0.5}
    path = saved(tmp_path / "values.json", first, {"unlearner": "GoldModel", "RunTime": 2.0})
    one, two = erasure.read_results(path)
    assert one == {**first, "missing": []}
    assert two["missing"] == ["UMIA"]
    one, two = erasure.read_results(path, expected=["AUS"])
    assert (one["missing"], two["missing"]) == (["AUS"], ["AUS", "UMIA"])


@pytest.mark.parametrize("text", ['{"a": 1},{"b"', "1,2,", None])
def test_other_files_are_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "values.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="expected objects"):
        erasure.read_results(path)


def test_a_file_without_runs_has_none(tmp_path: Path) -> None:
    assert erasure.read_results(saved(tmp_path / "values.json")) == []


# --------------------------------------------------------------------------- the real one

CONFIG: dict[str, Any] = {
    "data": {
        "class": "erasure.data.datasets.DatasetManager.DatasetManager",
        "parameters": {
            "DataSource": {
                "class": "erasure.data.data_sources.TorchFileDataSource.TorchFileDataSource",
                "parameters": {"path": "rows.pt"},
            },
            "partitions": [
                {
                    "class": "erasure.data.datasets.DataSplitter.DataSplitterPercentage",
                    "parameters": {"parts_names": ["train", "test"], "percentage": 0.8},
                },
                {
                    "class": "erasure.data.datasets.DataSplitter.DataSplitterPercentage",
                    "parameters": {
                        "parts_names": ["forget", "retain"],
                        "percentage": 0.1,
                        "ref_data": "train",
                    },
                },
            ],
            "batch_size": 64,
        },
    },
    "predictor": {
        "class": "erasure.model.TorchModel.TorchModel",
        "parameters": {
            "epochs": 2,
            "optimizer": {"class": "torch.optim.Adam", "parameters": {"lr": 0.01}},
            "loss_fn": {"class": "torch.nn.CrossEntropyLoss", "parameters": {}},
            "model": {
                "class": "unsc_plugin.adapters.erasure.TupleModel",
                "parameters": {"name": "timm:test_vit", "input_shape": [1, 8, 8]},
            },
        },
    },
    "unlearners": [
        {
            "class": "unsc_plugin.adapters.erasure.PluginUnlearner",
            "parameters": {"method": "neggrad_plus", "args": {"epochs": 1}},
        },
        {
            "class": "unsc_plugin.adapters.erasure.PluginUnlearner",
            "parameters": {"method": "finetune", "seed": 3},
        },
    ],
    "evaluator": {
        "class": "erasure.evaluations.manager.Evaluator",
        "parameters": {
            "measures": [
                {"class": "erasure.evaluations.running.RunTime"},
                {
                    "class": "erasure.evaluations.measures.TorchSKLearn",
                    "parameters": {"partition": "forget"},
                },
                {
                    "class": "erasure.evaluations.measures.SaveValues",
                    "parameters": {"path": "output/values.json"},
                },
            ]
        },
    },
    "globals": {"seed": 16, "cached": False},
}


@REAL
@pytest.mark.slow
def test_a_run_of_their_main_with_our_unlearner(tmp_path: Path) -> None:
    (tmp_path / "their_rows.py").write_text(
        "import torch\nclass Rows(torch.utils.data.TensorDataset):\n    n_classes = 3\n"
    )
    saving = "import sys; sys.path.insert(0, '.'); import torch, their_rows as t; r = "
    saving += "t.Rows(torch.rand(120, 1, 8, 8), torch.arange(120) % 3); torch.save(r, 'rows.pt')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{tmp_path}:{HOME}:{environment.get('PYTHONPATH', '')}"
    subprocess.run([sys.executable, "-c", saving], cwd=tmp_path, env=environment, check=True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, f"{HOME}/main.py", "config.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    runs = erasure.read_results(tmp_path / "output" / "values.json", expected=["RunTime"])
    assert [run["parameters"]["method"] for run in runs] == ["neggrad_plus", "finetune"]
    assert all(run["missing"] == [] for run in runs)
    assert all("sklearn.metrics.accuracy_score.forget.unlearned" in run for run in runs)


@REAL
def test_the_stand_in_is_asked_as_theirs_is() -> None:
    text = (Path(str(HOME)) / "erasure/data/datasets/DatasetManager.py").read_text()
    assert "def get_loader_for(self, split_id, fold_fraction = None, drop_last=True)" in text
    assert stand_in.Manager.get_loader_for.__defaults__ == (None, True)
