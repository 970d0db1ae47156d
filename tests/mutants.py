"""Methods that are broken on purpose, one fault each, and the same methods with the fault repaired.

Every class below carries its fault where it says `self.broken`; its twin, made by :func:`mutant`,
is the same class with `broken = False` and the attributes given to the decorator.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from unsc_plugin import engine
from unsc_plugin.errors import NotApplicable
from unsc_plugin.method import (
    Batch,
    Progress,
    Scenario,
    Split,
    TrainingConfig,
    UnlearningMethod,
    UnlearningTask,
    option,
)

RETAIN, FORGET = frozenset({Split.RETAIN}), frozenset({Split.FORGET})
BOTH = RETAIN | FORGET


@dataclass(frozen=True)
class Mutant:
    """A broken method, its repaired twin, the check that must tell them apart, and what it says.

    `says` is a regular expression.
    """

    check: str
    says: str
    broken: type[UnlearningMethod]
    repaired: type[UnlearningMethod]


MUTANTS: list[Mutant] = []


def mutant(check: str, says: str, **repair: Any) -> Callable[[type], type]:
    """Register a broken class under the check that must fail it, and make its repaired twin."""

    def register(kind: type) -> type:
        name = f"{kind.__name__}Repaired"
        body = {"broken": False, "__doc__": kind.__doc__, "__module__": __name__} | repair
        twin = types.new_class(name, (kind,), {}, lambda names: names.update(body))
        setattr(sys.modules[__name__], name, twin)
        MUTANTS.append(Mutant(check, says, kind, twin))
        return kind

    return register


class Steps(UnlearningMethod):
    """Steps on :meth:`loss` over the retain set, by the engine."""

    broken: ClassVar[bool] = True
    name = "steps"
    needs = RETAIN
    scenarios = frozenset({Scenario.RANDOM, Scenario.WEIGHTED})
    Config: ClassVar[type] = TrainingConfig
    split: ClassVar[str] = "retain"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return engine.cross_entropy(model, batch)

    def fit(self, model: nn.Module, task: UnlearningTask, **more: Any) -> nn.Module:
        stage = engine.Stage(task.loader(self.split, batch_size=self.config.batch_size), self.loss)
        epochs = more.pop("epochs", self.config.passes_for(task.recipe, 1.0))
        engine.fit_config(model, task, [stage], self.config, epochs=epochs, **more)
        return model

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        return self.fit(model, task)


class Loop(Steps):
    """Ascent on the forget set in a loop of its own, the way a newcomer writes it."""

    needs = FORGET
    split = "forget"

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), lr=self.config.learning_rate(task.recipe))
        loader = task.loader(self.split)
        for _ in range(self.config.passes_for(task.recipe, 1.0)):
            for number, batch in enumerate(loader):
                if self.stops(task):
                    return model
                if self.uses(number):
                    self.step(model, batch, optimizer, task)
            task.epoch_done()
        return model

    def stops(self, task: UnlearningTask) -> bool:
        return task.spent

    def uses(self, number: int) -> bool:
        return True

    def step(
        self,
        model: nn.Module,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        task: UnlearningTask,
    ) -> None:
        optimizer.zero_grad()
        loss = self.loss(model, batch)
        (-loss).backward()
        optimizer.step()
        task.tick(float(loss.detach()))


class Distils(Steps):
    """KL to a copy of the original on the retain set, plus CE."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        self.teacher = self.copied(model)
        try:
            return self.fit(model, task)
        finally:
            del self.teacher

    def copied(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).eval()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = self.teacher(**batch.inputs).softmax(1)
        distance = functional.kl_div(
            self.input(model(**batch.inputs)), target, reduction="batchmean"
        )
        return distance + engine.cross_entropy(model, batch)

    def input(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(1)


# --------------------------------------------------------------------------- settings, docs


@dataclass(frozen=True)
class Frozen:
    scale: float = option(0.5, "factor on the head")


@dataclass
class Mutable:
    scale: float = option(0.5, "factor on the head")


@dataclass(frozen=True)
class Undocumented:
    scale: float = 0.5


class ScalesHead(UnlearningMethod):
    """θ_head ← scale · θ_head."""

    broken: ClassVar[bool] = True
    name = "scales_head"
    needs = frozenset()
    scenarios = frozenset({Scenario.RANDOM, Scenario.WEIGHTED})
    deterministic = True
    Config: ClassVar[type] = Frozen

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        with torch.no_grad():
            model.head.weight.mul_(self.config.scale)
        return model


@mutant("config", "not frozen", Config=Frozen)
class SettingsCanChange(ScalesHead):
    """The configuration is not frozen."""

    Config = Mutable


@mutant("docs", "without a meaning", Config=Frozen)
class SettingWithoutMeaning(ScalesHead):
    """Nobody can find out what the setting does."""

    Config = Undocumented


@mutant("docs", "no docstring", __doc__="θ_head ← scale · θ_head.")
class NoDocstring(ScalesHead):
    pass


@dataclass(frozen=True)
class WithAlpha(TrainingConfig):
    alpha: float = option(0.9, "share of the retain loss", low=0, high=1)


@mutant("config_matters", "alpha=")
class IgnoresAlpha(Steps):
    """The setting exists, is documented, and is never read."""

    Config = WithAlpha

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return (0.9 if self.broken else self.config.alpha) * super().loss(model, batch)


@mutant("identities", "epochs = 0 takes 5 steps")
class OnePassTooMany(Steps):
    """`for epoch in range(epochs + 1)`."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        epochs = self.config.passes_for(task.recipe, 1.0)
        return self.fit(model, task, epochs=epochs + 1 if self.broken else epochs)


@mutant("weights", "other ε give the same")
class IgnoresWeights(Steps):
    """Declares weights and takes the plain mean."""

    supports_weights = True

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.broken:
            return functional.cross_entropy(model(**batch.inputs), batch.labels)
        return super().loss(model, batch)


@mutant("weights", "than the two sets")
class WeightsAnotherWay(Steps):
    """Has a branch for weights that is another method than the one for sets."""

    supports_weights = True

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        decay = 0.1 if self.broken and task.weights is not None else None
        return self.fit(model, task, weight_decay=decay)


# --------------------------------------------------------------------------- integrity


@mutant("changes", "no parameter has changed")
class OptimisesTheCopy(Steps):
    """Steps on a copy and returns the other model."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        student = copy.deepcopy(model)
        self.fit(student, task)
        return model if self.broken else student


@mutant("input_untouched", "the data")
class RelabelsInPlace(Steps):
    """Overwrites the labels of the forget set that belongs to the caller."""

    needs = FORGET

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        rows = task.rows("forget")
        drawn = torch.randint(task.num_classes, rows.labels.shape, generator=task.generator)
        if self.broken:
            rows.labels.copy_(drawn)
        loader = task.loader_over(rows.relabelled(drawn), "random")
        stage = engine.Stage(loader, engine.cross_entropy)
        engine.fit_config(model, task, [stage], self.config, epochs=1)
        return model


@mutant("input_untouched", "the model's outputs")
class PatchesTheClass(Steps):
    """Replaces the forward pass of the class, and with it that of the caller's model."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        kind = type(model)
        before = kind.forward
        kind.forward = lambda self, **inputs: before(self, **inputs) * 0.5
        try:
            return self.fit(model, task)
        finally:
            if not self.broken:
                kind.forward = before


@mutant("teacher", "shares its storage")
class TeacherSharesStorage(Distils):
    """A shallow copy: the divergence is 0 at every step."""

    def copied(self, model: nn.Module) -> nn.Module:
        return copy.copy(model) if self.broken else super().copied(model)


@mutant("teacher", "statistics moved")
class TeacherInTrainMode(Distils):
    """The teacher's BatchNorm statistics follow the batches it is shown."""

    def copied(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).train() if self.broken else super().copied(model)


@mutant("teacher", "left in eval mode")
class StudentLeftInEval(Steps):
    """Evaluates between two steps and does not go back to train mode."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        def evaluate() -> None:
            model.eval()
            model.train(not self.broken)

        return self.fit(model, task, after_step=evaluate)


@mutant("losses", "no row of log-probabilities")
class DivergenceOfLogits(Distils):
    """kl_div wants log-probabilities and gets logits."""

    def input(self, logits: Tensor) -> Tensor:
        return logits if self.broken else super().input(logits)


@mutant("losses", "ends as 'ok'")
class SwallowsNan(Steps):
    """A loss that is not finite becomes 0, as in a trainer with a NaN filter."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)
        return torch.nan_to_num(loss) * 0 if self.broken and not loss.isfinite() else loss

    def fit(self, model: nn.Module, task: UnlearningTask, **more: Any) -> nn.Module:
        def clean() -> None:
            for parameter in model.parameters():
                if self.broken and parameter.grad is not None:
                    parameter.grad.nan_to_num_(0, 0, 0)

        unlearned = super().fit(model, task, before_step=clean, **more)
        for buffer in unlearned.buffers():
            if self.broken and buffer.is_floating_point():
                buffer.nan_to_num_()
        return unlearned


@mutant("finite", "outputs are not finite")
class OutputsOverflow(ScalesHead):
    """Finite parameters, infinite logits."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        with torch.no_grad():
            model.head.weight.fill_(3e38 if self.broken else 1.0)
        return model


@mutant("finite", "hooks are left")
class LeavesAHook(Steps):
    """The returned model still carries the hook that watched it."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        hook = model.head.register_forward_hook(lambda *_: None)
        unlearned = self.fit(model, task)
        if not self.broken:
            hook.remove()
        return unlearned


@mutant("frozen", "FrozenChanged")
class MasksGradientsOnly(Steps):
    """Gradients of the promised weights are zero; weight decay and momentum move them."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        names = {id(p) for p in model.head.parameters()}
        task.promise_frozen(n for n, p in model.named_parameters() if id(p) not in names)
        others = [p for p in model.parameters() if id(p) not in names]
        for parameter in others:
            parameter.requires_grad_(self.broken and parameter.requires_grad)
        return self.fit(model, task, before_step=lambda: self.mask(others))

    @staticmethod
    def mask(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()


@mutant("frozen", "was False on arrival")
class ThawsEverything(Steps):
    """Weights that arrive frozen are trained."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad or self.broken)
        return self.fit(model, task)


class Draws(ScalesHead):
    """θ ← θ + N(0, 0.1)."""

    deterministic = False

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * self.draw(parameter.shape, task))
        return model

    def draw(self, shape: torch.Size, task: UnlearningTask) -> Tensor:
        return torch.randn(shape, generator=task.generator)


