"""A stand-in for ERASURE: how it makes an unlearner from a configuration, and what that is given.

Written anew and tiny; only names, arguments and the order of calls are alike. :func:`checkout`
writes a folder that looks like theirs and has `Unlearner`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

PACKAGE = {
    "__init__.py": "",
    "core/__init__.py": "",
    "core/unlearner.py": "from erasure_stand_in import Unlearner\n",
}


def checkout(root: Path) -> Path:
    """Write a checkout and return its root."""
    for name, text in PACKAGE.items():
        path = root / "erasure" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def get_class(name: str) -> Any:
    """Import the module of a dotted path, then walk its attributes from the first package on."""
    first, *others = name.split(".")
    found = __import__(name.rpartition(".")[0])
    assert found.__name__ == first
    for other in others:
        found = getattr(found, other)
    return found


class Unlearner:
    def __init__(self, global_ctx, local_ctx):
        self.dataset, self.predictor = local_ctx.dataset, local_ctx.predictor
        self.device = self.predictor.device
        self.global_ctx, self.local = global_ctx, local_ctx
        self.local_config = local_ctx.config
        self.params = self.local_config.setdefault("parameters", {})
        self.check_configuration()
        self.init()

    def check_configuration(self):
        pass

    def init(self):
        pass

    def unlearn(self):
        return self.__unlearn__()


class Rows(Dataset):
    """Train and test rows together, as there."""

    def __init__(self, count: int = 40, classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(count, 6, generator=generator)
        self.labels = torch.arange(count) % classes
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        self.seen.append(at)
        return self.inputs[at], self.labels[at]


class Manager:
    """The data manager: partitions are positions in all rows; loaders drop partial batches."""

    def __init__(self, batch_size: int = 64) -> None:
        self.rows, self.batch_size, self.n_classes = Rows(), batch_size, 3
        self.partitions = {
            "all": self.rows,
            "forget": [31, 4, 8, 12, 20],
            "retain": [*range(5, 8), *range(13, 20), *range(21, 31)],
            "test": [*range(4), *range(32, 40)],
        }

    def get_loader_for(self, split_id, fold_fraction=None, drop_last=True):
        part = Subset(self.rows, self.partitions[split_id])
        return DataLoader(part, batch_size=self.batch_size, drop_last=drop_last), None


class Net(nn.Module):
    """(features, logits), the second of which is alike in width to trap whoever guesses."""

    def __init__(self, classes: int = 3, pair: bool = True) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(6, classes), nn.BatchNorm1d(classes)
        self.last_layer, self.pair = nn.Linear(classes, classes), pair

    def forward(self, inputs):
        features = torch.tanh(self.norm(self.body(inputs)))
        logits = self.last_layer(features)
        return (features, logits) if self.pair else logits


def predictor(pair: bool = True) -> SimpleNamespace:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(pair=pair)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.5, total_iters=4)
    return SimpleNamespace(model=model, device="cpu", optimizer=optimizer, epochs=7)


def make(parameters: dict[str, Any], **changes: Any) -> Any:
    """Return the unlearner that a configuration asks for."""
    config = {"class": "unsc_plugin.adapters.erasure.PluginUnlearner", "parameters": parameters}
    local = {"config": config, "dataset": Manager(), "predictor": predictor(), **changes}
    context = SimpleNamespace(config=SimpleNamespace(globals={"seed": 5}))
    return get_class(config["class"])(context, SimpleNamespace(**local))
