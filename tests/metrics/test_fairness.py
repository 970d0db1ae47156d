"""Group fairness against hand counts, explicit loops and the known answers of the biased table."""

import re
import subprocess
import sys
import time

import evaluate
import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from unsc_plugin import metrics
from unsc_plugin.data import biased_draws
from unsc_plugin.errors import DataError, DivergedError
from unsc_plugin.metrics import METRICS, fairness

# Eight rows by hand: labels, groups, and the log-odds of class 1.
LABELS = np.array([1, 1, 0, 0, 1, 1, 0, 0])
GROUPS = np.array([0, 0, 0, 0, 1, 1, 1, -1])
ODDS = np.log(np.array([3.0, 1 / 3, 3.0, 1 / 3, 3.0, 3.0, 1 / 3, 3.0]))  # p₊ = .75 or .25


def two_columns(odds):
    return np.column_stack([np.zeros(len(odds)), odds])


def random_rows(seed=0, rows=400, classes=2, groups=2, outside=True):
    rng = np.random.default_rng(seed)
    labels, codes = rng.integers(classes, size=rows), rng.integers(groups, size=rows)
    if outside:
        codes[rng.random(rows) < 0.1] = -1
    logits = rng.normal(size=(rows, classes)) + np.eye(classes)[labels] + 0.3 * codes[:, None]
    return logits, labels, codes


def test_hand_counts():
    found = fairness.block(two_columns(ODDS), LABELS, GROUPS)
    # group 0: predicted 1,0,1,0; group 1: 1,1,0; the row of no group is predicted 1 and wrong
    assert found == pytest.approx(
        {
            "acc": 5 / 8,
            "nll": -(5 * np.log(0.75) + 3 * np.log(0.25)) / 8,
            "dp_diff": 2 / 3 - 1 / 2,
            "dp_ratio": 3 / 4,
            "dp_soft": (0.75 + 0.75 + 0.25) / 3 - 0.5,
            "eop_diff": 1 - 1 / 2,
            "eop_soft": 0.75 - 0.5,
            "eo_diff": 1 / 2,
            "worst_group_acc": 1 / 2,
            "group_acc_gap": 1 - 2 / 4,
        },
        abs=1e-14,
    )
    assert list(found) == [name for name in METRICS if name in found]


def reference(logits, labels, groups, positive):
    """Return the same numbers by loops over rows, without fairlearn."""
    p = softmax(logits, axis=1)[:, positive]
    chosen, kept = logits.argmax(axis=1), groups >= 0
    codes = range(groups.max() + 1)

    def rates(values, rows):
        return np.array([values[rows & (groups == g)].mean() for g in codes])

    def spread(values):
        return values.max() - values.min()

    def soft(rows):
        means = rates(p, rows)
        if len(means) == 2:
            return means[1] - means[0]
        return np.abs(means - p[rows & kept].mean()).max()

    hit, pos = chosen == positive, labels == positive
    selected, right = rates(hit, kept), rates(chosen == labels, kept)
    worst = [
        (chosen == labels)[(labels == y) & (groups == g)].mean()
        for y in np.unique(labels)
        for g in codes
        if ((labels == y) & (groups == g)).any()
    ]
    return {
        "acc": (chosen == labels).mean(),
        "nll": -np.log(softmax(logits, axis=1)[np.arange(len(labels)), labels]).mean(),
        "dp_diff": spread(selected),
        "dp_ratio": selected.min() / selected.max(),
        "dp_soft": soft(kept),
        "eop_diff": spread(rates(hit, pos)),
        "eop_soft": soft(pos),
        "eo_diff": max(spread(rates(hit, pos)), spread(rates(hit, ~pos))),
        "worst_group_acc": min(worst),
        "group_acc_gap": spread(right),
    }


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize(("classes", "positive"), [(2, 1), (2, 0), (4, 2)])
def test_against_loops_over_rows(classes, positive, groups):
    logits, labels, codes = random_rows(classes, 400, classes, groups)
    expected = reference(logits, labels, codes, positive)
    found = fairness.block(logits, labels, codes, positive)
    assert found == pytest.approx(expected, abs=1e-12)
    assert set(found) == set(fairness.NAMES)
    for name in set(fairness.NAMES) - {"acc", "nll"}:
        assert getattr(fairness, name)(logits, labels, codes, positive) == found[name]


def test_known_answers_of_the_biased_table():
    parts = biased_draws()
    x, y = parts["train"].x, parts["train"].y
    theta = np.zeros(20)
    for _ in range(30):
        p = expit(x @ theta)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 2 * np.eye(20)
        theta -= np.linalg.solve(hessian, x.T @ (p - y) + 2 * theta)
    assert np.linalg.norm(theta) == pytest.approx(1.774237, abs=1e-6)
    val, test = (
        fairness.block(two_columns(part.x @ theta), part.y, part.s)
        for part in (parts["val"], parts["test"])
    )
    assert val["acc"] == 0.77625
    assert val["nll"] * 800 == pytest.approx(375.99, abs=5e-3)
    assert val["dp_soft"] == pytest.approx(0.457674, abs=1e-6)
    assert test["acc"] == 0.77025
    assert test["nll"] == pytest.approx(0.4741, abs=5e-5)
    assert test["dp_soft"] == pytest.approx(0.4731, abs=5e-5)
    assert test["dp_diff"] == pytest.approx(0.6246, abs=5e-5)


