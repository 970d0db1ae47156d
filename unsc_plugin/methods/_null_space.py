"""What the retained data leave free: capture, downdating, subspaces, diagnosis, certificate.

Shared by `unsc` and its presets. Everything here is computed from Gram matrices; the retained data
are opened only where no entry of the store has them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unsc_plugin import engine, hooks, linalg
from unsc_plugin.errors import (
    ConfigError,
    GramMismatch,
    NoFreeDirections,
    RequestError,
    UnsupportedDistributed,
)
from unsc_plugin.hooks import View
from unsc_plugin.linalg import Basis, Gram, Projector
from unsc_plugin.method import Split, UnlearningTask, state_sha256
from unsc_plugin.methods._capture import (
    Capture,
    drawn_from,
    for_capture,
    in_bucket,
    joined_rows,
    limits_of,
    trial,
    widened,
)
from unsc_plugin.methods._gram_store import (
    Entry,
    Known,
    Moments,
    Samples,
    Store,
    anchor_of,
    bucket_map,
    weighted_classes,
)
from unsc_plugin.methods._unsc_settings import Settings

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""What a function's representation has that changes from process to process."""
CANCELLED = 1e-6
"""A downdated bucket with less of its energy than this is captured directly."""
KEPT = 2**28
"""Bytes of one layer's unpacked Gram matrices that are kept while the layer is decomposed."""
NEGATIVE = 1e-5
"""A downdated Gram with an eigenvalue below −1e-5·λ_1 is of another model or other data."""


@dataclass
class Layer:
    """One covered weight: its view, what it may do, and its row of the diagnosis.

    `scale` is s of an augmented bias; `left` the energy outside the span per retained bucket and
    group [B', g]; `row` the numbers of the diagnosis; `headroom` the largest eps that leaves a
    direction.
    """

    view: View
    projector: Projector
    scale: float | None
    left: Tensor
    row: dict[str, Any]
    headroom: float


@dataclass
class Subspaces:
    """What :func:`prepare` finds: layers by parameter, and where the numbers come from.

    `frozen` candidates that stay -> reason; `full` those of them without a free direction and
    `headroom` the largest eps that would leave one of them one; `buckets` the bucket of every
    class; `weights` retained bucket -> number of its retained classes; `leaving` parameter ->
    moments of the forget samples in the buckets that live on; `gone` classes without retained rows;
    `anchor` the weights the Gram matrices belong to, None if they are the model's own or were not
    kept.
    """

    known: Known
    store: Store | None
    buckets: list[int]
    weights: dict[int, int]
    gone: frozenset[int]
    source: str
    layers: dict[str, Layer] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    leaving: dict[str, Moments] = field(default_factory=dict)
    anchor: dict[str, Tensor] | None = None
    forget: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    full: list[str] = field(default_factory=list)
    headroom: float = 0.0

    def gram(self, parameter: str, bucket: int) -> Gram:
        """Return a layer's Gram over a bucket's rows without the forget samples."""
        found = self.known.gram(parameter, bucket)
        if parameter in self.leaving:
            found.subtract(self.leaving[parameter].at(bucket))
        return found

    def retained(self, layer: Layer) -> Iterator[tuple[int, Gram]]:
        """Yield (bucket, retained Gram) of a layer, with its augmented row if the bias moves."""
        for bucket in self.weights:
            gram = self.gram(layer.view.parameter, bucket)
            yield bucket, gram if layer.scale is None else gram.augmented(layer.scale)


class _Lazy(Sequence[Gram]):
    """Retained Gram matrices of one layer that are unpacked when they are read, kept if small."""

    def __init__(self, found: Subspaces, parameter: str, scale: float | None) -> None:
        self.found, self.parameter, self.scale = found, parameter, scale
        self.buckets = list(found.weights)
        self.kept: dict[int, Gram] = {}

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, at: Any) -> Any:
        if at in self.kept:
            return self.kept[at]
        gram = self.found.gram(self.parameter, self.buckets[at])
        if self.scale is not None:
            gram = gram.augmented(self.scale)
        if len(self) * gram.matrix.nbytes <= KEPT:
            self.kept[at] = gram
        return gram


