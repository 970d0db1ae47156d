"""Settings of `unsc` and what may be combined."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from typing import Literal

from unsc_plugin.errors import ConfigError
from unsc_plugin.method import option

_NEEDS_A_SMALL_CACHE = "only how classes share buckets, when the cache is too small for all"
_CACHE = "where Gram matrices are kept, not what they are"


@dataclass(frozen=True)
class Settings:
    """Settings of `unsc`."""

    eps: float | dict[str, float] = option(  # a field, whatever its type
        0.97, "share of energy kept per retained class, in (0, 1]; or {glob: share} with '*'",
        probe=0.5,
    )  # fmt: skip
    eps_step: float = option(
        0.0, "merge gpm: added to eps per label id", low=0, inert="used by merge=gpm only"
    )
    merge: Literal["balanced", "pooled", "gpm"] = option(
        "balanced", "how classes' subspaces are joined", probe="pooled"
    )
    rank_rule: Literal["reach", "below"] = option(
        "reach", "below: one vector less, as published", inert="not used by merge=balanced"
    )
    patches: Literal["true", "interior"] = option(
        "true", "interior: windows without padding and stride, as published",
        inert="the same for layers without convolution",
    )  # fmt: skip
    include: tuple[str, ...] = option(("*",), "globs of layers to train", inert="globs")
    exclude: tuple[str, ...] = option((), "globs of layers to leave alone", inert="globs")
    bias: Literal["freeze", "augment"] = option("freeze", "augment: biases move too, projected")
    max_dim: int = option(8192, "wider columns are frozen", low=1, inert="no layer is this wide")
    capture_samples: int | tuple[int, ...] | None = option(
        None, "samples per class (pooled: in all), one number or one per layer; None: all", probe=2
    )
    capture_batch: int = option(256, "rows per batch of the capture", low=1, inert="speed")
    capture_dtype: Literal["auto", "float32", "float64"] = option(
        "auto", "precision of the capture; auto: float64 if eps > .999", inert="precision"
    )
    view: Literal["clean", "augmented"] = option(
        "clean", "augmented: as the recipe augments, in capture and training",
        inert="the same for a recipe without augmentation",
    )  # fmt: skip
    label: Literal["pseudo", "random"] = option("pseudo", "random: control")
    instance_label: Literal["matched", "runner_up"] = option(
        "matched", "targets of samples whose class stays"
    )
    projection: bool = option(True, "False: control without null space")
    trainable: Literal["covered", "all"] = option(
        "covered", "all: every parameter, needs projection=False", inert="needs projection=False"
    )
    update: Literal["project", "reparam", "gradient"] = option(
        "project", "project the update; train coordinates of the null space; gradients only",
        inert="the same weights for SGD",
    )  # fmt: skip
    optimizer: Literal["sgd", "adam", "adamw"] = option("sgd", "optimiser", probe="adam")
    lr: float = option(0.02, "learning rate, constant", above=0, search=(1e-4, 1.0, "log"))
    momentum: float = option(0.9, "of SGD", low=0, high=1, probe=0.0)
    nesterov: bool = option(False, "Nesterov momentum of SGD")
    weight_decay: float = option(0.0, "decay, projected like the rest", low=0, probe=0.1)
    clip_norm: float | None = option(
        None, "largest gradient norm, after projection", above=0, probe=1e-3
    )
    batch_size: int = option(64, "rows per step", low=1, probe=5)
    epochs: int = option(50, "passes over the forget set at most; 0: none", low=0, probe=0)
    min_steps: int = option(
        100, "steps for which epochs is stretched, unless the stop rule ends them", low=0,
        inert="the stop rule may come first",
    )  # fmt: skip
    stop_at: float | None = option(
        0.01, "stop when so few forget samples keep their label; None: all epochs", low=0, high=1,
        probe=1.0,
    )  # fmt: skip
    drift_budget: float | None = option(
        None, "stop before the certified drift exceeds this", above=0, probe=1e-9
    )
    dropout: bool = option(
        False, "True: dropout active while training, as published",
        inert="the same for models without dropout",
    )  # fmt: skip
    cache: bool = option(True, "keep Gram matrices for later requests", inert=_CACHE)
    cache_gib: float = option(
        6.0, "size of one model's Gram matrices at most", above=0, inert=_NEEDS_A_SMALL_CACHE
    )
    purge: bool = option(False, "then keep no statistics of forgotten data", inert=_CACHE)
    keep_anchor: bool = option(True, "keep the original weights for later requests", inert=_CACHE)
    max_lineage_drift: float = option(
        1.0, "in a sequence: drift at which the retained data are captured again", above=0,
        inert="used in sequences only",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for share in self.eps.values() if isinstance(self.eps, dict) else (self.eps,):
            if not (math.isfinite(share) and 0 < share <= 1):
                raise ConfigError(f"eps: expected a share in (0, 1], got {share!r}")
        if isinstance(self.eps, dict) and "*" not in self.eps:
            raise ConfigError(
                f"eps: expected a mapping with '*' for all other layers, got {sorted(self.eps)}"
            )
        self._check_guarantee()
        self._check_merge()

    def _check_guarantee(self) -> None:
        wrong = ""
        if self.update == "gradient" and (self.optimizer != "sgd" or self.weight_decay):
            wrong = (
                f"update=gradient with {self.optimizer} and weight_decay {self.weight_decay}: the "
                "step is no multiple of the projected gradient, so retained outputs move; set "
                "update=project"
            )
        elif self.trainable == "all" and self.projection:
            wrong = (
                "trainable=all with projection: biases and norms have no null space, so retained "
                "outputs move; set projection=false or trainable=covered"
            )
        elif self.update == "reparam" and not self.projection:
            wrong = "update=reparam trains null-space coordinates; set projection=true"
        elif self.bias == "augment" and (not self.projection or self.update == "reparam"):
            wrong = (
                "bias=augment projects weight and bias together, which needs projection=true and "
                "update=project or gradient; set bias=freeze"
            )
        elif self.nesterov and (self.momentum == 0 or self.optimizer != "sgd"):
            wrong = "nesterov needs optimizer=sgd and momentum > 0; set nesterov=false"
        elif self.drift_budget is not None and not self.projection:
            wrong = "drift_budget is read from Gram matrices; set projection=true"
        if wrong:
            raise ConfigError(wrong)

    def _check_merge(self) -> None:
        if self.eps_step and self.merge != "gpm":
            raise ConfigError(f"eps_step {self.eps_step} is used by merge=gpm only; set merge=gpm")
        if self.rank_rule == "below" and self.merge == "balanced":
            raise ConfigError("rank_rule=below is for merge=gpm and merge=pooled; set rank_rule")
        numbers = self.capture_samples
        for number in numbers if isinstance(numbers, tuple) else (numbers,):
            if number is not None and number < 1:
                raise ConfigError(f"capture_samples: expected numbers >= 1, got {number}")

    def eps_of(self, layer: str) -> float:
        """Return the energy share of a layer: the first glob that fits, '*' last."""
        if not isinstance(self.eps, dict):
            return self.eps
        globs = [glob for glob in self.eps if glob != "*"]
        fitting = next((glob for glob in globs if fnmatch.fnmatch(layer, glob)), "*")
        return self.eps[fitting]

    @property
    def wide(self) -> bool:
        """Whether the capture runs in float64."""
        highest = max(self.eps.values()) if isinstance(self.eps, dict) else self.eps
        return self.capture_dtype == "float64" or (self.capture_dtype == "auto" and highest > 0.999)
