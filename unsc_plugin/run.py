"""One experiment: the pipeline, one call per line; and the folder that `unsc run` leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unsc_plugin
from unsc_plugin import data, engine, evaluation, forget, models, record
from unsc_plugin._curves import Rounds, Trajectory
from unsc_plugin.data import Splits
from unsc_plugin.errors import ConfigError, DivergedError, UnscError
from unsc_plugin.evaluation import GROUPS, Evaluation, Frame, Outputs, Perturbations
from unsc_plugin.forget import Request
from unsc_plugin.method import (
    Budget,
    Progress,
    Result,
    UnlearningMethod,
    UnlearningTask,
    Weights,
)
from unsc_plugin.pool import Member, Pool, default_root, device_name
from unsc_plugin.record import Record
from unsc_plugin.registry import Registry
from unsc_plugin.runtime import sealed, state_sha256
from unsc_plugin.spec import (
    DEFAULT_RECIPE,
    BackboneEntry,
    DatasetEntry,
    EntrySpec,
    EvaluationSpec,
    ForgetSpec,
    MethodEntry,
    Recipe,
    derive,
)

Tell = Callable[[str, Progress | None], None]


@dataclass(frozen=True)
class Setting:
    """What all units of a scenario share: data, backbone, recipe, forget sets, evaluation.

    `forget` has one forget set that is drawn anew for every draw, or one per draw. Seeds of all
    roles derive from `seed`.
    """

    registry: Registry
    name: str
    data: str
    model: str
    entry: BackboneEntry
    recipe: Recipe
    splits: Splits
    forget: tuple[ForgetSpec, ...]
    evaluation: EvaluationSpec
    seed: int
    pool: Pool
    dataset: DatasetEntry | None = None
    pretrained: bool = False
    allow_foreign_order: bool = False
    board: str | None = None
    tell: Tell | None = None
    reference: Path | None = None
    with_reference: bool = True
    groups: tuple[str, ...] = GROUPS
    mubench_original: str = "measured"
    mubench_data: str = ""
    board_path: str = ""
    _requests: dict[int, Request] = field(default_factory=dict)
    _frames: dict[int, Frame] = field(default_factory=dict)
    _references: dict[int, list[tuple[Member, Outputs]]] = field(default_factory=dict)
    _transferred: dict[tuple[int, int], Perturbations | None] = field(default_factory=dict)

    # -- the parts of a unit

    def request(self, draw: int) -> Request:
        """Return the forget set of a draw."""
        if draw not in self._requests:
            spec = self.forget[draw if len(self.forget) > 1 else 0]
            self._requests[draw] = forget.select(
                spec,
                self.splits.train,
                seed=derive(self.seed, "draw", draw),
                info=self.splits.info,
                allow_foreign_order=self.allow_foreign_order,
                has_val=len(self.splits.val) > 0,
            )
        return self._requests[draw]

    def frame(self, draw: int) -> Frame:
        """Return what every model of a draw is measured on."""
        if draw not in self._frames:
            self._frames[draw] = evaluation.frame(
                self.splits,
                self.request(draw),
                self.recipe,
                self.evaluation,
                seed=self.seed,
                draw=draw,
            )
            if self.mubench_data:
                found = dataclasses.replace(self._frames[draw], data=self.mubench_data)
                self._frames[draw] = found
        return self._frames[draw]

    def build(self, seed: int) -> nn.Module:
        """Return the backbone before training."""
        return models.build(self.entry, self.splits.info, seed=seed, pretrained=self.pretrained)

    @cached_property
    def content(self) -> str:
        """SHA-256 of the labels and of all inputs in memory, train and test."""
        digest = hashlib.sha256(self.splits.info.labels_sha256.encode())
        for rows in (self.splits.train, self.splits.test):
            for column in (rows.labels, *rows.storage.values()):
                digest.update(column.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What names data and backbone in the key of a cached model."""
        return {
            "data": [self.data, self.content, self.splits.info.revision],
            "rows_as": None
            if self.dataset is None
            else self.dataset.model_dump(mode="json", exclude=_NO_PART_OF_THE_ROWS),
            "model": self.entry.model_dump(mode="json", exclude={"recipe", "summary", "mubench"}),
            "pretrained": self.pretrained,
            "initial": state_sha256(self.build(0)) if self.pretrained else None,
        }

    def original(self, train_seed: int, draw: int = 0) -> Member:
        """Return the original model of a train seed, trained on all of D unless it is cached.

        A correction that took validation rows from D has an original of its own for every draw.
        """
        rows, val = self.splits.train, self.request(draw).val
        if len(val):
            rows = rows.subset(self.request(draw).retain)
        return self._trained(
            f"original {train_seed}", rows, derive(self.seed, "original", train_seed)
        )

    def oracle(self, unit: Unit, weights: Weights) -> list[tuple[Member, Outputs]]:
        """Return the model retrained with the weights of a unit, and its outputs."""
        rows = self.splits.train.subset(self.request(unit.draw).retain)
        a = weights.multiplicity[rows.index]
        kept = torch.nonzero(a > 0)[:, 0]
        member = self._trained(
            "oracle",
            rows.subset(kept).weighted(a[kept]),
            derive(self.seed, "unlearn", unit.draw, unit.train_seed),
        )
        seed = derive(self.seed, "eval", unit.draw, unit.train_seed)
        outputs = self.pool.outputs(member, self.frame(unit.draw), self.build, relearn_seed=seed)
        return [(member, outputs)]

    def references(self, draw: int) -> list[tuple[Member, Outputs]]:
        """Return the retrained pool R_A of a draw with its outputs, read once per draw."""
        if draw in self._references:
            return self._references[draw]
        rows, frame = self.splits.train.subset(self.request(draw).retain), self.frame(draw)
        found = []
        for j in range(self.evaluation.reference_pool):
            seed = derive(self.seed, "reference", draw, j)
            member = self._trained(f"retrained {draw}.{j}", rows, seed)
            relearn = derive(self.seed, "eval", draw, j)
            found.append(
                (member, self.pool.outputs(member, frame, self.build, relearn_seed=relearn))
            )
        self._references[draw] = found
        return found

    def transferred(self, unit: Unit, original: nn.Module) -> Perturbations | None:
        """Return what the attack of a correction makes against the original of a unit, if any.

        Kept for the units that follow with the same original and draw.
        """
        key = unit.train_seed, unit.draw
        if key not in self._transferred:
            self._transferred.clear()
            found = evaluation.perturbations(original, self.frame(unit.draw), self.pool.device)
            self._transferred[key] = found
        return self._transferred[key]

    def task(
        self, request: Request, progress: Callable[[Progress], None] | None, **more: Any
    ) -> UnlearningTask:
        """Return the task of a request; the test split is not in it.

        `more` is what a sequence (`first_model`, `past`) or a trajectory (`observer`) adds.
        """
        train, val = self.splits.train, self.splits.val
        val = train.subset(request.val) if len(request.val) else val
        return UnlearningTask(
            forget=train.subset(request.forget) if request.n else None,
            retain=train.subset(request.retain),
            val=val if len(val) else None,
            num_classes=self.splits.info.num_classes,
            recipe=self.recipe,
            fresh_model=self.build,
            scenario=request.scenario,
            modality=self.splits.info.modality,
            accelerator=self.pool.device,
            budget=Budget(),
            micro_batches=self.pool.micro_batches,
            progress=progress,
            cache=self.pool.root,
            data_fingerprint=f"{self.data}|{self.content}",
            **more,
        )

    def original_test_accuracy(self, member: Member, model: nn.Module) -> float:
        """Return the original's test accuracy, or MU-Bench's table value if that is asked for.

        Raises:
            ConfigError: MU-Bench's table lacks this pair of data and backbone.
        """
        from unsc_plugin.metrics import mubench
        from unsc_plugin.metrics.accuracy import accuracy

        if self.mubench_original == "table":
            found = mubench.table_orig_dt(self.mubench_data, self.entry.mubench or self.model)
            if found is None:
                raise ConfigError(
                    f"--mubench-orig table: MU-Bench's table has no {self.model} on {self.data}; "
                    "use measured"
                )
            return found
        return _test_accuracy(self, member, model, accuracy)

    def _trained(self, what: str, rows: Any, seed: int) -> Member:
        tell = self.tell
        return self.pool.member(
            identity=self.identity,
            build=self.build,
            rows=rows,
            recipe=self.recipe,
            seed=seed,
            progress=None if tell is None else (lambda progress: tell(what, progress)),
        )


