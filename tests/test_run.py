"""One unit from names to a record: same bits from the same seed, complete, honest about failure."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unsc_plugin import cli, evaluation, models, registry, run
from unsc_plugin.errors import ConfigError, DivergedError, UnscError
from unsc_plugin.method import Scenario, Split, UnlearningMethod, UnlearningTask
from unsc_plugin.record import Record, dumps, read
from unsc_plugin.registry import Named, Registry
from unsc_plugin.runtime import state_sha256
from unsc_plugin.spec import EntrySpec, EvaluationSpec, MethodEntry, Recipe, derive

RECIPE = Recipe(epochs=2, lr=0.05, batch_size=64)
SPEC = EvaluationSpec.model_validate(
    {
        "train_seeds": 1,
        "draws": 1,
        "reference_pool": 1,
        "relearn": {"steps": 4},
        "probe": {"shots": 3, "repeats": 2},
    }
)
TIMES = {"seconds_prepare", "seconds_unlearn", "time_ratio", "peak_bytes"}


def setting(
    cache: Path, text: str = "class:3", names: Registry | None = None, **changes: Any
) -> run.Setting:
    asked: dict[str, Any] = {
        "data_name": "digits",
        "model_name": "tiny-digits",
        "forget_sets": [text],
        "evaluation_spec": SPEC,
        "seed": 7,
        "recipe": RECIPE,
        "cache": cache,
    }
    return run.setting(names or registry.load(), **{**asked, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share, so that originals and references are trained once."""
    return tmp_path_factory.mktemp("models")


def unit(name: str, **settings: Any) -> run.Unit:
    return run.Unit(EntrySpec(method=name, set=settings))


def with_method(kind: type[UnlearningMethod]) -> Registry:
    names = registry.load()
    entry = MethodEntry(
        target=f"{kind.__module__}:{kind.__name__}",
        summary="of a test",
        needs=tuple(sorted(kind.needs)),
        scenarios=tuple(sorted(kind.scenarios)),
    )
    names.add(Named("methods", kind.name, entry, "test", target=kind))
    return names


def made(name: str, body: Callable[[nn.Module, UnlearningTask], nn.Module]) -> Registry:
    """Return a registry with one more method, which does `body`."""
    kind = type(
        "Made",
        (UnlearningMethod,),
        {
            "name": name,
            "needs": frozenset({Split.FORGET}),
            "scenarios": frozenset(Scenario),
            "run": lambda self, model, task: body(model, task),
        },
    )
    return with_method(kind)


# --------------------------------------------------------------------------- repeatable


@pytest.mark.parametrize(
    ("name", "text"),
    [("retrain", "class:3"), ("random_label", "class:3"), ("neggrad_plus", "random:0.1")],
)
def test_the_same_seed_gives_the_same_bits_in_another_cache(
    name: str, text: str, cache: Path, tmp_path: Path
) -> None:
    one, two = (
        run.run_unit(setting(root, text), unit(name), catch=False).record
        for root in (cache, tmp_path)
    )
    assert one.hashes == two.hashes
    assert one.reference_hashes == two.reference_hashes
    assert one.reference == two.reference
    assert one.missing == two.missing
    for found in (one, two):
        found.metrics.pop("mubench.unlearn_time")
    assert one.metrics == two.metrics
    assert {k: v for k, v in one.cost.items() if k not in TIMES} == {
        k: v for k, v in two.cost.items() if k not in TIMES
    }


def test_another_seed_or_unit_gives_other_bits(cache: Path) -> None:
    base = setting(cache)
    found = [
        run.run_unit(base, unit("finetune"), catch=False).record.hashes["unlearned"],
        run.run_unit(base, run.Unit(EntrySpec(method="finetune"), 1), catch=False).record.hashes[
            "unlearned"
        ],
        run.run_unit(setting(cache, seed=8), unit("finetune"), catch=False).record.hashes[
            "unlearned"
        ],
    ]
    assert len(set(found)) == 3


def test_no_two_roles_share_a_seed() -> None:
    seeds = [derive(7, "original", s) for s in range(5)]
    seeds += [derive(7, "reference", d, j) for d in range(3) for j in range(5)]
    seeds += [derive(7, role, d, s) for role in ("retrain", "unlearn") for d in range(3)
              for s in range(5)]  # fmt: skip
    assert len(set(seeds)) == len(seeds)


