"""The code blocks of a page, run in its order in an empty folder, as a reader would run them.

A block whose fence has `title="NAME"`, or whose first line is `# NAME.py` or `# NAME.yaml`, is a
file. Python blocks of a page share one namespace. A bash block of `unsc` lines runs in this
process, any other in bash. A `text` block is part of what the block before it printed, numbers and
spaces aside; lines of it that consist of an ellipsis stand for what is left out.
`<!-- not run: REASON -->` above a block is why it does not run.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command_line import unsc

from unsc_plugin import registry

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n\n?)?"
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>\w*)(?P<options>[^\n`]*)\n"
    r"(?P<text>.*?)^(?P=indent)(?P=ticks) *$",
    re.MULTILINE | re.DOTALL,
)
NAMED = re.compile(r"# (\S+\.(?:py|yaml))\n")
TITLE = re.compile(r'title="([^"]+)"')
NUMBER = re.compile(r"[-+−]?\d[\d.,]*(?:e[-+]?\d+)?")
EXIT_CODE = re.compile(r"exit code (\d+)")


@dataclass(frozen=True)
class Block:
    """One fenced block: `file` is the name it is written under, `reason` why it does not run."""

    language: str
    text: str
    line: int
    file: str | None
    reason: str | None


@dataclass
class Reader:
    """Someone who follows a page: a folder, the names that Python knows, what was printed last."""

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: str = ""

    def follow(self, block: Block) -> None:
        """Do what a block says."""
        if block.file is not None:
            (self.folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            self.printed = self.run_python(block)
        elif block.language == "bash":
            self.printed = self.run_bash(block)
        elif block.language == "text":
            missing = absent(block.text, self.printed)
            assert not missing, f"not printed: {missing!r}; printed was\n{self.printed}"
        else:
            raise AssertionError(f"a block of {block.language or 'no language'}: say why, or title")

    def run_python(self, block: Block) -> str:
        said = io.StringIO()
        code = compile("\n" * block.line + block.text, "<page>", "exec")
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(said):
            exec(code, self.names)
        return said.getvalue()

    def run_bash(self, block: Block) -> str:
        calls = [*commands(block.text)]
        if not all(words[0] == "unsc" for words, _ in calls):
            done = subprocess.run(
                ["bash", "-ec", block.text], cwd=self.folder, capture_output=True, text=True,
                timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout
        said = []
        for words, code in calls:
            with contextlib.chdir(self.folder), _importable(self.folder):
                done = unsc(*words[1:])
            assert done.code == code, f"{shlex.join(words)}: {done.code}\n{done.out}\n{done.err}"
            said += [done.out, done.err]
        return "".join(said)


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = []
    for match in FENCE.finditer(page):
        text = textwrap.dedent(match["text"])
        title = TITLE.search(match["options"])
        named = NAMED.match(text) if match["language"] in ("python", "yaml") else None
        file = title[1] if title else named[1] if named else None
        line = page.count("\n", 0, match.start("text"))
        found.append(Block(match["language"], text, line, file, match["reason"]))
    return found


def commands(text: str) -> Iterator[tuple[list[str], int]]:
    """Yield the words of every command, and the exit code that a comment behind it tells."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            told = EXIT_CODE.search(line.partition(" # ")[2])
            yield words, int(told[1]) if told else 0


def absent(shown: str, printed: str) -> str:
    """Return the first part of `shown` that `printed` does not have, the empty text if none."""
    parts = re.split(r"^\s*…\s*$", shown, flags=re.MULTILINE)
    rest = _plain(printed)
    for part in filter(None, map(_plain, parts)):
        _, found, rest = rest.partition(part)
        if not found:
            return part
    return ""


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", NUMBER.sub("0", text)).strip()


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def _fresh_machine() -> Iterator[None]:
    """No data folder and no suites; what a page imports or registers is gone at its end."""
    modules = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("UNSC_DATA_DIR", "MUBENCH_HOME", "ERASURE_HOME", "TORCHUNLEARN_HOME"):
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", "100")
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(registry, "_session", [*registry._session])
        yield
    for name in {"mine", "shrink"} & (set(sys.modules) - modules):
        del sys.modules[name]


def follow(page: Path, folder: Path) -> None:
    """Run all blocks of a page that are to be run; a failure names page and line."""
    reader = Reader(folder)
    with _fresh_machine():
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.reason is None:
                try:
                    reader.follow(block)
                except Exception as error:
                    error.add_note(f"in {page}, block at line {block.line}")
                    raise