# --------------------------------------------------------------------------- the request


def classes_gone(task: UnlearningTask, known: Samples | None = None) -> frozenset[int]:
    """Return the classes without retained rows: forgotten now, or in an earlier request.

    Raises:
        RequestError: no class is left.
    """
    retained = task.label_counts(Split.RETAIN)
    if known is not None and not task.size(Split.RETAIN):
        index, _ = task.samples(Split.FORGET)
        retained = known.without(index).counts(task.num_classes)
    gone = frozenset(torch.nonzero(retained == 0)[:, 0].tolist())
    if len(gone) == task.num_classes:
        raise RequestError(
            f"unsc: all {task.num_classes} classes are forgotten, so there is no label left to "
            "train towards; keep at least one class, or train a new model (retrain)"
        )
    return gone


def check_whole(task: UnlearningTask, model: nn.Module) -> None:
    """Refuse weights that are split over processes.

    Raises:
        UnsupportedDistributed: fully sharded, ZeRO or tensor-parallel weights.
    """
    kind = str(getattr(task.accelerator, "distributed_type", "NO")).rpartition(".")[2]
    sharded = any(type(p).__name__ == "DTensor" for p in model.parameters())
    if sharded or kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise UnsupportedDistributed(
            f"unsc needs every weight whole on every process, got weights split by {kind}; use "
            "data-parallel processes (accelerate's multi-GPU or multi-CPU)"
        )


# --------------------------------------------------------------------------- prepare


def prepare(model: nn.Module, task: UnlearningTask, settings: Settings) -> Subspaces:
    """Return the subspaces of `model` for the request, from the store or from the data.

    Raises:
        NoFreeDirections: no layer can be projected, or none has anything free to move.
        ConfigError: `capture_samples` has another length than there are layers.
        RequestError: no class is left, or data are needed that are not given.
    """
    check_whole(task, model)
    views, frozen = hooks.views(model, settings.include, settings.exclude, max_dim=settings.max_dim)
    if not views:
        raise NoFreeDirections(_nothing_covered(model, frozen))
    if isinstance(settings.capture_samples, tuple) and len(settings.capture_samples) != len(views):
        raise ConfigError(
            f"capture_samples: expected one number per layer, {len(views)}, got "
            f"{len(settings.capture_samples)}; the layers: {', '.join(v.name for v in views)}"
        )
    found = _known(model, task, settings, views)
    found.frozen = frozen | found.known.entry.frozen
    covered = [view for view in views if view.parameter not in found.frozen]
    if not covered:
        raise NoFreeDirections(_nothing_covered(model, found.frozen))
    _downdate(found, model, task, settings, covered)
    _decompose(found, task, settings, covered)
    if not found.layers:
        raise NoFreeDirections(_nothing_free(found))
    _note(found, model, task)
    if not found.known.anchored and found.anchor is None:
        task.warn(
            "the anchor's weights were not kept (keep_anchor=false), so drift counts from the "
            "model that was handed in, not from the one that was captured"
        )
    return found


