"""The two streams of the command line, and what the flags of every command said."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from unsc_plugin.registry import Registry

ABSENT = "–"

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass
class Globals:
    """What the global flags said, before or after the command's name."""

    plugins: list[str] = field(default_factory=list)
    as_json: bool = False
    quiet: bool = False
    debug: bool = False

    def clear(self) -> None:
        """Forget what an earlier command line of this process said."""
        self.plugins, self.as_json, self.quiet, self.debug = [], False, False, False

    def registry(self) -> Registry:
        """Return all names, those of the plugins that were named included."""
        from unsc_plugin.registry import load

        return load(self.plugins)

    def add(self, plugins: list[str] | None, as_json: bool, quiet: bool, debug: bool) -> None:
        """Take in the flags of one place; a plugin named twice counts once."""
        self.plugins += [one for one in plugins or [] if one not in self.plugins]
        self.as_json |= as_json
        self.quiet |= quiet
        self.debug |= debug


state = Globals()
err = Console(stderr=True)


def out() -> Console:
    """Return the console of stdout; made anew, so that a redirected stdout is used."""
    given = os.environ.get("COLUMNS", "")
    width = int(given) if given.isdigit() and int(given) else 160
    return Console(width=None if sys.stdout.isatty() else width)


def show(*parts: RenderableType) -> None:
    """Print tables or texts to stdout."""
    for part in parts:
        out().print(part)


def line(text: str) -> None:
    """Print plain text to stdout; the terminal wraps it, so that a path can be copied."""
    out().print(text, markup=False, highlight=False, soft_wrap=True)


def emit(value: Any) -> None:
    """Print one JSON value to stdout."""
    print(json.dumps(value, indent=2, sort_keys=False, default=str, allow_nan=False))


def say(message: str) -> None:
    """Print progress to stderr unless --quiet was given."""
    if not state.quiet:
        complain(message)


def complain(message: str) -> None:
    """Print text to stderr, without control characters that a foreign file brought in."""
    err.print(_CONTROL.sub("", message), markup=False, highlight=False, soft_wrap=True)


def grid(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of plain texts; columns named `>name` hold numbers."""
    table = Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in columns:
        number = column.startswith(">")
        table.add_column(
            column.removeprefix(">"), justify="right" if number else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
