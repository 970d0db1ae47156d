"""The one-liner: unlearn from the user's own model and data, and look at what came of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from unsc_plugin import _notebook, engine, evaluation, forget, models, own_data, registry
from unsc_plugin._notebook import Measured, Sheet
from unsc_plugin.data import Splits
from unsc_plugin.errors import ConfigError, ForgetSetError, ScenarioNotSupported
from unsc_plugin.evaluation import Evaluation
from unsc_plugin.method import Budget, Progress, Result, UnlearningMethod, Weights
from unsc_plugin.models import Classifier
from unsc_plugin.own_data import Collate, OwnData
from unsc_plugin.rows import Rows
from unsc_plugin.spec import (
    DEFAULT_RECIPE,
    DataInfo,
    EvaluationSpec,
    ForgetSpec,
    Modality,
    Recipe,
    Scenario,
    parse_yaml,
)

if TYPE_CHECKING:
    import plotly.graph_objects as plotly

__all__ = ["Measured", "Unlearned", "unlearn"]


@dataclass(frozen=True, eq=False)
class Unlearned:
    """What :func:`unlearn` gives back; prints as a table, also in a notebook.

    Attributes:
        model: the unlearned model, of the type that was given; the given one is as it was.
        result: cost, status (`ok`, `budget`, `diverged`), steps, losses, notes of the method.
        method: the method with its configuration.
        before: split -> numbers of the given model; where classes are forgotten, test rows of
            these apart (`test_retained`, `test_forgotten`).
        after: split -> the same of the unlearned model.
        seed: the seed of everything that was drawn.
        scenario: the kind of request.
    """

    model: nn.Module
    result: Result
    method: UnlearningMethod
    before: Mapping[str, Measured]
    after: Mapping[str, Measured]
    seed: int
    scenario: Scenario
    _original: Classifier = field(repr=False)
    _data: OwnData = field(repr=False)
    _recipe: Recipe = field(repr=False)
    _device: Any = field(repr=False, default=None)

    @property
    def classifier(self) -> Classifier:
        """The unlearned model as a :class:`~unsc_plugin.models.Classifier`."""
        found: Any = self.result.model
        return found  # type: ignore[no-any-return]

    @property
    def ok(self) -> bool:
        """Whether the run ended as it should; a diverged one gives the original model back."""
        return self.result.status == "ok"

    def evaluate(
        self,
        *,
        test: Any = None,
        retrained: nn.Module | Sequence[nn.Module] = (),
        relearn: bool = False,
        label_key: str | None = None,
    ) -> Evaluation:
        """Measure as benchmarks do: accuracies, membership attacks, distance to retrained models.

        Args:
            test: test data, unless :func:`unlearn` was given some.
            retrained: models trained without the forget set, of the same type as the given model;
                the numbers that compare with retraining are absent without.
            relearn: also train a copy on the retained rows, to see whether the forgotten come back.
            label_key: as in :func:`unlearn`, for `test`.

        Raises:
            ConfigError: no test data, or a request without rows to forget.
            DivergedError: a logit is not finite.
        """
        parts = dict(self._data.parts)
        if test is not None:
            read = own_data.rows_of(
                {"test": test}, modality=self._data.modality, label_key=label_key
            )
            parts["test"] = read.parts["test"]
        if "test" not in parts:
            raise ConfigError("evaluate: expected test rows, got none; give test=...")
        if not {"forget", "retain"} <= parts.keys():
            raise ConfigError("evaluate: expected rows to forget and rows to keep; give both")
        frame = self._frame(parts)
        pool = [retrained] if isinstance(retrained, nn.Module) else list(retrained)
        own, *others = (
            evaluation.observe(
                model, frame, relearn_seed=self.seed, device=self._device, relearn=relearn
            )
            for model in (self.classifier, *(self._like(one) for one in pool))
        )
        return evaluation.evaluate(own, others, frame, groups=("core", "mia"))

    def _frame(self, parts: Mapping[str, Rows]) -> evaluation.Frame:
        train = parts["forget"].merged(parts["retain"])
        gone = torch.unique(parts["forget"].labels).tolist()
        by_class = self.scenario == Scenario.CLASS
        spec = (
            ForgetSpec(kind="class", classes=tuple(gone))
            if by_class
            else ForgetSpec(kind="indices", indices=tuple(parts["forget"].index.tolist()))
        )
        info = DataInfo(
            name="own",
            modality=self._data.modality,
            num_classes=self._original.num_classes,
            input_shape=tuple(train.gather([0]).inputs[self._data.input_key].shape[1:]),
            labels_sha256="",
        )
        request = forget.select(spec, train, seed=self.seed, info=info)
        splits = Splits(train, parts.get("val", train.subset([])), parts["test"], info)
        return evaluation.frame(splits, request, self._recipe, EvaluationSpec(), seed=self.seed)

    def _like(self, model: nn.Module) -> nn.Module:
        if isinstance(model, Classifier):
            return model
        twin = copy.deepcopy(self._original)
        twin.backbone = model
        return twin

    def save(self, path: str | Path) -> None:
        """Write the weights of :attr:`model` to a safetensors file, never overwriting one.

        Raises:
            ConfigError: the file exists.
        """
        path = Path(path)
        if path.exists():
            raise ConfigError(f"{path} exists and is never overwritten; give another name")
        models.save_weights(self.model, path)

    def plot(self, kind: str = "accuracy") -> plotly.Figure:
        """Return a figure: `accuracy` per split before and after, or `confidence` of the rows.

        Raises:
            ConfigError: another kind.
        """
        return _notebook.figure(self._sheet, kind)

    @property
    def _sheet(self) -> Sheet:
        result = self.result
        seconds = result.seconds_prepare + result.seconds_unlearn
        status = result.status if result.reason is None else f"{result.status} ({result.reason})"
        kept = "; the model is the original" if result.status == "diverged" else ""
        return Sheet(
            title=f"{self.method.name}, {self.scenario} request, seed {self.seed}",
            before=self.before,
            after=self.after,
            closing=f"{status}{kept}: {result.steps} steps, {seconds:.2f} s, "
            f"{result.work:,} rows of work",
            notes=_notes(result.stats),
        )

    def __repr__(self) -> str:
        return _notebook.text(self._sheet)

    def __rich__(self) -> Any:
        return _notebook.table(self._sheet)

    def _repr_html_(self) -> str:
        return _notebook.html(self._sheet)


def _notes(stats: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a user must know beside the numbers: where a plan ended, warnings."""
    notes = []
    plan = stats.get("plan")
    if isinstance(plan, Mapping):
        missing = max(plan.get("shortfall") or [0.0])
        lacking = f"; {100 * missing:.0f} % of a gap is missing" if missing > 0 else ""
        notes.append(f"plan stopped: {plan['stop']}{lacking}")
        notes += [f"warning: {plan['warning']}"] if "warning" in plan else []
    return (*notes, *(f"warning: {text}" for text in stats.get("warnings", [])))


