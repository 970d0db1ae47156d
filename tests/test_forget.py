"""Forget sets: what a text means, which rows it takes, and every list that must be refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from unsc_plugin import forget
from unsc_plugin.errors import (
    ForgetSetError,
    MissingOptional,
    RowOrderMismatch,
    UnknownName,
)
from unsc_plugin.rows import Rows
from unsc_plugin.spec import DataInfo, DatasetEntry, ForgetSpec, Scenario, read_yaml

ROOT = Path(__file__).parent.parent
INFO = DataInfo(
    name="toy",
    modality="tabular",
    num_classes=4,
    class_names=("cat", "dog", "eel", "fox"),
    input_shape=(1,),
    row_order="hub",
    labels_sha256="0" * 64,
)


@pytest.fixture
def train():
    """90 of 100 rows (every tenth was carved for validation), classes 0, 1, 2 as 45:27:18."""
    index = np.array([i for i in range(100) if i % 10 != 5])
    labels = np.repeat([0, 1, 2], [45, 27, 18])
    kinds = np.array(["date", "count", "speed"], object)[np.arange(90) % 3]
    return Rows.of(
        {"features": torch.zeros(90, 1)},
        torch.from_numpy(labels),
        torch.from_numpy(index),
        extra={"kind": kinds},
    )


def chosen(text, train, **options):
    return forget.select(forget.parse(text), train, **{"info": INFO} | options)


# --------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("class:3", {"kind": "class", "classes": (3,)}),
        ("class:3,5", {"kind": "class", "classes": (3, 5)}),
        ("random:0.1", {"kind": "random", "fraction": 0.1}),
        ("random:100", {"kind": "random", "n": 100}),
        ("file:a b/list.txt", {"kind": "index_file", "path": "a b/list.txt"}),
        ("indices:1,2,3", {"kind": "indices", "indices": (1, 2, 3)}),
        (
            "subclass:fine_label=NUM:date,NUM:count",
            {"kind": "subclass", "column": "fine_label", "values": ("NUM:date", "NUM:count")},
        ),
        ("sequence:random:16x3", {"kind": "sequence", "steps": ("random:16",) * 3}),
        ('{"kind": "class", "classes": [1]}', {"kind": "class", "classes": (1,)}),
    ],
)
def test_shorthands(text, fields):
    assert forget.parse(text) == ForgetSpec(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clas:3", "did you mean class"),
        ("nonsense", "expected a forget set such as class:3"),
        ("class:", "expected a forget set"),
        ("class:cat", "whole numbers"),
        ("class:1,,2", "whole numbers"),
        ("random:0", "greater than or equal to 1"),
        ("random:1.0", "less than 1"),
        ("random:0.0", "greater than 0"),
        ("random:-3", "greater than 0"),
        ("random:nan", "fraction"),
        ("random:many", "expected a number"),
        ("subclass:kind", "COLUMN=VALUE"),
        ("sequence:random:16", "SIZExCOUNT"),
        ("sequence:random:16x0", "SIZExCOUNT"),
        ("sequence:random:0x4", "SIZExCOUNT"),
        ('{"kind": "class"}', "needs classes"),
    ],
)
def test_bad_shorthands(text, message, train):
    with pytest.raises(ForgetSetError, match=message):
        chosen(text, train)


REGISTRY = {
    "toy/class-0": ForgetSpec(kind="class", data="toy", classes=(0,)),
    "toy/random": ForgetSpec(kind="random", data="toy", fraction=0.5, seed=3),
    "toy/steps": ForgetSpec(kind="sequence", steps=("toy/class-0", "random:5")),
    "mu/toy": ForgetSpec(kind="index_prefix", data="toy", path="x.txt", row_order="hub"),
}


def test_registered_names():
    assert forget.resolve("toy/class-0", REGISTRY, "toy") == REGISTRY["toy/class-0"]
    assert forget.resolve("class:2", REGISTRY, "other").classes == (2,)
    assert forget.resolve("mu/toy@2", REGISTRY, "toy").ratio == 2.0
    by_number = forget.resolve("toy/random@7", REGISTRY, "toy")
    assert (by_number.n, by_number.fraction, by_number.seed) == (7, None, 3)
    assert forget.resolve("toy/random@0.2", REGISTRY, "toy").fraction == 0.2


@pytest.mark.parametrize(
    ("text", "data", "error", "message"),
    [
        ("toy/clas-0", "toy", UnknownName, "did you mean 'toy/class-0'"),
        ("toy/class-0", "digits", ForgetSetError, "made for 'toy'"),
        ("toy/class-0@3", "toy", ForgetSetError, "takes no value"),
        ("mu/toy@11", "toy", ForgetSetError, "less than or equal to 10"),
        ("mu/toy@0", "toy", ForgetSetError, "greater than 0"),
        ("mu/toy@two", "toy", ForgetSetError, "expected a number"),
        ("toy/random@1.5", "toy", ForgetSetError, "less than 1"),
    ],
)
def test_names_that_cannot_be_used(text, data, error, message):
    with pytest.raises(error, match=message):
        forget.resolve(text, REGISTRY, data)


# --------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    "text",
    ["class:0", "class:0,2", "random:0.1", "random:7", "subclass:kind=date", "indices:0,1,99"],
)
def test_forget_and_retain_share_the_rows(text, train):
    request = chosen(text, train)
    both = np.concatenate([request.forget, request.retain])
    assert np.array_equal(np.sort(both), np.arange(90))
    assert (np.diff(request.forget) > 0).all()
    assert (np.diff(request.retain) > 0).all()
    assert np.array_equal(request.forget_index, train.index.numpy()[request.forget])
    expected = hashlib.sha256(np.sort(request.forget_index).astype("<i8").tobytes()).hexdigest()
    assert request.forget_sha256 == expected == forget.split_sha256(request.forget_index[::-1])
    assert request.retain_sha256 == forget.split_sha256(train.index.numpy()[request.retain])
    assert request.n == len(request.forget)


def test_kind_scenario_and_classes(train):
    whole = chosen("class:0", train)
    assert (whole.kind, whole.scenario, whole.classes) == ("class", Scenario.CLASS, (0,))
    part = chosen("subclass:kind=date", train)
    assert (part.kind, part.scenario, part.classes) == ("subclass", Scenario.SUBCLASS, ())
    some = chosen("random:9", train)
    assert (some.kind, some.scenario, some.classes) == ("instance", Scenario.RANDOM, ())
    by_index = chosen(f"indices:{','.join(map(str, train.index[72:].tolist()))}", train)
    assert (by_index.kind, by_index.classes) == ("instance", (2,))
    spec = forget.parse("subclass:kind=date").model_copy(update={"scenario": Scenario.CORRECTION})
    assert forget.select(spec, train, info=INFO).scenario is Scenario.CORRECTION


def test_indices_mean_original_positions(train):
    request = chosen("indices:99,0,6", train)
    assert train.index[request.forget].tolist() == [0, 6, 99]


@pytest.mark.parametrize("count", [1, 10, 33, 89])
def test_random_draws_give_every_class_its_share(train, count):
    request = chosen(f"random:{count}", train, seed=1)
    got = np.bincount(train.labels.numpy()[request.forget], minlength=3)
    assert got.sum() == count
    assert (np.abs(got - count * np.array([45, 27, 18]) / 90) < 1).all()


def test_random_draws_follow_their_seed(train):
    base = chosen("random:20", train, seed=1)
    assert np.array_equal(base.forget, chosen("random:20", train, seed=1).forget)
    assert not np.array_equal(base.forget, chosen("random:20", train, seed=2).forget)
    fixed = forget.parse("random:20").model_copy(update={"seed": 1})
    assert np.array_equal(base.forget, forget.select(fixed, train, seed=9, info=INFO).forget)
    plain = forget.parse("random:20").model_copy(update={"stratified": False})
    assert forget.select(plain, train, seed=1, info=INFO).n == 20


def test_fractions_are_of_all_training_rows(train):
    assert chosen("random:0.1", train).n == 9


def test_sequence_steps_are_disjoint_and_shrink_retain(train):
    request = chosen("sequence:random:16x4", train)
    assert (request.kind, request.scenario, request.n) == ("sequence", Scenario.SEQUENTIAL, 64)
    gone = set()
    for step in request.steps:
        assert step.n == 16
        assert not gone & set(step.forget.tolist())
        gone |= set(step.forget.tolist())
        assert set(step.retain.tolist()) == set(range(90)) - gone
    assert np.array_equal(request.forget, np.sort(list(gone)))
    assert np.array_equal(request.retain, request.steps[-1].retain)


def test_sequence_of_registered_sets(train):
    spec = forget.resolve("toy/steps", REGISTRY, "toy")
    request = forget.select(spec, train, info=INFO)
    assert [step.kind for step in request.steps] == ["class", "instance"]
    assert request.steps[0].classes == (0,)
    assert request.n == 50


def test_a_class_is_gone_once_a_sequence_took_its_last_rows(train):
    spec = ForgetSpec(kind="sequence", steps=("indices:90", "class:1", "random:20"))
    request = forget.select(spec, train, info=INFO)
    assert request.classes == (1,)
    assert request.steps[2].classes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class:4", "classes 0..3 of toy, got 4; there are: 0 cat"),
        ("class:-1", "got -1"),
        ("class:3", "got none for kind class"),
        ("class:0,1,2", "takes all 90"),
        ("random:90", "takes all 90"),
        ("random:91", "at most 90"),
        ("random:0.001", "less than one"),
        ("subclass:kid=date", "did you mean 'kind'"),
        ("subclass:kind=data", "nearest: date"),
        ("subclass:kind=date,count,speed", "takes all"),
        ("indices:100", "0..99, got 100"),
        ("indices:5,15,0", r"got 2 of 3 that lie in the validation split .*val_fraction: 0"),
        ("indices:1,1", "entry 2: index 1 was on entry 1"),
        ("indices:-1", "entry 1: expected an index ≥ 0"),
        ("sequence:random:45x2", "takes all"),
        ("sequence:random:50x2", "step 2 .*at most 40"),
    ],
)
def test_selections_that_cannot_be(train, text, message):
    with pytest.raises(ForgetSetError, match=message):
        chosen(text, train)


def test_overlapping_and_nested_steps(train):
    with pytest.raises(ForgetSetError, match=r"got 1 rows of step 2 .*earlier"):
        forget.select(
            ForgetSpec(kind="sequence", steps=("class:0", "indices:0,99")), train, info=INFO
        )
    with pytest.raises(ForgetSetError, match="cannot hold a sequence"):
        forget.select(ForgetSpec(kind="sequence", steps=("sequence:random:3x3",)), train, info=INFO)


# --------------------------------------------------------------------------- index lists


def test_all_formats_say_the_same(train, tmp_path):
    indices = [42, 0, 99]
    (tmp_path / "list.txt").write_text("42\n0\n\n99\n")
    (tmp_path / "list.json").write_text(json.dumps(indices))
    np.save(tmp_path / "list.npy", np.array(indices))
    hashes = {
        chosen(f"file:{tmp_path}/list.{kind}", train).forget_sha256
        for kind in ("txt", "json", "npy")
    }
    assert hashes == {forget.split_sha256(indices)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"1\ntwo\n", r"a\.txt: line 2: expected an index, got 'two'"),
        ("a.txt", b"1\n2.5\n", "line 2"),
        ("a.txt", b"7\n1\n7\n", "line 3: index 7 was on line 1"),
        ("a.txt", b"3\n-1\n", "line 2: expected an index ≥ 0"),
        ("a.txt", b"3\n400\n", "0..99, got 400"),
        ("a.txt", b"1\n99999999999999999999999999\n", "line 2"),
        ("a.txt", b"", "empty"),
        ("a.txt", b"\xff\xfe1", "cannot be read"),
        ("a.json", b"[1, true]", "entry 2"),
        ("a.json", b'[1, "x"]', "entry 2"),
        ("a.json", b"[1, 2.0]", "entry 2"),
        ("a.json", b'{"a": 1}', "list of indices, got dict"),
        ("a.json", b"null", "list of indices, got NoneType"),
        ("a.json", b"[1, 2", "cannot be read"),
        ("a.npy", b"no array", "cannot be read"),
        ("a.csv", b"1", r"\.txt, \.json or \.npy file, got '\.csv'"),
    ],
)
def test_bad_lists_name_the_line(train, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ForgetSetError, match=message):
        chosen(f"file:{tmp_path / name}", train)


@pytest.mark.parametrize(
    "array", [np.array([0.5, 1.0]), np.zeros((2, 2), int), np.array([{}], object), np.array([True])]
)
def test_bad_arrays(train, tmp_path, array):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ForgetSetError, match=r"a\.npy"):
        chosen(f"file:{tmp_path / 'a.npy'}", train)


def test_missing_lists(train, tmp_path, monkeypatch):
    with pytest.raises(ForgetSetError, match="no such file"):
        chosen(f"file:{tmp_path / 'none.txt'}", train)
    monkeypatch.delenv("SOME_HOME", raising=False)
    with pytest.raises(MissingOptional, match="SOME_HOME is not set"):
        chosen("file:${SOME_HOME}/none.txt", train)
    monkeypatch.setenv("SOME_HOME", str(tmp_path))
    with pytest.raises(MissingOptional, match="no such file"):
        chosen("file:${SOME_HOME}/none.txt", train)


def prefix(tmp_path, **fields):
    lines = [i for i in range(100) if i % 10 != 5][::-1][:50]
    (tmp_path / "toy.txt").write_text("\n".join(map(str, lines)))
    spec = {"kind": "index_prefix", "path": str(tmp_path / "toy.txt"), "row_order": "hub"}
    return ForgetSpec(**spec | fields), lines


@pytest.mark.parametrize(("ratio", "count"), [(2.0, 10), (0.3, 1), (7.0, 35), (10.0, 50)])
def test_index_prefix_takes_the_first_lines(train, tmp_path, ratio, count):
    spec, lines = prefix(tmp_path, ratio=ratio)
    request = forget.select(spec, train, info=INFO)
    assert request.forget_index.tolist() == sorted(lines[:count])


def test_index_prefix_needs_a_ratio_that_takes_something(train, tmp_path):
    with pytest.raises(ForgetSetError, match="@RATIO"):
        forget.select(prefix(tmp_path)[0], train, info=INFO)
    with pytest.raises(ForgetSetError, match=r"ratio 0\.01 of 50"):
        forget.select(prefix(tmp_path, ratio=0.01)[0], train, info=INFO)


@pytest.mark.parametrize("order", ["shuffled-parquet", None])
def test_lists_for_another_row_order_are_refused(train, tmp_path, order):
    info = INFO.model_copy(update={"row_order": order})
    spec, lines = prefix(tmp_path, ratio=10.0)
    with pytest.raises(RowOrderMismatch, match=rf"'hub', which .* got {order!r} .*000000"):
        forget.select(spec, train, info=info)
    steps = ForgetSpec(kind="sequence", steps=(spec.model_dump_json(exclude_defaults=True),))
    with pytest.raises(RowOrderMismatch):
        forget.select(steps, train, info=info)
    assert forget.select(spec, train, info=info, allow_foreign_order=True).n == len(lines)


def test_a_known_conversion_is_named(train):
    info = INFO.model_copy(update={"name": "cifar10-hub"})
    spec = ForgetSpec(kind="indices", indices=(1,), row_order="torchvision")
    with pytest.raises(RowOrderMismatch, match=r'reorder.*"torchvision", "hub"'):
        forget.select(spec, train, info=info)


def test_reorder_cifar10():
    known = forget.reorder([0, 9999, 30000, 49999], "cifar10", "torchvision", "hub")
    assert known.tolist() == [40000, 49999, 0, 39999]
    everything = np.arange(50_000)
    there = forget.reorder(everything, "cifar10", "torchvision", "hub")
    assert np.array_equal(np.sort(there), everything)
    assert np.array_equal(forget.reorder(there, "cifar10", "hub", "torchvision"), everything)
    assert np.array_equal(forget.reorder(everything, "cifar10", "hub", "hub"), everything)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([0], "cifar10", "hub", "shuffled-parquet"), RowOrderMismatch),
        (([0], "cifar100", "hub", "torchvision"), RowOrderMismatch),
        (([50_000], "cifar10", "hub", "torchvision"), ForgetSetError),
        (([-1], "cifar10", "hub", "torchvision"), ForgetSetError),
    ],
)
def test_reorder_refuses_what_it_does_not_know(arguments, error):
    with pytest.raises(error):
        forget.reorder(*arguments)


# MU-Bench's own lists: SHA-256 of the ascending indices at 2 % and at 10 %, first 16 digits.
LISTS = {
    "cifar10": ("f198e4b478d69cb8", "a949dd66b3667f3e", 50_000),
    "imdb": ("131cc3e2f16815c3", "f7b1b7a59fe020f4", 25_000),
}


@pytest.mark.skipif("MUBENCH_HOME" not in os.environ, reason="MUBENCH_HOME names no checkout")
@pytest.mark.parametrize("name", LISTS)
def test_mubench_lists_select_the_known_rows(name):
    rows = LISTS[name][2]
    whole = Rows.of({"features": torch.zeros(rows, 1)}, torch.arange(rows) % 2)
    for ratio, expected in zip((2.0, 10.0), LISTS[name], strict=False):
        spec = ForgetSpec(
            kind="index_prefix",
            path=f"${{MUBENCH_HOME}}/mubench/df/{name}.txt",
            row_order="hub",
            ratio=ratio,
        )
        assert forget.select(spec, whole, info=INFO).forget_sha256.startswith(expected)


# --------------------------------------------------------------------------- the registered sets


def test_registered_forget_sets_fit_their_data():
    tree = read_yaml(ROOT / "registry.yaml").tree
    specs = {
        name: ForgetSpec.model_validate_json(json.dumps(entry))
        for name, entry in tree["forget_sets"].items()
    }
    for name, spec in specs.items():
        assert spec.data in tree["datasets"], name
        resolved = forget.resolve(name, specs, str(spec.data))
        columns = DatasetEntry.model_validate_json(json.dumps(tree["datasets"][spec.data])).columns
        if resolved.kind == "subclass" and resolved.column != "mislabelled":
            assert resolved.column in columns.sub_labels, name
