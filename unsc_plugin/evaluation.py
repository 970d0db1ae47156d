"""From a model to named numbers: the frame of a draw, what is observed, what is computed from it.

Every model of a draw, be it unlearned, original or retrained, is observed through the same
:class:`Frame`: the same rows, the same shots, the same relearning. Numbers are then computed from
cached :class:`Outputs`, so that no retrained model is ever loaded again.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn

from unsc_plugin import _correction_numbers as correction_numbers
from unsc_plugin import engine
from unsc_plugin._correction_numbers import Perturbations as Perturbations
from unsc_plugin.data import Splits
from unsc_plugin.errors import CacheMismatch, DataError, DivergedError
from unsc_plugin.forget import Request
from unsc_plugin.metrics import METRICS, distance, divergence, membership, mubench, pareto, probe
from unsc_plugin.metrics.accuracy import accuracy
from unsc_plugin.rows import Rows
from unsc_plugin.spec import (
    CorrectionSpec,
    EvaluationSpec,
    Recipe,
    canonical_json,
    derive,
    fingerprint,
)

GROUPS = ("core", "mia", "mubench")
CLASS_KINDS = ("class", "subclass")
LABEL_ONLY = ("acc_test_retained", "acc_test_forgotten", "acc_test_siblings")


@dataclass(frozen=True)
class Frame:
    """What every model of a draw is measured on.

    `forgotten` marks the test rows of the forgotten (sub-)labels, `siblings` those of kept
    sub-labels of the same label; both are empty masks for other kinds, and `shots` is None.
    `codes` are the (sub-)labels of the test rows that the probe has to recover.
    """

    kind: str
    data: str
    forget: Rows
    retain: Rows
    retain_eval: Rows
    test: Rows
    forgotten: Tensor
    siblings: Tensor
    recipe: Recipe
    spec: EvaluationSpec
    seed: int
    draw: int
    shots: probe.Shots | None
    shot_rows: Rows | None
    codes: np.ndarray

    @property
    def relearn_steps(self) -> int:
        """Steps of the relearn probe: given, or one epoch of D_r, at least 50, at most 1000."""
        if self.spec.relearn.steps != "auto":
            return int(self.spec.relearn.steps)
        return min(max(-(-len(self.retain) // self.recipe.batch_size), 50), 1000)

    @property
    def correction(self) -> CorrectionSpec:
        """How a correction is measured."""
        return self.spec.correction or CorrectionSpec()

    def identity(self) -> str:
        """Return the SHA-256 of everything that decides what :func:`observe` sees."""
        rows = [self.forget, self.retain_eval, self.test, self.retain]
        return fingerprint(
            [
                [fingerprint(part.index.tolist()) for part in rows],
                self.kind,
                self.recipe,
                self.spec.relearn,
                self.spec.probe,
                [self.seed, self.draw, engine.FIT_VERSION],
                *([self.correction] if self.kind == "correction" else []),
            ]
        )


def frame(
    splits: Splits,
    request: Request,
    recipe: Recipe,
    spec: EvaluationSpec,
    *,
    seed: int,
    draw: int = 0,
) -> Frame:
    """Return the frame of a request; `seed` and `draw` fix every draw in it."""
    train, test = splits.train, splits.test
    retain = train.subset(request.retain)
    shown = _stratified(retain.labels, spec.retain_eval, derive(seed, "retain_eval", draw))
    train_codes, test_codes, forgotten, siblings = _codes(splits, request)
    shots, shot_rows = None, None
    if request.kind in CLASS_KINDS and bool(forgotten.any()):
        shots = probe.draw_shots(
            train_codes,
            seed=derive(seed, "shots", draw),
            shots=spec.probe.shots,
            repeats=spec.probe.repeats,
        )
        shot_rows = train.subset(shots.rows)
    return Frame(
        kind=request.kind,
        data=splits.info.name,
        forget=train.subset(request.forget),
        retain=retain,
        retain_eval=retain.subset(shown),
        test=test,
        forgotten=forgotten,
        siblings=siblings,
        recipe=recipe,
        spec=spec,
        seed=seed,
        draw=draw,
        shots=shots,
        shot_rows=shot_rows,
        codes=test_codes[forgotten.numpy()],
    )


def _stratified(labels: Tensor, limit: int | str, seed: int) -> np.ndarray:
    """Return at most `limit` ascending positions whose label shares are those of `labels`."""
    count = len(labels)
    if limit == "all" or count <= int(limit):
        return np.arange(count)
    column, generator = labels.numpy(), np.random.default_rng(seed)
    names, sizes = np.unique(column, return_counts=True)
    quota, remainder = np.divmod(int(limit) * sizes, count)
    quota[np.argsort(-remainder, kind="stable")[: int(limit) - int(quota.sum())]] += 1
    taken = [
        generator.permutation(np.flatnonzero(column == name))[:share]
        for name, share in zip(names, quota, strict=True)
    ]
    return np.sort(np.concatenate(taken))


def _codes(splits: Splits, request: Request) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Return (sub-)label codes of train and test, and the masks of forgotten and sibling rows."""
    train, test = splits.train, splits.test
    none = torch.zeros(len(test), dtype=torch.bool)
    if request.kind == "class":
        gone = torch.isin(test.labels, torch.tensor(sorted(request.classes)))
        return train.labels.numpy(), test.labels.numpy(), gone, none
    if request.kind == "subclass" and request.spec.column in test.extra:
        column, other = train.extra[request.spec.column], test.extra[request.spec.column]
        names = {name: code for code, name in enumerate(sorted({*column, *other}))}
        train_codes = np.array([names[name] for name in column])
        test_codes = np.array([names[name] for name in other])
        gone = torch.from_numpy(np.isin(test_codes, np.unique(train_codes[request.forget])))
        parents = torch.unique(train.labels[torch.as_tensor(request.forget)])
        return train_codes, test_codes, gone, torch.isin(test.labels, parents) & ~gone
    return train.labels.numpy(), test.labels.numpy(), none, none


