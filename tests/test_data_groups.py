"""Groups by rule, tables and images whose labels lean on a group, and names with arguments."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet, table
from scipy.special import expit
from sklearn.datasets import load_digits

from unsc_plugin import data, forget
from unsc_plugin.errors import ConfigError, DataError, UnknownName
from unsc_plugin.metrics import fairness
from unsc_plugin.spec import (
    Columns,
    DatasetEntry,
    ForgetSpec,
    GroupRule,
    canonical_json,
    read_yaml,
)

ROOT = Path(__file__).parent.parent
AGES = [20, 25, 59, 60, 30, 40]


@pytest.fixture(scope="module")
def registered():
    tree = read_yaml(ROOT / "registry.yaml").tree
    return {
        name: DatasetEntry.model_validate_json(json.dumps(entry))
        for name, entry in tree["datasets"].items()
    }


def rules(*groups):
    return tuple(GroupRule.model_validate_json(json.dumps(group)) for group in groups)


def people(folder, count=6, **changes):
    """Write two splits of a table with a number and a text that groups can be made of."""
    at = np.arange(count)
    columns = {
        "age": np.resize(AGES, count),
        "race": np.resize(["B", "W", "O", "W", "B", "B"], count),
        "score": np.resize([1.0, 2.0, 2.5, 1.0, 2.0, 2.5], count),
        "label": at % 2,
    } | changes
    for split in ("train", "test"):
        parquet.write_table(table(columns), folder / f"{split}.parquet")
    return folder


def entry_of(folder, group="age", groups=(), **fields):
    columns = Columns(group=group, groups=groups)
    defaults = {"source": "parquet", "modality": "tabular", "val_fraction": 0.0}
    return DatasetEntry(**defaults | {"path": str(folder), "columns": columns} | fields)


def loaded(folder, **fields):
    return data.load(entry_of(people(folder), **fields), "people")


# --------------------------------------------------------------------------- groups by rule


@pytest.mark.parametrize(
    ("group", "groups", "codes"),
    [
        ("age", [{"name": "o", "rest": True}, {"name": "m", "low": 25, "high": 60}],
         [0, 1, 1, 0, 1, 1]),
        ("age", [{"name": "young", "high": 30}, {"name": "old", "low": 59}],
         [0, 0, 1, 1, -1, -1]),
        ("age", [{"name": "x", "values": [20, 30]}, {"name": "y", "values": ["40"]}],
         [0, -1, -1, -1, 0, 1]),
        ("race", [{"name": "w", "values": ["W"]}, {"name": "b", "values": ["B"]}],
         [1, 0, -1, 0, 1, 1]),
        ("race", [{"name": "w", "values": ["W"]}, {"name": "r", "rest": True}],
         [1, 0, 1, 0, 1, 1]),
        ("race", [{"name": "all", "values": ["B", "O"]}, {"name": "w", "values": ["W"]}],
         [0, 1, 0, 1, 0, 0]),
        ("score", [{"name": "one", "values": [1]}, {"name": "more", "values": [2, 2.5]}],
         [0, 1, 1, 0, 1, 1]),
    ],
)  # fmt: skip
def test_a_code_is_the_place_of_the_rule(tmp_path, group, groups, codes):
    splits = loaded(tmp_path, group=group, groups=rules(*groups))
    assert splits.info.groups == tuple(rule["name"] for rule in groups)
    for part in (splits.train, splits.test):
        assert part.group.tolist() == codes
    assert splits.train.extra[group].tolist()[0] in ("20", "B", "1.0")


def test_without_rules_the_values_are_sorted(tmp_path):
    splits = loaded(tmp_path, group="race")
    assert splits.info.groups == ("B", "O", "W")
    assert splits.train.group.tolist() == [0, 2, 1, 2, 0, 0]


def test_a_missing_value_lies_in_no_range_but_in_the_rest(tmp_path):
    people(tmp_path, age=np.array(["20", "", "59", "60", "30", "40"], object))
    ranges = [{"name": "a", "low": 0, "high": 40}, {"name": "b", "low": 40}]
    splits = data.load(entry_of(tmp_path, groups=rules(*ranges)), "people")
    assert splits.train.group.tolist() == [0, -1, 1, 1, 0, 1]
    rest = [{"name": "a", "low": 0, "high": 40}, {"name": "b", "rest": True}]
    splits = data.load(entry_of(tmp_path, groups=rules(*rest)), "people")
    assert splits.train.group.tolist() == [0, 1, 1, 1, 0, 1]


def test_the_group_column_stays_a_feature(tmp_path):
    groups = rules({"name": "o", "rest": True}, {"name": "m", "low": 25, "high": 60})
    splits = loaded(tmp_path, groups=groups)
    age = np.array(AGES, float)
    expected = torch.from_numpy((age - age.mean()) / age.std()).float()
    torch.testing.assert_close(splits.train.storage["features"][:, 0], expected)


@pytest.mark.parametrize(
    ("group", "groups", "message"),
    [
        ("sex", [{"name": "f", "values": ["F"]}, {"name": "r", "rest": True}], "no column 'sex'"),
        ("race", [{"name": "w", "values": ["w"]}, {"name": "r", "rest": True}],
         r"'w': no row has 'w' in column 'race'; (did you mean 'W'|there are: \['B', 'O', 'W'\])"),
        ("race", [{"name": "w", "low": 3}, {"name": "r", "rest": True}],
         "numbers in column 'race' for the range of group 'w', got 'B'"),
        ("age", [{"name": "a", "high": 30}, {"name": "b", "low": 25}],
         "'25' in 'a' and 'b'"),
        ("age", [{"name": "a", "high": 10}, {"name": "b", "rest": True}],
         r"got none of 'a' \(\{'a': 0, 'b': 6\}\)"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_the_data(tmp_path, group, groups, message):
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, group=group, groups=rules(*groups))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"groups": [{"name": "a", "rest": True}]}, "groups needs group"),
        ({"group": "g", "groups": [{"name": "a", "rest": True}]}, "at least two groups"),
        ({"group": "g", "groups": [{"name": "a", "values": [1], "low": 2.0}]}, "one of values"),
        ({"group": "g", "groups": [{"name": "a"}]}, "one of values"),
        ({"group": "g", "groups": [{"name": "a", "low": 3.0, "high": 3.0}]}, "low < high"),
        ({"group": "g", "groups": [{"name": "a", "values": [1]}, {"name": "b", "values": [1]}]},
         "two groups have the value 1"),
        ({"group": "g", "groups": [{"name": "a", "values": [1]}, {"name": "a", "rest": True}]},
         "two groups have the name 'a'"),
        ({"group": "g", "groups": [{"name": "a", "rest": True}, {"name": "b", "rest": True}]},
         "only one group can be the rest"),
    ],
)  # fmt: skip
def test_rules_that_make_no_sense(columns, message):
    with pytest.raises(ValueError, match=message):
        Columns.model_validate_json(json.dumps(columns))


def test_data_without_rules_keep_their_keys():
    assert "groups" not in canonical_json(Columns(group="g"))
    groups = rules({"name": "a", "values": (1,)}, {"name": "b", "rest": True})
    swapped = Columns(group="g", groups=groups[::-1])
    assert canonical_json(Columns(group="g", groups=groups)) != canonical_json(swapped)


# --------------------------------------------------------------------------- validation rows


def cells(rows):
    return Counter(zip(rows.labels.tolist(), rows.group.tolist(), strict=True))


def uneven(folder):
    """500 rows whose cells hold 40, 60, 100 and 300; the same again for test."""
    label = np.repeat([0, 0, 1, 1], [40, 60, 100, 300])
    race = np.repeat(["B", "W", "B", "W"], [40, 60, 100, 300])
    order = np.random.default_rng(0).permutation(500)
    return people(folder, 500, label=label[order], race=race[order])


def test_validation_rows_are_a_fifth_of_every_cell(tmp_path):
    splits = data.load(entry_of(uneven(tmp_path), group="race", val_fraction=0.2), "x")
    assert cells(splits.val) == {(0, 0): 8, (0, 1): 12, (1, 0): 20, (1, 1): 60}
    assert cells(splits.train) == {(0, 0): 32, (0, 1): 48, (1, 0): 80, (1, 1): 240}
    features = splits.train.storage["features"][:, 0].double()
    assert abs(features.mean()) < 1e-6  # by the rows that are left, not by those carved


def test_rows_of_no_group_are_cells_too(tmp_path):
    groups = rules({"name": "b", "values": ["B"]}, {"name": "n", "values": ["?"]})
    uneven(tmp_path)
    race = np.repeat(["B", "?", "W", "W"], [40, 60, 100, 300])
    people(tmp_path, 500, label=np.arange(500) % 2, race=race)
    splits = data.load(entry_of(tmp_path, group="race", groups=groups, val_fraction=0.2), "x")
    assert cells(splits.val) == {(y, g): n for g, n in ((0, 4), (1, 6), (-1, 40)) for y in (0, 1)}


def test_test_rows_are_carved_by_cells_too(tmp_path):
    entry = entry_of(uneven(tmp_path), group="race", splits={"train": "train"}, test_fraction=0.25)
    assert cells(data.load(entry, "x").test) == {(0, 0): 10, (0, 1): 15, (1, 0): 25, (1, 1): 75}


# --------------------------------------------------------------------------- a biased table


def test_biased_draws_are_those_of_the_known_answers():
    raw, parts = data.biased_draws(standardise=False), data.biased_draws()
    assert raw["train"].x[:3].sum() == pytest.approx(6.958932010, abs=1e-8)
    y, s = parts["train"].y, parts["train"].s
    assert y.mean() == pytest.approx(0.5580, abs=5e-5)
    assert s.mean() == pytest.approx(0.66533, abs=5e-6)
    assert y[s == 1].mean() == pytest.approx(0.72345, abs=5e-6)
    assert y[s == 0].mean() == pytest.approx(0.22908, abs=5e-6)
    assert parts["train"].x.dtype == np.float64
    np.testing.assert_allclose(parts["train"].x.mean(axis=0), 0, atol=1e-14)
    np.testing.assert_allclose(parts["train"].x.std(axis=0), 1, atol=1e-14)
    mean, deviation = raw["train"].x.mean(axis=0), raw["train"].x.std(axis=0)
    np.testing.assert_allclose(parts["test"].x, (raw["test"].x - mean) / deviation, atol=1e-14)
    assert set(raw["val"].x[:, 19]) == {-1.0, 1.0}


def test_draws_and_sizes_of_the_biased_table():
    first, other = data.biased_draws(0), data.biased_draws(3, (200, 10, 20))
    assert [len(part.y) for part in other.values()] == [200, 10, 20]
    assert not np.array_equal(first["val"].y[:10], other["val"].y)
    generator = np.random.default_rng(32)
    assert np.array_equal(other["val"].s, generator.random(10) < 0.67)


def test_the_registered_biased_table_is_the_drawn_one(registered):
    splits = data.load(registered["synthetic-bias"], "synthetic-bias")
    assert splits.info.groups == ("0", "1")
    assert splits.info.input_shape == (20,)
    assert splits.info.feature_numeric == (True,) * 20
    drawn = data.biased_draws()
    for split in ("train", "val", "test"):
        rows, part = getattr(splits, split), drawn[split]
        features = rows.storage["features"].double().numpy()
        np.testing.assert_allclose(features, part.x, atol=1e-6)
        assert rows.group.tolist() == part.s.tolist()
        assert rows.labels.tolist() == part.y.tolist()
    assert splits.train.index.tolist() == list(range(1500))


# --------------------------------------------------------------------------- a coloured patch


def test_colour_patch():
    images = np.full((4, 3, 16, 16), 0.5, np.float32)
    labels, aligned = np.array([0, 1, 0, 1]), np.array([True, True, False, False])
    patched, colour = data.colour_patch(images, labels, aligned)
    assert colour.tolist() == [0, 1, 1, 0]
    assert (images == 0.5).all()
    assert patched.dtype == np.float32
    for row, channel in enumerate(colour):
        corner = patched[row, :, :2, :2]  # ⌈16/8⌉ = 2
        assert (corner[channel] == 1).all()
        assert corner.sum() == 4
    rest = patched.copy()
    rest[:, :, :2, :2] = 0.5
    assert (rest == 0.5).all()
    small, _ = data.colour_patch((images * 255).astype(np.uint8), labels, aligned, size=1)
    assert small.dtype == np.uint8
    assert small[0, :, 0, 0].tolist() == [255, 0, 0]
    assert small[0, 0, 1, 1] == 127


@pytest.mark.parametrize(
    ("shape", "labels", "size", "message"),
    [
        ((2, 1, 8, 8), [0, 1], 2, r"\(n, 3, H, W\), got \(2, 1, 8, 8\)"),
        ((2, 3, 8, 8), [0, 2], 2, "label of 0 or 1"),
        ((2, 3, 8, 8), [0, 1, 1], 2, "each of 2 images"),
        ((2, 3, 8, 8), [0, 1], 9, "patch of 1 to 8 pixels"),
        ((2, 3, 8, 8), [0, 1], 0, "patch of 1 to 8 pixels"),
    ],
)
def test_patches_that_cannot_be_made(shape, labels, size, message):
    with pytest.raises(DataError, match=message):
        data.colour_patch(np.zeros(shape), np.array(labels), np.array([True, False]), size)


def test_digits_with_a_patch(registered):
    splits = data.load(registered["digits-patch"], "digits-patch")
    parts = [splits.train, splits.val, splits.test]
    assert [len(part) for part in parts] == [1000, 300, 497]
    assert splits.info.input_shape == (3, 8, 8)
    assert splits.info.class_names == ("0-4", "5-9")
    agree = [float((part.group == part.labels).double().mean()) for part in parts]
    assert agree[0] == pytest.approx(0.9, abs=0.03)
    assert agree[1:] == pytest.approx([0.5, 0.5], abs=0.08)
    bunch, generator = load_digits(), np.random.default_rng(0)
    order = generator.permutation(1797)
    start = 0
    for part, share in zip(parts, (0.9, 0.5, 0.5), strict=True):
        rows = order[start : start + len(part)]
        start += len(part)
        labels = bunch.target[rows] >= 5
        aligned = generator.random(len(part)) < share
        assert part.labels.tolist() == labels.astype(int).tolist()
        assert part.group.tolist() == np.where(aligned, labels, ~labels).astype(int).tolist()
        pixels = part.gather(range(len(part))).inputs["pixel_values"]
        assert pixels.dtype == torch.float32
        expected = torch.from_numpy(bunch.images[rows] / 16).float()
        for channel in range(3):
            torch.testing.assert_close(pixels[:, channel, 2:], expected[:, 2:], rtol=0, atol=0)
            corner = (part.group == channel).float()[:, None, None].expand(-1, 2, 2)
            torch.testing.assert_close(pixels[:, channel, :2, :2], corner, rtol=0, atol=0)


def logistic(x, y, ridge):
    theta = np.zeros(x.shape[1])
    for _ in range(12):
        p = expit(x @ theta)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(theta))
        theta -= np.linalg.solve(hessian, x.T @ (p - y) + ridge * theta)
    return theta


def test_known_answers_of_the_digits_with_a_patch(registered):
    found = []
    for seed in range(5):
        name, entry = data.resolve(f"digits-patch?seed={seed}", registered)
        splits = data.load(entry, name)
        x, test = (
            np.c_[rows.storage["pixel_values"].flatten(1).double().numpy(), np.ones(len(rows))]
            for rows in (splits.train, splits.test)
        )
        odds = test @ logistic(x, splits.train.labels.numpy(), 1.0)
        logits = np.column_stack([np.zeros(len(odds)), odds])
        found.append(fairness.block(logits, splits.test.labels, splits.test.group))
    mean = {name: np.mean([block[name] for block in found]) for name in found[0]}
    assert mean["acc"] == pytest.approx(0.780, abs=5e-4)
    assert mean["nll"] == pytest.approx(0.496, abs=5e-4)
    assert mean["dp_soft"] == pytest.approx(0.384, abs=5e-4)
    worst = [block["worst_group_acc"] for block in found]
    assert (min(worst), max(worst)) == pytest.approx((0.52, 0.60), abs=5e-3)


# --------------------------------------------------------------------------- names with arguments


def test_a_name_takes_arguments(registered):
    name, entry = data.resolve("synthetic-bias?n_test=20&k=3", registered)
    assert name == "synthetic-bias?k=3&n_test=20"
    assert entry.args == {"k": 3, "n": 1500, "n_val": 800, "n_test": 20}
    splits = data.load(entry, name)
    assert splits.info.name == name
    expected = data.biased_draws(3, (1500, 800, 20))["test"].y
    assert splits.test.labels.tolist() == expected.tolist()


@pytest.mark.parametrize("text", ["synthetic-bias", "synthetic-bias?", "synthetic-bias?k=0"])
def test_arguments_that_change_nothing_are_no_part_of_the_name(registered, text):
    assert data.resolve(text, registered) == ("synthetic-bias", registered["synthetic-bias"])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("synthetic-bias?kk=3", DataError, "no argument 'kk'; did you mean 'k'"),
        ("synthetic-bias?k=x", DataError, "whole number for k, got 'x'"),
        ("synthetic-bias?n=1", DataError, "n ≥ 2"),
        ("digits-patch?p=1.5", DataError, "0 ≤ p ≤ 1"),
        ("digits-patch?seed=-1", DataError, "seed ≥ 0"),
        ("digits?seed=1", DataError, "no args for scikit-learn's digits"),
        ("synthetic-bias?k", ConfigError, "expected key=value after '\\?', got 'k'"),
        ("synthetic-bia?k=3", UnknownName, "did you mean 'synthetic-bias'"),
    ],
)
def test_arguments_that_are_not_there(registered, text, error, message):
    with pytest.raises(error, match=message):
        data.load(*reversed(data.resolve(text, registered)))


# --------------------------------------------------------------------------- the registered tables

FAIR = {  # groups, features, and (label, group) cells of train, val and test
    "adult-fairness": (
        ("Female", "Male"), 90, (26_049, 6512, 16_281), [1918, 236, 3026, 1332]
    ),
    "bank-fairness": (
        ("under 25 or from 60", "25 to 59"), 47, (28_935, 7234, 9042), [282, 131, 6106, 715]
    ),
    "compas-fairness": (
        ("African-American", "Caucasian"), 16, (4618, 1154, 1442), [287, 304, 238, 155]
    ),
}  # fmt: skip


@pytest.mark.skipif("UNSC_DATA_DIR" not in os.environ, reason="UNSC_DATA_DIR names no data folder")
@pytest.mark.parametrize("name", FAIR)
def test_registered_tables_with_groups(registered, name):
    names, features, sizes, val_cells = FAIR[name]
    splits = data.load(registered[name], name)
    request, other = (
        forget.select(
            ForgetSpec(kind="correction"), splits.train, seed=seed, info=splits.info, has_val=False
        )
        for seed in (0, 1)
    )
    assert request.val.tolist() != other.val.tolist()
    assert len(splits.val) == 0
    train, val = splits.train.subset(request.retain), splits.train.subset(request.val)
    parts = [train, val, splits.test]
    assert splits.info.groups == names
    assert splits.info.input_shape == (features,)
    assert tuple(map(len, parts)) == sizes
    found = cells(val)
    assert [found[label, group] for group in (0, 1) for label in (0, 1)] == val_cells
    whole = cells(train)
    for cell, count in found.items():
        assert abs(count - 0.2 * (count + whole[cell])) <= 1
    outside = {"compas-fairness": {-1, 0, 1}}.get(name, {0, 1})
    assert all(set(part.group.tolist()) == outside for part in parts)
