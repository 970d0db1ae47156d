from __future__ import annotations

import dataclasses
import io
import sys
from typing import Any, ClassVar

import pytest
import torch
from checks import METHODS, PRESETS, UNAVAILABLE, UNSEEDED, failures
from rich.console import Console
from torch import nn

from unsc_plugin import conformance, registry
from unsc_plugin.conformance import CHECKS, CheckResult, check_method
from unsc_plugin.conformance._toys import original, problem
from unsc_plugin.conformance._trial import trial_of
from unsc_plugin.errors import ConfigError, NotApplicable, UnknownName
from unsc_plugin.method import Scenario, Split, UnlearningMethod, UnlearningTask, option
from unsc_plugin.methods.finetune import Finetune
from unsc_plugin.registry import Named, Registry, register_method
from unsc_plugin.spec import MethodEntry, Paper

torch.set_num_threads(1)


# --------------------------------------------------------------------------- what is registered


LEFT_OUT = [
    pytest.param(name, marks=pytest.mark.skip(reason=f"{name} is unavailable: {why}"))
    for name, why in UNAVAILABLE.items()
]


@pytest.mark.parametrize("name", [*METHODS, *LEFT_OUT])
def test_every_registered_method_passes_the_whole_suite(name: str) -> None:
    assert failures(name) == {}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(name: str) -> None:
    checks = ["config", "changes", "losses", "finite", "access", "seed", "direction"]
    if name in UNSEEDED:
        checks.remove("seed")
    assert failures(name, checks=checks, quick=True) == {}


def test_the_quick_suite_skips_other_processes_and_nothing_else() -> None:
    results = check_method("finetune", quick=True)
    assert [result.id for result in results] == list(CHECKS)
    assert [result.id for result in results if result.skipped] == ["processes"]
    assert all(result.passed and result.detail for result in results)


# --------------------------------------------------------------------------- forms of a method


