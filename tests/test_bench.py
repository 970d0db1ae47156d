"""A board: resumed where it stopped, whatever stopped it; refused when edited; re-checked."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checks import UNAVAILABLE

from unsc_plugin import bench, cli, conformance, record, registry
from unsc_plugin.errors import ConfigError, RecordError, UnknownName
from unsc_plugin.record import Record

TINY = Path(__file__).parent / "boards" / "tiny" / "board.yaml"
UNITS = 4 * 2 * 2
TIMES = ("seconds_prepare", "seconds_unlearn", "time_ratio", "peak_bytes")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained models and ready badges, shared by all boards of this file."""
    root = tmp_path_factory.mktemp("models")
    badges(root)
    return root


def badges(root: Path, *plugins: str) -> None:
    """Write the badges of all methods without running the conformance suite."""
    names = registry.load(plugins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conformance, "check_method", lambda *_, **__: [])
        for name in sorted(names.methods.keys() - UNAVAILABLE.keys()):
            bench.badge_of(name, names, root)


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny board, all of it run in this process; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(TINY, folder)
    board = opened(folder, cache)
    todo, _ = bench.split_done(board, bench.jobs(board))
    assert len(bench.run_jobs(board, todo)) == UNITS
    for path, text in bench.files(board, bench.build(board)).items():
        bench.write_text(path, text)
    return folder


def opened(folder: Path, cache: Path, **how: Any) -> bench.Board:
    return bench.open_board(str(folder), cache=cache, device="cpu", **how)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "board"))


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(TINY, folder)
    return folder


@pytest.fixture
def unsc() -> Callable[..., int]:
    """Return a function that runs the command line in this process and gives its exit code."""

    def call(*words: object) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        return int(ended.value.code or 0)

    return call


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "board.yaml"
    tree = yaml.safe_load(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree))


