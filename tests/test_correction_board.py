"""Boards of corrections: compared at an equal gap, per unit, for the method and against it."""

from __future__ import annotations

import io
import itertools
import json
import random
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats as scipy_stats
from test_bench import badges, tamper

from unsc_plugin import bench, record
from unsc_plugin._board import correction_plot
from unsc_plugin._board.trials import over_units
from unsc_plugin.errors import RecordError
from unsc_plugin.leaderboard import BoardSummary, CorrectionBoard, ScenarioSummary, build
from unsc_plugin.record import Record, Unit

SOFT = "soft_weighted"
T = (0.25, 0.5, 0.75, 1.0)
TABLE = ScenarioSummary("table", "correction", "a table of people")
GAP, NLL, ACC = 0.4, 0.5, 0.8
PRIOR = 0.69

# family -> (gap removed per strength, NLL added and accuracy lost at strength 1)
SWEPT = {
    SOFT: (1.0, 0.04, 0.04),
    "soft_weighted.hard": (1.0, 0.12, 0.06),
    "soft_weighted.permuted": (0.02, 0.01, 0.01),
    "constrained_step": (1.0, 0.0401, 0.0401),
}
SINGLE = {"retrain": (-0.02, 0.0, 0.0), "soft_weighted.reweighing": (0.7, 0.02, 0.02)}


def board(**changes: Any) -> BoardSummary:
    settings: dict[str, Any] = {
        "name": "toy",
        "title": "Toy corrections",
        "scenarios": (TABLE,),
        "train_seeds": 2,
        "draws": 3,
        "criterion": "dp_soft",
    }
    return BoardSummary(**(settings | changes))


def numbers(removed: float, nll: float, acc: float, unit: tuple[int, int]) -> dict[str, float]:
    """What a model measures that has removed a share of the gap at such a cost."""
    of_unit = np.random.default_rng(unit).normal(size=3)  # shared by all entries: pairs cancel it
    own = np.random.default_rng([*unit, int(1e6 * (removed + 1)), int(1e6 * nll)]).normal(size=2)
    gap = (GAP + 0.02 * of_unit[0]) * (1 - removed)
    return {
        "dp_soft": gap,
        "dp_diff": abs(gap) + 0.05,
        "eop_diff": abs(gap) + 0.01,
        "eo_diff": abs(gap) + 0.02,
        "nll": NLL + nll + 0.02 * of_unit[1] + 0.0005 * own[0],
        "acc": ACC - acc + 0.02 * of_unit[2] + 0.0005 * own[1],
        "worst_group_acc": ACC - 0.2 + 0.1 * removed,
        "nll_prior": PRIOR,
    }


