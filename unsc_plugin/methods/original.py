"""The original model as it is: the control that forgets nothing."""

from __future__ import annotations

from torch import nn

from unsc_plugin.method import Scenario, UnlearningMethod, UnlearningTask


class Original(UnlearningMethod):
    """The original weights, θ = θ_O: scores about 0 on a healthy board by construction."""

    name = "original"
    needs = frozenset()
    scenarios = frozenset(Scenario)
    supports_weights = True
    identity = True
    deterministic = True
    control = True

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model unchanged."""
        return model