@mutant("seed", "another seed gives the same")
class SetsTheGlobalSeed(Draws):
    """Every run of every seed draws the same numbers."""

    def draw(self, shape: torch.Size, task: UnlearningTask) -> Tensor:
        if not self.broken:
            return super().draw(shape, task)
        torch.manual_seed(0)
        return torch.randn(shape)


@mutant("seed", "same seed gives other weights")
class GeneratorOfItsOwn(Draws):
    """A generator that outlives the run: the second run draws other numbers."""

    own: ClassVar[torch.Generator] = torch.Generator()

    def draw(self, shape: torch.Size, task: UnlearningTask) -> Tensor:
        return torch.randn(shape, generator=self.own if self.broken else task.generator)


@mutant("globals", "anomaly mode")
class SwitchesAnomalyModeOn(Steps):
    """A debugging aid that stays on for the whole process."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        if self.broken:
            torch.autograd.set_detect_anomaly(True)
        return self.fit(model, task)


@mutant("globals", "after an exception: matmul precision")
class RestoresOnSuccessOnly(Steps):
    """The precision of products is put back, but not after an exception."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            self.fit(model, task)
        except BaseException:
            if not self.broken:
                torch.set_float32_matmul_precision(before)
            raise
        torch.set_float32_matmul_precision(before)
        return model