class Shrink(UnlearningMethod):
    """θ_head ← (1 − rate)·θ_head."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        rate: float = option(0.4, "share of the head that is removed", low=0, high=1)

    name = "shrink"
    needs = frozenset()
    scenarios = frozenset(Scenario)
    supports_weights = True
    deterministic = True

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.mul_(1 - self.config.rate)
        return model


def test_a_class_that_is_not_registered_is_checked() -> None:
    assert failures(Shrink) == {}


def test_a_decorated_function_is_checked_as_it_was_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_session", [])  # other tests see what is built in

    @register_method("sample_shrink")
    def shrunk(model: nn.Module, retain: Any, *, ctx: Any, rate: float = 0.1) -> nn.Module:
        """Fit the retain set, then shrink the head."""
        from unsc_plugin import engine

        engine.fit(model, ctx, [engine.Stage(retain, engine.cross_entropy)], epochs=1, lr=0.005)
        with torch.no_grad():
            model.head.weight.mul_(1 - rate)
        return model

    assert trial_of(shrunk).kind.name == "sample_shrink"
    assert failures(shrunk) == {}


def test_a_plain_function_is_checked_under_its_own_name() -> None:
    def scaled(model: nn.Module, forget: Any) -> nn.Module:
        """Do next to nothing."""
        list(forget)
        with torch.no_grad():
            model.head.bias.zero_()
        return model

    result = {r.id: r for r in check_method(scaled)}
    assert trial_of(scaled).kind.name == "scaled"
    assert not result["seed"].passed
    assert "no effect" in result["edges"].detail
    assert result["processes"].skipped
    assert "cannot import" in result["processes"].detail


def test_a_name_with_a_tag_uses_the_preset() -> None:
    trial = trial_of("finetune.paper")
    assert trial.method().config.lr == 0.01
    assert trial_of("neggrad.diverged").control
    assert trial_of(Finetune).named is not None


@pytest.mark.parametrize("wrong", [3, nn.Linear, nn.Linear(1, 1)])
def test_what_is_no_method_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="name, class or function"):
        check_method(wrong)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="finetune"):
        check_method("finetun")
    with pytest.raises(UnknownName, match="frozen"):
        check_method("finetune", checks=["frozn"])


# --------------------------------------------------------------------------- where it is tried


def only_on(*modalities: str, scenario: Scenario) -> type[UnlearningMethod]:
    """Return a method for some kinds of data and one scenario."""

    class Narrow(Shrink):
        """θ_head ← (1 − rate)·θ_head, on some data."""

        name = "narrow"
        scenarios = frozenset({scenario})

        def prepare(self, model: nn.Module, task: UnlearningTask) -> None:
            if task.modality not in modalities:
                raise NotApplicable(f"expected {modalities} data, got {task.modality}")

    return Narrow


@pytest.mark.parametrize(
    ("modality", "scenario", "home"),
    [
        ("image", Scenario.CLASS, "conv"),
        ("tabular", Scenario.WEIGHTED, "mlp"),
        ("text", Scenario.SUBCLASS, "bert"),
        ("image", Scenario.CORRECTION, "conv"),
        ("tabular", Scenario.SEQUENTIAL, "mlp"),
    ],
)
def test_a_method_is_tried_where_it_is_applicable(
    modality: str, scenario: Scenario, home: str
) -> None:
    kind = only_on(modality, scenario=scenario)
    assert trial_of(kind).home == home
    assert failures(kind, quick=modality != "text") == {}


def test_a_method_for_nothing_fails() -> None:
    kind = only_on(scenario=Scenario.CLASS)
    assert "not applicable to any" in failures(kind, quick=True)["changes"]


@pytest.mark.parametrize("net", ["conv", "mlp", "bert"])
def test_the_toy_backbones_learn_their_data(net: Any) -> None:
    model, data = original(net), problem(net)
    batch = data.train.gather(torch.arange(len(data.train)))
    with torch.no_grad():
        right = (model(**batch.inputs).argmax(1) == batch.labels).double().mean()
    assert right > 0.6
    assert model.head.out_features == data.num_classes


# --------------------------------------------------------------------------- expected failures


def test_a_declared_failure_passes_and_says_so() -> None:
    class Declared(Shrink):
        """θ_head ← (1 − rate)·θ_head."""

        deterministic = False
        expected_failures: ClassVar[dict[str, str]] = {"seed": "it draws nothing"}

    [result] = check_method(Declared, checks=["seed"])
    assert result.passed
    assert "it draws nothing" in result.detail


def test_a_declared_failure_that_passes_fails() -> None:
    class Declared(Shrink):
        """θ_head ← (1 − rate)·θ_head."""

        expected_failures: ClassVar[dict[str, str]] = {"seed": "it draws nothing"}

    [result] = check_method(Declared, checks=["seed"])
    assert not result.passed
    assert "declared to fail" in result.detail


def test_a_declared_failure_of_an_unknown_check_is_refused() -> None:
    class Declared(Shrink):
        """θ_head ← (1 − rate)·θ_head."""

        expected_failures: ClassVar[dict[str, str]] = {"sed": "it draws nothing"}

    with pytest.raises(UnknownName, match="seed"):
        check_method(Declared)


def test_any_exception_of_a_method_is_one_failed_check() -> None:
    class Breaks(Shrink):
        """θ_head ← (1 − rate)·θ_head."""

        def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
            raise ZeroDivisionError("by zero")

    assert failures(Breaks, checks=["changes", "docs"]) == {"changes": "ZeroDivisionError: by zero"}


# --------------------------------------------------------------------------- built-in entries


def built_in(kind: type[UnlearningMethod], paper: Paper | None) -> Registry:
    """Return a registry that holds `kind` as if it came with the package."""
    entry = MethodEntry(
        target=f"{kind.__module__}:{kind.__qualname__}",
        summary="",
        paper=paper,
        needs=tuple(kind.needs),
        scenarios=tuple(kind.scenarios),
        supports_weights=kind.supports_weights,
    )
    return Registry(
        methods={kind.name: Named("methods", kind.name, entry, "built-in", target=kind)}
    )


def test_a_built_in_method_needs_a_paper_a_file_of_its_name_and_no_second_class() -> None:
    paper = Paper(title="A paper", year=2024, arxiv="2404.13588")
    unpublished = failures(Shrink.name, registry=built_in(Shrink, None), checks=["docs"])
    assert "paper" in unpublished["docs"]
    elsewhere = failures(Shrink.name, registry=built_in(Shrink, paper), checks=["docs"])
    assert "test_conformance.py" in elsewhere["docs"]


def test_two_public_classes_in_a_built_in_file(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[Finetune.__module__]
    second = type("Second", (Finetune,), {"__module__": module.__name__})
    monkeypatch.setattr(module, "Second", second, raising=False)
    assert "one public method class" in failures("finetune", checks=["docs"])["docs"]


# --------------------------------------------------------------------------- what is shown


@pytest.fixture
def outcomes() -> list[CheckResult]:
    return [
        CheckResult("config", True, False, "5 settings", 0.1),
        CheckResult("mode", False, False, "left in [eval] mode", 0.2),
        CheckResult("processes", True, True, "skipped in quick mode", 0.0),
    ]


def test_the_badge_lists_ids_by_outcome(outcomes: list[CheckResult]) -> None:
    badge = conformance.badge(outcomes)
    assert badge["passed"] == ["config"]
    assert badge["failed"] == ["mode"]
    assert badge["skipped"] == ["processes"]
    assert badge["unsc_plugin"]


def test_the_table_shows_every_outcome_as_written(outcomes: list[CheckResult]) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(conformance.format_results(outcomes, "finetune"))
    text = console.export_text()
    for word in ("finetune", "passed", "FAILED", "left in [eval] mode", "skipped"):
        assert word in text


# --------------------------------------------------------------------------- needs


def test_a_forget_set_that_is_never_opened_is_found() -> None:
    class Claims(Shrink):
        """θ_head ← (1 − rate)·θ_head."""

        needs = frozenset({Split.VAL})

    assert "never read" in failures(Claims, checks=["no_test"])["no_test"]
