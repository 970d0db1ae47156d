"""Two processes train, unlearn and measure as one does, write one record, and do not hang.

`accelerate launch --cpu` starts a single process whatever `--num_processes` says (it leaves several
CPU processes to MPI), so it stands for the one; the two are made by torch's launcher, which
`accelerate launch` itself uses for several GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unsc_plugin import record
from unsc_plugin.record import Record

PATIENCE = 240.0
EXPERIMENT = [
    *("run", "finetune", "--model", "mlp", "--data", "digits", "--forget", "random:0.1"),
    *("--seed", "5", "--recipe", "epochs=2", "--set", "epochs=1", "--metrics", "core,mia,mubench"),
    *("--device", "cpu", "--threads", "1", "--quiet"),
]
LAUNCHERS = {
    "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "one": [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu",
                   "--num_processes", "2"],
}  # fmt: skip


def launch(launcher: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [*LAUNCHERS[launcher], "-m", "unsc_plugin.cli", *EXPERIMENT]
    return subprocess.run(
        [*words, "--cache", str(folder / "cache"), "--out", str(folder / "run"), *more],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ran(launcher: str, folder: Path) -> Record:
    done = launch(launcher, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of retraining's work") == 1  # one process prints
    assert [path.name for path in folder.iterdir() if path.name != "cache"] == ["run"]
    assert not [*folder.rglob("*.claim"), *folder.rglob(".new-*")]
    assert len(list(folder.rglob("meta.json"))) == 2  # the original and one retrained model
    return record.read(folder / "run" / "record.json")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return ran("one", tmp_path_factory.mktemp("one"))


def agree(one: Record, two: Record) -> None:
    assert one.metrics.keys() == two.metrics.keys()
    for part in ("metrics", "reference"):
        for name, value in getattr(one, part).items():
            if name != "mubench.unlearn_time":
                assert getattr(two, part)[name] == pytest.approx(value, abs=1e-4), name
    for name in ("work", "work_ratio", "steps", "epochs"):  # of all processes, not of one
        assert two.cost[name] == one.cost[name]
    assert two.stats["samples_read"] == one.stats["samples_read"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(alone: Record, tmp_path: Path) -> None:
    two = ran("two", tmp_path)
    assert (alone.environment["processes"], two.environment["processes"]) == (1, 2)
    assert two.environment["device"].startswith("2 x ")
    agree(alone, two)


@pytest.mark.slow
def test_two_processes_fail_together(tmp_path: Path) -> None:
    done = launch("two", tmp_path, "--recipe", "lr=1e30")
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("*.claim"))
