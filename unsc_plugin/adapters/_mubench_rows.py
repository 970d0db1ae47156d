"""MU-Bench's splits as rows: decoded once where they fit, pixels brought back to [0, 1]."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unsc_plugin.errors import DataError
from unsc_plugin.rows import Rows

LABELS = ("label", "labels", "label_ids")
NO_INPUT = (*LABELS, "is_df")
IN_MEMORY_BYTES = 2**30
_CHUNK = 256
_GRID = 0.05
"""How far from a whole number of 255ths a pixel may lie and still be one."""

Statistics = tuple[Sequence[float], Sequence[float]]


def input_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the inputs that a model takes."""
    return frozenset(inspect.signature(model.forward).parameters)


class Reader:
    """Reads rows of several datasets by their position in all of them together.

    Items keep what the model takes and the label; `collate` makes a batch of them. With `restore`
    pixels are mapped back to [0, 1]; those of 8-bit images come back as bytes, exactly. A dataset
    is read whole and kept when it is first asked for, unless it is too large or `fixed` is off
    (random transforms, which are then drawn at every access).
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        collate: Callable[[list[Any]], Any],
        names: frozenset[str],
        *,
        restore: Statistics | None = None,
        fixed: bool = True,
    ) -> None:
        self._datasets, self._collate, self._names = list(datasets), collate, names
        self._restore, self._fixed = restore, fixed
        self._borders = [0, *itertools.accumulate(len(one) for one in self._datasets)]
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._as_bytes: bool | None = None

    def __call__(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the rows at `positions` int64 (B,)."""
        home = torch.bucketize(positions, torch.tensor(self._borders[1:]), right=True)
        parts, order = [], []
        for number in torch.unique(home).tolist():
            mine = torch.nonzero(home == number)[:, 0]
            parts.append(self._columns(number, positions[mine] - self._borders[number]))
            order.append(mine)
        back = torch.argsort(torch.cat(order))
        return {key: torch.cat([part[key] for part in parts])[back] for key in parts[0]}

    def warm(self, number: int) -> None:
        """Read a dataset whole if it is to be kept, so that no method is charged for it."""
        if self._fixed and number not in self._kept and len(self._datasets[number]):
            first = self._read(number, [0])
            size = sum(column.element_size() * column.nelement() for column in first.values())
            if size * len(self._datasets[number]) <= IN_MEMORY_BYTES:
                self._kept[number] = self._whole(number)

    def _columns(self, number: int, positions: Tensor) -> dict[str, Tensor]:
        self.warm(number)
        if number in self._kept:
            return {key: column[positions] for key, column in self._kept[number].items()}
        return self._read(number, positions.tolist())

    def _whole(self, number: int) -> dict[str, Tensor]:
        count = len(self._datasets[number])
        found: dict[str, Tensor] = {}
        for start in range(0, count, _CHUNK):
            part = self._read(number, range(start, min(start + _CHUNK, count)))
            for key, column in part.items():  # filled in place: never two copies at a time
                whole = found.setdefault(key, column.new_empty((count, *column.shape[1:])))
                whole[start : start + len(column)] = column
        return found

    def _read(self, number: int, positions: Sequence[int]) -> dict[str, Tensor]:
        wanted = self._names.union(LABELS)
        items = [self._datasets[number][int(at)] for at in positions]
        batch = self._collate(
            [{key: value for key, value in item.items() if key in wanted} for item in items]
        )
        found = {
            key: value
            for key, value in batch.items()
            if isinstance(value, Tensor) and key not in NO_INPUT
        }
        if self._restore is not None and "pixel_values" in found:
            found["pixel_values"] = self._restored(found["pixel_values"])
        return found

    def _restored(self, pixels: Tensor) -> Tensor:
        assert self._restore is not None
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in self._restore)
        levels = (pixels * std + mean) * 255
        low, high = float(levels.min()), float(levels.max())
        if low < -2.5 or high > 257.5:
            raise DataError(
                "expected pixels that were normalised by the statistics of the base model's image "
                f"processor, got {low / 255:.3g} to {high / 255:.3g} after undoing that"
            )
        whole = levels.round().clamp(0, 255)
        if self._as_bytes is None:
            self._as_bytes = bool((levels - whole).abs().max() < _GRID)
        return whole.to(torch.uint8) if self._as_bytes else (levels / 255).clamp(0, 1)


def rows_of(
    datasets: Sequence[Any],
    labels: Sequence[np.ndarray],
    index: Sequence[np.ndarray],
    reader: Reader,
) -> list[Rows]:
    """Return the rows of several datasets as views of one storage, labels and indices known."""
    every = Rows.of(
        {},
        torch.as_tensor(np.concatenate(list(labels))),
        torch.as_tensor(np.concatenate(list(index))),
        decode=reader,
    )
    borders = [0, *itertools.accumulate(len(one) for one in datasets)]
    return [every.subset(torch.arange(start, stop)) for start, stop in itertools.pairwise(borders)]
