"""Thin `evaluate.Metric` classes over the pure functions: the one door to `evaluate`.

They are instantiated directly (`Accuracy()`), never loaded by name, so no network and no cache
folder is needed, and they combine freely: *labelled* classes read `predictions` (logits, (B, K))
and `references` (labels, (B,)); *indexed* classes also read `index`, the position in the original
training set, negative for examples no model was trained on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import evaluate
import numpy as np
import numpy.typing as npt
from datasets import Features, Value
from datasets import Sequence as ListOf

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays, membership, mubench
from unsc_plugin.metrics._arrays import FloatArray, IntArray
from unsc_plugin.metrics._catalogue import METRICS, Direction
from unsc_plugin.metrics.accuracy import accuracy
from unsc_plugin.metrics.distance import avg_gap, delta, tow
from unsc_plugin.metrics.divergence import disagree, js_to_pool

Mask = npt.NDArray[np.bool_]
_INPUTS = """
Args:
    predictions: logits, one row of K numbers per example.
    references: class numbers in [0, K).
"""
_BESIDE = {
    "index": "position in the original training set, negative for unseen examples.",
    "group": "code of the group, −1 for none.",
    "adversarial": "logits of the same examples, attacked.",
}


class RowMetric(evaluate.Metric):  # type: ignore[misc]  # the library ships no types
    """What all classes share: data kept in memory, and a direct path around Arrow.

    Subclasses set `indexed`, `beside` (further columns) and `directions` (emitted name ->
    direction) and define `_compute`, which takes arrays, tensors or nested lists and ignores
    keywords it does not know, because `evaluate.combine` hands every column to every member.
    Instances are not shared by threads.

    Args:
        **library: arguments of `evaluate.Metric`; by default data stay in memory, and the folder
            the library insists on creating is a temporary one that is gone after construction.
    """

    indexed: ClassVar[bool] = False
    beside: ClassVar[Mapping[str, Literal["integer", "logits"]]] = {}
    directions: ClassVar[dict[str, Direction]] = {}

    def __init__(self, **library: Any) -> None:
        library.setdefault("keep_in_memory", True)
        if library["keep_in_memory"] and library.get("cache_dir") is None:
            with tempfile.TemporaryDirectory() as folder:
                super().__init__(**{**library, "cache_dir": folder})
        else:
            super().__init__(**library)

    def _info(self) -> Any:
        logits, number = ListOf(Value("float64")), Value("int64")
        columns = {"predictions": logits, "references": number}
        for name, kind in self._further().items():
            columns[name] = logits if kind == "logits" else number
        told = "".join(f"    {name}: {_BESIDE[name]}\n" for name in self._further())
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=_INPUTS + told,
            features=Features(columns),
        )

    def _further(self) -> dict[str, Literal["integer", "logits"]]:
        return {**({"index": "integer"} if self.indexed else {}), **self.beside}

    def compute(
        self, *, predictions: Any = None, references: Any = None, **kwargs: Any
    ) -> dict[str, float] | None:
        """Compute from the data given here, or from what was added before.

        If all columns are given and nothing was added, they are not copied through Arrow.
        """
        given = {"predictions": predictions, "references": references, **kwargs}
        names = self._feature_names()
        complete = all(given.get(name) is not None for name in names)
        if complete and self.writer is None and self.num_process == 1:
            result: dict[str, float] = self._compute(**given)
            return result
        stored: dict[str, float] | None = super().compute(
            predictions=predictions, references=references, **kwargs
        )
        return stored

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add rows; tensors of any floating type and device are accepted.

        Raises:
            DataError: if the columns differ in length; nothing is added then.
        """
        columns = {
            "predictions": _arrays.floats(predictions, f"{self.name} predictions", ndim=2),
            "references": _arrays.integers(references, f"{self.name} references"),
            **{name: self._checked(name, column) for name, column in kwargs.items()},
        }
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"{self.name}: expected columns of one length, got {lengths}; add the same rows"
            )
        super().add_batch(**columns)

    def _checked(self, name: str, column: Any) -> FloatArray | IntArray:
        if self._further().get(name) == "logits":
            return _arrays.floats(column, f"{self.name} {name}", ndim=2)
        return _arrays.integers(column, name)


