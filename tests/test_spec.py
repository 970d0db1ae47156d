"""Files and settings: every fault is told with file, line, path and the nearest key."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

import unsc_plugin
from unsc_plugin.errors import ConfigError
from unsc_plugin.spec import (
    BoardSpec,
    DataInfo,
    Document,
    Experiment,
    ForgetSpec,
    Recipe,
    RegistryFile,
    _models_in,
    canonical_json,
    derive,
    fingerprint,
    parse_yaml,
    read_yaml,
)

# --------------------------------------------------------------------------- YAML with lines

FAULTY_YAML = {
    "duplicate key": ("a: 1\nb: 2\na: 3\n", "f.yaml:3:", "duplicate key 'a'"),
    "first line of a duplicate": ("a: 1\nb: 2\na: 3\n", "f.yaml:3:", "line 1"),
    "nested duplicate": ("a:\n  x: 1\n  y: 2\n  x: 3\n", "f.yaml:4:", "duplicate key 'x'"),
    "duplicate in a list": ("- {k: 1}\n- {k: 1, k: 2}\n", "f.yaml:2:", "duplicate key 'k'"),
    "duplicate by quotes": ("1: a\n'1': b\n", "f.yaml:2:", "duplicate key"),
    "python object": ("a: 1\nb: !!python/object:os.system {}\n", "f.yaml:2:", "tag"),
    "python call": ("b: !!python/object/apply:os.getcwd []\n", "f.yaml:1:", "tag"),
    "own tag": ("a: !mine 3\n", "f.yaml:1:", "tag"),
    "unclosed": ("a: [1, 2\nb: 3\n", "f.yaml:2:", ""),
    "tab": ("a:\n\tb: 1\n", "f.yaml:2:", ""),
    "two documents": ("a: 1\n---\nb: 2\n", "f.yaml:2:", "document"),
    "control character": ("a: \x00\n", "f.yaml", ""),
    "key that is a list": ("? [a]\n: b\n", "f.yaml:1:", "key"),
    "alias inside itself": ("a: &a [*a]\n", "f.yaml", ""),
    "very deep": ("[" * 3000 + "]" * 3000, "f.yaml", ""),
}


@pytest.mark.parametrize("case", FAULTY_YAML)
def test_faulty_yaml_is_a_config_error_with_file_and_line(case: str) -> None:
    text, where, what = FAULTY_YAML[case]
    with pytest.raises(ConfigError) as raised:
        parse_yaml(text, "f.yaml")
    assert str(raised.value).startswith(where)
    assert what in str(raised.value)
    assert raised.value.exit_code == 2


def test_object_tags_run_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    with pytest.raises(ConfigError):
        parse_yaml(f"a: !!python/object/apply:os.mkdir ['{witness}']\n", "f.yaml")
    assert not witness.exists()


def test_lines_of_paths() -> None:
    document = parse_yaml("a:\n  b:\n    - x\n    - y: 1\nc: 2\n", "f.yaml")
    assert document.tree == {"a": {"b": ["x", {"y": 1}]}, "c": 2}
    assert document.line(("a",)) == 1
    assert document.line(("a", "b")) == 2
    assert document.line(("a", "b", 1, "y")) == 4
    assert document.line(("a", "b", 1, "absent")) == 4
    assert document.line(("c",)) == 5
    assert document.line(("absent",)) == 1


def test_anchors_and_merge_keys_are_plain_yaml() -> None:
    text = "base: &b {x: 1, y: 2}\nother:\n  <<: *b\n  y: 3\n"
    assert parse_yaml(text, "f.yaml").tree["other"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("text", ["1e-3", "5E-4", "+1e3", "1.0e-3", "-2e-05", "1.e2"])
def test_scientific_numbers_are_numbers(text: str) -> None:
    assert parse_yaml(f"lr: {text}", "f.yaml").tree == {"lr": float(text)}


@pytest.mark.parametrize("text", ["class:3", "random:0.1", "random:16x8", "e3", "3e", "1e", "v1e3"])
def test_names_that_look_a_little_like_numbers_stay_text(text: str) -> None:
    assert parse_yaml(f"forget: {text}", "f.yaml").tree == {"forget": text}


def test_read_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(ConfigError, match=r"a\.yaml: cannot be read"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        read_yaml(path)
    path.write_text("\ufeffa: ä\n", encoding="utf-8")
    assert read_yaml(str(path)).tree == {"a": "ä"}
    path.write_text("")
    with pytest.raises(ConfigError, match=r"a\.yaml:1: \(top level\)"):
        read_yaml(path).validate(Recipe)


# --------------------------------------------------------------------------- validation

BOARD = """\
schema: 1
name: tiny
title: Tiny
scenarios:
  - name: digits-class
    data: digits
    model: tiny-digits
    recipe: {epochs: 3, lr: 0.05}
    forget: [class:0]
