"""The contract of an unlearning method: what it is given, what it gives back, what is enforced.

An author writes one class with a frozen `Config` and :meth:`UnlearningMethod.run`. The public call,
:meth:`UnlearningMethod.unlearn`, is final: it works on a private copy, seeds, guards the splits,
measures, checks and restores, so that no author has to be trusted for any of it.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unsc_plugin.errors import (
    ArchitectureChanged,
    ConfigError,
    DataError,
    DivergedError,
    ForgetSetError,
    FrozenChanged,
    NotApplicable,
    ScenarioNotSupported,
    SplitAccessError,
    WeightsNotSupported,
    nearest,
)
from unsc_plugin.rows import Batch, Loader, Rows
from unsc_plugin.runtime import (
    Clock,
    PeakMemory,
    WorkCounter,
    first_non_finite,
    sealed,
    state_sha256,
    warm_up,
)
from unsc_plugin.spec import Recipe, Scenario, Split, derive, fingerprint

__all__ = [
    "Batch",
    "Budget",
    "Context",
    "Loader",
    "MethodRef",
    "Past",
    "Prepared",
    "Progress",
    "Recipe",
    "Result",
    "Rows",
    "Scenario",
    "Split",
    "TrainingConfig",
    "UnlearningMethod",
    "UnlearningTask",
    "Weights",
    "from_function",
    "option",
    "state_sha256",
]


# --------------------------------------------------------------------------- configuration


def option(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] = (),
    search: tuple[float, float, Literal["log", "linear"]] | None = None,
    probe: Any = None,
    inert: str = "",
) -> Any:
    """Return a field of a `Config` with its meaning and allowed range.

    `low` and `high` are closed bounds, `above` an open lower bound; `search` is the range of a
    random search; `probe` is the value that the conformance suite tries instead of twice the
    default; `inert` is the reason why the field may leave the weights unchanged.
    """
    limits = {"low": low, "high": high, "above": above, "choices": choices}
    extra = {"meaning": meaning, "search": search, "probe": probe, "inert": inert}
    return field(default=default, metadata={**limits, **extra})


@dataclass(frozen=True)
class NoConfig:
    """The configuration of a method without settings."""


@dataclass(frozen=True)
class MethodRef:
    """A registered method with settings of its own, as a setting of another method.

    In files and on the command line a plain name stands for one without settings. Whoever makes the
    outer method by name finds the instance in `parts`, under the name of the field.
    """

    method: str
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings that all methods with training steps share."""

    epochs: int | None = option(
        None, "passes; default: 15 % of the recipe's, over the work of one", low=0, probe=2
    )
    lr: float | None = option(
        None, "absolute learning rate; wins over lr_scale", above=0, probe=0.02
    )
    lr_scale: float = option(0.1, "learning rate as a share of the recipe's", above=0)
    batch_size: int | None = option(None, "rows per step; default: the recipe's", low=1, probe=5)
    max_grad_norm: float | None = option(None, "clip the gradient norm", above=0, probe=1e-3)

    def learning_rate(self, recipe: Recipe) -> float:
        """Return `lr`, or `lr_scale` × the recipe's learning rate."""
        return self.lr if self.lr is not None else self.lr_scale * recipe.lr

    def passes_for(self, recipe: Recipe, work_per_epoch: float) -> int:
        """Return `epochs`, or max(1, ⌊0.15·E_R / c⌋): E_R recipe epochs, c the work of one pass.

        c is counted in units of a training epoch, so that all iterative methods get the same
        compute and stay inside a board's cost gate.
        """
        if self.epochs is not None:
            return self.epochs
        return max(1, math.floor(0.15 * recipe.epochs / work_per_epoch + 1e-9))


