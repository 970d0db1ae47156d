"""Boards of synthetic records: who is ranked, what is said, and that order changes no byte."""

from __future__ import annotations

import io
import json
import random
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from unsc_plugin._board import scatter
from unsc_plugin.errors import RecordError
from unsc_plugin.leaderboard import BoardSummary, ScenarioSummary, build
from unsc_plugin.record import Record, Unit

# Gaps (js, auc, relearn, probe) and accuracies (forget, retain, test) of each entry; the share of
# the way from the original to retraining is what the methods differ in.
FLOOR = np.array([0.033, 0.009, 0.011, 0.02])
ANCHOR = np.array([0.300, 0.069, 0.077, 0.25])
RETRAINED = np.array([0.762, 0.894, 0.932])
ORIGINAL = np.array([0.840, 0.888, 0.944])
SHARE = {
    "retrain": 1.0,
    "scrub": 0.95,
    "unsc": 0.80,
    "finetune": 0.45,
    "neggrad_plus": 0.448,
    "random_label": 0.10,
    "original": 0.0,
}
COLLAPSED = {"noise": 0.35, "random_init": 0.11, "bad_teaching.streisand": 0.90}
GAPS = ("js_forget", "gap_umia_auc", "gap_relearn", "gap_probe5")


def board(**changes: Any) -> BoardSummary:
    settings: dict[str, Any] = {
        "name": "toy",
        "title": "Toy board",
        "scenarios": (
            ScenarioSummary("digits-random", "instance", "a tenth of the digits"),
            ScenarioSummary("digits-class", "class", "one digit"),
        ),
        "bootstrap": 400,
    }
    return BoardSummary(**(settings | changes))


def numbers(entry: str, kind: str, noise: np.random.Generator) -> dict[str, float]:
    if entry in COLLAPSED:
        gaps = ANCHOR * 2
        accuracy = RETRAINED * COLLAPSED[entry]
    else:
        share = SHARE.get(entry, 0.5)
        gaps = FLOOR + (1 - share) * (ANCHOR - FLOOR)
        accuracy = ORIGINAL + share * (RETRAINED - ORIGINAL)
    gaps = gaps * (1 + 0.03 * noise.standard_normal(4))
    accuracy = accuracy + 0.001 * noise.standard_normal(3)
    found = dict(zip(GAPS, gaps.tolist(), strict=True))
    found |= dict(zip(("acc_forget", "acc_retain", "acc_test"), accuracy.tolist(), strict=True))
    found["tow"] = float(np.prod(1 - np.abs(accuracy - RETRAINED)))
    found["mubench.df_accuracy"] = found["acc_forget"]
    if kind == "class":
        found["acc_test_retained"] = found.pop("acc_test")
        found["acc_test_forgotten"] = 0.1
    else:
        del found["gap_probe5"]
    return found


def record(
    entry: str, scenario: ScenarioSummary, s: int, d: int, *, salt: int = 0, **changes: Any
) -> Record:
    noise = np.random.default_rng([salt, s, d, *entry.encode(), *scenario.name.encode()])
    metrics = numbers(entry, scenario.kind, noise)
    reference = dict(zip(("acc_forget", "acc_retain", "acc_test"), RETRAINED.tolist(), strict=True))
    if scenario.kind == "class":
        reference |= {"acc_test_retained": reference.pop("acc_test"), "acc_test_forgotten": 0.05}
    reference["mubench.df_accuracy"] = reference["acc_forget"]
    trained = entry == "retrain"
    settings: dict[str, Any] = {
        "entry": entry,
        "method": entry.split(".")[0],
        "board": "toy",
        "scenario": scenario.name,
        "kind": scenario.kind,
        "unit": Unit(train_seed=s, draw=d),
        "seed": 7,
        "status": "ok",
        "experiment": {"data": "digits"},
        "config": {"lr": 0.1},
        "hashes": {"forget": f"f{d}"},
        "reference_hashes": [f"r{d}{j}" for j in range(5)],
        "metrics": metrics,
        "reference": reference,
        "cost": {
            "seconds_unlearn": 100.0 if trained else 5.0,
            "seconds_prepare": 0.0,
            "work": 1000.0 if trained else 100.0,
            "peak_bytes": 2.0**25,
        },
        "needs": ["forget", "retain"],
        "n_hyperparameters": 3,
        "checks": {"passed": ["repeatable", "utility"], "failed": []},
        "environment": {"device": "cpu"},
        "package_version": "0.1.0",
        "command": f"unsc run {entry} --data digits",
        "created": "2025-01-01T00:00:00+00:00",
    }
    return Record(**(settings | changes))