_NO_PART_OF_THE_ROWS = {"summary", "license", "recipe", "mubench"}
_TEST_ACCURACY: dict[str, float] = {}


def _test_accuracy(
    setting: Setting, member: Member, model: nn.Module, accuracy: Callable[..., float]
) -> float:
    if member.key not in _TEST_ACCURACY:
        found = engine.predict(model, setting.splits.test, device=setting.pool.device)
        _TEST_ACCURACY[member.key] = accuracy(found.logits, found.labels)
    return _TEST_ACCURACY[member.key]


@dataclass(frozen=True)
class Names:
    """What the names of a scenario stand for; nothing is loaded yet."""

    entry: BackboneEntry
    data: str
    dataset: DatasetEntry
    forget: tuple[ForgetSpec, ...]
    recipe: Recipe


def resolve(
    registry: Registry,
    *,
    data_name: str,
    model_name: str,
    forget_sets: Sequence[str | ForgetSpec],
    recipe: Recipe | None = None,
) -> Names:
    """Return what the names of a scenario stand for.

    Raises:
        UnscError: an unknown name.
    """
    entry = models.resolve(model_name, registry.entries("backbones"))
    resolved, dataset = data.resolve(data_name, registry.entries("datasets"))
    specs = tuple(
        forget.resolve(one, registry.entries("forget_sets"), resolved) for one in forget_sets
    )
    found = recipe or entry.recipe or dataset.recipe or DEFAULT_RECIPE
    return Names(entry, resolved, dataset, specs, found)


