"""Two small backbones that write down what a method does with them.

Both have the interface of every classifier here, `forward(**inputs)`, `features(**inputs)` and
`head`. While a :class:`Journal` is open they note every copy made of them and every forward pass.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from unsc_plugin.runtime import rows_of


@dataclass
class Copied:
    """A copy of a backbone: the module, and its state as it was when the copy was made."""

    model: nn.Module
    state: dict[str, Tensor]


@dataclass
class Journal:
    """What happened to the backbones, and how many optimiser steps were made, by whom ever.

    `work` counts samples forwarded, × 3 with gradient; `modes` holds the training flag of every
    forward pass with gradient, in order, per model.
    """

    copies: list[Copied] = field(default_factory=list)
    work: int = 0
    modes: dict[nn.Module, list[bool]] = field(default_factory=dict)
    optimizer_steps: int = 0


@contextlib.contextmanager
def journal() -> Iterator[Journal]:
    """Open a journal; it is the only one that is written to until it is closed."""
    book = Journal()

    def stepped(*_: Any) -> None:
        book.optimizer_steps += 1

    outer, Toy.journal = Toy.journal, book
    hook = register_optimizer_step_post_hook(stepped)
    try:
        yield book
    finally:
        hook.remove()
        Toy.journal = outer


class Toy(nn.Module):
    """A backbone that keeps the open journal up to date."""

    journal: ClassVar[Journal | None] = None
    pixel_domain = True
    head: nn.Linear

    def features(self, **inputs: Tensor) -> Tensor:
        """Return what enters the head, (B, D)."""
        raise NotImplementedError

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return logits (B, K)."""
        if Toy.journal is not None:
            self._note(Toy.journal, rows_of(next(iter(inputs.values()))))
        logits: Tensor = self.head(self.features(**inputs))
        return logits

    def _note(self, book: Journal, samples: int) -> None:
        book.work += samples * (3 if torch.is_grad_enabled() else 1)
        if torch.is_grad_enabled():
            book.modes.setdefault(self, []).append(self.training)

    def __copy__(self) -> Toy:
        twin = self._blank()
        twin.__dict__.update(self.__dict__)
        return _noted(twin)

    def __deepcopy__(self, memo: dict[int, Any]) -> Toy:
        twin = self._blank()
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return _noted(twin)

    def _blank(self) -> Toy:
        return self.__class__.__new__(self.__class__)


def _noted(twin: Toy) -> Toy:
    if Toy.journal is not None:
        Toy.journal.copies.append(Copied(twin, snapshot(twin)))
    return twin


class ConvNet(Toy):
    """Two convolutions with BatchNorm on images (B, C, H, W)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12))
        self.head = nn.Linear(12 * 4, num_classes)

    def features(self, **inputs: Tensor) -> Tensor:
        """Return features (B, 48)."""
        hidden = self.stem(inputs["pixel_values"] - 0.5).relu()
        hidden = self.body(hidden).relu()
        return nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1)


class Mlp(Toy):
    """Two hidden layers without any normalisation on rows of a table (B, D)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Linear(width, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, num_classes)

    def features(self, **inputs: Tensor) -> Tensor:
        """Return features (B, 16)."""
        hidden = nn.functional.gelu(self.stem(inputs["features"]))
        return nn.functional.gelu(self.body(hidden))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return clones of all state tensors."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
