"""Null-space calibration: forget by training on the forget data, where retained data see nothing.

Chen, Zhu, Yu, Zhou, *Machine Unlearning via Null Space Calibration*, IJCAI 2024, arXiv 2404.13588.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from unsc_plugin import engine, hooks
from unsc_plugin.errors import DivergedError, NonFiniteError, RequestError
from unsc_plugin.hooks import View
from unsc_plugin.method import (
    Batch,
    Loader,
    Scenario,
    Split,
    UnlearningMethod,
    UnlearningTask,
    state_sha256,
)
from unsc_plugin.methods import _gram_store as store
from unsc_plugin.methods import _null_space as null_space
from unsc_plugin.methods._capture import widened
from unsc_plugin.methods._gram_store import Known
from unsc_plugin.methods._null_space import Layer, Subspaces
from unsc_plugin.methods._unsc_settings import Settings

SIGNIFICANT = 6
"""Digits of the numbers in `stats`."""


class UNSC(UnlearningMethod):
    """Train the forget data towards labels of what remains; updates stay in the null space.

    With X the retained inputs of a layer Y = W X, G = X Xᵀ, U the class-balanced subspace that
    keeps the share `eps` of every retained class's energy and P = I − U Uᵀ: every update is ΔW P,
    so that ‖ΔW P X‖ ≤ ‖ΔW‖₂·√(tr G − tr UᵀGU); for eps = 1 retained logits do not change, but for
    what directions with less than 1e-12 of the energy carry.
    Biases, norms and embeddings stay. Targets: argmax over the remaining classes of the original
    logits for samples of forgotten classes; for single instances, the confidences of validation
    data (`instance_label`). Training ends when `stop_at` of the forget samples keep their label.

    Chen et al., *Machine Unlearning via Null Space Calibration* (IJCAI 2024, arXiv 2404.13588). The
    retained data are read once: Gram matrices are stored, and later requests on the same model (or
    on the unlearned one) add and subtract them. `unsc.reference`: the published recipe.
    """

    Config = Settings
    name = "unsc"
    needs = frozenset({Split.FORGET, Split.RETAIN, Split.VAL})
    optional = frozenset({Split.RETAIN, Split.VAL})
    scenarios = frozenset({Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.SEQUENTIAL})
    config: Settings

    @property
    def opens(self) -> frozenset[Split]:
        """Retained data for subspaces, validation data for matched targets."""
        config = self.config
        matched = config.label == "pseudo" and config.instance_label == "matched"
        retain = {Split.RETAIN} if config.projection else set()
        return frozenset({Split.FORGET, *retain, *({Split.VAL} if matched else ())})

    def prepare(self, model: nn.Module, task: UnlearningTask) -> Subspaces | None:
        """Return the subspaces, from the store or by one pass over the data; None without them."""
        if not self.config.projection:
            null_space.classes_gone(task)
            return None
        started = time.perf_counter()
        found = null_space.prepare(model, task, self.config)
        entry = found.known.entry
        task.stats["subspaces"] = {
            "source": found.source,
            "seconds_capture_cold": entry.seconds,
            "seconds_here": time.perf_counter() - started,
            "samples_read": {str(split): count for split, count in task.read.items()},
            "energy_scope": _scope(found),
            "coverage": _short(null_space.coverage(model, found)),
            "layers": [_rounded(row) for row in null_space.table(found)],
            "frozen_layers": found.frozen,
        }
        return found

    def diagnose(self, model: nn.Module, task: UnlearningTask) -> dict[str, Any]:
        """Return the pre-flight table: what every layer leaves free, before a single step.

        d columns wide, rank r of the retained data, free = d − r, the least energy share of any
        retained class, φ = tr(NᵀG_F N)/tr G_F of the forget data, contrast φ/(1 − least share).

        Raises:
            RequestError: `projection` is off, so there are no subspaces.
        """
        if self.prepare(model, task) is None:
            raise RequestError("unsc: nothing to diagnose without subspaces; set projection=true")
        noted = dict(task.stats["subspaces"])
        return {
            "table": noted.pop("layers"),
            "warnings": task.stats.get("warnings", []),
            **{key: noted[key] for key in ("source", "energy_scope", "coverage", "frozen_layers")},
        }

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model after null-space steps on the forget data."""
        config, found = self.config, task.prepared
        dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
            model.float()
        cast = model.register_forward_pre_hook(_widened, prepend=True, with_kwargs=True)
        gone = found.gone if found else null_space.classes_gone(task)
        targets = Targets.of(model, task, config, gone)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained = _trainable(model, found, config)
        task.promise_frozen(before.keys() - trained)
        trainer = _Trainer(model, task, config, targets, found, before)
        try:
            trainer.fit()
        finally:
            cast.remove()
        for name, tensor in _tensors(model):
            _cast_back(model, name, tensor, dtypes[name])
        task.stats |= {"targets": targets.summary(), "stop": trainer.stop}
        if found is not None:
            self._certify(found, before, model, task)
        return model

    def _certify(
        self,
        found: Subspaces,
        before: Mapping[str, Tensor],
        model: nn.Module,
        task: UnlearningTask,
    ) -> None:
        """Put the certificate into the stats and record where the model's Gram matrices lie."""
        after = model.state_dict()
        certificate = null_space.certify(found, before, after)
        task.stats["certificate"] = {
            "drift": _short(certificate.drift),
            "buckets": list(certificate.buckets),
            "delta": {k: [_short(v) for v in row] for k, row in certificate.delta.items()},
            "bound": {k: [_short(v) for v in row] for k, row in certificate.bound.items()},
        }
        if found.store is not None and all(bool(torch.isfinite(t).all()) for t in after.values()):
            if engine.rank(task.accelerator) == 0:
                _keep(found, found.store.sibling(state_sha256(model)), certificate, self.config)
            engine.barrier(task.accelerator)