def test_the_entry_retrain_is_a_member_of_the_pool_with_its_seed(cache: Path) -> None:
    base = setting(cache)
    done = run.run_unit(base, unit("retrain"), catch=False).record
    rows = base.splits.train.subset(base.request(0).retain)
    member = base.pool.member(
        identity=base.identity, build=base.build, rows=rows, recipe=base.recipe, seed=done.seed
    )
    assert member.meta["sha256"] == done.hashes["unlearned"]
    assert done.seed == derive(7, "retrain", 0, 0)
    assert member.meta["sha256"] not in done.reference_hashes


def test_all_methods_relearn_in_one_order(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = evaluation.observe

    def spy(*args: Any, relearn_seed: int, **rest: Any) -> evaluation.Outputs:
        seen.append(relearn_seed)
        return plain(*args, relearn_seed=relearn_seed, **rest)

    base = setting(cache)
    base.references(0)
    monkeypatch.setattr(evaluation, "observe", spy)
    for name in ("finetune", "neggrad", "original", "retrain"):
        run.run_unit(base, unit(name), catch=False)
    assert seen == [derive(7, "eval", 0, 0)] * 4


def test_what_the_rows_are_is_part_of_the_key(cache: Path) -> None:
    names = registry.load()
    entry = names.datasets["digits"].entry
    for change, same in (({"val_fraction": 0.2}, False), ({"summary": "other"}, True)):
        other = registry.load()
        changed = entry.model_copy(update=change)  # type: ignore[union-attr]
        other.datasets["digits"] = dataclasses.replace(names.datasets["digits"], entry=changed)
        one, two = setting(cache).identity, setting(cache, names=other).identity
        assert (one == two) is same


# --------------------------------------------------------------------------- records


@pytest.fixture(scope="module")
def finished(cache: Path) -> run.Finished:
    return run.run_unit(setting(cache), unit("finetune", epochs=1), catch=False)


def test_a_record_is_complete(finished: run.Finished, cache: Path) -> None:
    done, base = finished.record, setting(cache)
    request = base.request(0)
    assert (done.status, done.reason, done.kind) == ("ok", None, "class")
    assert (done.method, done.preset, done.entry) == ("finetune", None, "finetune")
    assert done.experiment["recipe"] == RECIPE.model_dump(mode="json")
    assert done.experiment["forget"] == {"kind": "class", "classes": [3]}
    assert done.config["epochs"] == 1
    assert done.n_hyperparameters == len(done.config) == 5
    assert done.needs == ["retain"]
    assert done.hashes == {
        "data": base.content,
        "labels": base.splits.info.labels_sha256,
        "forget": request.forget_sha256,
        "retain": request.retain_sha256,
        "original": base.original(0).meta["sha256"],
        "unlearned": state_sha256(finished.model),
    }
    assert done.reference_hashes == [base.references(0)[0][0].meta["sha256"]]
    assert done.environment["versions"].keys() >= {"torch", "numpy"}
    assert done.environment["processes"] == 1
    assert done.seed == derive(7, "unlearn", 0, 0)
    assert done.stats["samples_read"] == {"retain": len(request.retain)}
    assert done.stats["loss"].keys() == {"first", "last"}


def test_costs_of_a_record(finished: run.Finished, cache: Path) -> None:
    cost, retained = finished.record.cost, len(setting(cache).request(0).retain)
    assert cost["work"] == 3 * retained  # one epoch, with gradient; nothing of the evaluation
    assert cost["work_ratio"] == pytest.approx(1 / RECIPE.epochs)
    assert cost["steps"] == -(-retained // 64)
    assert cost["epochs"] == 1
    assert 0 < cost["seconds_unlearn"] < 60
    assert cost["time_ratio"] > 0
    spent = cost["seconds_prepare"] + cost["seconds_unlearn"]
    assert finished.record.metrics["mubench.unlearn_time"] == pytest.approx(spent)


def test_numbers_of_a_record_come_from_its_outputs(finished: run.Finished, cache: Path) -> None:
    base = setting(cache)
    again = run.evaluate_outputs(base, unit("finetune", epochs=1), finished.outputs)
    metrics = dict(finished.record.metrics)
    metrics.pop("mubench.unlearn_time")
    assert again.metrics == metrics
    assert again.reference == finished.record.reference
    assert run.hashes_of(base, unit("finetune")).items() <= finished.record.hashes.items()


def call(*words: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return int(ended.value.code or 0)


def test_the_command_of_a_record_repeats_it(
    finished: run.Finished, cache: Path, tmp_path: Path
) -> None:
    words = shlex.split(finished.record.command)
    assert words[:3] == ["unsc", "run", "finetune"]
    out = tmp_path / "again"
    more = ["--cache", str(cache), "--out", str(out), "--device", "cpu", "--quiet"]
    assert call(*words[1:], *more) == 0
    again = read(out / "record.json")
    assert again.hashes == finished.record.hashes
    assert again.reference_hashes == finished.record.reference_hashes
    assert again.metrics.keys() == finished.record.metrics.keys()


def test_a_reference_may_be_brought(cache: Path, tmp_path: Path) -> None:
    base = setting(cache)
    [(member, outputs)] = base.references(0)
    mine = setting(cache, reference=member.folder / "model.safetensors", with_reference=False)
    found = run.run_unit(mine, unit("original"), catch=False).record
    expected = evaluation.evaluate(outputs, [], base.frame(0), groups=["core", "mia"])
    for name in ("acc_forget", "acc_test", "umia_auc"):
        assert found.reference[name] == pytest.approx(expected.metrics[name], abs=1e-6)
    assert found.reference_hashes == []


def test_without_a_reference_gaps_are_absent(cache: Path) -> None:
    found = run.run_unit(setting(cache, with_reference=False), unit("original")).record
    assert found.status == "ok"
    assert "tow" not in found.metrics
    assert "retrained" in found.missing["js_forget"]
    assert found.reference == {}
    assert "work_ratio" not in found.cost


# --------------------------------------------------------------------------- sequences


def test_a_sequence_is_its_requests_one_after_the_other(cache: Path) -> None:
    base = setting(cache, "sequence:random:20x3")
    found = run.run_unit(base, unit("finetune", epochs=1), catch=False)
    request = base.request(0)
    assert len(request.steps) == 3
    chosen = registry.create("finetune", epochs=1)
    model = base.original(0).load_into(base.build(0))
    steps = work = 0
    for number, step in enumerate(request.steps):
        own = derive(7, "unlearn", 0, 0)
        seed = derive(own, "request", number) if number else own
        result = chosen.unlearn(model, base.task(step, None), seed)
        model, steps, work = result.model, steps + result.steps, work + result.work
    assert found.record.kind == "sequence"
    assert found.record.status == "ok"
    assert found.record.hashes["unlearned"] == state_sha256(model)
    assert (found.record.cost["steps"], found.record.cost["work"]) == (steps, work)
    assert len(found.record.stats["requests"]) == 3
    assert len(base.frame(0).forget) == 60
    assert {"umia_auc", "js_forget", "relearn_retain"} <= found.record.metrics.keys()


def test_a_sequence_ends_with_the_request_that_diverges(cache: Path) -> None:
    calls = []

    def body(model: nn.Module, task: UnlearningTask) -> nn.Module:
        calls.append(task.size("forget"))
        if len(calls) == 2:
            raise DivergedError("on purpose")
        return model

    base = setting(cache, "sequence:random:20x3", made("stops", body))
    found = run.run_unit(base, unit("stops"), catch=False).record
    assert calls == [20, 20]
    assert (found.status, found.reason, found.metrics) == ("diverged", "on purpose", {})


# --------------------------------------------------------------------------- failures


def spoiled(value: float) -> Callable[[nn.Module, UnlearningTask], nn.Module]:
    def body(model: nn.Module, task: UnlearningTask) -> nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        return model

    return body


def test_a_diverged_method_is_recorded_without_metrics(cache: Path) -> None:
    found = run.run_unit(setting(cache), unit("neggrad", lr=1e30, passes=3), catch=False).record
    assert found.status == "diverged"
    assert "step" in str(found.reason) or "finite" in str(found.reason)
    assert found.metrics == found.reference == {}
    assert found.hashes.keys() >= {"forget", "original"}
    assert found.cost["work"] > 0
    assert read_back(found) == found


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "not finite"), (1e30, "logit")])
def test_weights_or_logits_that_are_not_finite_are_recorded(
    value: float, reason: str, cache: Path
) -> None:
    base = setting(cache, names=made("spoils", spoiled(value)))
    found = run.run_unit(base, unit("spoils")).record
    assert found.status == "diverged"
    assert reason in str(found.reason)
    assert found.metrics == {}
    assert read_back(found) == found


