"""What flows between data and methods: `Batch`, `Rows` (one split), `Loader` (batches in order).

Images that fit stay as one uint8 tensor and are turned into [0, 1] pixels batch by batch, on the
device they lie on; bigger sets decode on access in worker processes (:class:`StreamRows`).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from unsc_plugin.errors import ConfigError, DataError
from unsc_plugin.spec import derive

Positions = Tensor | np.ndarray | list[int]
"""Row numbers, or a mask with one truth value per row."""


@dataclass(frozen=True)
class Batch:
    """Some rows, ready for a backbone.

    Shapes, with B rows: `inputs` holds `pixel_values` float in [0, 1] (B, C, H, W), or `input_ids`
    and `attention_mask` (B, T), or `features` (B, D); `labels` and `index` int64 (B,), `index` is
    the position in the original training set (test and validation rows count down from -1);
    `group` int64 (B,) or None; `weight` float32 (B,). `total` is the number of rows of the whole
    step over all processes: Σ w·loss / total, summed over processes, is the mean of w·loss. It is
    not Σ w, so that a step fades with its weights and weights of 1 change nothing.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    index: Tensor
    weight: Tensor
    total: float
    group: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list[Batch]:
        """Return min(parts, B) micro-batches of nearly equal size; they keep `total`.

        Their losses, each divided by `total`, therefore add up to the loss of the batch.
        """
        count = min(parts, len(self))
        borders = [len(self) * at // count for at in range(count + 1)]
        cuts = itertools.pairwise(borders)
        return [self._map(operator.itemgetter(slice(start, stop))) for start, stop in cuts]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            {key: change(value) for key, value in self.inputs.items()},
            change(self.labels),
            change(self.index),
            change(self.weight),
            self.total,
            None if self.group is None else change(self.group),
        )