def setting(
    registry: Registry,
    *,
    data_name: str,
    model_name: str,
    forget_sets: Sequence[str | ForgetSpec],
    evaluation_spec: EvaluationSpec,
    seed: int,
    device: Any = None,
    recipe: Recipe | None = None,
    data_dir: Path | None = None,
    cache: Path | None = None,
    pretrained: bool = False,
    micro_batches: int = 1,
    **more: Any,
) -> Setting:
    """Resolve every name, load the data, and return what all units share.

    Raises:
        UnscError: an unknown name, data that is not there, or a forget set that does not fit.
    """
    names = resolve(
        registry,
        data_name=data_name,
        model_name=model_name,
        forget_sets=forget_sets,
        recipe=recipe,
    )
    entry, dataset = names.entry, names.dataset
    tokenizer = models.tokenizer_for(entry) if dataset.modality == "text" else None
    splits = data.load(dataset, names.data, data_dir=data_dir, tokenizer=tokenizer)
    if device is not None and device.device.type != "cpu":
        splits = dataclasses.replace(
            splits,
            train=splits.train.to(device.device),
            val=splits.val.to(device.device),
            test=splits.test.to(device.device),
        )
    found = Setting(
        registry=registry,
        name=more.pop("name", "run"),
        data=names.data,
        model=model_name,
        entry=entry,
        recipe=names.recipe,
        splits=splits,
        forget=names.forget,
        mubench_data=dataset.mubench or names.data,
        evaluation=evaluation_spec,
        seed=seed,
        pool=Pool(cache or default_root(), device, micro_batches),
        dataset=dataset,
        pretrained=pretrained or entry.source == "hf",
        **more,
    )
    for draw in range(len(names.forget)):
        found.request(draw)
    return found


# --------------------------------------------------------------------------- one unit


@dataclass(frozen=True)
class Unit:
    """One cell of the grid: an entry at a train seed and a forget draw."""

    entry: EntrySpec
    train_seed: int = 0
    draw: int = 0


@dataclass(frozen=True)
class Finished:
    """A unit's record, and its model, outputs and per-sample weights where there are any."""

    record: Record
    model: nn.Module | None = None
    outputs: Outputs | None = None
    weights: Weights | None = None


def run_unit(setting: Setting, unit: Unit, *, catch: bool = True) -> Finished:
    """Run one unit and return its record; with `catch` every failure is a record too.

    Raises:
        UnscError: what went wrong, if `catch` is off.
    """
    try:
        return _run(setting, unit)
    except DivergedError as error:
        return Finished(_record(setting, unit, "diverged", reason=str(error)))
    except UnscError as error:
        if not catch:
            raise
        return Finished(_record(setting, unit, "failed", reason=f"{type(error).__name__}: {error}"))
    except Exception as error:
        if not catch:
            raise
        return Finished(_record(setting, unit, "failed", reason=f"{type(error).__name__}: {error}"))


