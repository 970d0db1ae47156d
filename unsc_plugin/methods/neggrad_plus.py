"""Descent on the retained and ascent on the forget data in one joint step (NegGrad+)."""

from __future__ import annotations

from dataclasses import dataclass

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

WORK_PER_EPOCH = 2.0


class NegGradPlus(UnlearningMethod):
    """Joint steps on α·CE_r − (1 − α)·CE_f, one batch of each, D_f cycled, epochs of D_r's length.

    Kurmanji et al., *Towards Unbounded Machine Unlearning* (NeurIPS 2023, arXiv 2302.09880), as
    NegGrad+. CE_r and CE_f are batch means of a·ℓ and r·ℓ, a = max(1 + ε, 0), r = max(−ε, 0). Two
    forward passes; the forget pass leaves BatchNorm's running statistics alone.
    `neggrad_plus.paper`: α 0.95, learning rate 0.01, 10 epochs, statistics moving on both passes.
    """

    @dataclass(frozen=True)
    class Config(TrainingConfig):
        """Settings of `neggrad_plus`."""

        lr_scale: float = option(
            0.1, "learning rate as a share of the recipe's", above=0, search=(0.01, 1.0, "log")
        )
        alpha: float = option(
            0.95,
            "share of the retain loss",
            low=0,
            high=1,
            search=(0.9, 0.999, "linear"),
            probe=0.5,
        )
        move_statistics: bool = option(
            False, "BatchNorm statistics move on forget passes too, as published code has it"
        )

    name = "neggrad_plus"
    needs = frozenset({Split.RETAIN, Split.FORGET})
    scenarios = frozenset(
        {Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.WEIGHTED, Scenario.SEQUENTIAL}
    )
    supports_weights = True
    config: Config

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model after joint descent and ascent."""
        config = self.config
        retain = task.loader("retain", batch_size=config.batch_size)
        forget = task.loader("forget", batch_size=config.batch_size)
        engine.fit_config(
            model,
            task,
            [engine.Stage(lambda _: engine.joint(retain, forget), self._loss, steps=len(retain))],
            config,
            epochs=config.passes_for(task.recipe, WORK_PER_EPOCH),
        )
        return model

    def _loss(self, model: nn.Module, pair: tuple[Batch, Batch]) -> Tensor:
        retain, forget = pair
        kept = engine.cross_entropy(model, retain)
        if self.config.move_statistics:
            gone = engine.cross_entropy(model, forget)
        else:
            with engine.statistics_kept(model):
                gone = engine.cross_entropy(model, forget)
        return self.config.alpha * kept - (1 - self.config.alpha) * gone
