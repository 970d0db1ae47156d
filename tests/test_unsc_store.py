"""Stored Gram matrices of `unsc`: what a later request reads, finds, subtracts, and leaves behind.

Retained rows of a later request are locked: whoever reads them fails.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unsc_plugin import engine, hooks
from unsc_plugin.conformance._toys import complement, original, problem
from unsc_plugin.errors import CacheMismatch, GramMismatch, RequestError
from unsc_plugin.method import Result, UnlearningTask
from unsc_plugin.methods import _gram_store as store
from unsc_plugin.methods._null_space import Subspaces
from unsc_plugin.registry import create
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import state_sha256
from unsc_plugin.spec import Recipe, Scenario, Split

torch.set_num_threads(1)

SEED = 6
CLASSES = 4
RECIPE = Recipe(epochs=1, lr=0.1, batch_size=16)
BASE = {"eps": 0.9, "epochs": 4, "min_steps": 0, "stop_at": None}
Retained = Literal["given", "locked", "none"]


def locked(rows: Rows) -> Rows:
    """Return the same rows, whose contents cannot be read."""

    def decode(_: Tensor) -> dict[str, Tensor]:
        raise AssertionError("these rows were read")

    return replace(rows, decode=decode)


def net() -> nn.Module:
    return original("mlp", CLASSES)


def train() -> Rows:
    return problem("mlp", CLASSES).train


def of_class(*labels: int) -> list[int]:
    return torch.nonzero(torch.isin(train().labels, torch.tensor(labels)))[:, 0].tolist()


SOME = [0, 5, 9, 10, 23, 40, 41, 77]
"""Instances of all four classes."""


def ask(
    folder: Path | None,
    forget: Sequence[int],
    retained: Retained = "given",
    *,
    without: Sequence[int] = (),
    rows: Rows | None = None,
    **more: Any,
) -> UnlearningTask:
    """Return the request to forget the rows `forget`; those in `without` are not there at all."""
    rows = train() if rows is None else rows
    forget = [row for row in forget if row not in without]
    gone = torch.tensor(sorted({*forget, *without}))
    keep = rows.subset([] if retained == "none" else complement(gone, len(rows)))
    common: dict[str, Any] = {
        "retain": locked(keep) if retained == "locked" else keep,
        "val": problem("mlp", CLASSES).val,
        "num_classes": CLASSES,
        "recipe": RECIPE,
        "fresh_model": problem("mlp", CLASSES).build,
        "scenario": Scenario.RANDOM,
        "modality": "tabular",
        "cache": folder,
        "data_fingerprint": "toy",
    }
    return UnlearningTask(forget=rows.subset(list(forget)), **common | more)


def unlearn(task: UnlearningTask, model: nn.Module | None = None, **settings: Any) -> Result:
    result = create("unsc", **BASE | settings).unlearn(model or net(), task, SEED)
    json.dumps(dict(result.stats), allow_nan=False)
    return result


def prepared(task: UnlearningTask, model: nn.Module | None = None, **settings: Any) -> Subspaces:
    return create("unsc", **BASE | settings).prepared(model or net(), task, SEED).state


def source(result: Result) -> str:
    return result.stats["subspaces"]["source"]


def folders(folder: Path, name: str = store.MANIFEST) -> list[Path]:
    """Return the folders of all entries, or of all lineage records."""
    return sorted(path.parent for path in folder.glob(f"grams/*/*/{name}"))


def gram_of(
    rows: Rows, model: nn.Module | None = None, double: bool = False
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Return parameter -> (G, m, n) of the layers' inputs on `rows`, in one pass."""
    model = copy.deepcopy(model or net())
    inputs = rows.gather(list(range(len(rows)))).inputs
    if double:
        model, inputs = model.double(), {key: value.double() for key, value in inputs.items()}
    grams = hooks.collect_grams(model, [inputs], hooks.views(model)[0])
    return {name: (gram.matrix, gram.total, gram.count) for name, gram in grams.items()}


def close(one: Tensor, other: Tensor) -> float:
    """Return ‖one − other‖ / ‖other‖."""
    return float((one - other).norm() / other.norm().clamp(min=1e-300))


