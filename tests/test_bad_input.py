"""Bad input, a line each: a message that says what to do, the right code, nothing written."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from command_line import Done, board, tree, unsc
from pyarrow import parquet
from torch import nn

from unsc_plugin import models, record
from unsc_plugin.errors import CheckpointError

SCREEN, WIDTH = 12, 100


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and an empty cache beside it."""
    monkeypatch.setenv("UNSC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNSC_DATA_DIR", raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(code: int, *words: str | Path, says: tuple[str, ...]) -> Done:
    """Run a command that must be refused, and hold the refusal to the rules of all of them."""
    here = Path.cwd()
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    folders = tree(here)
    done = unsc(*words)
    assert done.code == code, done.err or done.out[-500:]
    assert done.out == ""
    assert "Traceback" not in done.err
    rows = sum(1 + len(line) // WIDTH for line in done.err.splitlines())
    assert rows <= SCREEN, f"{rows} rows on a screen:\n{done.err}"
    assert "\x1b" not in done.err
    for part in says:
        assert part in done.err, f"{part!r} is missing in:\n{done.err}"
    assert tree(here) == folders
    assert {path: path.read_bytes() for path in before} == before
    cache = here.parent / "cache"
    assert not cache.exists() or not [p for p in cache.rglob("*") if p.is_file()]
    return done


# --------------------------------------------------------------------------- words of `unsc run`

RUN: dict[str, tuple[int, str, tuple[str, ...]]] = {
    # names
    "method": (2, "finetun", ("'finetun'", "did you mean 'finetune'")),
    "method of other code": (2, "amnesiac", ("'amnesiac'", "random_label", "subtracts")),
    "preset": (2, "finetune.pape", ("'finetune.pape'", "did you mean 'finetune.paper'")),
    "backbone": (2, "finetune --model tiny-digit", ("'tiny-digit'", "'tiny-digits'", "timm:<id>")),
    "timm id": (2, "finetune --model timm:resnet1", ("'resnet1'", "'resnet18'")),
    "config type": (2, "finetune --model hf-config:bertt", ("'bertt'", "'bert'")),
    "config setting": (2, "finetune --model hf-config:vit?layers", ("key=value", "'layers'")),
    "config field": (2, "finetune --model hf-config:vit?hidden_sizes=3", ("hidden_siz",)),
    "uncached hub model": (3, "finetune --model hf:nobody/nothing", ("nobody/nothing", "offline")),
    "uncached shortcut": (3, "finetune --model vit-base", ("google/vit-base", "hf-config")),
    "data set": (2, "finetune --data digit --forget class:0", ("'digit'", "'digits'", "unsc list")),
    "uncached hub data": (
        3, "finetune --data hub:nobody/nothing --forget class:0",
        ("nobody/nothing", "check the name and the network"),
    ),
    "uncached hub entry": (3, "finetune --data imdb-hub --forget class:0 --model tiny-text",
                           ("stanfordnlp/imdb", "network")),
    "forget set": (2, "finetune --forget digits/clas-0", ("'digits/clas-0'", "'digits/class-0'")),
    "kind of forget set": (2, "finetune --forget klass:3", ("'klass:3'", "class:...")),
    "forget set of other data": (2, "finetune --forget wine/class-0",
                                 ("'digits'", "'wine/class-0'", "--data wine")),
    "data without forget set": (2, "finetune --data wine", ("--forget", "class:0", "wine/class-0")),
    # settings
    "setting": (2, "finetune --set epoch=3", ("'epoch'", "did you mean 'epochs'")),
    "no setting": (2, "finetune --set epochs", ("key=value", "'epochs'")),
    "setting twice": (2, "finetune --set lr=1 --set lr=2", ("lr is given twice",)),
    "type of a setting": (2, "finetune --set epochs=many", ("epochs", "int", "'many'")),
    "range of a setting": (2, "finetune --set epochs=-1", ("epochs", ">= 0", "-1")),
    "setting that is no number": (2, "finetune --set lr=.nan", ("lr", "> 0", "nan")),
    "field of the recipe": (2, "finetune --recipe epoch=3", ("--recipe", "epoch", "'epochs'")),
    "type in the recipe": (2, "finetune --recipe epochs=1.5", ("epochs", "integer", "1.5")),
    "range in the recipe": (2, "finetune --recipe lr=0", ("lr", "greater than 0", "0")),
    "word in the recipe": (2, "finetune --recipe optimizer=lion", ("optimizer", "sgd", "lion")),
    # numbers and words of flags
    "seed": (2, "finetune --seed x", ("--seed", "integer")),
    "negative seed": (2, "finetune --seed -1", ("--seed", ">= 0", "-1")),
    "threads": (2, "finetune --threads -1", ("--threads", "0")),
    "pool": (2, "finetune --reference-pool 0", ("--reference-pool", "1")),
    "metrics": (2, "finetune --metrics core,nonsense", ("core, mia, mubench", "'nonsense'")),
    "device": (2, "finetune --device nonsense", ("auto, cpu, cuda", "'nonsense'")),
    "precision": (2, "finetune --precision nonsense", ("fp32, bf16, fp16", "'nonsense'")),
    "tracker": (2, "finetune --log-with nonsense", ("tensorboard", "'nonsense'")),
    "original's accuracy": (2, "finetune --mubench-orig nonsense", ("measured, table", "'nonse")),
    "flag": (2, "finetune --nonsense", ("--nonsense", "unsc run -h")),
    "too many words": (2, "finetune now", ("now",)),
    # forget sets
    "empty share": (2, "finetune --forget random:0.00001", ("got none", "raise the share")),
    "empty number": (2, "finetune --forget random:0", ("random:0", "greater than or equal to 1")),
    "no classes": (2, "finetune --forget class:", ("class:3", "'class:'")),
    "everything by class": (2, "finetune --forget class:0,1,2,3,4,5,6,7,8,9",
                            ("rows to retain, got none", "forget fewer")),
    "everything by share": (2, "finetune --forget random:1.0", ("random:1.0", "less than 1")),
    "everything by number": (2, "finetune --forget random:1213", ("retain, got none", "fewer")),
    "more than everything": (2, "finetune --forget random:99999", ("at most", "99999")),
    "label too large": (2, "finetune --forget class:10", ("0..9", "got 10")),
    "negative label": (2, "finetune --forget class:-1", ("0..9", "got -1")),
    "label that is none": (2, "finetune --forget class:three", ("whole numbers", "class:three")),
    "sub-label column": (2, "finetune --forget subclass:colour=red", ("'colour'", "sub_labels")),
    "no file": (2, "finetune --forget file:nowhere.txt", ("nowhere.txt: no such file",)),
    "sequence": (2, "finetune --forget sequence:random:30", ("sequence:random:SIZExCOUNT",)),
    "scenario": (2, "logit_mask --forget random:0.1", ("scenario random", "supports: class")),
    "scenario in a sequence": (2, "logit_mask --forget sequence:random:10x2",
                               ("scenario random", "supports: class")),
    # data
    "no UNSC_DATA_DIR": (3, "finetune --data cifar10 --forget class:0",
                         ("UNSC_DATA_DIR is not set", "--data-dir")),
    "no data folder": (3, "finetune --data cifar10 --forget class:0 --data-dir /nowhere",
                       ("/nowhere/cifar10", "--data-dir")),
    "no parquet": (3, "finetune --data ./nowhere --forget class:0", ("nowhere", "Parquet")),
    "images for a text model": (2, "finetune --model tiny-text", ("text", "image", "digits")),
    # places
    "no weights": (2, "finetune --reference nowhere.pt", ("auto, none", "nowhere.pt")),
    "no spec": (2, "--spec nowhere.yaml", ("nowhere.yaml", "existing YAML file")),
    # names that lead elsewhere
    "method elsewhere": (2, "../finetune", ("'../finetune'",)),
    "preset elsewhere": (2, "finetune.../paper", ("'finetune.../paper'",)),
    "backbone elsewhere": (2, "finetune --model ../x", ("'../x'", "..")),
    "timm id elsewhere": (2, "finetune --model timm:../x", ("timm:../x", "..")),
    "hub model elsewhere": (2, "finetune --model hf:../x", ("hf:../x", "..")),
    "config elsewhere": (2, "finetune --model hf-config:../x", ("hf-config:../x", "..")),
    "data elsewhere": (3, "finetune --data ../x --forget class:0", ("../x", "Parquet")),
    "hub data elsewhere": (2, "finetune --data hub:../x --forget class:0", ("'../x'", "org/name")),
    "forget set elsewhere": (2, "finetune --forget ../x", ("'../x'", "class:3")),
    "index file elsewhere": (2, "finetune --forget file:../x", ("../x: no such file",)),
}  # fmt: skip


@pytest.mark.parametrize("case", RUN)
def test_run(case: str) -> None:
    code, words, says = RUN[case]
    refused(code, "run", *words.split(), says=says)


@pytest.mark.parametrize("json_flag", [["--json"], []], ids=["json", "text"])
def test_an_error_is_no_json(json_flag: list[str]) -> None:
    refused(2, "run", "finetun", *json_flag, says=("error: ",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_devices_that_are_not_there() -> None:
    refused(3, "run", "finetune", "--device", "cuda", says=("no CUDA device", "auto or cpu"))
    refused(2, "run", "finetune", "--precision", "fp16", says=("CUDA", "bf16 or fp32"))


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused(3, "run", "finetune", "--log-with", "tensorboard", says=("pip install",))


# --------------------------------------------------------------------------- list, show, check

OTHER: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "command": (2, "lst", ("'lst'", "list")),
    "list": (2, "list method", ("'method'", "'methods'", "forget-sets")),
    "show": (2, "show finetun", ("'finetun'", "'finetune'")),
    "show a metric": (2, "show js_forge", ("'js_forge'", "'js_forget'")),
    "show other code's name": (2, "show ga", ("'ga'", "'neggrad'")),
    "show elsewhere": (2, "show ../finetune", ("'../finetune'",)),
    "show no record": (2, "show nowhere.json", ("nowhere.json", "record")),
    "show nothing": (2, "show", ("NAME",)),
    "check": (2, "check finetun", ("'finetun'", "'finetune'")),
    "check a preset": (2, "check finetune.pape", ("'finetune.pape'", "'finetune.paper'")),
    "bench": (2, "bench nowhere", ("'nowhere'", "board.yaml")),
    "bench elsewhere": (2, "bench ../nowhere", ("'../nowhere'", "board")),
    "build": (2, "board build nowhere", ("'nowhere'", "board.yaml")),
    "verify": (2, "board verify nowhere", ("'nowhere'", "board.yaml")),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_other_commands(case: str) -> None:
    code, words, says = OTHER[case]
    refused(code, *words.split(), says=says)


# --------------------------------------------------------------------------- lists of indices

LISTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "word": ("list.txt", "1\n2\nx\n", ("list.txt: line 3", "'x'")),
    "fraction": ("list.txt", "1\n2.5\n", ("list.txt: line 2", "'2.5'")),
    "twice": ("list.txt", "5\n6\n5\n", ("list.txt: line 3", "line 1", "index 5")),
    "negative": ("list.txt", "1\n-2\n", ("list.txt: line 2", "≥ 0", "-2")),
    "too large": ("list.txt", "1\n99999\n", ("0..", "99999")),
    "empty": ("list.txt", "", ("list.txt", "empty")),
    "json word": ("list.json", '[1, "x"]', ("list.json: entry 2", "'x'")),
    "json broken": ("list.json", "[1, 2", ("list.json",)),
    "json twice": ("list.json", "[4, 4]", ("list.json: entry 2", "entry 1")),
    "other file": ("list.csv", "1\n", (".csv", ".txt")),
}


@pytest.mark.parametrize("case", LISTS)
def test_index_files(case: str, here: Path) -> None:
    name, text, says = LISTS[case]
    (here / name).write_text(text, encoding="utf-8")
    refused(2, "run", "finetune", "--forget", f"file:{name}", says=says)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.array([1.5]), "whole numbers"),
        (np.array([3, 3]), "3"),
        (np.array([{}], object), "list.npy"),
    ],
    ids=["fraction", "twice", "objects"],
)
def test_index_arrays(value: np.ndarray, says: str, here: Path) -> None:
    np.save(here / "list.npy", value, allow_pickle=True)
    refused(2, "run", "finetune", "--forget", "file:list.npy", says=("list.npy", says))


