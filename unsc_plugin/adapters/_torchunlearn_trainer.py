"""A trainer of torchunlearn as a method: where the package is found, and how a run goes."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

from unsc_plugin.adapters import _foreign as foreign
from unsc_plugin.adapters._pairs import Pairs, Positional, only_input
from unsc_plugin.errors import (
    InputDomainError,
    MissingOptional,
    ScenarioNotSupported,
    UnsupportedDistributed,
)
from unsc_plugin.method import Scenario, Split, UnlearningMethod, UnlearningTask, option

NAME = "torchunlearn"
HOME = "TORCHUNLEARN_HOME"
TITLES = {Split.RETAIN: "Retain", Split.FORGET: "Forget"}
"""What their loaders are called."""

ONE_PROCESS = {"processes": "their loop knows one process; a run in several is refused"}
"""Check of the conformance suite that no trainer of theirs passes, with the reason."""

# --------------------------------------------------------------------------- the package


def package() -> ModuleType:
    """Return torchunlearn: the importable one if it holds trainers, else that of the checkout.

    Raises:
        MissingOptional: neither is there, or it lacks what itself imports.
    """
    found = _importable()
    if found is not None and _whole(found):
        return found
    home = os.environ.get(HOME)
    wheel = (
        f"the {NAME} that is installed holds no trainers, no metrics and no BenchmarkSuite, as the "
        "0.1.0 wheel of the package index; "
        if found is not None
        else f"expected {NAME} >= 0.1.1, found none; "
    )
    if not home:
        raise MissingOptional(
            f"{wheel}set {HOME} to a checkout of Harry24k/machine-unlearning-pytorch"
        )
    return _from_checkout(Path(home))


def _whole(module: ModuleType) -> bool:
    trainers = getattr(module, "unlearn", None)
    return hasattr(trainers, "Finetune") and hasattr(module, "BenchmarkSuite")


def _importable() -> ModuleType | None:
    try:
        return importlib.import_module(NAME)
    except ModuleNotFoundError as error:
        if error.name == NAME:
            return None
        raise _lacking(error, "the installed one") from error


def _from_checkout(root: Path) -> ModuleType:
    folder = root / NAME if (root / NAME).is_dir() else root
    if not (folder / "unlearn").exists():
        raise MissingOptional(
            f"{HOME}={root}: expected a checkout with {NAME}/unlearn, found none; clone "
            "Harry24k/machine-unlearning-pytorch there"
        )
    try:
        module = foreign.from_folder(NAME, folder)
    except ImportError as error:
        raise _lacking(error, str(root)) from error
    if not _whole(module):
        foreign.forget(NAME)
        raise MissingOptional(
            f"{HOME}={root}: expected trainers and a BenchmarkSuite ({NAME} >= 0.1.1), found none, "
            "as in 0.1.0; update the checkout"
        )
    return module


def _lacking(error: ImportError, where: str) -> MissingOptional:
    return MissingOptional(
        f"{NAME} ({where}) cannot be imported: {error}; install what it requires"
    )


# --------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Training:
    """What every trainer is set up with; the values of its README."""

    epochs: int = option(5, "passes", low=0, probe=2)
    lr: float = option(0.01, "learning rate of SGD", above=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, probe=0.3)
    weight_decay: float = option(5e-4, "weight decay of SGD", low=0, probe=0.1)


class ForeignTrainer(UnlearningMethod):
    """Base: θ ← what the trainer of torchunlearn of the name `trainer` makes of θ_O.

    It gets an SGD optimiser, our loaders merged as its own are (an epoch is as long as the longer
    loader, the shorter one starts over), and the classifier inside its `RobModel` with the identity
    as normalisation, for ours is inside. Fields of `Config` beyond :class:`Training` are the
    trainer's keywords. `one_class`: it takes the label of the one forgotten class; `attacks`: it
    searches adversarial pixels in [0, 1].
    """

    Config = Training
    config: Training
    needs = frozenset({Split.FORGET, Split.RETAIN})
    scenarios = frozenset({Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.SEQUENTIAL})
    trainer: ClassVar[str]
    expected_failures = MappingProxyType(ONE_PROCESS)
    one_class: ClassVar[bool] = False
    attacks: ClassVar[bool] = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        package()  # what is missing shows before anything is trained

    def prepare(self, model: nn.Module, task: UnlearningTask) -> dict[str, Any]:
        """Return the trainer's keywords, after a look at whether it can serve the request.

        Raises:
            NotApplicable: rows of several tensors.
            ScenarioNotSupported: not one whole class, for a trainer that needs its label.
            InputDomainError: a model that does not take pixels, for a trainer that attacks.
            UnsupportedDistributed: several processes.
        """
        if task.accelerator is not None and task.accelerator.num_processes > 1:
            raise UnsupportedDistributed(f"{self.name} runs in one process; start it without ranks")
        only_input(task.loader(next(iter(self.needs))).rows.gather([0]))
        if self.attacks and not getattr(model, "pixel_domain", True):
            raise InputDomainError(
                f"{self.name} searches pixels in [0, 1], the model takes others; give mean and std"
            )
        base = {item.name for item in dataclasses.fields(Training)}
        found = {key: v for key, v in dataclasses.asdict(self.config).items() if key not in base}
        if self.one_class:
            if len(task.forget_classes) != 1:
                raise ScenarioNotSupported(
                    f"{self.name} forgets one whole class, got {len(task.forget_classes)} of them "
                    "in the request; use another method"
                )
            found["omit_label"] = next(iter(task.forget_classes))
        return found

    @foreign.no_bytecode()  # trainers import on the way
    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model that the trainer has changed."""
        suite = package()
        pairs = {
            TITLES[split]: Pairs(task.loader(split)) for split in TITLES if split in self.needs
        }
        loaders: Any = merged(pairs) if "Retain" in pairs else pairs["Forget"]
        wrapped = suite.RobModel(
            Positional(model, next(iter(pairs.values())).key), n_classes=task.num_classes
        )
        trainer = getattr(suite.unlearn, self.trainer)(wrapped, **task.prepared)
        trainer.device = task.device  # one of them takes any GPU that is there
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=self.config.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )
        trainer.setup(
            optimizer=optimizer,
            n_epochs=self.config.epochs,
            scheduler=_AfterStep(task, trainer, model, len(loaders)),
            scheduler_type="Iter",
        )
        if hasattr(trainer, "compute_saliency_mask"):
            trainer.compute_saliency_mask(pairs["Forget"])
        trainer.fit(_UntilSpent(loaders, task), n_epochs=self.config.epochs, record_type=None)
        return model


@foreign.no_bytecode()
def merged(pairs: dict[str, Pairs]) -> Any:
    """Return their merged loaders."""
    return importlib.import_module(f"{NAME}.utils.data").MergedLoaders(pairs)


class _UntilSpent:
    """Loaders that end early once a limit of the budget is reached."""

    def __init__(self, loaders: Any, task: UnlearningTask) -> None:
        self.loaders, self.task = loaders, task

    def __len__(self) -> int:
        return len(self.loaders)

    def __iter__(self) -> Iterator[Any]:
        items = iter(self.loaders)
        while not self.task.spent:
            item = next(items, None)
            if item is None:
                return
            yield item


class _AfterStep:
    """Stands where their loop calls a scheduler after every step: counts, and tells who watches."""

    def __init__(self, task: UnlearningTask, trainer: Any, model: nn.Module, steps: int) -> None:
        self.task, self.trainer, self.model, self.steps = task, trainer, model, steps

    def step(self) -> None:
        """Count one step.

        Raises:
            DivergedError: the loss is not finite.
        """
        self.task.tick(float(self.trainer.dict_record["Cost"]))
        self.task.observe(self.model)
        if self.task.steps % self.steps == 0:
            self.task.epoch_done()