@dataclass(frozen=True)
class Rows:
    """One split in memory: shared storage and the positions that belong to the split.

    `positions`, `labels` (int64) and `weight` have one value per row of this view and lie on the
    CPU; the other columns have one per row of the storage. `extra` holds further columns
    (sub-labels).
    """

    storage: Mapping[str, Tensor]
    all_index: Tensor
    positions: Tensor
    labels: Tensor
    weight: Tensor
    all_group: Tensor | None = None
    all_extra: Mapping[str, np.ndarray] | None = None
    decode: Callable[[Tensor], dict[str, Tensor]] | None = None
    workers: int = 0

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        index: Tensor | None = None,
        *,
        group: Tensor | None = None,
        extra: Mapping[str, np.ndarray] | None = None,
        decode: Callable[[Tensor], dict[str, Tensor]] | None = None,
        workers: int = 0,
    ) -> Rows:
        """Return a split of all given rows; `index` defaults to 0..N-1, weights to 1.

        With `decode` nothing needs to lie in memory: it maps positions of the storage to inputs and
        runs in `workers` processes.

        Raises:
            DataError: columns of unequal length.
        """
        count = len(labels)
        index = torch.arange(count) if index is None else index
        lengths = {key: len(value) for key, value in inputs.items()} | {"index": len(index)}
        lengths |= {key: len(column) for key, column in (extra or {}).items()}
        if group is not None:
            lengths["group"] = len(group)
        wrong = {key: size for key, size in lengths.items() if size != count}
        if wrong:
            raise DataError(f"expected {count} rows in every column, as in labels, got {wrong}")
        return cls(
            dict(inputs),
            index.long(),
            torch.arange(count),
            labels.long(),
            torch.ones(count),
            None if group is None else group.long(),
            extra,
            decode,
            workers,
        )

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def index(self) -> Tensor:
        """Positions in the original training set, int64 (n,), on the CPU."""
        return self.all_index[self.positions]

    @property
    def group(self) -> Tensor | None:
        """Group of every row, int64 (n,), or None."""
        return None if self.all_group is None else self.all_group[self.positions]

    @property
    def extra(self) -> dict[str, np.ndarray]:
        """Further columns, one value per row of this split."""
        rows = self.positions.numpy()
        return {key: column[rows] for key, column in (self.all_extra or {}).items()}

    def subset(self, positions: Positions) -> Rows:
        """Return the rows at `positions` of this split, in that order; storage is shared."""
        chosen = _chosen(positions)
        return replace(
            self,
            positions=self.positions[chosen],
            labels=self.labels[chosen],
            weight=self.weight[chosen],
        )

    def weighted(self, weight: Tensor) -> Rows:
        """Return the same rows with other weights (n,).

        Raises:
            DataError: another number of weights than rows.
        """
        if weight.shape != (len(self),):
            raise DataError(f"expected {len(self)} weights, got shape {tuple(weight.shape)}")
        return replace(self, weight=weight.float())

    def relabelled(self, labels: Tensor) -> Rows:
        """Return the same rows with other labels (n,).

        Raises:
            DataError: another number of labels than rows.
        """
        if labels.shape != (len(self),):
            raise DataError(f"expected {len(self)} labels, got shape {tuple(labels.shape)}")
        return replace(self, labels=labels.long())

    def merged(self, other: Rows) -> Rows:
        """Return the rows of both splits, this one's first; both must be views of one storage.

        Raises:
            DataError: the splits do not share their storage.
        """
        if self.all_index is not other.all_index:
            raise DataError("expected two views of one storage, got splits of different data")
        return replace(
            self,
            positions=torch.cat([self.positions, other.positions]),
            labels=torch.cat([self.labels, other.labels]),
            weight=torch.cat([self.weight, other.weight]),
        )

    def to(self, device: torch.device | str) -> Rows:
        """Return the split with its storage on `device` (labels and positions stay on the CPU)."""
        return replace(self, storage={k: v.to(device) for k, v in self.storage.items()})

    def gather(self, positions: Positions, total: float | None = None) -> Batch:
        """Return the rows at `positions` of this split as a batch, without augmentation."""
        chosen = _chosen(positions)
        rows = self.positions[chosen]
        weight = self.weight[chosen]
        if self.decode is not None:
            inputs = self.decode(rows)
        else:
            inputs = {key: column[rows.to(column.device)] for key, column in self.storage.items()}
        if inputs.get("pixel_values", weight).dtype == torch.uint8:
            inputs["pixel_values"] = inputs["pixel_values"].float() / 255
        device = next(iter(inputs.values())).device
        batch = Batch(
            inputs,
            self.labels[chosen],
            self.all_index[rows],
            weight,
            float(len(weight)) if total is None else total,
            None if self.all_group is None else self.all_group[rows],
        )
        return batch if device.type == "cpu" else batch.to(device)


def _chosen(positions: Positions) -> Tensor:
    chosen = torch.as_tensor(positions)
    return chosen if chosen.dtype == torch.bool else chosen.long()


@dataclass(frozen=True)
class _Share:
    """One process's part of one step: its positions, and the size of the step."""

    positions: Tensor
    size: int
    borrowed: bool


class _Fetch(Dataset[Batch]):
    """Map-style view of the batches of one epoch, for worker processes."""

    def __init__(self, rows: Rows, plan: list[_Share]) -> None:
        self.rows, self.plan = rows, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> Batch:
        share = self.plan[step]
        return self.rows.gather(share.positions, float(share.size))


