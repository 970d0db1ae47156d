"""`instance_wise` in two processes makes the steps of one and leaves one model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unsc_plugin import engine
from unsc_plugin.conformance._toys import original, problem, request
from unsc_plugin.registry import create
from unsc_plugin.spec import Scenario

CHILD = """
import sys
from pathlib import Path

import torch

from tests_child import measure
from unsc_plugin import engine

torch.set_num_threads(1)
device = engine.accelerator("cpu")
folder = Path(sys.argv[1])
state = torch.load(folder / "original.pt")
torch.save(measure(device, state), folder / f"rank{device.process_index}.pt")
"""
PRESETS = ("adv_imp", "noise", "relabel", "neggrad")
K = 7
"""Odd, so that no two processes can share the forget rows evenly."""


def measure(device: Any, state: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return weights and notes of every preset, as this process has them."""
    model = problem("conv").build(0)  # trained in one process: two would train another one
    model.load_state_dict(state)
    found = {}
    for preset in PRESETS:
        positions = torch.arange(K), torch.arange(K, 96)
        task = request(
            problem("conv"), Scenario.RANDOM, positions=positions, accelerator=device
        )  # fmt: skip
        method = create(f"instance_wise.{preset}", n_adv=3, adv_batch=13)
        result = method.unlearn(model.eval(), task, 2)
        assert engine.world(device) == (1 if device is None else device.num_processes)
        found[preset] = {
            "weights": dict(result.model.state_dict()),
            "status": result.stats["status"],
            "steps": result.steps,
            "losses": result.losses,
            "w": result.stats["w_final"],
            "targets": result.targets,
            "read": {str(split): count for split, count in result.read.items()},
        }
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    torch.save(original("conv").state_dict(), folder / "original.pt")
    (folder / "child.py").write_text(CHILD, encoding="utf-8")
    (folder / "tests_child.py").write_text(Path(__file__).read_text(encoding="utf-8"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(folder / "child.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
            [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        )},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(two: list[dict[str, dict[str, Any]]]) -> None:
    torch.set_num_threads(1)
    one = measure(None, original("conv").state_dict())
    for preset in PRESETS:
        alone, first, second = one[preset], two[0][preset], two[1][preset]
        for name, tensor in first["weights"].items():
            assert torch.equal(tensor, second["weights"][name]), (preset, name)
            torch.testing.assert_close(tensor, alone["weights"][name], rtol=1e-5, atol=1e-5)
        for found in (first, second):
            assert (found["status"], found["steps"]) == (alone["status"], alone["steps"])
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5, abs=1e-6)
            assert found["w"] == pytest.approx(alone["w"])
            assert found["read"] == alone["read"] == {"forget": K}
        assert alone["status"] == "reached"
    targets = [found["relabel"]["targets"] for found in (one, *two)]
    assert all(torch.equal(targets[0], other) for other in targets[1:])
