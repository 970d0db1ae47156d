"""Metrics: pure functions in their own modules, and thin `evaluate.Metric` classes over them.

The functions (`accuracy.accuracy`, `divergence.js_to_pool`, `membership.umia_auc`, ...) need numpy
only. The classes are imported on first use, because `import evaluate` takes seconds; nothing here
imports torch. :data:`METRICS` says of every number its unit, its direction and what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unsc_plugin.metrics._catalogue import DIRECTIONS, METRICS, MetricSpec, lookup

if TYPE_CHECKING:
    from unsc_plugin.metrics._base import (
        Accuracy,
        Confidence,
        LogisticMIA,
        MembershipAUC,
        MUBench,
        RetrainDivergence,
        TugOfWar,
        trainer_metrics,
    )
    from unsc_plugin.metrics._goal_base import GroupFairness, Robustness

__all__ = [
    "DIRECTIONS",
    "METRICS",
    "Accuracy",
    "Confidence",
    "GroupFairness",
    "LogisticMIA",
    "MUBench",
    "MembershipAUC",
    "MetricSpec",
    "RetrainDivergence",
    "Robustness",
    "TugOfWar",
    "lookup",
    "trainer_metrics",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "_goal_base" if name in ("GroupFairness", "Robustness") else "_base"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
