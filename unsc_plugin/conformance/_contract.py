"""Checks of what a method says about itself: settings, weights, epochs, documentation."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from unsc_plugin.conformance._toys import soft_weights, split
from unsc_plugin.conformance._trial import PREFERRED, Trial, expect, fault, skip
from unsc_plugin.errors import ConfigError, WeightsNotSupported
from unsc_plugin.method import UnlearningMethod, Weights, build_config
from unsc_plugin.spec import MethodEntry, Scenario

State = dict[str, Tensor]


def same(one: State, other: State) -> bool:
    """Return whether two states are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def config(trial: Trial) -> str:
    """Default-constructible, frozen, survives dict and YAML, unknown keys rejected."""
    kind = trial.kind.Config
    fields = dataclasses.fields(kind)
    default = build_config(kind, {})
    is_frozen = type(default).__dataclass_params__.frozen
    expect(is_frozen, "Config is not frozen; use @dataclass(frozen=True)")
    values = dataclasses.asdict(default)
    expect(build_config(kind, values) == default, "Config changes on its way through a dict")
    again = yaml.safe_load(yaml.safe_dump(values))
    expect(build_config(kind, again) == default, "Config changes on its way through YAML")
    unknown = f"{fields[0].name}x" if fields else "unheard_of"
    try:
        trial.kind(**{unknown: 1})
    except ConfigError as error:
        near = not fields or fields[0].name in str(error)
        expect(near, f"the error for {unknown!r} does not name {fields and fields[0].name!r}")
    else:
        fault(f"unknown setting {unknown!r} is accepted")
    return f"{len(fields)} settings"


def config_matters(trial: Trial) -> str:
    """Another value of any setting gives other weights, unless the setting says why not."""
    hints = typing.get_type_hints(trial.kind.Config)
    fields = [f for f in dataclasses.fields(trial.kind.Config) if not f.metadata.get("inert")]
    if not fields:
        skip("no settings")
    before = trial.run(method=trial.made(trial.defaults)).after
    silent = []
    for item in fields:
        tried = probe(item, hints[item.name], trial.defaults.get(item.name, item.default))
        method = trial.made({**trial.defaults, item.name: tried})
        if same(before, trial.run(method=method).after):
            silent.append(f"{item.name}={tried!r}")
    expect(not silent, f"no effect on the weights: {', '.join(silent)}")
    return f"{len(fields)} settings tried"


def probe(item: dataclasses.Field[Any], hint: Any, default: Any) -> Any:
    """Return another value than the default: the field's own probe, the next choice, or twice."""
    limits = item.metadata
    if limits.get("probe") is not None:
        return limits["probe"]
    choices = limits.get("choices") or _literals(hint)
    others = [choice for choice in choices if choice != default]
    if others:
        return others[0]
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        high = limits.get("high")
        larger = default * 2 if default else default + 1
        return larger if high is None or larger <= high else type(default)(default / 2)
    fault(f"no other value of {item.name!r} is known; give option(..., probe=...)")


def _literals(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def identities(trial: Trial) -> str:
    """No epochs, no training: epochs = 0 takes no step, and returns θ_O but for a one-off edit.

    A one-off edit is what a method does once, before it trains: a re-initialised layer, say.
    """
    names = {item.name for item in dataclasses.fields(trial.kind.Config)}
    if "epochs" not in names:
        skip("no setting 'epochs'")
    least = {"min_steps": 0} if "min_steps" in names else {}  # which would stretch one epoch
    run = trial.run(method=trial.method(epochs=0))
    taken = max(run.result.steps, run.journal.optimizer_steps)
    expect(taken == 0, f"epochs = 0 takes {taken} steps")
    expect(run.result.epochs == 0, f"epochs = 0 counts {run.result.epochs} epochs")
    once = trial.run(method=trial.method(epochs=1, **least))
    expect(once.result.epochs <= 1, f"epochs = 1 counts {once.result.epochs} epochs")
    if same(run.before, run.after):
        return "epochs = 0 is the identity"
    changed = sum(not torch.equal(run.after[name], run.before[name]) for name in run.before)
    return f"epochs = 0 leaves a one-off edit of {changed} tensors"


def weights(trial: Trial) -> str:
    """ε in {−1, 0} is the set form to the bit; soft ε changes the result, or is refused."""
    hard_equals_sets(trial)
    accepted = Scenario.WEIGHTED in trial.kind.scenarios
    scenario = Scenario.WEIGHTED if accepted else trial.scenario
    rows = trial.problem().train
    light, heavy = (
        trial.case(scenario=scenario, weights=soft_weights(rows, strength))
        for strength in (0.3, 0.8)
    )
    if not trial.kind.supports_weights:
        try:
            trial.run(light)
        except WeightsNotSupported:
            return "sets only; soft ε is refused"
        fault("supports_weights is False, but soft ε is accepted")
    differ = not same(trial.run(light).after, trial.run(heavy).after)
    reads = bool(trial.opens) and not trial.kind.identity
    expect(differ or not reads, "supports_weights is True, but other ε give the same weights")
    return "ε in {−1, 0} is the set form; soft ε matters" if reads else "no data is read"


def hard_equals_sets(trial: Trial) -> None:
    """Compare a run on sets with the run on their ε."""
    by_set = [s for s in PREFERRED if s in trial.kind.scenarios and s is not Scenario.WEIGHTED]
    if not by_set:
        return
    scenario, rows = by_set[0], trial.problem().train
    positions = split(rows, scenario)
    if scenario is Scenario.CLASS:
        rows = rows.subset(torch.cat(positions).sort().values)
        positions = split(rows, scenario)
    eps = torch.zeros(int(rows.index.max()) + 1, dtype=torch.float64)
    eps[rows.index[positions[0]]] = -1
    by_sets = trial.run(trial.case(scenario=scenario, train=rows, positions=positions)).after
    by_eps = trial.run(trial.case(scenario=scenario, train=rows, weights=Weights(eps))).after
    expect(same(by_sets, by_eps), "ε in {−1, 0} gives other weights than the two sets")


def docs(trial: Trial) -> str:
    """Docstring, a meaning for every setting; built-in: paper, file name = name, one class."""
    kind = trial.kind
    own = kind.__dict__.get("__doc__")
    expect(bool((own or "").strip()), "the method has no docstring; say what it does, with formula")
    fields = dataclasses.fields(kind.Config)
    silent = [item.name for item in fields if not item.metadata.get("meaning")]
    expect(not silent, f"settings without a meaning: {', '.join(silent)}; use option(...)")
    if trial.named is None or trial.named.origin != "built-in":
        return "docstring and settings"
    entry = trial.named.entry
    assert isinstance(entry, MethodEntry)
    paper = entry.paper
    linked = paper is not None and (paper.arxiv or paper.doi or paper.repo)
    expect(kind.control or bool(linked), "no link to a paper; add paper: {title, year, arxiv}")
    module = sys.modules[kind.__module__]
    if entry.target.startswith("unsc_plugin.adapters."):
        return "docstring, settings, paper; of another suite, its methods share a file"
    stem = Path(inspect.getsourcefile(kind) or "").stem
    expect(stem == kind.name, f"the file is {stem}.py, the method is {kind.name!r}")
    public = [name for name, item in vars(module).items() if _public_method(item, module.__name__)]
    expect(len(public) == 1, f"expected one public method class in {stem}.py, got {public}")
    return "docstring, settings, paper, file"


def _public_method(item: Any, module: str) -> bool:
    return (
        inspect.isclass(item)
        and issubclass(item, UnlearningMethod)
        and item.__module__ == module
        and not item.__name__.startswith("_")
    )
