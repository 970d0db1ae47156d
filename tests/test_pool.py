"""The cache of trained models: what its key is made of, and what survives workers and kills."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Mlp, Normed, build, tabular
from torch import nn

from unsc_plugin import engine, evaluation, pool, registry
from unsc_plugin.errors import CacheMismatch, DivergedError
from unsc_plugin.method import UnlearningTask
from unsc_plugin.pool import Member, Pool
from unsc_plugin.runtime import state_sha256
from unsc_plugin.spec import Recipe

ROWS = tabular(22)
RECIPE = Recipe(epochs=2, lr=0.05, batch_size=5)
FORK = multiprocessing.get_context("fork")  # the children need no imports of their own


def fresh(seed: int, kind: type[nn.Module] = Mlp) -> nn.Module:
    return build(kind, seed % 2**31)


def member(root: Path, **changes: Any) -> Member:
    asked: dict[str, Any] = {
        "identity": {"data": "toy", "model": "mlp"},
        "build": fresh,
        "rows": ROWS,
        "recipe": RECIPE,
        "seed": 1,
    }
    device = changes.pop("device", None)
    return Pool(root, device).member(**{**asked, **changes})


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the seed of every training."""
    seeds: list[int] = []
    plain = engine.train

    def counted(*args: Any, seed: int, **rest: Any) -> Any:
        seeds.append(seed)
        return plain(*args, seed=seed, **rest)

    monkeypatch.setattr(engine, "train", counted)
    return seeds


# --------------------------------------------------------------------------- the key


def test_the_same_key_is_trained_once(tmp_path: Path, trainings: list[int]) -> None:
    first, second = member(tmp_path), member(tmp_path)
    assert trainings == [1]
    assert first == second
    assert first.meta["sha256"] == state_sha256(second.load_into(fresh(9)))


def test_a_copied_cache_is_as_good(tmp_path: Path, trainings: list[int]) -> None:
    one = member(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert member(tmp_path / "b").meta == one.meta
    assert trainings == [1]


OTHER_RECIPES = {
    "epochs": 1,
    "optimizer": "adam",
    "lr": 0.06,
    "momentum": 0.5,
    "nesterov": True,
    "weight_decay": 0.0,
    "batch_size": 6,
    "schedule": "cosine",
    "warmup_epochs": 0.5,
    "label_smoothing": 0.1,
    "augment": "crop_flip",
    "max_grad_norm": 1.0,
}
CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 2},
    "data": {"identity": {"data": "other", "model": "mlp"}},
    "model": {"identity": {"data": "toy", "model": "cnn"}},
    "more identity": {"identity": {"data": "toy", "model": "mlp", "pretrained": True}},
    "fewer rows": {"rows": ROWS.subset(list(range(21)))},
    "other rows": {"rows": ROWS.subset([*range(20), 21])},
    "order of rows": {"rows": ROWS.subset([1, 0, *range(2, 22)])},
    "labels": {"rows": ROWS.relabelled((ROWS.labels + 1) % 3)},
    "weights": {"rows": ROWS.weighted(torch.full((22,), 0.5))},
    "precision": {"device": SimpleNamespace(mixed_precision="bf16")},
    **{
        f"recipe.{key}": {"recipe": RECIPE.model_copy(update={key: value})}
        for key, value in OTHER_RECIPES.items()
    },
}


def test_every_field_of_the_recipe_is_tried() -> None:
    assert set(OTHER_RECIPES) == set(Recipe.model_fields)


@pytest.mark.parametrize("what", list(CHANGES))
def test_every_ingredient_changes_the_key(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "_train", lambda *args: None)
    monkeypatch.setattr(Pool, "_open", lambda self, key, folder: key)
    monkeypatch.setattr(Pool, "_claimed", lambda self, folder: contextlib.nullcontext(True))
    assert member(tmp_path) == member(tmp_path)
    assert member(tmp_path, **CHANGES[what]) != member(tmp_path)


@pytest.mark.parametrize("where", [(pool, "SCHEMA"), (engine, "FIT_VERSION")])
def test_a_new_version_of_cache_or_loop_trains_again(
    where: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[int]
) -> None:
    one = member(tmp_path)
    monkeypatch.setattr(*where, 99)
    assert member(tmp_path).key != one.key
    assert len(trainings) == 2


# --------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("kind", [Mlp, Normed])
def test_a_member_is_the_method_retrain_to_the_bit(
    kind: type[nn.Module], tmp_path: Path, make_task: Callable[..., UnlearningTask]
) -> None:
    def untrained(seed: int) -> nn.Module:
        return fresh(seed, kind)

    task = make_task(fresh_model=untrained, recipe=RECIPE)
    rows = ROWS.subset(list(range(6, 22)))  # what `make_task` retains
    one = member(tmp_path, build=untrained, rows=rows, seed=77)
    result = registry.create("retrain").unlearn(untrained(0), task, 77)
    assert one.meta["sha256"] == state_sha256(result.model)
    assert (one.meta["work"], one.meta["steps"]) == (result.work, result.steps)


