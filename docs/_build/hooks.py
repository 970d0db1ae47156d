"""What mkdocs does to a page: generated parts, visible reasons, and the boards as pages."""

from __future__ import annotations

import re
from typing import Any

import generated
from mkdocs.structure.files import File, Files

GENERATED = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
LIST_AFTER_TEXT = re.compile(r"^(?!- |\|)(.*\S)\n- ", re.MULTILINE)  # GitHub needs no empty line
BOARDS = "boards"
NOT_RUN = re.compile(r"^<!-- not run: (.*?) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in what is generated, and show why a block is not run by the tests."""
    if page.file.src_uri.startswith(f"{BOARDS}/"):
        page.meta["hide"] = ["toc"]  # its tables are wide
        return LIST_AFTER_TEXT.sub(r"\1\n\n- ", markdown)
    text = GENERATED.sub(lambda found: generated.MAKERS[found[1]](), markdown)
    return NOT_RUN.sub(r"*Not run by the tests: \1.*", text)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the committed boards and their plots."""
    for folder in sorted((generated.ROOT / "benchmarks").iterdir()):
        page = folder / "LEADERBOARD.md"
        if not page.is_file():
            continue
        here = f"{BOARDS}/{folder.name}"
        files.append(File.generated(config, f"{here}/index.md", abs_src_path=str(page)))
        for plot in sorted(folder.glob("*.svg")):
            files.append(File.generated(config, f"{here}/{plot.name}", abs_src_path=str(plot)))
    return files
