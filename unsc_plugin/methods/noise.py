"""Gaussian noise on every parameter: the control that damages without looking at any data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unsc_plugin.method import Scenario, UnlearningMethod, UnlearningTask, option


class Noise(UnlearningMethod):
    """θ ← θ + scale·std(θ_t)·N(0, 1) for every trainable parameter tensor θ_t.

    std is over the entries of the tensor; a tensor of one entry, or of equal entries, stays. The
    draws come from the task's generator, tensor by tensor in `named_parameters` order; a tied
    weight is one tensor and is perturbed once.
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of `noise`."""

        scale: float = option(0.3, "noise as a share of the tensor's own std", low=0)

    name = "noise"
    needs = frozenset()
    scenarios = frozenset(Scenario)
    supports_weights = True
    control = True
    config: Config

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model with noise on its parameters."""
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    continue
                draw = torch.randn(parameter.shape, generator=task.generator)
                spread = parameter.float().std(unbiased=False) * self.config.scale
                parameter.add_((draw.to(parameter.device) * spread).to(parameter.dtype))
        return model
