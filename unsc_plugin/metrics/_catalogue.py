"""Every number of the default tier (and the score's parts): unit, direction, needs, kinds.

The one place where a name is tied to its meaning; evaluation emits its keys in this order, and the
leaderboard takes units and words for directions from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unsc_plugin.errors import UnknownName

Direction = Literal["up", "down", "retrain", "zero"]
DIRECTIONS: dict[Direction, str] = {
    "up": "higher is better",
    "down": "lower is better",
    "retrain": "closer to retrain is better",
    "zero": "closer to 0 is better",
}
KINDS = ("instance", "class", "subclass", "sequence", "corrective", "weighted", "correction")


@dataclass(frozen=True)
class MetricSpec:
    """What a number is.

    `direction` is a key of :data:`DIRECTIONS`; "down" for a distance to retraining means down to
    the value retrained models have against each other. `needs` lists what must be there for the
    number to exist: outputs on `forget`, `retain`, `test`; `nonmembers` (test outputs with the
    labels of the forget set); `features`; `relearn` (the fine-tuned copy); `original`; `pool`
    (at least one retrained model); `cost`; `retrain_cost`; `board` (all units); `groups` (a group
    column, and rows in every cell that is compared); `attack` (a budget). `kinds` are the kinds of
    forgetting that have it, `weighted` being a goal for a criterion without a forget set; rounds of
    a `sequence` have what their requests have.
    """

    name: str
    unit: str
    direction: Direction
    tier: str
    needs: tuple[str, ...]
    kinds: tuple[str, ...]
    summary: str


_ALL = KINDS
_CLASSES = ("class", "subclass", "sequence")
_SIBLINGS = ("subclass", "sequence")
_ATTACKED = ("instance", "class", "subclass", "sequence", "weighted")
_RELEARNT = ("instance", "class", "subclass", "sequence")
_CRITERION = ("corrective", "weighted")
_GOALS = ("correction",)


def _spec(
    name: str,
    unit: str,
    direction: Direction,
    needs: str,
    kinds: tuple[str, ...],
    summary: str,
    tier: str = "default",
) -> MetricSpec:
    return MetricSpec(name, unit, direction, tier, tuple(needs.split()), kinds, summary)


def _delta(accuracy: MetricSpec) -> MetricSpec:
    return _spec(
        accuracy.name.replace("acc_", "delta_", 1),
        "pp",
        "zero",
        " ".join((*accuracy.needs, "pool")),
        accuracy.kinds,
        f"{accuracy.summary}, minus the mean of the retrained models",
    )


_ACCURACIES = (
    _spec("acc_forget", "fraction", "retrain", "forget", _ALL, "accuracy on the forget set"),
    _spec("acc_retain", "fraction", "retrain", "retain", _ALL, "accuracy on retained examples"),
    _spec("acc_test", "fraction", "up", "test", _ALL, "accuracy on the test set"),
    _spec("acc_test_retained", "fraction", "up", "test", _CLASSES, "test accuracy, kept labels"),
    _spec(
        "acc_test_forgotten", "fraction", "retrain", "test", _CLASSES,
        "test accuracy, forgotten (sub-)labels",
    ),
    _spec(
        "acc_test_siblings", "fraction", "up", "test", _SIBLINGS,
        "test accuracy, kept sub-labels of the same label",
    ),
)  # fmt: skip

_DISTANCES = (
    _spec(
        "tow", "score", "up", "forget retain test pool", _ALL,
        "tug of war: product of 1 − |accuracy difference| on forget, retain and test",
    ),
    _spec(
        "avg_gap", "pp", "down", "forget retain test pool", _ALL,
        "mean absolute accuracy difference on forget, retain and test",
    ),
    _spec(
        "js_forget", "bits", "down", "forget pool", _ALL,
        "Jensen-Shannon divergence to retrained predictions, forget set",
    ),
    _spec(
        "js_test", "bits", "down", "test pool", _ALL,
        "Jensen-Shannon divergence to retrained predictions, test set",
    ),
    _spec(
        "disagree_forget", "fraction", "down", "forget pool", _ALL,
        "share of forget examples that retrained models classify differently",
    ),
)  # fmt: skip

_LEAKS = (
    _spec(
        "umia_auc", "probability", "retrain", "forget nonmembers", _ATTACKED,
        "AUC of telling forget examples from unseen ones by confidence",
    ),
    _spec(
        "umia_tpr1", "fraction", "retrain", "forget nonmembers", _ATTACKED,
        "true-positive rate of the same attack at 1 % false positives",
    ),
    _spec(
        "gap_umia_auc", "probability", "down", "forget nonmembers pool", _ATTACKED,
        "|AUC − mean of the retrained models|",
    ),
    _spec(
        "umia_logistic", "fraction", "retrain", "forget nonmembers", _ATTACKED,
        "accuracy of a logistic regression on losses, forget against test",
    ),
    _spec(
        "relearn_retain_quarter", "fraction", "retrain", "relearn", _RELEARNT,
        "forget accuracy after a quarter of the relearning steps",
    ),
    _spec(
        "relearn_retain_half", "fraction", "retrain", "relearn", _RELEARNT,
        "forget accuracy after half of the relearning steps",
    ),
    _spec(
        "relearn_retain", "fraction", "retrain", "relearn", _RELEARNT,
        "forget accuracy after fine-tuning on retained examples only",
    ),
    _spec(
        "gap_relearn", "fraction", "down", "relearn pool", _RELEARNT,
        "|relearnt forget accuracy − mean of the retrained models|",
    ),
    _spec(
        "probe5", "fraction", "retrain", "features", _CLASSES,
        "recall of forgotten (sub-)labels by nearest 5-shot prototype",
    ),
    _spec(
        "gap_probe5", "fraction", "down", "features pool", _CLASSES,
        "|prototype recall − mean of the retrained models|",
    ),
)  # fmt: skip

_COSTS = (
    _spec("seconds_prepare", "s", "down", "cost", _ALL, "time of the method's preparation"),
    _spec("seconds_unlearn", "s", "down", "cost", _ALL, "time of the unlearning itself"),
    _spec("peak_bytes", "bytes", "down", "cost", _ALL, "largest memory in use"),
    _spec(
        "work", "sample passes", "down", "cost", _ALL,
        "samples forwarded, × 3 with gradient",
    ),
    _spec("work_ratio", "ratio", "down", "cost retrain_cost", _ALL, "work over retraining's"),
    _spec(
        "time_ratio", "ratio", "down", "cost retrain_cost", _ALL,
        "seconds over retraining's, same device",
    ),
)  # fmt: skip

_MUBENCH = (
    _spec("mubench.dt_accuracy", "fraction", "up", "test", _ALL, "MU-Bench: test accuracy"),
    _spec("mubench.df_accuracy", "fraction", "down", "forget", _ALL, "MU-Bench: forget accuracy"),
    _spec("mubench.dr_accuracy", "fraction", "up", "retain", _ALL, "MU-Bench: retain accuracy"),
    _spec(
        "mubench.knowledge_gap", "probability", "up", "forget retain", _ALL,
        "MU-Bench: AUC of being right, retain against forget",
    ),
    _spec("mubench.zrf", "score", "up", "forget", _ALL, "MU-Bench: likeness to random outputs"),
    _spec(
        "mubench.unlearn_overall_accuracy", "score", "up", "forget test original", _ALL,
        "MU-Bench: harmonic mean of kept test and chance forget accuracy",
    ),
    _spec("mubench.overall_v1", "score", "up", "forget test", _ALL, "MU-Bench: first formula"),
    _spec("mubench.unlearn_time", "s", "down", "cost", _ALL, "preparation + unlearning"),
)  # fmt: skip

_FAIRNESS = (
    _spec("acc", "fraction", "up", "test", _GOALS, "accuracy, beside the gaps on the same rows"),
    _spec("nll", "nats", "down", "test", _GOALS, "mean negative log-likelihood"),
    _spec(
        "nll_prior", "nats", "zero", "test", _GOALS,
        "loss of the best constant answer, a fact of the data: the end of the scale of nll",
    ),
    _spec(
        "dp_soft", "probability", "zero", "test groups", _GOALS,
        "demographic parity: mean positive probability, group 1 minus group 0",
    ),
    _spec(
        "dp_diff", "fraction", "zero", "test groups", _GOALS,
        "demographic parity: largest difference of positive rates",
    ),
    _spec(
        "dp_ratio", "ratio", "up", "test groups", _GOALS,
        "demographic parity: smallest over largest positive rate",
    ),
    _spec(
        "eop_soft", "probability", "zero", "test groups", _GOALS,
        "equality of opportunity: dp_soft among rows of the positive label",
    ),
    _spec(
        "eop_diff", "fraction", "zero", "test groups", _GOALS,
        "equality of opportunity: largest difference of true positive rates",
    ),
    _spec(
        "eo_diff", "fraction", "zero", "test groups", _GOALS,
        "equalised odds: larger difference of true and of false positive rates",
    ),
    _spec(
        "worst_group_acc", "fraction", "up", "test groups", _GOALS,
        "smallest accuracy of a (label, group) cell",
    ),
    _spec(
        "group_acc_gap", "fraction", "zero", "test groups", _GOALS,
        "largest difference of accuracy between groups",
    ),
)  # fmt: skip

_ROBUSTNESS = (
    _spec(
        "robust_acc", "fraction", "up", "test attack", _GOALS,
        "accuracy when every input may be moved within the budget",
    ),
    _spec(
        "robust_nll", "nats", "down", "test attack", _GOALS,
        "negative log-likelihood when every input may be moved within the budget",
    ),
    _spec(
        "transfer_acc", "fraction", "up", "test attack original", _GOALS,
        "accuracy at inputs that were moved against the original model",
    ),
)  # fmt: skip

_ORACLE = (
    _spec(
        "oracle_js", "bits", "down", "test pool", _GOALS,
        "distance to the predictions of the model retrained with the same weights",
    ),
    _spec(
        "oracle_agree", "fraction", "up", "test pool", _GOALS,
        "share of answers equal to those of the model retrained with the same weights",
    ),
    _spec(
        "oracle_gap_diff", "criterion", "zero", "test pool", _GOALS,
        "the board's criterion less that of the model retrained with the same weights",
    ),
)  # fmt: skip

_SCORE = (
    _spec("S", "score", "up", "board", _ALL, "score: 1 retraining, 0 original", "pool"),
    _spec("a_J", "score", "up", "board", _ALL, "score part: predictions like retrained", "pool"),
    _spec(
        "a_P", "score", "up", "board", ("instance", "subclass", "sequence"),
        "score part: membership like retrained", "pool",
    ),
    _spec("a_L", "score", "up", "board", _RELEARNT, "score part: relearns like retrained", "pool"),
    _spec("a_H", "score", "up", "board", _CLASSES, "score part: features like retrained", "pool"),
    _spec(
        "a_C", "score", "up", "board", _CRITERION,
        "score part: the board's criterion like retrained", "pool",
    ),
    _spec("u", "score", "up", "board", _ALL, "utility relative to retrained, at most 1", "pool"),
)  # fmt: skip

METRICS: dict[str, MetricSpec] = {
    spec.name: spec
    for spec in (
        *_ACCURACIES,
        *(_delta(accuracy) for accuracy in _ACCURACIES),
        *_DISTANCES,
        *_LEAKS,
        *_COSTS,
        *_MUBENCH,
        *_FAIRNESS,
        *_ROBUSTNESS,
        *_ORACLE,
        *_SCORE,
    )
}


def lookup(name: str) -> MetricSpec:
    """Return the entry of the catalogue called `name`.

    Raises:
        UnknownName: listing the nearest names, if there is none.

    >>> lookup("js_forget").unit
    'bits'
    """
    if name not in METRICS:
        raise UnknownName("metric", name, METRICS)
    return METRICS[name]
