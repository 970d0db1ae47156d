import pickle
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch

from unsc_plugin import metrics
from unsc_plugin.errors import DataError, DivergedError
from unsc_plugin.metrics import METRICS, distance, membership, mubench
from unsc_plugin.metrics.accuracy import accuracy
from unsc_plugin.metrics.divergence import disagree, js_to_pool

ROWS, CLASSES = 260, 4
FORGET = np.arange(0, 60, 2)
INDEX = np.r_[np.arange(140), -1 - np.arange(120)]


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=ROWS)
    logits = rng.normal(size=(ROWS, CLASSES)).astype(np.float32) + 2 * np.eye(CLASSES)[labels]
    pool = rng.normal(size=(3, ROWS, CLASSES)) + 2 * np.eye(CLASSES)[labels]
    order = rng.permutation(ROWS)
    return {
        "logits": logits[order],
        "labels": labels[order],
        "index": INDEX[order],
        "pool": pool[:, order],
    }


RETRAINED = {"forget": [0.7, 0.8], "retain": [0.9, 0.8], "test": [0.75, 0.8]}
BUILD = {
    "Accuracy": lambda data: metrics.Accuracy(),
    "Confidence": lambda data: metrics.Confidence(),
    "MembershipAUC": lambda data: metrics.MembershipAUC(FORGET),
    "LogisticMIA": lambda data: metrics.LogisticMIA(FORGET, draw_seed=3),
    "RetrainDivergence": lambda data: metrics.RetrainDivergence(data["pool"], FORGET),
    "TugOfWar": lambda data: metrics.TugOfWar(RETRAINED, FORGET),
    "MUBench": lambda data: metrics.MUBench(0.8, FORGET, draw_seed=5),
}


def expected(name, data):
    z, y, index = data["logits"], data["labels"], data["index"]
    mask = {
        "forget": np.isin(index, FORGET),
        "retain": (index >= 0) & ~np.isin(index, FORGET),
        "test": index < 0,
    }
    part = {split: (z[rows], y[rows]) for split, rows in mask.items()}
    if name == "Accuracy":
        return {"accuracy": accuracy(z, y)}
    if name == "Confidence":
        conf = membership.confidence(z, y)
        return {
            "confidence": conf.mean(),
            "confidence_median": np.median(conf),
            "confidence_p95": np.percentile(conf, 95),
        }
    if name == "MembershipAUC":
        scores = [membership.confidence(*part[s]) for s in ("forget", "test")]
        weight = membership.label_histogram_weights(part["test"][1], part["forget"][1])
        return {
            "umia_auc": membership.umia_auc(*scores, weight),
            "umia_tpr1": membership.umia_tpr1(*scores, weight),
        }
    if name == "LogisticMIA":
        losses = [membership.cross_entropy(*part[s]) for s in ("forget", "test")]
        return {"umia_logistic": membership.logistic_mia(*losses, seed=3)}
    if name == "RetrainDivergence":
        values = {f"js_{s}": js_to_pool(z[m], data["pool"][:, m]) for s, m in mask.items()}
        forget = mask["forget"]
        return values | {"disagree_forget": disagree(z[forget], data["pool"][:, forget])}
    if name == "TugOfWar":
        deltas = {s: distance.delta(accuracy(*part[s]), RETRAINED[s]) for s in mask}
        return {
            "tow": distance.tow(*(d / 100 for d in deltas.values())),
            "avg_gap": distance.avg_gap(*deltas.values()),
        } | {f"delta_{s}": d for s, d in deltas.items()}
    return mubench.block(**part, orig_dt=0.8, seed=5)


def columns(metric, data, rows=slice(None)):
    given = {"predictions": data["logits"][rows], "references": data["labels"][rows]}
    if metric.indexed:
        given["index"] = data["index"][rows]
    return given


@pytest.mark.parametrize("name", BUILD)
def test_fast_path_and_arrow_path_equal_the_function_to_the_last_bit(name, data):
    metric = BUILD[name](data)
    fast = metric.compute(**columns(metric, data))
    assert len(metric) == 0
    for rows in (slice(0, 100), slice(100, 101), slice(101, None)):
        metric.add_batch(**columns(metric, data, rows))
    assert len(metric) == ROWS
    assert fast == metric.compute() == expected(name, data)
    assert all(type(value) is float for value in fast.values())
    assert set(fast) <= set(metric.directions)


@pytest.mark.parametrize("name", BUILD)
def test_rows_added_before_are_not_forgotten_by_the_fast_path(name, data):
    metric = BUILD[name](data)
    metric.add_batch(**columns(metric, data, slice(0, 100)))
    mixed = metric.compute(**columns(metric, data, slice(100, None)))
    assert mixed == expected(name, data)


