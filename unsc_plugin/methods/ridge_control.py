"""Retraining with a heavier ridge: what robustness costs nothing but weight decay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unsc_plugin import engine
from unsc_plugin.method import Scenario, Split, UnlearningMethod, UnlearningTask, option


class RidgeControl(UnlearningMethod):
    """The recipe from scratch on unchanged data with `factor` × its weight decay.

    A control: a flatter classifier is more robust, and less decided, without any unlearning.
    A correction of robustness has to beat it. Recipes without weight decay stay as they are.
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of `ridge_control`."""

        factor: float = option(10.0, "times the recipe's weight decay", above=0)

    name = "ridge_control"
    needs = frozenset({Split.RETAIN})
    scenarios = frozenset({Scenario.CORRECTION})
    control = True
    config: Config

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return a fresh model trained with the heavier ridge."""
        fresh = task.fresh_model()
        decay = self.config.factor * task.recipe.weight_decay
        engine.fit_recipe(fresh, task, task.loader("retain"), weight_decay=decay)
        task.stats["weight_decay"] = decay
        return fresh
