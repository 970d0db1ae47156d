"""Bootstrap intervals of numbers about groups, by resampling within (label, group) cells.

Every number is a function of the means of a few columns in every cell, so that a thousand resamples
are one matrix product per cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays
from unsc_plugin.metrics._arrays import FloatArray, IntArray
from unsc_plugin.metrics._groups import NAMES, groups_of, missing, positive_of
from unsc_plugin.metrics.membership import cross_entropy

_DRAWS_AT_ONCE = 1 << 20


def bootstrap(
    logits: Any,
    labels: Any,
    groups: Any,
    names: Iterable[str] = NAMES,
    resamples: int = 1000,
    *,
    seed: int,
    confidence: float = 0.95,
    positive_class: int | None = None,
) -> dict[str, tuple[float, float]]:
    """Return an interval (low, high) per name: quantiles of :func:`bootstrap_values`.

    Args:
        logits: (B, K).
        labels: (B,).
        groups: (B,), or None.
        names: some of :data:`NAMES`.
        resamples: number of resamples.
        seed: of the resamples, ≥ 0.
        confidence: share of the resamples that an interval holds, the rest cut evenly.
        positive_class: as in `block`.

    Raises:
        DataError: a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise DataError(f"bootstrap: expected 0 < confidence < 1, got {confidence}")
    values = bootstrap_values(
        logits, labels, groups, names, resamples, seed=seed, positive_class=positive_class
    )
    ends = ((1 - confidence) / 2, (1 + confidence) / 2)
    found = {}
    for name, sample in values.items():
        low, high = np.quantile(sample, ends)
        found[name] = (float(low), float(high))
    return found


def bootstrap_values(
    logits: Any,
    labels: Any,
    groups: Any,
    names: Iterable[str] = NAMES,
    resamples: int = 1000,
    *,
    seed: int,
    positive_class: int | None = None,
) -> dict[str, FloatArray]:
    """Return every named number on `resamples` resamples of the rows, each (resamples,).

    Rows are drawn with replacement within every (label, group) cell, so that no cell ever runs
    empty. The draws depend on labels, groups and seed only: for two models on the same rows the
    difference of their values is the paired one. Arguments as in :func:`bootstrap`.

    Raises:
        DataError: an unknown name, one that these rows do not allow, or no resample.
    """
    z, y = _arrays.labelled(logits, labels, "bootstrap")
    absent = missing(y, groups, num_classes=z.shape[1], positive_class=positive_class)
    names = tuple(names)
    for name in names:
        if name not in NAMES or name in absent:
            reason = absent.get(name, f"expected one of {', '.join(NAMES)}")
            raise DataError(f"bootstrap of {name}: {reason}")
    if resamples < 1 or seed < 0:
        raise DataError(f"bootstrap: expected resamples ≥ 1 and seed ≥ 0, got {resamples}, {seed}")
    g = np.full(len(y), -1) if groups is None else groups_of(groups, len(y))
    wanted = positive_of(positive_class, z.shape[1])
    cells = _resampled(_per_row(z, y, wanted), y, g, resamples, seed)
    return {name: _FROM_CELLS[name](cells, wanted) for name in names}


_PROBABILITY, _SELECTED, _RIGHT, _LOSS = range(4)


def _per_row(z: FloatArray, y: IntArray, wanted: int | None) -> FloatArray:
    """Return p₊, [ŷ=pos], [ŷ=y] and −log p_y of every row, (B, 4)."""
    chosen, column = z.argmax(axis=1), wanted or 0
    return np.column_stack(
        [_arrays.softmax(z)[:, column], chosen == column, chosen == y, cross_entropy(z, y)]
    )


