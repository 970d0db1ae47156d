"""The method under test and what every check needs of it: instances, requests, recorded runs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import nn

from unsc_plugin import engine
from unsc_plugin.conformance._globals import differences, torch_state
from unsc_plugin.conformance._nets import Journal, journal
from unsc_plugin.conformance._toys import (
    FULL,
    NETS,
    Case,
    Net,
    Problem,
    original,
    problem,
    request,
    soft_weights,
)
from unsc_plugin.errors import ConfigError, NotApplicable, UnscError
from unsc_plugin.method import Result, UnlearningMethod, from_function
from unsc_plugin.registry import Named, Registry, decorated, load
from unsc_plugin.spec import MethodEntry, Scenario, Split

SEED = 5
PREFERRED = [Scenario.RANDOM, Scenario.CLASS, Scenario.SUBCLASS, Scenario.WEIGHTED]
PREFERRED += [Scenario.SEQUENTIAL, Scenario.CORRECTION]


class Fault(Exception):
    """The method does not do what the check asks for."""


class NotRun(Exception):
    """The check has no meaning for this method, or nothing here to run on."""


def fault(message: str) -> NoReturn:
    """End the check: the method does not do what it asks for.

    Raises:
        Fault: always.
    """
    raise Fault(message)


def skip(reason: str) -> NoReturn:
    """End the check: it has no meaning here.

    Raises:
        NotRun: always.
    """
    raise NotRun(reason)


def expect(truth: bool, message: str) -> None:
    """End the check with :func:`fault` unless `truth`."""
    if not truth:
        fault(message)


@dataclass(frozen=True)
class Run:
    """One recorded run on a case."""

    case: Case
    result: Result
    journal: Journal

    @property
    def before(self) -> dict[str, torch.Tensor]:
        """State of the original model."""
        return dict(self.case.model.state_dict())

    @property
    def after(self) -> dict[str, torch.Tensor]:
        """State of the unlearned model."""
        return dict(self.result.model.state_dict())


@dataclass
class Trial:
    """A method under test: its class, where it is registered, and where it is tried.

    `defaults` are settings of its registry entry, `preset` those of the tag in its name; `control`
    says that it is not meant to be of use; `source` is what :func:`check_method` was given;
    `disturbed` names the global state that some run did not put back.
    """

    kind: type[UnlearningMethod]
    defaults: dict[str, Any] = field(default_factory=dict)
    preset: dict[str, Any] = field(default_factory=dict)
    named: Named | None = None
    control: bool = False
    source: Any = None
    plugins: tuple[str, ...] = ()
    device: str = "cpu"
    seed: int = 0
    quick: bool = False
    disturbed: set[str] = field(default_factory=set)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the method is run with."""
        return {**self.defaults, **self.preset}

    @cached_property
    def opens(self) -> frozenset[Split]:
        """Splits that a run with the settings may open."""
        return self.method().opens

    @cached_property
    def accelerator(self) -> Any:
        """Accelerator of every task; None on the CPU, which needs none."""
        return None if self.device == "cpu" else engine.accelerator("auto")

    def method(self, **overrides: Any) -> UnlearningMethod:
        """Return a new instance."""
        return self.made({**self.settings, **overrides})

    def made(self, settings: dict[str, Any]) -> UnlearningMethod:
        """Return an instance with these settings and with the parts that they name."""
        return self._names.complete(self.kind(**settings))

    @cached_property
    def _names(self) -> Registry:
        return load(self.plugins)

    @property
    def scenario(self) -> Scenario:
        """The kind of request that the method is tried on."""
        return next(s for s in PREFERRED if s in self.kind.scenarios)

    @cached_property
    def home(self) -> Net:
        """The first toy backbone that the method is applicable to."""
        reasons = []
        for net in NETS:
            reason = self.refuses(net)
            if reason is None:
                return net
            reasons.append(f"{net}: {reason}")
        fault("not applicable to any backbone: " + "; ".join(reasons))

    def problem(self, net: Net | None = None, num_classes: int | None = None) -> Problem:
        """Return the toy problem of a backbone; with two groups where a model is corrected."""
        grouped = self.scenario is Scenario.CORRECTION
        return problem(net or self.home, num_classes or (2 if grouped else 3), grouped)

    def refuses(self, net: Net) -> str | None:
        """Return why the method is not applicable to a toy backbone, None if it is."""
        case = self.case(net)
        method = self.method()
        try:
            with self._watched():
                method.prepared(case.model, case.task, SEED)
        except NotApplicable as error:
            return str(error)
        return None

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Note every global state that the body does not put back; the first call shows most."""
        before = torch_state()
        try:
            yield
        finally:
            self.disturbed |= {*differences(before, torch_state())}

    def case(
        self,
        net: Net | None = None,
        *,
        num_classes: int | None = None,
        dead_stem: bool = False,
        **more: Any,
    ) -> Case:
        """Return a trained model and a request; `more` goes to :func:`_toys.request`."""
        chosen = self.problem(net, num_classes)
        scenario = more.pop("scenario", self.scenario)
        if scenario is Scenario.WEIGHTED and "positions" not in more:
            more.setdefault("weights", soft_weights(chosen.train, 0.6))
        model = original(
            chosen.net,
            chosen.num_classes,
            dead_stem=dead_stem,
            grouped=chosen.train.group is not None,
        )
        task = request(chosen, scenario, **{"accelerator": self.accelerator, **more})
        return Case(model.to(task.device), task, chosen)

    def run(
        self, case: Case | None = None, *, seed: int = SEED, method: UnlearningMethod | None = None
    ) -> Run:
        """Run the method on a case and record what happens."""
        case = case or self.case()
        method = method or self.method()
        with journal() as book, self._watched():
            result = method.unlearn(case.model, case.task, self.seed + seed)
        return Run(case, result, book)

    @cached_property
    def plain(self) -> Run:
        """The run with default settings on the home backbone that several checks look at."""
        return self.run()

    @cached_property
    def learned(self) -> Run:
        """A run with the full recipe, without BatchNorm where the method accepts that.

        Running statistics that follow other data move the forget loss either way.
        """
        net: Net = "mlp" if self.refuses("mlp") is None else self.home
        return self.run(self.case(net, recipe=FULL))


# --------------------------------------------------------------------------- finding the method


def trial_of(method: Any, registry: Registry | None = None, **where: Any) -> Trial:
    """Return the trial of a registered name (with or without tag), a class or a function.

    A decorated function is tried as it was registered, another one under its own name.

    Raises:
        UnknownName: no method of that name.
        ConfigError: neither a name, nor a method class, nor a function.
    """
    registry = registry or load()
    if isinstance(method, str):
        named, tag = registry.method(method)
        return _registered(method, registry, named, tag, method, where)
    if inspect.isfunction(method):
        return _of_class(_class_of(method), registry, method, where)
    if not (inspect.isclass(method) and issubclass(method, UnlearningMethod)):
        raise ConfigError(f"expected a method's name, class or function, got {method!r}")
    return _of_class(method, registry, method, where)


def _registered(
    name: str, registry: Registry, named: Named, tag: str | None, source: Any, where: dict[str, Any]
) -> Trial:
    kind, entry = registry.method_class(name), named.entry
    assert isinstance(entry, MethodEntry)
    preset = entry.presets[tag] if tag else None
    return Trial(
        kind,
        dict(entry.defaults),
        dict(preset.args) if preset else {},
        named,
        kind.control or (preset is not None and preset.source == "control"),
        source,
        registry.plugins,
        **where,
    )


def _of_class(
    kind: type[UnlearningMethod], registry: Registry, source: Any, where: dict[str, Any]
) -> Trial:
    try:
        if registry.method_class(kind.name) is kind:
            return _registered(
                kind.name, registry, registry.methods[kind.name], None, source, where
            )
    except UnscError:
        pass  # not registered, or another method is under that name: tried on its own
    return Trial(kind, control=kind.control, source=source, **where)


def _class_of(function: Callable[..., nn.Module]) -> type[UnlearningMethod]:
    kind = decorated(function)
    if kind is not function:
        return kind  # type: ignore[no-any-return]
    scenarios = frozenset(Scenario) - {Scenario.WEIGHTED, Scenario.CORRECTION}
    return from_function(function, function.__name__, scenarios=scenarios)