# --------------------------------------------------------------------------- observing


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model does on a frame: logits float32 (rows, K) per split, and numbers of its own.

    `numbers` holds what needs the model itself: `relearn_retain` (with `_quarter`, `_half`) and
    `probe5`.
    """

    forget: np.ndarray
    retain_eval: np.ndarray
    test: np.ndarray
    numbers: Mapping[str, float]

    @property
    def sha256(self) -> str:
        """SHA-256 over shape and bytes of the logits, and over the numbers."""
        digest = hashlib.sha256(canonical_json(dict(self.numbers)).encode())
        for name in _LOGITS:
            logits = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name}|{logits.dtype}|{logits.shape}|".encode() + logits.tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write one safetensors file: the logits, and as metadata the numbers and the hash."""
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in _LOGITS}
        numbers = canonical_json(dict(self.numbers))
        save_file(tensors, path, metadata={"numbers": numbers, "sha256": self.sha256})

    @classmethod
    def load(cls, path: Path) -> Outputs:
        """Read what :meth:`save` wrote.

        Raises:
            CacheMismatch: the file is not the one that was written.
        """
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata()
                logits = {name: file.get_tensor(name) for name in _LOGITS}
            found = cls(**logits, numbers=json.loads(metadata["numbers"]))
            expected = metadata["sha256"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CacheMismatch(
                f"{path}: expected kept logits, got {type(error).__name__}: {error}; delete the "
                "file to make it again"
            ) from None
        if found.sha256 != expected:
            raise CacheMismatch(
                f"{path}: expected SHA-256 {expected}, found {found.sha256}; delete the file to "
                "make it again"
            )
        return found


_LOGITS = ("forget", "retain_eval", "test")


def observe(
    model: nn.Module,
    frame: Frame,
    *,
    relearn_seed: int,
    device: Any = None,
    relearn: bool = True,
    transferred: Perturbations | None = None,
) -> Outputs:
    """Return what `model` does on `frame`; the model is left as it was.

    `transferred` is what :func:`perturbations` found against another model, for a correction.

    Raises:
        DivergedError: a logit is not finite.
    """
    logits = {}
    for name in _LOGITS:
        if name == "forget" and not len(frame.forget):
            continue
        logits[name] = _finite_logits(model, getattr(frame, name), name, device).numpy()
    if frame.kind == "correction":
        numbers = correction_numbers.robustness(
            model,
            frame.test,
            logits["test"],
            frame.correction,
            _attack_seed(frame),
            device,
            transferred,
        )
        return Outputs(forget=logits["test"][:0], **logits, numbers=numbers)
    numbers = {}
    if frame.shots is not None and frame.shot_rows is not None:
        seen = frame.test.subset(torch.nonzero(frame.forgotten)[:, 0])
        shot = engine.predict(model, frame.shot_rows, device=device, features=True).features
        query = engine.predict(model, seen, device=device, features=True).features
        numbers["probe5"] = probe.prototype_recall(shot, frame.shots, query, frame.codes)
    if relearn:
        numbers |= _relearnt(model, frame, relearn_seed, device)
    return Outputs(**logits, numbers=numbers)


def perturbations(model: nn.Module, frame: Frame, device: Any = None) -> Perturbations | None:
    """Return what the attack of a correction adds to the test rows against `model`; None without.

    The same draws of the attack as in :func:`observe`.
    """
    if frame.kind != "correction":
        return None
    return correction_numbers.perturbations(
        model, frame.test, frame.correction, _attack_seed(frame), device
    )


def _attack_seed(frame: Frame) -> int:
    return derive(frame.seed, "robustness", frame.draw)


def _finite_logits(model: nn.Module, rows: Rows, name: str, device: Any) -> Tensor:
    """Return the logits of `model` on `rows`.

    Raises:
        DivergedError: a logit is not finite.
    """
    found = engine.predict(model, rows, device=device).logits
    if not bool(torch.isfinite(found).all()):
        raise DivergedError(f"a logit on {name} is not finite")
    return found


def _relearnt(model: nn.Module, frame: Frame, seed: int, device: Any) -> dict[str, float]:
    """Return the forget accuracy after a quarter, half and all steps of training on D_r only."""
    student = copy.deepcopy(model)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    steps = frame.relearn_steps
    marks = {max(steps // 4, 1): "_quarter", max(steps // 2, 1): "_half", steps: ""}
    found: dict[str, float] = {}

    def measure(step: int) -> None:
        logits = _finite_logits(student, frame.forget, "forget", device)
        found[f"relearn_retain{marks[step]}"] = accuracy(logits, frame.forget.labels)

    try:
        engine.fit_steps(
            student,
            frame.retain,
            frame.recipe,
            steps=steps,
            lr=frame.spec.relearn.lr_scale * frame.recipe.lr,
            seed=seed,
            device=device,
            at=sorted(marks),
            observe=measure,
        )
    except DivergedError:
        return {}  # the probe diverged: relearn_retain is absent, with that reason
    return found


# --------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Evaluation:
    """Named numbers of a subject, the same of the retrained pool, and what is absent and why.

    `intervals` are bootstrap limits over the test rows, of corrections only.
    """

    metrics: dict[str, float]
    reference: dict[str, float]
    reference_std: dict[str, float]
    missing: dict[str, str]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def evaluate(
    subject: Outputs,
    pool: Sequence[Outputs],
    frame: Frame,
    *,
    original_test_accuracy: float | None = None,
    mubench_method: str = "",
    groups: Iterable[str] = GROUPS,
) -> Evaluation:
    """Return the default tier of `subject` on `frame`, against the retrained `pool` (may be empty).

    `reference` is the mean over the pool of every number that a single model has; the distances of
    the subject to the pool are in `metrics`. Absent numbers are in `missing` with the reason.

    Raises:
        DataError: an unknown group.
    """
    if frame.kind == "correction":
        return _corrected(subject, pool, frame)
    groups = set(groups)
    if groups - set(GROUPS):
        raise DataError(
            f"expected groups of {', '.join(GROUPS)}, got {sorted(groups - set(GROUPS))}"
        )
    missing: dict[str, str] = {}

    def single(outputs: Outputs, absent: dict[str, str]) -> dict[str, float]:
        found = _accuracies(outputs, frame) | dict(outputs.numbers)
        if "mia" in groups:
            found |= _membership(outputs, frame, absent)
        if "mubench" in groups:
            found |= _mubench(outputs, frame, original_test_accuracy, mubench_method)
        return found

    with threadpool_limits(1, "blas"):  # tiny problems: more BLAS threads only wait for each other
        own = single(subject, missing)
        asked = (id(frame), original_test_accuracy, mubench_method, frozenset(groups))
        members = [_remembered(member, asked, frame, single) for member in pool]
    reference = {
        name: float(np.mean([member[name] for member in members]))
        for name in own
        if members and all(name in member for member in members)
    }
    spread = {
        name: float(np.std([member[name] for member in members], ddof=1))
        for name in reference
        if len(members) > 1
    }
    if pool:
        own |= _distances(subject, pool, frame, own, members)
    for name in _expected(frame.kind, groups):
        if name not in own:
            missing.setdefault(name, _reason(name, own, missing, bool(pool)))
    return Evaluation(_ordered(own), _ordered(reference), _ordered(spread), missing)


def _corrected(subject: Outputs, pool: Sequence[Outputs], frame: Frame) -> Evaluation:
    """Return the numbers of a correction; the pool holds the oracle of its weights, if any."""
    spec = frame.correction
    own, missing = correction_numbers.numbers(subject.test, frame.test, spec)
    own |= dict(subject.numbers)
    own["nll_prior"] = pareto.prior_nll(frame.test.labels.numpy())
    own["acc_retain"] = accuracy(subject.retain_eval, frame.retain_eval.labels, split="retain")
    if spec.attack is not None and not subject.numbers:
        missing |= dict.fromkeys(correction_numbers.ATTACKED, "these inputs cannot be attacked")
    reference: dict[str, float] = {}
    if pool:
        reference = correction_numbers.numbers(pool[0].test, frame.test, spec)[0]
        reference |= dict(pool[0].numbers)
        own |= correction_numbers.to_oracle(
            subject.test,
            [one.test for one in pool],
            own.get(spec.metric),
            reference.get(spec.metric),
        )
    seed = derive(frame.seed, "bootstrap", frame.draw)
    limits = correction_numbers.intervals(
        subject.test, frame.test, spec, seed, frame.spec.confidence
    )
    return Evaluation(_ordered(own), _ordered(reference), {}, missing, limits)


_Single = Callable[[Outputs, dict[str, str]], dict[str, float]]
_MEMBERS: WeakKeyDictionary[Outputs, dict[Hashable, tuple[Frame, dict[str, float]]]]
_MEMBERS = WeakKeyDictionary()


def _remembered(
    member: Outputs, asked: Hashable, frame: Frame, single: _Single
) -> dict[str, float]:
    """Return the numbers of a pool member, computed once for all units of a draw."""
    known = _MEMBERS.setdefault(member, {})
    if asked not in known:
        known[asked] = (frame, single(member, {}))  # the frame is kept: its id is in the key
    return known[asked][1]


def _expected(kind: str, groups: set[str]) -> list[str]:
    """Return the names of the default tier that outputs of this kind of forgetting can have."""
    asked = {"core"} | groups
    outside = {"cost", "board"}  # known to the runner and to the leaderboard
    has = kind if kind in CLASS_KINDS else "instance"
    return [
        name
        for name, spec in METRICS.items()
        if has in spec.kinds and not outside & set(spec.needs) and _group(name) in asked
    ]


def _group(name: str) -> str:
    return "mubench" if name.startswith("mubench.") else "mia" if "umia" in name else "core"


def _reason(name: str, own: Mapping[str, float], missing: Mapping[str, str], has_pool: bool) -> str:
    """Return why a number that outputs can have is not there."""
    base = {gap: of for of, gap in _GAPS.items()}.get(name, "")
    if "pool" in METRICS[name].needs and not has_pool:
        return "no retrained model to compare with"
    if base:
        return "a retrained model lacks it" if base in own else f"{base} is absent"
    if name.startswith("relearn_"):
        return "the probe was left out or its training diverged"
    if name.startswith("umia_"):
        return missing.get("umia_auc", "the attack cannot be run")
    if name == "mubench.unlearn_overall_accuracy":
        return "the original's test accuracy is not known"
    which = "kept sub-labels of the same label" if "siblings" in name else "forgotten (sub-)labels"
    return f"no test rows of the {which}"


def _ordered(numbers: Mapping[str, float]) -> dict[str, float]:
    place = {name: at for at, name in enumerate(METRICS)}
    return {name: numbers[name] for name in sorted(numbers, key=lambda n: (place.get(n, 999), n))}


def _accuracies(outputs: Outputs, frame: Frame) -> dict[str, float]:
    test, labels = outputs.test, frame.test.labels.numpy()
    found = {
        "acc_forget": accuracy(outputs.forget, frame.forget.labels, split="forget"),
        "acc_retain": accuracy(outputs.retain_eval, frame.retain_eval.labels, split="retain"),
        "acc_test": accuracy(test, labels, split="test"),
    }
    if frame.kind not in CLASS_KINDS:
        return found
    masks = (~frame.forgotten, frame.forgotten, frame.siblings)
    for name, mask in zip(LABEL_ONLY, masks, strict=True):
        rows = mask.numpy()
        if rows.any():
            found[name] = accuracy(test[rows], labels[rows], split="test")
    return found


def _nonmembers(frame: Frame) -> np.ndarray:
    mask = frame.forgotten if frame.kind in CLASS_KINDS else torch.ones_like(frame.forgotten)
    return mask.numpy()


def _membership(outputs: Outputs, frame: Frame, missing: dict[str, str]) -> dict[str, float]:
    rows = _nonmembers(frame)
    labels = frame.test.labels.numpy()[rows]
    logits, forget_labels = outputs.test[rows], frame.forget.labels.numpy()
    if not rows.any():
        missing["umia_auc"] = "no test rows of the forgotten (sub-)labels"
        return {}
    found: dict[str, float] = {}
    inside = membership.confidence(outputs.forget, forget_labels, split="forget")
    outside = membership.confidence(logits, labels, split="test")
    try:
        weight = membership.label_histogram_weights(labels, forget_labels)
        found["umia_auc"] = membership.umia_auc(inside, outside, weight)
        rate = membership.umia_tpr1(inside, outside, weight, frame.spec.mia.fpr)
        if rate is None:
            missing["umia_tpr1"] = f"fewer than {membership.MIN_NONMEMBERS} non-members"
        else:
            found["umia_tpr1"] = rate
    except DataError as error:
        missing["umia_auc"] = str(error)
    try:
        found["umia_logistic"] = membership.logistic_mia(
            membership.cross_entropy(outputs.forget, forget_labels, split="forget"),
            membership.cross_entropy(logits, labels, split="test"),
            seed=derive(frame.seed, "umia_logistic", frame.draw),
        )
    except DataError as error:
        missing["umia_logistic"] = str(error)
    return found


def _mubench(
    outputs: Outputs, frame: Frame, original_test_accuracy: float | None, method: str
) -> dict[str, float]:
    return mubench.block(
        test=(outputs.test, frame.test.labels),
        forget=(outputs.forget, frame.forget.labels),
        retain=(outputs.retain_eval, frame.retain_eval.labels),
        orig_dt=original_test_accuracy,
        dataset=frame.data,
        method=method,
        seed=derive(frame.seed, "zrf", frame.draw),
    )


def _distances(
    subject: Outputs,
    pool: Sequence[Outputs],
    frame: Frame,
    own: Mapping[str, float],
    members: Sequence[Mapping[str, float]],
) -> dict[str, float]:
    def values(name: str) -> list[float]:
        return [member[name] for member in members if name in member]

    found = {
        name.replace("acc_", "delta_", 1): distance.delta(own[name], values(name))
        for name in own
        if name.startswith("acc_") and len(values(name)) == len(members)
    }
    kept = "acc_test_retained" if "acc_test_retained" in own else "acc_test"
    parts = [
        own[name] - distance.mean_of_pool(values(name))
        for name in ("acc_forget", "acc_retain", kept)
    ]
    found["tow"] = distance.tow(*parts)
    found["avg_gap"] = distance.avg_gap(*(100 * part for part in parts))
    found["js_forget"] = divergence.js_to_pool(subject.forget, [m.forget for m in pool])
    found["js_test"] = divergence.js_to_pool(subject.test, [m.test for m in pool])
    found["disagree_forget"] = divergence.disagree(subject.forget, [m.forget for m in pool])
    for name, gap in _GAPS.items():
        if name in own and len(values(name)) == len(members):
            found[gap] = distance.gap(own[name], values(name))
    return found


_GAPS = {"umia_auc": "gap_umia_auc", "relearn_retain": "gap_relearn", "probe5": "gap_probe5"}
