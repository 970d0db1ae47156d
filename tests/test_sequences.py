"""A sequence of requests: served one after the other, every earlier one looked at again."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import unsc
from test_leaderboard import board, record
from test_run import made, setting, unit
from torch import nn

from unsc_plugin import engine, registry, run
from unsc_plugin._curves import Rounds, distance
from unsc_plugin.errors import DivergedError
from unsc_plugin.leaderboard import ScenarioSummary, build
from unsc_plugin.method import Past, UnlearningTask
from unsc_plugin.record import Record, dumps, read
from unsc_plugin.runtime import state_sha256
from unsc_plugin.spec import derive

SEQUENCE = "sequence:random:20x3"
DIVERGED = {"status": "diverged", "reason": "on purpose", "metrics": {}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share, so that originals and references are trained once."""
    return tmp_path_factory.mktemp("models")


def ascends(model: nn.Module, task: UnlearningTask) -> nn.Module:
    """Forget this request alone, from the model before the first: earlier ones may return."""
    assert task.first_model is not None
    model.load_state_dict(task.first_model.state_dict())
    model.eval()
    for batch in task.loader("forget", train=False):
        p = model(**batch.inputs).softmax(1).gather(1, batch.labels[:, None])
        gradients = torch.autograd.grad(p.mean(), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 2 * gradient / (gradient.norm() + 1e-12)
    task.stats["status"] = "reached"
    return model


# --------------------------------------------------------------------------- the driver


def test_the_rounds_are_a_direct_recount_of_the_models(cache: Path) -> None:
    base = setting(cache, SEQUENCE, made("ascends", ascends))
    found = run.run_unit(base, unit("ascends"), catch=False).record
    chosen, request = base.registry.create("ascends"), base.request(0)
    first = base.original(0).load_into(base.build(0))
    model, own, seed = first, [], derive(7, "unlearn", 0, 0)
    for number, (step, kept) in enumerate(zip(request.steps, found.curves["rounds"], strict=True)):
        before = model
        seed_now = derive(seed, "request", number) if number else seed
        model = chosen.unlearn(model, base.task(step, None, first_model=first), seed_now).model
        answers = [wrong(model, base, one.forget) for one in request.steps[: number + 1]]
        own.append(answers[-1])
        back = [was & ~now for was, now in zip(own, answers, strict=True)]
        assert kept["at_goal"] == [int(now.sum()) for now in answers]
        assert kept["acc_forget"] == [float((~now).mean()) for now in answers]
        assert kept["came_back"] == sum(int(mask.sum()) for mask in back)
        frame = base.frame(0)
        assert kept["acc_retain"] == share_right(model, frame.retain_eval)
        assert kept["acc_test"] == share_right(model, frame.test)
        assert kept["distance_previous"] == pytest.approx(flat_distance(model, before), rel=1e-6)
        assert kept["distance_first"] == pytest.approx(flat_distance(model, first), rel=1e-6)
        assert kept["kl_test"] == pytest.approx(kl(first, model, frame.test), rel=1e-5)
        assert (kept["request"], kept["k"], kept["status"]) == (number, 20, "reached")
    assert kept["came_back"] > 0
    assert kept["came_back_index"] == [
        base.splits.train.index[step.forget][mask].tolist()
        for step, mask in zip(request.steps[:-1], back[:-1], strict=True)
    ]
    assert "came_back_index" not in found.curves["rounds"][1]
    assert found.metrics["acc_retain"] == kept["acc_retain"]
    assert found.hashes["unlearned"] == state_sha256(model)
    assert Record.model_validate(json.loads(dumps(found))) == found


def wrong(model: nn.Module, base: run.Setting, positions: np.ndarray) -> np.ndarray:
    rows = base.splits.train.subset(positions)
    return (engine.predict(model, rows).logits.argmax(1) != rows.labels).numpy()


def share_right(model: nn.Module, rows: Any) -> float:
    return float((engine.predict(model, rows).logits.argmax(1) == rows.labels).double().mean())


def flat_distance(one: nn.Module, other: nn.Module) -> float:
    flat = [nn.utils.parameters_to_vector(model.parameters()).detach() for model in (one, other)]
    return float((flat[0] - flat[1]).norm())


def kl(first: nn.Module, model: nn.Module, rows: Any) -> float:
    p, q = (engine.predict(one, rows).logits.double().log_softmax(1) for one in (first, model))
    return float((p.exp() * (p - q)).sum(1).mean() / np.log(2))


@pytest.mark.parametrize("name", ["finetune", "random_label", "retrain"])
def test_a_sequence_of_one_is_the_single_request(name: str, cache: Path) -> None:
    base = setting(cache, "sequence:random:20x1", with_reference=False)
    found = run.run_unit(base, unit(name), catch=False)
    original = base.original(0).load_into(base.build(0))
    role = "retrain" if name == "retrain" else "unlearn"
    task = base.task(base.request(0).steps[0], None)
    alone = registry.create(name).unlearn(original, task, derive(7, role, 0, 0))
    assert found.record.hashes["unlearned"] == state_sha256(alone.model)
    assert found.record.cost["steps"] == alone.steps
    [round_] = found.record.curves["rounds"]
    assert (round_["came_back"], round_["came_back_index"]) == (0, [])
    assert round_["distance_previous"] == round_["distance_first"]


def test_a_request_knows_the_first_model_and_those_before_it(cache: Path) -> None:
    seen: list[tuple[int, str, list[list[int]], list[Any]]] = []

    def body(model: nn.Module, task: UnlearningTask) -> nn.Module:
        task.stats["note"] = task.round
        task.targets = torch.full((task.size("forget"),), task.round, dtype=torch.int64)
        assert task.first_model is not None
        past = task.history()
        notes = [(one.stats["note"], one.targets.tolist()) for one in past]
        rows = [one.rows.index.tolist() for one in past]
        seen.append((task.round, state_sha256(task.first_model), rows, notes))
        with torch.no_grad():
            next(model.parameters()).add_(0.01)
        return model

    base = setting(cache, SEQUENCE, made("remembers", body), with_reference=False)
    run.run_unit(base, unit("remembers"), catch=False)
    index = [base.splits.train.index[step.forget].tolist() for step in base.request(0).steps]
    assert [one[0] for one in seen] == [0, 1, 2]
    assert {one[1] for one in seen} == {base.original(0).meta["sha256"]}
    assert [one[2] for one in seen] == [[], index[:1], index[:2]]
    assert seen[2][3] == [(0, [0] * 20), (1, [1] * 20)]


def test_a_correction_is_at_its_goal_where_the_asked_label_is_given(cache: Path) -> None:
    def body(model: nn.Module, task: UnlearningTask) -> nn.Module:
        task.targets = (task.samples("forget")[1] + 1) % 10
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            list(model.parameters())[-1][3] = 1.0  # answers 3 whatever comes
        return model

    base = setting(cache, "sequence:random:20x2", made("relabels", body), with_reference=False)
    found = run.run_unit(base, unit("relabels"), catch=False).record
    labels = [base.splits.train.labels[step.forget] for step in base.request(0).steps]
    asked = [int((one == 2).sum()) for one in labels]
    assert sum(asked) > 0
    assert found.curves["rounds"][-1]["at_goal"] == asked
    assert found.curves["rounds"][-1]["acc_forget"] == [
        float((one == 3).double().mean()) for one in labels
    ]


def stops_at(request: int, how: str) -> Callable[[nn.Module, UnlearningTask], nn.Module]:
    def body(model: nn.Module, task: UnlearningTask) -> nn.Module:
        if task.round == request:
            if how == "raises":
                raise DivergedError("on purpose")
            if how == "says":
                task.stats["status"] = "diverged"
            else:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.fill_(1e30)
        return model

    return body


@pytest.mark.parametrize(
    ("how", "reason"),
    [("raises", "on purpose"), ("says", "request 1"), ("spoils", "logit is not finite")],
)
def test_a_diverged_request_ends_the_sequence_and_its_rounds_stay(
    how: str, reason: str, cache: Path
) -> None:
    base = setting(cache, SEQUENCE, made("stops", stops_at(1, how)), with_reference=False)
    found = run.run_unit(base, unit("stops"), catch=False).record
    assert (found.status, found.metrics) == ("diverged", {})
    assert reason in str(found.reason)
    good, bad = found.curves["rounds"]
    assert good["status"] == "ok"
    assert len(good["at_goal"]) == 1
    assert good["came_back_index"] == []
    assert bad.keys() == {"request", "k", "status", "steps", "seconds"}
    assert bad["status"] == "diverged"
    assert Record.model_validate(json.loads(dumps(found))) == found


def test_logits_that_break_only_on_the_frame_keep_the_curves(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = setting(cache, SEQUENCE, with_reference=False)

    def breaks(*_: Any, **__: Any) -> None:
        raise DivergedError("a logit on test is not finite")

    monkeypatch.setattr(run.evaluation, "observe", breaks)
    found = run.run_unit(base, unit("original")).record
    assert (found.status, found.reason) == ("diverged", "a logit on test is not finite")
    assert len(found.curves["rounds"]) == 3


def test_numbers_that_are_not_finite_are_left_out(
    mlp: Callable[..., nn.Module], make_rows: Callable[..., Any]
) -> None:
    rows, first = make_rows(12), mlp()
    frame = SimpleNamespace(retain_eval=rows, test=rows)
    rounds = Rounds(first, rows, frame)
    result = SimpleNamespace(
        status="ok", reason=None, stats={}, targets=None, model=mlp(1), steps=0,
        seconds_prepare=0.0, seconds_unlearn=0.0,
    )  # fmt: skip
    with torch.no_grad():
        first.head.bias[0] = np.inf  # what it says of the test rows is no distribution
    rounds = Rounds(first, rows, frame)
    assert rounds.close(result, mlp(), [0, 1]) is result
    [found] = rounds.found()
    assert found.keys().isdisjoint({"kl_test", "distance_first"})
    assert found["distance_previous"] > 0
    assert isinstance(rounds.past[0], Past)


def test_the_distance_counts_shared_parameters_once(mlp: Callable[..., nn.Module]) -> None:
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    pair = [nn.Sequential(layer, nn.Tanh(), layer) for layer in (one, other)]
    apart = float((one.weight - other.weight).detach().double().norm())
    assert distance(*pair) == pytest.approx(apart, rel=1e-12)
    assert distance(mlp(3), mlp(3)) == 0.0


def test_old_records_have_no_curves_and_are_written_as_they_were() -> None:
    kept = sorted(Path("benchmarks/digits-random/results").glob("*.json"))[0]
    old = read(kept)
    assert old.curves == {}
    assert dumps(old) == kept.read_text(encoding="utf-8")
    assert "curves" in dumps(old.model_copy(update={"curves": {"rounds": []}}))


# --------------------------------------------------------------------------- the board

SEQ = ScenarioSummary("digits-seq", "sequence", "three requests")
SMALL = {"scenarios": (SEQ,), "train_seeds": 2, "draws": 1, "bootstrap": 100}


def rounds_of(counts: list[list[int]], back: int, test: list[float], status: str) -> Any:
    rounds = []
    for t, (row, accuracy) in enumerate(zip(counts, test, strict=True)):
        rounds.append(
            {
                "request": t, "k": 4, "status": status, "steps": 5, "seconds": 1.0, "at_goal": row,
                "came_back": back if t == len(counts) - 1 else 0,
                "acc_forget": [1 - c / 4 for c in row], "acc_retain": accuracy,
                "acc_test": accuracy, "kl_test": 0.5, "distance_previous": 1.0,
                "distance_first": 2.0,
            }
        )  # fmt: skip
    return {"rounds": rounds}


FULL = [[4], [4, 4], [4, 4, 4]]
LOST = [[4], [3, 4], [1, 2, 4]]
CURVES: dict[str, list[Any]] = {
    "retrain": [rounds_of([[1], [1, 0], [1, 0, 0]], 0, [0.9, 0.9, 0.9], "ok")] * 2,
    "original": [rounds_of([[0], [0, 0], [0, 0, 0]], 0, [0.9, 0.9, 0.9], "ok")] * 2,
    "keeps": [
        rounds_of(FULL, 0, [0.8, 0.7, 0.6], "reached"),
        rounds_of(FULL, 0, [0.8, 0.7, 0.5], "reached"),
    ],
    "loses": [
        rounds_of(LOST, 5, [0.9, 0.9, 0.9], "reached"),
        rounds_of(FULL, 0, [0.9, 0.9, 0.8], "cap"),
    ],
    "ends": [
        rounds_of(FULL, 0, [0.9, 0.9, 0.9], "ok"),
        {
            "rounds": [
                *rounds_of(FULL[:1], 0, [0.9], "ok")["rounds"],
                {"request": 1, "k": 4, "status": "diverged", "steps": 1, "seconds": 1.0},
            ]
        },
    ],
}


def sequence_records() -> list[Record]:
    found = []
    for entry, units in CURVES.items():
        for s, curves in enumerate(units):
            lost = DIVERGED if "diverged" in str(curves) else {}
            found.append(record(entry, SEQ, s, 0, curves=curves, **lost))
    return found


@pytest.fixture(scope="module")
def drifted() -> Any:
    return build(sequence_records(), board(**SMALL))


def sheet(built: Any, start: str) -> tuple[Any, dict[str, dict[str, str]]]:
    found = next(one for one in built.sheets if one.title.startswith(start))
    labels = [column.label for column in found.columns]
    rows = [dict(zip(labels, row, strict=True)) for row in found.rows]
    return found, {row["entry"].split(",")[0]: row for row in rows}


def test_the_drift_sheet_says_who_kept_earlier_sets_forgotten(drifted: Any) -> None:
    found, rows = sheet(drifted, "Drift")
    assert [row[0] for row in found.rows] == [
        "retrain, reference", "original, control", "keeps", "ends", "loses",
    ]  # fmt: skip
    assert rows["keeps"]["reached"] == "yes"
    assert rows["keeps"]["earlier at goal"] == "8/8 (100 %)"
    assert rows["keeps"]["acc_test %"] == "80.0 → 55.0"
    assert rows["keeps"]["requests by status"] == "6 reached"
    assert rows["loses"]["reached"] == "no: earlier sets came back"
    assert rows["loses"]["earlier at goal"] == "5.5/8 (69 %)"
    assert rows["loses"]["all at goal"] == "9.5/12 (79 %)"
    assert rows["loses"]["came back"] == "2.5"
    assert rows["loses"]["at goal per request"] == "2.5 3 4"
    assert rows["loses"]["requests by status"] == "3 reached, 3 cap"
    assert rows["ends"]["reached"] == "no: 1 diverged"
    assert rows["ends"]["units"] == "1 of 2"
    assert rows["ends"]["requests by status"] == "4 ok, 1 diverged, 1 not served"
    assert (rows["retrain"]["KL_test bits"], rows["retrain"]["‖θ − θ_first‖"]) == ("0.500", "2")


def test_the_drift_plot_has_one_line_per_entry_and_panel(drifted: Any) -> None:
    plots = drifted.plots()
    assert list(plots) == ["drift.svg"]
    tree = ElementTree.fromstring(plots["drift.svg"])
    groups = [one for one in tree if one.tag.endswith("}g")]
    assert len(groups) == 2
    counts = [len([e for e in group if e.tag.endswith("polyline")]) for group in groups]
    # of `ends` one unit has no second round: nothing is known of earlier requests in every unit
    assert counts == [4, 5]
    lines = [e.get("points", "").split() for e in groups[1] if e.tag.endswith("polyline")]
    assert sorted(map(len, lines)) == [1, 3, 3, 3, 3]
    legend = [e.text for e in tree if e.tag.endswith("text")]
    assert set(CURVES) <= set(legend)
    assert "![" in drifted.markdown()
    assert "](drift.svg)" in drifted.markdown()


def test_the_lines_are_means_of_what_every_unit_has(drifted: Any) -> None:
    lines = {one.entry: one for one in drifted.standings.drift[0].entries}
    assert lines["loses"].share_line == (None, (3 / 4 + 1) / 2, (3 / 8 + 1) / 2)
    assert lines["loses"].test_line == pytest.approx((0.9, 0.9, 0.85))
    assert lines["ends"].share_line == (None, None, None)
    assert lines["ends"].test_line == (0.9, None, None)


def test_a_sequence_that_served_all_and_then_diverged_is_not_finished() -> None:
    records = [
        one.model_copy(update=DIVERGED) if one.entry == "keeps" and one.unit.train_seed else one
        for one in sequence_records()
    ]
    _, rows = sheet(build(records, board(**SMALL)), "Drift")
    assert rows["keeps"]["units"] == "1 of 2"
    assert rows["keeps"]["reached"] == "no: 1 diverged"
    assert rows["keeps"]["acc_test %"] == "80.0 → 60.0"
    assert rows["keeps"]["requests by status"] == "6 reached"


def test_draws_may_have_sequences_of_different_lengths() -> None:
    curves = [rounds_of(FULL, 0, [0.8, 0.7, 0.6], "ok"), rounds_of(FULL[:2], 0, [0.8, 0.7], "ok")]
    records = [
        record(e, SEQ, s, d, curves=curves[d])
        for e in ("retrain", "keeps")
        for s in (0, 1)
        for d in (0, 1)
        if (e, s, d) != ("keeps", 1, 1)
    ]
    _, rows = sheet(build(records, board(**{**SMALL, "draws": 2})), "Drift")
    assert rows["retrain"]["requests by status"] == "10 ok"
    assert rows["retrain"]["earlier at goal"] == "6/6 (100 %)"
    assert rows["retrain"]["at goal per request"] == "–"
    assert rows["keeps"]["requests by status"] == "8 ok, 2 not served"
    assert rows["keeps"]["reached"] == "no: units without a result"


def test_boards_without_rounds_say_nothing_of_drift() -> None:
    bare = [one.model_copy(update={"curves": {}}) for one in sequence_records()]
    built = build(bare, board(**SMALL))
    assert built.plots() == {}
    assert "Drift" not in built.markdown()
    assert ".svg" not in built.markdown()


def test_a_long_sequence_is_listed_by_its_ends() -> None:
    counts = [[4] * (t + 1) for t in range(20)]
    curves = rounds_of(counts, 0, [0.5] * 20, "ok")
    records = [record(e, SEQ, s, 0, curves=curves) for e in ("retrain", "keeps") for s in (0, 1)]
    built = build(records, board(**SMALL))
    _, rows = sheet(built, "Drift")
    assert rows["keeps"]["at goal per request"] == "4 4 4 4 4 4 … 4 4 4 4 4 4"
    ElementTree.fromstring(built.plots()["drift.svg"])


# --------------------------------------------------------------------------- the command line


def test_the_command_line_shows_the_drift(tmp_path: Path, cache: Path) -> None:
    words = ("--model", "tiny-digits", "--data", "digits", "--forget", "sequence:random:12x2",
             "--recipe", "epochs=2", "--reference", "none", "--metrics", "core", "--cache",
             cache, "--device", "cpu", "--trajectory")  # fmt: skip
    done = unsc("run", "finetune", *words, "--out", tmp_path / "one")
    assert done.code == 0, done.err
    assert "drift over the requests" in done.out
    assert "KL_test" in done.out
    assert "a sequence is measured after each of its own" in done.err
    found = read(tmp_path / "one" / "record.json")
    assert found.curves.keys() == {"rounds"}
    shown = unsc("show", tmp_path / "one")
    rows = [text.split() for text in shown.out.splitlines() if text.startswith((" 1 ", " 2 "))]
    counts = found.curves["rounds"][1]["at_goal"]
    assert [row[:2] for row in rows] == [["1", "ok"], ["2", "ok"]]
    assert rows[1][3:5] == [f"{counts[1]}/12", f"{counts[0]}/12"]