def unlearn(
    model: nn.Module,
    *,
    forget: Any = None,
    retain: Any = None,
    val: Any = None,
    test: Any = None,
    method: str | UnlearningMethod = "unsc",
    seed: int = 0,
    recipe: Recipe | Mapping[str, Any] | None = None,
    scenario: Scenario | str | None = None,
    weights: Weights | None = None,
    fresh_model: Callable[[int], nn.Module] | None = None,
    num_classes: int | None = None,
    modality: Modality | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pixel_domain: bool = False,
    head: str | nn.Module | None = None,
    output: int | None = None,
    label_key: str | None = None,
    collate: Collate | None = None,
    in_memory: bool | None = None,
    device: str = "auto",
    budget: Budget | None = None,
    progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Unlearned:
    """Unlearn rows from the user's own model and return the unlearned copy, measured.

    Args:
        model: any module that gives logits (B, K), or a tuple or Hugging Face output with them.
        forget: what to forget: a dataset, a loader, a pair (inputs, labels); see
            :func:`own_data.rows_of`.
        retain: the rest of the training data.
        val: rows that some methods select on.
        test: never seen by the method; measured before and after.
        method: a registered name, also with a preset (`"instance_wise.continual"`), or a method.
        seed: seed of everything that is drawn.
        recipe: how the model was trained (learning rate, epochs, batch size, ...): fields of
            :class:`spec.Recipe`. Methods take their learning rate and length from it.
        scenario: the kind of request; default `class` if no retained row has a forgotten label,
            `random` otherwise, `correction` without rows to forget.
        weights: per-sample weights ε over the rows of forget and retain, instead of two sets.
        fresh_model: seed -> an untrained model of the same type, for methods that train from the
            start; default: the layers' own initialisation.
        num_classes: K; default: the width of the logits.
        modality: image, text or tabular; default: read off the inputs.
        mean: per channel, what the data were normalised with; attacks then work on pixels.
        std: see `mean`.
        pixel_domain: the model takes pixels in [0, 1] and normalises them itself.
        head: the final layer or its path, where it is not the last one with K outputs.
        output: which item of a tuple the logits are.
        label_key: the key of the labels in named items.
        collate: makes a batch of a list of items.
        in_memory: read datasets once, or decode at every access; default: once if they fit.
        device: auto, cpu, cuda or mps.
        budget: upper limits of steps, epochs or seconds.
        progress: called after every step.
        **settings: the method's own settings (`unsc show METHOD` lists them).

    Raises:
        ForgetSetError: nothing to forget.
        UnscError: any other input that does not fit: what was expected, what came, what to do.

    >>> inputs, labels = torch.randn(40, 4), torch.arange(40) % 2
    >>> net = nn.Linear(4, 2)
    >>> done = unlearn(net, forget=(inputs[:4], labels[:4]), retain=(inputs[4:], labels[4:]),
    ...                method="finetune", device="cpu")
    >>> done.result.status, type(done.model).__name__
    ('ok', 'Linear')
    """
    given = {"forget": forget, "retain": retain, "val": val, "test": test}
    splits = {name: part for name, part in given.items() if part is not None}
    if not splits.keys() & {"forget", "retain"}:
        raise ForgetSetError("expected rows to forget, got none; give forget=... (and retain=...)")
    restore = (mean, std) if mean is not None and std is not None else None
    data = own_data.rows_of(
        splits,
        modality=modality,
        label_key=label_key,
        collate=collate,
        in_memory=in_memory,
        restore=restore,
    )
    original = own_data.classifier_of(
        model,
        data,
        num_classes=num_classes,
        mean=mean,
        std=std,
        pixel_domain=pixel_domain,
        head=head,
        output=output,
    )
    made = _method(method, settings)
    accelerator = engine.accelerator(device)  # type: ignore[arg-type]
    found = _recipe(recipe)
    kind = _scenario(made, scenario, weights, data)
    task = own_data.task_of(
        data,
        num_classes=original.num_classes,
        fresh_model=_fresh(original, fresh_model),
        recipe=found,
        scenario=kind,
        weights=weights,
        accelerator=accelerator,
        budget=budget,
        progress=progress,
    )
    result = made.unlearn(original, task, seed)
    shown = _shown(data, kind)
    unlearned: Any = result.model.to(next(original.parameters()).device)
    return Unlearned(
        model=unlearned if isinstance(model, Classifier) else unlearned.backbone,
        result=result,
        method=made,
        before=_measured(original, shown, accelerator),
        after=_measured(unlearned, shown, accelerator),
        seed=seed,
        scenario=kind,
        _original=original,
        _data=data,
        _recipe=found,
        _device=accelerator,
    )


def _method(method: str | UnlearningMethod, settings: Mapping[str, Any]) -> UnlearningMethod:
    if isinstance(method, str):
        return registry.create(method, **settings)
    if settings:
        raise ConfigError(
            f"settings {', '.join(settings)}: expected them inside the method that was given; "
            "give its name instead"
        )
    return method


def _recipe(recipe: Recipe | Mapping[str, Any] | None) -> Recipe:
    if recipe is None or isinstance(recipe, Recipe):
        return recipe or DEFAULT_RECIPE
    return parse_yaml(json.dumps(dict(recipe)), "recipe").validate(Recipe)


def _scenario(
    method: UnlearningMethod, asked: Scenario | str | None, weights: Any, data: OwnData
) -> Scenario:
    """Return the kind of request; whole classes may also be served as rows.

    Raises:
        ScenarioNotSupported: an unknown kind, or one that the method does not know.
    """
    if asked is not None:
        try:
            return Scenario(asked)
        except ValueError:
            raise ScenarioNotSupported(
                f"scenario: expected one of {', '.join(Scenario)}, got {asked!r}"
            ) from None
    if weights is not None:
        return Scenario.WEIGHTED
    kind = own_data.scenario_of(data.get("forget"), data.get("retain"))
    serves_rows = kind == Scenario.CLASS and Scenario.CLASS not in method.scenarios
    return Scenario.RANDOM if serves_rows and Scenario.RANDOM in method.scenarios else kind


def _fresh(
    original: Classifier, fresh_model: Callable[[int], nn.Module] | None
) -> Callable[[int], nn.Module]:
    if fresh_model is None:
        return own_data.fresh_from(original)

    def wrapped(seed: int) -> nn.Module:
        made = fresh_model(seed)
        if isinstance(made, Classifier):
            return made
        twin = copy.deepcopy(original)
        twin.backbone = made
        return twin

    return wrapped


def _shown(data: OwnData, kind: Scenario) -> dict[str, Rows]:
    """Return what is measured; where classes are forgotten, the test rows of these apart."""
    parts = dict(data.parts)
    if kind == Scenario.CLASS and "test" in parts and "forget" in parts:
        test = parts.pop("test")
        gone = torch.isin(test.labels, parts["forget"].labels)
        apart = {"test_retained": test.subset(~gone), "test_forgotten": test.subset(gone)}
        parts |= {name: rows for name, rows in apart.items() if len(rows)}
    return parts


def _measured(model: nn.Module, parts: Mapping[str, Rows], device: Any) -> dict[str, Measured]:
    model = copy.deepcopy(model).to(device.device)  # the user's own stays where it is
    found = {}
    for name, rows in parts.items():
        seen = engine.predict(model, rows, device=device)
        own = seen.logits.log_softmax(dim=1).gather(1, seen.labels[:, None])[:, 0]
        found[name] = Measured(
            n=len(rows),
            accuracy=float((seen.logits.argmax(dim=1) == seen.labels).double().mean()),
            loss=float(functional.cross_entropy(seen.logits.double(), seen.labels)),
            confidence=own.exp().numpy(),
        )
    return found
