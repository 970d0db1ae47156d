"""The score S: its two ends, its factors, admission, eligibility, health."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from unsc_plugin.metrics import score as scoring

N, DRAWS, PARTS = 5, 2, 3


def gaps(entry, *, accuracy=None, finished=None, seed=0) -> scoring.Gaps:
    """One scenario with floor 0.03 and original 0.30; `entry` is (n, D, M) gaps of one entry."""
    noise = np.random.default_rng(seed).normal(1, 0.05, (2, N, DRAWS, PARTS))
    floor, original = 0.03 * noise[0], 0.30 * noise[1]
    chosen = (
        {"retrain": floor, "original": original}.get(entry) if isinstance(entry, str) else entry
    )
    reached = np.full((1, N, DRAWS, 2), 0.9) if accuracy is None else accuracy
    done = np.ones((1, N, DRAWS), dtype=bool) if finished is None else finished
    return scoring.Gaps(
        entries=np.where(done[..., None], chosen, np.nan),
        accuracies=np.where(done[..., None], reached, np.nan),
        finished=done,
        original=original,
        floor=floor,
        reference=np.full((DRAWS, 2), 0.9),
    )


def only(scores: scoring.Scores) -> float:
    return float(scores.score[0, 0].mean())


def test_retraining_scores_one_and_the_original_a_hundredth_of_its_utility():
    assert only(scoring.draw_scores(gaps("retrain"))) >= 0.99
    worse = np.full((1, N, DRAWS, 2), 0.9) * [1.0, 0.8]
    original = scoring.draw_scores(gaps("original", accuracy=worse))
    assert original.utility[0, 0] == pytest.approx(0.8)
    assert only(original) == pytest.approx(0.01 * 0.8)


def test_the_formula_by_hand():
    data = gaps(np.full((N, DRAWS, PARTS), [0.10, 0.20, 0.02]))
    scores = scoring.draw_scores(data)
    for d in range(DRAWS):
        floor, original = data.floor[:, d].mean(0), data.original[:, d].mean(0)
        a = np.clip(1 - np.maximum(0, [0.10, 0.20, 0.02] - floor) / (original - floor), 0.01, 1)
        assert scores.components[0, 0, d] == pytest.approx(a)
        assert scores.score[0, 0, d] == pytest.approx(a.prod() ** (1 / 3))
    assert scores.components[0, 0, :, 2] == pytest.approx(1)


def test_better_utility_than_retraining_earns_nothing():
    better = scoring.draw_scores(gaps("retrain", accuracy=np.full((1, N, DRAWS, 2), 0.99)))
    assert only(better) == pytest.approx(1.0)


def test_a_reference_accuracy_of_zero_cannot_be_fallen_short_of():
    data = gaps("retrain")
    data = dataclasses.replace(data, reference=data.reference * [1.0, 0.0])
    assert only(scoring.draw_scores(data)) == pytest.approx(1.0)


def test_over_and_under_forgetting_do_not_cancel_and_one_leak_sinks_the_product():
    leaking = np.full((N, DRAWS, PARTS), 0.03)
    leaking[..., 1] = 0.6
    assert only(scoring.draw_scores(gaps(leaking))) == pytest.approx(0.01 ** (1 / 3), rel=0.02)


def test_failed_units_are_a_share_of_zero():
    done = np.ones((1, N, DRAWS), dtype=bool)
    done[0, 0, :] = False
    scores = scoring.draw_scores(gaps("retrain", finished=done))
    assert scores.failed[0, 0] == pytest.approx(0.2)
    assert only(scores) == pytest.approx(0.8, abs=0.02)
    nothing = scoring.draw_scores(gaps("retrain", finished=np.zeros_like(done)))
    assert only(nothing) == 0.0


def test_a_missing_number_of_a_finished_unit_is_absent_not_zero():
    holed = np.full((N, DRAWS, PARTS), 0.03)
    holed[2, 1, 0] = np.nan
    scores = scoring.draw_scores(gaps(holed))
    assert np.isfinite(scores.score[0, 0, 0])
    assert np.isnan(scores.score[0, 0, 1])


def test_exponents():
    entry = np.full((N, DRAWS, PARTS), [0.03, 0.03, 0.165])
    data = gaps(entry)
    a = scoring.draw_scores(data).components[0, 0, :, 2]
    weighted = scoring.draw_scores(data, exponents=[1, 0, 3]).closeness[0, 0]
    others = scoring.draw_scores(data).components[0, 0, :, 0]
    assert weighted == pytest.approx((others * a**3) ** 0.25)
    with pytest.raises(ValueError, match="exponents"):
        scoring.draw_scores(data, exponents=[0, 0, 0])
    with pytest.raises(ValueError, match="exponents"):
        scoring.draw_scores(data, exponents=[1, 1])


def test_weighting_seeds_equals_leaving_them_out():
    data = gaps(np.full((N, DRAWS, PARTS), 0.1))
    shares = (1 - np.eye(N)) / (N - 1)
    together = scoring.draw_scores(data, shares)
    for i in range(N):
        keep = np.arange(N) != i
        part = scoring.Gaps(
            data.entries[:, keep],
            data.accuracies[:, keep],
            data.finished[:, keep],
            data.original[keep],
            data.floor[keep],
            data.reference,
        )
        alone = scoring.draw_scores(part)
        assert together.score[i] == pytest.approx(alone.score[0], abs=1e-12)


def test_a_vanishing_span_is_held_at_a_quarter():
    data = gaps(np.full((N, DRAWS, PARTS), 0.05))
    flat = data.original.copy()
    flat[0] = data.floor[0]
    data = dataclasses.replace(data, original=flat)
    shares = np.eye(N)[:1]
    span = (flat - data.floor).mean(axis=0) / 4
    expected = np.clip(1 - np.maximum(0, 0.05 - data.floor[0]) / span, 0.01, 1)
    assert scoring.draw_scores(data, shares).components[0, 0] == pytest.approx(expected)


def test_permuting_seeds_changes_nothing():
    entry = np.random.default_rng(1).uniform(0.02, 0.2, (N, DRAWS, PARTS))
    data = gaps(entry)
    order = np.array([3, 0, 4, 1, 2])
    shuffled = scoring.Gaps(
        data.entries[:, order],
        data.accuracies[:, order],
        data.finished[:, order],
        data.original[order],
        data.floor[order],
        data.reference,
    )
    first, second = scoring.draw_scores(data).score, scoring.draw_scores(shuffled).score
    assert first == pytest.approx(second, abs=1e-12)


def test_statistic_weighs_draws():
    data = gaps(np.full((N, DRAWS, PARTS), 0.1))
    statistic = scoring.scenario_statistic(data)
    point = scoring.draw_scores(data).score[0, 0]
    even = np.full((1, N), 1 / N)
    assert statistic(even, np.array([[0.0, 1.0]]))[0, 0] == pytest.approx(point[1])


# A class-wise toy of three models: retrained, original, and the original with the forget logit
# masked, whose outputs look retrained while its features do not.
CLASS_FLOOR = {"J": 0.03, "L": 0.02, "H": 0.02}
CLASS_ORIGINAL = {"J": 0.90, "L": 0.60, "H": 0.25}
CLASS_MASKED = {"J": 0.05, "L": 0.03, "H": 0.25}


@pytest.mark.parametrize(
    ("components", "low", "high"), [(("J", "L"), 0.9, 1.0), (("J", "L", "H"), 0.0, 0.25)]
)
def test_the_probe_is_what_catches_a_masked_head(components, low, high):
    def stack(numbers):
        return np.tile([numbers[c] for c in components], (N, DRAWS, 1))

    ones = np.ones((1, N, DRAWS, 2))
    data = scoring.Gaps(
        stack(CLASS_MASKED)[None],
        ones,
        np.ones((1, N, DRAWS), dtype=bool),
        stack(CLASS_ORIGINAL),
        stack(CLASS_FLOOR),
        ones[0, 0],
    )
    assert low < only(scoring.draw_scores(data)) <= high


# --------------------------------------------------------------------------- admission


def test_an_original_that_equals_retraining_is_rejected():
    values = np.random.default_rng(2).normal(0.05, 0.01, 5)
    result = scoring.admission(values, values)
    assert not result.admitted
    assert not scoring.admission(np.full(5, 0.05), np.full(5, 0.05)).admitted


def test_admission_by_hand():
    original, floor = np.array([0.30, 0.32, 0.28]), np.array([0.10, 0.12, 0.08])
    result = scoring.admission(original, floor)
    assert result.separation == pytest.approx(0.2 / np.sqrt(2 * 0.0004 / 3))
    assert not scoring.admission(original, floor, z=float(result.separation) + 0.1).admitted
    assert not scoring.admission(floor, original).admitted
    assert not scoring.admission([0.3], [0.1]).admitted


def test_admission_is_elementwise():
    original = np.stack([np.full(4, 0.3), np.full(4, np.nan)], axis=1)
    result = scoring.admission(original, np.full((4, 2), 0.1))
    assert result.admitted.tolist() == [True, False]


def test_fewer_seeds_never_admit_more_on_average():
    generator = np.random.default_rng(3)
    original = generator.normal(0.06, 0.02, (12, 4000))
    floor = generator.normal(0.02, 0.02, (12, 4000))
    shares = [scoring.admission(original[:n], floor[:n]).admitted.mean() for n in (3, 5, 8, 12)]
    assert shares == sorted(shares)


def table(*by_draw) -> np.ndarray:
    return np.tile(by_draw, (N, 1)) + np.arange(N)[:, None] * 1e-4


SEPARATE = {"js_forget": table(0.3, 0.3), "gap_umia_auc": table(0.2, 0.2)}
FLOOR = {"js_forget": table(0.03, 0.03), "gap_umia_auc": table(0.01, 0.01)}


def test_an_optional_component_joins_only_if_every_admitted_draw_admits_it():
    good = {"gap_relearn": table(0.1, 0.1)}, {"gap_relearn": table(0.01, 0.01)}
    half = {"gap_relearn": table(0.1, 0.01)}, {"gap_relearn": table(0.01, 0.01)}
    both = scoring.admit("instance", SEPARATE | good[0], FLOOR | good[1])
    assert (both.components, both.draws, both.ranked) == (("J", "P", "L"), (0, 1), True)
    one = scoring.admit("instance", SEPARATE | half[0], FLOOR | half[1])
    assert (one.components, one.draws, one.ranked) == (("J", "P"), (0, 1), True)
    assert scoring.admit("instance", SEPARATE, FLOOR).components == ("J", "P")


def test_a_draw_needs_every_required_component():
    weak = SEPARATE | {"gap_umia_auc": table(0.2, 0.01)}
    result = scoring.admit("instance", weak, FLOOR)
    assert result.draws == (0,)
    assert result.reason is not None
    assert result.reason.startswith("uninformative")
    verdicts = {(t.component, t.draw): t.admitted for t in result.tests}
    assert verdicts == {("J", 0): True, ("J", 1): True, ("P", 0): True, ("P", 1): False}


def test_a_required_component_that_was_not_measured_is_named():
    result = scoring.admit("class", SEPARATE, FLOOR)
    assert result.reason == "gap_probe5 not measured for original and retrain"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("instance", "J P L"),
        ("class", "J H L"),
        ("subclass", "J H L P"),
        ("corrective", "J C"),
        ("weighted", "J C"),
    ],
)
def test_components_of_every_kind(kind, expected):
    assert " ".join(scoring.component_metrics(kind)) == expected


def test_a_board_may_name_its_criterion():
    names = scoring.component_metrics("weighted", {"C": "dp_gap"})
    assert names == {"J": "js_test", "C": "dp_gap"}
    with pytest.raises(ValueError, match="expected a kind"):
        scoring.component_metrics("klass")
    with pytest.raises(ValueError, match="expected components"):
        scoring.component_metrics("class", {"Q": "x"})


# --------------------------------------------------------------------------- eligibility, health

SOUND = scoring.Candidate(
    checks=(),
    absent=(),
    seeds=5,
    draws=2,
    pool=5,
    costs=(scoring.CostRatios("digits", 0.1, 0.5, 3.0),),
    track="default",
)


def test_a_sound_candidate_has_no_reasons_and_short_runs_are_not_timed():
    assert scoring.eligibility(SOUND) == []
    assert scoring.eligibility(dataclasses.replace(SOUND, seeds=64, draws=1)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checks": None}, "not checked"),
        ({"checks": ("frozen",)}, "fails checks: frozen"),
        ({"absent": ("digits: no finished run at s0d0",)}, "no finished run"),
        ({"seeds": 4}, "4 train seeds, 5 needed"),
        ({"draws": 1}, "1 draws, 2 needed"),
        ({"pool": 4}, "4 retrained models in the pool, 5 needed"),
        ({"track": "oracle"}, "never ranked"),
        ({"foreign": ("run outside this board (None)",)}, "outside this board"),
        ({"costs": (scoring.CostRatios("d", 0.3, None, 3.0),)}, "work ratio 0.3 above 0.2"),
        ({"costs": (scoring.CostRatios("d", None, None, 3.0),)}, "work ratio not measured"),
        ({"costs": (scoring.CostRatios("d", 0.1, 0.3, 60.0),)}, "time ratio 0.3 above 0.2"),
        ({"costs": (scoring.CostRatios("d", 0.1, None, 60.0),)}, "time ratio not measured"),
    ],
)
def test_each_reason_stands_alone(changes, words):
    reasons = scoring.eligibility(dataclasses.replace(SOUND, **changes))
    assert len(reasons) == 1
    assert words in reasons[0]


GOOD = {"retrain": 0.99, **dict.fromkeys(scoring.CONTROLS, 0.01)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"retrain": 0.97}, "retrain scores 0.970"),
        ({"original": 0.06}, "original scores 0.060"),
        ({"noise": 0.26}, "noise scores 0.260"),
        ({"logit_mask": 0.9}, "logit_mask scores 0.900"),
    ],
)
def test_each_bound_of_health(changes, words):
    failures = scoring.board_health(GOOD | changes, class_kinds=True).failures
    assert len(failures) == 1
    assert failures[0].startswith(words)


def test_a_healthy_board_and_its_notes():
    assert scoring.board_health(GOOD, class_kinds=True) == scoring.Health((), ())
    without = {k: v for k, v in GOOD.items() if k != "noise"}
    health = scoring.board_health(without, class_kinds=True)
    assert health.ok
    assert health.notes == ("control noise has no score on this board",)


def test_a_control_in_the_first_tier_fails_the_board():
    health = scoring.board_health(GOOD, {"noise": 1, "original": 2}, class_kinds=True)
    assert health.failures == ("control noise stands in the first tier",)