# --------------------------------------------------------------------------- hits


@pytest.mark.parametrize("retained", ["locked", "none"])
@pytest.mark.parametrize(
    ("forget", "settings"),
    [
        (of_class(1), {}),
        (of_class(1, 2), {}),
        (SOME, {}),
        ([*of_class(3), 0, 1, 4], {}),
        (SOME, {"bias": "augment"}),
        (of_class(1), {"merge": "pooled"}),
        (SOME, {"merge": "gpm"}),
        (of_class(1), {"cache_gib": 5e-6}),
    ],
    ids=["class", "classes", "instances", "mixed", "augment", "pooled", "gpm", "buckets"],
)
def test_a_second_request_reads_no_retained_data_and_equals_a_cold_one(
    forget: list[int], settings: dict[str, Any], retained: Retained, tmp_path: Path
) -> None:
    first = unlearn(ask(tmp_path / "warm", of_class(0)), **settings)
    assert source(first) == "captured"
    cold = unlearn(ask(tmp_path / "cold", forget), **settings)
    assert (source(cold), cold.read[Split.RETAIN]) == ("captured", 96 - len(forget))
    warm = unlearn(ask(tmp_path / "warm", forget, retained), **settings)
    assert source(warm) == "stored"
    assert not warm.read.get(Split.RETAIN)
    assert state_sha256(warm.model) == state_sha256(cold.model) != state_sha256(net())
    assert warm.stats["certificate"] == cold.stats["certificate"]
    assert warm.stats["targets"] == cold.stats["targets"]
    noted = warm.stats["subspaces"]
    assert noted["seconds_capture_cold"] == first.stats["subspaces"]["seconds_capture_cold"]
    assert noted["layers"] == cold.stats["subspaces"]["layers"]


