"""What holds for every command, those that are added later too: help, streams, exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Done, board, commands, unsc

from unsc_plugin import conformance

GROUPS = [words for words, one in commands().items() if hasattr(one, "commands")]
LEAVES = [words for words in commands() if words not in GROUPS]
QUICK = ("--data", "wine", "--forget", "class:0", "--model", "logistic", "--recipe", "epochs=2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a finished run, and a finished board without badges."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNSC_CACHE", str(folder / "cache"))
        patch.setattr(conformance, "check_method", lambda *_, **__: [])
        words = ("run", "neggrad", *QUICK, "--metrics", "core,mubench", "--out", folder / "run")
        assert unsc(*words).code == 0
        assert unsc("bench", board(folder / "board")).code == 0
        yield folder


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


DONE: dict[tuple[str, ...], str] = {
    ("list",): "list backbones",
    ("show",): "show {made}/run",
    ("run",): f"run original {' '.join(QUICK)} --out here",
    ("bench",): "bench {made}/board",
    ("board", "build"): "board build {made}/board",
    ("board", "verify"): "board verify {made}/board",
    ("check",): "check original --quick",
    ("export", "hub"): "export hub {made}/run hub",
    ("export", "mubench"): "export mubench {made}/run mubench",
    ("export", "hf-row"): "export hf-row {made}/run rows",
}
"""A command line of every command that ends well."""

MORE = [
    *(f"list {what} --all" for what in ("methods", "datasets", "forget-sets", "metrics")),
    "list adapters",
    "list boards",
    *("show unsc", "show tiny-digits", "show digits", "show digits/class-0", "show js_forget"),
    *("show {made}/run/record.json", "run finetune --dry-run", "bench {made}/board --dry-run"),
    "board build {made}/board --check",
]
"""Other forms of them."""


def one_value(done: Done) -> None:
    """Hold stdout to one JSON value, without anything else and without what JSON has not."""
    assert done.out.strip()
    json.loads(done.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert "\x1b" not in done.out


def test_every_command_has_a_line_that_ends_well() -> None:
    assert set(LEAVES) == set(DONE), "add a command line for every command"


@pytest.mark.parametrize("line", [*DONE.values(), *MORE])
def test_json_is_one_value_on_stdout(line: str, made: Path) -> None:
    words = line.format(made=made).split()
    done = unsc(*words, "--json")
    assert done.code == 0, done.err
    one_value(done)
    assert not done.err.lstrip().startswith(("{", "["))


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_wrong_usage_is_2_and_says_so_on_stderr(words: tuple[str, ...]) -> None:
    done = unsc(*words, "--json", "--nope")
    assert (done.code, done.out) == (2, "")
    assert f"Usage: unsc {' '.join(words)}" in done.err
    assert "--nope" in done.err


@pytest.mark.parametrize("words", [w for w in LEAVES if w != ("run",)], ids=" ".join)
def test_a_name_that_is_not_there_is_2(words: tuple[str, ...]) -> None:
    required = [p for p in commands()[words].params if p.param_type_name == "argument"]
    done = unsc(*words, *["./not-there"] * len(required), "--json")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert "not-there" in done.err


@pytest.mark.parametrize("words", GROUPS, ids=" ".join)
def test_a_group_alone_is_its_help_and_2(words: tuple[str, ...]) -> None:
    done = unsc(*words)
    assert done.code == 2
    for name in commands()[words].commands:
        assert re.search(rf"│ {name} ", done.out + done.err)


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_flag_says_what_it_is_for(words: tuple[str, ...]) -> None:
    command = commands()[words]
    assert command.help
    assert command.help.strip().endswith((".", "?"))
    for one in command.params:
        assert one.help, f"{one.name} has no help"
        assert not one.help.endswith("."), f"{one.name}: a phrase, not a sentence"
        assert one.metavar is not None, f"{one.name} shows its Python type"


def test_json_of_a_run_that_diverged_is_one_value_too() -> None:
    done = unsc("run", "neggrad", *QUICK, "--set", "lr=1e6", "--set", "passes=50", "--json")
    assert done.code == 1
    one_value(done)
    assert "diverged" in done.err