def _known(
    model: nn.Module, task: UnlearningTask, settings: Settings, views: list[View]
) -> Subspaces:
    """Find the entry of this model and data, or capture it.

    Raises:
        RequestError: neither retained data nor an entry.
    """
    buckets = _buckets(task, settings, views)
    forget, labels = task.samples(Split.FORGET)
    there = bool(task.size(Split.RETAIN))
    samples = Samples.of((forget, labels), task.samples(Split.RETAIN)) if there else None
    store = None
    if settings.cache and task.cache is not None and task.data_fingerprint:
        store = Store(task.cache, _key_parts(model, task, settings, views, buckets))
    known = store.find(samples, forget) if store else None
    if not engine.everywhere(known is not None, task.accelerator):
        known = None
    anchor = None if known is None or known.anchored else anchor_of(known.entry)
    live = weighted_classes(buckets, known.samples.counts(task.num_classes)) if known else {}
    if (
        known
        and anchor
        and _drifted(known, anchor, model, views, live) > settings.max_lineage_drift
    ):
        task.warn(
            "the drift since the Gram matrices were captured exceeds max_lineage_drift "
            f"{settings.max_lineage_drift}; they are captured again"
        )
        known = anchor = None
    source = "lineage" if known and not known.anchored else "stored"
    if known is None:
        if samples is None:
            raise RequestError(
                "unsc: expected retained data or stored Gram matrices of this model, got neither; "
                "give the retained data once (and a cache and a data fingerprint to keep them)"
            )
        known, source = Known(_capture(model, task, settings, views, buckets, samples)), "captured"
        if store and engine.rank(task.accelerator) == 0:
            known.entry = store.write(known.entry, model.state_dict())
        engine.barrier(task.accelerator)
    left = known.samples.without(forget)
    return Subspaces(
        known=known,
        store=store,
        buckets=buckets,
        weights=weighted_classes(buckets, left.counts(task.num_classes)),
        gone=classes_gone(task, known.samples),
        source=source,
        anchor=anchor,
        forget=forget,
    )


