"""The MU-Bench adapter without MU-Bench: index lists, configurations, folders, numbers.

Where a package is needed, it is the stand-in that the tests write; nothing here is MU-Bench's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
from mubench_stand_in import INDICES, build_mubench
from sklearn.metrics import roc_auc_score

from unsc_plugin import registry
from unsc_plugin.adapters import mubench
from unsc_plugin.errors import (
    ConfigError,
    ForgetSetError,
    MissingOptional,
    RecordError,
    ScenarioNotSupported,
    UnknownName,
    VersionWindow,
)
from unsc_plugin.metrics import mubench as numbers
from unsc_plugin.record import Record, Unit

# --------------------------------------------------------------------------- index lists


@pytest.fixture
def lists(tmp_path):
    """A package folder with any index list, written by the returned function."""
    folder = tmp_path / "mubench"
    (folder / "df").mkdir(parents=True)
    (folder / "__init__.py").write_text("model_map_rev = {'a/b': 'b'}\n")

    def write(text, name="cifar10"):
        (folder / "df" / f"{name}.txt").write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1, [7]), (2.5, [3, 7]), (10, list(range(10)))], ids=str
)
def test_a_ratio_takes_the_front_of_the_list(lists, ratio, expected):
    home = lists("7\n3\n9\n1\n5\n0\n2\n8\n6\n4\n")
    assert mubench.deletion_indices("cifar10", ratio, home=home).tolist() == expected


@pytest.mark.parametrize(
    ("length", "ratio", "count"),
    [(1473, 4, 589), (1473, 6, 883), (1473, 9, 1325), (17, 2, 3), (17, 6, 10), (5000, 2, 1000)],
)
def test_sizes_are_those_of_the_original_rule(lists, length, ratio, count):
    home = lists("\n".join(map(str, range(length))))
    assert len(mubench.deletion_indices("cifar10", ratio, home=home)) == count


@pytest.mark.parametrize("ratio", [0, -1, 10.5, 0.1])
def test_ratios_that_take_nothing_or_too_much(lists, ratio):
    with pytest.raises(ForgetSetError):
        mubench.deletion_indices("cifar10", ratio, home=lists("7\n3\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("7\nx\n", "line 2"), ("7\n3\n7\n", "line 3"), ("-1\n", "line 1"), ("\n", "empty")],
)
def test_faulty_lists_name_their_line(lists, text, message):
    with pytest.raises(ForgetSetError, match=message):
        mubench.deletion_indices("cifar10", 10, home=lists(text))


@pytest.mark.parametrize(("data", "hint"), [("ddi2013", "use ddi"), ("nlvr2", "cifar10, cifar100")])
def test_data_that_cannot_be_loaded_there(lists, data, hint):
    with pytest.raises(ScenarioNotSupported, match=hint):
        mubench.deletion_indices(data, 2, home=lists("1\n"))


def test_places_of_a_checkout(lists, tmp_path, monkeypatch):
    home = lists("1\n2\n")
    monkeypatch.setenv("MUBENCH_HOME", str(home / "mubench"))
    found = mubench.locate()
    assert (found.root, found.df_dir) == (home, home / "mubench" / "df")
    assert found.sha256.keys() == {"cifar10"}
    assert mubench.locate(home).package == found.package
    assert found.short_names == {"a/b": "b"}
    monkeypatch.setenv("MUBENCH_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(MissingOptional, match="set MUBENCH_HOME"):
        mubench.locate()
    monkeypatch.delenv("MUBENCH_HOME")
    with pytest.raises(MissingOptional, match="MUBENCH_HOME is not set"):
        mubench.locate()


# --------------------------------------------------------------------------- versions and names


@pytest.mark.parametrize("version", ["4.45.1", "4.49.0", "5.23"])
def test_window_of_transformers(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda _: version)
    with pytest.raises(VersionWindow, match=r">=4.46,<4.49.*" + version) as caught:
        mubench.check_window()
    assert caught.value.exit_code == 4
    assert mubench.check_window(allow_untested=True) == version


@pytest.mark.parametrize("version", ["4.46.0", "4.48.3"])
def test_inside_the_window(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda _: version)
    assert mubench.check_window() is None


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("unsc", "unsc"),
        ("retrain", "retrain"),
        ("Soft_Weighted", "soft_weighted"),
        ("plugin-neggrad", "neggrad"),
        ("l2ul", "instance_wise.adv_imp"),
        ("neggrad", None),
        ("scrub", None),
        ("no-such", None),
    ],
)
def test_whose_name_it_is(name, method):
    assert mubench.plugin_method(name, registry.load()) == method


def test_every_method_of_ours_has_a_name_there():
    known = registry.load()
    for name in (name for name, one in known.methods.items() if one.status == "ok"):
        assert mubench.plugin_method(f"plugin-{name}", known) == name
        own = mubench.plugin_method(name, known)
        assert own == (None if name in mubench.OWNED else name)
    with pytest.raises(UnknownName, match="unsc"):
        mubench.plugin_method("plugin-unscc", known)


# --------------------------------------------------------------------------- configurations


def test_translation_for_a_method_of_ours():
    given = {
        "dataset_name": "cifar10",
        "evaluation_strategy": "epoch",
        "load_best_model_at_end": True,
        "push_to_hub": True,
        "dataloader_num_workers": 10_000,
        "unsc_plugin": {"forget": "class-1"},
    }
    found, changes = mubench.translate_config(given)
    assert found["eval_strategy"] == found["save_strategy"] == "no"
    assert not found["load_best_model_at_end"]
    assert not found["push_to_hub"]
    assert found["remove_unused_columns"] is False
    assert found["metric_for_best_model"] == "accuracy"
    assert found["report_to"] == "none"
    assert found["dataloader_num_workers"] < 10_000
    assert not found.keys() & {"unsc_plugin", "evaluation_strategy"}
    assert len(changes) == 9
    assert mubench.translate_config(given, allow_push=True)[0]["push_to_hub"]
    assert given["evaluation_strategy"] == "epoch"


def test_translation_for_a_method_of_theirs():
    given = {"dataset_name": "cifar10", "evaluation_strategy": "epoch", "push_to_hub": True}
    found, _ = mubench.translate_config(given, plugin=False)
    assert found["eval_strategy"] == "epoch"
    assert found["push_to_hub"]
    assert "save_strategy" not in found


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"forgot": "x"}, "forget"),
        ({"forget": "class"}, "class-K"),
        ({"inherit": ["lr"]}, "learning_rate"),
        ({"augment": 1}, "augment"),
    ],
)
def test_blocks_with_mistakes(block, message):
    with pytest.raises(ConfigError, match=message):
        mubench.Options.of(block)


def test_new_configurations(capsys, lists):
    words = ["--make-config", "cifar10/resnet-18/unsc/2/42"]
    assert mubench.main(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["output_dir"] == "../../checkpoint/unlearn/cifar10/resnet-18/unsc/2.0/42"
    assert made["model_name_or_path"] == "microsoft/resnet-18"
    assert (made["num_train_epochs"], made["per_device_train_batch_size"]) == (20, 128)
    home = str(lists("1\n"))
    assert mubench.main(["--make-config", "imdb/b/retrain/10.0/13", "--home", home]) == 0
    text = json.loads(capsys.readouterr().out)
    assert (text["model_name_or_path"], text["learning_rate"]) == ("a/b", 5e-5)
    assert "max_seq_length" in text
    assert "image_column_name" not in text


@pytest.mark.parametrize(
    "text",
    ["cifar10/resnet-18/unsc/2", "cifar10/resnet-18/unsc/2/x", "tofu/phi/unsc/2/42",
     "cifar10/resnet-18/nobody/2/42", "cifar10/resnet-19/unsc/2/42"],
)  # fmt: skip
def test_new_configurations_of_nothing(capsys, text):
    assert mubench.main(["--make-config", text]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_importing_the_adapter_imports_neither_suite_nor_transformers():
    code = (
        "import sys, unsc_plugin.adapters.mubench as m; "
        "print([n for n in sys.modules if n.split('.')[0] in ('mubench', 'evaluate')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("dt", "df", "method", "expected"),
    [
        (0.9, 0.1, "unsc", 1),
        (0.8, 0.3, "unsc", 0.847059),
        (0.95, 0.1, "unsc", 0.974359),
        (0.9, 0.085, "unsc", 0.992443),
        (0.9, 0.07, "unsc", 0),
        (0.7, 0.1, "unsc", 0),
        (0.7, 0.1, "neggrad", 0.888889),
    ],
)
def test_overall(dt, df, method, expected):
    found = numbers.unlearn_overall(dt, df, orig_dt=0.9, random=0.1, method=method)
    assert found == pytest.approx(expected, abs=1e-6)


def test_first_overall():
    assert numbers.overall_v1(0.9, 0.1, 0.6) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("classes", "hot", "flat"), [(2, 0.781, 0.995), (10, 0.473, 0.991), (100, 0.335, 0.990)]
)
def test_zrf(classes, hot, flat):
    one_hot = 50.0 * np.eye(classes)[np.arange(200) % classes]
    assert numbers.zrf(one_hot, seed=0, draws=500) == pytest.approx(hot, abs=2e-3)
    even = np.zeros((200, classes))
    assert numbers.zrf(even, seed=0, draws=500) == pytest.approx(flat, abs=2e-3)


@pytest.mark.parametrize(("dr", "df", "expected"), [(1, 0, 1), (1, 1, 0.5), (0, 1, 0)])
def test_knowledge_gap(dr, df, expected):
    assert numbers.knowledge_gap(dr, df) == expected
    draws = np.r_[np.full(20, dr), np.full(20, df)]
    assert roc_auc_score([1] * 20 + [0] * 20, draws) == pytest.approx(expected, abs=1e-12)


# --------------------------------------------------------------------------- run folders


@pytest.fixture
def finished():
    """A record that is ok, and logits and labels that fit it."""
    generator = np.random.default_rng(0)
    labels = {split: generator.integers(0, 5, n) for split, n in (("test", 30), ("df", 8))}
    labels["dr"] = generator.integers(0, 5, 40)
    logits = {
        split: (generator.normal(size=(len(y), 5)) + 3 * np.eye(5)[y]).astype(np.float32)
        for split, y in labels.items()
    }
    names = {"test": "test", "df": "forget", "dr": "retain"}
    block = numbers.block(
        **{names[split]: (logits[split], y) for split, y in labels.items()},
        orig_dt=0.9, seconds=1.5, seed=0,
    )  # fmt: skip
    record = Record(
        entry="unsc", method="unsc", scenario="mubench-cifar10-resnet-18", kind="instance",
        unit=Unit(train_seed=0, draw=0), seed=1, status="ok", experiment={"seed": 42}, config={},
        hashes={"forget": "0" * 64}, metrics=block, package_version="0", command="unsc run unsc",
        created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return record, logits, labels


def test_a_folder_reads_back_as_it_was_written(tmp_path, finished):
    record, logits, labels = finished
    folder = mubench.write_run(tmp_path / "run", record, logits, labels=labels)
    assert mubench.read_run(folder, labels=labels) == record
    everything = json.loads((folder / "all_results.json").read_text())
    assert everything["test_accuracy"] == everything["dt_accuracy"]
    assert {"df_loss", "dr_loss", "test_loss", "unlearn_time", "zrf"} <= everything.keys()
    assert np.array_equal(mubench.read_logits(folder)["df"], logits["df"])


def test_a_writer_that_is_killed_leaves_no_mark(tmp_path, finished, monkeypatch):
    from unsc_plugin.adapters import _mubench_folder as inside

    record, logits, _ = finished
    write = inside.write_json

    def killed(path, tree):
        if path.name == "all_results.json":
            raise KeyboardInterrupt
        return write(path, tree)

    monkeypatch.setattr(inside, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        mubench.write_run(tmp_path / "run", record, logits)
    assert not (tmp_path / "run" / "all_results.json").exists()
    with pytest.raises(RecordError, match=r"all_results\.json"):
        mubench.read_run(tmp_path / "run")


def test_a_folder_of_theirs_becomes_a_record(tmp_path, finished):
    record, logits, labels = finished
    folder = tmp_path / "cifar10" / "vit-base" / "scrub" / "2.0" / "87"
    mubench.write_run(folder, record, logits, labels=labels)
    (folder / "plugin_results.json").unlink()
    found = mubench.read_run(folder, labels=labels)
    assert found.experiment["source"] == "mubench"
    assert (found.method, found.seed, found.checks) == ("scrub", 87, None)
    assert found.experiment["forget"]["ratio"] == 2.0
    assert found.metrics["acc_forget"] == record.metrics["mubench.df_accuracy"]
    assert found.metrics["mubench.zrf"] == record.metrics["mubench.zrf"]


def test_accuracies_that_do_not_fit_the_logits(tmp_path, finished):
    record, logits, labels = finished
    folder = mubench.write_run(tmp_path / "run", record, logits, labels=labels)
    wrong = {"df": (labels["df"] + 1) % 5}
    with pytest.raises(RecordError, match="df_accuracy"):
        mubench.read_run(folder, labels=wrong)


@pytest.mark.parametrize("change", [{"status": "failed", "reason": "x"}, {"metrics": {}}], ids=str)
def test_no_folder_of_a_run_without_numbers(tmp_path, finished, change):
    record, logits, _ = finished
    broken = record.model_copy(update=change)
    with pytest.raises(RecordError, match="ok"):
        mubench.write_run(tmp_path / "run", broken, logits)
    assert not (tmp_path / "run").exists()


def test_index_list_of_the_stand_in(tmp_path):
    root = build_mubench(tmp_path)
    assert mubench.deletion_indices("cifar10", 2, home=root).tolist() == sorted(INDICES[:4])
