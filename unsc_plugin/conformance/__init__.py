"""The conformance suite: what every method is held to, for our tests, `unsc check` and packages.

One call checks a method, `pytest --unsc-method NAME` makes one test of every check, and a package
may parametrise its own tests over the same table::

    @pytest.mark.parametrize("check", conformance.CHECKS)
    def test_contract(check):
        [result] = conformance.check_method(Mine, checks=[check])
        assert result.passed, result.detail

Nothing is read and nothing is downloaded: the data are drawn from fixed seeds. A method may declare
`expected_failures = {check: reason}`; a declared check that passes after all fails.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

import unsc_plugin
from unsc_plugin.conformance import _contract, _integrity, _loop, _requests
from unsc_plugin.conformance._trial import Fault, NotRun, Trial, trial_of
from unsc_plugin.errors import UnknownName
from unsc_plugin.registry import Registry

__all__ = [
    "CHECKS",
    "CheckResult",
    "Trial",
    "badge",
    "check_method",
    "format_results",
    "run_check",
    "trial_of",
]

CHECKS: dict[str, Callable[[Trial], str]] = {
    "config": _contract.config,
    "config_matters": _contract.config_matters,
    "changes": _integrity.changes,
    "input_untouched": _integrity.input_untouched,
    "teacher": _integrity.teacher,
    "losses": _integrity.losses,
    "finite": _integrity.finite,
    "frozen": _integrity.frozen,
    "access": _requests.access,
    "no_test": _requests.no_test,
    "seed": _integrity.seed,
    "globals": _integrity.global_state,
    "edges": _requests.edges,
    "architectures": _requests.architectures,
    "device": _requests.device,
    "timing": _loop.timing,
    "budget": _loop.budget,
    "callback": _loop.callback,
    "direction": _requests.direction,
    "utility": _requests.utility,
    "processes": _requests.processes,
    "weights": _contract.weights,
    "identities": _contract.identities,
    "docs": _contract.docs,
    "no_leak": _integrity.no_leak,
}
"""Every check by its id: a function of a trial that returns what it found, or raises."""


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check. A skipped check counts as passed; `detail` says why it was skipped."""

    id: str
    passed: bool
    skipped: bool
    detail: str
    seconds: float


def check_method(
    method: Any,
    *,
    checks: Iterable[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    quick: bool = False,
    registry: Registry | None = None,
) -> list[CheckResult]:
    """Run the checks on a method, in the order of :data:`CHECKS`, and return their outcomes.

    `method` is a registered name (`name` or `name.tag`), a method class, or a decorated function.
    `checks` are ids, all by default; `device` is `cpu` or `cuda`; `quick` leaves out what takes
    longest: several processes, transformers, and some sizes of the forget set.

    Raises:
        UnknownName: no such method or check, also in the method's `expected_failures`.
        ConfigError: neither a name, nor a method class, nor a function.

    >>> [result] = check_method("original", checks=["changes"])
    >>> result.passed, result.detail
    (True, 'identity: nothing changed, as declared')
    """
    trial = trial_of(method, registry, device=device, seed=seed, quick=quick)
    wanted = list(CHECKS) if checks is None else list(checks)
    for name in wanted:
        _known(name)
    return [run_check(name, trial) for name in CHECKS if name in wanted]


def run_check(name: str, trial: Trial) -> CheckResult:
    """Run one check on a trial, which several checks may share; see :func:`trial_of`.

    Raises:
        UnknownName: no such check, also in the method's `expected_failures`.
    """
    expected = trial.kind.expected_failures
    for one in (name, *expected):
        _known(one)
    return _held_to(_checked(name, trial), expected)


def _known(name: str) -> None:
    if name not in CHECKS:
        raise UnknownName("check", name, CHECKS)


def _checked(name: str, trial: Trial) -> CheckResult:
    began = time.perf_counter()
    passed, skipped = True, False
    try:
        detail = CHECKS[name](trial)
    except NotRun as reason:
        skipped, detail = True, str(reason)
    except Fault as fault:
        passed, detail = False, str(fault)
    except Exception as error:  # a method may raise anything; the other checks still run
        passed, detail = False, f"{type(error).__name__}: {error}"
    return CheckResult(name, passed, skipped, detail, time.perf_counter() - began)


def _held_to(result: CheckResult, expected: Mapping[str, str]) -> CheckResult:
    if result.id not in expected or result.skipped:
        return result
    reason = expected[result.id]
    if result.passed:
        detail = f"passes, but is declared to fail ({reason}); take it out of expected_failures"
        return dataclasses.replace(result, passed=False, detail=detail)
    return dataclasses.replace(
        result, passed=True, detail=f"fails as declared ({reason}): {result.detail}"
    )


def format_results(results: Sequence[CheckResult], title: str = "") -> Table:
    """Return a table of the outcomes for a terminal."""
    table = Table(title=title or None)
    for column in ("check", "result", "detail"):
        table.add_column(column, overflow="fold")
    table.add_column("seconds", justify="right")
    for result in results:
        word, colour = _word(result)
        table.add_row(
            result.id, Text(word, style=colour), Text(result.detail), f"{result.seconds:.2f}"
        )
    return table


def _word(result: CheckResult) -> tuple[str, str]:
    if result.skipped:
        return "skipped", "yellow"
    return ("passed", "green") if result.passed else ("FAILED", "bold red")


def badge(results: Sequence[CheckResult]) -> dict[str, Any]:
    """Return what a board shows of the outcomes: ids by outcome, and the version that checked.

    >>> badge([CheckResult("docs", True, False, "", 0.1)])["passed"]
    ['docs']
    """
    return {
        "schema": 1,
        "unsc_plugin": unsc_plugin.__version__,
        "passed": [r.id for r in results if r.passed and not r.skipped],
        "failed": [r.id for r in results if not r.passed],
        "skipped": [r.id for r in results if r.skipped],
    }