def test_soft_gaps_are_signed_and_flip_with_the_groups():
    logits, labels, codes = random_rows(outside=False)
    one, other = (fairness.block(logits, labels, g) for g in (codes, 1 - codes))
    for name in ("dp_soft", "eop_soft"):
        assert one[name] == -other[name] != 0
    for name in set(one) - {"dp_soft", "eop_soft"}:
        assert one[name] == other[name]


def test_a_spurious_feature_shows_in_cells_not_in_groups():
    labels, groups = np.array([0, 0, 1, 1] * 10), np.array([0, 1, 0, 1] * 10)
    found = fairness.block(two_columns(2.0 * groups - 1), labels, groups)
    assert found["group_acc_gap"] == 0
    assert found["worst_group_acc"] == 0
    assert found["acc"] == 0.5


def test_nobody_selected_is_parity():
    found = fairness.block(two_columns(np.full(8, -1.0)), LABELS, GROUPS)
    assert (found["dp_ratio"], found["dp_diff"]) == (1.0, 0.0)
    half = fairness.block(two_columns(np.where(GROUPS == 1, 1.0, -1.0)), LABELS, GROUPS)
    assert (half["dp_ratio"], half["dp_diff"]) == (0.0, 1.0)


# --------------------------------------------------------------------------- what is missing

GAPS = set(fairness.NAMES) - {"acc", "nll"}
RATES = GAPS - {"worst_group_acc", "group_acc_gap"}


@pytest.mark.parametrize(
    ("labels", "groups", "options", "absent", "reason"),
    [
        ([0, 1, 0, 1], None, {}, GAPS, "no groups"),
        ([0, 1, 0, 1], [0, 0, 0, 0], {}, GAPS, "two groups or more, got 1"),
        ([0, 1, 0, 1], [-1, -1, -1, -1], {}, GAPS, "two groups or more, got 0"),
        ([0, 1, 0, 1], [1, 1, 1, -1], {}, GAPS, "no rows of group 0"),
        ([0, 1, 0, 2], [0, 0, 1, 1], {"num_classes": 3}, RATES, "no positive class .* among 3"),
        ([0, 1, 0, 0], [0, 0, 1, 1], {}, {"eop_diff", "eop_soft", "eo_diff"},
         "no rows of label 1 in group 1"),
        ([1, 1, 0, 1], [0, 0, 1, 1], {}, {"eo_diff"}, "labels other than 1 in group 0"),
        ([1, 1, 0, 1], [0, 0, 1, 1], {"positive_class": 0}, {"eop_diff", "eop_soft", "eo_diff"},
         "no rows of label 0 in group 0"),
        ([0, 1, 0, 1], [0, 0, 1, 1], {}, set(), ""),
    ],
)  # fmt: skip
def test_numbers_that_the_rows_do_not_allow(labels, groups, options, absent, reason):
    found = fairness.missing(labels, groups, **options)
    assert set(found) == absent
    assert all(re.search(reason, text) for text in found.values())
    logits = np.eye(options.get("num_classes", 2))[labels]
    positive = options.get("positive_class")
    assert set(fairness.block(logits, labels, groups, positive)) == set(fairness.NAMES) - absent
    for name in absent:
        with pytest.raises(DataError, match=f"{name} cannot be computed: .*{reason}"):
            getattr(fairness, name)(logits, labels, groups, positive)
        with pytest.raises(DataError, match=f"bootstrap of {name}: .*{reason}"):
            fairness.bootstrap(logits, labels, groups, [name], seed=0, positive_class=positive)


def test_bad_input():
    logits = two_columns(ODDS)
    with pytest.raises(DataError, match="group code ≥ −1 for each of 8 rows, got 7"):
        fairness.block(logits, LABELS, GROUPS[1:])
    with pytest.raises(DataError, match="from -2"):
        fairness.block(logits, LABELS, GROUPS - 1)
    with pytest.raises(DataError, match=r"positive class in \[0, 2\), got 2"):
        fairness.block(logits, LABELS, GROUPS, 2)
    with pytest.raises(DivergedError):
        fairness.block(np.where(LABELS[:, None] == 1, np.nan, logits), LABELS, GROUPS)
    with pytest.raises(DataError, match="expected one of acc"):
        fairness.bootstrap(logits, LABELS, GROUPS, ["dp_sof"], seed=0)
    with pytest.raises(DataError, match="confidence"):
        fairness.bootstrap(logits, LABELS, GROUPS, seed=0, confidence=1.0)
    with pytest.raises(DataError, match="resamples ≥ 1"):
        fairness.bootstrap(logits, LABELS, GROUPS, resamples=0, seed=0)