def entry(label: str, s: int, d: int, scenario: str = "table", **changes: Any) -> Record:
    name, _, text = label.partition("@")
    t = float(text) if text else 1.0
    removed, nll, acc = {**SWEPT, **SINGLE}.get(name, (0.0, 0.0, 0.0))
    metrics = numbers(removed * t, nll * t**2, acc * t, (s, d))
    plan = {
        "before": {"f": [GAP], "u": NLL, "u_selection": NLL},
        "stop": "reached",
        "noop": None,
        "shortfall": [0.0],
        "protocol": "ours",
    }
    selection = {"f": [metrics["dp_soft"]], "se": [0.01], "u": NLL + nll * t**2}
    planned = name in SWEPT
    settings: dict[str, Any] = {
        "entry": label,
        "method": name.split(".")[0],
        "board": "toy",
        "scenario": scenario,
        "kind": "correction",
        "unit": Unit(train_seed=s, draw=d),
        "seed": 7,
        "status": "ok",
        "experiment": {"data": "table"},
        "config": {"target": t, "protocol": "ours"} if planned else {},
        "hashes": {"original": f"o{s}{d}"},
        "metrics": metrics,
        "intervals": {"dp_soft": [metrics["dp_soft"] - 0.02, metrics["dp_soft"] + 0.02]},
        "stats": {
            "plan": plan, "realised": "soft", "realised_values": {"selection": selection},
        } if planned else {},
        "package_version": "0.1.0",
        "command": f"unsc run {label}",
        "created": "2025-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Record(**(settings | changes))


LABELS = ("original", *SINGLE, *(f"{name}@{t:g}" for name in SWEPT for t in T))


def full(summary: BoardSummary | None = None, labels: tuple[str, ...] = LABELS) -> list[Record]:
    summary = summary or board()
    return [
        entry(label, s, d, scenario.name)
        for scenario in summary.scenarios
        for label in labels
        for s in range(summary.train_seeds)
        for d in range(summary.draws)
    ]


def changed(
    records: list[Record], label: str, at: tuple[int, int] | None = None, **changes: Any
) -> list[Record]:
    """Change the records of an entry, or of all of its family; metrics and stats are merged."""

    def change(r: Record) -> Record:
        there = at is None or (r.unit.train_seed, r.unit.draw) == at
        if not there or (r.entry != label and not r.entry.startswith(f"{label}@")):
            return r
        merged = {
            key: {**getattr(r, key), **value} if key in ("metrics", "config") else value
            for key, value in changes.items()
        }
        return r.model_copy(update=merged)

    return [change(r) for r in records]


def failed(records: list[Record], label: str, status: str, at: Any = None) -> list[Record]:
    why = {"status": status, "reason": "it broke", "metrics": {}}
    return [
        r.model_copy(update=why)
        if r.entry == label and at in (None, (r.unit.train_seed, r.unit.draw))
        else r
        for r in records
    ]


def row(made: CorrectionBoard, name: str, scenario: int = 0) -> Any:
    return next(r for r in made.corrections.scenarios[scenario].rows if r.name == name)


def said(made: CorrectionBoard) -> str:
    sheet = next(s for s in made.sheets if s.title.startswith("What the numbers say"))
    return "\n".join(sheet.text)


def table(made: CorrectionBoard, title: str) -> list[dict[str, str]]:
    sheet = next(s for s in made.sheets if s.title.startswith(title))
    labels = [column.label for column in sheet.columns]
    return [dict(zip(labels, cells, strict=True)) for cells in sheet.rows]


@pytest.fixture(scope="module")
def made() -> CorrectionBoard:
    found = build(full(), board())
    assert isinstance(found, CorrectionBoard)
    return found


# --------------------------------------------------------------------------- at an equal gap


def test_values_at_a_level_are_those_of_every_units_own_curve(made: CorrectionBoard) -> None:
    for name in SWEPT:
        if name == "soft_weighted.permuted":
            continue
        for place, left in zip(row(made, name).places, (0.75, 0.5, 0.25), strict=True):
            expected = []
            for s, d in np.ndindex(2, 3):
                points = [entry("original", s, d), *(entry(f"{name}@{t:g}", s, d) for t in T)]
                gaps = [p.metrics["dp_soft"] for p in points]
                losses = [p.metrics["nll"] for p in points]
                expected.append(np.interp(left * gaps[0], gaps[::-1], losses[::-1]))
            assert (place.share, place.reached, place.units) == (left, 6, 6)
            assert place.values["nll"].estimate == pytest.approx(np.mean(expected), rel=1e-12)


def test_differences_are_paired_so_that_what_units_share_cancels(made: CorrectionBoard) -> None:
    place = row(made, "soft_weighted.hard").places[1]
    assert place.against["nll"].estimate == pytest.approx(0.25 * 0.08, abs=0.002)
    assert place.against["acc"].estimate == pytest.approx(-0.5 * 0.02, abs=0.002)
    assert place.against["nll"].half < 0.2 * place.values["nll"].half
    assert set(row(made, SOFT).places[1].against) == set()


@pytest.mark.parametrize(
    ("shape", "over"),
    [((4, 1), "seeds"), ((1, 4), "draws"), ((1, 2), "draws"), ((4, 2), "seeds"), ((3, 3), "wider")],
)
def test_limits_are_over_seeds_or_draws_the_wider_of_both(shape: Any, over: str) -> None:
    grid = np.random.default_rng(0).normal(size=shape)
    grid += 5 * np.arange(shape[1])  # draws differ far more than seeds
    seeds, draws = grid.mean(axis=1), grid.mean(axis=0)
    sample = {"seeds": seeds, "draws": draws, "wider": draws}[over]
    found = over_units(grid, 0.9)
    limits = scipy_stats.t.interval(
        0.9, len(sample) - 1, loc=grid.mean(), scale=scipy_stats.sem(sample)
    )
    assert found is not None
    assert (found.estimate, found.low, found.high) == pytest.approx((grid.mean(), *limits))


def test_one_unit_has_no_limits_and_nothing_is_decided() -> None:
    small = board(train_seeds=1, draws=1)
    one = build(full(small), small)
    assert row(one, SOFT).places[0].values["nll"].half is None
    assert "soft_weighted.hard less soft_weighted in NLL: +0.0" in said(one)
    assert "without an interval, nothing is decided" in said(one)
    assert "beat" not in said(one)


def test_a_level_that_one_unit_misses_stays_absent() -> None:
    weak = changed(full(), "constrained_step", (0, 1), metrics={"dp_soft": 0.3})
    found = build(weak, board())
    places = row(found, "constrained_step").places
    assert [place.reached for place in places] == [6, 5, 5]
    assert places[0].values
    assert not places[1].values
    assert not places[1].against
    cells = table(found, "At an equal gap")
    there = next(c for c in cells if (c["left"], c["entry"]) == ("50 %", "constrained_step"))
    assert (there["units"], there["NLL"], there["Δ NLL"]) == ("5 of 6", "–", "–")
    assert "constrained_step comes down to 50 % and 25 % of the gap in 5 of 6 units" in said(found)


def test_a_strength_without_a_result_hides_what_lies_behind_it_and_no_more() -> None:
    found = build(failed(full(), f"{SOFT}@0.5", "diverged", (1, 2)), board())
    places = row(found, SOFT).places
    assert [(place.reached, place.unmeasured) for place in places] == [(6, 0), (5, 1), (5, 1)]
    assert "comes down to 50 % and 25 % of the gap in 5 of 6 (1 without a result) units" in said(
        found
    )
    assert "Runs without a result" in found.markdown()
    assert found.ok
    assert f"table: {SOFT}@0.5 diverged in 1 of 6 units" in found.health.notes


def test_a_gap_of_the_other_sign_gives_the_same_comparison(made: CorrectionBoard) -> None:
    turned = [
        r.model_copy(
            update={
                "metrics": {**r.metrics, "dp_soft": -r.metrics["dp_soft"]},
                "intervals": {"dp_soft": [-x for x in r.intervals["dp_soft"][::-1]]},
            }
        )
        for r in full()
    ]
    other = build(turned, board())
    assert said(other) == said(made)
    for name in SWEPT:
        assert row(other, name).places == row(made, name).places


# --------------------------------------------------------------------------- sentences


def test_the_board_says_where_its_method_wins_ties_and_has_nothing_to_compare(
    made: CorrectionBoard,
) -> None:
    text = said(made)
    assert "soft_weighted beats soft_weighted.hard in NLL: +0.0" in text
    assert "soft_weighted beats soft_weighted.hard in accuracy: −0.5" in text
    for words in text.split("\n"):
        if "constrained_step in NLL" in words:
            assert words.startswith("soft_weighted does not beat constrained_step")
            assert words.count("a tie") == 3
    assert (
        "soft_weighted.permuted comes down to 75 %, 50 % and 25 % of the gap in 0 of 6 units: "
        "nothing is compared there." in text
    )
    assert "No entry turned the sign of dp_soft" in text


def test_the_board_says_where_its_method_loses() -> None:
    worse = [
        r.model_copy(
            update={"metrics": {**r.metrics, "nll": r.metrics["nll"] + 0.1 * r.config["target"]}}
        )
        if r.entry.startswith(f"{SOFT}@")
        else r
        for r in full()
    ]
    text = said(build(worse, board()))
    assert "soft_weighted does not beat soft_weighted.hard in NLL: −0.0" in text
    assert "at 25 %, worse." in text
    assert "soft_weighted beats soft_weighted.hard in accuracy" in text


def test_a_single_point_is_compared_where_it_happens_to_lie(made: CorrectionBoard) -> None:
    found = row(made, "soft_weighted.reweighing")
    [place] = found.places
    assert place.share == pytest.approx(0.3)
    assert place.beside == 6
    soft_there = 0.7 * 0.04 * 0.5 * 1.5  # between t = .5 and .75, close to .7² · .04
    assert place.against["nll"].estimate == pytest.approx(0.02 - soft_there, abs=0.002)
    assert "soft_weighted does not beat soft_weighted.reweighing in NLL" in said(made)
    assert "at 30 %, " in said(made)
    cells = {c["entry"]: c for c in table(made, "Single points")}
    assert cells["soft_weighted.reweighing"]["left"] == "30 %"
    assert cells["retrain"]["soft_weighted there"] == "no gap closed in 6 of 6"
    assert cells["retrain"]["Δ NLL"] == "–"
    assert "retrain" not in said(made)


def test_a_single_point_beyond_the_curve_is_not_compared() -> None:
    labels = tuple(label for label in LABELS if label not in (f"{SOFT}@0.75", f"{SOFT}@1"))
    found = build(full(labels=labels), board())
    text = said(found)
    assert (
        "soft_weighted comes down to the 30 % of the gap that soft_weighted.reweighing leaves in "
        "0 of 6 units: nothing is compared there." in text
    )
    assert "soft_weighted comes down to 25 % of the gap in 0 of 6 units" in text


def test_a_turned_sign_counts_only_beyond_its_interval() -> None:
    over = {"dp_soft": -0.05}
    records = changed(
        full(), "soft_weighted.hard@1", (0, 0), metrics=over,
        intervals={"dp_soft": [-0.07, -0.03]},
    )  # fmt: skip
    records = changed(
        records, "soft_weighted.hard@1", (0, 1), metrics=over, intervals={"dp_soft": [-0.1, 0.001]}
    )
    records = changed(records, "soft_weighted.hard@1", (1, 1), metrics=over, intervals={})
    found = build(records, board())
    assert (
        "soft_weighted.hard@1 turned the sign of dp_soft, beyond its bootstrap interval, in 1 of 5 "
        "units." in said(found)
    )
    assert "No entry turned" not in said(found)


def test_a_plan_that_did_nothing_is_said() -> None:
    plan = {"noop": "no_significant_gap", "stop": "no_significant_gap", "before": {}}
    records = changed(full(), f"{SOFT}@0.25", stats={"plan": plan})
    text = said(build(records, board()))
    assert f"{SOFT}@0.25 left the model as it was in 6 of 6 units: 6 no_significant_gap." in text


def test_without_the_method_nothing_is_compared_and_the_board_says_so() -> None:
    labels = tuple(label for label in LABELS if not label.startswith(f"{SOFT}@"))
    found = build(full(labels=labels), board())
    assert found.corrections.soft is None
    assert f"no sweep of {SOFT} is on the board: nothing is compared with it" in found.health.notes
    assert "beat" not in said(found)
    assert "None" not in found.markdown()
    assert row(found, "constrained_step").places[1].values


def test_a_sweep_under_another_name_may_stand_for_the_method() -> None:
    named = [
        r.model_copy(
            update={
                "entry": r.entry.replace(f"{SOFT}@", "soft-head@"),
                "config": {**r.config, "solver": "qp" if r.entry.startswith(f"{SOFT}@") else "h"},
            }
        )
        for r in full()
    ]
    found = build(named, board())
    assert found.corrections.soft == "soft-head"
    assert "soft-head beats soft_weighted.hard in NLL" in said(found)


# --------------------------------------------------------------------------- the other tables


def test_the_pareto_set_and_the_volume_below_the_prior(made: CorrectionBoard) -> None:
    means = {
        label: np.mean(
            [[r.metrics["dp_soft"], r.metrics["nll"]] for r in full() if r.entry == label], axis=0
        )
        for label in LABELS
    }
    best = {
        label
        for label, own in means.items()
        if not any((other <= own).all() and (other < own).any() for other in means.values())
    }
    points = [point for r in made.corrections.scenarios[0].rows for point in r.points]
    assert {point.label for point in points if point.on_front} == best
    assert len(best) < len(LABELS) / 2
    soft, hard = row(made, SOFT), row(made, "soft_weighted.hard")
    assert soft.hypervolume.estimate > hard.hypervolume.estimate > 0
    assert row(made, "original").hypervolume.estimate == 0
    records = {label: entry(label, 1, 1) for label in ("original", *(f"{SOFT}@{t:g}" for t in T))}
    one = build([r.model_copy(update={"unit": Unit(train_seed=0, draw=0)}) for r in
                 records.values()], board(train_seeds=1, draws=1))  # fmt: skip
    gap = records["original"].metrics["dp_soft"]
    steps = sorted((abs(r.metrics["dp_soft"]), r.metrics["nll"]) for r in records.values())
    area = sum(
        (after - before) * (PRIOR - loss)
        for (before, loss), (after, _) in itertools.pairwise(steps)
    )
    assert row(one, SOFT).hypervolume.estimate == pytest.approx(area / (gap * PRIOR), rel=1e-9)


def test_without_the_priors_loss_there_is_no_volume() -> None:
    bare = [
        r.model_copy(update={"metrics": {k: v for k, v in r.metrics.items() if k != "nll_prior"}})
        for r in full()
    ]
    found = build(bare, board())
    assert row(found, SOFT).hypervolume is None
    assert "table: no nll_prior in the records: no hypervolume" in found.health.notes
    assert "hypervolume" not in table(found, "Pareto")[0]


def test_every_unit_deploys_what_its_selection_rows_choose(made: CorrectionBoard) -> None:
    assert row(made, SOFT).deployed.chosen == {"0.75": 6}  # 1 costs more than 5 % of the loss
    assert row(made, "soft_weighted.hard").deployed.chosen == {"0.25": 6}
    expected = np.mean([entry(f"{SOFT}@0.75", s, d).metrics["nll"] for s, d in np.ndindex(2, 3)])
    assert row(made, SOFT).deployed.values["nll"].estimate == pytest.approx(expected)
    assert row(made, "retrain").deployed is None
    cells = {c["entry"]: c for c in table(made, "Deployed")}
    assert set(cells) == set(SWEPT)
    assert cells[SOFT]["strength (units)"] == "0.75 (6)"


def test_units_may_deploy_different_strengths_and_one_may_deploy_none() -> None:
    def selected(loss: float, *f: float) -> dict[str, Any]:
        plan = {"before": {"u_selection": NLL}}
        values = {"selection": {"f": f or [0.01, -0.02], "se": [0.1, 0.1], "u": loss}}
        return {"plan": plan, "realised_values": values}

    cheap = changed(full(), f"{SOFT}@1", (0, 0), stats=selected(NLL))
    found = row(build(cheap, board()), SOFT).deployed
    assert found.chosen == {"0.75": 5, "1": 1}
    assert found.values
    one_goal = changed(full(), f"{SOFT}@1", (0, 0), stats=selected(NLL, 0.0, -0.3))
    assert row(build(one_goal, board()), SOFT).deployed.chosen == {"0.75": 6}
    dear = changed(full(), SOFT, (0, 0), stats=selected(2 * NLL))
    found = row(build(dear, board()), SOFT).deployed
    assert found.chosen == {"0.75": 5}
    assert not found.values
    lost = changed(full(), SOFT, stats={"realised_values": {"selection": {"f": ["nan"], "u": 1}},
                                        "plan": {"before": {"u_selection": 1.0}}})  # fmt: skip
    assert row(build(lost, board()), SOFT).deployed is None


def test_all_numbers_stand_in_one_table() -> None:
    oracle = {"oracle_js": 0.01, "oracle_agree": 0.98, "oracle_gap_diff": -0.03}
    records = changed(full(), f"{SOFT}@1", metrics={**oracle, "robust_acc": 0.5})
    stats = {"plan": {"stop": "exhausted", "shortfall": [0.1, 0.3]}, "realised": "hard"}
    records = changed(records, f"{SOFT}@1", (0, 0), stats=stats)
    cells = {c["entry"]: c for c in table(build(records, board()), "All numbers")}
    assert set(cells) == set(LABELS)
    found = cells[f"{SOFT}@1"]
    assert found["plan ended"] == "1 exhausted, 5 reached"
    assert found["realised"] == "1 hard, 5 soft"
    assert found["shortfall"] == "0.050"
    assert found["oracle_agree %"] == "98.00 ± 0.00"
    assert found["robust_acc %"] == "50.00 ± 0.00"
    assert "robust_nll" not in found
    assert found["runs"] == "6 of 6 ok"
    assert cells["retrain"]["plan ended"] == "–"


def test_entries_that_cannot_be_compared_stand_apart_with_their_reasons() -> None:
    records = changed(full(), "soft_weighted.hard@1", config={"protocol": "reference"})
    records = changed(records, "constrained_step@0.5", (0, 0), hashes={"original": "other"})
    records = changed(records, "soft_weighted.permuted", board=None)
    records = changed(records, "soft_weighted.reweighing", (0, 0), config={"alpha": 2})
    found = build(records, board())
    reasons = {a.name: " ".join(a.reasons) for a in found.corrections.scenarios[0].apart}
    assert "protocol reference" in reasons["soft_weighted.hard"]
    assert "table: another original model at s0d0" in reasons["constrained_step"]
    assert "run outside this board (None)" in reasons["soft_weighted.permuted"]
    assert "its configuration differs" in reasons["soft_weighted.reweighing"]
    assert {r.name for r in found.corrections.scenarios[0].rows} == {"original", "retrain", SOFT}
    assert "soft_weighted.hard" not in said(found)
    assert len(table(found, "Not compared")) == 13


def test_a_robust_loss_is_a_gap_above_the_originals_clean_loss() -> None:
    summary = board(criterion="robust_nll")
    robust = [
        r.model_copy(
            update={"metrics": {**r.metrics, "robust_nll": r.metrics["dp_soft"] + NLL}}
        )
        for r in changed(full(), "original", metrics={"nll": NLL})
    ]  # fmt: skip
    found = build(robust, summary)
    assert row(found, SOFT).places[1].share == 0.5
    assert row(found, SOFT).places[1].reached == 6
    assert row(found, "original").points[0].criterion.estimate == pytest.approx(
        row(build(full(), board()), "original").points[0].criterion.estimate
    )
    assert "|robust_nll − nll of original|" in found.markdown().replace("\\", "")


# --------------------------------------------------------------------------- health and form


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (lambda: [r for r in full() if r.entry != "original"], "original is not on the board"),
        (lambda: failed(full(), "original", "cancelled", (0, 1)), "no finished run at s0d1"),
        (lambda: failed(full(), f"{SOFT}@1", "failed", (1, 0)), f"{SOFT}@1 failed at s1d0"),
        (
            lambda: [
                r.model_copy(update={"metrics": {"nll": 1.0}, "missing": {"dp_soft": "no groups"}})
                if r.entry == "original" and r.unit.draw == 0
                else r
                for r in full()
            ],
            "original has no dp_soft at s0d0, s1d0 (no groups)",
        ),
        (lambda: [], "original is not on the board"),
    ],
)
def test_a_board_fails_where_its_numbers_cannot_be_trusted(records: Any, words: str) -> None:
    found = build(records(), board())
    assert not found.ok
    assert any(words in failure for failure in found.health.failures)
    text = found.markdown()
    assert "FAILING" in text
    assert "ranks" not in text
    assert found.svg()


