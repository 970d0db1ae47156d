"""Runs inside a stand-in for MU-Bench: its script, unedited, with methods of ours.

The stand-in is written by the tests; it has the shapes and the failures of MU-Bench, none of its
code. Runs against a real checkout are in `test_mubench_real.py`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import unsc
from mubench_stand_in import INDICES, build_mubench, modules_kept, write_config
from safetensors.torch import load_file

from unsc_plugin import registry
from unsc_plugin.adapters import mubench
from unsc_plugin.errors import (
    ConfigError,
    DivergedError,
    MissingOptional,
    RowOrderMismatch,
    ScenarioNotSupported,
)
from unsc_plugin.forget import split_sha256
from unsc_plugin.method import UnlearningTask
from unsc_plugin.models import wrap
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Recipe, Scenario, derive

METHODS_OF_TESTS = """
    import time
    import torch
    from unsc_plugin import register_method

    @register_method("sleepy")
    def sleepy(model, retain, forget, *, ctx):
        for batch in forget:
            pass
        time.sleep(0.2)
        return model

    @register_method("forget_only")
    def forget_only(model, forget, *, ctx, lr: float = 0.1):
        for batch in forget:
            model(**batch.inputs)
        ctx.stats["lr"] = lr
        with torch.no_grad():
            model.head.bias.add_(lr)
        return model

    @register_method("exploding")
    def exploding(model, retain, *, ctx):
        with torch.no_grad():
            model.head.bias.fill_(float("nan"))
        return model
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The stand-in of this module."""
    return build_mubench(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A file with three little methods."""
    path = tmp_path_factory.mktemp("plugin") / "mine.py"
    path.write_text("\n".join(line[4:] for line in METHODS_OF_TESTS.splitlines()))
    return str(path)


@pytest.fixture(autouse=True)
def in_the_window(monkeypatch):
    """Say that transformers is one that MU-Bench runs on: the stand-in needs none."""
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "4.48.3" if name == "transformers" else real(name)
    )


def play(root, out, method, block=None, *words, **more):
    """Run the script of the stand-in and return the exit code."""
    config = write_config(root, Path(out), method, block, **more)
    script = root / "experiment" / "cifar10" / "unlearn.py"
    return mubench.main([str(script), str(config), *words])


def receipt(out):
    return json.loads((Path(out) / "plugin_results.json").read_text())


def results(out, name="all"):
    return json.loads((Path(out) / f"{name}_results.json").read_text())