def test_indices_of_another_row_order(here: Path) -> None:
    (here / "list.txt").write_text("1\n2\n")
    spec = json.dumps({"kind": "index_file", "path": "list.txt", "row_order": "hub"})
    refused(2, "run", "finetune", "--forget", spec, says=("'hub'", "'sklearn'"))


# --------------------------------------------------------------------------- YAML files

EXPERIMENT = "method: finetune\ndata: digits\nmodel: tiny-digits\nforget: class:3\n"
YAMLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "object tag": (EXPERIMENT + "set: !!python/object/apply:os.system [touch hurt]\n",
                   (":5", "tag", "plain YAML")),
    "own tag": (EXPERIMENT + "set: !thing {}\n", (":5", "tag", "plain YAML")),
    "duplicate key": (EXPERIMENT + "data: wine\n", (":5", "duplicate key 'data'", "line 2")),
    "unknown key": (EXPERIMENT + "datas: wine\n", (":5", "datas", "'data'")),
    "missing key": (EXPERIMENT.replace("model: tiny-digits\n", ""), ("model", "required")),
    "wrong type": (EXPERIMENT + "seed: one\n", (":5", "seed", "integer", "'one'")),
    "no YAML": (EXPERIMENT + "set: {a: [1\n", ("expected ',' or",)),
    "no map": ("- method\n", ("file.yaml",)),
    "empty": ("", ("file.yaml",)),
    "nothing plain": (EXPERIMENT + "set: {a: 2020-01-01}\n", ("plain values", "date")),
    "nested": (EXPERIMENT + "recipe: {optimiser: sgd}\n", (":5", "recipe.optimiser", "optimizer")),
    "broken forget set": (EXPERIMENT.replace("class:3", "{kind: class}"), (":4", "classes")),
}  # fmt: skip


