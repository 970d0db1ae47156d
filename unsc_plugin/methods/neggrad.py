"""Gradient ascent on the forget set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.method import (
    Batch,
    Scenario,
    Split,
    TrainingConfig,
    UnlearningMethod,
    UnlearningTask,
    option,
)


class NegGrad(UnlearningMethod):
    """`passes` passes over D_f, stepping on −CE_f, the mean of −ℓ over the batch.

    Weighted: over all samples with ε ≠ 0, stepping on the mean of ε·ℓ: those whose weight falls are
    climbed, those whose weight rises descended; for ε in {−1, 0} the set form to the bit.

    Golatkar, Achille and Soatto, *Eternal Sunshine of the Spotless Net* (CVPR 2020). The objective
    is unbounded below; the run ends as `diverged` at the first non-finite loss. BatchNorm uses its
    running statistics. `neggrad.paper`: learning rate 1e-4, 5 passes, batch 256, train mode with
    moving statistics. `neggrad.diverged`: the recipe's full learning rate for 10 passes, the
    over-forgetting control of a board. `epochs` wins over `passes` when given.
    """

    @dataclass(frozen=True)
    class Config(TrainingConfig):
        """Settings of `neggrad`."""

        lr_scale: float = option(
            1e-3, "learning rate as a share of the recipe's", above=0, search=(1e-4, 1e-2, "log")
        )
        passes: int = option(5, "passes over the forget set", low=0, search=(1, 20, "log"))
        move_statistics: bool = option(
            False, "BatchNorm in train mode on forget passes, as published code has it"
        )

    name = "neggrad"
    needs = frozenset({Split.FORGET})
    scenarios = frozenset(
        {Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.WEIGHTED, Scenario.SEQUENTIAL}
    )
    supports_weights = True
    config: Config

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model after ascent on the forget set."""
        config = self.config
        forget = task.changed(batch_size=config.batch_size)
        statistics: Literal["move", "eval"] = "move" if config.move_statistics else "eval"
        engine.fit_config(
            model,
            task,
            [engine.Stage(forget, ascent, statistics=statistics)],
            config,
            epochs=config.passes if config.epochs is None else config.epochs,
        )
        return model


def ascent(model: nn.Module, batch: Batch) -> Tensor:
    """Return −CE on the batch, so that a descent step climbs the forget loss."""
    return -engine.cross_entropy(model, batch)