def fingerprint(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_stand_in_fails_without_the_adapter(root):
    done = subprocess.run(
        [sys.executable, "-B", "-c", "import mubench"], cwd=root, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"No module named '(wandb|transformers_for_cl)'", done.stderr)


# --------------------------------------------------------------------------- whole runs

FILES = {
    *(f"{split}_results.json" for split in ("test", "df", "dr", "unlearn_final", "all", "plugin")),
    *(f"pred_logit_{split}.npy" for split in ("test", "df", "dr")),
    *("model.safetensors", "config.json", "README.md", "trainer_state.json", "training_args.bin"),
}
FINAL = {
    *("dt_accuracy", "df_accuracy", "dr_accuracy", "knowledge_gap", "zrf"),
    *("unlearn_overall_accuracy", "unlearn_time"),
}
RUNS = {
    "finetune": {"set": {"epochs": 1}},
    "l2ul": None,
    "unsc": {"forget": "class-0"},
    "soft_weighted": {"set": {"goals": ["robust"]}},
    "neggrad_plus": None,
    "plugin-scrub": None,
    "retrain": None,
}


@pytest.mark.parametrize("method", RUNS)
def test_the_script_runs_unedited(root, tmp_path, monkeypatch, method):
    def offline(*_):
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", offline)
    before, path, modules = fingerprint(root), list(sys.path), set(sys.modules)
    assert play(root, tmp_path / "run", method, RUNS[method]) == 0
    assert {one.name for one in (tmp_path / "run").iterdir()} == FILES
    assert set(results(tmp_path / "run", "unlearn_final")) == FINAL
    parts = {f"{s}_{k}" for s in ("test", "df", "dr") for k in ("accuracy", "loss")}
    assert set(results(tmp_path / "run")) >= FINAL | parts
    found = receipt(tmp_path / "run")
    assert found["orig_dt"]["source"] == "measured"
    assert found["status"] == "ok"
    assert fingerprint(root) == before
    assert sys.path == path
    assert not {name for name in set(sys.modules) - modules if name.startswith("mubench.")}
    wanted = "class-0" if method == "unsc" else "mubench"
    assert (found["split"], found["not_mubench_split"]) == (wanted, method == "unsc")
    if method != "unsc":
        assert found["split_sha256"] == split_sha256(INDICES[:4])
    record = mubench.read_run(tmp_path / "run")
    for name in ("dt_accuracy", "df_accuracy", "dr_accuracy", "unlearn_overall_accuracy"):
        assert record.metrics[f"mubench.{name}"] == pytest.approx(
            results(tmp_path / "run")[name], abs=1e-9
        )


def test_the_table_is_used_where_it_has_the_backbone(root, tmp_path):
    assert play(root, tmp_path / "run", "finetune", model_name_or_path="google/vit-base") == 0
    assert receipt(tmp_path / "run")["orig_dt"] == {"value": 0.9, "source": "table"}


def test_every_run_measures_its_original_anew(suite, tmp_path):
    table = suite.module("original_performance").orig_acc["cifar10"]
    for name in "ab":
        with suite.using(mubench.Options.of({"set": {"epochs": 1}}), []):
            run = Session(suite, tmp_path / name, "finetune")
            run.trainer.evaluate_unlearn()
            assert "resnet-18" in table
        assert receipt(tmp_path / name)["orig_dt"]["source"] == "measured"
        assert "resnet-18" not in table


def test_a_method_of_theirs_stays_theirs(root, tmp_path, capsys):
    out = tmp_path / "run"
    assert play(root, out, "neggrad", model_name_or_path="google/vit-base") == 0
    assert (out / "all_results.json").is_file()
    assert not (out / "plugin_results.json").exists()
    assert "evaluation_strategy is called eval_strategy" in capsys.readouterr().out


def natively(root, method, scenario=Scenario.RANDOM, **settings):
    """Return the same run without the suite: rows in memory, our task, the same seeds."""
    with modules_kept(), mubench.install(home=root) as suite:
        base = suite.module("data.base")
        net = suite.module("utils").load_base_model(None)
        rows = base.load_cifar10()["train"].rows
    pixels = torch.tensor(np.stack(rows["image"])).permute(0, 3, 1, 2).contiguous()
    every = Rows.of({"pixel_values": pixels}, torch.tensor(rows["label"]))
    gone = torch.zeros(200, dtype=torch.bool)
    gone[INDICES[:4]] = True
    made = registry.create(method, **settings)
    kind = {"num_classes": 10, "modality": "image", "mean": [0.5] * 3, "std": [0.25] * 3}
    task = UnlearningTask(
        forget=every.subset(gone), retain=every.subset(~gone), num_classes=10,
        recipe=Recipe(epochs=2, optimizer="adamw", lr=1e-2, weight_decay=1e-4, batch_size=16,
                      schedule="cosine"),
        fresh_model=lambda seed: wrap(type(net)(), **kind), scenario=scenario,
    )  # fmt: skip
    model = wrap(net, **kind)
    return made.unlearn(model, task, derive(42, "unlearn", 0, 0)).model.backbone.state_dict()


@pytest.mark.parametrize("method", ["finetune", "neggrad_plus", "instance_wise"])
def test_inside_and_outside_of_the_suite_agree(root, tmp_path, method):
    assert play(root, tmp_path / "run", method) == 0
    found = load_file(tmp_path / "run" / "model.safetensors")
    for name, tensor in natively(root, method).items():
        assert torch.allclose(found[name].double(), tensor.double(), atol=1e-6), name


# --------------------------------------------------------------------------- in and out


def every_attribute(suite):
    holders = ("trainer", "", "data.base", "evaluation", "trainer.base", "utils")
    return {
        (name, key): value
        for name in holders
        for key, value in vars(suite.module(name)).items()
        if not key.startswith("__")
    }


def test_everything_goes_out_as_it_came_in(root):
    with modules_kept():
        first = mubench.install(home=root)
        first.uninstall()
        before = every_attribute(first)
        with mubench.install(home=root) as suite:
            assert mubench.install() is suite
            trainers = suite.module("trainer")
            own = suite.module("trainer.base").GradAscentTrainer
            assert trainers.get_trainer("neggrad") is own
            assert suite.module("").get_trainer("neggrad") is own
            ours = trainers.get_trainer("plugin-neggrad")
            assert issubclass(ours, mubench.PluginTrainer)
            assert ours is mubench.make_trainer("plugin-neggrad")
            with pytest.raises(ConfigError, match="plugin-neggrad"):
                mubench.make_trainer("neggrad")
            with pytest.raises(ValueError, match="not found"):
                trainers.get_trainer("nobody")
            changed = {k for k, v in every_attribute(suite).items() if before[k] is not v}
            assert changed == {
                ("trainer", "get_trainer"),
                ("", "get_trainer"),
                ("data.base", "prepare_unlearning_data"),
                ("data.base", "method_specific_transformation"),
                ("evaluation", "evaluate"),
            }
        suite.uninstall()
        after = every_attribute(suite)
        assert all(after[key] is value for key, value in before.items())
        assert str(root) not in sys.path
        assert "wandb" not in sys.modules


class Session:
    """A trainer of the stand-in, made as its script makes one."""

    def __init__(self, suite, out, method, seed=42, ratio=2.0, **more):
        self.stats = suite.module("stats")
        self.stats.reads.clear()
        self.config = suite.module("args").UnlearningArguments(
            unlearn_method=method, del_ratio=ratio, data_name="cifar10", backbone="resnet-18",
            random_seed=seed, **more,
        )  # fmt: skip
        self.raw = suite.module("data.base").load_unlearn_data(self.config)
        import types

        self.args = types.SimpleNamespace(
            output_dir=str(out), use_cpu=True, world_size=1, per_device_train_batch_size=16,
            per_device_eval_batch_size=32, num_train_epochs=1, learning_rate=0.01,
            weight_decay=0.0, seed=seed, device=torch.device("cpu"),
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        self.trainer = suite.module("trainer").get_trainer(method)(
            raw_datasets=self.raw, args=self.args, unlearn_config=self.config
        )


@pytest.fixture
def suite(root, plugin):
    """The stand-in with our methods in it."""
    with (
        modules_kept(),
        mubench.install(home=root, options=mubench.Options.of({"plugins": [plugin]})) as one,
    ):
        yield one


def test_a_forget_only_method_reads_the_forget_set_alone(suite, tmp_path):
    run = Session(suite, tmp_path / "run", "forget_only")
    assert run.raw["train"] is not run.raw["df"]
    assert run.raw["train"] is not run.raw["dr"]
    assert len(run.raw["train"]) == 4
    assert suite.module("stats").copies == 0
    run.trainer._ensure_original()
    run.stats.reads.clear()
    run.trainer.unlearn()
    assert run.stats.reads.keys() == {"df"}


def test_a_method_that_needs_the_retain_set_gets_it_as_train(suite, tmp_path):
    run = Session(suite, tmp_path / "run", "sleepy")
    assert len(run.raw["train"]) == 196
    run.trainer._ensure_original()
    run.stats.reads.clear()
    run.trainer.unlearn()
    assert "test" not in run.stats.reads


def test_rows_of_logits_are_in_ascending_order(suite, tmp_path):
    run = Session(suite, tmp_path / "run", "forget_only")
    run.trainer.unlearn()
    run.trainer.evaluate_unlearn()
    found = np.load(tmp_path / "run" / "pred_logit_df.npy")
    train = suite.module("data.base").load_cifar10()["train"].rows
    rows = np.stack([train["image"][at] for at in sorted(INDICES[:4])])
    pixels = (torch.tensor(rows).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = run.trainer.model(pixels).logits.numpy()
    assert np.abs(found - expected).max() < 1e-6


def test_time_is_the_methods_own(suite, tmp_path):
    run = Session(suite, tmp_path / "run", "sleepy")
    run.trainer.slow_evaluation = 0.3
    run.trainer.unlearn()
    found = run.trainer.evaluate_unlearn()
    assert 0.2 <= found["unlearn_time"] <= 0.4
    assert run.trainer.unlearn_wall_time >= found["unlearn_time"] + 0.3
    assert receipt(tmp_path / "run")["unlearn_wall_time"] == run.trainer.unlearn_wall_time


def global_state():
    return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_a_seed_says_everything(root, tmp_path):
    before = global_state()
    for name, seed in (("a", 42), ("b", 42), ("c", 87)):
        assert play(root, tmp_path / name, "neggrad_plus", seed=seed) == 0
    assert global_state() == before
    numbers = [results(tmp_path / name) for name in "ab"]
    for one in numbers:
        for key in [key for key in one if key.endswith("time")]:
            del one[key]
    assert numbers[0] == numbers[1]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


# --------------------------------------------------------------------------- settings


def test_settings_go_one_over_the_other(root, tmp_path, plugin, monkeypatch):
    monkeypatch.setenv("UNSC_MUBENCH_ARGS", json.dumps({"lr": 0.3}))
    block = {"inherit": ["learning_rate"]}
    for name, words, expected in [
        ("environment", (), 0.3),
        ("flag", ("--set", "lr=0.5"), 0.5),
    ]:
        code = play(root, tmp_path / name, "forget_only", block, "--plugin", plugin, *words)
        assert code == 0
        assert receipt(tmp_path / name)["record"]["stats"]["lr"] == expected
    monkeypatch.delenv("UNSC_MUBENCH_ARGS")
    assert play(root, tmp_path / "inherit", "forget_only", block, "--plugin", plugin) == 0
    found = receipt(tmp_path / "inherit")
    assert found["record"]["config"] == {"lr": 0.01}
    assert set(found["ignored_keys"]) == {"num_train_epochs", "weight_decay", "alpha"}


@pytest.mark.parametrize(
    ("method", "block", "more", "code", "message"),
    [
        ("unsc", {"set": {"epss": 0.9}, "forget": "class-0"}, {}, 2, "did you mean"),
        ("logit_mask", None, {}, 2, '"forget": "class-0"'),
        ("soft_weighted", None, {}, 2, 'goals to ["robust"]'),
        ("finetune", {"sett": {}}, {}, 2, "did you mean 'set'"),
        ("finetune", {"inherit": ["alpha"]}, {}, 2, "alpha"),
        ("finetune", None, {"use_cl": True}, 2, "use_cl"),
        ("finetune", None, {"dataset_name": "ddi2013"}, 2, "use ddi"),
        ("finetune", None, {"del_ratio": 11.0}, 2, "ratio"),
        ("finetune", None, {"model_name_or_path": "timm/any"}, 2, "resnet-18"),
        ("finetunes", None, {}, 2, "finetune"),
        ("retrain", {"preset": "none"}, {}, 2, "preset"),
    ],
)
def test_what_is_refused(root, tmp_path, capsys, method, block, more, code, message):
    assert play(root, tmp_path / "run", method, block, **more) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_a_complete_folder_is_kept(root, tmp_path, capsys):
    assert play(root, tmp_path / "run", "finetune", {"set": {"epochs": 1}}) == 0
    before = fingerprint(tmp_path / "run")
    assert play(root, tmp_path / "run", "finetune") == 2
    assert "--resume" in capsys.readouterr().err
    assert play(root, tmp_path / "run", "finetune", None, "--resume") == 0
    assert fingerprint(tmp_path / "run") == before


def test_a_run_that_diverges(root, tmp_path, plugin, capsys):
    assert play(root, tmp_path / "run", "exploding", None, "--plugin", plugin) == 1
    assert "diverged" in capsys.readouterr().err
    found = receipt(tmp_path / "run")
    assert found["status"] == "diverged"
    assert found["record"]["reason"]
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_another_transformers_is_refused_or_marked(root, tmp_path, monkeypatch, capsys):
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "5.23.0" if name == "transformers" else real(name)
    )
    assert play(root, tmp_path / "run", "finetune") == 4
    assert "<4.49" in capsys.readouterr().err
    assert play(root, tmp_path / "run", "finetune", None, "--allow-untested") == 0
    assert receipt(tmp_path / "run")["untested"] == "5.23.0"


def test_gaps_to_a_retrained_folder(root, tmp_path):
    assert play(root, tmp_path / "retrained", "retrain") == 0
    words = ("--reference", str(tmp_path / "retrained"))
    assert play(root, tmp_path / "run", "finetune", None, *words) == 0
    found = receipt(tmp_path / "run")["record"]
    assert {"delta_forget", "delta_retain", "delta_test", "js_forget", "js_test"} <= set(
        found["metrics"]
    )
    gap = 100 * (found["metrics"]["acc_test"] - found["reference"]["acc_test"])
    assert found["metrics"]["delta_test"] == pytest.approx(gap)
    assert play(root, tmp_path / "other", "finetune", None, *words, seed=87) == 2


def test_augmentation_is_asked_for(suite, tmp_path):
    with suite.using(mubench.Options.of({"augment": True, "set": {"epochs": 1}}), []):
        run = Session(suite, tmp_path / "run", "finetune")
        run.trainer._ensure_original()
        run.stats.reads.clear()
        run.trainer.unlearn()
    assert run.stats.reads.keys() == {"train"} or run.stats.reads.keys() == {"orig_train"}


def test_several_processes_and_checkpoints_are_refused(suite, tmp_path):
    run = Session(suite, tmp_path / "run", "finetune")
    with pytest.raises(ScenarioNotSupported, match="resume_from_checkpoint"):
        run.trainer.unlearn(resume_from_checkpoint="checkpoint-1")
    run.args.world_size = 2
    with pytest.raises(ScenarioNotSupported, match="world_size"):
        run.trainer.method_specific_setup()


def test_splits_of_another_configuration(suite, tmp_path):
    run = Session(suite, tmp_path / "run", "finetune")
    other = suite.module("args").UnlearningArguments(
        unlearn_method="finetune", data_name="cifar10", backbone="resnet-18"
    )
    with pytest.raises(ConfigError, match="load_unlearn_data"):
        type(run.trainer)(raw_datasets=run.raw, args=run.args, unlearn_config=other)


def test_no_original_model(suite, tmp_path, monkeypatch):
    def nowhere(_):
        raise OSError("offline")

    monkeypatch.setattr(suite.module("trainer.base"), "load_base_model", nowhere)
    with pytest.raises(MissingOptional, match="jialicheng/cifar10-resnet-18"):
        Session(suite, tmp_path / "run", "finetune")


def test_rows_in_another_order(suite):
    with suite.using(mubench.Options.of({"data_dir": "/data"}), []):
        with pytest.raises(RowOrderMismatch, match="order of the hub"):
            suite._order("cifar10", "0" * 64)
        assert suite._order("cifar100", "0" * 64) == "unknown"
    allowed = mubench.Options.of({"data_dir": "/data", "allow_foreign_order": True})
    with suite.using(allowed, []):
        assert suite._order("cifar10", "0" * 64) == "foreign"


def test_a_data_folder_without_files(root, tmp_path, capsys):
    assert play(root, tmp_path / "run", "finetune", None, "--data-dir", str(tmp_path)) == 3
    assert "train*.parquet" in capsys.readouterr().err


def test_diverged_is_an_error_in_python_too(suite, tmp_path):
    run = Session(suite, tmp_path / "run", "exploding")
    before = {key: value.clone() for key, value in run.trainer.model.state_dict().items()}
    with pytest.raises(DivergedError):
        run.trainer.unlearn()
    assert all(torch.equal(before[k], v) for k, v in run.trainer.model.state_dict().items())


# --------------------------------------------------------------------------- without the suite


def test_our_own_run_in_their_layout(tmp_path):
    words = ["run", "finetune", "--data", "wine", "--model", "logistic", "--forget", "random:10"]
    words += ["--recipe", "epochs=2", "--reference", "none", "--metrics", "core"]
    words += ["--layout", "mubench", "--out", tmp_path / "run"]
    done = unsc(*words, "--json")
    assert done.code == 0
    found = mubench.read_run(tmp_path / "run")
    assert found.metrics == done.json["metrics"]
    assert found.hashes == done.json["hashes"]
    assert "--layout mubench" in found.command
    everything = results(tmp_path / "run")
    assert everything["dr_accuracy"] == pytest.approx(found.metrics["acc_retain"])
    rows = {split: len(one) for split, one in mubench.read_logits(tmp_path / "run").items()}
    assert rows["df"] == 10
    assert unsc(*words, "--resume").code == 0
    assert unsc(*words[:-4], "--out", tmp_path / "run", "--resume").code == 2


def test_no_layout_of_that_name_and_none_for_a_goal(tmp_path):
    assert unsc("run", "finetune", "--layout", "other", "--out", tmp_path / "run").code == 2
    words = ["run", "soft_weighted", "--data", "biased-table", "--forget", "correction"]
    assert unsc(*words, "--layout", "mubench", "--out", tmp_path / "run").code == 2
