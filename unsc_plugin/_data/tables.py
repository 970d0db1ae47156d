"""Tables to features: standardised numbers, categories as 0/1, all fitted on training rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unsc_plugin.errors import DataError

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class TableEncoder:
    """What train says about every column: mean and deviation, or the categories.

    A column of two categories is one feature, 1 for the later one in sorted order; of more, one
    feature per category. Columns that are constant in train are left out; a category that train
    does not have becomes all zeros.
    """

    numbers: Mapping[str, tuple[float, float]]
    categories: Mapping[str, tuple[str, ...]]

    @classmethod
    def fit(cls, columns: Columns) -> TableEncoder:
        """Return the encoder of these training columns.

        Raises:
            DataError: a number that is missing or infinite, or no column that varies.
        """
        numbers: dict[str, tuple[float, float]] = {}
        categories: dict[str, tuple[str, ...]] = {}
        for name, values in columns.items():
            if values.dtype == object:
                found = tuple(sorted(set(values.tolist())))
                if len(found) > 1:
                    categories[name] = found
            else:
                _require_finite(name, values)
                if len(values) and values.min() < values.max():
                    numbers[name] = (float(values.mean()), float(values.std()))
        if not numbers and not categories:
            raise DataError(
                f"expected at least one column that varies, got {sorted(columns)}; "
                "check columns.input and columns.drop"
            )
        return cls(numbers, categories)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of every feature, in order; those of categories read `column=category`."""
        hot = [f"{name}={value}" for name in self.categories for value in self._told(name)]
        return (*self.numbers, *hot)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Whether every feature is a standardised number, in the order of :attr:`names`."""
        hot = sum(len(self._told(name)) for name in self.categories)
        return (True,) * len(self.numbers) + (False,) * hot

    def _told(self, name: str) -> tuple[str, ...]:
        """Return the categories that have a feature of their own."""
        found = self.categories[name]
        return found[1:] if len(found) == 2 else found

    def __call__(self, columns: Columns) -> Tensor:
        """Return the features, float32 (n, D): (x - mean)/deviation, then the categories.

        Raises:
            DataError: a number that is missing or infinite.
        """
        blocks = []
        for name, (mean, deviation) in self.numbers.items():
            _require_finite(name, columns[name])
            blocks.append(((columns[name] - mean) / deviation)[:, None].astype(np.float32))
        for name in self.categories:
            found = self._told(name)
            code = {value: position for position, value in enumerate(found)}
            at = np.array([code.get(value, -1) for value in columns[name].tolist()], np.int64)
            block = np.zeros((len(at), len(found)), np.float32)
            known = np.flatnonzero(at >= 0)
            block[known, at[known]] = 1
            blocks.append(block)
        return torch.from_numpy(np.concatenate(blocks, axis=1))


def _require_finite(name: str, values: np.ndarray) -> None:
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise DataError(
            f"expected numbers in column {name!r}, got {wrong} missing or infinite values; "
            "fill them before, or list the column in columns.drop"
        )