def _scope(found: Subspaces) -> str:
    count = len(set(found.buckets))
    return "class" if count == len(found.buckets) else f"bucket({count})"


def _short(value: float) -> float | None:
    """Return the number with few digits; None, as JSON has no infinity, where it has no value."""
    return float(f"{value:.{SIGNIFICANT}g}") if math.isfinite(value) else None


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _short(v) if isinstance(v, float) else v for k, v in row.items()}


def _widened(model: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give inputs the precision of the weights, which may be wider than the model came in."""
    return args, widened(inputs, model)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return all parameters and buffers, those that no state dict holds included."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]


def _cast_back(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype == dtype:
        return
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    held = module._parameters.get(attribute)
    if held is not None:
        held.data = held.data.to(dtype)
    else:
        module._buffers[attribute] = tensor.to(dtype)


def _trainable(model: nn.Module, found: Subspaces | None, config: Settings) -> set[str]:
    """Let gradients reach what may move, nothing else; return the state entries that may move."""
    parameters = dict(model.named_parameters())
    if config.trainable == "all":
        return {name for name in model.state_dict() if name in _aliases(model, set(parameters))}
    if found is None:
        views, _ = hooks.views(model, config.include, config.exclude, max_dim=config.max_dim)
        moving = {view.parameter for view in views}
    else:
        moving = set(found.layers)
        moving |= {
            layer.view.bias
            for layer in found.layers.values()
            if layer.scale is not None and layer.view.bias is not None
        }
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in moving)
    return _aliases(model, moving)


def _aliases(model: nn.Module, names: set[str]) -> set[str]:
    """Return all names under which the parameters `names` are in the state."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = {id(parameters[name]) for name in names}
    return {name for name, parameter in parameters.items() if id(parameter) in chosen}


def _keep(
    found: Subspaces,
    mine: store.Store,
    certificate: null_space.Certificate,
    config: Settings,
) -> None:
    """Write the lineage of the unlearned model, without the forgotten data if `purge`."""
    known, entry = found.known, found.known.entry
    count = len(next(iter(entry.moments.values())).count)
    bounds = {
        name: [dict(zip(certificate.buckets, row, strict=True)).get(b, 0.0) for b in range(count)]
        for name, row in certificate.bound.items()
    }
    gone = torch.cat([known.gone, found.forget]).sort().values
    samples = entry.samples.without(gone)
    taken = {
        name: found.leaving[name].plus(known.taken[name])
        if name in known.taken and name in found.leaving
        else (found.leaving.get(name) or known.taken[name])
        for name in {*known.taken, *found.leaving}
    }
    if config.purge:
        entry = store.rewrite(entry, _purged(found, samples))
        gone, taken = gone[:0], {}
    mine.write_lineage(Known(entry, gone, taken, bounds, anchored=False), samples)
    if not config.keep_anchor:
        store.drop_anchor(entry)


def _purged(found: Subspaces, samples: store.Samples) -> store.Entry:
    """Return the entry without any statistics of forgotten samples."""
    entry = found.known.entry
    moments = {}
    for name, held in entry.moments.items():
        moments[name] = store.Moments.zeros(len(held.count), *held.total.shape[1:])
        for bucket in found.weights:
            moments[name].put(bucket, found.gram(name, bucket))
    drawn = entry.drawn
    if drawn is not None:
        drawn = drawn[torch.isin(drawn, samples.index)]
    return store.Entry(samples, moments, entry.frozen, drawn, entry.keep_padding, entry.seconds)


# --------------------------------------------------------------------------- targets


@dataclass
class Targets:
    """What the forget samples are trained towards, by their index.

    `index` int64 (n,) rising; `own` their labels; `hard` the target class, −1 where it is soft;
    `soft` (n, K) or None; `expected` the mean own-class probability that soft targets ask for.
    """

    index: Tensor
    own: Tensor
    hard: Tensor
    soft: Tensor | None
    expected: float
    allowed: Tensor
    random: bool

    @classmethod
    def of(
        cls, model: nn.Module, task: UnlearningTask, config: Settings, gone: frozenset[int]
    ) -> Targets:
        """Return the targets from the logits of `model`, the model as it was handed in.

        Raises:
            NonFiniteError: a logit is not finite.
            RequestError: no validation data where they are needed.
        """
        rows = task.rows(Split.FORGET)
        logits = _logits(model, rows, task, "forget")
        allowed = torch.ones(task.num_classes, dtype=torch.bool)
        allowed[list(gone)] = False
        own = rows.labels
        stays = allowed[own]
        masked = logits.masked_fill(~allowed, -math.inf)
        hard = masked.argmax(1)
        soft, expected = None, 0.0
        runner_up = masked.scatter(1, own[:, None], -math.inf)
        if bool(stays.any()) and int(allowed.sum()) < 2:
            raise RequestError(
                "unsc: one class is left and its own samples are to be forgotten, so there is no "
                "other label to train towards"
            )
        if config.instance_label == "runner_up" or config.label == "random":
            hard = torch.where(stays, runner_up.argmax(1), hard)
        elif bool(stays.any()):
            share = _matched(masked[stays], runner_up[stays], own[stays], model, task, allowed)
            hard = torch.where(stays, torch.full_like(hard, -1), hard)
            soft = functional.one_hot(hard.clamp(min=0), task.num_classes).float()
            soft[stays] = share
            expected = float(share.gather(1, own[stays][:, None]).mean())
        order = torch.argsort(rows.index)
        return cls(
            rows.index[order], own[order], hard[order], None if soft is None else soft[order],
            expected, allowed, config.label == "random",
        )  # fmt: skip

    def redraw(self, generator: torch.Generator) -> None:
        """Draw labels uniformly from what is left, another than the own one: a control."""
        count = int(self.allowed.sum())
        classes = torch.nonzero(self.allowed)[:, 0]
        stays = self.allowed[self.own]
        place = torch.searchsorted(classes, self.own)
        free = torch.randint(0, count, self.own.shape, generator=generator)
        other = torch.randint(0, max(count - 1, 1), self.own.shape, generator=generator)
        other = other + (other >= place).long()
        self.hard = classes[torch.where(stays, other.clamp(max=count - 1), free)]

    def at(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return (hard targets, soft targets or None) of a batch's rows, on its device."""
        place = torch.searchsorted(self.index, batch.index.cpu())
        hard = self.hard[place].to(batch.labels.device)
        return hard, None if self.soft is None else self.soft[place].to(batch.labels.device)

    def summary(self) -> dict[str, Any]:
        """Return the histogram of hard targets and the number and mean of soft ones."""
        held = self.hard[self.hard >= 0]
        counts = torch.bincount(held, minlength=len(self.allowed)).tolist()
        return {
            "hard": {str(label): count for label, count in enumerate(counts) if count},
            "soft": int((self.hard < 0).sum()),
            "expected_own_probability": _short(self.expected),
        }


def _logits(model: nn.Module, rows: Any, task: UnlearningTask, name: str) -> Tensor:
    logits = engine.predict(model, rows).logits
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(f"unsc: logits of the {name} data are not finite; check the model")
    found: Tensor = engine.broadcast(logits, task.accelerator)
    return found


def _matched(
    masked: Tensor,
    runner_up: Tensor,
    own: Tensor,
    model: nn.Module,
    task: UnlearningTask,
    allowed: Tensor,
) -> Tensor:
    """Return soft targets (n, K) with the own-class confidences of validation data.

    Sorted by the margin z_y − max_{k≠y} z_k, the sample of rank j of n gets q = the validation
    data's true-class probability at the quantile (j + ½)/n on y and (1 − q)·softmax(z without y)
    elsewhere; classes that are gone get 0.

    Raises:
        RequestError: no validation data of the classes that stay.
    """
    if not task.size(Split.VAL):
        raise RequestError(
            "unsc: instance_label=matched reads confidences from the val split, which is empty; "
            "give a val split, or set instance_label=runner_up"
        )
    val = task.rows(Split.VAL)
    val = val.subset(allowed[val.labels])
    if not len(val):
        raise RequestError(
            "unsc: no val sample is of a class that stays; set instance_label=runner_up"
        )
    logits = _logits(model, val, task, "val").masked_fill(~allowed, -math.inf)
    known = logits.softmax(1).gather(1, val.labels[:, None])[:, 0].sort().values
    margin = masked.gather(1, own[:, None])[:, 0] - runner_up.max(1).values
    count = len(margin)
    rank = torch.empty(count, dtype=torch.int64)
    rank[torch.argsort(margin, stable=True)] = torch.arange(count)
    place = ((rank.double() + 0.5) * len(known) / count).long().clamp(max=len(known) - 1)
    q = known[place]
    target = (1 - q)[:, None] * runner_up.softmax(1)
    return target.scatter(1, own[:, None], q[:, None])


# --------------------------------------------------------------------------- training


@dataclass
class _Tally:
    """What the stop rule counts on the training passes of one epoch."""

    hard: float = 0.0
    kept: float = 0.0
    soft: float = 0.0
    own: float = 0.0

    def add(self, logits: Tensor, batch: Batch, hard: Tensor) -> None:
        """Count a batch: own labels still predicted (hard), own-class probabilities (soft)."""
        with torch.no_grad():
            real = batch.weight > 0
            is_hard, is_soft = real & (hard >= 0), real & (hard < 0)
            self.hard += float(is_hard.sum())
            self.kept += float((is_hard & (logits.argmax(1) == batch.labels)).sum())
            if bool(is_soft.any()):
                own = logits.float().softmax(1).gather(1, batch.labels[:, None])[:, 0]
                self.soft += float(is_soft.sum())
                self.own += float(own[is_soft].sum())

    def done(self, stop_at: float, expected: float, task: UnlearningTask) -> bool:
        """Return whether both kinds are forgotten, over all processes."""
        local = torch.tensor([self.hard, self.kept, self.soft, self.own], dtype=torch.float64)
        hard, kept, soft, own = engine.reduce_sum(local, task.accelerator).tolist()
        return bool(kept <= stop_at * hard and own <= (expected + stop_at) * soft)


@dataclass
class _Trainer:
    """Steps on the forget data, each followed by the projection of what has moved."""

    model: nn.Module
    task: UnlearningTask
    config: Settings
    targets: Targets
    found: Subspaces | None
    before: Mapping[str, Tensor]
    stop: str = "epochs"
    tally: _Tally = field(default_factory=_Tally)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def fit(self) -> None:
        """Train until the stop rule, the drift budget, the epochs or the budget end it."""
        config, task, model = self.config, self.task, self.model
        loader = task.loader(
            "forget",
            train=config.view == "augmented",
            batch_size=config.batch_size,
            shuffle=True,
        )
        teacher = None
        if config.view == "augmented" and config.label == "pseudo" and self.targets.soft is None:
            teacher = copy.deepcopy(model).eval()
        model.train(config.dropout)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            torch.backends.cudnn.enabled = False  # cuDNN has no backward in eval mode
        projection = _Projection(model, self.found, config, task, self.before)
        stretched = math.ceil(config.min_steps / max(len(loader), 1))
        epochs = max(config.epochs, stretched) if config.epochs else 0
        stage = engine.Stage(
            lambda epoch: self._items(loader, epoch),
            lambda m, batch: self._loss(m, batch, teacher),
            statistics="eval",
            steps=len(loader),
        )
        try:
            engine.fit(
                model,
                task,
                [stage],
                epochs=epochs,
                lr=config.lr,
                optimizer=config.optimizer,
                momentum=(config.momentum, config.nesterov),
                weight_decay=config.weight_decay,
                max_grad_norm=config.clip_norm,
                before_step=projection.before_step,
                after_step=projection.after_step,
                on_epoch_end=lambda _: self._epoch_end(projection),
            )
            if task.stop_reason:
                self.stop = task.stop_reason
                limit = config.drift_budget
                if limit is not None and self._drift(projection) > limit:
                    self.stop = "drift budget"
        finally:
            projection.remove()
            model.eval()
        if self.stop == "drift budget":
            self._go_back()

    def _items(self, loader: Loader, epoch: int) -> Any:
        self.tally = _Tally()
        if self.targets.random:
            self.targets.redraw(self.task.generator)
        return loader.epoch(epoch)

    def _loss(self, model: nn.Module, batch: Batch, teacher: nn.Module | None) -> Tensor:
        logits = model(**batch.inputs)
        hard, soft = self.targets.at(batch)
        if teacher is not None:
            with torch.no_grad():
                seen = teacher(**batch.inputs).float()
            allowed = self.targets.allowed.to(seen.device)
            seen = seen.masked_fill(~allowed, -math.inf)
            hard = seen.scatter(1, batch.labels[:, None], -math.inf).argmax(1)
        self.tally.add(logits, batch, hard)
        target = hard if soft is None else soft.to(logits.dtype)
        losses = functional.cross_entropy(logits, target, reduction="none")
        return engine.weighted_mean(losses, batch)

    def _epoch_end(self, projection: _Projection) -> bool:
        if self.config.drift_budget is not None:
            if self._drift(projection) > self.config.drift_budget:
                self.stop = "drift budget"
                return True
            self.kept = {name: tensor.clone() for name, tensor in projection.state().items()}
        stop_at = self.config.stop_at
        if stop_at is not None and self.tally.done(stop_at, self.targets.expected, self.task):
            self.stop = "stop_at"
            return True
        return False

    def _drift(self, projection: _Projection) -> float:
        assert self.found is not None  # a drift budget needs subspaces, see Settings
        return null_space.certify(self.found, self.before, projection.state()).drift

    def _go_back(self) -> None:
        """Return to the last epoch within the drift budget.

        Raises:
            DivergedError: not even the first epoch was.
        """
        if not self.kept:
            raise DivergedError(
                f"drift budget {self.config.drift_budget} exceeded in the first epoch"
            )
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in self.kept.items():
                parameters[name].copy_(tensor)


class _Coordinates(nn.Module):
    """W = W₀ + A·Nᵀ: a weight in coordinates of its null space, A [g, o, d − r]."""

    def __init__(self, start: Tensor, view: View, factor: Tensor) -> None:
        super().__init__()
        self.view = view
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, coordinates: Tensor) -> Tensor:
        """Return the weight."""
        start: Any = self.start
        factor: Any = self.factor
        moved: Tensor = start + self.view.stored(coordinates @ factor.mT, start)
        return moved

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the coordinates of W₀, all zero."""
        factor: Any = self.factor
        return weight.new_zeros(self.view.groups, self.view.out, factor.shape[-1])


class _Projection:
    """Keeps updates in the null space: hooks for the optimiser's steps, or other coordinates."""

    def __init__(
        self,
        model: nn.Module,
        found: Subspaces | None,
        config: Settings,
        task: UnlearningTask,
        start: Mapping[str, Tensor],
    ) -> None:
        self.model, self.config, self.start = model, config, start
        self.layers = dict(found.layers) if found else {}
        self.parameters = dict(model.named_parameters())
        self.moving = [n for n, p in self.parameters.items() if p.requires_grad]
        self.projectors = {
            name: layer.projector.to(self.parameters[name].device, self.parameters[name].dtype)
            for name, layer in self.layers.items()
        }
        self.others: list[tuple[nn.Module, str]] = []
        self.order: dict[nn.Module, list[str]] = {}
        self.before_step: Callable[[], None] | None = None
        self.after_step: Callable[[], None] | None = None
        if not self.layers:
            return
        if config.update == "reparam":
            self._reparametrise(model, task)
            return
        if not (
            config.update == "project"
            and config.optimizer == "sgd"
            and config.clip_norm is None
            and config.bias == "freeze"  # a step of b is s² times that of b/s until it is projected
        ):
            self.before_step = self._project_gradients  # for plain SGD it would change nothing
        if config.update == "project":
            self.after_step = self._project_updates

    def _project_gradients(self) -> None:
        for name, layer in self.layers.items():
            parameter = self.parameters[name]
            if parameter.grad is None:
                continue
            bias = self._bias(layer)
            slope = None if bias is None else bias.grad
            rows = self._rows(layer, parameter.grad, slope, True)
            self._put(layer, self.projectors[name].apply(rows), parameter.grad, slope)

    def _project_updates(self) -> None:
        """W ← W₀ + (W − W₀)·P: exact for every optimiser, and no rounding adds up."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                parameter, bias = self.parameters[name], self._bias(layer)
                start = self.start[name]
                parameter.sub_(start)
                if bias is not None and layer.view.bias is not None:
                    bias.sub_(self.start[layer.view.bias])
                rows = self._rows(layer, parameter, bias, False)
                self._put(layer, self.projectors[name].apply(rows), parameter, bias)
                parameter.add_(start)
                if bias is not None and layer.view.bias is not None:
                    bias.add_(self.start[layer.view.bias])

    def _bias(self, layer: Layer) -> nn.Parameter | None:
        if layer.scale is None or layer.view.bias is None:
            return None
        return self.parameters[layer.view.bias]

    def _rows(self, layer: Layer, weight: Tensor, bias: Tensor | None, gradient: bool) -> Tensor:
        """Return rows [g, o, d] of a weight or gradient, with those of b/s last."""
        view = layer.view
        rows = view.rows(weight)
        if bias is None or layer.scale is None:
            return rows
        factor = layer.scale if gradient else 1 / layer.scale
        return torch.cat([rows, factor * bias.reshape(view.groups, view.out, 1)], dim=-1)

    def _put(self, layer: Layer, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Undo :meth:`_rows` in place; a gradient of b/s goes back as that of b's own step."""
        view = layer.view
        with torch.no_grad():
            weight.copy_(view.stored(rows[..., : view.d], weight))
            if bias is not None and layer.scale is not None:
                bias.copy_((layer.scale * rows[..., view.d]).reshape(bias.shape))

    def _reparametrise(self, model: nn.Module, task: UnlearningTask) -> None:
        for name, layer in list(self.layers.items()):
            if len(layer.view.modules) > 1:
                self.parameters[name].requires_grad_(False)
                task.warn(f"update=reparam: {name} is shared by several modules and stays")
                continue
            module = model.get_submodule(layer.view.name)
            attribute = name.rpartition(".")[2]
            factor = self.projectors[name].free_directions()
            start = self.start[name]
            self.order[module] = list(module._parameters)
            parametrize.register_parametrization(
                module, attribute, _Coordinates(start, layer.view, factor), unsafe=True
            )
            self.others.append((module, attribute))

    def state(self) -> dict[str, Tensor]:
        """Return what may move, under its own names."""
        if not self.others:
            return {name: self.parameters[name].detach() for name in self.moving}
        weights: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            owner: Any = self.model.get_submodule(layer.view.name)
            weights[name] = getattr(owner, name.rpartition(".")[2]).detach()
        return weights

    def remove(self) -> None:
        """Put plain parameters back where coordinates were trained, in their old order."""
        for module, attribute in self.others:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
            held = module._parameters
            for name in self.order[module]:
                held[name] = held.pop(name)
        self.others = []
