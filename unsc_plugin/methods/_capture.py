"""Reading samples once: which ones, in which precision, and the Gram matrices per bucket."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unsc_plugin import engine, hooks
from unsc_plugin.errors import NonFiniteError
from unsc_plugin.hooks import View, Workspace
from unsc_plugin.linalg import Gram
from unsc_plugin.method import Batch, Rows, UnlearningTask
from unsc_plugin.methods._gram_store import Samples
from unsc_plugin.methods._unsc_settings import Settings
from unsc_plugin.rows import AUGMENTATIONS
from unsc_plugin.spec import derive

TRIED = {"text": 64}
"""Rows that views are verified on; more for texts, so that some are padded."""


@dataclass(frozen=True)
class Capture:
    """Reads rows through a model and gives the Gram matrices of what enters its layers.

    `model` is in the precision of the capture; `buckets` maps classes to buckets; `keep_padding`
    counts masked positions of texts too. All buckets share the memory of `room`.
    """

    model: nn.Module
    task: UnlearningTask
    settings: Settings
    views: Sequence[View]
    buckets: Sequence[int]
    keep_padding: bool
    room: Workspace = field(default_factory=Workspace)

    def grams(
        self,
        rows: Sequence[Rows],
        bucket: int,
        drawn: Tensor | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> dict[str, Gram]:
        """Return parameter -> Gram of one bucket's rows, summed over the processes.

        `drawn` are the indices that count, all without; `limits` the number of a layer's first.

        Raises:
            NonFiniteError: an input of a layer is not finite.
        """
        accelerator = self.task.accelerator
        inputs = itertools.chain.from_iterable(
            self._inputs(in_bucket(part, bucket, self.buckets, drawn), bucket) for part in rows
        )
        grams = hooks.collect_grams(
            self.model,
            inputs,
            self.views,
            limits=limits,
            patches=self.settings.patches,
            keep_padding=self.keep_padding,
            room=self.room,
        )
        for view in self.views:
            gram = grams[view.parameter]
            gram.matrix = engine.reduce_sum(gram.matrix, accelerator)
            gram.total = engine.reduce_sum(gram.total, accelerator)
            count = torch.tensor(float(gram.count), dtype=torch.float64)
            gram.count = int(engine.reduce_sum(count, accelerator))
            if not bool(torch.isfinite(gram.matrix).all()):
                raise NonFiniteError(
                    f"the inputs of layer {view.name} (bucket {bucket}) are not finite; the model "
                    "or the data hold NaN or infinity"
                )
        return grams

    def _inputs(self, rows: Rows, bucket: int) -> Iterator[dict[str, Tensor]]:
        if not len(rows):
            return
        loader = self.task.loader_over(
            rows,
            f"capture {bucket}",
            train=False,
            batch_size=self.settings.capture_batch,
            shuffle=False,
        )
        for batch in loader:
            real = batch.weight > 0  # a row that a process borrowed is another's
            if bool(real.any()):
                augmented = self.settings.view == "augmented"
                seen = _augmented(batch, self.task) if augmented else batch.inputs
                yield widened({key: value[real] for key, value in seen.items()}, self.model)


def in_bucket(rows: Rows, bucket: int, buckets: Sequence[int], drawn: Tensor | None) -> Rows:
    """Return the rows of a bucket, ordered by index."""
    mine = torch.tensor(list(buckets))[rows.labels] == bucket
    if drawn is not None:
        mine &= torch.isin(rows.index, drawn)
    chosen = torch.nonzero(mine)[:, 0]
    return rows.subset(chosen[torch.argsort(rows.index[chosen])])


def joined_rows(sources: list[Rows]) -> list[Rows]:
    """Return the rows as one split where they share their storage, else as they are."""
    if len(sources) == 2 and sources[0].all_index is sources[1].all_index:
        return [sources[0].merged(sources[1])]
    return sources


def trial(rows: list[Rows], task: UnlearningTask) -> dict[str, Tensor]:
    """Return the inputs that views are verified on: the same rows in every process."""
    first = rows[0]
    count = min(len(first), TRIED.get(task.modality, 16))
    order = torch.argsort(first.index)[:: max(len(first) // count, 1)][:count]
    return dict(first.subset(order).gather(list(range(count))).to(task.device).inputs)


def for_capture(model: nn.Module, settings: Settings) -> nn.Module:
    """Return the model in the precision of the capture, itself or a copy."""
    model.eval()
    wanted = torch.float64 if settings.wide else torch.float32
    narrow = [p for p in model.parameters() if p.is_floating_point() and p.dtype != wanted]
    if not narrow or (not settings.wide and all(p.dtype == torch.float64 for p in narrow)):
        return model  # a double model is captured as it is
    return copy.deepcopy(model).to(wanted)


def drawn_from(samples: Samples, settings: Settings, classes: int) -> Tensor | None:
    """Return the indices that are captured: a draw that depends on nothing but the samples."""
    number = settings.capture_samples
    if number is None:
        return None
    most = number if isinstance(number, int) else max(number)
    generator = torch.Generator().manual_seed(derive(0, "capture"))
    if settings.merge == "pooled":
        order = torch.randperm(len(samples), generator=generator)[:most]
        return samples.index[order].sort().values
    parts = []
    for label in range(classes):
        mine = samples.index[samples.labels == label]
        parts.append(mine[torch.randperm(len(mine), generator=generator)[:most]])
    return torch.cat(parts).sort().values


def limits_of(settings: Settings, views: Sequence[View]) -> dict[str, int] | None:
    if not isinstance(settings.capture_samples, tuple):
        return None
    return {v.parameter: n for v, n in zip(views, settings.capture_samples, strict=True)}


def _augmented(batch: Batch, task: UnlearningTask) -> dict[str, Tensor]:
    """Return a batch's inputs, augmented by draws of every row's own, whatever batch it is in."""
    augment = AUGMENTATIONS.get(task.recipe.augment)
    if augment is None or "pixel_values" not in batch.inputs:
        return batch.inputs
    pixels = [
        augment(
            image[None],
            torch.Generator().manual_seed(derive(task.seed, "augment/capture", index)),
            1,
            slice(0, 1),
        )
        for image, index in zip(batch.inputs["pixel_values"], batch.index.tolist(), strict=True)
    ]
    return {**batch.inputs, "pixel_values": torch.cat(pixels)}


def widened(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the inputs in the precision of the model's weights."""
    dtype = next(model.parameters()).dtype
    return {k: v.to(dtype) if torch.is_floating_point(v) else v for k, v in inputs.items()}