def full(
    entries: tuple[str, ...] = (*SHARE, *COLLAPSED), summary: BoardSummary | None = None, **changes
) -> list[Record]:
    summary = summary or board()
    return [
        record(entry, scenario, s, d, **changes)
        for entry in entries
        for scenario in summary.scenarios
        for s in range(summary.train_seeds)
        for d in range(summary.draws)
    ]


def altered(records: list[Record], entry: str, **changes: Any) -> list[Record]:
    return [r.model_copy(update=changes) if r.entry == entry else r for r in records]


def row(made, entry: str):
    return next(r for r in made.standings.rows if r.entry == entry)


@pytest.fixture(scope="module")
def made():
    return build(full(), board())


def test_the_known_ranking_comes_out(made):
    assert made.ok
    order = [r.entry for r in made.standings.ranked]
    assert order[:2] == ["scrub", "unsc"]
    assert set(order[2:4]) == {"finetune", "neggrad_plus"}
    assert order[4] == "random_label"
    tiers = [r.tier for r in made.standings.ranked]
    assert tiers[0] == 1
    assert tiers[1] == 2
    assert tiers[2] == tiers[3]
    assert row(made, "scrub").rank.p_best == 1.0


def test_retrain_is_one_and_original_is_a_hundredth_of_its_utility(made):
    retrain, original = row(made, "retrain").summary, row(made, "original").summary
    assert retrain.score.estimate >= 0.99
    assert set(retrain.components.values()) == {1.0}
    assert original.score.estimate == pytest.approx(0.01 * original.utility, rel=1e-3)


def test_reference_and_controls_are_pinned_first_and_have_no_rank(made):
    assert [r.entry for r in made.standings.pinned] == [
        "retrain",
        "original",
        "random_init",
        "bad_teaching.streisand",
        "noise",
    ]
    assert all(r.tier is None for r in made.standings.pinned)
    notes = " ".join(made.health.notes)
    assert "neggrad.diverged" in notes
    assert "logit_mask" in notes


def test_components_follow_the_kind(made):
    random_result, class_result = made.standings.scenarios
    assert random_result.admission.components == ("J", "P", "L")
    assert class_result.admission.components == ("J", "H", "L")


def test_every_header_states_a_direction_and_columns_keep_their_order(made):
    ranking = next(s for s in made.sheets if s.title == "Ranking")
    labels = [column.label.split(" ")[0] for column in ranking.columns]
    expected = (
        "tier entry needs S rank a_J a_P a_L a_H u acc_forget acc_retain acc_test JS_f ΔAUC "
        "relearn ToW work time checks track status command"
    )
    assert " ".join(labels) == expected
    assert all(column.direction for column in ranking.columns if not column.text)


def test_bytes_do_not_depend_on_the_order_of_records(made):
    records = full()
    random.Random(3).shuffle(records)
    again = build(records, board())
    assert again.markdown() == made.markdown()
    assert again.svg() == made.svg()
    assert json.dumps(again.to_dict()) == json.dumps(made.to_dict())


def test_json_form_is_finite_and_says_whether_the_board_is_ok(made):
    tree = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert tree["ok"] is True
    assert tree["ranked"][0]["entry"] == "scrub"
    assert tree["ranked"][0]["summary"]["score"]["estimate"] == pytest.approx(0.94, abs=0.05)


def with_good_noise() -> list[Record]:
    records = full()
    good = {r.key: r.metrics for r in records if r.entry == "scrub"}

    def swap(r: Record) -> Record:
        key = (r.scenario, "scrub", r.unit.train_seed, r.unit.draw)
        return r.model_copy(update={"metrics": good[key]}) if r.entry == "noise" else r

    return [swap(r) for r in records]


def with_poor_retrain() -> list[Record]:
    return [
        r.model_copy(update={"metrics": r.metrics | {"acc_retain": 0.8}})
        if r.entry == "retrain"
        else r
        for r in full()
    ]


