"""Records: written once, read back equal, refused when they are not whole."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import pytest
from pydantic import ValidationError

from unsc_plugin import record as records
from unsc_plugin.errors import RecordError
from unsc_plugin.record import Record, Unit


def make(**changes: Any) -> Record:
    settings: dict[str, Any] = {
        "entry": "finetune",
        "method": "finetune",
        "scenario": "digits-class",
        "kind": "class",
        "unit": Unit(train_seed=1, draw=0),
        "seed": 12,
        "status": "ok",
        "experiment": {"data": {"name": "digits"}, "forget": [3]},
        "config": {"lr": 0.1, "layers": ["a", "b"]},
        "metrics": {"acc_forget": 0.5},
        "missing": {"gap_relearn": "no pool"},
        "package_version": "0.1.0",
        "command": "unsc run finetune",
        "created": "2025-01-01T00:00:00Z",
    }
    return Record(**(settings | changes))


def test_a_record_comes_back_equal_and_its_text_is_canonical(tmp_path):
    record = make()
    path = records.write(record, tmp_path / "results")
    assert path.name == "finetune--s1d0.json"
    text = path.read_text()
    assert text.endswith("}\n")
    tree = json.loads(text)
    assert list(tree) == sorted(tree)
    assert tree["schema"] == 1
    assert records.read(path) == record


def test_the_scenario_can_stand_in_the_name(tmp_path):
    path = records.write(make(entry="neggrad.diverged"), tmp_path, prefix=True)
    assert path.name == "digits-class--neggrad.diverged--s1d0.json"


def test_a_finished_record_is_never_overwritten_and_leaves_no_temporary_file(tmp_path):
    path = records.write(make(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="never overwritten"):
        records.write(make(metrics={"acc_forget": 0.9}), tmp_path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_many_writers_one_wins(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", _no_links)
    outcomes: list[str] = []
    start = threading.Barrier(8)

    def run(value: float) -> None:
        start.wait()
        try:
            records.write(make(metrics={"acc_forget": value}), tmp_path)
            outcomes.append("won")
        except RecordError:
            outcomes.append("lost")

    threads = [threading.Thread(target=run, args=(i / 8,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 7 + ["won"]
    assert len(records.read_folder(tmp_path)) == 1


def _no_links(*_: Any) -> None:
    raise OSError(95, "not supported")


def test_a_writer_that_dies_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    def die(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        records.write(make(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_leftover_temporary_files_are_no_records(tmp_path):
    records.write(make(), tmp_path)
    (tmp_path / ".record-abc.tmp").write_text("{")
    (tmp_path / ".record-abc.json").write_text("{")
    assert len(records.read_folder(tmp_path)) == 1


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\b", "..", "a..b", "", ".hidden", "a b"])
@pytest.mark.parametrize("field", ["entry", "scenario"])
def test_names_that_leave_the_folder_are_refused(field, name):
    with pytest.raises(ValidationError, match="expected a name"):
        make(**{field: name})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["metrics", "reference", "reference_std", "cost"])
def test_non_finite_numbers_are_refused(field, value):
    with pytest.raises(ValidationError, match="finite"):
        make(**{field: {"js_forget": value}})


def test_non_finite_settings_are_refused_but_stats_keep_them_as_text():
    with pytest.raises(ValidationError, match=r"optimizer\.lr: expected a finite number"):
        make(config={"optimizer": {"lr": float("inf")}})
    assert make(stats={"loss": [1.0, float("inf")]}).stats == {"loss": [1.0, "inf"]}


def test_settings_are_stored_as_json_has_them():
    assert make(config={"betas": (0.9, 0.99)}).config == {"betas": [0.9, 0.99]}
    with pytest.raises(ValidationError, match=r"layers: expected a JSON value, got set"):
        make(config={"layers": {"a"}})
    with pytest.raises(ValidationError, match="expected text keys"):
        make(config={"layers": {1: "a"}})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "failed"}, "expected a reason"),
        ({"reason": "why"}, "expected a reason"),
        ({"status": "diverged", "reason": "inf"}, "expected no metrics for a diverged run"),
        ({"missing": {"acc_forget": "x"}}, "either metrics or missing"),
        ({"created": "2025-01-01T00:00:00"}, "in UTC"),
        ({"created": "yesterday"}, "Invalid isoformat"),
        ({"seed": 1.5}, "valid integer"),
        ({"metrics": {"acc": "0.5"}}, "valid number"),
        ({"kind": "klass"}, "Input should be 'instance'"),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_inconsistent_records_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        make(**changes)


def test_a_record_is_frozen():
    with pytest.raises(ValidationError):
        make().status = "failed"  # type: ignore[misc]


def damaged(change: str) -> str:
    tree = json.loads(records.dumps(make()))
    if change == "unknown key":
        tree["surprise"] = 1
    elif change == "wrong type":
        tree["metrics"]["acc_forget"] = "high"
    elif change == "missing key":
        del tree["command"]
    elif change == "other schema":
        tree["schema"] = 2
    elif change == "no object":
        tree = [1]
    text = json.dumps(tree)
    if change == "truncated":
        return text[: len(text) // 2]
    if change == "constant":
        return text.replace("0.5", "NaN")
    if change == "double key":
        return '{"schema": 1, ' + text[1:]
    return "" if change == "empty" else text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("unknown key", "surprise: Extra inputs"),
        ("wrong type", r"metrics\.acc_forget"),
        ("missing key", "command: Field required"),
        ("other schema", "schema: Input should be 1"),
        ("no object", "valid dictionary"),
        ("truncated", "delete the file and run its unit again"),
        ("constant", "NaN is not a finite number"),
        ("double key", "key 'schema' stands twice"),
        ("empty", "Expecting value"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, change, words):
    path = tmp_path / "finetune--s0d0.json"
    path.write_text(damaged(change))
    with pytest.raises(RecordError, match=words) as caught:
        records.read(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_and_absent_files_are_record_errors(tmp_path):
    path = tmp_path / "finetune--s0d0.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="finetune--s0d0"):
        records.read(path)
    with pytest.raises(RecordError, match="absent"):
        records.read(tmp_path / "absent.json")
    with pytest.raises(RecordError, match="expected a folder of records"):
        records.read_folder(tmp_path / "nowhere")


def test_a_folder_is_read_in_order_and_duplicates_are_listed(tmp_path):
    for s in (1, 0):
        for entry in ("ssd", "finetune"):
            records.write(make(entry=entry, unit=Unit(train_seed=s, draw=0)), tmp_path)
    found = [(r.entry, r.unit.train_seed) for r in records.read_folder(tmp_path)]
    assert found == [("finetune", 0), ("finetune", 1), ("ssd", 0), ("ssd", 1)]
    (tmp_path / "copy.json").write_bytes((tmp_path / "ssd--s0d0.json").read_bytes())
    with pytest.raises(RecordError, match=r"copy\.json, ssd--s0d0\.json"):
        records.read_folder(tmp_path)


def test_importing_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, unsc_plugin.leaderboard; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
