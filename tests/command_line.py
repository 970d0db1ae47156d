"""`unsc` called in this process, for the tests of the command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.main import get_command

from unsc_plugin import cli


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda text: int(text))  # NaN is no JSON


def unsc(*words: str | Path) -> Done:
    """Run `unsc words...`; anything but a clean exit is raised as it is."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as left:
            code = left.code
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


def commands(group: Any = None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return every command and group of commands by the words that name it; () is `unsc` itself."""
    group = group or get_command(cli.app)
    found = {path: group}
    for name, command in getattr(group, "commands", {}).items():
        found |= commands(command, (*path, name))
    return found


def python(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run another interpreter to its end."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def tree(folder: Path) -> set[str]:
    """Return everything that lies in a folder, as paths relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


BOARD = """\
schema: 1
name: little
title: A little board
scenarios:
  - name: wine
    data: wine
    model: logistic
    recipe: {epochs: 2, lr: 0.05, batch_size: 32}
    forget: ["class:0"]
entries: [retrain, original]
evaluation: {train_seeds: 1, draws: 1, reference_pool: 1, retain_eval: 50, bootstrap: 100}
"""


def board(folder: Path, *changes: tuple[str, str]) -> Path:
    """Write the little board with some of its text replaced, and return its file."""
    text = BOARD
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "board.yaml"
    path.write_text(text, encoding="utf-8")
    return path