def test_a_criterion_that_is_better_when_larger_is_no_gap() -> None:
    found = build(full(), board(criterion="acc"))
    assert any("criterion acc is better when larger" in text for text in found.health.failures)


def test_notes_name_what_is_missing_and_what_is_not_worth_correcting() -> None:
    records = [r for r in full() if (r.entry, r.unit.draw) != ("retrain", 2)]
    records = changed(records, "original", (0, 0), intervals={"dp_soft": [-0.1, 0.9]})
    records = changed(records, "original", (0, 1), intervals={"dp_soft": [-0.9, -0.1]})
    notes = build(records, board(notes=("from the board",))).health.notes
    assert "from the board" in notes
    assert "table: 2 of 114 runs are not there yet" in notes
    assert any("not clear of 0 in 1 of 6 units" in note for note in notes)


def test_a_board_without_a_gap_matches_nothing() -> None:
    found = build(changed(full(), "original", metrics={"dp_soft": 0.0}), board())
    assert all(not place.values for place in row(found, SOFT).places)
    assert row(found, SOFT).hypervolume is None
    assert found.svg()


def test_corrections_and_forget_sets_are_two_boards() -> None:
    mixed = board(scenarios=(TABLE, ScenarioSummary("digits", "instance")))
    with pytest.raises(RecordError, match="table of toy are corrections"):
        build(full(), mixed)