def without_original() -> list[Record]:
    return [r for r in full() if r.entry != "original"]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (with_good_noise, "noise scores 0.9"),
        (with_good_noise, "control noise stands in the first tier"),
        (with_poor_retrain, "retrain scores 0.8"),
        (without_original, "original is not on the board"),
    ],
)
def test_a_failing_board_shows_no_ranks(records, words):
    failing = build(records(), board())
    assert not failing.ok
    assert any(words in failure for failure in failing.health.failures)
    assert all(r.tier is None and r.rank is None for r in failing.standings.ranked)
    text = failing.markdown()
    assert "FAILING, no ranks are shown" in text
    assert "P(best)" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checks": None}, "conformance not checked"),
        ({"checks": {"passed": [], "failed": ["utility"]}}, "fails checks: utility"),
        ({"track": "oracle"}, "track oracle is never ranked"),
        ({"board": None}, "run outside this board"),
        ({"reference_hashes": ["x"] * 3}, "3 retrained models in the pool, 5 needed"),
        ({"hashes": {"forget": "other"}}, "forget set is not that of retrain"),
        ({"cost": {"work": 500.0, "seconds_unlearn": 1.0}}, "work ratio 0.5 above 0.2"),
        ({"cost": {"work": 50.0, "seconds_unlearn": 60.0}}, "time ratio 0.6 above 0.2"),
        ({"cost": {"seconds_unlearn": 1.0}}, "work ratio not measured"),
        ({"environment": {"device": "gpu"}}, "time ratio not measured"),
    ],
)
def test_an_ineligible_entry_is_listed_with_its_reason(changes, words):
    found = row(build(altered(full(), "unsc", **changes), board()), "unsc")
    assert found.role == "unranked"
    assert any(words in reason for reason in found.reasons)


def test_an_excused_check_does_not_bar_an_entry():
    checks = {"passed": ["a"], "failed": ["b"], "excused": {"b": "adds a head"}}
    assert row(build(altered(full(), "unsc", checks=checks), board()), "unsc").position == 2


def test_missing_units_and_numbers_bar_an_entry_and_are_named():
    records = [r for r in full() if r.key != ("digits-class", "unsc", 3, 1)]
    gone = row(build(records, board()), "unsc")
    assert gone.reasons == ("digits-class: no finished run at s3d1",)
    assert gone.summary.score is None

    def without_relearn(r: Record) -> Record:
        if r.key != ("digits-random", "unsc", 2, 0):
            return r
        kept = {k: v for k, v in r.metrics.items() if k != "gap_relearn"}
        return r.model_copy(update={"metrics": kept, "missing": {"gap_relearn": "no memory"}})

    holed = row(build([without_relearn(r) for r in full()], board()), "unsc")
    assert holed.reasons == ("digits-random: gap_relearn not measured at s2d0 (no memory)",)


def test_failed_and_diverged_units_count_as_zero_and_stay_visible():
    def break_one(r: Record) -> Record:
        if r.entry != "unsc" or r.unit.train_seed != 0:
            return r
        lost = {"status": "diverged", "reason": "loss is inf at step 3", "metrics": {}}
        return r.model_copy(update=lost)

    whole, broken = build(full(), board()), build([break_one(r) for r in full()], board())
    before, after = row(whole, "unsc").summary.score, row(broken, "unsc").summary.score
    assert after.estimate == pytest.approx(0.8 * before.estimate, rel=0.02)
    assert "4 diverged" in row(broken, "unsc").status
    assert "loss is inf at step 3" in broken.markdown()


def test_a_control_that_diverged_everywhere_scores_zero():
    lost = {"status": "diverged", "reason": "weights are not finite", "metrics": {}}
    records = full() + altered(full(("neggrad.diverged",)), "neggrad.diverged", **lost)
    made = build(records, board())
    assert made.ok
    assert row(made, "neggrad.diverged").summary.score.estimate == 0.0


def test_cancelled_units_are_missing_not_zero():
    records = altered(full(), "unsc", status="cancelled", reason="interrupted", metrics={})
    assert row(build(records, board()), "unsc").reasons == ("no unit finished",)


def test_expected_entries_without_records_are_listed():
    summary = board(entries=("retrain", "salun", "noise"))
    found = row(build(full(), summary), "salun")
    assert found.reasons == ("not run yet",)


def test_rows_without_a_retrained_reference_stand_apart():
    records = altered(full(), "unsc", reference={}, reference_hashes=[])
    made = build(records, board())
    assert [r.entry for r in made.standings.without_reference] == ["unsc"]
    assert "Without a retrained reference" in made.markdown()


def test_a_scenario_where_original_is_retrained_is_uninformative():
    def equal(r: Record) -> Record:
        if r.entry != "original":
            return r
        twin = record("retrain", next(s for s in board().scenarios if s.name == r.scenario), 9, 9)
        return r.model_copy(update={"metrics": twin.metrics | {"js_forget": 0.033}})

    made = build([equal(r) for r in full()], board())
    assert not made.standings.ranked
    assert "uninformative: original not separable from retrained" in made.markdown()
    assert row(made, "unsc").reasons[0] == "no scenario is admitted"
    assert row(made, "unsc").summary.values["acc_forget"].mean > 0


def test_a_board_too_small_for_ranks_says_so():
    summary = board(train_seeds=3)
    made = build(full(summary=summary), summary)
    assert not made.standings.ranked
    assert "3 train seeds, 5 needed" in row(made, "unsc").reasons


