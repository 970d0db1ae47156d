"""torchunlearn (Harry24k/machine-unlearning-pytorch): its trainers as methods, its suite for ours.

The methods `torchunlearn_<name>` need version 0.1.1 (the wheel of 0.1.0 holds none of them), or a
checkout in `$TORCHUNLEARN_HOME`. Their code does the work; settings beyond the optimiser's are
their keywords. Nothing is imported from there before a method is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unsc_plugin.adapters._torchunlearn_suite import to_benchmark_suite
from unsc_plugin.adapters._torchunlearn_trainer import ONE_PROCESS, ForeignTrainer, Training
from unsc_plugin.errors import AttackFailed
from unsc_plugin.method import Scenario, Split, UnlearningTask, option

__all__ = [
    "ARU",
    "RFE",
    "Amun",
    "BadTeacher",
    "BoundaryShrink",
    "Finetune",
    "L1Sparse",
    "MuMis",
    "NegGrad",
    "RandomLabel",
    "SalUn",
    "Scrub",
    "SfrOn",
    "to_benchmark_suite",
]

RETAIN_WEIGHT = "weight of the loss on retained rows"
FORGET_WEIGHT = "weight of the loss on forget rows"
ALONE = "by default on forget rows alone, for as many steps as the retained rows have batches"


class Finetune(ForeignTrainer):
    """Steps on the cross-entropy of retained rows."""

    name = "torchunlearn_finetune"
    trainer = "Finetune"
    needs = frozenset({Split.RETAIN})


class NegGrad(ForeignTrainer):
    """Steps on −(1 − λ)·CE(D_f) + λ·CE(D_r) + γ·|θ|₁, λ = `retain_lambda`."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_neggrad`."""

        retain_lambda: float = option(0.0, RETAIN_WEIGHT, low=0, high=1, probe=0.5)
        l1_penalty_lambda: float = option(0.0, "weight γ of the L1 norm", low=0, probe=0.01)

    name = "torchunlearn_neggrad"
    trainer = "NegGrad"
    expected_failures = MappingProxyType({**ONE_PROCESS, "utility": ALONE})


class RandomLabel(ForeignTrainer):
    """Steps on (1 − λ)·CE(D_f, labels drawn at every step) + λ·CE(D_r) + γ·|θ|₁."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_randomlabel`."""

        retain_lambda: float = option(0.0, RETAIN_WEIGHT, low=0, high=1, probe=0.5)
        l1_penalty_lambda: float = option(0.0, "weight γ of the L1 norm", low=0, probe=0.01)

    name = "torchunlearn_randomlabel"
    trainer = "RandomLabel"
    expected_failures = MappingProxyType({**ONE_PROCESS, "utility": ALONE})


class L1Sparse(ForeignTrainer):
    """Steps on CE(D_r) + γ·|θ|₁."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_l1sparse`."""

        gamma: float = option(1e-5, "weight γ of the L1 norm", low=0, probe=0.01)

    name = "torchunlearn_l1sparse"
    trainer = "L1Sparse"
    needs = frozenset({Split.RETAIN})


class Scrub(ForeignTrainer):
    """Steps on λ_r·(CE + KL)(D_r) − λ_f·KL(D_f) in one loss, KL from the frozen original."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_scrub`."""

        retain_lambda: float = option(1.0, RETAIN_WEIGHT, low=0)
        forget_lambda: float = option(1.0, FORGET_WEIGHT, low=0)
        sgda_smoothing: float = option(0.0, "label smoothing", low=0, high=1, probe=0.2)
        msteps: int = option(1, "taken, not used there", low=0, inert="the trainer never reads it")

    name = "torchunlearn_scrub"
    trainer = "SCRUB"


class BadTeacher(ForeignTrainer):
    """Steps on λ_r·KL(D_r, original) + λ_f·KL(D_f, a re-initialised copy)."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_badteacher`."""

        retain_lambda: float = option(1.0, RETAIN_WEIGHT, low=0)
        forget_lambda: float = option(1.0, FORGET_WEIGHT, low=0)
        temperature: float = option(1.0, "divides the logits", above=0)

    name = "torchunlearn_badteacher"
    trainer = "BadTeacher"


class BoundaryShrink(ForeignTrainer):
    """Steps on λ_f·CE(D_f, nearest other class) + λ_r·CE(D_r); forgets one whole class."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_boundaryshrink`; the class is that of the request."""

        retain_lambda: float = option(1.0, RETAIN_WEIGHT, low=0)
        forget_lambda: float = option(1.0, FORGET_WEIGHT, low=0)

    name = "torchunlearn_boundaryshrink"
    trainer = "BoundaryShrink"
    scenarios = frozenset({Scenario.CLASS})
    one_class = True


