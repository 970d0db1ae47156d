"""The two forms of a method: a class, and a decorated function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unsc_plugin import UnlearningMethod, UnlearningTask, engine, register_method
from unsc_plugin.method import Scenario, Split, option

SCENARIOS = frozenset({Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM})


class SampleFinetune(UnlearningMethod):
    """θ ← θ − lr·∇CE_r(θ), steps on the mean cross-entropy of batches of the retained data."""

    @dataclass(frozen=True)
    class Config:
        """Settings of `sample_finetune`."""

        lr: float = option(0.05, "learning rate", above=0)
        epochs: int = option(1, "passes over the retained data", low=0)

    name = "sample_finetune"
    needs = frozenset({Split.RETAIN})
    scenarios = SCENARIOS
    config: Config

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model fine-tuned on the retain set."""
        stage = engine.Stage(task.loader("retain"), engine.cross_entropy)
        engine.fit(model, task, [stage], epochs=self.config.epochs, lr=self.config.lr)
        return model


@register_method("sample_shrink", scenarios=tuple(SCENARIOS), deterministic=True)
def sample_shrink(model: nn.Module, *, rate: float = 0.5) -> nn.Module:
    """θ_head ← (1 − rate)·θ_head."""
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(1 - rate)
    return model
