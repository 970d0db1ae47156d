"""Every block of the documentation runs; its links hold; what is generated says what there is."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pages
import pytest
import yaml

import unsc_plugin
from unsc_plugin import registry
from unsc_plugin.metrics import METRICS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
REFERENCE = re.compile(r"\]\[([\w.]+)\]|^::: ([\w.]+)$", re.MULTILINE)
MARKER = re.compile(r"^<!-- generated: (\S+) -->$", re.MULTILINE)
NOT_RUN_AT_MOST = 12


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", pages.FENCE.sub("", text))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [page for page in PAGES if pages.blocks(text_of(page))])
def test_every_block_runs(page, tmp_path):
    pages.follow(DOCS / page, tmp_path)


def test_few_blocks_do_not_run_and_they_say_why():
    every = [block for page in PAGES for block in pages.blocks(text_of(page))]
    left_out = [block for block in every if block.reason is not None]
    assert all(len(block.reason.split()) > 3 for block in left_out)
    assert len(left_out) <= NOT_RUN_AT_MOST < len(every) / 5


def test_every_file_that_a_block_writes_is_used_by_one_that_runs():
    for page in PAGES:
        blocks = pages.blocks(text_of(page))
        for at, block in enumerate(blocks):
            if block.file and block.file.endswith((".py", ".yaml")):
                name = block.file.removesuffix(".py")
                later = [other.text for other in blocks[at + 1 :] if other.reason is None]
                assert any(name in text for text in later), (page, block.file)


# --------------------------------------------------------------------------- links and names


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_pages(page):
    for link in LINK.findall(without_code(text_of(page))):
        if not re.match(r"https?://|#", link):
            target, _, _ = link.partition("#")
            assert ((DOCS / page).parent / target).is_file(), link


@pytest.mark.parametrize("page", PAGES)
def test_names_in_the_api_exist(page):
    for pair in REFERENCE.findall(without_code(text_of(page))):
        name = pair[0] or pair[1]
        if pair[1]:
            importlib.import_module(name)
        else:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def nav_pages(tree: object) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree
    return [page for part in inner for page in nav_pages(part)]


def config() -> dict:
    class Loader(yaml.SafeLoader):
        """Reads what is tagged as a Python object as plain data."""

    Loader.add_multi_constructor("!", lambda loader, tag, node: None)
    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, tag, node: None)
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def test_every_page_is_in_the_navigation_once():
    assert sorted(nav_pages(config()["nav"])) == PAGES


def test_public_names_and_modules_are_documented():
    index = text_of("api/index.md")
    for name in unsc_plugin.__all__:
        assert f"[`{name}`][unsc_plugin.{unsc_plugin._HOMES[name]}.{name}]" in index
    shown = {pair[1] for page in PAGES for pair in REFERENCE.findall(text_of(page)) if pair[1]}
    modules = {
        f"unsc_plugin.{path.stem}"
        for path in (ROOT / "unsc_plugin").glob("[a-z]*.py")
        if f"]({path.stem}.md)" in index
    }
    adapters = {
        f"unsc_plugin.adapters.{path.stem}"
        for path in (ROOT / "unsc_plugin" / "adapters").glob("[a-z]*.py")
    }
    assert modules | adapters <= shown


# --------------------------------------------------------------------------- what is generated


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", DOCS / "_build" / "generated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_marker_has_a_maker_and_every_maker_a_marker(generated):
    asked = [name for page in PAGES for name in MARKER.findall(text_of(page))]
    assert sorted(asked) == sorted(generated.MAKERS)


def test_generated_tables_are_whole(generated):
    for name, make in generated.MAKERS.items():
        rows = [line for line in make().splitlines() if line.startswith("|")]
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert name == "boards" or len(rows) > 2
        assert len(widths) <= 1 or name in ("methods", "commands")


def test_methods_page_has_every_method_and_preset(generated):
    page = generated.methods()
    for name, named in registry.load().methods.items():
        if named.origin == "built-in":
            assert f"## `{name}` {{: #{name} }}" in page
            for tag in named.entry.presets:
                assert f"| `{name}.{tag}` |" in page


def test_metrics_page_has_every_number(generated):
    page = generated.metrics()
    assert [name for name in METRICS if f"| `{name}` |" not in page] == []


def test_command_line_page_has_every_command_and_flag(generated):
    import typer

    from unsc_plugin import cli

    page = generated.commands() + generated.common_flags()
    every = generated.every_command(typer.main.get_command(cli.app), "unsc")
    assert {"unsc run", "unsc board build", "unsc export hub"} <= {words for words, _ in every}
    for words, command in every:
        assert f"## `{words}`" in page
        for parameter in command.params:
            assert all(f"`{flag}" in page for flag in parameter.opts if flag.startswith("-"))


# --------------------------------------------------------------------------- the site


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_site_builds_without_a_warning(tmp_path):
    for name in ("mkdocs", "mkdocstrings", "material"):
        pytest.importorskip(name, reason=f"{name} is not installed; the extra [docs] brings it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    page = (tmp_path / "api" / "linalg.html").read_text(encoding="utf-8")
    assert 'id="unsc_plugin.linalg' in page