class SalUn(ForeignTrainer):
    """Steps on λ_r·CE(D_r) + λ_f·CE(D_f, random labels), in the most salient weights only."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_salun`."""

        saliency_threshold: float = option(0.5, "share of weights that move", above=0, high=1)
        retain_lambda: float = option(1.0, RETAIN_WEIGHT, low=0)
        forget_lambda: float = option(1.0, FORGET_WEIGHT, low=0)
        enforce_frozen: bool = option(True, "undo what weight decay does to the others")

    name = "torchunlearn_salun"
    trainer = "SalUn"


class ARU(ForeignTrainer):
    """Steps away from the mean logits of D_f, towards those of attacked forget images."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_aru`; the class is that of the request."""

        margin: float = option(
            1.0, "margin of the triplet loss", low=0, inert="no gradient inside the margin"
        )
        eps: float = option(0.05, "how far a pixel may move", above=0)
        steps: int = option(50, "steps of the attack", low=1, probe=2)
        batch_size: int = option(128, "attacked images per step", low=1, probe=3)
        random_start: bool = option(True, "taken, not used there", inert="never read there")

    name = "torchunlearn_aru"
    trainer = "ARU"
    scenarios = frozenset({Scenario.CLASS})
    one_class = True
    attacks = True
    config: Config
    expected_failures = MappingProxyType(
        {
            **ONE_PROCESS,
            "losses": "the attack with its default reach takes no toy image out of its class",
        }
    )

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model that the trainer has changed.

        Raises:
            AttackFailed: no attacked image left the class, so that nothing is there to train on.
            ValueError: any other fault of the trainer.
        """
        try:
            return super().run(model, task)
        except ValueError as error:
            if "num_samples" not in str(error):  # of torch, about a loader without rows
                raise
            raise AttackFailed(
                f"{self.name}: no attacked image left the class within eps={self.config.eps}; "
                "raise eps or steps"
            ) from None


class Amun(ForeignTrainer):
    """Steps on λ_r·CE(D_r) + λ_a·CE(attacked forget images, labels that the model gives them)."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_amun`."""

        attack: str = option(
            "deepfool", "deepfool or pgd", choices=("deepfool", "pgd"), probe="pgd"
        )
        eps: float = option(
            8 / 255, "how far a pixel may move", above=0, inert="pgd alone reads it"
        )
        steps: int = option(20, "steps of the attack", low=1, probe=2)
        retain_lambda: float = option(1.0, RETAIN_WEIGHT, low=0)
        adv_lambda: float = option(1.0, "weight of the loss on attacked images", low=0)

    name = "torchunlearn_amun"
    trainer = "AMUN"
    attacks = True


class SfrOn(ForeignTrainer):
    """Steps on λ_r·CE(D_r) − λ_f·CE(D_f) where its gradient is large, weights averaged at times."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_sfron`."""

        forget_lambda: float = option(1.0, FORGET_WEIGHT, low=0)
        retain_lambda: float = option(1.0, RETAIN_WEIGHT, low=0)
        saliency_ratio: float = option(0.5, "share of weights that move", above=0, high=1)
        slow_alpha: float = option(0.5, "step of the slow weights", low=0, high=1, probe=0.1)
        slow_every: int = option(5, "steps between those of the slow weights", low=1, probe=2)

    name = "torchunlearn_sfron"
    trainer = "SFRon"


class MuMis(ForeignTrainer):
    """Steps on ‖∂f_c/∂x‖² − λ·‖∂f_c'/∂x‖² over D_f alone; unbounded below, so few small steps."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_mumis`; the optimiser's are those of its own example."""

        epochs: int = option(1, "passes", low=0, probe=2)
        lr: float = option(1e-4, "learning rate of SGD", above=0)
        momentum: float = option(0.0, "momentum of SGD", low=0, probe=0.9)
        weight_decay: float = option(0.0, "weight decay of SGD", low=0, probe=0.1)
        other_lambda: float = option(1.0, "weight of the other classes", low=0)
        n_other: int | None = option(1, "other classes drawn per row; null: all", low=1, probe=2)

    name = "torchunlearn_mumis"
    trainer = "MUMis"
    needs = frozenset({Split.FORGET})

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model that the trainer has changed; fused attention has no second gradient."""
        with sdpa_kernel(SDPBackend.MATH):
            return super().run(model, task)


class RFE(ForeignTrainer):
    """Ascent on CE(D_f) under a limit on CE(D_r); later steps leave the gradient of D_r alone."""

    @dataclass(frozen=True)
    class Config(Training):
        """Settings of `torchunlearn_rfe`."""

        phase1_steps: int = option(100, "steps with the multiplier alone", low=0, probe=1)
        constraint_tol: float = option(0.05, "allowed rise of CE(D_r)", low=0)
        lam_init: float = option(1.0, "first multiplier", low=0)
        lam_lr: float = option(0.05, "step of the multiplier", low=0)
        rho: float = option(
            1.0, "weight of the squared violation", low=0, inert="the limit may never be passed"
        )
        w2_lambda: float = option(
            1.0, "weight of the distance to the first outputs", low=0, inert="after phase1_steps"
        )

    name = "torchunlearn_rfe"
    trainer = "RFE"