@pytest.mark.parametrize("case", YAMLS)
def test_experiment_files(case: str, here: Path) -> None:
    text, says = YAMLS[case]
    (here / "file.yaml").write_text(text, encoding="utf-8")
    refused(2, "run", "--spec", "file.yaml", says=("file.yaml", *says))


def test_a_file_that_is_no_text(here: Path) -> None:
    (here / "file.yaml").write_bytes(b"\xff\xfe\x00method")
    refused(2, "run", "--spec", "file.yaml", says=("file.yaml", "cannot be read"))


@pytest.mark.parametrize(
    "words",
    ["finetune", "--set lr=1", "--recipe epochs=2", "--seed 3", "--data wine --forget class:0",
     "--reference-pool 2"],
)  # fmt: skip
def test_flags_that_a_spec_would_silence(words: str, here: Path) -> None:
    (here / "file.yaml").write_text(EXPERIMENT)
    refused(2, "run", *words.split(), "--spec", "file.yaml", says=("--spec", "drop"))


def test_a_tag_in_a_setting_is_not_executed(here: Path) -> None:
    word = "lr=!!python/object/apply:os.system [touch hurt]"
    refused(2, "run", "finetune", "--set", word, says=("--set lr", "tag"))


# --------------------------------------------------------------------------- boards

