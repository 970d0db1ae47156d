"""The parts of the pages that the package itself says: names, settings, flags, numbers, checks."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from unsc_plugin import cli, conformance, errors, registry
from unsc_plugin._cli.lists import BETTER, list_rows, plain
from unsc_plugin.metrics import METRICS

ROOT = Path(__file__).parent.parent.parent
ARXIV = "https://arxiv.org/abs/"
HUB = "https://huggingface.co/"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; bars and line ends inside cells are kept from ending them."""
    cells = [[re.sub(r"\s*\n\s*", " ", cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: object) -> str:
    """Return `text` as code, empty text as it is."""
    return f"`{text}`" if f"{text}" else ""


def codes(words: Iterable[str]) -> str:
    """Return words as code with commas."""
    return ", ".join(code(word) for word in words)


# --------------------------------------------------------------------------- methods


def methods() -> str:
    """Return a table of all built-in methods, and a section for each."""
    found = [named for _, named in sorted(registry.load().methods.items())]
    head = table(
        ("method", "what it does", "reads", "requests"),
        (
            (
                f"[`{one.name}`](#{one.name})",
                one.summary,
                ", ".join(entry.needs) or "no data",
                ", ".join(entry.scenarios),
            )
            for one in found
            if (entry := _entry(one))
        ),
    )
    return "\n\n".join([head, *(_method(one) for one in found)])


def _entry(named: registry.Named) -> Any:
    return named.entry


def _method(named: registry.Named) -> str:
    entry = _entry(named)
    kind = _target(entry.target)
    facts = [f"**{named.summary}.**"]
    if entry.paper is not None:
        paper = entry.paper
        title = f"[{paper.title}]({ARXIV}{paper.arxiv})" if paper.arxiv else paper.title
        facts.append(f"From {title} ({paper.year}).")
    if entry.requires:
        facts.append(f"Wants {codes(entry.requires)}.")
    if entry.known_as:
        other = ", ".join(f"{suite}: `{name}`" for suite, name in entry.known_as.items())
        facts.append(f"Elsewhere ({other}).")
    if entry.beside:
        facts.append(f"Belongs on a board beside {codes(entry.beside)}.")
    parts = [f"## `{named.name}` {{: #{named.name} }}", " ".join(facts), _about(kind)]
    settings = registry.config_table(kind)
    if settings:
        parts.append(
            table(
                ("setting", "type", "default", "meaning"),
                (
                    (
                        code(row["name"]),
                        code(row["type"]),
                        code(plain(row["default"])),
                        row["meaning"],
                    )
                    for row in settings
                ),
            )
        )
    if entry.presets:
        parts.append(
            table(
                ("preset", "settings", "from"),
                (
                    (
                        code(f"{named.name}.{tag}"),
                        codes(f"{key}={plain(value)}" for key, value in preset.args.items()),
                        preset.source.replace("_", " "),
                    )
                    for tag, preset in entry.presets.items()
                ),
            )
        )
    return "\n\n".join(parts)


def _target(target: str) -> Any:
    module, _, name = target.partition(":")
    return registry.decorated(getattr(importlib.import_module(module), name))


def _about(kind: type) -> str:
    """Return the docstring of a method as it stands: its formulas are laid out in lines."""
    text = inspect.cleandoc(kind.__doc__ or "")
    return f"```text\n{text}\n```"


# --------------------------------------------------------------------------- other names


def names(what: str) -> str:
    """Return a table of the backbones, data sets or forget sets."""
    rows = list_rows(registry.load(), what)
    return table(("name", "what it is"), ((code(row["name"]), row["summary"]) for row in rows))


def metrics() -> str:
    """Return a table of all numbers with unit and direction."""
    return table(
        ("number", "unit", "better", "meaning", "needs", "requests that have it"),
        (
            (
                code(spec.name),
                spec.unit,
                BETTER[spec.direction],
                spec.summary,
                ", ".join(spec.needs),
                ", ".join(spec.kinds),
            )
            for spec in METRICS.values()
        ),
    )


def checks() -> str:
    """Return a table of the conformance checks."""
    return table(
        ("check", "what it holds a method to"),
        (
            (code(name), inspect.cleandoc(check.__doc__ or "").splitlines()[0])
            for name, check in conformance.CHECKS.items()
        ),
    )


def boards() -> str:
    """Return a list of the committed boards, linked where they have results."""
    lines = []
    for row in list_rows(registry.load(), "boards"):
        there = (ROOT / "benchmarks" / row["name"] / "LEADERBOARD.md").is_file()
        shown = f"[{row['name']}](../boards/{row['name']}/index.md)" if there else row["name"]
        lines.append(f"- {shown}: {row['summary']}" + ("" if there else " (not run yet)"))
    return "\n".join(lines)


# --------------------------------------------------------------------------- command line


def commands() -> str:
    """Return every command with its arguments and flags, from the program itself."""
    root: Any = typer.main.get_command(cli.app)
    return "\n\n".join(_command(words, command) for words, command in every_command(root, "unsc"))


def every_command(group: Any, words: str) -> list[tuple[str, Any]]:
    """Return all commands below a group with the words that call them."""
    found = []
    for name, command in group.commands.items():
        called = f"{words} {name}"
        inner = hasattr(command, "commands")
        found += every_command(command, called) if inner else [(called, command)]
    return found


def _command(words: str, command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = [one.metavar if one.required else f"[{one.metavar}]" for one in arguments]
    parts = [
        f"## `{words}`",
        inspect.cleandoc(command.help or ""),
        f"```text\n{' '.join([words, *usage, '[flags]'])}\n```",
        table(
            ("argument or flag", "meaning", "default"),
            (
                (_spelt(one), one.help or "", _default(one))
                for one in [*arguments, *options]
                if one.name not in COMMON
            ),
        ),
    ]
    return "\n\n".join(parts)


COMMON = ("plugin", "as_json", "quiet", "debug")
"""Flags that every command takes; told once."""


def common_flags() -> str:
    """Return the flags that every command takes."""
    root: Any = typer.main.get_command(cli.app)
    shared = [one for one in root.commands["run"].params if one.name in COMMON]
    return table(("flag", "meaning"), ((_spelt(one), one.help or "") for one in shared))


def _spelt(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return code(parameter.metavar)
    flags = [*parameter.opts, *parameter.secondary_opts]
    return codes(f"{flag} {parameter.metavar or ''}".strip() for flag in flags)


def _default(parameter: Any) -> str:
    value = parameter.default
    return "" if value in (None, False, ()) else code(plain(value))


def exit_codes() -> str:
    """Return the exit codes, with the errors of each."""
    meanings = {
        0: "done",
        1: "ran, but a run failed or diverged, a check failed, or a verification did not match",
        2: "usage: an unknown name, a bad value, an invalid file",
        3: "something optional is missing: a package, a checkout, data, the network",
        4: "a version outside the window that is supported",
        cli.INTERRUPTED: "interrupted; trained models and finished units are kept",
    }
    kinds = [
        one for _, one in inspect.getmembers(errors, inspect.isclass)
        if issubclass(one, errors.UnscError) and one is not errors.UnscError
    ]  # fmt: skip
    return table(
        ("exit code", "meaning", "errors"),
        (
            (code(number), meaning, codes(k.__name__ for k in kinds if k.exit_code == number))
            for number, meaning in meanings.items()
        ),
    )


MAKERS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "backbones": lambda: names("backbones"),
    "datasets": lambda: names("datasets"),
    "forget-sets": lambda: names("forget-sets"),
    "metrics": metrics,
    "checks": checks,
    "boards": boards,
    "commands": commands,
    "common-flags": common_flags,
    "exit-codes": exit_codes,
}
"""What `<!-- generated: NAME -->` in a page stands for."""