class Accuracy(RowMetric):
    """Share of rows whose arg-max is the label (micro), see `accuracy.accuracy`."""

    directions: ClassVar[dict[str, Direction]] = {"accuracy": "retrain"}

    def _compute(self, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references)}


class Confidence(RowMetric):
    """Log-odds of the label, see `membership.confidence`: mean, median, 95th percentile, nats."""

    directions: ClassVar[dict[str, Direction]] = {
        "confidence": "retrain",
        "confidence_median": "retrain",
        "confidence_p95": "retrain",
    }

    def _compute(self, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        conf = membership.confidence(predictions, references)
        return {
            "confidence": float(conf.mean()),
            "confidence_median": float(np.median(conf)),
            "confidence_p95": float(np.percentile(conf, 95)),
        }


class IndexedMetric(RowMetric):
    """A metric that tells forget, retain and unseen rows apart by their index.

    Args:
        forget_index: positions of the forget set in the original training set. If one of them is
            among the rows, all must be: a part of the forget set is not silently taken for it.
        **library: see :class:`RowMetric`.
    """

    indexed: ClassVar[bool] = True

    def __init__(self, forget_index: Any, **library: Any) -> None:
        self.forget_index = np.unique(_arrays.integers(forget_index, "forget_index"))
        super().__init__(**library)

    def _splits(self, index: Any, rows: int) -> dict[str, Mask]:
        """Return a mask per split that has rows: `forget`, `retain`, `test`.

        Raises:
            DataError: if the index does not fit the rows, repeats a training position, or holds
                only a part of the forget set.
        """
        position = _arrays.integers(index, f"{self.name} index")
        if len(position) != rows:
            raise DataError(
                f"{self.name}: expected one index per row, got index {position.shape} for "
                f"{rows} row(s); pass the index of the same rows"
            )
        seen = position >= 0
        _require_unique(position[seen], f"{self.name} index")
        forget = np.isin(position, self.forget_index)
        if 0 < np.count_nonzero(forget) < len(self.forget_index):
            raise DataError(
                f"{self.name}: expected all {len(self.forget_index)} forget examples among the "
                f"rows, got {np.count_nonzero(forget)}; evaluate the whole forget set"
            )
        masks = {"forget": forget, "retain": seen & ~forget, "test": ~seen}
        return {split: mask for split, mask in masks.items() if mask.any()}

    def _required(self, index: Any, rows: int, *wanted: str) -> dict[str, Mask]:
        """Return the masks of `_splits`.

        Raises:
            DataError: if a wanted split has no rows.
        """
        masks = self._splits(index, rows)
        for split in wanted:
            if split not in masks:
                raise DataError(
                    f"{self.name}: expected rows of {' and '.join(wanted)}, got none of {split}; "
                    "compute on all of them together (unseen rows have a negative index)"
                )
        return masks


class MembershipAUC(IndexedMetric):
    """Confidence attack on the forget set against unseen rows of the same label histogram.

    See `membership.umia_auc` and `membership.umia_tpr1` (absent below 100 usable non-members).

    Args:
        forget_index: see :class:`IndexedMetric`.
        fpr: false-positive rate of `umia_tpr1`.
        **library: see :class:`RowMetric`.
    """

    directions: ClassVar[dict[str, Direction]] = {
        name: METRICS[name].direction for name in ("umia_auc", "umia_tpr1")
    }

    def __init__(self, forget_index: Any, fpr: float = 0.01, **library: Any) -> None:
        self.fpr = fpr
        super().__init__(forget_index, **library)

    def _compute(self, predictions: Any, references: Any, index: Any, **_: Any) -> dict[str, float]:
        conf = membership.confidence(predictions, references)
        labels = _arrays.integers(references, f"{self.name} references")
        masks = self._required(index, len(conf), "forget", "test")
        inside, outside = masks["forget"], masks["test"]
        weight = membership.label_histogram_weights(labels[outside], labels[inside])
        result = {"umia_auc": membership.umia_auc(conf[inside], conf[outside], weight)}
        tpr = membership.umia_tpr1(conf[inside], conf[outside], weight, self.fpr)
        return result if tpr is None else {**result, "umia_tpr1": tpr}


class LogisticMIA(IndexedMetric):
    """Logistic regression on losses, forget rows against unseen rows: `membership.logistic_mia`.

    Args:
        forget_index: see :class:`IndexedMetric`.
        draw_seed: of the cut to equal sides and of the ten splits.
        **library: see :class:`RowMetric`.
    """

    directions: ClassVar[dict[str, Direction]] = {
        "umia_logistic": METRICS["umia_logistic"].direction
    }

    def __init__(self, forget_index: Any, draw_seed: int = 0, **library: Any) -> None:
        self.draw_seed = draw_seed
        super().__init__(forget_index, **library)

    def _compute(self, predictions: Any, references: Any, index: Any, **_: Any) -> dict[str, float]:
        loss = membership.cross_entropy(predictions, references)
        masks = self._required(index, len(loss), "forget", "test")
        value = membership.logistic_mia(
            loss[masks["forget"]], loss[masks["test"]], seed=self.draw_seed
        )
        return {"umia_logistic": value}


class RetrainDivergence(IndexedMetric):
    """Distance of the predictions to those of retrained models, per split that has rows.

    See `divergence.js_to_pool` (bits) and `divergence.disagree`.

    Args:
        reference: logits of retrained models, (m, N, K), or (N, K) for one model.
        forget_index: see :class:`IndexedMetric`.
        reference_index: index of the N reference rows, unique; None: the rows are in the order in
            which they are computed.
        **library: see :class:`RowMetric`.
    """

    directions: ClassVar[dict[str, Direction]] = {
        "js_forget": "down",
        "js_retain": "down",
        "js_test": "down",
        "disagree_forget": "down",
    }

    def __init__(
        self, reference: Any, forget_index: Any, reference_index: Any = None, **library: Any
    ) -> None:
        pool = _arrays.to_numpy(reference, "reference")
        self.reference = _arrays.floats(pool if pool.ndim == 3 else pool[None], "reference", ndim=3)
        self.reference_index = None
        if reference_index is not None:
            self.reference_index = _arrays.integers(reference_index, "reference_index")
            _require_unique(self.reference_index, "reference_index")
        super().__init__(forget_index, **library)

    def _compute(self, predictions: Any, references: Any, index: Any, **_: Any) -> dict[str, float]:
        z, _labels = _arrays.labelled(predictions, references, self.name)
        pool = self._aligned(_arrays.integers(index, f"{self.name} index"), z)
        result: dict[str, float] = {}
        for split, mask in self._splits(index, len(z)).items():
            result[f"js_{split}"] = js_to_pool(z[mask], pool[:, mask], split=split)
            if split == "forget":
                result["disagree_forget"] = disagree(z[mask], pool[:, mask], split=split)
        return result

    def _aligned(self, index: IntArray, z: FloatArray) -> FloatArray:
        """Return the reference logits of the given rows, (m, B, K).

        Raises:
            DataError: if a row has no reference, or shapes differ.
        """
        pool = self.reference
        if self.reference_index is not None:
            order = np.argsort(self.reference_index)
            at = np.searchsorted(self.reference_index[order], index).clip(max=len(order) - 1)
            missing = index[self.reference_index[order][at] != index]
            if len(missing):
                raise DataError(
                    f"{self.name}: expected reference logits of every row, got none for index "
                    f"{missing[0]} ({len(missing)} row(s)); score the pool on the same rows"
                )
            pool = pool[:, order[at]]
        if pool.shape[1:] != z.shape:
            raise DataError(
                f"{self.name}: expected reference logits of shape {z.shape}, got {pool.shape[1:]}; "
                "pass the same rows and classes, or give reference_index"
            )
        return pool


class TugOfWar(IndexedMetric):
    """Product and mean of the accuracy differences to retraining: `distance.tow`, `avg_gap`.

    Args:
        retrained: accuracies of the retrained models, fractions, one list for each of `forget`,
            `retain` and `test`.
        forget_index: see :class:`IndexedMetric`.
        forgotten_classes: labels left out of the test rows, for class-wise forgetting.
        **library: see :class:`RowMetric`.

    Raises:
        DataError: if `retrained` has other keys.
    """

    directions: ClassVar[dict[str, Direction]] = {
        name: METRICS[name].direction
        for name in ("tow", "avg_gap", "delta_forget", "delta_retain", "delta_test")
    }
    _SPLITS: ClassVar[tuple[str, str, str]] = ("forget", "retain", "test")

    def __init__(
        self,
        retrained: Mapping[str, Iterable[float]],
        forget_index: Any,
        forgotten_classes: Sequence[int] = (),
        **library: Any,
    ) -> None:
        if set(retrained) != set(self._SPLITS):
            raise DataError(
                f"tug of war: expected retrained accuracies of forget, retain and test, got "
                f"{sorted(retrained)}; give one list for each"
            )
        self.retrained = {split: list(retrained[split]) for split in self._SPLITS}
        self.forgotten_classes = tuple(forgotten_classes)
        super().__init__(forget_index, **library)

    def _compute(self, predictions: Any, references: Any, index: Any, **_: Any) -> dict[str, float]:
        z, y = _arrays.labelled(predictions, references, self.name)
        masks = self._required(index, len(z), *self._SPLITS)
        masks["test"] &= ~np.isin(y, self.forgotten_classes)
        deltas = {
            split: delta(
                accuracy(z[masks[split]], y[masks[split]], split=split), self.retrained[split]
            )
            for split in self._SPLITS
        }
        return {
            "tow": tow(**{split: pp / 100.0 for split, pp in deltas.items()}),
            "avg_gap": avg_gap(*deltas.values()),
            **{f"delta_{split}": pp for split, pp in deltas.items()},
        }


class MUBench(IndexedMetric):
    """MU-Bench's own numbers under their own definitions, see `mubench.block`.

    Args:
        original_dt: test accuracy of the original model.
        forget_index: see :class:`IndexedMetric`.
        dataset: MU-Bench's name of the data set, for its accuracy of guessing.
        method: MU-Bench's name of the method, if it has one.
        draw_seed: of the random outputs of `zrf`.
        **library: see :class:`RowMetric`.
    """

    directions: ClassVar[dict[str, Direction]] = {
        name: spec.direction for name, spec in METRICS.items() if name.startswith("mubench.")
    }

    def __init__(
        self,
        original_dt: float,
        forget_index: Any,
        dataset: str = "",
        method: str = "",
        draw_seed: int = 0,
        **library: Any,
    ) -> None:
        self.original_dt = original_dt
        self.dataset, self.method, self.draw_seed = dataset, method, draw_seed
        super().__init__(forget_index, **library)

    def _compute(self, predictions: Any, references: Any, index: Any, **_: Any) -> dict[str, float]:
        z, y = _arrays.labelled(predictions, references, self.name)
        masks = self._required(index, len(z), "forget", "test")
        rows = {split: (z[mask], y[mask]) for split, mask in masks.items()}
        return mubench.block(
            test=rows["test"],
            forget=rows["forget"],
            retain=rows.get("retain"),
            orig_dt=self.original_dt,
            dataset=self.dataset,
            method=self.method,
            seed=self.draw_seed,
        )


def trainer_metrics(
    metrics: Sequence[RowMetric] | Mapping[str, RowMetric], *, force_prefix: bool = False
) -> Callable[[Any], dict[str, float]]:
    """Return a `compute_metrics` for the Hugging Face Trainer.

    It reads the logits (the first array if the model returns several) and the labels; indexed
    metrics need `TrainingArguments(label_names=["labels", "index"], remove_unused_columns=False)`.
    The Trainer has gathered, ordered and de-duplicated the rows on every process before the call,
    so all processes compute the same numbers. For a dict of evaluation sets it is called per set.

    Args:
        metrics: a list, or a dict from prefix to metric if two are of one class.
        force_prefix: prefix every name with its metric's.
    """
    combined = evaluate.combine(
        dict(metrics) if isinstance(metrics, Mapping) else list(metrics),
        force_prefix=force_prefix,
    )

    def compute_metrics(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        columns = {"predictions": logits[0] if isinstance(logits, tuple | list) else logits}
        if isinstance(labels, tuple | list):
            labels, columns["index"] = labels
        result: dict[str, float] = combined.compute(references=labels, **columns)
        return result

    return compute_metrics


def _require_unique(index: IntArray, what: str) -> None:
    """Check that no position comes twice.

    Raises:
        DataError: naming the first position that does.
    """
    values, count = np.unique(index, return_counts=True)
    if (count > 1).any():
        raise DataError(
            f"{what}: expected every position once, got {values[count > 1][0]} "
            f"{count[count > 1][0]} times; drop duplicated rows"
        )