def test_a_whole_class_is_forgotten_without_any_capture(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    warm = unlearn(ask(tmp_path, of_class(1), "locked"))
    assert warm.stats["subspaces"]["samples_read"] == {}


def test_instances_are_captured_once(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    warm = unlearn(ask(tmp_path, SOME, "locked"))
    assert warm.stats["subspaces"]["samples_read"] == {"forget": len(SOME)}


@pytest.mark.parametrize(
    "settings",
    [
        {"eps": 0.7},
        {"merge": "gpm"},
        {"optimizer": "adam"},
        {"bias": "augment"},
        {"label": "random"},
        {"update": "reparam"},
        {"instance_label": "runner_up"},
    ],
    ids=str,
)
def test_what_the_matrices_do_not_depend_on_is_no_reason_to_capture(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    assert source(unlearn(ask(tmp_path, SOME, "locked"), **settings)) == "stored"
    assert len(folders(tmp_path)) == 1


def test_another_seed_is_no_reason_to_capture(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    method = create("unsc", **BASE)
    assert source(method.unlearn(net(), ask(tmp_path, SOME, "locked"), SEED + 1)) == "stored"


# --------------------------------------------------------------------------- misses


def test_another_weight_bit_misses(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    model = net()
    with torch.no_grad():
        weight = model.stem.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert source(unlearn(ask(tmp_path, of_class(0)), model)) == "captured"
    with pytest.raises(RequestError, match="retained data or stored"):
        unlearn(ask(tmp_path / "other", of_class(0), "none"), model)


def test_one_sample_less_misses(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    assert source(unlearn(ask(tmp_path, of_class(0), without=[1]))) == "captured"
    assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"view": "augmented"},
        {"capture_samples": 5},
        {"capture_dtype": "float64"},
        {"cache_gib": 5e-6},
        {"merge": "pooled"},
        {"include": ("head",)},
        {"patches": "interior"},
    ],
    ids=str,
)
def test_what_the_matrices_depend_on_misses(settings: dict[str, Any], tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    assert source(unlearn(ask(tmp_path, of_class(0)), **settings)) == "captured"


def test_other_data_miss(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    task = ask(tmp_path, of_class(0), data_fingerprint="another")
    assert source(unlearn(task)) == "captured"


class Strided(nn.Module):
    """Two convolutions whose stride, and a buffer that no state holds, are not in the weights."""

    def __init__(self, stride: int = 1, shift: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
        self.register_buffer("shift", torch.tensor(shift), persistent=False)
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.stem(pixel_values - self.shift).relu().mean((2, 3)))


@pytest.mark.parametrize("other", [{"stride": 2}, {"shift": 0.5}], ids=str)
def test_the_same_weights_in_another_network_miss(other: dict[str, Any], tmp_path: Path) -> None:
    """Strides and the statistics that normalise pixels are part of what the matrices are of."""
    rows = problem("conv").train
    model, twin = Strided(), Strided(**other)
    twin.load_state_dict(model.state_dict())
    gone = rows.labels == 0
    task = UnlearningTask(
        forget=rows.subset(gone), retain=rows.subset(~gone), num_classes=3, recipe=RECIPE,
        fresh_model=lambda _: Strided(), scenario=Scenario.CLASS, cache=tmp_path,
        data_fingerprint="toy",
    )  # fmt: skip
    alone = replace_cache(task, None)
    assert unlearn(task, model).status == "ok"
    found = unlearn(task, twin)
    assert found.stats["subspaces"]["layers"] == unlearn(alone, twin).stats["subspaces"]["layers"]
    assert source(found) == "captured"


def replace_cache(task: UnlearningTask, folder: Path | None) -> UnlearningTask:
    task = copy.copy(task)
    task.cache = folder
    return task


def test_another_augmentation_misses(tmp_path: Path) -> None:
    rows, model = problem("conv").train, original("conv")
    gone = rows.labels == 0
    found = []
    for augment in ("none", "crop_flip"):
        task = UnlearningTask(
            forget=rows.subset(gone), retain=rows.subset(~gone), num_classes=3,
            recipe=RECIPE.model_copy(update={"augment": augment}), scenario=Scenario.CLASS,
            fresh_model=problem("conv").build, cache=tmp_path, data_fingerprint="toy",
        )  # fmt: skip
        found.append(source(unlearn(task, model, view="augmented")))
    assert found == ["captured", "captured"]


@pytest.mark.parametrize("more", [{"cache": None}, {"data_fingerprint": ""}], ids=str)
def test_without_a_folder_or_a_fingerprint_nothing_is_kept(
    more: dict[str, Any], tmp_path: Path
) -> None:
    assert source(unlearn(ask(tmp_path, of_class(0), **more))) == "captured"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_cache_that_is_switched_off_is_neither_read_nor_written(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)), cache=False)
    assert not list(tmp_path.rglob("*"))
    unlearn(ask(tmp_path, of_class(0)))
    assert source(unlearn(ask(tmp_path, of_class(0)), cache=False)) == "captured"


def test_a_run_that_fails_leaves_no_lineage(tmp_path: Path) -> None:
    result = unlearn(ask(tmp_path, of_class(0)), drift_budget=1e-9)
    assert result.status == "diverged"
    assert len(folders(tmp_path)) == 1
    assert not folders(tmp_path, store.LINEAGE)


# --------------------------------------------------------------------------- files


def test_an_entry_tells_what_it_is_and_the_sums_of_its_files(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    (folder,) = folders(tmp_path)
    told = json.loads((folder / store.MANIFEST).read_text())
    files = {path.name for path in folder.iterdir()} - {store.MANIFEST}
    assert told["sha256"].keys() == files
    assert {store.ANCHOR, store.SAMPLES, *told["layers"].values()} == files
    assert told["samples_per_class"] == [24] * 4
    assert told["key"]["data"] == "toy"
    assert told["key"]["model"] == state_sha256(net())
    held = load_file(folder / told["layers"]["head.weight"])
    assert held["gram"].shape == (4, 1, 16 * 17 // 2)
    assert held["gram"].dtype == held["sum"].dtype == torch.float64
    assert held["sum"].shape == (4, 1, 16)
    assert held["count"].tolist() == [24] * 4
    assert held["count"].dtype == torch.int64
    anchor = load_file(folder / store.ANCHOR)
    assert all(torch.equal(anchor[name], tensor) for name, tensor in net().state_dict().items())


NAMES = ["layer000.safetensors", "layer002.safetensors", store.SAMPLES, store.MANIFEST]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_an_error_that_names_it(name: str, damage: str, tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    (folder,) = folders(tmp_path)
    path = folder / name
    bits = bytearray(path.read_bytes())
    if damage == "flip":
        bits[len(bits) // 2] ^= 0x80
    path.write_bytes({"flip": bits, "cut": bits[: len(bits) // 2], "empty": b""}[damage])
    with pytest.raises(CacheMismatch, match=name) as caught:
        unlearn(ask(tmp_path, of_class(0)))
    assert "delete" in str(caught.value)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_missing_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    (folder,) = folders(tmp_path)
    (folder / name).unlink()
    with pytest.raises(CacheMismatch, match=name):
        unlearn(ask(tmp_path, of_class(0)))


@pytest.mark.parametrize("name", ["taken.safetensors", store.LINEAGE])
def test_a_damaged_lineage_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    first = unlearn(ask(tmp_path, SOME))
    (folder,) = folders(tmp_path, store.LINEAGE)
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    with pytest.raises(CacheMismatch, match=name):
        unlearn(ask(tmp_path, of_class(1), without=SOME), first.model)


def test_a_damaged_anchor_is_an_error_where_it_is_needed(tmp_path: Path) -> None:
    first = unlearn(ask(tmp_path, of_class(0)))
    (folder,) = folders(tmp_path)
    path = folder / store.ANCHOR
    path.write_bytes(path.read_bytes()[:-9])
    assert source(unlearn(ask(tmp_path, of_class(1), "locked"))) == "stored"
    with pytest.raises(CacheMismatch, match=store.ANCHOR):
        unlearn(ask(tmp_path, of_class(1)[:5], "locked", without=of_class(0)), first.model)


def test_an_interrupted_write_leaves_no_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], store.save_file

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left on device")
        write(tensors, path)

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        unlearn(ask(tmp_path, of_class(0)))
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.undo()
    assert source(unlearn(ask(tmp_path, of_class(0)))) == "captured"
    assert source(unlearn(ask(tmp_path, of_class(0)))) == "stored"


def test_what_a_killed_process_left_is_no_entry(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    (folder,) = folders(tmp_path)
    folder.rename(folder.with_name(".new-abc"))
    with pytest.raises(RequestError, match="retained data or stored"):
        unlearn(ask(tmp_path, of_class(0), "none"))
    assert source(unlearn(ask(tmp_path, of_class(0)))) == "captured"


def test_another_format_is_ignored_and_captured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    assert source(unlearn(ask(tmp_path, of_class(0)))) == "captured"


def test_an_entry_that_is_there_wins(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    (folder,) = folders(tmp_path)
    before = (folder / store.MANIFEST).stat().st_mtime_ns
    found = prepared(ask(tmp_path, of_class(0)))
    assert found.store.write(found.known.entry, net().state_dict()).folder == folder
    assert (folder / store.MANIFEST).stat().st_mtime_ns == before
    assert not list(tmp_path.rglob(".new-*"))


def test_of_two_sets_that_fit_none_is_guessed(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)))
    unlearn(ask(tmp_path, of_class(0), without=[1]))
    with pytest.raises(RequestError, match="2 sets of samples"):
        unlearn(ask(tmp_path, of_class(2), "none"))
    assert source(unlearn(ask(tmp_path, of_class(2), "locked"))) == "stored"


def test_forget_samples_that_no_set_holds_find_nothing(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0), without=[1]))
    with pytest.raises(RequestError, match="retained data or stored"):
        unlearn(ask(tmp_path, [1, 2], "none"))


# --------------------------------------------------------------------------- downdating


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float32", 1e-6)])
@pytest.mark.parametrize("warm", [False, True])
def test_taking_samples_out_leaves_the_matrices_of_the_rest(
    dtype: str, tolerance: float, warm: bool, tmp_path: Path
) -> None:
    settings = {"capture_dtype": dtype}
    if warm:
        unlearn(ask(tmp_path, of_class(0)), **settings)
    found = prepared(ask(tmp_path, SOME, "locked" if warm else "given"), **settings)
    rows = train().subset(complement(torch.tensor(SOME), 96))
    for label in range(CLASSES):
        wanted = gram_of(rows.subset(rows.labels == label), double=dtype == "float64")
        for name, (matrix, total, count) in wanted.items():
            left = found.gram(name, label)
            assert close(left.matrix, matrix) <= tolerance
            assert close(left.total, total) <= tolerance
            assert left.count == count


@pytest.mark.parametrize("samples", [10, (10, 3, 6), (2, 9, 3)], ids=str)
@pytest.mark.parametrize("warm", [False, True])
def test_only_samples_that_were_captured_are_taken_out(
    samples: Any, warm: bool, tmp_path: Path
) -> None:
    """Of every layer its own first rows of a class; a class that loses all of one is another test.

    Without that, a row is taken out of a layer that never saw it.
    """
    settings = {"capture_samples": samples, "eps": 0.8}
    drawn = prepared(ask(tmp_path, of_class(0)), **settings).known.entry.drawn
    found = prepared(ask(tmp_path if warm else None, SOME), **settings)
    limits = samples if isinstance(samples, tuple) else (samples,) * 3
    rows, gone, compared = train(), torch.tensor(SOME), 0
    for label in range(CLASSES):
        mine = torch.nonzero((rows.labels == label) & torch.isin(rows.index, drawn))[:, 0]
        kept = [mine[:limit][~torch.isin(mine[:limit], gone)] for limit in limits]
        if not all(map(len, kept)):
            continue
        for name, positions in zip(("stem", "body", "head"), kept, strict=True):
            matrix, _, count = gram_of(rows.subset(positions))[f"{name}.weight"]
            left = found.gram(f"{name}.weight", label)
            assert left.count == count
            assert close(left.matrix, matrix) <= 1e-6
            compared += 1
    assert compared >= 3


def test_matrices_of_other_data_are_found_out(tmp_path: Path) -> None:
    """The fingerprint lies: the rows that are to be taken out were never in."""
    unlearn(ask(tmp_path, of_class(0)))
    rows = train()
    other = Rows.of({"features": 30 * rows.storage["features"]}, rows.labels, rows.index)
    with pytest.raises(GramMismatch, match=str(folders(tmp_path)[0])):
        unlearn(ask(tmp_path, SOME, rows=other))


def faint(scale: float) -> Rows:
    """Return the training rows with those of class 2 but the first scaled down."""
    rows = train()
    features = rows.storage["features"].clone()
    features[of_class(2)[1:]] *= scale
    return Rows.of({"features": features}, rows.labels, rows.index)


class Bare(nn.Module):
    """Layers without biases, so that faint rows stay faint."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 16, bias=False)
        self.head = nn.Linear(16, CLASSES, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(features)))


@pytest.mark.parametrize("warm", [False, True])
def test_a_class_of_which_almost_nothing_is_left_is_captured_again(
    warm: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, rows = Bare(), faint(1e-5)
    loud = of_class(2)[:1]
    if warm:
        unlearn(ask(tmp_path, of_class(0), rows=rows), model)
    task = ask(tmp_path, loud, rows=rows)
    found = create("unsc", **BASE).prepared(model, task, SEED)
    rest = rows.subset(of_class(2)[1:])
    for name, (matrix, _, count) in gram_of(rest, model).items():
        left = found.state.gram(name, 2)
        assert close(left.matrix, matrix) <= 1e-5
        assert left.count == count
    assert found.read[Split.RETAIN] > 0
    with pytest.raises(RequestError, match="give the retained data"):
        create("unsc", **BASE).prepared(model, ask(tmp_path, loud, "none", rows=rows), SEED)


# --------------------------------------------------------------------------- sequences


def step_of(old: nn.Module, new: nn.Module, rows: Rows, name: str = "stem") -> float:
    """Return ‖ΔW X‖/‖W X‖ of the first layer on `rows`."""
    inputs = rows.gather(list(range(len(rows)))).inputs["features"].double()
    before = getattr(old, name).weight.detach().double()
    after = getattr(new, name).weight.detach().double()
    return float((inputs @ (after - before).T).norm() / (inputs @ before.T).norm())


@pytest.mark.parametrize("retained", ["locked", "none"])
def test_requests_in_turn_live_on_the_first_capture(retained: Retained, tmp_path: Path) -> None:
    """A class, instances, a class: never a retained row; drift counts from the first model."""
    steps = [of_class(0), [1, 2, 5, 6, 7, 13], of_class(3)]
    model, gone, bounds = net(), [], [0.0] * CLASSES
    for at, forget in enumerate(steps):
        task = ask(tmp_path, forget, retained if at else "given", without=gone)
        result = unlearn(task, model)
        assert source(result) == ("lineage" if at else "captured")
        assert bool(result.read.get(Split.RETAIN)) == (at == 0)
        gone = sorted({*gone, *forget})
        told = result.stats["certificate"]
        rows = train().subset(complement(torch.tensor(gone), 96))
        assert sorted(told["buckets"]) == sorted(set(rows.labels.tolist()))
        for place, label in enumerate(told["buckets"]):
            mine = rows.subset(rows.labels == label)
            assert told["delta"]["stem.weight"][place] == pytest.approx(
                step_of(net(), result.model, mine), rel=1e-4
            )
            assert told["bound"]["stem.weight"][place] > bounds[label]
            bounds[label] = told["bound"]["stem.weight"][place]
        targets = result.stats["targets"]["hard"].keys()
        assert not targets & {str(label) for label in range(CLASSES) if label not in rows.labels}
        model = result.model
    assert len(folders(tmp_path)) == 1


def test_a_sequence_equals_itself_with_and_without_retained_rows(tmp_path: Path) -> None:
    first = unlearn(ask(tmp_path, of_class(0))).model
    found = [
        unlearn(ask(tmp_path, SOME, retained, without=of_class(0)), first)
        for retained in ("given", "locked", "none")
    ]
    assert {source(result) for result in found} == {"lineage"}
    assert len({state_sha256(result.model) for result in found}) == 1


def test_samples_that_went_in_turn_are_all_taken_out(tmp_path: Path) -> None:
    gone, model = [], net()
    for at, some in enumerate(([1, 2, 5, 6], [9, 10, 13, 17], [21, 30])):
        task = ask(tmp_path, some, "locked" if at else "given", without=gone)
        found = prepared(task, model)
        model = unlearn(task, model).model
        gone = [*gone, *some]
    rows = train().subset(complement(torch.tensor(gone), 96))
    for label in range(CLASSES):
        for name, (matrix, _, count) in gram_of(rows.subset(rows.labels == label)).items():
            assert close(found.gram(name, label).matrix, matrix) <= 1e-6
            assert found.gram(name, label).count == count


def test_an_entry_that_was_deleted_ends_the_lineage(tmp_path: Path) -> None:
    first = unlearn(ask(tmp_path, of_class(0))).model
    (folder,) = folders(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="retained data or stored"):
        unlearn(ask(tmp_path, of_class(1), "none", without=of_class(0)), first)
    again = unlearn(ask(tmp_path, of_class(1), without=of_class(0)), first)
    assert source(again) == "captured"


def too_far(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model that went too far from its anchor for `settings`."""
    first = unlearn(ask(folder, of_class(0))).model
    return first, {"max_lineage_drift": 1e-6}


def test_a_model_too_far_from_its_anchor_is_captured_again_with_a_warning(tmp_path: Path) -> None:
    first, settings = too_far(tmp_path)
    result = unlearn(ask(tmp_path, of_class(1), without=of_class(0)), first, **settings)
    assert source(result) == "captured"
    assert any("max_lineage_drift" in warning for warning in result.stats["warnings"])
    alone = unlearn(ask(None, of_class(1), without=of_class(0)), first)
    assert state_sha256(alone.model) == state_sha256(result.model)


def test_what_was_captured_again_is_kept(tmp_path: Path) -> None:
    """The second time it is found, and the next request of the sequence lives on it."""
    first, settings = too_far(tmp_path)
    task = ask(tmp_path, of_class(1), without=of_class(0))
    second = unlearn(task, first, **settings)
    assert source(unlearn(task, first, **settings)) == "stored"
    third = unlearn(ask(tmp_path, of_class(2), "locked", without=of_class(0, 1)), second.model)
    assert source(third) == "lineage"


def test_what_was_captured_again_can_be_purged(tmp_path: Path) -> None:
    first, settings = too_far(tmp_path)
    task = ask(tmp_path, of_class(1), without=of_class(0))
    assert unlearn(task, first, purge=True, **settings).status == "ok"


# --------------------------------------------------------------------------- purging


def kept_indices(folder: Path) -> set[int]:
    """Return all sample indices that any file of the cache holds."""
    found: set[int] = set()
    for path in folder.rglob("*.safetensors"):
        held = load_file(path)
        for key in ("index", "drawn", "gone"):
            found |= set(held.get(key, torch.empty(0)).long().tolist())
    return found


def energy_of(folder: Path, label: int) -> list[float]:
    """Return the largest entry of a class in every file of Gram matrices."""
    return [
        float(tensor[label].abs().max())
        for path in folder.rglob("*.safetensors")
        for key, tensor in load_file(path).items()
        if key.endswith("gram")
    ]


@pytest.mark.parametrize("settings", [{}, {"capture_samples": 9}], ids=str)
def test_after_purging_a_class_no_file_knows_it(settings: dict[str, Any], tmp_path: Path) -> None:
    result = unlearn(ask(tmp_path, of_class(0)), purge=True, **settings)
    assert not kept_indices(tmp_path) & set(of_class(0))
    assert max(energy_of(tmp_path, 0)) == 0
    assert min(energy_of(tmp_path, 1)) > 0
    (folder,) = folders(tmp_path)
    told = json.loads((folder / store.MANIFEST).read_text())
    assert told["samples_per_class"] == [0, 24, 24, 24]
    plain = unlearn(ask(tmp_path / "plain", of_class(0)), **settings)
    assert state_sha256(plain.model) == state_sha256(result.model)
    found = [
        unlearn(ask(at, of_class(1), "locked", without=of_class(0)), result.model, **settings)
        for at in (tmp_path, tmp_path / "plain")
    ]
    assert [source(result) for result in found] == ["lineage", "lineage"]
    assert state_sha256(found[0].model) == state_sha256(found[1].model)


def test_after_purging_instances_the_matrices_are_those_of_the_rest(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, SOME), purge=True)
    assert not kept_indices(tmp_path) & set(SOME)
    rows = train().subset(complement(torch.tensor(SOME), 96))
    (folder,) = folders(tmp_path)
    for at, name in enumerate(("stem.weight", "body.weight", "head.weight")):
        held = load_file(folder / f"layer{at:03d}.safetensors")
        for label in range(CLASSES):
            matrix, total, count = gram_of(rows.subset(rows.labels == label))[name]
            left = store.Moments(held["gram"], held["sum"], held["count"]).at(label)
            assert close(left.matrix, matrix) <= 1e-6
            assert close(left.total, total) <= 1e-6
            assert left.count == count


def test_purging_in_a_sequence_purges_what_went_before(tmp_path: Path) -> None:
    first = unlearn(ask(tmp_path, SOME)).model
    second = unlearn(ask(tmp_path, of_class(1), "locked", without=SOME), first, purge=True)
    assert source(second) == "lineage"
    assert not kept_indices(tmp_path) & {*SOME, *of_class(1)}


def test_purging_after_the_same_request_without_it_purges_and_keeps_the_lineage(
    tmp_path: Path,
) -> None:
    unlearn(ask(tmp_path, SOME))
    result = unlearn(ask(tmp_path, SOME), purge=True)
    assert not kept_indices(tmp_path) & set(SOME)
    third = unlearn(ask(tmp_path, of_class(1), "locked", without=SOME), result.model)
    assert source(third) == "lineage"


def test_what_was_prepared_once_can_be_run_twice_with_purge(tmp_path: Path) -> None:
    method, task = create("unsc", **BASE, purge=True), ask(tmp_path, SOME)
    ready = method.prepared(net(), task, SEED)
    found = [method.unlearn(net(), task, SEED, ready).model for _ in range(2)]
    assert state_sha256(found[0]) == state_sha256(found[1])
    assert not kept_indices(tmp_path) & set(SOME)


def test_without_an_anchor_classes_still_go_and_instances_are_refused(tmp_path: Path) -> None:
    first = unlearn(ask(tmp_path, of_class(0)), keep_anchor=False)
    assert not list(tmp_path.rglob(store.ANCHOR))
    second = unlearn(ask(tmp_path, of_class(1), "locked", without=of_class(0)), first.model)
    assert source(second) == "lineage"
    gone = of_class(0)
    with pytest.raises(RequestError, match=r"keep_anchor.*retained data"):
        unlearn(ask(tmp_path, of_class(2)[:5], "none", without=gone), first.model)
    task = ask(tmp_path, of_class(2)[:5], without=gone)
    assert source(unlearn(task, first.model, cache=False)) == "captured"


def test_without_an_anchor_a_certificate_does_not_pretend_to_count_from_the_start(
    tmp_path: Path,
) -> None:
    """It cannot know the change since the first model, and says so."""
    first = unlearn(ask(tmp_path, of_class(0)), keep_anchor=False)
    second = unlearn(ask(tmp_path, of_class(1), "locked", without=of_class(0)), first.model)
    rows = train().subset(train().labels == 2)
    told = second.stats["certificate"]
    place = told["buckets"].index(2)
    whole = step_of(net(), second.model, rows)
    says = any("anchor" in warning for warning in second.stats.get("warnings", []))
    assert says or told["delta"]["stem.weight"][place] == pytest.approx(whole, rel=1e-4)


def test_instances_of_the_first_model_need_no_stored_anchor(tmp_path: Path) -> None:
    unlearn(ask(tmp_path, of_class(0)), keep_anchor=False)
    assert source(unlearn(ask(tmp_path, SOME, "locked"))) == "stored"


# --------------------------------------------------------------------------- buckets


@pytest.mark.parametrize(
    ("gib", "wanted"),
    [(4.0, [0, 1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4]), (0.5, [0, 1, 0, 1, 0]), (0.01, [0] * 5)],
)
def test_classes_share_buckets_when_there_is_no_room(gib: float, wanted: list[int]) -> None:
    assert store.bucket_map(5, 2**30 // 5, gib) == wanted


def test_a_bucket_weighs_what_it_retains() -> None:
    assert store.weighted_classes([0, 1, 0, 1, 0], torch.tensor([3, 0, 5, 0, 1])) == {0: 3}


def test_the_energy_of_packed_matrices_is_their_trace() -> None:
    moments = store.Moments.zeros(3, 2, 7)
    draw = torch.Generator().manual_seed(0)
    traces = []
    for bucket in range(3):
        columns = torch.randn(2, 7, 20, generator=draw, dtype=torch.float64)
        gram = store.Gram.zeros(2, 7)
        gram.add(columns)
        gram.matrix = (gram.matrix + gram.matrix.mT) / 2
        moments.put(bucket, gram)
        traces.append(float((columns**2).sum()))
        assert torch.equal(moments.at(bucket).matrix, gram.matrix)
    torch.testing.assert_close(moments.energy(), torch.tensor(traces, dtype=torch.float64))


def test_shared_buckets_protect_the_classes_that_stay(tmp_path: Path) -> None:
    """Classes 0 and 2, 1 and 3 share: taking 0 out leaves exactly 2 in the first."""
    found = prepared(ask(tmp_path, of_class(0)), cache_gib=5e-6)
    assert found.buckets == [0, 1, 0, 1]
    assert found.weights == {1: 2, 0: 1}
    for name, (matrix, _, count) in gram_of(train().subset(of_class(2))).items():
        left = found.gram(name, 0)
        assert close(left.matrix, matrix) <= 1e-6
        assert left.count == count


def test_logits_that_targets_use_are_those_of_the_model_that_was_handed_in(tmp_path: Path) -> None:
    """In a sequence subspaces are the anchor's, targets the unlearned model's."""
    first = unlearn(ask(tmp_path, of_class(0)), epochs=30).model
    second = unlearn(ask(tmp_path, of_class(1), "locked", without=of_class(0)), first)
    told = engine.predict(first, train().subset(of_class(1))).logits[:, 2:].argmax(1) + 2
    counts = torch.bincount(told, minlength=4).tolist()
    assert second.stats["targets"]["hard"] == {str(k): n for k, n in enumerate(counts) if n}