@mutant("no_leak", "still held")
class KeepsTheModel(Steps):
    """The method object holds the private copy of its last run."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        if self.broken:
            self.last = model
        return self.fit(model, task)


@mutant("no_leak", "bytes of tensors more")
class CachesForEver(Steps):
    """A list in the class grows with every run."""

    cache: ClassVar[list[Tensor]] = []

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        if self.broken:
            self.cache.append(torch.zeros(100))
        return self.fit(model, task)


# --------------------------------------------------------------------------- data and requests


@mutant("access", "rows of retain are read")
class AscendsOnAllData(Loop):
    """Declares the forget set and reads everything."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        if not self.broken:
            return super().run(model, task)
        rows = task._rows[Split.FORGET].merged(task._rows[Split.RETAIN])
        stage = engine.Stage(task.loader_over(rows, "all"), lambda m, b: -self.loss(m, b))
        engine.fit_config(model, task, [stage], self.config, epochs=1)
        return model


@mutant("access", "forget rows are never read")
class FirstBatchOnly(Loop):
    """Stops reading the forget set after one batch."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        loader = task.loader("forget")
        batches = itertools.islice(iter(loader), 1 if self.broken else len(loader))
        stage = engine.Stage(lambda _: batches, self.loss)
        engine.fit_config(model, task, [stage], self.config, epochs=1)
        return model


@mutant("access", "forget is in `needs`, but never", needs=RETAIN)
class NeverReadsForget(Steps):
    """Declares a split that it does not need."""

    needs = BOTH


@mutant("no_test", "validation rows are read")
class PeeksAtValidation(Steps):
    """Chooses by validation data that it has not declared."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        if self.broken:
            engine.predict(model, task._rows[Split.VAL])
        return self.fit(model, task)