entries: [retrain, {method: finetune, name: ft2, set: {epochs: 2}}]
evaluation: {draws: 1}
"""

FAULTY_BOARDS = {
    "unknown key": ("title: Tiny", "titel: Tiny", "f.yaml:3: titel:", "did you mean 'title'"),
    "missing": ("title: Tiny\n", "", "f.yaml:1: title:", "required"),
    "wrong type": ("lr: 0.05", "lr: fast", "f.yaml:8: scenarios.0.recipe.lr:", "'fast'"),
    "nested unknown": ("lr: 0.05", "lrr: 0.05", "f.yaml:8: scenarios.0.recipe.lrr:", "'lr'"),
    "no coercion": ("epochs: 3", "epochs: '3'", "f.yaml:8: scenarios.0.recipe.epochs:", "'3'"),
    "a bool is no number": ("epochs: 3", "epochs: yes", "f.yaml:8: scenarios.0.recipe.epochs", ""),
    "range": ("epochs: 3", "epochs: -1", "f.yaml:8: scenarios.0.recipe.epochs:", "-1"),
    "infinite": ("lr: 0.05", "lr: .inf", "f.yaml:8: scenarios.0.recipe.lr:", ""),
    "not a number": ("lr: 0.05", "lr: .nan", "f.yaml:8: scenarios.0.recipe.lr:", ""),
    "date": ("title: Tiny", "title: 2020-01-01", "f.yaml", "date"),
    "bad name": ("name: tiny", "name: Tiny Board", "f.yaml:2: name:", "Tiny Board"),
    "list for text": ("data: digits", "data: [digits]", "f.yaml:6: scenarios.0.data:", "digits"),
    "empty list": ("[class:0]", "[]", "f.yaml:9: scenarios.0.forget:", ""),
    "entry key": ("set: {epochs", "sett: {epochs", "f.yaml:10: entries.1", "'set'"),
    "draws": ("[class:0]", "[class:0, class:1]", "f.yaml", "2 forget sets for 1 draws"),
    "doubled": ("name: ft2", "name: retrain", "f.yaml", "entries named twice: retrain"),
    "schema": ("schema: 1", "schema: 2", "f.yaml:1: schema:", "2"),
}


def test_the_board_used_below_is_valid() -> None:
    board = parse_yaml(BOARD, "f.yaml").validate(BoardSpec)
    assert [entry.label for entry in board.rows] == ["retrain", "ft2"]
    assert board.scenarios[0].recipe == Recipe(epochs=3, lr=0.05)


@pytest.mark.parametrize("case", FAULTY_BOARDS)
def test_a_fault_names_file_line_path_and_cause(case: str) -> None:
    old, new, where, what = FAULTY_BOARDS[case]
    assert old in BOARD
    with pytest.raises(ConfigError) as raised:
        parse_yaml(BOARD.replace(old, new), "f.yaml").validate(BoardSpec)
    lines = str(raised.value).splitlines()
    assert any(line.startswith(where) and what in line for line in lines), lines


def test_the_path_of_a_fault_is_what_stands_in_the_file() -> None:
    text = BOARD.replace("[class:0]", "[{kind: random, fractoin: 0.1}]")
    with pytest.raises(ConfigError) as raised:
        parse_yaml(text, "f.yaml").validate(BoardSpec)
    assert "scenarios.0.forget.0.fractoin: unknown key; did you mean 'fraction'?" in str(
        raised.value
    )


def test_several_faults_come_at_once() -> None:
    text = BOARD.replace("title: Tiny", "titel: Tiny").replace("lr: 0.05", "lr: fast")
    with pytest.raises(ConfigError) as raised:
        parse_yaml(text, "f.yaml").validate(BoardSpec)
    told = str(raised.value)
    assert all(path in told for path in (": title:", ": titel:", ": scenarios.0.recipe.lr:"))
    assert "at least 1 item" not in told  # the list is not short, its one item is faulty


def test_the_message_of_a_huge_value_stays_short() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_yaml("epochs: " + "x" * 5000, "f.yaml").validate(Recipe)
    assert len(str(raised.value)) < 400


def test_models_are_frozen_and_strict() -> None:
    recipe = Recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.epochs = 3
    with pytest.raises(ValueError, match="epochs"):
        Recipe(epochs=1.0)
    with pytest.raises(ValueError, match="lrr"):
        Recipe(lrr=1)
    with pytest.raises(ValueError, match="num_classes"):
        DataInfo(name="x", modality="image", num_classes=1, input_shape=(3,), labels_sha256="")


FORGET_SETS = {
    "class": ({"kind": "class", "classes": (0,)}, {"kind": "class"}),
    "subclass": (
        {"kind": "subclass", "column": "c", "values": ("a",)},
        {"kind": "subclass", "column": "c"},
    ),
    "random": ({"kind": "random", "n": 3}, {"kind": "random"}),
    "random twice": (
        {"kind": "random", "fraction": 0.1},
        {"kind": "random", "fraction": 0.1, "n": 3},
    ),
    "index_file": ({"kind": "index_file", "path": "x.npy"}, {"kind": "index_file"}),
    "indices": ({"kind": "indices", "indices": (1, 2)}, {"kind": "indices"}),
    "index_prefix": ({"kind": "index_prefix", "path": "x"}, {"kind": "index_prefix"}),
    "sequence": ({"kind": "sequence", "steps": ("class:0",)}, {"kind": "sequence"}),
    "fraction": ({"kind": "random", "fraction": 0.5}, {"kind": "random", "fraction": 1.0}),
}


@pytest.mark.parametrize("case", FORGET_SETS)
def test_forget_sets_need_what_their_kind_says(case: str) -> None:
    good, bad = FORGET_SETS[case]
    assert ForgetSpec(**good).kind == good["kind"]
    with pytest.raises(ValueError, match=r"needs|less than"):
        ForgetSpec(**bad)


# --------------------------------------------------------------------------- identity and seeds


def test_canonical_json() -> None:
    value = {"z": 1, "a": {"y": 0.1, "x": [1, (2, None)]}, "é": True}
    shuffled = {"é": True, "a": {"x": (1, [2, None]), "y": 0.1}, "z": 1}
    assert canonical_json(value) == canonical_json(shuffled)
    assert json.loads(canonical_json(value)) == json.loads(json.dumps(value))
    assert " " not in canonical_json(value)
    assert canonical_json(np.float64(0.1)) == canonical_json(0.1) == "0.1"
    assert canonical_json(np.int64(3)) == "3"
    assert canonical_json(Path("a/b")) == '"a/b"'
    assert json.loads(canonical_json(Recipe())) == Recipe().model_dump(mode="json")
    for number in (1 / 3, 1e-300, 2**53 + 1, 5e-324):
        assert json.loads(canonical_json(number)) == number
    with pytest.raises(TypeError, match="ndarray"):
        canonical_json(np.zeros(2))


def test_canonical_json_is_json() -> None:
    with pytest.raises(ValueError, match=r"(?i)nan|json"):
        canonical_json({"a": float("nan")})


def test_fingerprints_move_with_every_field() -> None:
    experiment = Experiment(method="finetune", data="digits", model="tiny", forget="class:0")
    changes: list[dict[str, Any]] = [
        {"method": "neggrad"},
        {"set": {"lr": 0.1}},
        {"data": "wine"},
        {"model": "other"},
        {"forget": "class:1"},
        {"forget": ForgetSpec(kind="class", classes=(0,))},
        {"seed": 1},
        {"recipe": Recipe()},
    ]
    prints = [experiment.model_copy(update=change).fingerprint() for change in changes]
    assert len({experiment.fingerprint(), *prints}) == len(changes) + 1
    assert experiment.fingerprint() == experiment.model_copy().fingerprint()
    assert fingerprint("a") == hashlib.sha256(b'"a"').hexdigest()


def test_derive_is_the_documented_formula() -> None:
    code = int.from_bytes(hashlib.sha256(b"draw").digest()[:4], "big")
    expected = np.random.SeedSequence([7, code, 3, 1]).generate_state(1)[0]
    assert derive(7, "draw", 3, 1) == int(expected)
    assert type(derive(7, "draw")) is int


def test_derived_seeds_are_independent() -> None:
    roles = ["original", "reference", "retrain", "order/forget", "order/retain", "augment/retain"]
    grid = itertools.product(range(5), roles, range(20))
    seeds = [derive(seed, role, number) for seed, role, number in grid]
    assert len(set(seeds)) == len(seeds)
    bits = np.unpackbits(np.array(seeds, dtype=">u4").view(np.uint8)).reshape(len(seeds), 32)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(seeds))
    assert derive(0, "a", 1, 2) != derive(0, "a", 2, 1)


# --------------------------------------------------------------------------- every registry field

REGISTRY_FIELDS = """\
schema: 1
package: sample
requires: [numpy]
defaults: {method: m, backbone: b, dataset: d, forget_set: d/class-0, seed: 42}
methods:
  m:
    target: sample.methods:M
    summary: A method
    paper: {title: T, year: 2020, arxiv: "2001.00001", doi: "10/x", repo: "https://x"}
    needs: [retain]
    scenarios: [class, random]
    modalities: [image]
    supports_weights: true
    requires: [numpy]
    aliases: {mm: paper}
    known_as: {mubench: em}
    beside: [retrain]
    defaults: {lr: 0.1}
    presets:
      paper: {args: {lr: 0.2}, where: {data: d}, source: paper, trials: 3, seeds: [1, 2]}
