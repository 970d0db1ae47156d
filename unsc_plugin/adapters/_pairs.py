"""Models and batches as other suites see them: one tensor in, logits out; pairs of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from unsc_plugin.errors import NotApplicable
from unsc_plugin.rows import Batch, Loader


class Positional(nn.Module):
    """A model whose only input is given by position; what it lacks is looked up in its backbone."""

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, K)."""
        logits: Tensor = self.model(**{self.key: inputs})
        return logits

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None or name.startswith("_"):  # copying and pickling are its own
                raise
            return getattr(getattr(model, "backbone", model), name)


class Pairs:
    """The batches of a loader as (inputs, labels).

    A batch of one row is given twice over: batch statistics need two rows, and means over the batch
    stay what they are.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.key = only_input(loader.rows.gather([0]))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            inputs, labels = batch.inputs[self.key], batch.labels
            if len(labels) == 1:
                inputs, labels = inputs.repeat(2, *[1] * (inputs.ndim - 1)), labels.repeat(2)
            yield inputs, labels


def only_input(batch: Batch) -> str:
    """Return the name of the one input of a batch.

    Raises:
        NotApplicable: several inputs.
    """
    if len(batch.inputs) != 1:
        raise NotApplicable(
            f"expected rows of one tensor, as that suite passes them on, got "
            f"{', '.join(sorted(batch.inputs))}; use a method of our own"
        )
    return next(iter(batch.inputs))