def read_back(found: Record) -> Record:
    return Record.model_validate(json.loads(dumps(found)))


def failing(model: nn.Module, task: UnlearningTask) -> nn.Module:
    raise RuntimeError("the disk is full")


def test_a_method_that_fails_is_a_record_or_an_error(cache: Path) -> None:
    base = setting(cache, names=made("fails", failing))
    found = run.run_unit(base, unit("fails"))
    assert (found.record.status, found.record.metrics) == ("failed", {})
    assert found.record.reason == "RuntimeError: the disk is full"
    assert found.model is found.outputs is None
    assert read_back(found.record) == found.record
    with pytest.raises(RuntimeError, match="disk"):
        run.run_unit(base, unit("fails"), catch=False)


def test_a_method_that_opens_another_split_fails(cache: Path) -> None:
    def peeks(model: nn.Module, task: UnlearningTask) -> nn.Module:
        task.loader("retain")
        return model

    found = run.run_unit(setting(cache, names=made("peeks", peeks)), unit("peeks")).record
    assert found.status == "failed"
    assert "declared needs: forget" in str(found.reason)


def test_a_method_that_does_not_take_the_request_fails(cache: Path) -> None:
    found = run.run_unit(setting(cache, "random:0.1"), unit("logit_mask")).record
    assert found.status == "failed"
    assert "does not accept" in str(found.reason)