def _buckets(task: UnlearningTask, settings: Settings, views: list[View]) -> list[int]:
    if settings.merge == "pooled":
        return [0] * task.num_classes
    size = sum(8 * view.groups * view.d * (view.d + 1) // 2 for view in views)
    return bucket_map(task.num_classes, size, settings.cache_gib)


def _key_parts(
    model: nn.Module,
    task: UnlearningTask,
    settings: Settings,
    views: list[View],
    buckets: list[int],
) -> dict[str, Any]:
    augmented = settings.view == "augmented"
    return {
        "model": state_sha256(model),
        "unsaved": _unsaved(model),
        "classifier": hashlib.sha256(_ADDRESS.sub("", repr(model)).encode()).hexdigest(),
        "data": task.data_fingerprint,
        "view": [settings.view, *([task.seed, task.recipe.augment] if augmented else [])],
        "layers": [view.geometry for view in views],
        "float64": settings.wide,
        "samples": settings.capture_samples,
        "patches": settings.patches,
        "buckets": buckets,
    }


def _unsaved(model: nn.Module) -> str:
    """Return the SHA-256 of the buffers that are in no state dict, such as pixel statistics."""
    state, digest = model.state_dict(), hashlib.sha256()
    for name, buffer in model.named_buffers():
        if name not in state:
            raw = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()


def _drifted(
    known: Known,
    anchor: Mapping[str, Tensor],
    model: nn.Module,
    views: list[View],
    live: Mapping[int, int],
) -> float:
    """Return the drift of `model` from its anchor, over the buckets with samples left."""
    parameters = dict(model.named_parameters())
    total = 0.0
    for view in views:
        if view.parameter in known.entry.moments:
            before = view.rows(anchor[view.parameter].double())
            delta = view.rows(parameters[view.parameter].detach().cpu().double()) - before
            grams = (known.gram(view.parameter, bucket) for bucket in live)
            total += max(linalg.drifts(delta, before, grams), default=0.0)
    return total


# --------------------------------------------------------------------------- capture


def _capture(
    model: nn.Module,
    task: UnlearningTask,
    settings: Settings,
    views: list[View],
    buckets: list[int],
    samples: Samples,
) -> Entry:
    """Read every sample once and return the Gram matrices per bucket."""
    started = time.perf_counter()
    sources = [task.rows(split) for split in (Split.RETAIN, Split.FORGET) if task.size(split)]
    rows = joined_rows(sources)
    wide = for_capture(model, settings)
    tried = widened(trial(rows, task), wide)
    wrong = hooks.verify(wide, tried, views)
    covered = [view for view in views if view.parameter not in wrong]
    keep = task.modality == "text" and hooks.padding_matters(wide, tried)
    drawn = drawn_from(samples, settings, task.num_classes)
    limits = limits_of(settings, views)
    capture = Capture(wide, task, settings, covered, buckets, keep)
    count = max(buckets) + 1
    moments = {v.parameter: Moments.zeros(count, v.groups, v.d) for v in covered}
    for bucket in range(count):
        grams = capture.grams(rows, bucket, drawn, limits)
        for view in covered:
            moments[view.parameter].put(bucket, grams[view.parameter])
    seconds = time.perf_counter() - started
    return Entry(samples, moments, wrong, drawn, keep, seconds)


# --------------------------------------------------------------------------- downdating


def _downdate(
    found: Subspaces,
    model: nn.Module,
    task: UnlearningTask,
    settings: Settings,
    views: list[View],
) -> None:
    """Take the forget samples out of every bucket that lives on.

    Raises:
        RequestError: the weights that the Gram matrices belong to were not kept.
    """
    _, labels = task.samples(Split.FORGET)
    place = torch.tensor(found.buckets)[labels]
    touched = sorted(set(place.tolist()) & found.weights.keys())
    inside = found.known.entry.captured(found.forget) & torch.isin(place, torch.tensor(touched))
    if not bool(inside.any()):
        return
    anchor = model
    if not found.known.anchored:
        if found.anchor is None:
            raise RequestError(
                "unsc: forgetting instances after an earlier request needs the original weights, "
                "which were not kept (keep_anchor=false); give the retained data and cache=false"
            )
        anchor.load_state_dict(found.anchor)
    wide, keep = for_capture(anchor, settings), found.known.entry.keep_padding
    capture = Capture(wide, task, settings, views, found.buckets, keep)
    rows, chosen = [task.rows(Split.FORGET)], found.forget[inside]
    count = max(found.buckets) + 1
    leaving = {v.parameter: Moments.zeros(count, v.groups, v.d) for v in views}
    for bucket in touched:
        limits = _limits_leaving(found, bucket, settings, views)
        grams = capture.grams(rows, bucket, chosen, limits)
        for view in views:
            leaving[view.parameter].put(bucket, grams[view.parameter])
    found.leaving = leaving
    for bucket in touched:
        _hold(found, bucket, capture)


def _limits_leaving(
    found: Subspaces, bucket: int, settings: Settings, views: list[View]
) -> dict[str, int] | None:
    """Return how many of a bucket's forget samples are among the first that a layer captured."""
    limits, entry = limits_of(settings, views), found.known.entry
    if limits is None:
        return None
    mine = torch.tensor(found.buckets)[entry.samples.labels] == bucket
    captured = entry.samples.index[mine & entry.captured(entry.samples.index)]
    leaves = torch.isin(captured, found.forget)
    return {name: int(leaves[:limit].sum()) for name, limit in limits.items()}


def _hold(found: Subspaces, bucket: int, capture: Capture) -> None:
    """Check a downdated bucket; one that has cancelled is captured from the retained data.

    Raises:
        GramMismatch: what is left is not positive semidefinite.
        RequestError: a cancelled bucket without retained data.
    """
    cancelled = False
    for view in capture.views:
        whole = found.known.gram(view.parameter, bucket)
        left = found.gram(view.parameter, bucket)
        energy, rest = float(whole.trace.sum()), float(left.trace.sum())
        if -NEGATIVE * energy <= rest < CANCELLED * energy:
            cancelled = True
        elif not linalg.semidefinite(left, NEGATIVE):
            raise GramMismatch(
                f"layer {view.name}, bucket {bucket}: taking the forget samples out leaves "
                "negative energy, so the stored Gram matrices are of another model or other data; "
                f"delete {found.known.entry.folder or 'them'} and give the retained data again"
            )
    if not cancelled:
        return
    if not capture.task.size(Split.RETAIN):
        raise RequestError(
            f"unsc: almost nothing of bucket {bucket} is left, too little to compute from stored "
            "Gram matrices; give the retained data"
        )
    rows = [capture.task.rows(Split.RETAIN)]
    drawn, limits = found.known.entry.drawn, limits_of(capture.settings, capture.views)
    if drawn is not None and not len(in_bucket(rows[0], bucket, found.buckets, drawn)):
        drawn = None  # all that was drawn leaves
    grams = capture.grams(rows, bucket, drawn, limits)
    for view in capture.views:
        whole, direct = found.known.gram(view.parameter, bucket), grams[view.parameter]
        whole.subtract(Gram(direct.matrix.cpu(), direct.total.cpu(), direct.count))
        found.leaving[view.parameter].put(bucket, whole)


# --------------------------------------------------------------------------- subspaces


def _decompose(
    found: Subspaces, task: UnlearningTask, settings: Settings, views: list[View]
) -> None:
    """Find every layer's free directions; with several processes each takes its share of them."""
    world, rank = engine.world(task.accelerator), engine.rank(task.accelerator)
    mine = {
        view.parameter: _layer(found, view, settings)
        for at, view in enumerate(views)
        if at % world == rank
    }
    for at, view in enumerate(views):
        layer = engine.broadcast(mine.get(view.parameter), task.accelerator, at % world)
        if isinstance(layer, str):
            found.frozen[view.parameter] = layer
            task.warn(f"{view.parameter} stays as it is: {layer}")
            continue
        if layer.row["worst_energy"] is None:
            task.warn(f"layer {view.name} has no interior window, so nothing constrains it")
        found.layers[view.parameter] = layer
    full = [name for name, layer in found.layers.items() if not layer.row["free"]]
    for name in full:
        layer = found.layers.pop(name)
        found.headroom = max(found.headroom, layer.headroom)
        found.frozen[name] = f"no free direction (rank {layer.row['rank']})"
    if full and found.layers:
        task.warn(
            f"no null space is left in {len(full)} of {len(full) + len(found.layers)} layers, "
            f"which stay as they are: {_some(full)}; a smaller eps frees directions at the price "
            "of drift"
        )
    found.full = full


def _layer(found: Subspaces, view: View, settings: Settings) -> Layer | str:
    """Return a layer's projector and diagnosis, or why it is frozen."""
    plain = _Lazy(found, view.parameter, None)
    scale = _bias_scale(plain, view) if settings.bias == "augment" else None
    grams = _Lazy(found, view.parameter, scale)
    energy = found.known.entry.moments[view.parameter].energy()
    if settings.patches == "true" and not bool((energy[list(found.weights)] > 0).any()):
        return "its retained inputs are all zero, as after a failed capture"
    basis = _basis(found, grams, view, settings)
    worst = linalg.worst_energy(basis)
    forget = _forget_energy(found, view, basis, scale)
    row: dict[str, Any] = {
        "layer": view.name,
        "d": basis.d,
        "groups": view.groups,
        "rank": sum(basis.ranks),
        "free": basis.free,
        "worst_energy": None if math.isnan(worst) else worst,
        "forget_energy": forget,
        "contrast": None if forget is None or not 1 - worst > 1e-12 else forget / (1 - worst),
    }
    headroom = 1.0 if basis.free else _headroom(basis, grams)
    return Layer(view, Projector.from_basis(basis), scale, basis.left.cpu(), row, headroom)


def _basis(found: Subspaces, grams: _Lazy, view: View, settings: Settings) -> Basis:
    eps = settings.eps_of(view.name)
    if settings.merge == "balanced":
        return linalg.balanced_basis(grams, list(found.weights.values()), eps)
    if settings.merge == "pooled":
        return linalg.pooled_basis(grams[0], eps, settings.rank_rule)
    labels = [found.buckets.index(bucket) for bucket in found.weights]
    order = sorted(range(len(labels)), key=labels.__getitem__)
    thresholds = [eps + settings.eps_step * labels[at] for at in order]
    if max(thresholds) > 1:
        raise ConfigError(
            f"eps {eps} + eps_step {settings.eps_step} × label reaches {max(thresholds):.3f} at "
            f"label {max(labels)}; set a smaller eps_step, or merge=balanced"
        )
    return linalg.gpm_basis([grams[at] for at in order], thresholds, settings.rank_rule)


def _bias_scale(grams: Sequence[Gram], view: View) -> float | None:
    """Return s = √(mean square of the layer's inputs), None for a layer without a bias."""
    if view.bias is None:
        return None
    energy, entries = 0.0, 0
    for gram in grams:
        energy += float(gram.trace.sum())
        entries += gram.count * view.d * view.groups
    return math.sqrt(energy / entries) if energy > 0 else 1.0


def _forget_energy(found: Subspaces, view: View, basis: Basis, scale: float | None) -> float | None:
    """Return φ = tr(Nᵀ G_F N) / tr G_F, the forget samples' share in the free directions."""
    free = total = 0.0
    for gram in _forget_grams(found, view):
        wide = gram if scale is None else gram.augmented(scale)
        total += float(wide.trace.sum())
        free += float(linalg.residual(basis, wide).sum())
    return free / total if total > 0 else None


def _forget_grams(found: Subspaces, view: View) -> Iterator[Gram]:
    here = set(torch.tensor(found.buckets)[_labels_of(found)].tolist())
    for bucket in sorted(here):
        if bucket not in found.weights:
            yield found.known.gram(view.parameter, bucket)  # all of it is to be forgotten
        elif view.parameter in found.leaving:
            yield found.leaving[view.parameter].at(bucket)


def _labels_of(found: Subspaces) -> Tensor:
    samples = found.known.samples
    return samples.labels[torch.isin(samples.index, found.forget)]


def _headroom(basis: Basis, grams: Sequence[Gram]) -> float:
    """Return the largest eps at which a direction would be free: min_b C_b before the last λ."""
    if basis.vectors.shape[-1] < basis.d:
        return 1.0
    found = 0.0
    for group, values in enumerate(basis.eigenvalues.tolist()):
        first = basis.d - 1
        while values and first and values[first] >= (1 - linalg.CLUSTER) * values[first - 1]:
            first -= 1
        last = basis.vectors[group, :, first:]
        kept = [
            1 - float(((gram.matrix[group] @ last) * last).sum() / gram.trace[group])
            for gram in grams
            if gram.trace[group] > 0
        ]
        found = max(found, min(kept, default=0.0))
    return found


# --------------------------------------------------------------------------- words


def table(found: Subspaces) -> list[dict[str, Any]]:
    """Return the diagnosis: one row per layer with a free direction, in the model's order."""
    return [layer.row for layer in found.layers.values()]


def _note(found: Subspaces, model: nn.Module, task: UnlearningTask) -> None:
    rows = [layer.row for layer in found.layers.values()]
    contrasts = [row["contrast"] for row in rows if row["contrast"] is not None]
    if contrasts and max(contrasts) < 1:
        task.warn(
            "no layer's free directions see the forget data better than the retained data "
            f"(largest contrast {max(contrasts):.2f} < 1); forgetting will cost drift. Single "
            "instances of classes that stay are the hard case"
        )
    unknown = unknown_parameters(model, set(found.layers) | set(found.frozen))
    if unknown:
        task.warn(
            f"{len(unknown)} parameters of modules that are neither linear nor a known norm, "
            f"embedding or scale are frozen: {_some(unknown)}"
        )
    share = coverage(model, found)
    if share < 0.5:
        task.warn(
            f"only {share:.1%} of the parameters can move; the rest is frozen: see frozen_layers"
        )
    if found.known.entry.keep_padding:
        task.warn(
            "the model's logits depend on padded tokens, so padding is protected like other tokens"
        )
    if task.num_classes - len(found.gone) == 1:
        task.warn("one class is left: every sample gets the same label")


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])])