@dataclass(frozen=True)
class _Cells:
    """Means (R, cells, 4) of the columns of :func:`_per_row`; label, group and rows of a cell."""

    means: FloatArray
    labels: IntArray
    groups: IntArray
    sizes: IntArray

    def mean(self, column: int, chosen: npt.NDArray[np.bool_]) -> FloatArray:
        """Return the mean over all rows of the chosen cells, (R,)."""
        weight = self.sizes[chosen] / self.sizes[chosen].sum()
        found: FloatArray = self.means[:, chosen, column] @ weight
        return found

    def by_group(self, column: int, among: npt.NDArray[np.bool_] | None = None) -> FloatArray:
        """Return the mean of every group, (R, groups), over the cells `among`."""
        cells = np.ones(len(self.sizes), bool) if among is None else among
        groups = range(int(self.groups.max()) + 1)
        return np.column_stack([self.mean(column, cells & (self.groups == g)) for g in groups])


def _resampled(
    values: FloatArray, labels: IntArray, groups: IntArray, resamples: int, seed: int
) -> _Cells:
    kinds, cell = np.unique(np.column_stack([labels, groups]), axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    means = np.empty((resamples, len(kinds), values.shape[1]))
    for place, (label, group) in enumerate(kinds.tolist()):
        generator = np.random.default_rng([seed, label, group + 1])
        means[:, place] = _resampled_means(values[cell == place], resamples, generator)
    return _Cells(means, kinds[:, 0], kinds[:, 1], np.bincount(cell))


def _resampled_means(
    values: FloatArray, resamples: int, generator: np.random.Generator
) -> FloatArray:
    """Return the column means of resamples of all rows, (resamples, columns)."""
    count = len(values)
    at_once = max(_DRAWS_AT_ONCE // count, 1)
    chunks = []
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = generator.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=size * count).reshape(size, count)
        chunks.append(times.astype(np.float64) @ values / count)
    return np.concatenate(chunks)


def _spread(rates: FloatArray) -> FloatArray:
    found: FloatArray = rates.max(axis=1) - rates.min(axis=1)
    return found


def _ratio(rates: FloatArray) -> FloatArray:
    top = rates.max(axis=1)
    ratio: FloatArray = np.divide(rates.min(axis=1), top, out=np.ones_like(top), where=top > 0)
    return ratio


def _soft(cells: _Cells, among: npt.NDArray[np.bool_]) -> FloatArray:
    means = cells.by_group(_PROBABILITY, among)
    if means.shape[1] == 2:
        signed: FloatArray = means[:, 1] - means[:, 0]
        return signed
    overall = cells.mean(_PROBABILITY, among & (cells.groups >= 0))
    worst: FloatArray = np.abs(means - overall[:, None]).max(axis=1)
    return worst


def _everywhere(cells: _Cells) -> npt.NDArray[np.bool_]:
    return np.ones(len(cells.sizes), bool)


_FROM_CELLS: Mapping[str, Callable[[_Cells, int | None], FloatArray]] = {
    "acc": lambda cells, _: cells.mean(_RIGHT, _everywhere(cells)),
    "nll": lambda cells, _: cells.mean(_LOSS, _everywhere(cells)),
    "dp_soft": lambda cells, _: _soft(cells, _everywhere(cells)),
    "dp_diff": lambda cells, _: _spread(cells.by_group(_SELECTED)),
    "dp_ratio": lambda cells, _: _ratio(cells.by_group(_SELECTED)),
    "eop_soft": lambda cells, wanted: _soft(cells, cells.labels == wanted),
    "eop_diff": lambda cells, wanted: _spread(cells.by_group(_SELECTED, cells.labels == wanted)),
    "eo_diff": lambda cells, wanted: np.maximum(
        _spread(cells.by_group(_SELECTED, cells.labels == wanted)),
        _spread(cells.by_group(_SELECTED, cells.labels != wanted)),
    ),
    "worst_group_acc": lambda cells, _: cells.means[:, cells.groups >= 0, _RIGHT].min(axis=1),
    "group_acc_gap": lambda cells, _: _spread(cells.by_group(_RIGHT)),
}