def diagnose(setting: Setting, unit: Unit, method: UnlearningMethod) -> dict[str, Any]:
    """Return a method's pre-flight diagnosis of a unit (of its first request, in a sequence).

    Raises:
        UnscError: the method has none, or does not accept the request.
    """
    request = setting.request(unit.draw)
    original = setting.original(unit.train_seed, unit.draw).load_into(setting.build(0))
    if setting.pool.device is not None:
        original = original.to(setting.pool.device.device)
    task = setting.task(request.steps[0] if request.steps else request, None)
    return dict(method.preflight(original, task, derive(setting.seed, "unlearn", unit.draw)))


def _run(setting: Setting, unit: Unit) -> Finished:
    request, frame = setting.request(unit.draw), setting.frame(unit.draw)
    method = setting.registry.create(unit.entry.method, **unit.entry.set)
    member = setting.original(unit.train_seed, unit.draw)
    original = member.load_into(setting.build(0))
    if setting.pool.device is not None:
        original = original.to(setting.pool.device.device)
    result, curves = _unlearn(setting, unit, method, original, request)
    references = _references(setting, unit, result)
    measured = original, member, references
    recorded = partial(_record, setting, unit, result=result, measured=measured, curves=curves)
    if result.status == "diverged":
        return Finished(recorded("diverged"), result.model)
    relearn_seed = derive(setting.seed, "eval", unit.draw, unit.train_seed)
    try:
        with sealed(relearn_seed):
            outputs = evaluation.observe(
                result.model,
                frame,
                relearn_seed=relearn_seed,
                device=setting.pool.device,
                transferred=setting.transferred(unit, original),
            )
    except DivergedError as error:
        return Finished(recorded("diverged", reason=str(error)))
    numbers = _evaluate(setting, outputs, unit, measured)
    return Finished(recorded("ok", numbers=numbers), result.model, outputs, result.weights)


def _references(setting: Setting, unit: Unit, result: Result) -> list[tuple[Member, Outputs]]:
    """Return what a unit is compared with: the retrained pool, of a correction its oracle."""
    if setting.request(unit.draw).kind != "correction":
        return setting.references(unit.draw) if setting.with_reference else []
    wanted = setting.with_reference and setting.frame(unit.draw).correction.oracle
    if result.weights is None or result.status == "diverged" or not wanted:
        return []
    return setting.oracle(unit, result.weights)


def evaluate_original(setting: Setting, unit: Unit) -> Evaluation:
    """Return the numbers of the original model on the unit's frame, for comparison in a table."""
    relearn_seed = derive(setting.seed, "eval", unit.draw, unit.train_seed)
    outputs = setting.pool.outputs(
        setting.original(unit.train_seed, unit.draw),
        setting.frame(unit.draw),
        setting.build,
        relearn_seed=relearn_seed,
    )
    return evaluate_outputs(setting, unit, outputs)


def evaluate_outputs(setting: Setting, unit: Unit, outputs: Outputs) -> Evaluation:
    """Return the numbers of kept outputs of a unit, against the pool of its draw."""
    member = setting.original(unit.train_seed, unit.draw)
    model = member.load_into(setting.build(0))
    if setting.pool.device is not None:
        model = model.to(setting.pool.device.device)
    references = []
    if setting.with_reference and setting.request(unit.draw).kind != "correction":
        references = setting.references(unit.draw)
    return _evaluate(setting, outputs, unit, (model, member, references))


def hashes_of(setting: Setting, unit: Unit) -> dict[str, str]:
    """Return the hashes of the labels, the forget and retain sets and the original of a unit."""
    request = setting.request(unit.draw)
    return {
        "data": setting.content,
        "labels": setting.splits.info.labels_sha256,
        "forget": request.forget_sha256,
        "retain": request.retain_sha256,
        "original": setting.original(unit.train_seed, unit.draw).meta["sha256"],
    }