def test_training_leaves_global_generators_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    member(tmp_path, build=lambda seed: Normed())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_member_says_how_it_was_made(tmp_path: Path) -> None:
    meta = member(tmp_path).meta
    assert meta["parts"]["recipe"] == RECIPE.model_dump(mode="json")
    assert meta["parts"]["seed"] == 1
    assert meta["work"] == 3 * 22 * 2  # with gradient, 22 rows, 2 epochs
    assert meta["steps"] == 2 * 5
    assert meta["seconds"] > 0
    assert "cpu" in meta["device"]
    assert set(meta["files"]) == {"model.safetensors"}


def test_a_cache_can_be_read_by_others(tmp_path: Path) -> None:
    one = member(tmp_path)
    assert stat.S_IMODE(one.folder.stat().st_mode) == 0o755


def test_a_training_that_diverges_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        member(tmp_path, recipe=RECIPE.model_copy(update={"lr": 1e38}))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --------------------------------------------------------------------------- corruption


def test_a_changed_model_is_refused_with_both_hashes(tmp_path: Path, trainings: list[int]) -> None:
    one = member(tmp_path)
    path = one.folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    written, found = one.meta["files"]["model.safetensors"], pool._file_sha256(path)
    with pytest.raises(CacheMismatch, match=f"expected SHA-256 {written}, found {found}"):
        member(tmp_path)
    assert trainings == [1]  # never a silent second training


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json"])
def test_a_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    (member(tmp_path).folder / name).unlink()
    with pytest.raises(CacheMismatch, match=name):
        member(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}'])
def test_a_damaged_meta_is_refused(text: str, tmp_path: Path) -> None:
    (member(tmp_path).folder / "meta.json").write_text(text)
    with pytest.raises(CacheMismatch, match=r"meta\.json"):
        member(tmp_path)


# --------------------------------------------------------------------------- outputs


@pytest.fixture
def frame() -> evaluation.Frame:
    return evaluation.Frame(
        kind="instance",
        data="toy",
        forget=ROWS.subset(list(range(6))),
        retain=ROWS.subset(list(range(6, 22))),
        retain_eval=ROWS.subset(list(range(6, 22))),
        test=tabular(30, seed=1, start=100),
        forgotten=torch.zeros(30, dtype=torch.bool),
        siblings=torch.zeros(30, dtype=torch.bool),
        recipe=RECIPE,
        spec=evaluation.EvaluationSpec.model_validate({"relearn": {"steps": 4}}),
        seed=0,
        draw=0,
        shots=None,
        shot_rows=None,
        codes=torch.zeros(0).numpy(),
    )


def outputs_of(root: Path, one: Member, frame: evaluation.Frame, seed: int = 3) -> Any:
    return Pool(root).outputs(one, frame, fresh, relearn_seed=seed)


