"""Where the rows of a user's split come from: tensors, datasets read once or on access, batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torch.utils.data import default_collate as stacked

from unsc_plugin.errors import DataError, ForgetSetError
from unsc_plugin.models import INPUT_KEYS
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Modality

IN_MEMORY_BYTES = 2**30
LABELS = ("labels", "label", "targets", "target")
GROUP = "group"

Collate = Callable[[list[Any]], Any]
Columns = dict[str, Tensor]
Statistics = tuple[Sequence[float], Sequence[float]]


class Source(Protocol):
    """Rows somewhere: how many, and the columns of some of them."""

    def __len__(self) -> int: ...

    def columns(self, positions: Sequence[int]) -> Columns:
        """Return inputs by name, and `labels` (and `group`) among them."""
        ...


@dataclass(frozen=True)
class Held:
    """Columns in memory."""

    held: Columns

    def __len__(self) -> int:
        return len(self.held["labels"])

    def columns(self, positions: Sequence[int]) -> Columns:
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        return {key: column[chosen] for key, column in self.held.items()}


@dataclass(frozen=True)
class Items:
    """A map-style dataset, read item by item."""

    dataset: Any
    collate: Collate
    reader: Reader

    def __len__(self) -> int:
        return len(self.dataset)

    def columns(self, positions: Sequence[int]) -> Columns:
        """Return the columns of some items.

        Raises:
            DataError: items that do not fit into one batch.
        """
        items = [self.dataset[int(at)] for at in positions]
        try:
            batch = self.collate(items)
        except (RuntimeError, TypeError) as error:
            raise DataError(
                f"{self.reader.split}: expected items that make one batch, got {error}; pad or "
                "resize in the dataset, or give collate=..."
            ) from None
        return self.reader(batch)


@dataclass(frozen=True)
class Reader:
    """What a batch of the user's is, in our names.

    `key` is the name of inputs that have none; `restore` the mean and standard deviation that
    pixels were normalised with.
    """

    split: str
    label_key: str | None
    modality: Modality | None
    restore: Statistics | None = None

    def __call__(self, batch: Any) -> Columns:
        """Return inputs by name and `labels`.

        Raises:
            DataError: a batch that is neither (inputs, labels) nor named, or without labels.
        """
        if isinstance(batch, Mapping):
            columns = self._named(dict(batch))
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            columns = self._pair(*batch)
        else:
            what = f"{len(batch)} of them" if isinstance(batch, (tuple, list)) else type(batch)
            raise DataError(
                f"{self.split}: expected items (inputs, label) or named items, got {what}; give "
                "items with names, or collate=..."
            )
        columns["labels"] = self._labels(columns["labels"])
        return self._restored(columns)

    def is_batch(self, item: Any = None) -> bool:
        """Return whether an item is several rows: a vector of labels, or of something like it."""
        if isinstance(item, Mapping):
            keys = [key for key in (self.label_key, *LABELS) if key in item]
            label = item[keys[0]] if keys else next(iter(item.values()), None)
        else:
            label = item[1] if isinstance(item, (tuple, list)) and len(item) == 2 else None
        return isinstance(label, (Tensor, np.ndarray)) and label.ndim > 0

    def _named(self, batch: dict[str, Any]) -> Columns:
        known = (self.label_key,) if self.label_key else LABELS
        found = [key for key in known if key in batch]
        if not found:
            raise DataError(
                f"{self.split}: expected labels under {' or '.join(map(repr, known))}, got keys "
                f"{sorted(batch)}; say label_key=..."
            )
        labels: Any = batch.pop(found[0])
        inputs: Columns = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        if not inputs.keys() - {GROUP}:
            raise DataError(
                f"{self.split}: expected tensors beside the labels, got "
                f"{ {key: type(value).__name__ for key, value in batch.items()} }; let the dataset "
                "(or collate=...) return tensors"
            )
        return {**inputs, "labels": labels}

    def _pair(self, inputs: Any, labels: Any) -> Columns:
        if isinstance(inputs, Mapping):
            return {**dict(inputs), "labels": labels}
        inputs = torch.as_tensor(inputs)
        return {INPUT_KEYS[self.modality or modality_of(inputs)]: inputs, "labels": labels}

    def _labels(self, labels: Any) -> Tensor:
        labels = torch.as_tensor(labels)
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise DataError(
                f"{self.split}: expected one class number per row, got labels of type "
                f"{labels.dtype} and shape {tuple(labels.shape)}; give int64 of shape (rows,)"
            )
        if len(labels) and int(labels.min()) < 0:
            raise DataError(f"{self.split}: expected labels 0..K-1, got {int(labels.min())}")
        found: Tensor = labels.long()
        return found

    def _restored(self, columns: Columns) -> Columns:
        pixels = columns.get("pixel_values")
        if self.restore is None or pixels is None:
            return columns
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in self.restore)
        pixels = pixels * std + mean
        low, high = float(pixels.min()), float(pixels.max())
        if low < -0.01 or high > 1.01:
            raise DataError(
                f"{self.split}: expected pixels that were normalised by the given mean and std, "
                f"got {low:.3g} to {high:.3g} after undoing that; give the statistics of the "
                "dataset's own transform"
            )
        return {**columns, "pixel_values": pixels.clamp(0, 1)}


def modality_of(inputs: Tensor) -> Modality:
    """Return image for (B, C, H, W), text for integers (B, T), tabular for numbers (B, D).

    Raises:
        DataError: none of these.
    """
    whole = not inputs.is_floating_point()
    if inputs.ndim == 4:
        return "image"
    if inputs.ndim == 2:
        return "text" if whole else "tabular"
    raise DataError(
        f"expected images (B, C, H, W), token ids (B, T) or columns of numbers (B, D), got shape "
        f"{tuple(inputs.shape)}; say modality=..."
    )


def check_disjoint(splits: Mapping[str, Any]) -> None:
    """Refuse subsets of one dataset that share rows.

    Raises:
        ForgetSetError: a row is in two of them.
    """
    subsets = {
        name: part.dataset if isinstance(part, DataLoader) else part
        for name, part in splits.items()
    }
    found = {name: part for name, part in subsets.items() if isinstance(part, Subset)}
    for (a, one), (b, other) in itertools.combinations(found.items(), 2):
        both = set(one.indices) & set(other.indices) if one.dataset is other.dataset else set()
        if both:
            raise ForgetSetError(
                f"{a} and {b} share {len(both)} rows of their dataset (first: {min(both)}); a row "
                "belongs to one of them"
            )


def source(
    name: str, part: Any, reader: Reader, collate: Collate | None, in_memory: bool | None
) -> Source:
    """Return where the rows of a split are.

    Raises:
        DataError: nothing that can be read.
    """
    if isinstance(part, DataLoader):
        if not isinstance(part.dataset, IterableDataset):
            own = part.collate_fn if part.batch_size is not None else stacked
            return source(name, part.dataset, reader, collate or own, in_memory)
        return _read_once(name, part, reader)
    if isinstance(part, Rows):
        raise DataError(f"{name}: expected all splits to be rows, or none; got both kinds")
    held = None if collate not in (None, stacked) else _tensors(part)
    if held is not None:
        return Held(_same_length(name, reader(held)))
    batches = isinstance(part, list) and reader.is_batch(*part[:1])
    if isinstance(part, Sized) and hasattr(part, "__getitem__") and not batches:
        if not len(part):
            return Held({"labels": torch.empty(0, dtype=torch.int64)})
        items = Items(part, collate or stacked, reader)
        return _read_items(items) if _fits(items, in_memory) else items
    if isinstance(part, Iterable):
        return _read_once(name, part, reader)
    raise DataError(
        f"{name}: expected a dataset, a loader or a pair (inputs, labels), got "
        f"{type(part).__name__}"
    )


def _tensors(part: Any) -> tuple[Tensor, Tensor] | None:
    """Return (inputs, labels) where the split is two tensors, two arrays or rows of such."""
    if isinstance(part, Subset):
        whole = _tensors(part.dataset)
        chosen = torch.as_tensor(list(part.indices), dtype=torch.int64)
        return None if whole is None else (whole[0][chosen], whole[1][chosen])
    if isinstance(part, TensorDataset) and len(part.tensors) == 2:
        part = part.tensors
    is_pair = isinstance(part, (tuple, list)) and len(part) == 2
    if is_pair and all(isinstance(one, (Tensor, np.ndarray)) for one in part):
        return torch.as_tensor(part[0]), torch.as_tensor(part[1])
    return None


def _same_length(name: str, columns: Columns) -> Columns:
    sizes = {key: len(column) for key, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{name}: expected one label per row, got lengths {sizes}")
    return columns


def _read_once(name: str, batches: Iterable[Any], reader: Reader) -> Held:
    read = [reader(batch) for batch in batches]
    if not read:
        raise DataError(f"{name}: expected rows, got none; leave the split out")
    try:
        return Held({key: torch.cat([part[key] for part in read]) for key in read[0]})
    except RuntimeError as error:
        raise DataError(
            f"{name}: expected batches of one shape, got {error}; pad or resize in the dataset"
        ) from None


def _read_items(items: Items, chunk: int = 256) -> Held:
    chunks: Iterator[Columns] = (
        items.columns(range(start, min(start + chunk, len(items))))
        for start in range(0, len(items), chunk)
    )
    read = list(chunks)
    return Held({key: torch.cat([part[key] for part in read]) for key in read[0]})


def _fits(items: Items, in_memory: bool | None) -> bool:
    if in_memory is not None:
        return in_memory
    first = items.columns([0])
    return len(items) * sum(c.element_size() * c.nelement() for c in first.values()) < (
        IN_MEMORY_BYTES
    )


def views(sources: Mapping[str, Source], index: Mapping[str, Tensor]) -> Iterator[tuple[str, Rows]]:
    """Yield every split as a view of the common storage.

    Raises:
        DataError: inputs of different names or shapes, or as many positions as rows do not.
    """
    if not sources:
        return
    count = sum(len(source) for source in sources.values())
    borders = [0, *itertools.accumulate(len(source) for source in sources.values())]
    places = torch.arange(count)
    for (name, source), start in zip(sources.items(), borders, strict=False):
        if name in index:
            given = torch.as_tensor(index[name]).long()
            if given.shape != (len(source),):
                raise DataError(
                    f"{name}: expected a position for each of {len(source)} rows, got shape "
                    f"{tuple(given.shape)}"
                )
            places[start : start + len(source)] = given
    if all(isinstance(source, Held) for source in sources.values()):
        whole = _joined(sources)
        labels, group = whole.pop("labels"), whole.pop(GROUP, None)
        rows = Rows.of(whole, labels, places, group=group)
    else:
        decode = _Decoder(list(sources.values()), borders)
        labels, group = decode.labels()
        rows = Rows.of({}, labels, places, group=group, decode=decode)
    for name, (start, stop) in zip(sources, itertools.pairwise(borders), strict=True):
        yield name, rows.subset(torch.arange(start, stop))


def _joined(sources: Mapping[str, Source]) -> Columns:
    columns = {name: source.held for name, source in sources.items() if isinstance(source, Held)}
    shapes = {
        name: {key: (tuple(c.shape[1:]), c.dtype) for key, c in part.items()}
        for name, part in columns.items()
    }
    (first, shape), *others = shapes.items()
    for name, other in others:
        if other != shape:
            raise DataError(
                f"expected {name} to look like {first}, got {other} and {shape}; give both the "
                "same transform"
            )
    return {key: torch.cat([part[key] for part in columns.values()]) for key in shape}


@dataclass(frozen=True)
class _Decoder:
    """Reads rows of several sources by their position in the common storage."""

    sources: list[Source]
    borders: list[int]

    def __call__(self, positions: Tensor) -> Columns:
        columns = self._read(positions)
        return {key: column for key, column in columns.items() if key not in ("labels", GROUP)}

    def labels(self) -> tuple[Tensor, Tensor | None]:
        """Return the labels and groups of all rows, reading every row once."""
        read = [self._read(part) for part in torch.split(torch.arange(self.borders[-1]), 256)]
        labels = torch.cat([part["labels"] for part in read])
        group = torch.cat([part[GROUP] for part in read]) if GROUP in read[0] else None
        return labels, group

    def _read(self, positions: Tensor) -> Columns:
        home = torch.bucketize(positions, torch.tensor(self.borders[1:]), right=True)
        parts, order = [], []
        for at, source in enumerate(self.sources):
            mine = torch.nonzero(home == at)[:, 0]
            if len(mine):
                parts.append(source.columns((positions[mine] - self.borders[at]).tolist()))
                order.append(mine)
        back = torch.argsort(torch.cat(order))
        return {key: torch.cat([part[key] for part in parts])[back] for key in parts[0]}