ENTRIES = "entries: [retrain, original]"
BOARDS: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "unknown key": (("draws: 1", "drawz: 1"), ("drawz", "'draws'", ":11")),
    "unknown key on top": (("title:", "titel:"), ("titel", "'title'", ":3")),
    "wrong type": (("draws: 1", "draws: one"), ("draws", "integer", ":11")),
    "no draws": (("draws: 1", "draws: 0"), ("draws", "greater than or equal to 1")),
    "too few draws": (('["class:0"]', '["class:0", "class:1"]'), ("2 forget sets", "1 draws")),
    "no forget set": (('["class:0"]', "[]"), ("forget", "at least 1")),
    "entry twice": (("[retrain, original]", "[retrain, retrain]"), ("retrain", "twice", "name")),
    "scenario name": (("name: wine", "name: ../wine"), ("'../wine'",)),
    "board name": (("name: little", "name: ../little"), ("'../little'",)),
    "entry name": ((ENTRIES, "entries: [{method: retrain, name: ../x}]"), ("entries", "name")),
    "unknown method": (("original]", "origina]"), ("'origina'", "'original'", "board.yaml")),
    "unknown preset": (("original]", "finetune.pape]"), ("'finetune.paper'",)),
    "unknown setting": ((ENTRIES, "entries: [{method: noise, set: {sigma: 1}}]"), ("'sigma'",)),
    "unknown data": (("data: wine", "data: win"), ("'win'", "'wine'", "scenario 'wine'")),
    "unknown backbone": (("model: logistic", "model: logisti"), ("'logisti'", "'logistic'")),
    "unknown forget set": (('"class:0"', '"wine/class"'), ("'wine/class'", "'wine/class-0'")),
    "object tag": (("title: A", "title: !!python/name:os.system A"), ("tag", ":3")),
    "duplicate key": (("schema: 1", "schema: 1\nseed: 1\nseed: 2"), ("duplicate key 'seed'",)),
    "other schema": (("schema: 1", "schema: 2"), ("schema", "1")),
    "recipe": (("lr: 0.05", "lr: -1"), ("recipe.lr", "greater than 0")),
}


