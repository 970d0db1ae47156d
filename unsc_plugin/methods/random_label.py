"""Training the forget set on random labels, then the retained set on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.errors import NotApplicable
from unsc_plugin.method import (
    Loader,
    Rows,
    Scenario,
    Split,
    TrainingConfig,
    UnlearningMethod,
    UnlearningTask,
    option,
)


class RandomLabel(UnlearningMethod):
    """Per epoch: a pass over D_f on CE to labels y' ~ U{0..K−1}, then a pass over D_r on CE_r.

    Labels are drawn anew for every pass over all of D_f, so that the number of processes changes
    nothing; `exclude_true` draws among the K − 1 others. Weighted:
    the forget pass weighs r = max(−ε, 0), the retain pass a = max(1 + ε, 0). `order="mixed"`
    shuffles both into one stream. Graves et al. (AAAI 2021) call
    their relabelling amnesiac; Fan et al., *SalUn* (ICLR 2024, arXiv 2310.12508), use this form.
    Forget passes leave BatchNorm's running statistics alone; mixed batches move them.
    `random_label.paper`: learning rate 0.013, 10 epochs, moving statistics (SalUn's README).
    """

    @dataclass(frozen=True)
    class Config(TrainingConfig):
        """Settings of `random_label`."""

        lr_scale: float = option(
            0.13, "learning rate as a share of the recipe's", above=0, search=(0.013, 1.3, "log")
        )
        order: Literal["forget_then_retain", "mixed"] = option(
            "forget_then_retain",
            "one pass after the other, or one shuffled stream",
            choices=("forget_then_retain", "mixed"),
        )
        exclude_true: bool = option(False, "never draw the true label")
        move_statistics: bool = option(
            False, "BatchNorm statistics move on forget passes too, as published code has it"
        )

    name = "random_label"
    needs = frozenset({Split.RETAIN, Split.FORGET})
    scenarios = frozenset(
        {Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.WEIGHTED, Scenario.SEQUENTIAL}
    )
    supports_weights = True
    config: Config

    def prepare(self, model: nn.Module, task: UnlearningTask) -> None:
        """Check that there is another label to draw.

        Raises:
            NotApplicable: fewer than two classes.
        """
        if task.num_classes < 2:
            raise NotApplicable(f"random_label needs K >= 2 classes, got {task.num_classes}")

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model after training on random labels and on the retain set."""
        config = self.config
        share = task.size("forget") / max(task.size("retain"), 1)
        engine.fit_config(
            model,
            task,
            self._mixed(task) if config.order == "mixed" else self._in_turn(task),
            config,
            epochs=config.passes_for(task.recipe, 1 + share),
        )
        return model

    def _in_turn(self, task: UnlearningTask) -> list[engine.Stage]:
        forget = task.rows("forget")
        retain = task.loader("retain", batch_size=self.config.batch_size)
        statistics: Literal["move", "keep"] = "move" if self.config.move_statistics else "keep"
        return [
            self._relabelled(task, forget, None, "forget", statistics),
            engine.Stage(retain, engine.cross_entropy),
        ]

    def _mixed(self, task: UnlearningTask) -> list[engine.Stage]:
        return [self._relabelled(task, task.rows("forget"), task.rows("retain"), "mixed", "move")]

    def _relabelled(
        self,
        task: UnlearningTask,
        forget: Rows,
        beside: Rows | None,
        name: str,
        statistics: Literal["move", "keep"],
    ) -> engine.Stage:
        """Return a pass over D_f with labels drawn anew, merged with the rows `beside` it."""

        def loader() -> Loader:
            rows = forget.relabelled(self._draw(forget.labels, task))
            rows = rows if beside is None else rows.merged(beside)
            return task.loader_over(rows, name, batch_size=self.config.batch_size)

        count = len(forget) + (0 if beside is None else len(beside))
        steps = -(-count // (self.config.batch_size or task.recipe.batch_size))
        return engine.Stage(
            lambda epoch: loader().epoch(epoch),
            engine.cross_entropy,
            statistics=statistics,
            steps=steps,
        )

    def _draw(self, labels: Tensor, task: UnlearningTask) -> Tensor:
        return random_labels(labels, task.num_classes, task.generator, self.config.exclude_true)


def random_labels(
    labels: Tensor, num_classes: int, generator: torch.Generator, exclude_true: bool = False
) -> Tensor:
    """Return labels (B,) drawn from U{0..K−1}, or from the K − 1 classes that are not the true one.

    >>> g = torch.Generator().manual_seed(0)
    >>> bool((random_labels(torch.zeros(99, dtype=torch.int64), 3, g, True) == 0).any())
    False
    """
    if exclude_true:
        shift = torch.randint(1, num_classes, labels.shape, generator=generator)
        return (labels + shift) % num_classes
    return torch.randint(0, num_classes, labels.shape, generator=generator)
