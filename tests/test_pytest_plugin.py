"""`pytest --unsc-method`: one test per check, readable failures, no cost without the option."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from command_line import python

from unsc_plugin import conformance

METHODS = '''\
import torch

from unsc_plugin import UnlearningMethod, register_method
from unsc_plugin.method import Scenario


@register_method("outside_shrink", deterministic=True)
def shrink(model, *, rate: float = 0.5):
    """Scales the head by 1 - rate."""
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(1 - rate)
    return model


class Idle(UnlearningMethod):
    """Does nothing, and does not say so."""

    name = "outside_idle"
    needs = frozenset()
    scenarios = frozenset({Scenario.CLASS, Scenario.RANDOM})

    def run(self, model, task):
        return model


class Known(Idle):
    """Does nothing, and says so."""

    name = "outside_known"
    expected_failures = {"changes": "meant to do nothing"}
'''


PLUGIN = ("-p", "no:unsc", "-p", "unsc_plugin.pytest_plugin", "-p", "no:cacheprovider")
CHECKS = list(conformance.CHECKS)


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "pytest", *PLUGIN, *words, cwd=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of methods, a plugin file and a test of its own."""
    found = tmp_path_factory.mktemp("outside")
    (found / "outside_methods.py").write_text(METHODS)
    (found / "mine.py").write_text(METHODS.replace('"outside_shrink"', '"mine"'))
    (found / "test_own.py").write_text("def test_own():\n    pass\n")
    return found


@pytest.fixture(scope="module")
def done(folder: Path) -> subprocess.CompletedProcess[str]:
    """The outcome of a run on several methods; tests only read it."""
    names = ["finetune.paper", "finetune.paper", "outside_methods:shrink", "outside_methods:Idle"]
    names += ["outside_methods:Known", "mine"]
    named = [word for name in names for word in ("--unsc-method", name)]
    chosen = "test_own or changes or docs or processes"
    return run(folder, *named, "--unsc-plugin", "mine.py", "--unsc-quick", "-v", "-k", chosen)


def test_one_test_per_check_of_every_method(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1
    methods = ["finetune.paper", "mine"]
    methods += [f"outside_methods:{name}" for name in ("shrink", "Idle", "Known")]
    checks = ["changes", "docs"]
    for method in methods:
        for check in checks:
            failed = method.endswith("Idle") and check == "changes"
            word = "FAILED" if failed else "PASSED"
            assert f"unsc::{method}::{check} {word}" in done.stdout
        assert f"unsc::{method}::processes SKIPPED" in done.stdout
    left_out = len(methods) * (len(CHECKS) - len(checks) - 1)
    assert "test_own.py::test_own PASSED" in done.stdout
    passed = len(methods) * len(checks)  # one failed, and test_own
    counts = f"1 failed, {passed} passed, {len(methods)} skipped, {left_out} deselected"
    assert counts in done.stdout


def test_a_failure_says_what_was_found_and_what_is_asked_for(
    done: subprocess.CompletedProcess[str],
) -> None:
    text = done.stdout[done.stdout.index("= FAILURES =") :].splitlines()[1:]
    assert "_ outside_methods:Idle: changes _" in text[0]
    assert text[1] == "outside_methods:Idle fails the check 'changes'"
    assert text[2].startswith("  found:    ")
    asked = (conformance.CHECKS["changes"].__doc__ or "").splitlines()[0]
    assert text[3] == f"  expected: {asked}"
    assert "expected_failures = {'changes': reason}" in text[4]
    assert text[5].startswith("=")


def test_the_whole_suite_of_a_method_as_in_one_call(folder: Path) -> None:
    done = run(
        folder, "--unsc-method", "outside_methods:shrink", "--unsc-quick", "outside_methods.py"
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("skipped") == 1
    assert "collected 0 items" in done.stdout
    counted = done.stdout.splitlines()[-1]
    numbers = [int(word) for word in counted.split() if word.isdigit()]
    assert sum(numbers) == len(CHECKS)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("finetun", "unknown method 'finetun'; did you mean 'finetune'"),
        ("not_there:Mine", "ModuleNotFoundError: No module named 'not_there'"),
        ("outside_methods:Nobody", "has no attribute 'Nobody'"),
        ("outside_methods:torch", "expected a method's name, class or function"),
    ],
)
def test_what_is_no_method_is_a_usage_error(name: str, says: str, folder: Path) -> None:
    done = run(folder, "--unsc-method", name)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    [line] = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    assert line.startswith(f"ERROR: --unsc-method {name}: ")
    assert says in line


def test_several_processes_tell_it_too(folder: Path) -> None:
    done = run(folder, "--unsc-method", "finetun", "-n", "2")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "unknown method 'finetun'" in done.stderr


def test_it_is_told_in_the_help(folder: Path) -> None:
    text = run(folder, "--help").stdout
    for option in ("--unsc-method=NAME", "--unsc-plugin=PATH", "--unsc-quick"):
        assert option in text


def test_without_the_option_nothing_is_imported(tmp_path: Path) -> None:
    (tmp_path / "test_light.py").write_text(
        "import sys\n\n\n"
        "def test_light():\n"
        "    ours = {name for name in sys.modules if name.startswith('unsc_plugin')}\n"
        "    assert ours == {'unsc_plugin', 'unsc_plugin.pytest_plugin'}\n"
        "    assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)\n"
    )
    done = run(tmp_path, "-q")
    assert done.returncode == 0, done.stdout
