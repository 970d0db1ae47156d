"""Exact unlearning of the last k modules: re-initialise and retrain them, freeze the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unsc_plugin.method import TrainingConfig, UnlearningMethod, UnlearningTask
from unsc_plugin.methods import _last_modules as last


class EUk(UnlearningMethod):
    """`cf_k` after the last k modules got the parameters and buffers of a fresh model.

    Goel et al. (2022, arXiv 2201.06640). With k = 1.0, lr_scale = 1 and the recipe's epochs it is
    `retrain`. A tied weight whose other use is frozen keeps its value. `eu_k.paper`: learning rate
    0.01, 10 epochs.
    """

    @dataclass(frozen=True)
    class Config(TrainingConfig):
        """Settings of `eu_k`."""

        lr_scale: float = last.LR_SCALE
        k: int | float = last.K

    name = "eu_k"
    needs = last.NEEDS
    scenarios = last.SCENARIOS
    supports_weights = True
    config: Config

    def prepare(self, model: nn.Module, task: UnlearningTask) -> list[str]:
        """Return the names of the modules to train anew."""
        return last.selected(model, task, self.config.k)

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model with its last modules trained from scratch on the retain set."""
        names: list[str] = task.prepared
        trained = set(last.freeze_all_but(model, names, task))
        task.stats["trained_modules"] = names
        fresh = task.fresh_model()
        with torch.no_grad():
            for name in names:
                reset(model.get_submodule(name), fresh.get_submodule(name), trained)
        last.train_on_retain(model, task, self.config)
        return model


def reset(module: nn.Module, fresh: nn.Module, trained: set[nn.Parameter]) -> None:
    """Copy the own parameters in `trained`, and the own buffers, of `fresh` into `module`."""
    for key, parameter in module.named_parameters(recurse=False):
        if parameter in trained:
            parameter.copy_(fresh.get_parameter(key))
    for key, buffer in module.named_buffers(recurse=False):
        buffer.copy_(fresh.get_buffer(key))
