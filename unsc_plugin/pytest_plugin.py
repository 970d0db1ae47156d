"""`pytest --unsc-method NAME`: what every method is held to, one test per check.

NAME is a registered name (`unsc`, `unsc.reference`) or `pkg.mod:attribute`, a method class or a
decorated function. Without the option nothing else of the package is imported.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from unsc_plugin.conformance import Trial
    from unsc_plugin.registry import Registry


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the plugin to those of pytest."""
    group = parser.getgroup("unsc", "conformance checks of unlearning methods")
    group.addoption(
        "--unsc-method",
        action="append",
        default=[],
        metavar="NAME",
        help="check this method: a registered name, or pkg.mod:attribute; repeatable",
    )
    group.addoption(
        "--unsc-plugin",
        action="append",
        default=[],
        metavar="PATH",
        help="a registry .yaml, a .py file or pkg.mod:Class that brings names; repeatable",
    )
    group.addoption("--unsc-quick", action="store_true", help="only the cheap half of the checks")


def pytest_configure(config: pytest.Config) -> None:
    """Find the methods before anything is collected, so that several processes tell it once.

    Raises:
        UsageError: there is no such method, or its module cannot be imported.
    """
    for name in config.getoption("--unsc-method"):
        with _usage(name):
            _source(config, name)


@pytest.hookimpl(tryfirst=True)  # before -k and --last-failed choose
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add one item per check of every method that was named."""
    for name in dict.fromkeys(config.getoption("--unsc-method")):
        items.extend(Method.from_parent(session, name=name, nodeid=f"unsc::{name}").collect())


class Method(pytest.Collector):
    """One method; its checks share what they can."""

    def collect(self) -> Iterator[Check]:
        """Yield one item per check.

        Raises:
            UsageError: what was named is no method.
        """
        from unsc_plugin.conformance import CHECKS

        with _usage(self.name):
            assert self.trial
        for name in CHECKS:
            yield Check.from_parent(self, name=name)

    @cached_property
    def trial(self) -> Trial:
        """The method as it is tried by all of its checks."""
        from unsc_plugin.conformance import trial_of

        source, names = _source(self.config, self.name)
        return trial_of(source, names, quick=self.config.getoption("--unsc-quick"))


class Check(pytest.Item):
    """One check of one method."""

    parent: Method

    def runtest(self) -> None:
        """Run the check.

        Raises:
            CheckFailed: the method does not do what the check asks for.
        """
        from unsc_plugin.conformance import run_check

        result = run_check(self.name, self.parent.trial)
        self.user_properties.append(("detail", result.detail))
        if result.skipped:
            pytest.skip(result.detail)
        if not result.passed:
            raise CheckFailed(result.detail)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return what was found, what the check asks for, and how to see all checks."""
        if not isinstance(excinfo.value, CheckFailed):
            return super().repr_failure(excinfo, style)
        from unsc_plugin.conformance import CHECKS

        asked = (CHECKS[self.name].__doc__ or "").strip().splitlines()[0]
        return (
            f"{self.parent.name} fails the check {self.name!r}\n"
            f"  found:    {excinfo.value}\n"
            f"  expected: {asked}\n"
            f"If it is meant to fail: expected_failures = {{{self.name!r}: reason}} in the class."
        )

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return where pytest says the test is: nowhere in a file, under the method's name."""
        return self.path, None, f"{self.parent.name}: {self.name}"


class CheckFailed(Exception):
    """A method does not pass a check."""


def _source(config: pytest.Config, name: str) -> tuple[Any, Registry]:
    """Return what a name stands for, and all names; a registered one stands for itself."""
    from unsc_plugin.registry import load

    names = load(config.getoption("--unsc-plugin"))
    module, colon, attribute = name.partition(":")
    if colon:
        return getattr(importlib.import_module(module), attribute), names
    names.method(name)
    return name, names


@contextlib.contextmanager
def _usage(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the module of a method may raise anything
        said = f"--unsc-method {name}: {type(error).__name__}: {error}"
        raise pytest.UsageError(said) from error