# --------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("classes", "groups", "positive"), [(2, 2, 1), (3, 3, 2)])
def test_every_resample_is_a_block_of_resampled_rows(classes, groups, positive):
    logits, labels, codes = random_rows(3, 120, classes, groups)
    values = fairness.bootstrap_values(
        logits, labels, codes, resamples=6, seed=11, positive_class=positive
    )
    for at in range(6):
        rows = []
        for y, g in sorted(set(zip(labels.tolist(), codes.tolist(), strict=True))):
            own = np.flatnonzero((labels == y) & (codes == g))
            drawn = np.random.default_rng([11, y, g + 1]).integers(0, len(own), (6, len(own)))
            rows.append(own[drawn[at]])
        rows = np.concatenate(rows)
        expected = fairness.block(logits[rows], labels[rows], codes[rows], positive)
        assert {name: v[at] for name, v in values.items()} == pytest.approx(expected, abs=1e-12)


def test_intervals_hold_the_spread_of_the_number():
    logits, labels, codes = random_rows(5, 800, outside=False)
    p = softmax(logits, axis=1)[:, 1]
    intervals = fairness.bootstrap(logits, labels, codes, seed=1, resamples=4000)
    found = fairness.block(logits, labels, codes)
    cells = [p[(labels == y) & (codes == g)] for y in (0, 1) for g in (0, 1)]
    share = [len(c) / np.isin(codes, g).sum() for c, g in zip(cells, (0, 1, 0, 1), strict=True)]
    deviation = np.sqrt(sum(s**2 * c.var() / len(c) for s, c in zip(share, cells, strict=True)))
    low, high = intervals["dp_soft"]
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.08)
    assert (low + high) / 2 == pytest.approx(found["dp_soft"], abs=0.2 * deviation)
    narrow = fairness.bootstrap(logits, labels, codes, seed=1, resamples=4000, confidence=0.5)
    assert low < narrow["dp_soft"][0] < narrow["dp_soft"][1] < high


def test_equal_rows_get_equal_resamples():
    logits, labels, codes = random_rows()
    again = fairness.bootstrap_values(logits, labels, codes, ["nll"], 50, seed=2)["nll"]
    first = fairness.bootstrap_values(logits, labels, codes, ["nll"], 50, seed=2)["nll"]
    better = logits + 0.5 * np.eye(2)[labels]
    paired = fairness.bootstrap_values(better, labels, codes, ["nll"], 50, seed=2)["nll"]
    other = fairness.bootstrap_values(better, labels, codes, ["nll"], 50, seed=3)["nll"]
    assert np.array_equal(again, first)
    assert (paired - first).std() < 0.3 * (other - first).std()


def test_rows_without_groups_have_intervals_of_accuracy_and_loss():
    logits, labels, _ = random_rows()
    found = fairness.bootstrap(logits, labels, None, ["acc", "nll"], seed=0)
    assert found["acc"][0] < fairness.block(logits, labels, None)["acc"] < found["acc"][1]


def test_a_thousand_resamples_of_a_census_take_seconds():
    logits, labels, codes = random_rows(1, 16_281)
    fairness.bootstrap(logits, labels, codes, resamples=10, seed=0)
    start = time.process_time()
    fairness.bootstrap(logits, labels, codes, resamples=1000, seed=0)
    assert time.process_time() - start < 5


# --------------------------------------------------------------------------- as a metric


@pytest.mark.parametrize("path", ["fast", "arrow", "torch"])
def test_the_class_is_the_block(path):
    logits, labels, codes = random_rows()
    metric = metrics.GroupFairness()
    columns = {"predictions": logits, "references": labels, "group": codes}
    if path == "torch":
        columns = {name: torch.tensor(column) for name, column in columns.items()}
    if path == "arrow":
        for rows in (slice(0, 100), slice(100, None)):
            metric.add_batch(**{name: column[rows] for name, column in columns.items()})
        columns = {}
    found = metric.compute(**columns)
    assert found == fairness.block(logits, labels, codes)
    assert set(found) == set(metric.directions)
    assert all(METRICS[name].direction == metric.directions[name] for name in found)
    assert all("groups" in METRICS[name].needs for name in set(found) - {"acc", "nll"})


def test_it_combines_with_metrics_that_know_no_groups():
    logits, labels, codes = random_rows(classes=3)
    combined = evaluate.combine([metrics.GroupFairness(2), metrics.Accuracy()])
    expected = fairness.block(logits, labels, codes, 2)
    given = {"predictions": logits, "references": labels, "group": codes}
    assert combined.compute(**given) == expected | {"accuracy": expected["acc"]}
    combined.add_batch(**given)
    assert combined.compute() == expected | {"accuracy": expected["acc"]}


def test_nothing_heavy_is_imported_before_it_is_needed():
    check = (
        "import sys, unsc_plugin.metrics.fairness, unsc_plugin.metrics.pareto; "
        "import unsc_plugin.metrics.robustness; "
        "heavy = ('fairlearn', 'pandas', 'sklearn', 'torch', 'evaluate'); "
        "sys.exit([n for n in heavy if n in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
