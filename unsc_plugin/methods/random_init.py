"""An untrained network: the control that forgets everything."""

from __future__ import annotations

from torch import nn

from unsc_plugin.method import Scenario, UnlearningMethod, UnlearningTask


class RandomInit(UnlearningMethod):
    """The backbone as it was before training, θ = θ_init(seed). Forgets all, is of no use."""

    name = "random_init"
    needs = frozenset()
    scenarios = frozenset(Scenario)
    supports_weights = True
    control = True

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return an untrained model."""
        return task.fresh_model()
