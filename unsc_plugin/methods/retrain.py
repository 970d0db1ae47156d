"""Retraining from scratch on the retained data: the reference every other method is held to."""

from __future__ import annotations

from torch import nn

from unsc_plugin import engine
from unsc_plugin.method import Scenario, Split, UnlearningMethod, UnlearningTask


class Retrain(UnlearningMethod):
    """The recipe on D_r from a fresh initialisation; weighted: the mean of a·ℓ, a = max(1 + ε, 0).

    Exact unlearning by definition: the forget set is never read. Bourtoule et al., *Machine
    Unlearning* (S&P 2021), use it as the yardstick; here its row on a board is the noise floor.
    """

    name = "retrain"
    needs = frozenset({Split.RETAIN})
    scenarios = frozenset(Scenario)
    supports_weights = True

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return a fresh model trained by the recipe on the retain set."""
        fresh = task.fresh_model()
        engine.fit_recipe(fresh, task, task.loader("retain"))
        return fresh