# --------------------------------------------------------------------------- the test split


def test_methods_never_see_the_test_split(cache: Path) -> None:
    """Nothing that hangs on a task, at any depth, holds rows of the test split."""
    tasks: list[UnlearningTask] = []

    def keeps(model: nn.Module, task: UnlearningTask) -> nn.Module:
        tasks.append(task)
        return model

    base = setting(cache, names=made("keeps", keeps))
    run.run_unit(base, unit("keeps"), catch=False)
    seen: list[torch.Tensor] = []
    pixels = base.splits.test.storage["pixel_values"]
    for rows in tasks[0]._rows.values():
        assert rows is not None
        seen.append(rows.index)
        assert all(tensor is not pixels for tensor in rows.storage.values())
    index = torch.cat(seen)
    assert not set(base.splits.test.index.tolist()) & set(index.tolist())
    assert {value for value in vars(tasks[0]) if "test" in value} == set()
    with pytest.raises(ValueError, match="test"):
        tasks[0].loader("test")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["finetune", "neggrad_plus", "random_label", "retrain"])
def test_unlearning_does_not_depend_on_the_test_split(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = setting(cache)
    original = base.original(0).load_into(base.build(0))
    kept = []
    for splits in (base.splits, dataclasses.replace(base.splits, test=base.splits.test.subset([]))):
        task = dataclasses.replace(base, splits=splits).task(base.request(0), None)
        kept.append(state_sha256(registry.create(name).unlearn(original, task, 5).model))
    assert kept[0] == kept[1]


# --------------------------------------------------------------------------- the run folder


def test_a_run_folder_is_written_once(finished: run.Finished, tmp_path: Path) -> None:
    folder = run.write_run(finished, tmp_path / "runs" / "one")
    names = {"record.json", "outputs.safetensors", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    assert read(folder / "record.json") == finished.record
    assert finished.outputs is not None
    again = evaluation.Outputs.load(folder / "outputs.safetensors")
    assert np.array_equal(again.forget, finished.outputs.forget)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="never overwritten"):
        run.write_run(finished, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("odd"), KeyboardInterrupt()])
def test_a_run_folder_that_cannot_be_written_leaves_nothing(
    error: BaseException,
    finished: run.Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaks(*_: Any) -> None:
        raise error

    monkeypatch.setattr(models, "save_weights", breaks)
    with pytest.raises(ConfigError if isinstance(error, OSError) else type(error)):
        run.write_run(finished, tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_has_a_folder_too(cache: Path, tmp_path: Path) -> None:
    found = run.run_unit(setting(cache), unit("neggrad", lr=1e30, passes=3))
    folder = run.write_run(found, tmp_path / "diverged")
    assert read(folder / "record.json").status == "diverged"
    assert not (folder / "outputs.safetensors").exists()


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"data_name": "digit"}, "digits"),
        ({"model_name": "tiny-digit"}, "tiny-digits"),
        ({"forget_sets": ["digits/class-1"]}, "digits/class-0"),
        ({"forget_sets": ["class:11"]}, "0..9"),
    ],
)
def test_unknown_names_stop_before_anything_is_trained(
    changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    with pytest.raises(UnscError, match=word):
        setting(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []
