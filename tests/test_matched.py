"""Trajectories change nothing but what is known, and boards compare at equal forgetting."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import unsc
from test_leaderboard import board, record
from test_run import SPEC, made, setting, unit
from test_sequences import sheet
from torch import nn

from unsc_plugin import bench, engine, run
from unsc_plugin._board.curves import percent_axis
from unsc_plugin._curves import WATCHED, Trajectory
from unsc_plugin.engine import is_mark
from unsc_plugin.leaderboard import ScenarioSummary, build
from unsc_plugin.method import UnlearningTask
from unsc_plugin.record import Record, read
from unsc_plugin.runtime import state_sha256
from unsc_plugin.spec import BoardSpec, EvaluationSpec, fingerprint, read_yaml

WATCHING = SPEC.model_copy(update={"trajectory": True})
TIMES = {"seconds_prepare", "seconds_unlearn", "time_ratio", "peak_bytes"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share, so that originals and references are trained once."""
    return tmp_path_factory.mktemp("models")


# --------------------------------------------------------------------------- the observer


def test_marks_grow_by_the_root_of_two() -> None:
    marks = [step for step in range(-1, 100) if is_mark(step)]
    assert marks == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91]


@pytest.fixture
def tiny(make_rows: Callable[..., Any]) -> Any:
    """A frame of table rows; observers need no more of it."""
    return SimpleNamespace(
        forget=make_rows(8, 1), retain_eval=make_rows(12, 2), test=make_rows(10, 3),
        kind="instance", forgotten=torch.zeros(10, dtype=torch.bool),
    )  # fmt: skip


class Wrong(nn.Module):
    """Answers the recorded label but for the first `wrong` rows; counts how often it is asked."""

    def __init__(self, rows: Any, wrong: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        inputs = rows.storage["features"]
        self.known = {tuple(x.tolist()): (int(y), i) for i, (x, y) in
                      enumerate(zip(inputs, rows.labels, strict=True))}  # fmt: skip
        self.wrong, self.asked, self.value = wrong, 0, 1.0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(features), 3)
        for row, x in enumerate(features):
            label, number = self.known.get(tuple(x.tolist()), (0, 10**6))
            self.asked += number == 0
            logits[row, (label + (number < self.wrong)) % 3] = self.value
        return logits


def test_every_crossing_has_its_exact_step_and_levels_are_looked_for_once(tiny: Any) -> None:
    model = Wrong(tiny.forget)
    watch = Trajectory(model, tiny)
    wrong = {5: 1, 7: 2, 9: 5, 10: 3, 12: 6, 13: 8, 14: 2}
    for step in range(1, 31):
        model.wrong = wrong.get(step, model.wrong)
        model.asked = 0
        watch(model, step)
        assert bool(model.asked) == (step <= 13 or is_mark(step))
    found = watch.found(30, model)
    steps = [point["step"] for point in found]
    assert steps == [0, 1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 16, 23, 30]
    shares = {point["step"]: 1 - point["acc_forget"] for point in found}
    assert (shares[7], shares[9], shares[12], shares[13]) == (0.25, 0.625, 0.75, 1.0)
    assert found[-1].keys() == {"step", "acc_forget", "acc_retain", "acc_test"}


def test_a_large_forget_set_is_only_looked_at_on_the_marks(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert WATCHED == 1024
    monkeypatch.setattr("unsc_plugin._curves.WATCHED", 7)
    model = Wrong(tiny.forget)
    watch = Trajectory(model, tiny)
    for step in range(1, 9):
        model.wrong, model.asked = step, 0
        watch(model, step)
        assert bool(model.asked) == is_mark(step)
    assert [point["step"] for point in watch.found(8, model)] == [0, 1, 2, 3, 4, 6, 8]


def test_points_that_are_not_finite_are_left_out(tiny: Any) -> None:
    model = Wrong(tiny.forget)
    watch = Trajectory(model, tiny)
    for step, value in ((1, 1.0), (2, float("nan")), (3, float("inf")), (4, 1.0)):
        model.value = value
        watch(model, step)
    assert [point["step"] for point in watch.found(4, model)] == [0, 1, 4]
    model.value = float("nan")
    assert [point["step"] for point in watch.found(5, model)] == [0, 1, 4]
    assert [point["step"] for point in watch.found(5, None)] == [0, 1, 4]


def test_steps_of_the_preparation_and_other_modules_are_not_the_run(tiny: Any) -> None:
    model = Wrong(tiny.forget)
    watch = Trajectory(model, tiny)
    model.wrong = 8
    for step in (1, 2, 3):
        watch(model, step)
    model.wrong = 0
    for step in (1, 2):
        watch(model, step)
    watch(nn.Linear(2, 2), 3)
    found = watch.found(2, model)
    assert [(point["step"], point["acc_forget"]) for point in found] == [(0, 1), (1, 1), (2, 1)]
    model.wrong = 8
    for step in (1, 2, 3):
        watch(model, step)
    model.wrong = 4  # what is evaluated is another model than that of the last step
    assert [point["step"] for point in watch.found(0, model)] == [0, 0]


def test_a_preparation_of_one_step_is_not_the_run(tiny: Any) -> None:
    model = Wrong(tiny.forget, wrong=0)
    watch = Trajectory(model, tiny)
    for wrong in (8, 0):
        model.wrong = wrong
        watch(model, 1)
    assert [point["acc_forget"] for point in watch.found(1, model)] == [1, 1]


def test_the_start_counts_if_it_is_there_already(tiny: Any) -> None:
    model = Wrong(tiny.forget, wrong=8)
    watch = Trajectory(model, tiny)
    model.asked = 0
    watch(model, 5)  # nothing is left to look for
    assert model.asked == 0
    assert [point["step"] for point in watch.found(5, model)] == [0, 5]


# --------------------------------------------------------------------------- a run that is watched


@pytest.mark.parametrize("kind", ["mlp", "normed"])
def test_watching_moves_no_bit(
    kind: str, tiny: Any, make_task: Callable[..., UnlearningTask], request: Any
) -> None:
    model = request.getfixturevalue(kind)()
    base = made("trains", trains).create("trains")
    plain = base.unlearn(model, make_task(), 3)
    watch = Trajectory(model, tiny)
    seen = base.unlearn(model, make_task(observer=watch), 3)
    assert state_sha256(plain.model) == state_sha256(seen.model)
    assert (plain.losses, plain.work, plain.steps) == (seen.losses, seen.work, seen.steps)
    assert plain.stats == seen.stats
    assert plain.steps >= 4
    assert {0, 1, 2, 3, 4} <= {point["step"] for point in watch.found(plain.steps, seen.model)}


def trains(model: nn.Module, task: UnlearningTask) -> nn.Module:
    draws = []

    def loss(m: nn.Module, batch: Any) -> torch.Tensor:
        draws.append(float(torch.rand(1)))  # dropout and all draws go on as if nobody looked
        return -engine.cross_entropy(m, batch)

    stage = engine.Stage(task.loader("forget"), loss)
    engine.fit(model, task, [stage], epochs=5, lr=0.2)
    task.stats["draws"] = draws
    return model


@pytest.mark.parametrize("name", ["finetune", "random_label"])
def test_a_record_with_a_trajectory_is_else_the_same(name: str, cache: Path) -> None:
    found = {}
    for spec in (SPEC, WATCHING):
        base = setting(cache, "random:20", evaluation_spec=spec)
        found[spec.trajectory] = run.run_unit(base, unit(name), catch=False).record
    plain, seen = found[False], found[True]
    assert plain.hashes == seen.hashes
    for one in (plain, seen):
        one.metrics.pop("mubench.unlearn_time")
        for time in TIMES:
            one.cost.pop(time, None)
    assert (plain.metrics, plain.cost, plain.stats) == (seen.metrics, seen.cost, seen.stats)
    assert plain.curves == {}
    points = seen.curves["trajectory"]
    assert seen.curves["k"] == 20
    assert points[0]["step"] == 0
    last = {"step": seen.cost["steps"]}
    for key in ("acc_forget", "acc_retain", "acc_test"):
        last[key] = seen.metrics[key]
    assert points[-1] == last
    assert len(points) > 5
    assert "--trajectory" in seen.command
    assert "--trajectory" not in plain.command


@pytest.mark.parametrize("name", ["retrain", "original", "noise"])
def test_references_and_controls_have_only_their_ends(name: str, cache: Path) -> None:
    base = setting(cache, "random:20", evaluation_spec=WATCHING, with_reference=False)
    found = run.run_unit(base, unit(name), catch=False).record
    ends = [point["step"] for point in found.curves["trajectory"]]
    assert ends == ([0] if name == "original" else [0, found.cost["steps"]])
    assert found.curves["trajectory"][-1]["acc_test"] == found.metrics["acc_test"]


def test_a_control_that_trains_is_not_watched_either(cache: Path) -> None:
    names = made("trains", trains)
    base = setting(cache, "random:20", names, evaluation_spec=WATCHING, with_reference=False)
    watched = run.run_unit(base, unit("trains"), catch=False).record
    names.method_class("trains").control = True
    control = run.run_unit(base, unit("trains"), catch=False).record
    assert len(watched.curves["trajectory"]) > 2
    assert [p["step"] for p in control.curves["trajectory"]] == [0, watched.cost["steps"]]
    assert watched.hashes == control.hashes


def test_class_wise_the_test_accuracy_of_kept_classes_is_there_too(cache: Path) -> None:
    base = setting(cache, "class:3", evaluation_spec=WATCHING, with_reference=False)
    found = run.run_unit(base, unit("finetune", epochs=1), catch=False).record
    last = found.curves["trajectory"][-1]
    assert last["acc_test_retained"] == found.metrics["acc_test_retained"]
    assert last["acc_test"] == found.metrics["acc_test"]


def test_a_diverged_run_keeps_the_points_before(cache: Path) -> None:
    base = setting(cache, "random:20", evaluation_spec=WATCHING, with_reference=False)
    found = run.run_unit(base, unit("neggrad", lr=1e30, passes=3), catch=False).record
    assert (found.status, found.metrics) == ("diverged", {})
    assert [point["step"] for point in found.curves["trajectory"]][:1] == [0]
    assert found.curves["k"] == 20


# --------------------------------------------------------------------------- older boards


def test_an_evaluation_without_trajectory_is_written_as_before() -> None:
    plain, watching = EvaluationSpec(), EvaluationSpec(trajectory=True)
    assert "trajectory" not in plain.model_dump(mode="json")
    assert watching.model_dump(mode="json")["trajectory"] is True
    assert fingerprint(plain) != fingerprint(watching)
    assert EvaluationSpec.model_validate_json(watching.model_dump_json()) == watching
    spec = read_yaml(Path("benchmarks/digits-random/board.yaml")).validate(BoardSpec)
    assert "trajectory" not in str(spec.model_dump())


@pytest.mark.parametrize(
    "name", ["digits-class", "digits-random", "fashion_mnist-class", "trec-class"]
)
def test_committed_boards_come_out_byte_for_byte(name: str) -> None:
    opened = bench.open_board(f"benchmarks/{name}")
    built = bench.build(opened)
    assert bench.stale(opened, built) == []
    assert {path.name for path in bench.files(opened, built)} == {"LEADERBOARD.md", "plot.svg"}
    wanted = bench.jobs(opened)
    assert bench.split_done(opened, wanted)[0] == []


# --------------------------------------------------------------------------- the board

ONE = ScenarioSummary("digits-16", "instance", "sixteen instances")
SMALL = {"scenarios": (ONE,), "train_seeds": 2, "draws": 1, "bootstrap": 100}


def trajectory(*points: tuple[int, float, float]) -> dict[str, Any]:
    """Return curves of (step, acc_forget, acc_test) with retained accuracy a point above test."""
    return {
        "k": 4,
        "trajectory": [
            {"step": s, "acc_forget": f, "acc_retain": t + 0.01, "acc_test": t}
            for s, f, t in points
        ],
    }


START = (0, 1.0, 0.9)
CURVES: dict[str, list[dict[str, Any]]] = {
    "retrain": [trajectory(START, (9, 0.75, 0.95))] * 2,
    "original": [trajectory(START)] * 2,
    # 100 %: .80 and .70; 50 %: .84 and .82
    "best": [
        trajectory(START, (2, 0.5, 0.84), (3, 0.0, 0.80), (5, 0.0, 0.10)),
        trajectory(START, (4, 0.25, 0.82), (8, 0.0, 0.70)),
    ],
    # 100 %: .79 and .68, always a little less than the best; 50 %: .86 and .84
    "close": [
        trajectory(START, (1, 0.5, 0.86), (2, 0.0, 0.79)),
        trajectory(START, (1, 0.5, 0.84), (2, 0.0, 0.68)),
    ],
    # one seed ends at 3/4, with the highest accuracy of all
    "half": [
        trajectory(START, (1, 0.0, 0.99)),
        trajectory(START, (1, 0.5, 0.98), (7, 0.25, 0.97)),
    ],
}
NEEDS = {"best": ["forget", "retain"], "close": ["forget"], "half": ["forget"]}


def matched_records(**changes: Any) -> list[Record]:
    return [
        record(e, ONE, s, 0, curves=curves, needs=NEEDS.get(e, []), **changes)
        for e, units in CURVES.items()
        for s, curves in enumerate(units)
    ]


@pytest.fixture(scope="module")
def built() -> Any:
    return build(matched_records(), board(**SMALL))


def test_the_table_at_full_forgetting_by_hand(built: Any) -> None:
    assert built.ok
    found, rows = sheet(built, "At equal forgetting, 100 %")
    assert [row[1] for row in found.rows] == [
        "retrain, reference", "original, control", "best", "close", "half",
    ]  # fmt: skip
    assert [rows[e]["rank"] for e in rows] == ["–", "–", "1", "2", "–"]
    assert [rows[e]["rank, forget-only"] for e in rows] == ["–", "–", "–", "1", "–"]
    assert [rows[e]["units there"] for e in rows] == ["0 of 2"] * 2 + ["2 of 2"] * 2 + ["1 of 2"]
    assert rows["best"]["forgot"] == "4/4 (100 %)"
    assert rows["best"]["steps"] == "5.5"  # 3 and 8: the first step there, not the last
    # t(.975, 1) = 12.706: the half-width of .80, .70 is 12.706 · .0707 / √2 = .6353
    assert rows["best"]["acc_test %"] == "75.0 ± 63.5"
    assert rows["best"]["acc_retain %"] == "76.0 ± 63.5"
    assert rows["close"]["acc_test %"] == "73.5 ± 69.9"
    last = [column.label for column in found.columns][-1]
    assert rows["best"][last] == "leader"
    # −1 and −2 points: −1.5 ± 12.706 · .7071 / √2 = 6.353
    assert rows["close"][last] == "−1.5 [−7.9, +4.9], ties with the leader"
    assert rows["half"][last] == "1 of 2 reached, forgot 88 %"
    assert rows["half"]["forgot"] == "3.5/4 (88 %)"
    assert rows["half"]["acc_test %"] == "98.0 ± 12.7"
    assert rows["retrain"]["forgot"] == "1/4 (25 %)"
    assert "disagree by design" in found.text[1]
    assert found.image is not None


def test_the_levels_side_by_side_by_hand(built: Any) -> None:
    found, rows = sheet(built, "Test accuracy per forgotten share")
    assert list(rows) == ["best", "close", "half"]
    cells = {entry: list(row.values())[2:] for entry, row in rows.items()}
    assert cells["best"] == ["83.0 ± 12.7 (3)", "83.0 ± 12.7 (3)", "81.0 ± 12.7 (2)",
                             "75.0 ± 63.5 (1)"]  # fmt: skip
    assert cells["close"][:2] == ["85.0 ± 12.7 (2)"] * 2
    assert cells["half"] == ["98.5 ± 6.4 (1)"] * 2 + ["98.0 ± 12.7 (1)", "1 of 2 there"]
    assert len(found.columns) == 6


def test_a_clear_difference_is_no_tie() -> None:
    worse = (0.60, 0.5001)  # 20 points below the leader in both seeds
    records = [
        one.model_copy(update={"curves": trajectory(START, (2, 0.0, worse[one.unit.train_seed]))})
        if one.entry == "close"
        else one
        for one in matched_records()
    ]
    _, rows = sheet(build(records, board(**SMALL)), "At equal forgetting, 100 %")
    assert list(rows["close"].values())[-1].startswith("−20.00 [")
    assert "ties" not in list(rows["close"].values())[-1]


def test_a_run_that_diverged_is_not_there_but_is_told() -> None:
    lost = {"status": "diverged", "reason": "on purpose", "metrics": {}}
    records = [
        one.model_copy(update=lost) if one.entry == "best" and one.unit.train_seed == 0 else one
        for one in matched_records()
    ]
    _, rows = sheet(build(records, board(**SMALL)), "At equal forgetting, 100 %")
    assert list(rows)[2] == "close"
    assert (rows["best"]["rank"], rows["close"]["rank"]) == ("–", "1")
    told = "1 of 2 reached, forgot 100 %, 1 diverged (1 of them after they were there)"
    assert list(rows["best"].values())[-1] == told


def test_entries_that_cannot_be_compared_and_failing_boards_have_no_rank() -> None:
    foreign = [
        one.model_copy(update={"hashes": {"forget": "other"}}) if one.entry == "best" else one
        for one in matched_records()
    ]
    _, rows = sheet(build(foreign, board(**SMALL)), "At equal forgetting, 100 %")
    assert (rows["best"]["rank"], rows["close"]["rank"]) == ("–", "1")
    assert "forget set is not that of retrain" in list(rows["best"].values())[-1]
    alone = [one for one in matched_records() if one.entry != "original"]
    failing = build(alone, board(**SMALL))
    assert not failing.ok
    _, rows = sheet(failing, "At equal forgetting, 100 %")
    assert {row["rank"] for row in rows.values()} == {"–"}


def test_a_control_is_shown_where_it_ends() -> None:
    curves = trajectory(START, (1, 0.0, 0.99), (2, 0.5, 0.6))
    noise = [record("noise", ONE, s, 0, curves=curves) for s in (0, 1)]
    _, rows = sheet(build([*matched_records(), *noise], board(**SMALL)), "At equal forgetting")
    assert rows["noise"]["forgot"] == "2/4 (50 %)"
    assert rows["noise"]["acc_test %"].startswith("60.0")
    assert rows["noise"]["rank"] == "–"
    assert rows["best"]["rank"] == "1"


def test_one_seed_gives_no_interval_and_no_tie() -> None:
    records = [one for one in matched_records() if one.unit.train_seed == 0]
    _, rows = sheet(build(records, board(**{**SMALL, "train_seeds": 1})), "At equal forgetting")
    assert rows["half"]["rank"] == "1"
    assert list(rows["best"].values())[-1] == "−19.00"
    assert rows["best"]["acc_test %"] == "80.00"


def test_draws_are_averaged_before_seeds() -> None:
    records = [
        record(e, ONE, s, d, curves=trajectory(START, (1, 0.0, 0.5 + 0.1 * s + 0.2 * d)))
        for e in ("retrain", "original", "best")
        for s in (0, 1)
        for d in (0, 1)
    ]
    _, rows = sheet(build(records, board(**{**SMALL, "draws": 2})), "At equal forgetting")
    assert rows["best"]["units there"] == "4 of 4"
    assert rows["best"]["acc_test %"] == "65.0 ± 63.5"  # seeds .6 and .7


def test_class_wise_the_kept_classes_are_compared() -> None:
    scenario = ScenarioSummary("digits-3", "class")
    curves = trajectory(START, (1, 0.0, 0.5))
    for point in curves["trajectory"]:
        point["acc_test_retained"] = 0.7
    records = [
        record(e, scenario, s, 0, curves=curves) for e in ("retrain", "best") for s in (0, 1)
    ]
    found = build(records, board(**{**SMALL, "scenarios": (scenario,)}))
    _, rows = sheet(found, "At equal forgetting")
    assert rows["best"]["acc_test %"] == "70.00 ± 0.00"


def test_bytes_do_not_depend_on_the_order_of_records(built: Any) -> None:
    again = build(matched_records()[::-1], board(**SMALL))
    assert again.markdown() == built.markdown()
    assert again.plots() == built.plots()


# --------------------------------------------------------------------------- the plot


def test_the_plot_has_one_line_per_entry(built: Any) -> None:
    plots = built.plots()
    assert list(plots) == ["matched.svg"]
    tree = ElementTree.fromstring(plots["matched.svg"])
    lines = [e.get("points", "") for e in tree.iter() if e.tag.endswith("polyline")]
    # best: start, 25 = 50 %, 75 %, 100 %; close: start, 25 = 50 %, 75 = 100 %; half: start,
    # 25 = 50 %, 75 % = the end
    assert sorted(len(line.split()) for line in lines) == [3, 3, 4]
    legend = {e.text for e in tree if e.tag.endswith("text")}
    assert {"best", "close", "half", "retrain", "original"} <= legend
    classes = [e.get("class") for e in tree.iter()]
    assert classes.count("retrain") == classes.count("original") == 2  # in the panel, the legend
    assert "](matched.svg)" in built.markdown()


def test_many_entries_and_scenarios_stay_on_the_page() -> None:
    scenarios = tuple(ScenarioSummary(f"s{i}", "instance") for i in range(4))
    names = ["retrain", "original", *(f"a_rather_long_name.preset_{i}" for i in range(14))]
    records = [
        record(e, sc, s, 0, curves=trajectory(START, (2, 0.5, 0.8), (4, 0.0, 0.3 + 0.03 * i)))
        for i, e in enumerate(names)
        for sc in scenarios
        for s in (0, 1)
    ]
    found = build(records, board(**{**SMALL, "scenarios": scenarios}))
    tree = ElementTree.fromstring(found.plots()["matched.svg"])
    panels = [e for e in tree if e.tag.endswith("}g")]
    assert len(panels) == 4
    assert all(len([e for e in p if e.tag.endswith("polyline")]) == 10 for p in panels)
    width, height = float(tree.get("width", 0)), float(tree.get("height", 0))
    texts = [e for e in tree.iter() if e.tag.endswith("text") and e.get("x")]
    assert all(0 < float(e.get("y", 0)) < height for e in texts)
    legend = [e for e in tree if e.tag.endswith("text")][2:]
    boxes = [(float(e.get("x", 0)), float(e.get("y", 0)), 6.9 * len(e.text or "")) for e in legend]
    assert {e.text for e in legend} >= {f"a_rather_long_name.preset_{i}" for i in range(4, 14)}
    assert all(x + wide < width for x, _, wide in boxes)
    for i, (x, y, wide) in enumerate(boxes):
        assert all(abs(y - b) >= 14 or x + wide <= a or a + w <= x for a, b, w in boxes[:i])


@pytest.mark.parametrize(
    ("values", "limits"),
    [([42.0, 97.0], (40, 100)), ([97.0, 98.5], (95, 100)), ([0.0, 1.0], (0, 5)), ([], (0, 100)),
     ([100.0], (95, 100)), ([60.2, 61.0], (60, 65)), ([0.0, 100.0], (0, 100))],
)  # fmt: skip
def test_an_axis_holds_its_values_on_round_limits(
    values: list[float], limits: tuple[int, int]
) -> None:
    axis = percent_axis("y", values)
    assert (axis.low, axis.high) == limits
    assert axis.ticks[0] == axis.low
    assert axis.ticks[-1] == axis.high
    assert 2 <= len(axis.ticks) <= 8


# --------------------------------------------------------------------------- the command line


def test_the_command_line_shows_when_what_was_forgotten(tmp_path: Path, cache: Path) -> None:
    words = ("--model", "tiny-digits", "--data", "digits", "--forget", "random:12", "--recipe",
             "epochs=2", "--reference", "none", "--metrics", "core", "--cache", cache,
             "--device", "cpu", "--quiet", "--trajectory")  # fmt: skip
    strong = ("--set", "lr=0.02", "--set", "passes=4")
    done = unsc("run", "neggrad", *words, *strong, "--out", tmp_path / "one")
    assert done.code == 0, done.err
    points = read(tmp_path / "one" / "record.json").curves["trajectory"]
    text = " ".join(done.out.split())
    crossed = next(p for p in points if 1 - p["acc_forget"] >= 0.25)
    kept = f"retain {crossed['acc_retain']:.4f}, test {crossed['acc_test']:.4f}"
    assert f"forgotten: 25 % at step {crossed['step']} ({kept})" in text
    again = unsc("run", "neggrad", *words, *strong, "--out", tmp_path / "one", "--resume")
    assert again.code == 0
    other = unsc("run", "neggrad", *words[:-1], *strong, "--out", tmp_path / "one", "--resume")
    assert other.code != 0
    assert "evaluation" in other.err


def test_an_experiment_file_says_itself_whether_to_watch(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("method: finetune\ndata: digits\nmodel: tiny-digits\nforget: random:12\n")
    done = unsc("run", "--spec", path, "--trajectory", "--dry-run")
    assert done.code == 2
    assert "--trajectory" in done.err
