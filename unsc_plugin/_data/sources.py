"""Splits as their sources hold them, and the sets that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from unsc_plugin.errors import DataError, UnknownName


class Column(Protocol):
    """A column that is picked from by an array of positions: an array, or images still encoded."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Any, /) -> Any: ...


@dataclass(frozen=True)
class Part:
    """One split: its inputs, its labels as stored, and text columns beside them.

    `inputs` holds one column of images or texts (a pair of texts: two), or the columns of a table:
    float64 for numbers, object (text) for categories.
    """

    inputs: Mapping[str, Column]
    labels: np.ndarray
    beside: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: np.ndarray) -> Part:
        """Return the rows at `positions`, in that order."""
        return Part(
            {name: column[positions] for name, column in self.inputs.items()},
            self.labels[positions],
            {name: column[positions] for name, column in self.beside.items()},
        )


@dataclass(frozen=True)
class Source:
    """All splits that a source has (`train` always) and its class names, if it knows them."""

    parts: Mapping[str, Part]
    class_names: tuple[str, ...] = ()


def numbered(count: int) -> tuple[str, ...]:
    """Return class names that are numbers."""
    return tuple(str(label) for label in range(count))


# --------------------------------------------------------------------------- scikit-learn


def read_sklearn(name: str, options: Mapping[str, Any]) -> Source:
    """Return a data set that scikit-learn ships: `digits`, `breast_cancer` or `wine`.

    Raises:
        UnknownName: another name.
        DataError: options; these sets have none.
    """
    from sklearn import datasets as sets

    makers = {
        "digits": sets.load_digits,
        "breast_cancer": sets.load_breast_cancer,
        "wine": sets.load_wine,
    }
    if name not in makers:
        raise UnknownName("scikit-learn data set", name, makers, f"known: {', '.join(makers)}")
    if options:
        raise DataError(f"expected no args for scikit-learn's {name}, got {sorted(options)}")
    bunch = makers[name]()
    inputs: dict[str, Column]
    if name == "digits":
        inputs = {"image": np.rint(bunch.images[:, None] * (255 / 16)).astype(np.uint8)}
    else:
        inputs = {
            str(column): np.ascontiguousarray(values)
            for column, values in zip(bunch.feature_names, bunch.data.T, strict=True)
        }
    names = tuple(str(label) for label in bunch.target_names)
    return Source({"train": Part(inputs, bunch.target.astype(np.int64), {})}, names)
