"""Every block of the README runs, in the order of the page, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks() -> list[pages.Block]:
    return pages.blocks(README.read_text(encoding="utf-8"))


def test_first_two_blocks_are_the_two_commands():
    first, second = blocks()[:2]
    assert first.text.strip().splitlines() == [first.text.strip()]
    assert "pip install -e '.[dev]' && unsc bench digits-class" in first.text
    assert second.text.strip().endswith("&& pytest")


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_only_what_installs_or_tests_is_left_out():
    left_out = [block.text for block in blocks() if block.reason is not None]
    assert len(left_out) == 3
    assert all("pip install" in text or "pytest" in text for text in left_out)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_journeys_run_as_they_stand(tmp_path):
    pages.follow(README, tmp_path)
