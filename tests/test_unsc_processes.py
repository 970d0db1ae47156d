"""Null-space unlearning over processes and in other precisions than float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.method import UnlearningTask
from unsc_plugin.methods.unsc import UNSC
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Recipe, Scenario

CHILD = """
import sys
from pathlib import Path

import torch

from tests_child import measure
from unsc_plugin import engine

torch.set_num_threads(1)
device = engine.accelerator("cpu")
torch.save(measure(device), Path(sys.argv[1]) / f"rank{device.process_index}.pt")
"""


class Conv(nn.Module):
    """A convolution, a grouped convolution with BatchNorm between them, and a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(24, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.stem(pixel_values)))
        hidden = nn.functional.adaptive_avg_pool2d(torch.relu(self.body(hidden)), 2)
        return self.head(hidden.flatten(1))


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = Conv()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.4)
    return net.to(dtype).eval()


def pictures(dtype: torch.dtype) -> Rows:
    """Return 47 pictures of four classes: no multiple of two, and not the same count per class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (47,), generator=generator)
    patterns = torch.rand(4, 1, 6, 6, generator=generator, dtype=torch.float64)
    noise = 0.2 * torch.rand(47, 1, 6, 6, generator=generator, dtype=torch.float64)
    return Rows.of({"pixel_values": (patterns[labels] + noise).to(dtype)}, labels)


def request(device: Any = None, dtype: torch.dtype = torch.float64, **more: Any) -> UnlearningTask:
    rows = pictures(dtype)
    gone = torch.nonzero(rows.labels == 2)[:, 0][:8]  # a multiple of the two processes' batch
    others = torch.nonzero(rows.labels != 2)[:, 0]
    return UnlearningTask(
        forget=rows.subset(gone),
        retain=rows.subset(others),
        num_classes=4,
        recipe=Recipe(batch_size=4),
        fresh_model=lambda seed: model(dtype),
        scenario=Scenario.CLASS,
        accelerator=device,
        **more,
    )


def measure(device: Any) -> dict[str, Any]:
    """Return Gram matrices, projectors and the unlearned weights, as this process has them."""
    method = UNSC(
        capture_dtype="float64", capture_batch=5, batch_size=4, epochs=3, min_steps=0, stop_at=None
    )
    prepared = method.prepared(model(), request(device), seed=0)
    moments = prepared.state.known.entry.moments
    result = method.unlearn(model(), request(device), seed=0)
    assert engine.world(device) == (1 if device is None else device.num_processes)
    return {
        "grams": {name: found.gram for name, found in moments.items()},
        "counts": {name: found.count for name, found in moments.items()},
        "factors": {n: layer.projector.factor for n, layer in prepared.state.layers.items()},
        "weights": dict(result.model.state_dict()),
        "status": result.status,
        "read": dict(result.read),
        "drift": result.stats["certificate"]["drift"],
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    (folder / "child.py").write_text(CHILD, encoding="utf-8")
    (folder / "tests_child.py").write_text(Path(__file__).read_text(encoding="utf-8"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(folder / "child.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        scale = tensor.double().abs().max().clamp(min=1e-30)
        assert (tensor - second[name]).double().abs().max() <= tolerance * scale, name


@pytest.mark.slow
def test_two_processes_give_the_gram_matrices_of_one(two: list[dict[str, Any]]) -> None:
    one = measure(None)
    assert one["status"] == "ok"
    for found in two:
        close(one["grams"], found["grams"], 1e-12)
        assert all(torch.equal(one["counts"][n], count) for n, count in found["counts"].items())
        assert found["read"] == one["read"]  # of all processes together, every row once


@pytest.mark.slow
def test_all_processes_hold_the_same_projectors_and_weights(two: list[dict[str, Any]]) -> None:
    first, second = two
    for part in ("factors", "weights"):
        assert all(torch.equal(tensor, second[part][n]) for n, tensor in first[part].items()), part
    close(measure(None)["weights"], first["weights"], 1e-5)
    assert first["drift"] == second["drift"] > 0


# --------------------------------------------------------------------------- precision


def leak(after: nn.Module, before: nn.Module, prepared: Any) -> float:
    """Return the largest ‖ΔW U‖ / ‖ΔW‖ of the covered layers."""
    worst = 0.0
    new, old = after.state_dict(), before.state_dict()
    for name, layer in prepared.state.layers.items():
        rows = layer.view.rows((new[name] - old[name]).double())
        kept = rows - layer.projector.apply(rows)
        worst = max(worst, float(kept.norm() / rows.norm()))
    return worst


def test_bfloat16_autocast_leaks_less_than_1e_5(fresh_accelerate: None) -> None:
    device = engine.accelerator("cpu", "bf16")
    before = torch.backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu")
    method = UNSC(epochs=30, min_steps=0, stop_at=None)  # steps that outweigh float32 rounding
    task, net = request(device, torch.float32), model(torch.float32)
    prepared = method.prepared(net, task, seed=0)
    result = method.unlearn(net, task, seed=0, prepared=prepared)
    assert leak(result.model, net, prepared) <= 1e-5
    assert (torch.backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu")) == before


def test_a_bfloat16_model_comes_back_in_bfloat16_with_a_certificate_of_its_weights() -> None:
    net = model(torch.bfloat16)
    method = UNSC(epochs=4, min_steps=0, stop_at=None, lr=0.1)
    task = request(None, torch.bfloat16)
    prepared = method.prepared(net, task, seed=0)
    result = method.unlearn(net, task, seed=0, prepared=prepared)
    before, after = net.state_dict(), result.model.state_dict()
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    for name, layer in prepared.state.layers.items():
        base = layer.view.rows(before[name].double())
        change = layer.view.rows(after[name].double()) - base
        expected = [
            float(torch.linalg.vector_norm(change @ root) / torch.linalg.vector_norm(base @ root))
            for root in (_root(gram.matrix) for _, gram in prepared.state.retained(layer))
        ]
        found = result.stats["certificate"]["delta"][name]
        assert found == pytest.approx(expected, rel=1e-4)
    assert 1e-5 < leak(result.model, net, prepared) < 0.5  # what the cast back costs is in it


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()[:, None]


def test_double_models_stay_double() -> None:
    net = model()
    result = UNSC(epochs=2, min_steps=0).unlearn(net, request(), seed=0)
    assert all(p.dtype == torch.float64 for p in result.model.parameters())