@pytest.mark.parametrize("case", BOARDS)
@pytest.mark.parametrize("command", ["bench", "bench --dry-run"])
def test_boards(case: str, command: str, here: Path) -> None:
    change, says = BOARDS[case]
    board(here, change)
    refused(2, *command.split(), "board.yaml", says=says)


BENCH: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "only": (2, "--only nothing", ("'nothing'", "little")),
    "seeds": (2, "--seeds 7", ("[0]", "[7]")),
    "words as seeds": (2, "--seeds zero", ("numbers with commas", "'zero'")),
    "limit": (2, "--limit 0", ("--limit", "1")),
    "workers": (2, "--workers 0", ("--workers", "1")),
    "device": (2, "--device nonsense", ("auto, cpu, cuda", "'nonsense'")),
    "precision": (2, "--precision nonsense", ("fp32, bf16, fp16", "'nonsense'")),
    "out": (2, "--out board.yaml", ("--out", "board.yaml")),
}


@pytest.mark.parametrize("case", BENCH)
def test_bench(case: str, here: Path) -> None:
    code, words, says = BENCH[case]
    board(here)
    refused(code, "bench", "board.yaml", *words.split(), says=says)


def test_ray_is_not_installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it fails
    board(here)
    refused(3, "bench", "board.yaml", "--ray", "--quiet", says=("ray", "pip install"))


def test_a_board_without_its_data(here: Path) -> None:
    board(here, ("data: wine", "data: adult"))
    refused(3, "bench", "board.yaml", "--quiet", says=("UNSC_DATA_DIR", "--data-dir"))


@pytest.mark.parametrize("command", ["board build", "board verify"])
def test_a_board_without_results(command: str, here: Path) -> None:
    board(here)
    if command == "board build":
        refused(2, *command.split(), "board.yaml", says=("records", "results"))
    else:
        assert unsc(*command.split(), "board.yaml").code == 1


# --------------------------------------------------------------------------- records