def states(folder: Path) -> dict[str, tuple[str, int]]:
    """Return name -> (hash, time of change) of every record that is there."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in (folder / "results").glob("*.json")
    }


def timeless(done: Record) -> dict[str, Any]:
    """Return a record without its times, and without what only tells the state of the code."""
    tree = json.loads(record.dumps(done))
    for key in ("created", "commit", "checks", "command"):
        del tree[key]
    tree["metrics"].pop("mubench.unlearn_time", None)
    for key in TIMES:
        tree["cost"].pop(key, None)
    return tree


# --------------------------------------------------------------------------- a whole board


def test_a_board_has_every_unit_once(finished: Path, cache: Path) -> None:
    records = record.read_folder(finished / "results")
    assert len(records) == UNITS
    assert {done.status for done in records} == {"ok"}
    assert len({done.hashes["original"] for done in records}) == 2  # one per train seed
    for draw in (0, 1):
        pools = {tuple(done.reference_hashes) for done in records if done.unit.draw == draw}
        assert len(pools) == 1
    slow = [done for done in records if done.entry == "finetune.slow"]
    assert {done.config["lr_scale"] for done in slow} == {0.05}
    assert bench.split_done(opened(finished, cache), bench.jobs(opened(finished, cache)))[0] == []


def test_a_second_run_computes_nothing(
    copy: Path, cache: Path, unsc: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a unit was run again")

    monkeypatch.setattr(bench, "run_job", never)
    before = states(copy)
    assert unsc("bench", copy, "--cache", cache, "--quiet") == 0
    assert states(copy) == before


@pytest.mark.slow
def test_two_workers_give_the_records_of_one(finished: Path, empty: Path, tmp_path: Path) -> None:
    badges(tmp_path / "cache")
    done = run_cli(empty, tmp_path / "cache", "--workers", "2", "--seeds", "1")
    assert done.wait(300) == 0
    one, two = (record.read_folder(folder / "results") for folder in (finished, empty))
    assert len(two) == UNITS / 2
    assert [timeless(found) for found in one if found.unit.train_seed == 1] == [
        timeless(found) for found in two
    ]


# --------------------------------------------------------------------------- killed and restarted


def run_cli(folder: Path, cache: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "unsc_plugin.cli", "bench", str(folder), "--cache", str(cache)]
    return subprocess.Popen(
        [*command, "--device", "cpu", *words],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("ab"),
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )


@pytest.mark.slow
def test_a_killed_board_goes_on_where_it_was(finished: Path, empty: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    badges(cache)
    chance, kept = random.Random(0), states(empty)
    for round_ in range(5):
        running = run_cli(empty, cache)
        wait_for_growth(empty, len(kept), running)
        time.sleep(chance.uniform(0, 0.5))
        if running.poll() is None:
            os.kill(running.pid, signal.SIGKILL)
        running.wait(30)
        now = states(empty)
        assert kept.items() <= now.items(), f"round {round_}: a finished record was touched"
        assert len(now) > len(kept)
        record.read_folder(empty / "results")  # whole, and no unit twice
        kept = now
        if len(kept) == UNITS:
            break
    assert run_cli(empty, cache).wait(300) == 0
    assert kept.items() <= states(empty).items()
    records = record.read_folder(empty / "results")
    assert [timeless(found) for found in records] == [
        timeless(found) for found in record.read_folder(finished / "results")
    ]
    assert not list(cache.rglob("*.claim"))


def wait_for_growth(folder: Path, count: int, running: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while len(states(folder)) <= count and running.poll() is None:
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: children unknown")
def test_workers_do_not_outlive_a_killed_board(empty: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    badges(cache)
    running = run_cli(empty, cache, "--workers", "2")
    wait_for_growth(empty, 0, running)
    workers = [pid for pid in children_of(running.pid) if "spawn_main" in command_of(pid)]
    os.kill(running.pid, signal.SIGKILL)
    running.wait(30)
    assert len(workers) == 2
    end = time.monotonic() + 30
    while any("spawn_main" in command_of(pid) for pid in workers):
        assert time.monotonic() < end, "workers are still there"
        time.sleep(0.1)
    record.read_folder(empty / "results")


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(one) for task in tasks.iterdir() for one in (task / "children").read_text().split()]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_a_record_that_appears_meanwhile_stands(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, before = opened(copy, cache), states(copy)
    assert bench.run_job(board, bench.jobs(board)[0]) is None
    assert states(copy) == before


# --------------------------------------------------------------------------- failures

BOOM = '''
from unsc_plugin import register_method

@register_method("boom")
def boom(model, retain):
    """Fails on purpose."""
    raise OSError("no such luck")
'''


def test_a_failure_is_recorded_and_the_rest_goes_on(
    empty: Path, cache: Path, tmp_path: Path, unsc: Callable[..., int]
) -> None:
    plugin = tmp_path / "boom.py"
    plugin.write_text(BOOM)
    badges(cache, str(plugin))

    def change(tree: dict[str, Any]) -> None:
        wild = {"method": "neggrad", "name": "wild", "set": {"lr": 1e30, "passes": 3}}
        tree["entries"] = ["boom", wild, "original"]

    edit(empty, change)
    words = ("bench", empty, "--cache", cache, "--plugin", plugin, "--seeds", "0", "--quiet")
    assert unsc(*words) == 1
    found = {done.key[1:]: done for done in record.read_folder(empty / "results")}
    assert {key[0]: done.status for key, done in found.items()} == {
        "boom": "failed",
        "wild": "diverged",
        "original": "ok",
    }
    assert found["boom", 0, 0].reason == "OSError: no such luck"
    assert found["wild", 0, 1].metrics == {}
    text = (empty / "LEADERBOARD.md").read_text()
    assert "boom" in text
    assert "wild" in text
    before = states(empty)
    assert unsc(*words) == 1  # the failures are still there
    assert states(empty) == before


# --------------------------------------------------------------------------- never edited


def with_(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree.update(changes)


def in_scenario(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree["scenarios"][0].update(changes)


def entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree["entries"][3].update(changes)


EDITS = {
    "evaluation": lambda tree: tree["evaluation"].update(retain_eval=100),
    "seed": with_(seed=8),
    "recipe": lambda tree: tree["scenarios"][0]["recipe"].update(epochs=3),
    "recipe (left out)": lambda tree: tree["scenarios"][0].pop("recipe"),
    "data": in_scenario(data="digits-noisy"),
    "model": in_scenario(model="logistic"),
    "forget": in_scenario(forget=[{"kind": "class", "classes": [k]} for k in (0, 4)]),
    "forget (as one)": in_scenario(forget=["random:0.1"]),
    "set.lr_scale": entry(set={"lr_scale": 0.06, "epochs": 1}),
    "set.epochs": entry(set={"lr_scale": 0.05}),
    "method": entry(method="cf_k", set={}),
    "track": entry(track="oracle"),
}


@pytest.mark.parametrize("what", list(EDITS))
def test_a_changed_board_is_refused(what: str, copy: Path, cache: Path) -> None:
    edit(copy, EDITS[what])
    board = opened(copy, cache)
    with pytest.raises(RecordError, match=rf"another .*{what.split(' ')[0]}"):
        bench.split_done(board, bench.jobs(board))


def test_a_changed_board_exits_2_and_runs_nothing(
    copy: Path, cache: Path, unsc: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy, EDITS["seed"])
    before = states(copy)
    assert unsc("bench", copy, "--cache", cache) == 2
    assert "another seed" in " ".join(capsys.readouterr().err.split())
    assert unsc("board", "verify", copy, "--cache", cache) == 2
    assert states(copy) == before


def test_an_entry_may_be_added(copy: Path, cache: Path) -> None:
    edit(copy, lambda tree: tree["entries"].append("noise"))
    board = opened(copy, cache)
    todo, found = bench.split_done(board, bench.jobs(board))
    assert {job.entry.method for job in todo} == {"noise"}
    assert len(found) == UNITS


def test_a_broken_record_is_named(copy: Path, cache: Path, unsc: Callable[..., int]) -> None:
    path = copy / "results" / "original--s0d0.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(RecordError, match="original--s0d0"):
        bench.build(opened(copy, cache))
    assert unsc("bench", copy, "--cache", cache, "--quiet") == 2


def test_resume_may_be_refused(copy: Path, cache: Path, unsc: Callable[..., int]) -> None:
    before = states(copy)
    assert unsc("bench", copy, "--cache", cache, "--no-resume", "--quiet") == 2
    assert states(copy) == before


# --------------------------------------------------------------------------- build and verify


def test_build_check_knows_fresh_from_stale(
    copy: Path, unsc: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert unsc("board", "build", copy, "--check") == 0
    for name, spoil in (
        ("LEADERBOARD.md", lambda path: path.write_text(path.read_text() + " ")),
        ("plot.svg", lambda path: path.unlink()),
        ("results/original--s0d0.json", lambda path: path.unlink()),
    ):
        spoil(copy / name)
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        assert unsc("board", "build", copy, "--check") == 1
        assert "stale" in capsys.readouterr().err
        assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
        assert unsc("board", "build", copy) == 0
        assert unsc("board", "build", copy, "--check") == 0


def test_building_twice_gives_the_same_bytes(copy: Path, cache: Path) -> None:
    board = opened(copy, cache)
    assert bench.files(board, bench.build(board)) == bench.files(board, bench.build(board))
    assert bench.stale(board, bench.build(board)) == []


def test_a_board_without_records_cannot_be_built(empty: Path, unsc: Callable[..., int]) -> None:
    assert unsc("board", "build", empty) == 2
    assert not (empty / "LEADERBOARD.md").exists()


def test_verify_passes_on_what_was_run(copy: Path, cache: Path) -> None:
    assert bench.verify(opened(copy, cache)) == (UNITS, [])


def tamper(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "results" / name
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


TAMPERS = {
    "metrics.js_forget": lambda tree: tree["metrics"].update(js_forget=0.001),
    "metrics.acc_test": lambda tree: tree["metrics"].pop("acc_test"),
    "reference.acc_test": lambda tree: tree["reference"].update(acc_test=0.9),
    "reference_std.acc_test": lambda tree: tree["reference_std"].update(acc_test=0.9),
    "hash of forget": lambda tree: tree["hashes"].update(forget="0" * 64),
    "hash of unlearned": lambda tree: tree["hashes"].update(unlearned="0" * 64),
}


@pytest.mark.parametrize("what", list(TAMPERS))
def test_verify_finds_what_was_edited_by_hand(
    what: str, copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(copy, "finetune.slow--s1d1.json", TAMPERS[what])
    board = opened(copy, cache)
    some = [job for job in bench.jobs(board) if job.label.endswith("s1d1")]
    monkeypatch.setattr(bench, "jobs", lambda _: some)
    checked, mismatches = bench.verify(board)
    assert checked == 4
    assert [(one.unit, one.what) for one in mismatches] == [("finetune.slow--s1d1", what)]


def test_verify_runs_a_unit_again_when_its_logits_are_gone(
    copy: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "cache"
    shutil.copytree(cache / "models", bare / "models")
    board = opened(copy, bare)
    some = bench.jobs(board, only="finetune.slow--s0d0")
    monkeypatch.setattr(bench, "jobs", lambda _: some)
    assert bench.verify(board) == (1, [])
    tamper(copy, "finetune.slow--s0d0.json", TAMPERS["metrics.js_forget"])
    assert [one.what for one in bench.verify(board)[1]] == ["metrics.js_forget"]


def test_verify_exits_1_on_a_mismatch_and_on_a_missing_record(
    copy: Path, cache: Path, unsc: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "results" / "original--s0d0.json").unlink()
    assert unsc("board", "verify", copy, "--cache", cache, "--json", "--quiet") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["checked"] == UNITS - 1
    assert found["mismatches"] == [
        {"unit": "original--s0d0", "what": "record", "stored": "expected", "found": "none"}
    ]


# --------------------------------------------------------------------------- choosing units


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (with_(entries=["retrain", "finetun"]), "finetune"),
        (with_(entries=["finetune.papr"]), "finetune.paper"),
        (entry(set={"lr_scal": 1}), "lr_scale"),
        (with_(entrys=[]), "entries"),
    ],
)
def test_unknown_names_stop_before_anything_runs(
    change: Callable[[dict[str, Any]], Any],
    word: str,
    empty: Path,
    tmp_path: Path,
    unsc: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit(empty, change)
    assert unsc("bench", empty, "--cache", tmp_path / "cache") == 2
    assert word in capsys.readouterr().err
    assert not (empty / "results").exists()
    assert not (tmp_path / "cache").exists()


def test_unknown_boards_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY.parents[3])
    with pytest.raises(UnknownName, match="digits-class"):
        bench.find("digits-clas")
    with pytest.raises(ConfigError, match=r"\.\."):
        bench.find("../digits-class")
    assert bench.find("digits-class") == Path("benchmarks/digits-class/board.yaml")
    assert {"digits-class", "digits-random"} <= set(bench.names())


def labels(board: bench.Board, **which: Any) -> list[str]:
    return [job.label for job in bench.jobs(board, **which)]


def test_only_and_seeds_choose_units(finished: Path, cache: Path) -> None:
    board = opened(finished, cache)
    assert len(labels(board)) == UNITS
    assert labels(board, only="finetune*") == [
        f"finetune.slow--s{s}d{d}" for d in (0, 1) for s in (0, 1)
    ]
    assert labels(board, only="original--s1d0") == ["original--s1d0"]
    assert labels(board, only="original", seeds=[1]) == ["original--s1d0", "original--s1d1"]
    assert {label[-4:-2] for label in labels(board, seeds=[0])} == {"s0"}
    with pytest.raises(ConfigError, match="matches no unit"):
        bench.jobs(board, only="nothing*")
    with pytest.raises(ConfigError, match="some of \\[0, 1\\], got \\[2\\]"):
        bench.jobs(board, seeds=[2])


def test_limit_runs_that_many(empty: Path, cache: Path, unsc: Callable[..., int]) -> None:
    words = ("bench", empty, "--cache", cache, "--quiet", "--limit")
    assert unsc(*words, 2) == 0
    first = states(empty)
    assert len(first) == 2
    assert unsc(*words, 1) == 0
    assert len(states(empty)) == 3
    assert first.items() <= states(empty).items()


def test_a_dry_run_runs_nothing(
    empty: Path, tmp_path: Path, unsc: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("bench", empty, "--cache", tmp_path / "cache", "--dry-run", "--json")
    assert unsc(*words, "--only", "original*") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["units"], found["finished"], len(found["to_run"])) == (4, 0, 4)
    assert found["trainings_at_most"] == 2 + 2 * (2 + 2)  # originals; per draw: pool and retrain
    assert not (tmp_path / "cache").exists()
    assert [path.name for path in empty.iterdir()] == ["board.yaml"]


def test_settings_of_two_caches_are_two(finished: Path, cache: Path, tmp_path: Path) -> None:
    here, there = opened(finished, cache), opened(finished, tmp_path)
    assert bench._setting(here, 0) is bench._setting(here, 0)
    assert bench._setting(here, 0).pool.root == cache
    assert bench._setting(there, 0).pool.root == tmp_path


# --------------------------------------------------------------------------- badges


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Count the runs of the conformance suite and leave it out."""
    runs: list[str] = []

    def checked(kind: Any, **_: Any) -> list[Any]:
        runs.append(kind.name)
        return []

    monkeypatch.setattr(conformance, "check_method", checked)
    return runs


def test_a_badge_is_made_once_per_code(
    tmp_path: Path, suite: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = registry.load()
    one = bench.badge_of("finetune", names, tmp_path)
    assert bench.badge_of("finetune", names, tmp_path) == one
    assert suite == ["finetune"]
    monkeypatch.setattr(bench, "_code_sha256", lambda: "other")
    bench.badge_of("finetune", names, tmp_path)
    assert suite == ["finetune", "finetune"]