def test_records_outside_the_grid_are_refused() -> None:
    with pytest.raises(RecordError, match="move that record away"):
        build([entry("original", 2, 0)], board())


def test_bytes_do_not_depend_on_the_order_of_records(made: CorrectionBoard) -> None:
    records = full()
    random.Random(3).shuffle(records)
    again = build(records, board())
    assert again.markdown() == made.markdown()
    assert (again.svg(), again.plots()) == (made.svg(), made.plots())
    assert json.dumps(again.to_dict(), allow_nan=False) == json.dumps(made.to_dict())
    assert made.to_dict()["ok"] is True


def test_the_order_of_entries_is_that_of_the_board() -> None:
    order = tuple(reversed(LABELS))
    found = build(full(), board(entries=order))
    names = [r.name for r in found.corrections.scenarios[0].rows]
    assert names == list(dict.fromkeys(label.partition("@")[0] for label in order))
    soft = row(found, SOFT)
    assert [point.strength for point in soft.points] == list(T)


def test_an_entry_of_another_track_says_so() -> None:
    found = build(changed(full(), "soft_weighted.hard", track="oracle"), board())
    names = {cells["entry"] for cells in table(found, "At an equal gap")}
    assert {SOFT, "soft_weighted.hard (oracle)"} <= names


@pytest.mark.parametrize(("width", "lost"), [(160, ()), (80, ("worst-group acc %", "Δ acc, pp"))])
def test_the_terminal_form_fits(made: CorrectionBoard, width: int, lost: tuple[str, ...]) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(made.terminal(width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "soft_weighted.permuted" in text
    assert "+0.0" in text
    for label in ("worst-group acc %", "Δ acc, pp"):
        assert (label in text) == (label not in lost)


def test_plots_have_a_line_per_family_a_mark_per_point_and_a_star(made: CorrectionBoard) -> None:
    for svg in (made.svg(), made.plots()["accuracy.svg"]):
        tree = ElementTree.fromstring(svg)
        names = [e.text for e in tree.iter() if e.tag.endswith("text")]
        assert {*SWEPT, *SINGLE, "original"} <= set(names)
        lines = [e for e in tree.iter() if e.tag.endswith("polyline")]
        assert len(lines) == len(SWEPT)
        assert all(len(line.get("points").split()) == 1 + len(T) for line in lines)
        stars = [e for e in tree.iter() if e.get("class") == "star"]
        assert len(stars) == 2  # in the panel and in the legend
    drawn = correction_plot.drawing(made.corrections, "acc")
    assert drawn["outside"] == ""
    assert [(p["x_label"], p["y_label"]) for p in drawn["panels"]] == [
        ("← |dp_soft|", "accuracy, % →")
    ]


@pytest.mark.parametrize("values", [[0.0, 0.47], [0.4701, 0.4712], [0.5], [3.0, 51.0], []])
def test_axes_hold_their_values_between_few_round_ticks(values: list[float]) -> None:
    axis = correction_plot.axis("x", values)
    assert 2 <= len(axis.ticks) <= 8
    assert all(axis.low <= value <= axis.high for value in values)
    assert all(float(f"{tick:.4g}") == pytest.approx(tick) for tick in axis.ticks)


def test_several_scenarios_stand_one_after_the_other() -> None:
    summary = board(scenarios=(TABLE, TABLE._replace(name="other")))
    found = build(full(summary), summary)
    titles = [sheet.title for sheet in found.sheets]
    assert titles.index("At an equal gap: other") > titles.index("All numbers: table")
    assert found.markdown().count("](plot.svg)") == 1
    assert ElementTree.fromstring(found.svg()) is not None


def test_text_from_records_cannot_break_the_table_or_smuggle_markup() -> None:
    evil = failed(full(), f"{SOFT}@1", "failed")
    evil = [r.model_copy(update={"reason": "x | y\n<script>"}) if r.status != "ok" else r
            for r in evil]  # fmt: skip
    text = build(evil, board()).markdown()
    assert "<script>" not in text
    assert r"x \| y &lt;script>" in text


# --------------------------------------------------------------------------- a real board

YAML = """
schema: 1
name: toy
title: Toy corrections
scenarios:
  - {name: table, data: synthetic-bias, model: logistic, recipe: {epochs: 2},
     forget: [{kind: correction}]}
entries:
  - original
  - {method: soft_weighted, set: {utility_stop: null}, sweep: {target: [0.3, 0.6]}}
evaluation: {train_seeds: 1, draws: 1, reference_pool: 1, correction: {}}
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny board of a real run, and its cache."""
    folder, cache = tmp_path_factory.mktemp("board"), tmp_path_factory.mktemp("cache")
    badges(cache)
    (folder / "board.yaml").write_text(YAML)
    opened = bench.open_board(str(folder), cache=cache, device="cpu")
    todo, _ = bench.split_done(opened, bench.jobs(opened))
    done = bench.run_jobs(opened, todo)
    assert [one.status for one in done] == ["ok"] * 3
    return folder, cache


def opened(real: tuple[Path, Path], tmp_path: Path) -> bench.Board:
    folder = Path(shutil.copytree(real[0], tmp_path / "board"))
    return bench.open_board(str(folder), cache=real[1], device="cpu")


def test_a_real_board_is_built_and_fresh(real: tuple[Path, Path], tmp_path: Path) -> None:
    found = opened(real, tmp_path)
    built = bench.build(found)
    assert built.ok, built.health
    assert built.found.board.criterion == "dp_soft"
    assert {path.name for path in bench.files(found, built)} == {
        "LEADERBOARD.md", "plot.svg", "accuracy.svg",
    }  # fmt: skip
    place = row(built, SOFT).places[0]
    assert place.reached == 1
    assert 0.3 < place.values["nll"].estimate < 0.7


def test_a_scenario_without_records_is_one_of_corrections(
    real: tuple[Path, Path], tmp_path: Path
) -> None:
    found = opened(real, tmp_path)
    assert [s.kind for s in bench.summary(found, []).scenarios] == ["correction"]


def test_verify_passes_from_kept_logits_and_finds_what_was_edited(
    real: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(real, tmp_path)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a unit was run again")

    monkeypatch.setattr("unsc_plugin.run.run_unit", never)
    assert bench.verify(found) == (3, [])
    name = f"{SOFT}@0.3--s0d0.json"
    stored = record.read(found.results / name)
    assert {"oracle_js", "oracle_agree"} <= stored.metrics.keys()

    def edit(tree: dict[str, Any]) -> None:
        tree["metrics"]["nll"] += 0.01
        tree["intervals"]["dp_soft"][1] += 0.01

    tamper(found.out, name, edit)
    _, mismatches = bench.verify(found)
    assert [one.what for one in mismatches] == ["intervals.dp_soft.1", "metrics.nll"]


def test_verify_without_logits_checks_the_oracle_too(
    real: tuple[Path, Path], tmp_path: Path
) -> None:
    found = opened(real, tmp_path)
    name = f"{SOFT}@0.3--s0d0.json"

    def edit(tree: dict[str, Any]) -> None:
        tree["metrics"]["oracle_js"] += 0.01

    tamper(found.out, name, edit)
    stored = record.read(found.results / name)
    bench.outputs_path(stored, real[1]).unlink()
    _, mismatches = bench.verify(found)
    assert [one.what for one in mismatches] == ["metrics.oracle_js"]


def test_points_far_out_are_named_and_do_not_flatten_the_others() -> None:
    far = {"nll": 50.0, "dp_soft": 3 * GAP}
    records = [
        one.model_copy(update={"metrics": {**one.metrics, **far}})
        if one.entry == "soft_weighted.hard@1"
        else one
        for one in full()
    ]
    drawn = correction_plot.drawing(build(records, board()).corrections, "nll")
    assert drawn["outside"] == "Far outside, not drawn (points): soft_weighted.hard (1)."
    assert max(float(tick["label"]) for tick in drawn["panels"][0]["y_ticks"]) < 1
    assert "not drawn (points): soft_weighted.hard (1)" in build(records, board()).svg()
