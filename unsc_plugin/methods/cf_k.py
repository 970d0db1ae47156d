"""Catastrophic forgetting of the last k modules: fine-tune them, freeze the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unsc_plugin.method import TrainingConfig, UnlearningMethod, UnlearningTask
from unsc_plugin.methods import _last_modules as last


class CFk(UnlearningMethod):
    """Steps on CE_r for the last k parametrised modules in execution order, head included.

    Goel et al., *Towards Adversarial Evaluations for Inexact Machine Unlearning* (2022,
    arXiv 2201.06640). The rest is frozen: no gradient, eval mode, bit-identical. k an int counts
    modules, a float is a share (rounded up); modules that own parameters but have children count
    too, so that k = 1.0 is `finetune`. `cf_k.paper`: learning rate 0.01, 10 epochs.
    """

    @dataclass(frozen=True)
    class Config(TrainingConfig):
        """Settings of `cf_k`."""

        lr_scale: float = last.LR_SCALE
        k: int | float = last.K

    name = "cf_k"
    needs = last.NEEDS
    scenarios = last.SCENARIOS
    supports_weights = True
    config: Config

    def prepare(self, model: nn.Module, task: UnlearningTask) -> list[str]:
        """Return the names of the modules to train."""
        return last.selected(model, task, self.config.k)

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model with its last modules fine-tuned on the retain set."""
        last.freeze_all_but(model, task.prepared, task)
        task.stats["trained_modules"] = task.prepared
        last.train_on_retain(model, task, self.config)
        return model