KNOWN = ("Norm", "Embed", "LayerScale", "PReLU", "Scale", "Affine")


def unknown_parameters(model: nn.Module, handled: set[str]) -> list[str]:
    """Return weights of modules that are on no list; biases and tokens aside, they are frozen."""
    found = []
    for name, module in model.named_modules():
        plain = any(word in type(module).__name__ for word in KNOWN)
        for attribute, _ in module.named_parameters(recurse=False):
            full = f"{name}.{attribute}" if name else attribute
            token = any(word in attribute for word in ("token", "embed", "bias", "gamma", "scale"))
            linear = isinstance(module, (nn.Linear, *hooks.CONVOLUTIONS, *hooks.TRANSPOSED))
            if full not in handled and not plain and not token and not linear:
                found.append(full)
    return [name for name in found if not _tied(model, name, handled)]


def _tied(model: nn.Module, name: str, handled: set[str]) -> bool:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return any(parameters[name] is parameters[other] for other in handled if other in parameters)


def coverage(model: nn.Module, found: Subspaces) -> float:
    """Return the share of the parameters that have a view whose view held."""
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    held = {*found.layers, *found.full}
    return sum(parameters[name].numel() for name in held) / max(total, 1)


def _nothing_covered(model: nn.Module, frozen: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{name}: {why}" for name, why in itertools.islice(frozen.items(), 5))
    return (
        f"unsc: {type(model).__name__} has no layer that can be projected"
        f" ({reasons or 'no linear or convolutional layer'}); use a backbone with Linear or Conv "
        "layers, or another include/exclude"
    )


def _nothing_free(found: Subspaces) -> str:
    lines = [f"  {name}: {why}" for name, why in itertools.islice(found.frozen.items(), 12)]
    most = math.floor(found.headroom * 1e6) / 1e6
    advice = f"set eps to at most {most:.6f}" if most > 0 else "no smaller eps helps"
    return (
        "unsc: the retained data fill every layer, so nothing is free to move; "
        f"{advice}\n" + "\n".join(lines)
    )


# --------------------------------------------------------------------------- certificate


@dataclass(frozen=True)
class Certificate:
    """Drift of the retained data, from Gram matrices alone.

    `delta` and `bound` parameter -> one number per retained bucket: δ = ‖ΔW X_b‖/‖W X_b‖ of the
    layer's response to the original retained inputs, and ‖ΔW‖₂·√(tr G_b − tr UᵀG_bU). `drift` is
    Σ_layers max_b δ: an estimate of the relative change of the logits, exact when only the head
    moved.
    """

    buckets: tuple[int, ...]
    delta: dict[str, list[float]]
    bound: dict[str, list[float]]

    @property
    def drift(self) -> float:
        """Sum over the layers of the largest δ of any bucket."""
        return sum(max(row, default=0.0) for row in self.delta.values())


def certify(
    found: Subspaces, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Certificate:
    """Return the certificate of a model that went from the state `before` to the state `after`.

    In a sequence δ is measured against the anchor, and bounds add up over the requests.
    """
    start = found.anchor or before
    delta: dict[str, list[float]] = {}
    bound: dict[str, list[float]] = {}
    for name, layer in found.layers.items():
        base = joined(layer, start)
        change = joined(layer, after) - base
        step = joined(layer, after) - joined(layer, before)
        earlier = found.known.bounds.get(name)
        delta[name] = linalg.drifts(change, base, (gram for _, gram in found.retained(layer)))
        bound[name] = [
            own + (earlier[bucket] if earlier else 0.0)
            for bucket, own in zip(
                found.weights, linalg.drift_bound(step, layer.left).tolist(), strict=True
            )
        ]
    return Certificate(tuple(found.weights), delta, bound)


def joined(layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
    """Return the rows [g, o, d] of a layer's weight in `state`, with b/s last if the bias moves."""
    view = layer.view
    rows = view.rows(state[view.parameter].detach().cpu().double())
    if layer.scale is None or view.bias is None:
        return rows
    bias = state[view.bias].detach().cpu().double().reshape(view.groups, view.out, 1)
    return torch.cat([rows, bias / layer.scale], dim=-1)
