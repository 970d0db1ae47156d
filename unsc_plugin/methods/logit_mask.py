"""Masking the head: the control for head editing in class-wise forgetting."""

from __future__ import annotations

import torch
from torch import nn

from unsc_plugin.errors import NotApplicable
from unsc_plugin.method import Scenario, UnlearningMethod, UnlearningTask

MASKED_BIAS = -1e4
"""Fits float16; softmax of a masked class is exactly 0 in float32."""


class LogitMask(UnlearningMethod):
    """Head rows of the forgotten classes: weight 0, bias −1e4; everything else bit-identical.

    Nothing is forgotten but the output: features, and every other logit, stay as they were. It
    needs the forget set's labels only. Control of Chen et al. (2024, arXiv 2404.13588) as defined
    by this package's boards.
    """

    name = "logit_mask"
    needs = frozenset()
    scenarios = frozenset({Scenario.CLASS})
    deterministic = True
    control = True

    def prepare(self, model: nn.Module, task: UnlearningTask) -> None:
        """Check that there is a Linear head with a bias.

        Raises:
            NotApplicable: no whole class is forgotten, or the head is no Linear layer with a bias.
        """
        head = getattr(model, "head", None)
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise NotApplicable(
                f"logit_mask needs a Linear head with a bias, got {type(head).__name__}"
            )
        if not task.forget_classes:
            raise NotApplicable("logit_mask needs a class without retained samples, got none")

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model with the forgotten classes masked."""
        rows = sorted(task.forget_classes)
        head = model.head
        assert isinstance(head, nn.Linear)  # prepare() has checked it
        task.promise_frozen(n for n, p in model.named_parameters() if p not in {*head.parameters()})
        with torch.no_grad():
            head.weight[rows] = 0
            head.bias[rows] = MASKED_BIAS
        return model