@pytest.mark.parametrize("name", BUILD)
def test_a_row_at_a_time_and_reuse(name, data):
    metric = BUILD[name](data)
    for z, y, index in zip(data["logits"], data["labels"], data["index"], strict=True):
        metric.add(prediction=z, reference=y, **({"index": index} if metric.indexed else {}))
    assert metric.compute() == expected(name, data)
    assert metric.compute(**columns(metric, data)) == expected(name, data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tensors_take_both_paths(dtype, data):
    given = {
        "predictions": torch.tensor(data["logits"]).to(dtype),
        "references": torch.tensor(data["labels"]),
    }
    metric = metrics.Confidence()
    fast = metric.compute(**given)
    metric.add_batch(**given)
    assert metric.compute() == fast


@pytest.mark.parametrize("force_prefix", [False, True])
@pytest.mark.parametrize("form", ["list", "dict"])
@pytest.mark.parametrize("path", ["compute", "add_batch"])
def test_labelled_and_indexed_metrics_combine(form, path, force_prefix, data):
    built = {name: build(data) for name, build in BUILD.items()}
    if form == "list":
        combined = evaluate.combine(list(built.values()), force_prefix=force_prefix)
    else:
        combined = evaluate.combine(built, force_prefix=force_prefix)
    given = columns(metrics.MembershipAUC(FORGET), data)
    if path == "compute":
        result = combined.compute(**given)
    else:
        for rows in (slice(0, 200), slice(200, None)):
            combined.add_batch(**{key: column[rows] for key, column in given.items()})
        result = combined.compute()
    prefixes = [m.name for m in built.values()] if form == "list" else list(BUILD)
    wanted = {
        (f"{prefix}_{key}" if force_prefix else key): value
        for prefix, name in zip(prefixes, BUILD, strict=True)
        for key, value in expected(name, data).items()
    }
    assert result == wanted


def test_two_metrics_of_one_class_need_the_dict_form(data):
    combined = evaluate.combine(
        {"a": metrics.MembershipAUC(FORGET), "b": metrics.MembershipAUC(FORGET, fpr=0.5)}
    )
    result = combined.compute(**columns(metrics.MembershipAUC(FORGET), data))
    assert result["a_umia_auc"] == result["b_umia_auc"]
    assert result["a_umia_tpr1"] < result["b_umia_tpr1"]


def test_construction_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    metric = metrics.Accuracy()
    metric.add_batch(predictions=np.eye(2), references=[0, 0])
    assert metric.compute() == {"accuracy": 0.5}
    assert list(tmp_path.iterdir()) == []


def test_the_library_s_arguments_are_passed_on(tmp_path):
    metric = metrics.Accuracy(keep_in_memory=False, cache_dir=str(tmp_path), experiment_id="x")
    metric.add_batch(predictions=np.eye(2), references=[0, 0])
    assert metric.compute() == {"accuracy": 0.5}
    assert metric.experiment_id == "x"


def test_a_metric_can_be_pickled():
    metric = pickle.loads(pickle.dumps(metrics.TugOfWar(RETRAINED, FORGET)))
    assert metric.retrained == RETRAINED


def test_directions_of_catalogue_names_are_the_catalogue_s(data):
    for build in BUILD.values():
        for name, direction in build(data).directions.items():
            if name in METRICS:
                assert METRICS[name].direction == direction


def test_reference_rows_are_found_by_index(data):
    order = np.random.default_rng(1).permutation(ROWS)
    metric = metrics.RetrainDivergence(
        torch.tensor(data["pool"][:, order]), FORGET, reference_index=data["index"][order]
    )
    rows = data["index"] < 100
    got = metric.compute(**columns(metric, data, rows))
    direct = metrics.RetrainDivergence(data["pool"][:, rows], FORGET)
    assert got == direct.compute(**columns(direct, data, rows))


def test_one_retrained_model_may_come_without_its_axis(data):
    single = metrics.RetrainDivergence(data["pool"][0], FORGET)
    stacked = metrics.RetrainDivergence(data["pool"][:1], FORGET)
    assert single.compute(**columns(single, data)) == stacked.compute(**columns(stacked, data))


def test_splits_without_rows_are_absent(data):
    rows = data["index"] < 0
    metric = metrics.RetrainDivergence(data["pool"][:, rows], FORGET)
    assert set(metric.compute(**columns(metric, data, rows))) == {"js_test"}


def test_forgotten_classes_leave_the_test_accuracy(data):
    metric = metrics.TugOfWar(RETRAINED, FORGET, forgotten_classes=[1])
    rows = (data["index"] < 0) & (data["labels"] != 1)
    kept = accuracy(data["logits"][rows], data["labels"][rows])
    result = metric.compute(**columns(metric, data))
    assert result["delta_test"] == distance.delta(kept, RETRAINED["test"])


def test_few_nonmembers_leave_the_operating_point_out(data):
    rows = data["index"] > -60
    metric = metrics.MembershipAUC(FORGET)
    assert set(metric.compute(**columns(metric, data, rows))) == {"umia_auc"}


@pytest.mark.parametrize("name", ["MembershipAUC", "LogisticMIA", "TugOfWar", "MUBench"])
@pytest.mark.parametrize("split", ["forget", "test"])
def test_a_missing_split_is_named(name, split, data):
    forget = np.isin(data["index"], FORGET)
    rows = ~forget if split == "forget" else data["index"] >= 0
    metric = BUILD[name](data)
    with pytest.raises(DataError, match=f"{metric.name}: .*got none of {split}"):
        metric.compute(**columns(metric, data, rows))


def test_bad_index(data):
    metric = metrics.MembershipAUC(FORGET)
    given = columns(metric, data)
    twice = given["index"].copy()
    twice[twice == 7] = 9
    with pytest.raises(DataError, match="every position once, got 9 2 times"):
        metric.compute(**{**given, "index": twice})
    with pytest.raises(DataError, match="one index per row"):
        metric.compute(**{**given, "index": given["index"][1:]})
    rows = data["index"] != FORGET[3]
    with pytest.raises(DataError, match="all 30 forget examples among the rows, got 29"):
        metric.compute(**columns(metric, data, rows))
    with pytest.raises(ValueError, match="index"):
        metric.compute(predictions=given["predictions"], references=given["references"])


def test_bad_reference(data):
    metric = metrics.RetrainDivergence(data["pool"][:, 1:], FORGET, data["index"][1:])
    with pytest.raises(DataError, match=f"got none for index {data['index'][0]}"):
        metric.compute(**columns(metric, data))
    metric = metrics.RetrainDivergence(data["pool"][:, 1:], FORGET)
    with pytest.raises(DataError, match=r"\(260, 4\), got \(259, 4\)"):
        metric.compute(**columns(metric, data))
    with pytest.raises(DataError, match="reference_index"):
        metrics.RetrainDivergence(data["pool"], FORGET, np.zeros(ROWS, int))
    with pytest.raises(DataError, match="forget, retain and test"):
        metrics.TugOfWar({"forget": [0.5]}, FORGET)


@pytest.mark.parametrize("path", ["fast", "arrow"])
def test_diverged_logits_on_both_paths(path):
    metric = metrics.Accuracy()
    given = {"predictions": [[0.0, np.nan], [1.0, 0.0]], "references": [0, 0]}
    if path == "arrow":
        metric.add_batch(**given)
        given = {}
    with pytest.raises(DivergedError):
        metric.compute(**given)
    assert metric.compute(predictions=np.eye(2), references=[0, 1]) == {"accuracy": 1.0}


def test_a_refused_batch_leaves_nothing_behind():
    metric = metrics.Accuracy()
    with pytest.raises(DataError):
        metric.add_batch(predictions=[[1.0, 0.0], [1.0]], references=[0, 0])
    with pytest.raises(DataError, match="columns of one length"):
        metric.add_batch(predictions=np.eye(2), references=[0])
    metric.add_batch(predictions=np.eye(2), references=[0, 1])
    assert metric.compute() == {"accuracy": 1.0}


@pytest.mark.parametrize(
    "module",
    ["", ".accuracy", ".divergence", ".membership", ".probe", ".distance", ".mubench"],
)
def test_nothing_heavy_is_imported(module):
    check = (
        f"import sys, unsc_plugin.metrics{module} as m; dir(m); "
        "sys.exit([n for n in ('evaluate', 'torch', 'sklearn') if n in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pure_functions_run_without_torch_or_evaluate():
    check = """
import sys, numpy as np
from unsc_plugin.metrics import METRICS
from unsc_plugin.metrics import accuracy, divergence, membership, mubench
z = np.random.default_rng(0).normal(size=(30, 3)); y = np.arange(30) % 3
accuracy.accuracy(z, y); divergence.js_to_pool(z, [z]); mubench.zrf(z, seed=0)
conf = membership.confidence(z, y); membership.umia_auc(conf, conf)
membership.logistic_mia(conf, conf, seed=0)
sys.exit([n for n in ('evaluate', 'datasets', 'transformers', 'torch') if n in sys.modules] or 0)
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_classes_are_listed_and_unknown_names_raise():
    assert set(BUILD) <= set(dir(metrics))
    with pytest.raises(AttributeError, match="no attribute 'Acuracy'"):
        _ = metrics.Acuracy