@pytest.mark.parametrize(("seeds", "draws"), [(1, 1), (1, 2), (2, 1), (5, 3)])
def test_boards_of_any_size_build(seeds, draws):
    summary = board(train_seeds=seeds, draws=draws)
    made = build(full(summary=summary), summary)
    assert bool(made.standings.ranked) == (seeds >= 5 and draws >= 2)
    assert made.markdown()
    assert made.svg()


def test_an_empty_board_is_a_failing_board():
    made = build([], board(entries=("retrain", "original", "unsc")))
    assert not made.ok
    assert "retrain is not on the board; run it first" in made.health.failures
    assert made.svg()
    assert made.markdown()


def test_weights_change_the_score_and_are_stated():
    made = build(full(), board(weights={"J": 2.0}))
    assert "weighs the components of S unequally: J 2" in made.markdown()


def test_equivalence_to_retraining_is_marked_only_where_shown():
    def like_retrain(r: Record) -> Record:
        if r.entry != "unsc":
            return r
        twin = record("retrain", next(s for s in board().scenarios if s.name == r.scenario), 0, 0)
        return r.model_copy(
            update={"metrics": r.metrics | {"acc_retain": twin.metrics["acc_retain"]}}
        )

    made = build([like_retrain(r) for r in full()], board())
    assert row(made, "unsc").summary.values["acc_retain"].equivalent
    assert not row(made, "random_label").summary.values["acc_forget"].equivalent


@pytest.mark.parametrize(
    "changes",
    [{"scenario": "other"}, {"kind": "instance"}, {"unit": Unit(train_seed=5, draw=0)}],
)
def test_records_outside_the_grid_are_refused(changes):
    stray = record("unsc", board().scenarios[1], 0, 0).model_copy(update=changes)
    with pytest.raises(RecordError, match="move that record away"):
        build([stray], board())


def test_two_records_of_one_unit_are_refused():
    one = record("unsc", board().scenarios[0], 0, 0)
    with pytest.raises(RecordError, match="got two of digits-random, unsc, s0d0"):
        build([one, one], board())


def test_a_gold_board_may_have_one_draw():
    summary = board(train_seeds=64, draws=1, scenarios=board().scenarios[:1])
    made = build(full(("retrain", "original", "noise", "unsc"), summary), summary)
    assert [r.entry for r in made.standings.ranked] == ["unsc"]


def test_six_scenarios_are_resampled_and_tested_pairwise():
    scenarios = tuple(ScenarioSummary(f"s{i}", "instance") for i in range(6))
    summary = board(scenarios=scenarios)
    made = build(full(summary=summary), summary)
    text = made.markdown()
    assert "## Pairwise tests" in text
    assert "scenarios resampled" in text


def test_a_weighted_scenario_takes_its_criterion_by_name():
    scenario = ScenarioSummary("adult", "weighted", metrics=(("C", "dp_gap"), ("J", "js_forget")))
    summary = board(scenarios=(scenario,))

    def criterion(r: Record) -> Record:
        return r.model_copy(update={"metrics": r.metrics | {"dp_gap": r.metrics["gap_relearn"]}})

    made = build([criterion(r) for r in full(summary=summary)], summary)
    assert made.standings.scenarios[0].admission.components == ("J", "C")
    ranking = next(s for s in made.sheets if s.title == "Ranking")
    assert "a_C" in [column.label for column in ranking.columns]


def test_svg_is_valid_has_one_label_per_entry_and_no_label_covers_another(made):
    tree = ElementTree.fromstring(made.svg())
    labels = [e.text for e in tree.iter() if e.get("class") == "halo"]
    assert sorted(labels) == sorted([*SHARE, *COLLAPSED])
    placed = scatter.place_labels(scatter.points(made.standings), scatter.Frame())
    boxes = [(p["text_x"], p["text_y"], p["text_x"] + 6.9 * len(p["label"])) for p in placed]
    for i, (left, base, right) in enumerate(boxes):
        for other_left, other_base, other_right in boxes[:i]:
            apart = right <= other_left or other_right <= left or abs(base - other_base) >= 13.9
            assert apart


def test_text_from_records_cannot_break_the_table_or_smuggle_markup():
    evil = record("evil", board().scenarios[0], 0, 0, command="unsc run <a|b>")
    lost = {"status": "failed", "reason": "x | y\n<script>", "metrics": {}}
    text = build([*full(), evil.model_copy(update=lost)], board()).markdown()
    assert "<script>" not in text
    assert r"x \| y &lt;script>" in text


def test_terminal_form_prints(made):
    out = io.StringIO()
    Console(file=out, width=200).print(made.terminal())
    assert "scrub" in out.getvalue()
    assert "upper right is better" in out.getvalue()