class Loader:
    """Batches of a split in an order that depends on (seed, name, epoch) only.

    Iterating starts the next epoch; :meth:`epoch` gives a certain one. No row is ever dropped: a
    trailing batch of one row is merged into the one before it when `shuffle` is on (batch
    statistics need two rows). With several processes, process `rank` gets every `world`-th row of
    each batch; a process whose share is empty gets the batch's first row with weight 0.

    Raises:
        ConfigError: an unknown augmentation.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        *,
        seed: int = 0,
        name: str = "",
        shuffle: bool = False,
        augment: str = "none",
        rank: int = 0,
        world: int = 1,
        device: torch.device | str | None = None,
        on_batch: Callable[[Batch], None] | None = None,
    ) -> None:
        known = ("none", *AUGMENTATIONS)
        if augment not in known:
            raise ConfigError(f"augment: expected {' or '.join(known)}, got {augment!r}")
        self.rows, self.batch_size, self.seed, self.name = rows, batch_size, seed, name
        self.shuffle, self.augment, self.rank, self.world = shuffle, augment, rank, world
        self.device, self.on_batch = device, on_batch
        self.next_epoch = 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self._borders()) - 1

    def __iter__(self) -> Iterator[Batch]:
        self.next_epoch += 1
        return self.epoch(self.next_epoch - 1)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of epoch `number`."""
        plan = self._plan(number)
        fetch = _Fetch(self.rows, plan)
        source: Iterable[Batch] = (
            DataLoader(
                fetch,
                batch_size=None,
                num_workers=self.rows.workers,
                generator=torch.Generator(),  # or workers are seeded from the global one
            )
            if self.rows.workers
            else (fetch[step] for step in range(len(plan)))
        )
        for step, (batch, share) in enumerate(zip(source, plan, strict=True)):
            if self.device is not None:
                batch = batch.to(self.device)
            if share.borrowed:
                batch = replace(batch, weight=torch.zeros_like(batch.weight))
            if self.augment != "none" and "pixel_values" in batch.inputs:
                batch = self._augmented(batch, share.size, number, step)
            if self.on_batch is not None:
                self.on_batch(batch)
            yield batch

    def _plan(self, number: int) -> list[_Share]:
        order = torch.arange(len(self.rows))
        if self.shuffle:
            generator = torch.Generator().manual_seed(
                derive(self.seed, f"order/{self.name}", number)
            )
            order = torch.randperm(len(self.rows), generator=generator)
        borders = self._borders()
        plan = []
        for start, stop in itertools.pairwise(borders):
            whole = order[start:stop]
            mine = whole[self.rank :: self.world]
            borrowed = len(mine) == 0
            plan.append(_Share(whole[:1] if borrowed else mine, len(whole), borrowed))
        return plan

    def _borders(self) -> list[int]:
        count = len(self.rows)
        borders = [*range(0, count, self.batch_size), count]
        if self.shuffle and len(borders) > 2 and borders[-1] - borders[-2] == 1:
            del borders[-2]
        return borders

    def _augmented(self, batch: Batch, size: int, number: int, step: int) -> Batch:
        generator = torch.Generator().manual_seed(
            derive(self.seed, f"augment/{self.name}", number, step)
        )
        share = slice(self.rank, size, self.world) if self.rank < size else slice(0, 1)
        augment = AUGMENTATIONS[self.augment]
        pixels = augment(batch.inputs["pixel_values"], generator, size, share)
        return replace(batch, inputs={**batch.inputs, "pixel_values": pixels})


def crop_flip(
    pixels: Tensor, generator: torch.Generator, size: int, share: slice, pad: int = 4
) -> Tensor:
    """Return every image shifted by up to `pad` pixels (zeros outside) and mirrored with chance ½.

    Pixels (B, C, H, W) in, the same shape out, by one gather. The draws are made for all `size`
    rows of the step and this process's `share` of them is used, so that the number of processes
    changes nothing.
    """
    _, _, height, width = pixels.shape
    pad = min(pad, height // 4, width // 4)
    draw = torch.randint(0, 2 * pad + 1, (size, 2), generator=generator)[share]
    flip = (torch.rand(size, generator=generator) < 0.5)[share]
    columns = torch.arange(width).expand(len(pixels), -1)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + draw[:, 1:]
    rows = torch.arange(height).expand(len(pixels), -1) + draw[:, :1]
    padded = functional.pad(pixels, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    device = pixels.device
    image = torch.arange(len(pixels), device=device)[:, None, None]
    moved = padded[image, rows.to(device)[:, :, None], columns.to(device)[:, None]]
    return moved.permute(0, 3, 1, 2).contiguous()


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator, int, slice], Tensor]] = {
    "crop_flip": crop_flip
}


def joint(main: Loader, cycled: Loader) -> Iterator[tuple[Batch, Batch]]:
    """Yield one batch of each loader per step; `cycled` starts over until `main` is through."""
    again: Iterator[Batch] = iter(())
    for batch in main:
        other = next(again, None)
        if other is None:
            again = iter(cycled)
            other = next(again)
        yield batch, other