def test_outputs_are_observed_once(
    tmp_path: Path, frame: evaluation.Frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = evaluation.observe
    monkeypatch.setattr(
        evaluation, "observe", lambda *a, **k: seen.append(k["relearn_seed"]) or plain(*a, **k)
    )
    one = member(tmp_path)
    first, second = outputs_of(tmp_path, one, frame), outputs_of(tmp_path, one, frame)
    assert seen == [3]
    assert first.sha256 == second.sha256
    direct = plain(one.load_into(fresh(0)), frame, relearn_seed=3)
    assert direct.sha256 == first.sha256
    outputs_of(tmp_path, one, frame, seed=4)
    assert seen == [3, 4]


def test_changed_outputs_are_refused(tmp_path: Path, frame: evaluation.Frame) -> None:
    one = member(tmp_path)
    outputs_of(tmp_path, one, frame)
    [path] = one.folder.glob("outputs-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheMismatch, match=r"expected SHA-256 \w{64}, found \w{64}"):
        outputs_of(tmp_path, one, frame)


# --------------------------------------------------------------------------- claims


def claim_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return the folder of the plain member and its claim file, ready to be written."""
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "_claimed", lambda self, folder: contextlib.nullcontext(False))
        patch.setattr(Pool, "_open", lambda self, key, folder: folder)
        folder: Any = member(root)
    folder.parent.mkdir(parents=True)
    return folder, pool._claim_file(folder)


def a_dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def claim(**changes: Any) -> str:
    return json.dumps({"host": socket.gethostname(), **changes})


def test_the_claim_of_a_dead_process_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[int]
) -> None:
    folder, path = claim_of(tmp_path, monkeypatch)
    path.write_text(claim(pid=a_dead_pid(), born="1"))
    assert member(tmp_path).folder == folder
    assert trainings == [1]
    assert not path.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc: no time of birth")
def test_a_process_number_that_was_given_out_again_does_not_hold_a_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[int]
) -> None:
    _, path = claim_of(tmp_path, monkeypatch)
    path.write_text(claim(pid=os.getpid(), born="1"))
    member(tmp_path)
    assert trainings == [1]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc: no time of birth")
def test_an_ended_process_that_nobody_waited_for_does_not_hold_a_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[int]
) -> None:
    _, path = claim_of(tmp_path, monkeypatch)
    holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    path.write_text(claim(pid=holder.pid, born=pool._born(holder.pid)))
    assert not pool._stale(path)
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    member(tmp_path)
    assert trainings == [1]
    holder.communicate()


@pytest.mark.parametrize(
    ("text", "age", "stale"),
    [
        (claim(pid=os.getpid(), born=pool._born(os.getpid())), 1e6, False),
        (json.dumps({"host": "elsewhere", "pid": 1}), 10, False),
        (json.dumps({"host": "elsewhere", "pid": 1}), 1e6, True),
        ("", 0, False),
        ("", 60, True),
        ('{"host": "here', 0, False),
        ('{"host": "here', 60, True),
    ],
    ids=[
        "alive here",
        "young elsewhere",
        "old elsewhere",
        "being made",
        "empty",
        "half",
        "half, old",
    ],
)
def test_when_a_claim_is_stale(text: str, age: float, stale: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.claim"
    path.write_text(text)
    then = time.time() - age
    os.utime(path, (then, then))
    assert pool._stale(path) is stale


def test_a_claim_that_is_gone_is_not_stale(tmp_path: Path) -> None:
    assert not pool._stale(tmp_path / "x.claim")


def test_a_live_claim_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[int]
) -> None:
    _, path = claim_of(tmp_path, monkeypatch)
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    path.write_text(claim(pid=holder.pid, born=pool._born(holder.pid)))
    waiting = threading.Thread(target=member, args=(tmp_path,))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert trainings == []
    holder.kill()
    holder.wait()
    waiting.join(20)
    assert not waiting.is_alive()
    assert trainings == [1]


# --------------------------------------------------------------------------- several processes


def slow_training(root: Path, log: Path, start: Any) -> None:
    plain = engine.train

    def slow(*args: Any, **rest: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return plain(*args, **rest)

    engine.train = slow
    start.wait()
    member(root)


@contextlib.contextmanager
def children(*targets: tuple[Any, ...]) -> Iterator[list[Any]]:
    running = [FORK.Process(target=target, args=args) for target, *args in targets]
    try:
        for process in running:
            process.start()
        yield running
    finally:
        for process in running:
            process.kill()
            process.join()


def test_concurrent_processes_train_once(tmp_path: Path, trainings: list[int]) -> None:
    log, start = tmp_path / "log", FORK.Barrier(3)
    with children(*[(slow_training, tmp_path, log, start)] * 3) as running:
        for process in running:
            process.join(30)
        assert [process.exitcode for process in running] == [0, 0, 0]
    assert len(log.read_text().split()) == 1
    member(tmp_path)
    assert trainings == []
    assert not list(tmp_path.rglob("*.claim"))
    assert not list(tmp_path.rglob(".new-*"))


def train_and_hang(root: Path, stage: str, ready: Any) -> None:
    def hang(*_: Any, **__: Any) -> None:
        ready.set()
        time.sleep(60)

    if stage == "training":
        member(root, progress=hang)
    elif stage == "weights":
        pool.save_file = hang
    elif stage == "hash":
        pool._file_sha256 = hang
    else:
        Path.rename = hang
    member(root)


@pytest.mark.parametrize("stage", ["training", "weights", "hash", "rename"])
def test_a_kill_leaves_no_broken_member(stage: str, tmp_path: Path, trainings: list[int]) -> None:
    ready = FORK.Event()
    with children((train_and_hang, tmp_path, stage, ready)) as [process]:
        assert ready.wait(30)
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    assert not list(tmp_path.rglob("models/*/[0-9a-f]*/meta.json"))
    again = member(tmp_path)
    assert trainings == [1]
    assert again.meta["sha256"] == member(tmp_path / "clean").meta["sha256"]
    assert not list(tmp_path.rglob("*.claim"))


def test_a_member_that_appears_meanwhile_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = member(tmp_path)
    parts = one.meta["parts"]
    before = (one.folder / "meta.json").read_bytes()
    Pool(tmp_path)._train(one.folder, parts, fresh, ROWS, RECIPE, 1, None)  # as another machine
    assert (one.folder / "meta.json").read_bytes() == before
    assert not list(tmp_path.rglob(".new-*"))