def a_record(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "entry": "original", "method": "original", "scenario": "wine", "kind": "class",
        "unit": record.Unit(train_seed=0, draw=0), "seed": 1, "status": "ok", "experiment": {},
        "config": {}, "package_version": "0", "command": "unsc", "metrics": {"acc_test": 0.5},
        "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return {**json.loads(record.dumps(record.Record(**fields))), **changes}


WHOLE = json.dumps(a_record())
RECORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "truncated": (WHOLE[: len(WHOLE) // 2], ("whole record",)),
    "empty": ("", ("whole record",)),
    "other JSON": ("[1, 2]", ("whole record",)),
    "unknown key": (json.dumps(a_record(colour="red")), ("colour",)),
    "wrong type": (json.dumps(a_record(seed="one")), ("seed",)),
    "NaN": (json.dumps(a_record(metrics={"acc_test": float("nan")})), ("NaN", "finite")),
    "key twice": (WHOLE[:-1] + ', "seed": 2}', ("'seed'", "twice")),
    "elsewhere": (json.dumps(a_record(entry="../x")), ("'../x'",)),
    "other schema": (json.dumps(a_record(schema=2)), ("schema",)),
}


@pytest.mark.parametrize("case", RECORDS)
@pytest.mark.parametrize("command", ["show", "bench", "board build", "board verify"])
def test_records(case: str, command: str, here: Path) -> None:
    text, says = RECORDS[case]
    path = here / "results" / "original--s0d0.json"
    board(here)
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    target = path if command == "show" else "board.yaml"
    refused(2, *command.split(), target, says=(path.name, "delete the file", *says))


@pytest.mark.parametrize("command", ["bench", "board build", "board verify"])
def test_a_unit_with_two_records(command: str, here: Path) -> None:
    board(here)
    (here / "results").mkdir()
    for name in ("original--s0d0.json", "copy.json"):
        (here / "results" / name).write_text(WHOLE)
    refused(2, *command.split(), "board.yaml", says=("duplicates", "copy.json", "keep one"))


@pytest.mark.parametrize("command", ["bench", "board verify"])
def test_records_of_another_version_of_the_board(command: str, here: Path) -> None:
    board(here)
    (here / "results").mkdir()
    (here / "results" / "original--s0d0.json").write_text(WHOLE)
    refused(2, *command.split(), "board.yaml", says=("original--s0d0", "never edited", "version"))


# --------------------------------------------------------------------------- weights


class Hurts:
    """An object whose loading would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("hurt"),)


def truncated_safetensors(path: Path) -> None:
    models.save_weights(nn.Linear(200, 200), path)
    path.write_bytes(path.read_bytes()[:1000])


def broken_header(path: Path) -> None:
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")


def other_model(path: Path) -> None:
    models.save_weights(nn.Linear(2, 3), path)


def truncated_torch(path: Path) -> None:
    torch.save(nn.Linear(200, 200).state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])


def whole_module(path: Path) -> None:
    torch.save(nn.Linear(2, 3), path)


def torch_with_code(path: Path) -> None:
    torch.save({"weight": Hurts()}, path)


def pickle_with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Hurts()))


def no_weights(path: Path) -> None:
    torch.save([1, 2, 3], path)


def empty(path: Path) -> None:
    path.touch()


WEIGHTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated.safetensors": (truncated_safetensors, ("whole safetensors", "copy it again")),
    "header.safetensors": (broken_header, ("whole safetensors", "copy it again")),
    "empty.safetensors": (empty, ("whole safetensors", "copy it again")),
    "other.safetensors": (other_model, ("missing", "unexpected")),
    "truncated.pt": (truncated_torch, ("torch file", "copy it again")),
    "empty.pt": (empty, ("copy it again",)),
    "module.pt": (whole_module, ("nothing was executed", "state_dict")),
    "code.pt": (torch_with_code, ("nothing was executed", "state_dict")),
    "code.pkl": (pickle_with_code, ("nothing was executed", "state_dict")),
    "list.pt": (no_weights, ("state dict", "list")),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, here: Path) -> None:
    write, says = WEIGHTS[name]
    write(here / name)
    refused(2, "run", "finetune", "--reference", name, says=(name, *says))
    assert not (here / "hurt").exists()
    net = nn.Linear(4, 4)
    before = models.state_sha256(net)
    with pytest.raises(CheckpointError, match=name):
        models.load_checkpoint(net, here / name)
    assert models.state_sha256(net) == before
    assert not (here / "hurt").exists()


# --------------------------------------------------------------------------- places


@pytest.mark.parametrize("name", ["folder", "file"])
def test_an_existing_place_is_kept(name: str, here: Path) -> None:
    (here / "folder").mkdir()
    (here / "folder" / "mine.txt").write_text("kept")
    (here / "file").write_text("kept")
    refused(2, "run", "finetune", "--out", name, says=(name, "never overwritten", "another --out"))
    refused(2, "run", "finetune", "--out", name, "--resume", says=(name, "another --out"))


@pytest.mark.parametrize("flag", ["--out", "--cache"])
def test_a_place_below_a_file(flag: str, here: Path) -> None:
    (here / "file").write_text("kept")
    refused(2, "run", "finetune", flag, "file/below", says=(flag, "folder", "file"))


def test_out_may_lead_elsewhere(here: Path) -> None:
    out = here.parent / "elsewhere"
    done = unsc("run", "original", "--data", "wine", "--forget", "class:0", "--model", "logistic",
                "--recipe", "epochs=1", "--out", "../elsewhere")  # fmt: skip
    assert done.code == 0, done.err
    assert (out / "record.json").is_file()
    assert tree(here) == set()


def test_a_run_folder_with_a_broken_record(here: Path) -> None:
    (here / "folder").mkdir()
    (here / "folder" / "record.json").write_text(WHOLE[:100])
    says = ("record.json", "whole record")
    refused(2, "run", "finetune", "--out", "folder", "--resume", says=says)


# --------------------------------------------------------------------------- tables of the user


def table(folder: Path, **columns: Any) -> Path:
    folder.mkdir()
    rows = {"x": [0.1, 0.2, 0.3, 0.4] * 10, "label": [0, 1] * 20, **columns}
    rows = {name: column for name, column in rows.items() if column is not None}
    parquet.write_table(pa.table(rows), folder / "train.parquet")
    return folder


NAN = float("nan")
TABLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "NaN": ({"x": [0.1, NAN] * 20}, ("x",)),
    "infinite": ({"x": [0.1, float("inf")] * 20}, ("x",)),
    "missing value": ({"x": [0.1, None] * 20}, ("x",)),
    "missing label": ({"label": [0, None] * 20}, ("label",)),
    "fraction as label": ({"label": [0.5, 1.5] * 20}, ("label",)),
    "one class": ({"label": [0] * 40}, ("class",)),
    "no label": ({"label": None}, ("label",)),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(case: str, here: Path) -> None:
    columns, says = TABLES[case]
    table(here / "mine", **columns)
    refused(
        2, "run", "finetune", "--data", "./mine", "--forget", "random:0.1", "--model", "logistic",
        "--quiet", says=says,
    )  # fmt: skip


def test_a_file_that_is_no_parquet(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "train.parquet").write_bytes(b"PAR1 and then nothing")
    says = ("train.parquet", "cannot be read")
    refused(2, "run", "finetune", "--data", "./mine", "--forget", "random:0.1", says=says)


# --------------------------------------------------------------------------- plugins

METHOD = """\
from unsc_plugin.method import Scenario, Split, UnlearningMethod

class Mine(UnlearningMethod):
    "Mine."
    name = "mine"
    needs = frozenset({Split.RETAIN})
    scenarios = frozenset({Scenario.CLASS})

    def run(self, model, task):
        return model

class NoMethod:
    pass
"""
FUNCTION = """\
from unsc_plugin import register_method

@register_method("mine", summary="mine")
def mine(model, forget):
    return model
"""
ENTRY = """\
schema: 1
package: bad-plugin
methods:
  mine:
    target: bad_plugin_methods:Mine
    summary: mine
    needs: [retain]
    scenarios: [class]
"""
PLUGINS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "syntax": ("p.py", "def f(:\n", ("p.py", "SyntaxError", "line 1", "fix the file")),
    "import": ("p.py", "import not_there\n", ("p.py", "not_there", "fix the file")),
    "error": ("p.py", "1 / 0\n", ("p.py", "ZeroDivisionError")),
    "nothing": ("p.py", "x = 1\n", ("p.py", "registers nothing", "@register_method")),
    "name": ("p.py", FUNCTION.replace('"mine"', '"../mine"'), ("'../mine'", "a-z")),
    "known name": ("p.py", FUNCTION.replace('"mine"', '"finetune"'),
                   ("'finetune'", "built-in", "p.py", "rename")),
    "one name twice": ("p.py", FUNCTION + FUNCTION.replace("from", "#"), ("'mine'", "twice")),
    "no loaders": ("p.py", FUNCTION.replace("model, forget", "model, rows"), ("rows",)),
    "unknown scenario": ("p.py", FUNCTION.replace("summary=", "scenarios=['klass'], summary="),
                         ("klass",)),
    "needs disagree": ("p.yaml", ENTRY.replace("[retain]", "[forget]"),
                       ("'mine'", "needs: forget in the entry, retain in the class")),
    "scenarios disagree": ("p.yaml", ENTRY.replace("[class]", "[class, random]"),
                           ("scenarios: class, random in the entry, class in the class",)),
    "name disagrees": ("p.yaml", ENTRY.replace("  mine:", "  yours:"),
                       ("name: yours in the entry, mine in the class",)),
    "no method": ("p.yaml", ENTRY.replace(":Mine", ":NoMethod"), ("NoMethod", "no subclass")),
    "no class": ("p.yaml", ENTRY.replace(":Mine", ":Nobody"), ("Nobody",)),
    "no module": ("p.yaml", ENTRY.replace("bad_plugin_methods", "not_there"), ("not_there",)),
    "no target": ("p.yaml", ENTRY.replace("bad_plugin_methods:Mine", "anything"), ("target",)),
    "unknown field": ("p.yaml", ENTRY.replace("summary:", "sumary:"), ("sumary", "'summary'")),
    "unknown section": ("p.yaml", ENTRY + "method: {}\n", ("method", "'methods'", ":9")),
    "wrong type": ("p.yaml", ENTRY.replace("[retain]", "retain"), ("needs", "'retain'", ":7")),
    "duplicate key": ("p.yaml", ENTRY + "schema: 1\n", ("duplicate key 'schema'", ":9")),
    "object tag": ("p.yaml", ENTRY + "requires: !!python/name:os.system\n", ("tag", ":9")),
    "name elsewhere": ("p.yaml", ENTRY.replace("  mine:", "  ../mine:"), ("../mine", ":4")),
    "known backbone": ("p.yaml", "schema: 1\nbackbones: {mlp: {source: torch, id: mlp}}\n",
                       ("'mlp'", "built-in", "p.yaml")),
}  # fmt: skip


@pytest.mark.parametrize("case", PLUGINS)
def test_plugins(case: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, text, says = PLUGINS[case]
    (here / name).write_text(text, encoding="utf-8")
    (here.parent / "bad_plugin_methods.py").write_text(METHOD, encoding="utf-8")
    monkeypatch.syspath_prepend(here.parent)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    method = "yours" if "yours" in text else "mine"
    refused(2, "run", method, "--forget", "class:0", "--plugin", name, says=says)


def test_two_plugins_with_one_name(here: Path) -> None:
    for name in ("one.py", "two.py"):
        (here / name).write_text(FUNCTION)
    words = ("--plugin", "one.py", "--plugin", "two.py")
    refused(2, "list", *words, says=("'mine'", "one.py", "two.py", "rename"))


@pytest.mark.parametrize(
    ("plugin", "says"),
    [
        ("nowhere.py", ("existing file", "nowhere.py")),
        ("nowhere.yaml", ("nowhere.yaml", "existing YAML file")),
        ("word", (".yaml", ".py", "pkg.mod:Class", "'word'")),
        ("not_there.mod:Class", ("not_there",)),
        ("json:JSONDecoder", ("UnlearningMethod",)),
        ("../nowhere.py", ("existing file", "../nowhere.py")),
    ],
)
def test_plugins_that_are_none(plugin: str, says: tuple[str, ...]) -> None:
    refused(2, "list", "--plugin", plugin, says=says)


def test_a_method_whose_requirement_is_not_installed(here: Path) -> None:
    text = ENTRY.replace("summary: mine", "summary: mine\n    requires: [not-a-package>=3]")
    (here / "p.yaml").write_text(text)
    says = ("'mine'", "not-a-package>=3 is not installed")
    refused(3, "run", "mine", "--forget", "class:0", "--plugin", "p.yaml", says=says)
    listed = json.loads(unsc("list", "--all", "--json", "--plugin", "p.yaml").out)
    assert [row["reason"] for row in listed if row["name"] == "mine"] == [
        "not-a-package>=3 is not installed"
    ]
