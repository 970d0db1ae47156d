"""Fine-tuning on the retained data, the simplest baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unsc_plugin import engine
from unsc_plugin.method import (
    Scenario,
    Split,
    TrainingConfig,
    UnlearningMethod,
    UnlearningTask,
    option,
)

WORK_PER_EPOCH = 1.0


class Finetune(UnlearningMethod):
    """Steps on CE_r(θ), the mean of a·ℓ over batches of D_r, from θ_O; a = max(1 + ε, 0).

    Forgets by neglect only (Warnecke et al. 2021; Golatkar et al. 2020 report it as a baseline).
    `finetune.paper`: learning rate 0.01 and 10 epochs as in the READMEs of Unlearn-Sparse and RUM.
    """

    @dataclass(frozen=True)
    class Config(TrainingConfig):
        """Settings of `finetune`."""

        lr_scale: float = option(
            0.1, "learning rate as a share of the recipe's", above=0, search=(0.01, 1.0, "log")
        )

    name = "finetune"
    needs = frozenset({Split.RETAIN})
    scenarios = frozenset(
        {Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.WEIGHTED, Scenario.SEQUENTIAL}
    )
    supports_weights = True
    config: Config

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model fine-tuned on the retain set."""
        retain = task.loader("retain", batch_size=self.config.batch_size)
        engine.fit_config(
            model,
            task,
            [engine.Stage(retain, engine.cross_entropy)],
            self.config,
            epochs=self.config.passes_for(task.recipe, WORK_PER_EPOCH),
        )
        return model