def build_config(kind: type, values: Mapping[str, Any]) -> Any:
    """Return `kind(**values)`, every key known, every value of its type and in its range.

    Raises:
        ConfigError: unknown key (with the nearest), wrong type, or outside the allowed range.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            close = nearest(key, fields)
            known = (
                f"did you mean {close[0]!r}?" if close else f"known: {', '.join(fields) or 'none'}"
            )
            raise ConfigError(f"unknown setting {key!r}; {known}")
    checked = {key: _typed(key, value, hints[key]) for key, value in values.items()}
    for key, value in checked.items():
        _in_range(key, value, fields[key].metadata)
    return kind(**checked)


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Return `value` as `hint` says, without coercion but for what JSON and YAML cannot tell apart.

    Raises:
        ConfigError: another type.
    """
    adapter = TypeAdapter(hint)
    if hint is MethodRef and isinstance(value, str):
        value = {"method": value}
    try:
        try:
            text = json.dumps(value)  # so that a list stands for a tuple and 1 for 1.0
        except TypeError:
            return adapter.validate_python(value, strict=True)
        return adapter.validate_json(text, strict=True)
    except ValidationError:
        raise ConfigError(
            f"{key}: expected {_described(hint)}, got {value!r} ({type(value).__name__})"
        ) from None


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _in_range(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    choices = limits.get("choices")
    if choices and value not in choices:
        wanted = ", ".join(map(repr, choices))
        raise ConfigError(f"{key}: expected one of {wanted}, got {value!r}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    low, high, above = limits.get("low"), limits.get("high"), limits.get("above")
    ok = (
        math.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    )
    if not ok:
        lower = f"> {above}" if above is not None else f">= {low}" if low is not None else ""
        upper = f"<= {high}" if high is not None else ""
        wanted = " and ".join(part for part in (lower, upper) if part) or "a finite number"
        raise ConfigError(f"{key}: expected a value {wanted}, got {value!r}")


# --------------------------------------------------------------------------- weights and budget


@dataclass(frozen=True)
class Weights:
    """Per-sample weights ε over the original training set: 0 keep, −1 delete, in between soft.

    `eps` is float64 (N,). A retained stream weighs a = max(1 + ε, 0), a forget stream
    r = max(−ε, 0); for ε in {−1, 0} both are the sets.
    """

    eps: Tensor
    source: str = "given"

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.eps).all()):
            raise ConfigError("expected finite weights ε, got a NaN or an infinity")

    @property
    def multiplicity(self) -> Tensor:
        """Times a sample counts when retained: a = max(1 + ε, 0), float64 (N,)."""
        return (1 + self.eps.double()).clamp(min=0)

    @property
    def removal(self) -> Tensor:
        """Share of a sample that is removed: r = max(−ε, 0), float64 (N,)."""
        return (-self.eps.double()).clamp(min=0)

    @property
    def hard(self) -> bool:
        """Whether every ε is 0 or −1, so that the weights are two sets."""
        return bool(((self.eps == 0) | (self.eps == -1)).all())

    @property
    def effective_n(self) -> float:
        """Effective sample size (Σ a)² / Σ a² of the retained multiplicities (Kish 1965)."""
        a = self.multiplicity
        return float(a.sum() ** 2 / (a**2).sum()) if bool((a > 0).any()) else 0.0

    def of(self, index: Tensor) -> Tensor:
        """Return ε of the samples `index` int64 (B,), float64 (B,), on the device of `index`.

        Raises:
            DataError: an index outside the training set that ε is about.
        """
        wrong = index[(index < 0) | (index >= len(self.eps))]
        if len(wrong):
            raise DataError(
                f"expected positions 0..{len(self.eps) - 1} of the training set, got "
                f"{int(wrong[0])}; weights belong to the data they were made for"
            )
        return self.eps.double()[index.to(self.eps.device)].to(index.device)

    def save(self, path: Path) -> None:
        """Write ε to a safetensors file with its source and SHA-256 as metadata."""
        metadata = {"source": self.source, "sha256": self.sha256}
        save_file({"eps": self.eps.double().contiguous()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Weights:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: no such file, or one that is not what was written.
        """
        try:
            with safe_open(path, "pt") as file:
                found = cls(file.get_tensor("eps"), file.metadata()["source"])
                expected = file.metadata()["sha256"]
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise DataError(f"{path}: expected saved weights ε, got {error}") from None
        if found.sha256 != expected:
            raise DataError(f"{path}: expected SHA-256 {expected}, found {found.sha256}")
        return found

    @property
    def sha256(self) -> str:
        """SHA-256 of ε as little-endian float64."""
        return hashlib.sha256(self.eps.double().numpy().astype("<f8").tobytes()).hexdigest()

    def harden(self, threshold: float) -> Weights:
        """Return the set form S_f = {ε ≤ −threshold}, the explicit way out for set-only methods.

        Raises:
            ConfigError: a threshold that is not above 0.
        """
        if not threshold > 0:
            raise ConfigError(f"threshold: expected a number > 0, got {threshold}")
        gone = (self.eps <= -threshold).double()
        return Weights(torch.where(gone > 0, -gone, gone), f"{self.source}, threshold {threshold}")


@dataclass(frozen=True)
class Budget:
    """Upper limits of a run; None is no limit."""

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Past:
    """An earlier request of a sequence: its forget rows, what it noted, the labels it asked for.

    `targets` are int64 (n,), None where the request only asked to forget.
    """

    rows: Rows
    stats: Mapping[str, Any]
    targets: Tensor | None = None


@dataclass(frozen=True)
class Progress:
    """What a progress callback is told: optimiser steps and epochs done, last loss, seconds."""

    steps: int
    epochs: int
    loss: float
    seconds: float
    epoch_end: bool


class Context:
    """Where training steps happen: devices, recipe, seed, limits, and who is told about them.

    `micro_batches` splits every step to save memory (gradient accumulation); without BatchNorm the
    result is the same.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        *,
        accelerator: Any = None,
        budget: Budget | None = None,
        micro_batches: int = 1,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.recipe, self.seed, self.accelerator = recipe, seed, accelerator
        self.micro_batches = micro_batches
        self.budget, self.progress = budget or Budget(), progress
        self.clock = Clock()
        self.steps = self.epochs = 0
        self.losses: list[float] = []
        self.stop_reason: str | None = None

    @property
    def device(self) -> torch.device:
        """The device batches and models are on."""
        found: torch.device = self.accelerator.device if self.accelerator else torch.device("cpu")
        return found

    @property
    def spent(self) -> bool:
        """Whether a limit of the budget is reached; remembered as the stop reason `budget`."""
        limit = self.budget
        spent = (
            (limit.steps is not None and self.steps >= limit.steps)
            or (limit.epochs is not None and self.epochs >= limit.epochs)
            or (limit.seconds is not None and self._late(limit.seconds))
        )
        if spent:
            self.stop_reason = "budget"
        return spent

    def _late(self, seconds: float) -> bool:
        """Return whether any process is out of time, so that all stop at the same step."""
        late = self.clock.seconds >= seconds
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return late
        flag = torch.tensor(float(late), device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def observe(self, model: nn.Module) -> None:
        """Show the model of a step to whoever asked for it; :func:`engine.fit` calls this."""

    def tick(self, loss: float) -> None:
        """Count one optimiser step.

        Raises:
            DivergedError: the loss is not finite.
        """
        if not math.isfinite(loss):
            raise DivergedError(f"loss {loss} at step {self.steps}", step=self.steps, loss=loss)
        self.steps += 1
        self.losses.append(loss)
        self._tell(epoch_end=False)

    def epoch_done(self) -> None:
        """Count one epoch."""
        self.epochs += 1
        self._tell(epoch_end=True)

    def _tell(self, *, epoch_end: bool) -> None:
        if self.progress is None:
            return
        loss = self.losses[-1] if self.losses else math.nan
        told = Progress(self.steps, self.epochs, loss, self.clock.seconds, epoch_end)
        with self.clock.paused():
            self.progress(told)


class UnlearningTask(Context):
    """One request: guarded splits and what a method may need, nothing else.

    A task may be used for many runs; every run works on a clean copy of it. Attributes a method
    reads: `num_classes`, `modality`, `scenario`, `forget_classes` (classes with forget samples and
    no retained ones), `recipe`, `seed`, `generator` (CPU, seeded), `device`, `accelerator`,
    `weights`, `prepared` (what `prepare` returned), `cache` (folder or None), `stats` (what the
    method writes there becomes `Result.stats`). In a sequence :attr:`first_model` and
    :meth:`history` give what went before. A method that corrects labels writes the new ones, int64
    in the order of the forget rows, to `targets`.
    """

    def __init__(
        self,
        *,
        forget: Rows | None,
        retain: Rows | None,
        val: Rows | None = None,
        num_classes: int,
        recipe: Recipe,
        fresh_model: Callable[[int], nn.Module],
        scenario: Scenario = Scenario.RANDOM,
        modality: str = "image",
        weights: Weights | None = None,
        seed: int = 0,
        accelerator: Any = None,
        budget: Budget | None = None,
        micro_batches: int = 1,
        progress: Callable[[Progress], None] | None = None,
        cache: Path | None = None,
        data_fingerprint: str = "",
        first_model: nn.Module | None = None,
        past: Sequence[Past] = (),
        observer: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        super().__init__(
            recipe,
            seed,
            accelerator=accelerator,
            budget=budget,
            micro_batches=micro_batches,
            progress=progress,
        )
        self._rows = {Split.FORGET: forget, Split.RETAIN: retain, Split.VAL: val}
        self._raised: Rows | None = None
        self._fresh, self._first, self._past = fresh_model, first_model, tuple(past)
        self._observer = observer
        self.num_classes, self.scenario, self.modality = num_classes, scenario, modality
        self.weights, self.cache, self.data_fingerprint = weights, cache, data_fingerprint
        self._check()
        self.forget_classes = self._classes_gone()
        self._needs: frozenset[Split] = frozenset()
        self._counter = WorkCounter()
        self.generator = torch.Generator()
        self.prepared: Any = None
        self.stats: dict[str, Any] = {}
        self.targets: Tensor | None = None
        self.handed_on: Weights | None = None
        self.read: dict[Split, int] = {}
        self.frozen: set[str] = set()

    @classmethod
    def from_weights(cls, train: Rows, weights: Weights, **rest: Any) -> UnlearningTask:
        """Return the task whose streams are given by ε: retain {a > 0} weight a, forget {r > 0}.

        Raises:
            ForgetSetError: ε is shorter than the training set it indexes.
        """
        if len(train) and int(train.index.max()) >= len(weights.eps):
            raise ForgetSetError(
                f"expected ε for every training sample, got {len(weights.eps)} values for index "
                f"{int(train.index.max())}; index ε by position in the original training set"
            )
        keep, remove = weights.multiplicity[train.index], weights.removal[train.index]
        retain, forget = torch.nonzero(keep > 0)[:, 0], torch.nonzero(remove > 0)[:, 0]
        task = cls(
            forget=train.subset(forget).weighted(remove[forget]),
            retain=train.subset(retain).weighted(keep[retain]),
            weights=weights,
            **rest,
        )
        raised = torch.nonzero(keep > 1)[:, 0]
        if len(raised):
            task._raised = train.subset(raised).weighted(1 - keep[raised])
        return task

    # -- data

    def loader(
        self,
        split: Split | Literal["forget", "retain", "val"],
        *,
        train: bool = True,
        batch_size: int | None = None,
        shuffle: bool | None = None,
    ) -> Loader:
        """Open a split: `train` shuffles and augments as the recipe does, else neither.

        Raises:
            SplitAccessError: the method did not declare the split in `needs`.
        """
        loader = self.loader_over(
            self._open(Split(split)),
            str(split),
            train=train,
            batch_size=batch_size,
            shuffle=train if shuffle is None else shuffle,
        )
        loader.on_batch = lambda batch: self._count(Split(split), int((batch.weight > 0).sum()))
        return loader

    def changed(self, *, batch_size: int | None = None) -> Loader:
        """Open the samples whose weight changes: weight −ε, positive where it falls.

        For sets, and where no weight rises, this is the forget loader to the bit.

        Raises:
            SplitAccessError: the method did not declare the forget split in `needs`.
        """
        loader = self.loader("forget", batch_size=batch_size)
        if self._raised is not None:
            loader.rows = loader.rows.merged(self._raised)
            loader.on_batch = lambda batch: self._count(Split.FORGET, len(batch))
        return loader

    def loader_over(
        self,
        rows: Rows,
        name: str,
        *,
        train: bool = True,
        batch_size: int | None = None,
        shuffle: bool = True,
    ) -> Loader:
        """Return a loader over rows made from opened splits; `name` seeds its order."""
        return Loader(
            rows,
            batch_size or self.recipe.batch_size,
            seed=self.seed,
            name=name,
            shuffle=shuffle,
            augment=self.recipe.augment if train else "none",
            rank=self.accelerator.process_index if self.accelerator else 0,
            world=self.accelerator.num_processes if self.accelerator else 1,
            device=self.device,
        )

    def rows(self, split: Split | Literal["forget", "retain", "val"]) -> Rows:
        """Return the rows of a declared split.

        Raises:
            SplitAccessError: the method did not declare the split in `needs`.
        """
        rows = self._open(Split(split))
        first = self.accelerator is None or self.accelerator.process_index == 0
        self._count(Split(split), len(rows) if first else 0)  # every process gets the same rows
        return rows

    def promise_frozen(self, names: Iterable[str]) -> None:
        """Promise that the state entries `names` come back bit-identical; the base holds it."""
        self.frozen |= set(names)

    def label_counts(self, split: Split | Literal["forget", "retain", "val"]) -> Tensor:
        """Return the number of rows of every class in a split, int64 (K,); not an opening."""
        rows = self._rows[Split(split)]
        labels = torch.empty(0, dtype=torch.int64) if rows is None else rows.labels
        return torch.bincount(labels, minlength=self.num_classes)

    def samples(self, split: Split | Literal["forget", "retain", "val"]) -> tuple[Tensor, Tensor]:
        """Return which samples a split holds, (index, labels) int64 (n,); not an opening."""
        rows = self._rows[Split(split)]
        empty = torch.empty(0, dtype=torch.int64)
        return (empty, empty) if rows is None else (rows.index, rows.labels)

    def warn(self, message: str) -> None:
        """Tell the user something about the request; it is kept as `stats["warnings"]`."""
        known = self.stats.get("warnings", [])
        if message not in known:
            self.stats["warnings"] = [*known, message]

    def size(self, split: Split | Literal["forget", "retain", "val"]) -> int:
        """Return the number of rows of a split; not an opening."""
        rows = self._rows[Split(split)]
        return 0 if rows is None else len(rows)

    def fresh_model(self) -> nn.Module:
        """Return the backbone as it was before training, initialised from the task's seed."""
        model = self._fresh(derive(self.seed, "init")).to(self.device)
        self._counter.watch(model)
        return model

    @property
    def first_model(self) -> nn.Module | None:
        """A copy of the model before the first request of a sequence; None outside of one."""
        if self._first is None:
            return None
        model = copy.deepcopy(self._first).to(self.device)
        self._counter.watch(model)
        return model

    @property
    def sequential(self) -> bool:
        """Whether the request belongs to a sequence."""
        return self._first is not None

    @property
    def round(self) -> int:
        """Number of requests of the sequence that went before."""
        return len(self._past)

    def history(self) -> tuple[Past, ...]:
        """Open the earlier forget sets of a sequence; it is noted in `stats` that they were.

        Raises:
            SplitAccessError: the method did not declare the forget split in `needs`.
        """
        self._open(Split.FORGET)
        self._count(Split.FORGET, sum(len(past.rows) for past in self._past))
        self.stats["history_opened"] = len(self._past)
        return self._past

    def observe(self, model: nn.Module) -> None:
        """Show the model of a step to the runner's observer, outside the clock and the counts."""
        if self._observer is None:
            return
        with self.clock.paused(), self._counter.paused(), sealed(0):
            self._observer(model, self.steps)

    @contextlib.contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Count the forward passes of a model that `prepare` made, while the body runs."""
        self._counter.watch(model)
        try:
            yield
        finally:
            self._counter.forget(model)

    def delegate(
        self, method: UnlearningMethod, model: nn.Module, weights: Weights
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Hand the request on to another method as weights ε; return its model and its stats.

        The training rows of this task become the weighted streams of the other one: only splits
        that the caller declared are opened. Steps, work and reads are added up here, and what is
        left of the budget holds there.

        Raises:
            DivergedError: the other method diverged.
            UnscError: it does not accept such a request.
        """
        self.handed_on = weights
        before, rows = self._counter.samples, self.training_rows()
        told, seen = self.progress, self._observer
        scenario = Scenario.WEIGHTED if method.supports_weights else Scenario.RANDOM
        task = UnlearningTask.from_weights(
            rows,
            weights,
            val=self._rows[Split.VAL] if Split.VAL in self._needs else None,
            num_classes=self.num_classes,
            recipe=self.recipe,
            fresh_model=self._fresh,
            scenario=scenario,
            modality=self.modality,
            accelerator=self.accelerator,
            budget=self._left(),
            micro_batches=self.micro_batches,
            progress=None if told is None else self._outside(told),
            cache=self.cache,
            data_fingerprint=self.data_fingerprint,
            observer=None if seen is None else self._outside(seen),
        )
        result = method.unlearn(model, task, self.seed)
        self._counter.samples = before + result.work
        self.steps, self.epochs = self.steps + result.steps, self.epochs + result.epochs
        self.losses += result.losses
        self._count(Split.RETAIN, sum(result.read.get(s, 0) for s in (Split.FORGET, Split.RETAIN)))
        if Split.VAL in result.read:
            self._count(Split.VAL, result.read[Split.VAL])
        if result.status == "diverged":
            raise DivergedError(f"{method.name}: {result.reason}", step=self.steps)
        self.stop_reason = "budget" if result.status == "budget" else self.stop_reason
        return result.model.train(), dict(result.stats)

    def training_rows(self) -> Rows:
        """Open the retain set, and the forget set if there is one, in the order of the data."""
        rows = self.rows("retain")
        if self.size("forget"):
            rows = rows.merged(self.rows("forget"))
        return rows.subset(torch.argsort(rows.index)).weighted(torch.ones(len(rows)))

    def _left(self) -> Budget:
        """Return what is left of the budget, at least nothing."""
        limit = self.budget
        return Budget(
            None if limit.steps is None else max(limit.steps - self.steps, 0),
            None if limit.epochs is None else max(limit.epochs - self.epochs, 0),
            None if limit.seconds is None else max(limit.seconds - self.clock.seconds, 0.0),
        )

    def _outside(self, call: Callable[..., None]) -> Callable[..., None]:
        """Return `call`, outside of this task's clock."""

        def called(*args: Any) -> None:
            with self.clock.paused():
                call(*args)

        return called

    # -- the base's side

    @property
    def work(self) -> int:
        """Samples forwarded so far: without gradient × 1, with gradient × 3."""
        return self._counter.samples

    def guarded(self, needs: frozenset[Split], seed: int) -> UnlearningTask:
        """Return a clean copy for one run that opens the splits in `needs` only."""
        task = copy.copy(self)
        task._needs, task.seed = needs, seed
        task._counter, task.clock = WorkCounter(), Clock()
        task.generator = torch.Generator().manual_seed(derive(seed, "method"))
        task.steps = task.epochs = 0
        task.losses, task.stats, task.read, task.frozen = [], {}, {}, set()
        task.stop_reason = task.prepared = task.targets = task.handed_on = None
        return task

    def counts(self, prepared: Prepared | None) -> tuple[int, dict[Split, int]]:
        """Return work and samples read, `prepare` included, summed over all processes."""
        local = [self.work + (prepared.work if prepared else 0)]
        local += [self.read.get(split, -1) for split in Split]
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            mine = torch.tensor(local, dtype=torch.float64).to(self.device)
            local = [int(value) for value in self.accelerator.reduce(mine, reduction="sum")]
        read = {split: count for split, count in zip(Split, local[1:], strict=True) if count >= 0}
        return local[0], read

    def take(self, prepared: Prepared) -> None:
        """Go on where `prepare` ended: its state, promises, notes and reads."""
        self.prepared = prepared.state
        self.frozen |= prepared.frozen
        self.stats.update(prepared.stats)
        self.read.update(prepared.read)

    def fingerprint(self) -> str:
        """Return the SHA-256 of what `prepare` may depend on: rows, labels, weights, recipe."""
        parts = {
            str(split): [
                hashlib.sha256(column.numpy().tobytes()).hexdigest()
                for column in (rows.index, rows.labels, rows.weight)
            ]
            for split, rows in self._rows.items()
            if rows is not None
        }
        first = None if self._first is None else state_sha256(self._first)
        past = [
            [past.rows.index.tolist(), None if past.targets is None else past.targets.tolist()]
            for past in self._past
        ]
        known = [parts, self.recipe, self.data_fingerprint, str(self.scenario), first, past]
        return fingerprint(known)

    def _open(self, split: Split) -> Rows:
        rows = self._rows[split]
        if split not in self._needs or rows is None:
            declared = ", ".join(sorted(self._needs)) or "none"
            raise SplitAccessError(
                f"split {split} opened, declared needs: {declared}; add {split} to `needs`"
            )
        self._count(split, 0)
        return rows

    def _count(self, split: Split, samples: int) -> None:
        self.read[split] = self.read.get(split, 0) + samples

    def _classes_gone(self) -> frozenset[int]:
        forget, retain = self.label_counts(Split.FORGET), self.label_counts(Split.RETAIN)
        return frozenset(torch.nonzero((forget > 0) & (retain == 0))[:, 0].tolist())

    def _check(self) -> None:
        for split, rows in self._rows.items():
            if rows is not None and len(rows) and int(rows.labels.min()) < 0:
                raise ForgetSetError(
                    f"expected labels from 0 on, got label {int(rows.labels.min())} in {split}"
                )
            if rows is not None and len(rows) and int(rows.labels.max()) >= self.num_classes:
                raise ForgetSetError(
                    f"expected labels below {self.num_classes} (num_classes), got label "
                    f"{int(rows.labels.max())} in {split}"
                )
        forget, retain = self._rows[Split.FORGET], self._rows[Split.RETAIN]
        if forget is not None and len(torch.unique(forget.index)) < len(forget):
            raise ForgetSetError("the forget set names a sample twice; name every sample once")
        if forget is not None and retain is not None and self.weights is None:
            both = set(forget.index.tolist()) & set(retain.index.tolist())
            if both:
                raise ForgetSetError(
                    f"{len(both)} samples are in the forget set and in the retain set "
                    f"(first: {min(both)}); a sample belongs to one of them"
                )


# --------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Prepared:
    """What `prepare` computed, for which model and request, and what it cost.

    `frozen`, `stats` and `read` are what it promised, noted and read.
    """

    state: Any
    fingerprint: str
    seconds: float
    work: int
    frozen: frozenset[str]
    stats: Mapping[str, Any]
    read: Mapping[Split, int]


@dataclass(frozen=True)
class Result:
    """An unlearned model and what it cost.

    `targets` are the labels that a correction asked for, in the order of the forget rows;
    `weights` those that the method handed on to another one.
    `seconds_prepare` and `seconds_unlearn` leave callbacks out; `peak_bytes` is None where it
    cannot be read; `work` counts samples forwarded (× 3 with gradient). `status` is `ok`, `budget`
    (a limit ended the run) or `diverged` (then `model` is the original for inspection).
    """

    model: nn.Module
    status: Literal["ok", "budget", "diverged"]
    reason: str | None
    seconds_prepare: float
    seconds_unlearn: float
    peak_bytes: int | None
    work: int
    steps: int
    epochs: int
    losses: tuple[float, ...]
    read: Mapping[Split, int]
    stats: Mapping[str, Any]
    targets: Tensor | None = None
    weights: Weights | None = None

    @property
    def cost(self) -> dict[str, float]:
        """What a record keeps: seconds, work, steps, epochs, and the peak where it is known."""
        found: dict[str, float] = {
            "seconds_prepare": self.seconds_prepare,
            "seconds_unlearn": self.seconds_unlearn,
            "work": self.work,
            "steps": self.steps,
            "epochs": self.epochs,
        }
        return found if self.peak_bytes is None else found | {"peak_bytes": self.peak_bytes}


class UnlearningMethod(abc.ABC):
    """Base of all methods; see the module's text. Class data say what a method is held to.

    `parts` are the methods that settings of type :class:`MethodRef` name, made by the registry.
    `optional` lists splits of `needs` that may be missing or empty; `identity`: returns the model
    as it is; `deterministic`: the seed changes nothing; `control`: a negative control of boards;
    `expected_failures`: conformance checks that do not hold, with the reason.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Split]]
    scenarios: ClassVar[frozenset[Scenario]]
    supports_weights: ClassVar[bool] = False
    optional: ClassVar[frozenset[Split]] = frozenset()
    identity: ClassVar[bool] = False
    deterministic: ClassVar[bool] = False
    control: ClassVar[bool] = False
    expected_failures: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
    Config: ClassVar[type] = NoConfig

    def __init__(self, **settings: Any) -> None:
        self.config = build_config(self.Config, settings)
        self.parts: dict[str, UnlearningMethod] = {}

    @property
    def opens(self) -> frozenset[Split]:
        """Splits that a run with this configuration may open: `needs`, or fewer."""
        return self.needs

    @abc.abstractmethod
    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Unlearn on `model`, a private copy on the task's device, and return the model."""

    def prepare(self, model: nn.Module, task: UnlearningTask) -> Any:
        """Compute what need not be repeated (masks, subspaces); found as `task.prepared`."""
        return None

    def diagnose(self, model: nn.Module, task: UnlearningTask) -> Mapping[str, Any]:
        """Return what can be known before a single step: a `table` of rows, `warnings`, notes.

        Raises:
            NotApplicable: the method has no such diagnosis.
        """
        raise NotApplicable(f"{self.name} has no pre-flight diagnosis")

    @classmethod
    def search_space(cls) -> dict[str, tuple[float, float, str]]:
        """Return (low, high, scale) of every setting that a tuner may search."""
        fields = dataclasses.fields(cls.Config)
        return {f.name: f.metadata["search"] for f in fields if f.metadata.get("search")}

    @final
    def prepared(self, model: nn.Module, task: UnlearningTask, seed: int) -> Prepared:
        """Run `prepare` alone, to be handed to several :meth:`unlearn` calls.

        Raises:
            UnscError: the request is one that the method does not accept.
        """
        self._accept(task, seed)
        return self._prepare(model, task, seed, self._mark(model, task, seed))

    @final
    def preflight(self, model: nn.Module, task: UnlearningTask, seed: int) -> Mapping[str, Any]:
        """Run :meth:`diagnose` alone, on a private copy and with guarded splits.

        Raises:
            UnscError: the request is one that the method does not accept.
        """
        self._accept(task, seed)
        guarded = task.guarded(self.opens, seed)
        with sealed(seed):
            return self.diagnose(self._private(model, guarded), guarded)

    @final
    def unlearn(
        self, model: nn.Module, task: UnlearningTask, seed: int, prepared: Prepared | None = None
    ) -> Result:
        """Return an unlearned copy of `model`; the model and all global state stay as they are.

        Raises:
            ScenarioNotSupported: the method does not accept this kind of request.
            WeightsNotSupported: soft weights for a method that only knows sets.
            ForgetSetError: an empty forget set, or a needed split is missing.
            ArchitectureChanged: the method returned a model with another state.
            FrozenChanged: weights that the method promised to leave alone have moved.
            ConfigError: `prepared` belongs to another model, request, seed or configuration.
        """
        self._accept(task, seed)
        if prepared is not None and prepared.fingerprint != self._mark(model, task, seed):
            raise ConfigError(
                "prepared state belongs to another model, request, seed or configuration; call "
                "prepared() with the same arguments"
            )
        memory = PeakMemory(task.device)
        guarded = task.guarded(self.opens, seed)
        try:
            prepared = prepared or self._prepare(model, task, seed, "")
            guarded.take(prepared)
            with sealed(seed):
                private = self._private(model, guarded)
                guarded.clock = Clock()
                unlearned = self._sound(self.run(private, guarded), model)
            status, reason = ("budget", "budget") if guarded.stop_reason else ("ok", None)
        except DivergedError as error:
            status, reason, unlearned = "diverged", str(error), copy.deepcopy(model)
        seconds, peak = guarded.clock.seconds, memory.bytes
        guarded._counter.forget(unlearned)
        self._restore(unlearned, model)
        self._hold_promise(unlearned, model, guarded.frozen)
        work, read = guarded.counts(prepared)
        return Result(
            model=unlearned,
            status=typing.cast(Any, status),
            reason=reason,
            seconds_prepare=prepared.seconds if prepared else 0.0,
            seconds_unlearn=seconds,
            peak_bytes=peak,
            work=work,
            steps=guarded.steps,
            epochs=guarded.epochs,
            losses=tuple(guarded.losses),
            read=read,
            stats=guarded.stats,
            targets=guarded.targets,
            weights=guarded.handed_on,
        )

    def _accept(self, task: UnlearningTask, seed: int) -> None:
        if seed < 0:
            raise ConfigError(f"seed: expected 0 or more, got {seed}")
        if task.scenario not in self.scenarios:
            known = ", ".join(sorted(self.scenarios))
            raise ScenarioNotSupported(
                f"{self.name} does not accept scenario {task.scenario}; it supports: {known}"
            )
        if task.weights is not None and not task.weights.hard and not self.supports_weights:
            raise WeightsNotSupported(
                f"{self.name} knows sets only, got soft weights; harden them explicitly with "
                "forget.threshold (Weights.harden): S_f = {ε <= -τ}"
            )
        required = set(self.opens - self.optional)
        if task.weights is None and task._rows[Split.FORGET] is not None:
            required.add(Split.FORGET)
        for split in sorted(required):
            if not task.size(split):
                found = "none" if task._rows[split] is None else "an empty one"
                raise ForgetSetError(f"{self.name} needs split {split}, got {found}; provide it")

    def _private(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        warm_up()
        private = copy.deepcopy(model).to(task.device)
        private.train()
        task._counter.watch(private)
        return private

    def _prepare(self, model: nn.Module, task: UnlearningTask, seed: int, mark: str) -> Prepared:
        """Run `prepare` on a copy and a task of its own, so that only its state is left."""
        guarded = task.guarded(self.opens, seed)
        if type(self).prepare is UnlearningMethod.prepare:
            return Prepared(None, mark, 0.0, 0, frozenset(), {}, {})
        with sealed(seed):
            private = self._private(model, guarded)
            guarded.clock = Clock()
            state = self.prepare(private, guarded)
        seconds, frozen = guarded.clock.seconds, frozenset(guarded.frozen)
        return Prepared(state, mark, seconds, guarded.work, frozen, guarded.stats, guarded.read)

    def _mark(self, model: nn.Module, task: UnlearningTask, seed: int) -> str:
        settings = dataclasses.asdict(self.config)
        return fingerprint([self.name, settings, state_sha256(model), task.fingerprint(), seed])

    def _hold_promise(self, unlearned: nn.Module, original: nn.Module, names: set[str]) -> None:
        after, before = unlearned.state_dict(), original.state_dict()
        unknown = sorted(names - before.keys())
        if unknown:
            raise ConfigError(
                f"{self.name} promised to leave {unknown[0]!r} alone, which is no state entry; "
                "promise names of model.state_dict()"
            )
        moved = [n for n in sorted(names) if not torch.equal(after[n].cpu(), before[n].cpu())]
        if moved:
            raise FrozenChanged(
                f"{self.name} promised to leave {len(names)} state entries alone, but "
                f"{len(moved)} moved (first: {moved[0]}); exclude them from the optimiser"
            )

    def _sound(self, unlearned: Any, original: nn.Module) -> nn.Module:
        if not isinstance(unlearned, nn.Module):
            raise ArchitectureChanged(
                f"{self.name}.run must return the model, got {type(unlearned).__name__}"
            )
        spoiled = first_non_finite(unlearned, original)
        if spoiled:
            raise DivergedError(f"{spoiled} is not finite after the run")
        return unlearned

    def _restore(self, unlearned: nn.Module, original: nn.Module) -> None:
        found = {name: (t.shape, t.dtype) for name, t in unlearned.state_dict().items()}
        expected = {name: (t.shape, t.dtype) for name, t in original.state_dict().items()}
        if found != expected:
            changed = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            raise ArchitectureChanged(
                f"{self.name} returned a model whose state differs in {', '.join(changed[:3])}; "
                "names, shapes and dtypes must stay as they were"
            )
        wanted = {name: p.requires_grad for name, p in original.named_parameters()}
        for name, parameter in unlearned.named_parameters():
            parameter.requires_grad_(wanted.get(name, True))
            parameter.grad = None
        unlearned.eval()


# --------------------------------------------------------------------------- the function form


def from_function(
    function: Callable[..., nn.Module],
    name: str,
    *,
    scenarios: frozenset[Scenario],
    supports_weights: bool = False,
    deterministic: bool = False,
) -> type[UnlearningMethod]:
    """Return the method class of `function(model, retain, forget, val=None, *, ctx, ...)`.

    Parameters named `retain`, `forget` and `val` are loaders and make up `needs`; `ctx`, if there,
    is the task; all other parameters must have a default and become settings.

    Raises:
        ConfigError: the first parameter is not the model, or a setting has no default.
    """
    parameters = dict(inspect.signature(function).parameters)
    splits = [split for split in Split if str(split) in parameters]
    others = [p for key, p in parameters.items() if key not in {*map(str, splits), "model", "ctx"}]
    empty = inspect.Parameter.empty
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    wrong = [
        p.name
        for p in others
        if p.default is empty or p.kind in kinds or isinstance(p.default, (list, dict, set))
    ]
    if "model" not in parameters or wrong:
        raise ConfigError(
            f"{name}: expected (model, retain, forget, val=None, *, ctx, setting=default), got "
            f"({', '.join(map(str, parameters.values()))})"
            + (f"; {wrong[0]!r} needs a default that is not mutable" if wrong else "")
        )
    hints = typing.get_type_hints(function)
    config = dataclasses.make_dataclass(
        "Config",
        [
            (p.name, hints.get(p.name, _type_of(p.default)), option(p.default, "setting"))
            for p in others
        ],
        frozen=True,
    )

    def run(self: UnlearningMethod, model: nn.Module, task: UnlearningTask) -> nn.Module:
        inputs: dict[str, Any] = {
            str(split): task.loader(split) if task.size(split) else None for split in splits
        }
        if "ctx" in parameters:
            inputs["ctx"] = task
        return function(model, **inputs, **dataclasses.asdict(self.config))

    body = {
        "name": name,
        "needs": frozenset(splits),
        "optional": frozenset(s for s in splits if parameters[str(s)].default is None),
        "scenarios": scenarios,
        "supports_weights": supports_weights,
        "deterministic": deterministic,
        "Config": config,
        "run": run,
        "function": staticmethod(function),  # what its author wrote, for reading and hashing
        "__doc__": function.__doc__,
        "__module__": function.__module__,
    }
    return types.new_class(
        f"{name}_method", (UnlearningMethod,), {}, lambda names: names.update(body)
    )


def _type_of(default: Any) -> Any:
    return Any if default is None else type(default)