backbones:
  b:
    source: timm
    id: resnet18
    summary: A backbone
    stem: cifar
    args: {x: 1}
    modality: image
    input_size: [3, 32, 32]
    mean: [0.5, 0.5, 0.5]
    std: [0.5, 0.5, 0.5]
    mubench: bb
    recipe: {epochs: 3, optimizer: adam, lr: 0.1, momentum: 0.5, nesterov: true, weight_decay: 0.1,
      batch_size: 4, schedule: cosine, warmup_epochs: 1.0, label_smoothing: 0.1, augment: crop_flip,
      max_grad_norm: 1.0}
datasets:
  d:
    source: hub
    id: owner/d
    config: plain
    revision: abc
    summary: Data
    splits: {train: train, test: test}
    columns: {input: img, label: label, group: g, sub_labels: [s], drop: [t],
      groups: [{name: a, values: [x]}, {name: b, rest: true}]}
    modality: image
    num_classes: 3
    max_length: 16
    test_fraction: 0.2
    val_fraction: 0.1
    label_noise: 0.1
    limit: {train: 10}
    args: {y: 1}
    row_order: hub
    labels_sha256: d6d2fe5c7528f766adb2e13bf983d1e4707936c06b4ccf240ef3d2dcd72c986d
    license: mit
    mubench: dd
    recipe: {epochs: 2}
  p: {source: parquet, path: x, modality: tabular, columns: {group: age,
    groups: [{name: young, high: 40.0}, {name: old, low: 40.0}]}}
