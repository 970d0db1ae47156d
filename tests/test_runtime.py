"""Global state comes back, work is counted, hashes see every change."""

from __future__ import annotations

import contextlib
import copy
import random
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from unsc_plugin.runtime import (
    Clock,
    PeakMemory,
    WorkCounter,
    first_non_finite,
    sealed,
    state_sha256,
)


def world() -> dict[str, object]:
    """Return everything global that a method might move."""
    return {
        "python": random.getstate(),
        "numpy": tuple(np.random.get_state()[1].tolist()),
        "torch": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "cudnn": (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "threads": torch.get_num_threads(),
    }


def wreck() -> None:
    """Move everything that :func:`world` looks at."""
    random.random()
    np.random.rand()
    torch.rand(3)
    torch.manual_seed(77)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.backends.cudnn.enabled = False
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = False
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)


@pytest.fixture
def outside() -> object:
    """Put the state of the process back, whatever the code under test did."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(1)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_sealed_puts_everything_back(outside: None, fails: bool, grad: bool) -> None:
    torch.set_grad_enabled(grad)
    before = world()

    def run() -> None:
        with sealed(3):
            wreck()
            if fails:
                raise KeyError

    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        run()
    assert world() == before


def test_sealed_keeps_deterministic_mode_with_warnings(outside: None) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = world()
    with sealed(3):
        wreck()
    assert world() == before


def test_sealed_seeds_every_generator() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        with sealed(seed):
            assert torch.is_grad_enabled()
            assert torch.backends.cudnn.deterministic
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(1) == draw(1)
    assert all(a != b for a, b in zip(draw(1), draw(2), strict=True))
    assert draw(2**40 + 1) == draw(2**40 + 1)


def test_sealed_allows_training_inside_inference_mode() -> None:
    with torch.inference_mode(), sealed(0):
        layer = nn.Linear(2, 1)
        layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None


def test_sealed_nests() -> None:
    with sealed(1):
        first = torch.rand(())
        with sealed(2):
            torch.rand(5)
        second = torch.rand(())
    with sealed(1):
        assert torch.equal(torch.rand(2), torch.stack([first, second]))


def test_clock_leaves_pauses_out() -> None:
    clock = Clock()
    with clock.paused():
        time.sleep(0.05)
    with contextlib.suppress(KeyError), clock.paused():
        time.sleep(0.05)
        raise KeyError
    inside = clock.seconds
    assert 0 <= inside < 0.05
    time.sleep(0.01)
    assert clock.seconds >= inside + 0.01


def test_work_counts_samples(mlp: Callable[..., nn.Module]) -> None:
    model, counter = mlp(), WorkCounter()
    counter.watch(model)
    counter.watch(model)
    model(features=torch.zeros(4, 6))
    assert counter.samples == 12
    with torch.no_grad():
        model(torch.zeros(5, 6))
    assert counter.samples == 17
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher(torch.zeros(2, 6))
    assert counter.samples == 19
    copy.deepcopy(teacher)(torch.zeros(1, 6))
    assert counter.samples == 22
    counter.forget(model)
    model(torch.zeros(4, 6))
    assert counter.samples == 22
    assert not model._forward_hooks
    assert not model._forward_hooks_with_kwargs


def test_work_leaves_foreign_hooks_alone(mlp: Callable[..., nn.Module]) -> None:
    model, counter, calls = mlp(), WorkCounter(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    counter.watch(model)
    counter.forget(model)
    model(torch.zeros(1, 6))
    assert calls == [1]


class State(nn.Module):
    """A state of many dtypes and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float16))
        self.brain = nn.Parameter(torch.tensor([[1.0]], dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())


def test_state_sha256_sees_every_change() -> None:
    model = State()
    seen = {state_sha256(model)}
    assert state_sha256(copy.deepcopy(model)) in seen

    def changed(change: Callable[[State], object]) -> None:
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other)
        digest = state_sha256(other)
        assert digest not in seen
        seen.add(digest)

    changed(lambda m: m.tiny.add_(0.001))
    changed(lambda m: m.brain.neg_())
    changed(lambda m: m.scalar.fill_(-0.0))
    changed(lambda m: m.scalar.fill_(0.0))
    changed(lambda m: m.count.add_(1))
    changed(lambda m: m.mask.logical_not_())
    changed(lambda m: m.float())
    changed(lambda m: m.register_buffer("more", torch.zeros(0)))
    changed(lambda m: m.register_buffer("turned", m.turned.reshape(2, 3)))
    changed(lambda m: m.register_buffer("none", torch.zeros(3, 0)))


def test_state_sha256_does_not_see_layout_or_order() -> None:
    model, other = State(), State()
    other.turned = other.turned.contiguous()
    assert state_sha256(model) == state_sha256(other)
    left = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    right = nn.ModuleDict({"b": left["b"], "a": left["a"]})
    assert state_sha256(left) == state_sha256(right)
    swapped = nn.ModuleDict({"a": left["b"], "b": left["a"]})
    assert state_sha256(left) != state_sha256(swapped)


def test_first_non_finite() -> None:
    model = State()
    assert first_non_finite(model) is None
    with torch.no_grad():
        model.turned[0, 0] = float("inf")
    assert first_non_finite(model) == "turned"
    with torch.no_grad():
        model.tiny[1] = float("nan")
    assert first_non_finite(model) == "tiny"


def test_peak_memory_sees_a_large_tensor() -> None:
    memory = PeakMemory(torch.device("cpu"))
    if memory.bytes is None:
        pytest.skip("resident memory cannot be read here (no /proc)")
    block = torch.ones(25_000_000)  # too large for memory that the process holds already
    del block
    assert memory.bytes >= 90_000_000
    assert PeakMemory(torch.device("cpu")).bytes < 20_000_000
