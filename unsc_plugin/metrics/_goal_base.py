"""The `evaluate.Metric` classes of goals for a criterion: group fairness and robustness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from unsc_plugin.metrics import fairness, robustness
from unsc_plugin.metrics._base import RowMetric
from unsc_plugin.metrics._catalogue import METRICS, Direction


class GroupFairness(RowMetric):
    """Accuracy, loss and gaps between groups, see `fairness.block`; reads a column `group` too.

    Numbers that the rows do not allow are left out; `fairness.missing` says why.

    Args:
        positive_class: the label whose rates are compared; None: 1 if there are two classes.
        **library: see `RowMetric`.
    """

    beside: ClassVar[Mapping[str, Literal["integer", "logits"]]] = {"group": "integer"}
    directions: ClassVar[dict[str, Direction]] = {
        name: METRICS[name].direction for name in fairness.NAMES
    }

    def __init__(self, positive_class: int | None = None, **library: Any) -> None:
        self.positive_class = positive_class
        super().__init__(**library)

    def _compute(self, predictions: Any, references: Any, group: Any, **_: Any) -> dict[str, float]:
        return fairness.block(predictions, references, group, self.positive_class)


class Robustness(RowMetric):
    """Accuracy and loss under attack, see `robustness.robust_block`.

    Reads a column `adversarial` too: the logits at the attacked inputs.

    Args:
        **library: see `RowMetric`.
    """

    beside: ClassVar[Mapping[str, Literal["integer", "logits"]]] = {"adversarial": "logits"}
    directions: ClassVar[dict[str, Direction]] = {
        name: METRICS[name].direction for name in ("robust_acc", "robust_nll")
    }

    def _compute(
        self, predictions: Any, references: Any, adversarial: Any, **_: Any
    ) -> dict[str, float]:
        return robustness.robust_block(predictions, adversarial, references)
