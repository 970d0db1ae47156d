"""A stand-in for torchunlearn 0.1.1: the members that our adapter touches, written anew and tiny.

Only shapes are alike (names, arguments, the order of calls); the losses are made up. `journal`
holds what happened. :func:`checkout` writes a folder that looks like theirs and has these members.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

journal: list[tuple] = []

PACKAGE = {
    "__init__.py": (
        "from torchunlearn_stand_in import BenchmarkSuite, RobModel\n"
        "from torchunlearn import unlearn\n"
    ),
    "unlearn/__init__.py": (
        "from torchunlearn_stand_in import ARU, MUMis, NegGrad, RFE, SalUn, Trainer as Finetune\n"
    ),
    "utils/__init__.py": "",
    "utils/data.py": "from torchunlearn_stand_in import MergedLoaders\n",
}
BEFORE_TRAINERS = {"__init__.py": "", "unlearn/__init__.py": ""}
"""What the wheel of 0.1.0 amounts to."""


def checkout(root: Path, files: dict[str, str] = PACKAGE) -> Path:
    """Write a checkout and return its root."""
    for name, text in files.items():
        path = root / "torchunlearn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


class RobModel(nn.Module):
    def __init__(self, model, n_classes, normalization_used=None, device=None):
        super().__init__()
        assert isinstance(n_classes, int)
        self.model = model
        self.register_buffer("n_classes", torch.tensor(n_classes))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    def forward(self, inputs):
        return self.model(inputs)


class MergedLoaders:
    def __init__(self, loaders):
        self.loaders = loaders
        self.length = max(map(len, loaders.values()))

    def __len__(self):
        return self.length

    def __iter__(self):
        repeated = [itertools.cycle(loader) for loader in self.loaders.values()]
        for items in itertools.islice(zip(*repeated, strict=False), self.length):
            yield dict(zip(self.loaders, items, strict=True))


class Trainer:
    def __init__(self, rmodel, device=None):
        self.rmodel, self.device = rmodel, device
        self.dict_record = {}

    def setup(self, optimizer, scheduler=None, scheduler_type=None, n_epochs=None, n_iters=None):
        journal.append(("setup", optimizer, n_epochs))
        self.optimizer, self.scheduler = optimizer, scheduler
        assert scheduler_type == "Iter"

    def fit(self, train_loaders, n_epochs, n_iters=None, record_type="Epoch"):
        journal.append(("fit", record_type, n_epochs))
        for _ in range(n_epochs):
            for number, data in enumerate(train_loaders, 1):
                self.rmodel.train()
                cost = self.calculate_cost(data)
                self.dict_record = {"Cost": cost.item()}
                self.optimizer.zero_grad()
                cost.backward()
                self.optimizer.step()
                self.scheduler.step()
                if number == len(train_loaders):
                    break

    def loss(self, data):
        inputs, labels = data
        return functional.cross_entropy(self.rmodel(inputs), labels)

    def calculate_cost(self, data):
        return self.loss(data["Retain"])


class NegGrad(Trainer):
    def __init__(self, rmodel, retain_lambda=0.0, l1_penalty_lambda=0.0):
        super().__init__(rmodel)
        self.share = retain_lambda

    def calculate_cost(self, data):
        journal.append(("rows", len(data["Retain"][0]), len(data["Forget"][0])))
        return self.share * self.loss(data["Retain"]) - (1 - self.share) * self.loss(data["Forget"])


class SalUn(Trainer):
    def __init__(
        self,
        rmodel,
        saliency_threshold=0.5,
        retain_lambda=1.0,
        forget_lambda=1.0,
        enforce_frozen=True,
    ):
        super().__init__(rmodel)
        self.threshold, self.mask = saliency_threshold, None

    def compute_saliency_mask(self, forget_loader):
        self.mask = [len(labels) for _, labels in forget_loader]
        journal.append(("mask", self.mask))

    def calculate_cost(self, data):
        assert self.mask is not None
        return self.loss(data["Retain"]) - self.threshold * self.loss(data["Forget"])


class ARU(Trainer):
    def __init__(
        self,
        rmodel,
        margin=1.0,
        eps=0.05,
        steps=50,
        omit_label=1,
        batch_size=128,
        random_start=True,
    ):
        super().__init__(rmodel)
        self.device = "cuda"  # theirs takes any GPU that is there
        journal.append(("omit_label", omit_label))

    def calculate_cost(self, data):
        assert str(self.device) == "cpu"
        return self.loss(data["Retain"])


class MUMis(Trainer):
    def __init__(self, rmodel, other_lambda=1.0, n_other=1):
        super().__init__(rmodel)

    def calculate_cost(self, data):
        inputs, _ = data  # the forget loader alone, no dictionary
        journal.append(("forget", len(inputs)))
        return self.rmodel(inputs).square().mean()


class RFE(Trainer):
    def __init__(
        self,
        rmodel,
        phase1_steps=100,
        constraint_tol=0.05,
        lam_init=1.0,
        lam_lr=0.05,
        rho=1.0,
        w2_lambda=1.0,
    ):
        super().__init__(rmodel)

    def calculate_cost(self, data):
        return self.loss(data["Retain"]) * float("nan")


class BenchmarkSuite:
    """Accuracies in per cent; one number of theirs fails and is dropped, as it may be there."""

    def __init__(
        self, train_loaders, test_loaders, retrained_model=None, n_limit=1000, device=None
    ):
        self.loaders = {**train_loaders, **test_loaders}
        self.retrained_model, self.n_limit = retrained_model, n_limit
        self.results = {}

    def add(self, name, model, verbose=True):
        if verbose:
            print(name)
        parts = {"RA": "Retain", "FA": "Forget", "TA": "Test"}
        found = {key: self.accuracy(model, self.loaders[part]) for key, part in parts.items()}
        if self.retrained_model is not None:
            own = self.accuracy(self.retrained_model, self.loaders["Retain"])
            found["UG"] = abs(own - found["RA"])
        found["MIA_Efficiency"] = 0.25
        torch.rand(1)  # theirs draws from the global generator, too
        self.results[name] = found
        return found

    @torch.no_grad()
    def accuracy(self, model, loader):
        model.eval()
        right = total = 0
        for inputs, labels in loader:
            if self.n_limit and total >= self.n_limit:
                break
            right += int((model(inputs).argmax(dim=1) == labels).sum())
            total += len(labels)
        return 100.0 * right / total
