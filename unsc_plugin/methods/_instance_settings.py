"""Settings of `instance_wise` and what may be combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unsc_plugin.errors import ConfigError, nearest
from unsc_plugin.method import option

QUIRKS = {
    "target_fallback": "attack targets uniform over all classes; the own class becomes C//2",
    "ten_classes": "attack targets from classes 0 to 9, whatever the data has",
    "unshuffled": "pairs in forget order, no permutation",
    "keep_failures": "pairs that missed their target stay in the pool",
    "partial_tail": "the last adversarial batch is short, and w follows its size",
    "all_rows": "forget batches cycle over all rows, satisfied or not",
    "batch_importance": "importance from gradients of batch means in train mode, summed up",
    "train_mode": "optimisation steps in train mode, so that BatchNorm statistics move",
    "last_model": "at the cap the last weights are returned, not the best ones",
    "epoch_stop": "the stop test once per epoch, after at least one",
}
"""Departures of the first published release, each switched on by its name."""

_GOAL = "used by goal=relabel only"
_KIND = "used for another kind of input"
_SPEED = "speed and memory, not results, in exact arithmetic"
_RARE = "used where a run lasts that long"


@dataclass(frozen=True)
class Settings:
    """Settings of `instance_wise`."""

    goal: Literal["misclassify", "relabel"] = option(
        "misclassify", "not the recorded label any more, or a certain other one"
    )
    relabel: Literal["random", "second_best", "given"] = option(
        "random", "where the new labels come from", inert=_GOAL
    )
    relabel_to: int | tuple[tuple[int, int], ...] | None = option(
        None, "relabel=given: one class for all, or (index, class) pairs", inert=_GOAL, probe=0
    )
    ascent: Literal["hinge", "unlikelihood", "ce"] = option(
        "hinge", "loss that forgets; ce is unbounded, as published"
    )
    stop_margin: float | None = option(
        None, "logits by which the goal must be met; default .1, .5 in half precision",
        low=0, probe=1.0,
    )  # fmt: skip
    stop_fraction: float = option(
        1.0, "share of the forget set that ends the run", above=0, high=1, probe=0.5
    )
    source: Literal["adversarial", "noise", "none"] = option(
        "adversarial", "what stands in for the data of other classes"
    )
    adv_label: Literal["target", "teacher"] = option(
        "target", "label of an adversarial example: its target, or the original's softmax"
    )
    n_adv: int | None = option(
        None, "pairs per instance; default min(200, max(20, 2C))", low=1, high=100_000,
        search=(5, 200, "log"), probe=1,
    )  # fmt: skip
    eps: float = option(4.0, "L2 radius in pixels", above=0, inert="a cap, seldom reached")
    eps_embed: float = option(1.0, "radius in mean embedding norms · √tokens", above=0, inert=_KIND)
    eps_features: float = option(4.0, "radius in standard deviations", above=0, inert=_KIND)
    attack_step: float | None = option(
        None, "step of the attack; default .1, for text radius/40", above=0, probe=0.5
    )
    attack_steps: int = option(
        100, "steps of the attack", low=1, high=100_000, inert="a cap, seldom reached"
    )
    attack_init: Literal["zero", "noise", "ball"] = option("zero", "where the attack starts")
    attack_stop: float | None = option(
        0.5, "target probability that ends the attack of a row; None: never", low=0, high=0.999999,
        search=(0.3, 0.9, "linear"), probe=0.9,
    )  # fmt: skip
    attack_batch: int | None = option(
        None, "pairs per chunk; default 512, 64 on the CPU", low=1, inert=_SPEED
    )
    attack_dtype: Literal["fp32", "bf16"] = option(
        "fp32", "precision of the attack's forward and backward passes"
    )
    lazy: bool = option(True, "pairs are attacked on demand", inert=_SPEED)
    importance: Literal["minmax", "rank", "ones"] = option(
        "minmax", "how importance becomes freedom; ones: plain L2-SP"
    )
    importance_fn: Literal["norm", "squared_norm"] = option(
        "norm", "whose gradient is the importance"
    )
    lam: float = option(
        1.0, "strength of the pull to the anchor", low=0, search=(0.1, 10.0, "log"), probe=100.0
    )
    lr: float = option(3e-3, "learning rate", low=0, search=(3e-4, 3e-2, "log"))
    momentum: float = option(0.9, "momentum", low=0, high=0.999999, probe=0.5)
    weight_decay: float = option(0.0, "weight decay; the pull replaces it", low=0, probe=0.1)
    max_grad_norm: float | None = option(1.0, "clip the gradient norm", above=0, probe=0.05)
    forget_batch: int = option(32, "forget rows per step", low=1, probe=3)
    adv_batch: int = option(256, "adversarial rows per step", low=1, probe=7)
    forget_weight: float | None = option(
        None, "first weight w of the forget loss; default n_f/(n_f + n_a)", above=0, high=1,
        search=(0.05, 0.9, "linear"), probe=0.5,
    )  # fmt: skip
    growth: float = option(1.5, "factor of w after `patience` steps without progress", low=1)
    patience: int = option(10, "steps without progress", low=1, probe=1)
    max_weight: float = option(0.95, "largest w; then λ is halved", above=0, high=1, inert=_RARE)
    max_steps: int = option(1000, "cap", low=0, high=10_000_000, probe=2)
    max_epochs: int | None = option(
        None, "cap in passes over the pool; overrides max_steps", low=0, probe=1
    )
    trainable: tuple[str, ...] | None = option(
        None, "globs of parameters that may move; default all that require a gradient",
        inert="globs",
    )  # fmt: skip
    anchor: Literal["previous", "first"] = option(
        "previous", "model that is held on to in a sequence", inert="the same for one request"
    )
    history: Literal["none", "repair"] = option(
        "none", "repair: earlier requests stay forgotten; opens their data",
        inert="nothing for a first request",
    )  # fmt: skip
    quirks: tuple[str, ...] = option((), "departures as published", probe=("all_rows",))

    def __post_init__(self) -> None:
        """Refuse what cannot be combined.

        Raises:
            ConfigError: naming the settings.
        """
        for name in self.quirks:
            if name not in QUIRKS:
                close = nearest(name, QUIRKS) or sorted(QUIRKS)
                raise ConfigError(f"quirks: unknown {name!r}; did you mean {close[0]!r}?")
        if (self.relabel == "given") != (self.relabel_to is not None):
            raise ConfigError(
                "relabel=given and relabel_to belong together, got "
                f"relabel={self.relabel!r}, relabel_to={self.relabel_to!r}; give both or neither"
            )
        if self.relabel == "given" and self.goal != "relabel":
            raise ConfigError("relabel=given needs goal=relabel; set it")
        if "ten_classes" in self.quirks and "target_fallback" not in self.quirks:
            raise ConfigError("quirk ten_classes needs target_fallback; add it")