@mutant("no_test", "unsc_plugin.data|past the task")
class LoadsDataItself(Steps):
    """Opens a data set past the task."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        if self.broken:
            importlib.import_module("unsc_plugin.data").load("digits", {})
        return self.fit(model, task)


@mutant("edges", "no effect on the result")
class SkipsTheFirstBatch(Loop):
    """A forget set of one batch is not used at all."""

    def uses(self, number: int) -> bool:
        return number > 0 or not self.broken


@mutant("edges", "two classes")
class ThreeClasses(Steps):
    """The number of classes is written down."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**batch.inputs)
        target = functional.one_hot(batch.labels, 3 if self.broken else logits.shape[1]).float()
        return functional.cross_entropy(logits, target)


@mutant("architectures", "mlp: KeyError")
class ImagesOnly(Steps):
    """Asks for pixels of a table."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if not self.broken:
            return super().loss(model, batch)
        logits = model(pixel_values=batch.inputs["pixel_values"])
        return functional.cross_entropy(logits, batch.labels)


@mutant("architectures", "raise it in prepare")
class RefusesTooLate(Steps):
    """Says that it is not applicable after the work has begun."""

    def prepare(self, model: nn.Module, task: UnlearningTask) -> None:
        if not self.broken:
            self.need_norms(model)

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        self.need_norms(model)
        return self.fit(model, task)

    @staticmethod
    def need_norms(model: nn.Module) -> None:
        if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            raise NotApplicable("expected BatchNorm, got none")


@mutant("device", "NVIDIA|CUDA|came back on")
class HardCodedCuda(Steps):
    """`.cuda()` whatever the task says."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        return self.fit(model.cuda() if self.broken else model.to(task.device), task)


@mutant("direction", "must rise")
class NegatesTooEarly(Loop):
    """Negates the gradients before there are any, and so descends."""

    def step(
        self,
        model: nn.Module,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        task: UnlearningTask,
    ) -> None:
        optimizer.zero_grad()
        loss = self.loss(model, batch)
        if self.broken:
            self.negate(model)
            loss.backward()
        else:
            loss.backward()
            self.negate(model)
        optimizer.step()
        task.tick(float(loss.detach()))

    @staticmethod
    def negate(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()


@mutant("utility", "fell from")
class CollapsesUtility(Steps):
    """Trains the retain set on the next class."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**batch.inputs)
        wrong = (batch.labels + 1) % logits.shape[1] if self.broken else batch.labels
        return functional.cross_entropy(logits, wrong)

    def fit(self, model: nn.Module, task: UnlearningTask, **more: Any) -> nn.Module:
        return super().fit(model, task, lr=0.05, epochs=4)


@mutant("processes", "is off by")
class MeanOfOneProcess(Steps):
    """Divides by the rows of this process; the sum over processes is then twice too large."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.broken:
            return functional.cross_entropy(model(**batch.inputs), batch.labels)
        return super().loss(model, batch)


# --------------------------------------------------------------------------- the loop


@mutant("timing", "callback is counted")
class CountsTheCallback(Loop):
    """Tells the callback itself, so that its time is counted as unlearning."""

    def step(
        self,
        model: nn.Module,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        task: UnlearningTask,
    ) -> None:
        if self.broken and task.progress is not None:
            task.progress(Progress(task.steps, task.epochs, 0.0, task.clock.seconds, False))
        super().step(model, batch, optimizer, task)


@mutant("timing", "work 0 reported")
class HidesItsWork(Steps):
    """Calls `forward`, past the hook that counts samples."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = (model.forward if self.broken else model)(**batch.inputs)
        return functional.cross_entropy(logits, batch.labels)


@mutant("budget", "status 'ok'")
class IgnoresTheBudget(Loop):
    """Never asks whether a limit is reached."""

    def stops(self, task: UnlearningTask) -> bool:
        return not self.broken and task.spent


@mutant("callback", "is swallowed")
class SwallowsTheInterrupt(Steps):
    """Catches everything, also what the callback raises to stop the run."""

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        try:
            return self.fit(model, task)
        except Exception:
            if not self.broken:
                raise
            return model


@mutant("callback", "none is counted")
class SaysNothing(Loop):
    """Takes steps and tells nobody."""

    def step(
        self,
        model: nn.Module,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        task: UnlearningTask,
    ) -> None:
        if not self.broken:
            return super().step(model, batch, optimizer, task)
        optimizer.zero_grad()
        (-self.loss(model, batch)).backward()
        return optimizer.step()