forget_sets:
  d/class-0: {kind: class, data: d, classes: [0], scenario: class, summary: A set}
  d/random: {kind: random, fraction: 0.1, seed: 3, stratified: true, row_order: hub}
  d/prefix: {kind: index_prefix, path: x.txt, ratio: 2.0, unit: percent_of_10}
  d/subclass: {kind: subclass, column: fine, values: [a, b]}
  d/count: {kind: random, n: 5}
  d/rows: {kind: indices, indices: [1, 2]}
  d/sequence: {kind: sequence, steps: [d/class-0, d/count]}
  d/correction: {kind: correction, val_fraction: 0.25}
"""

REQUIRED = {
    "schema",
    *(f"defaults.{key}" for key in ("backbone", "dataset", "forget_set", "seed")),
    *(f"methods.*.{key}" for key in ("target", "summary", "needs", "scenarios")),
    "methods.*.paper.title",
    "methods.*.paper.year",
    "methods.*.presets.*.source",
    "backbones.*.source",
    "backbones.*.id",
    "datasets.*.source",
    "datasets.*.modality",
    "datasets.*.id",
    "datasets.*.path",
    "forget_sets.*.kind",
    "forget_sets.*.classes",
    "forget_sets.*.fraction",
    "forget_sets.*.path",
    "forget_sets.*.steps",
    "forget_sets.*.n",
    "forget_sets.*.column",
    "forget_sets.*.values",
    "forget_sets.*.indices",
}
NAMED = {"methods", "backbones", "datasets", "forget_sets", "methods.*.presets"}
"""Mappings from free names to entries: their keys are `*` in REQUIRED."""
FREE = {
    *("methods.*.aliases", "methods.*.known_as", "methods.*.defaults"),
    *("methods.*.presets.*.args", "methods.*.presets.*.where"),
    *("backbones.*.args", "datasets.*.args"),
}
"""Mappings whose keys are not ours."""
CLOSED = {"datasets.*.splits", "datasets.*.limit"}
"""Mappings with a fixed choice of keys: pydantic names the choice instead of the nearest key."""

At = tuple[str, ...]


def pattern(path: At) -> str:
    parts: list[str] = []
    for part in path:
        parts.append("*" if ".".join(parts) in NAMED else part)
    return ".".join(parts)


def fields(tree: dict[str, Any], path: At = ()) -> Iterator[At]:
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict) and pattern((*path, key)) not in FREE:
            yield from fields(value, (*path, key))


def at(tree: Any, path: At) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def documents() -> dict[str, Document]:
    """Return the sample above, and one small file for every entry of the built-in registry."""
    found = {"sample": parse_yaml(REGISTRY_FIELDS, "registry.yaml")}
    root = Path(unsc_plugin.__file__).parent
    path = next(p for p in (root, root.parent) if (p / "registry.yaml").exists()) / "registry.yaml"
    for section, entries in yaml.safe_load(path.read_text()).items():
        if section in NAMED:
            for name, entry in entries.items():
                text = yaml.safe_dump({"schema": 1, section: {name: entry}})
                found[f"{section}.{name}"] = parse_yaml(text, "registry.yaml")
    return found


DOCUMENTS = documents()


def used(model: type[BaseModel], tree: dict[str, Any], path: At = ()) -> Iterator[tuple[type, str]]:
    """Yield model and key of every field that a tree gives, in it and in the models inside it."""
    for name, info in model.model_fields.items():
        key = info.alias or name
        below = (*path, key)
        if key not in tree:
            continue
        yield model, key
        held = tree[key]
        if pattern(below) in NAMED:
            held, below = [*held.values()], (*below, "*")
        for inner in _models_in(info.annotation):
            for one in held if isinstance(held, list) else [held]:
                yield from used(inner, one, below)


def test_the_sample_has_every_field_of_every_entry() -> None:
    given = set(used(RegistryFile, DOCUMENTS["sample"].tree))
    models = {model for model, _ in given}
    assert len(models) == 11
    fields = {(m, i.alias or name) for m in models for name, i in m.model_fields.items()}
    assert fields - given == set()


def refused(document: Document, tree: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        Document(document.source, tree, document.lines).validate(RegistryFile)
    assert raised.value.exit_code == 2
    return str(raised.value)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_registry_files_are_valid(name: str) -> None:
    assert DOCUMENTS[name].validate(RegistryFile).schema_ == 1


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_registry_field_removed(name: str) -> None:
    document = DOCUMENTS[name]
    for path in fields(document.tree):
        tree = copy.deepcopy(document.tree)
        del at(tree, path[:-1])[path[-1]]
        needed = path[-1] == "group" and "groups" in at(tree, path[:-1])
        if pattern(path) in REQUIRED or needed:
            said = refused(document, tree)
            assert said.startswith("registry.yaml:")
            assert path[-1] in said
            assert ".".join(path[:-1]) in said
        else:
            Document("registry.yaml", tree).validate(RegistryFile)


def wrong_values(value: Any) -> list[Any]:
    """Return values of other types than `value` has."""
    if isinstance(value, dict):
        return [7, "text", [1]]
    if isinstance(value, list):
        return [7, "text", {"a": 1}, [{"a": 1}]]
    if isinstance(value, bool):
        return ["yes", 2, [True]]
    if isinstance(value, int):
        return ["7", 7.5, [7], None if value else "x"]
    if isinstance(value, float):
        return ["0.1", [0.1], True]
    return [7, True, {"a": 1}]


OPTIONAL_INTS = {"num_classes", "trials", "seed", "n"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_registry_field_mistyped(name: str) -> None:
    document = DOCUMENTS[name]
    for path in fields(document.tree):
        for wrong in wrong_values(at(document.tree, path)):
            if wrong is None and path[-1] in OPTIONAL_INTS:
                continue
            if pattern(path) == "datasets.*.columns.input" and isinstance(wrong, str):
                continue  # one column or several
            tree = copy.deepcopy(document.tree)
            at(tree, path[:-1])[path[-1]] = wrong
            said = refused(document, tree)
            assert said.startswith("registry.yaml:")
            assert f": {'.'.join(path)}" in said


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_registry_mapping_with_a_key_too_many(name: str) -> None:
    document = DOCUMENTS[name]
    mappings = [()] + [p for p in fields(document.tree) if isinstance(at(document.tree, p), dict)]
    for path in mappings:
        if pattern(path) in FREE:
            continue
        tree = copy.deepcopy(document.tree)
        at(tree, path)["zzz-unknown"] = 1
        said = refused(document, tree)
        assert said.startswith(f"registry.yaml:{document.line(path)}: ")
        assert ".".join((*path, "zzz-unknown")) in said


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_registry_field_misspelled(name: str) -> None:
    document = DOCUMENTS[name]
    for path in fields(document.tree):
        parent = pattern(path[:-1])
        if parent in NAMED or parent in CLOSED or len(path[-1]) < 2:
            continue
        tree = copy.deepcopy(document.tree)
        holder = at(tree, path[:-1])
        holder[path[-1] + "z"] = holder.pop(path[-1])
        said = refused(document, tree)
        assert f"{'.'.join(path)}z: unknown key; did you mean {path[-1]!r}" in said


@pytest.mark.parametrize(
    ("section", "name"),
    [("methods", "Bad"), ("methods", "a b"), ("methods", "a.b"), ("forget_sets", "a/b/c")],
)
def test_names_are_lower_case(section: str, name: str) -> None:
    document = DOCUMENTS["sample"]
    tree = copy.deepcopy(document.tree)
    tree[section][name] = next(iter(tree[section].values()))
    assert name in refused(document, tree)