def _unlearn(
    setting: Setting, unit: Unit, method: UnlearningMethod, original: nn.Module, request: Request
) -> tuple[Result, dict[str, Any]]:
    """Return the result of a unit and the curves that were measured on the way."""
    role = "retrain" if method.name == "retrain" else "unlearn"
    tell = setting.tell
    progress = None if tell is None else (lambda told: tell(unit.entry.label, told))
    seed = derive(setting.seed, role, unit.draw, unit.train_seed)
    device = setting.pool.device
    if request.steps:
        return _in_sequence(setting, unit, method, original, seed, progress)
    if not setting.evaluation.trajectory:
        return method.unlearn(original, setting.task(request, progress), seed), {}
    trajectory = Trajectory(original, setting.frame(unit.draw), device)
    # Of these only the ends are of interest: they do not go step by step from the original.
    ends_only = method.identity or method.control or method.name == "retrain"
    task = setting.task(request, progress, observer=None if ends_only else trajectory)
    result = method.unlearn(original, task, seed)
    end = None if result.status == "diverged" else result.model
    return result, {"k": request.n, "trajectory": trajectory.found(result.steps, end)}


def _in_sequence(
    setting: Setting,
    unit: Unit,
    method: UnlearningMethod,
    original: nn.Module,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> tuple[Result, dict[str, Any]]:
    """Serve the requests of a sequence one after the other: θ_t = unlearn(θ_{t−1}, request t).

    The first has the seed that it would have alone. After every request all forget sets so far, the
    retained and the test data are measured; a request that diverges ends the sequence.
    """
    frame, device = setting.frame(unit.draw), setting.pool.device
    rounds = Rounds(original, setting.splits.train, frame, device)
    model, results = original, []
    for number, step in enumerate(setting.request(unit.draw).steps):
        task = setting.task(step, progress, first_model=original, past=rounds.past)
        own = derive(seed, "request", number) if number else seed
        result = rounds.close(method.unlearn(model, task, own), model, step.forget)
        results.append(result)
        if result.status == "diverged":
            break
        model = result.model
    return _summed(results), {"rounds": rounds.found()}


def _summed(results: Sequence[Result]) -> Result:
    """Return the last result of a sequence with the costs of all its requests."""
    peaks = [result.peak_bytes for result in results if result.peak_bytes is not None]
    return dataclasses.replace(
        results[-1],
        seconds_prepare=sum(result.seconds_prepare for result in results),
        seconds_unlearn=sum(result.seconds_unlearn for result in results),
        peak_bytes=max(peaks, default=None),
        work=sum(result.work for result in results),
        steps=sum(result.steps for result in results),
        epochs=sum(result.epochs for result in results),
        stats={"requests": [dict(result.stats) for result in results]},
    )


Measured = tuple[nn.Module, Member, list[tuple[Member, Outputs]]]


def _evaluate(setting: Setting, outputs: Outputs, unit: Unit, measured: Measured) -> Evaluation:
    original, member, references = measured
    pool = [found for _, found in references]
    if setting.reference is not None:
        pool = [_given_reference(setting, unit)]
    named = setting.registry.method(unit.entry.method)[0].entry
    mubench = named.known_as.get("mubench", "") if isinstance(named, MethodEntry) else ""
    return evaluation.evaluate(
        outputs,
        pool,
        setting.frame(unit.draw),
        original_test_accuracy=(
            setting.original_test_accuracy(member, original)
            if "mubench" in setting.groups and setting.request(unit.draw).n
            else None
        ),
        mubench_method=mubench,
        groups=setting.groups,
    )


def _given_reference(setting: Setting, unit: Unit) -> Outputs:
    """Return the outputs of a retrained model that the user brought as a checkpoint."""
    assert setting.reference is not None
    model = setting.build(0)
    models.load_checkpoint(model, setting.reference)
    if setting.pool.device is not None:
        model = model.to(setting.pool.device.device)
    seed = derive(setting.seed, "eval", unit.draw, 0)
    with sealed(seed):
        return evaluation.observe(
            model, setting.frame(unit.draw), relearn_seed=seed, device=setting.pool.device
        )


# --------------------------------------------------------------------------- the record


def experiment_of(setting: Setting, unit: Unit) -> dict[str, Any]:
    """Return the resolved experiment of a unit, as its record keeps it."""
    spec = setting.forget[unit.draw if len(setting.forget) > 1 else 0]
    return {
        "data": setting.data,
        "model": setting.model,
        "backbone": setting.entry.model_dump(mode="json", exclude_defaults=True),
        "pretrained": setting.pretrained,
        "recipe": setting.recipe.model_dump(mode="json"),
        "forget": spec.model_dump(mode="json", exclude_defaults=True),
        "evaluation": setting.evaluation.model_dump(mode="json"),
        "seed": setting.seed,
    }


def _record(
    setting: Setting,
    unit: Unit,
    status: str,
    *,
    reason: str | None = None,
    result: Result | None = None,
    measured: Measured | None = None,
    numbers: Evaluation | None = None,
    curves: Mapping[str, Any] | None = None,
) -> Record:
    named, tag = setting.registry.method(unit.entry.method)
    request = setting.request(unit.draw)
    config, needs = _config_of(setting, unit)
    references = measured[2] if measured else []
    cost = _cost(result, references, setting) if result else {}
    metrics = dict(numbers.metrics) if numbers else {}
    by_sets = request.kind != "correction"
    if result and by_sets and "mubench" in setting.groups and status == "ok":
        metrics["mubench.unlearn_time"] = result.seconds_prepare + result.seconds_unlearn
    hashes = hashes_of(setting, unit) if measured else {}
    if measured and setting.reference is not None:
        hashes["reference_file"] = hashlib.sha256(setting.reference.read_bytes()).hexdigest()
    if result:
        hashes["unlearned"] = state_sha256(result.model)
    role = "retrain" if named.name == "retrain" else "unlearn"
    return Record(
        entry=unit.entry.label,
        method=named.name,
        preset=tag,
        track=unit.entry.track,
        board=setting.board,
        scenario=setting.name,
        kind=request.kind,
        unit=record.Unit(train_seed=unit.train_seed, draw=unit.draw),
        seed=derive(setting.seed, role, unit.draw, unit.train_seed),
        status=status,  # type: ignore[arg-type]
        reason=reason or (result.reason if result and status == "diverged" else None),
        experiment=experiment_of(setting, unit),
        config=config,
        hashes=hashes,
        reference_hashes=[member.meta["sha256"] for member, _ in references],
        metrics=metrics,
        intervals={k: list(ends) for k, ends in numbers.intervals.items()} if numbers else {},
        reference=dict(numbers.reference) if numbers else {},
        reference_std=dict(numbers.reference_std) if numbers else {},
        missing=dict(numbers.missing) if numbers else {},
        cost=cost,
        stats=_stats(result),
        curves=dict(curves or {}),
        needs=needs,
        n_hyperparameters=len(config),
        environment=environment(setting.pool.device),
        commit=commit(),
        package_version=unsc_plugin.__version__,
        command=command_of(setting, unit),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _config_of(setting: Setting, unit: Unit) -> tuple[dict[str, Any], list[str]]:
    try:
        method = setting.registry.create(unit.entry.method, **unit.entry.set)
    except UnscError:
        return dict(unit.entry.set), []
    return dataclasses.asdict(method.config), sorted(str(split) for split in method.opens)


def _cost(
    result: Result, references: Sequence[tuple[Member, Outputs]], setting: Setting
) -> dict[str, float]:
    cost = result.cost
    retrained = [member.meta for member, _ in references]
    if retrained and min(meta["work"] for meta in retrained) > 0:  # a recipe of 0 epochs has none
        cost["work_ratio"] = result.work / statistics.median(meta["work"] for meta in retrained)
        here = device_name(setting.pool.device)
        seconds = [meta["seconds"] for meta in retrained if meta["device"] == here]
        if seconds:
            spent = result.seconds_prepare + result.seconds_unlearn
            cost["time_ratio"] = spent / statistics.median(seconds)
    return cost


def _stats(result: Result | None) -> dict[str, Any]:
    if result is None:
        return {}
    read = {str(split): count for split, count in result.read.items()}
    stats: dict[str, Any] = {"samples_read": read, **result.stats}
    if result.losses:
        stats["loss"] = {"first": result.losses[0], "last": result.losses[-1]}
    if result.reason and result.status != "diverged":
        stats["stop_reason"] = result.reason
    return stats


def environment(device: Any = None) -> dict[str, Any]:
    """Return versions, device, threads and platform of this process."""
    names = ("torch", "timm", "transformers", "accelerate", "datasets", "numpy", "scikit-learn")
    return {
        "device": device_name(device),
        "precision": getattr(device, "mixed_precision", "no"),
        "processes": device.num_processes if device is not None else 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {name: metadata.version(name) for name in names},
    }


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Return the commit of this package's checkout, `+changed` if its code differs; else None."""
    folder = Path(unsc_plugin.__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=folder, capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", ".", "../registry.yaml")
    return f"{head}+changed" if head and changed else head


def command_of(setting: Setting, unit: Unit) -> str:
    """Return the command line that repeats the unit."""
    if setting.board is not None:
        only = f"'{unit.entry.label}--s{unit.train_seed}d{unit.draw}'"
        return f"unsc bench {setting.board_path} --only {only}"
    words = ["unsc", "run", unit.entry.method, "--model", setting.model, "--data", setting.data]
    spec = setting.forget[0].model_dump_json(exclude_defaults=True)
    words += ["--forget", spec, "--seed", str(setting.seed)]
    for key, value in unit.entry.set.items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    usual = setting.entry.recipe or DEFAULT_RECIPE
    for key, value in setting.recipe.model_dump(mode="json").items():
        if value != getattr(usual, key):
            words += ["--recipe", f"{key}={json.dumps(value)}"]
    words += ["--reference-pool", str(setting.evaluation.reference_pool)]
    words += ["--metrics", ",".join(setting.groups)]
    words += ["--layout", "mubench"] if setting.evaluation.retain_eval == "all" else []
    words += ["--trajectory"] if setting.evaluation.trajectory else []
    if setting.pool.micro_batches > 1:
        words += ["--micro-batches", str(setting.pool.micro_batches)]
    if setting.pretrained and setting.entry.source != "hf":
        words.append("--pretrained")
    precision = getattr(setting.pool.device, "mixed_precision", "no")
    words += [] if precision == "no" else ["--precision", precision]
    for plugin in setting.registry.plugins:
        words += ["--plugin", plugin]
    return shlex.join(words)


# --------------------------------------------------------------------------- the run folder


def run_id(method: str, data_name: str, model: str, forget_text: str, seed: int) -> str:
    """Return a folder name made of the choices of a run.

    >>> run_id("finetune", "digits", "timm:resnet18", "class:3", 42)
    'finetune--digits--timm-resnet18--class-3--s42'
    """
    parts = (method, data_name, model, forget_text)
    clean = [re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.")[:40] for part in parts]
    return "--".join([*clean, f"s{seed}"])


def write_run(
    finished: Finished, folder: Path, also: Callable[[Path], object] | None = None
) -> Path:
    """Write `record.json`, `outputs.safetensors` and `model.safetensors`; all appear at once.

    A correction by weights also leaves them there, as `weights.safetensors`. `also` may add more
    files to the folder before it appears.

    Raises:
        ConfigError: the folder exists.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        raise ConfigError(
            f"{folder} exists and a finished run is never overwritten; use --resume to keep it or "
            "another --out"
        )
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        if finished.outputs is not None:
            finished.outputs.save(scratch / "outputs.safetensors")
        if finished.model is not None:
            models.save_weights(finished.model, scratch / "model.safetensors")
        if finished.weights is not None:
            finished.weights.save(scratch / "weights.safetensors")
        if also is not None:
            also(scratch)
        (scratch / "record.json").write_text(record.dumps(finished.record), encoding="utf-8")
        scratch.chmod(0o755)  # made private by mkdtemp
        os.replace(scratch, folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


Comparison = tuple[str, float | None, float | None, float | None, float | None]


def comparison(finished: Record, original: Evaluation | None) -> list[Comparison]:
    """Return (metric, original, unlearned, retrained, gap to retrained) for a table."""
    rows: list[Comparison] = []
    before: Mapping[str, float] = original.metrics if original else {}
    for name, value in finished.metrics.items():
        retrained = finished.reference.get(name)
        gap = None if retrained is None else value - retrained
        rows.append((name, before.get(name), value, retrained, gap))
    return rows


def is_main(device: Any) -> bool:
    """Return whether this process writes and prints."""
    return device is None or bool(device.is_main_process)


def quiet_libraries() -> None:
    """Keep libraries from writing progress bars and warnings into our output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        import warnings

        warnings.filterwarnings("ignore", module=r"(timm|transformers|datasets|torch)\b.*")
