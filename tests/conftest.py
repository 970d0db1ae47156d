"""What all tests share: one thread, no network, a cache of their own, and tiny nets and rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from unsc_plugin.method import UnlearningTask
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Recipe

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point every cache of the package at a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNSC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Let a test make an accelerator of another precision: its state is global to a process."""

    def reset() -> None:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    yield
    reset()


class Mlp(nn.Module):
    """Two linear layers without any normalisation; `features` and `head` as a Classifier has."""

    def __init__(self, dim: int = 6, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Linear(dim, width)
        self.head = nn.Linear(width, classes)

    def features(self, features: Tensor) -> Tensor:
        return torch.tanh(self.body(features))

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.features(features))


class Normed(Mlp):
    """The same with a BatchNorm layer and dropout in between."""

    def __init__(self, dim: int = 6, classes: int = 3, width: int = 8) -> None:
        super().__init__(dim, classes, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.3)

    def features(self, features: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.norm(self.body(features))))


def build(kind: type[nn.Module], seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a net whose weights depend on `seed` only; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().to(dtype)


def tabular(
    count: int = 22, seed: int = 0, dtype: torch.dtype = torch.float32, start: int = 0
) -> Rows:
    """Return `count` rows of 6 features and 3 classes, indexed from `start`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return Rows.of({"features": inputs}, labels, torch.arange(start, start + count))


@pytest.fixture
def mlp() -> Callable[..., nn.Module]:
    """Return `mlp(seed, dtype)`, a net without normalisation."""
    return lambda seed=0, dtype=torch.float32: build(Mlp, seed, dtype)


@pytest.fixture
def normed() -> Callable[..., nn.Module]:
    """Return `normed(seed, dtype)`, a net with BatchNorm and dropout."""
    return lambda seed=0, dtype=torch.float32: build(Normed, seed, dtype)


@pytest.fixture
def make_rows() -> Callable[..., Rows]:
    """Return `make_rows(count, seed, dtype, start)`, a small tabular split."""
    return tabular


@pytest.fixture
def make_task() -> Callable[..., UnlearningTask]:
    """Return `make_task(**changes)`: 22 rows, the first 6 to be forgotten, 5 for validation."""

    def make(**changes: object) -> UnlearningTask:
        rows = tabular(22)
        settings: dict[str, object] = {
            "forget": rows.subset(list(range(6))),
            "retain": rows.subset(list(range(6, 22))),
            "val": tabular(5, seed=1, start=100),
            "num_classes": 3,
            "recipe": Recipe(epochs=2, lr=0.05, batch_size=5),
            "fresh_model": lambda seed: build(Mlp, seed),
        }
        return UnlearningTask(**{**settings, **changes})  # type: ignore[arg-type]

    return make
