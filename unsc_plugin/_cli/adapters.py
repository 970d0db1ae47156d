"""Which bridges to other suites can be used here: looked for, never imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from packaging.version import Version

SUMMARIES = {
    "mubench": "methods inside MU-Bench's scripts; its index lists, run folders and numbers",
    "neurips": "a method as the function of the NeurIPS-2023 kit, and such functions as methods",
    "erasure": "a method as an unlearner of ERASURE, and its results",
    "torchunlearn": "the trainers of torchunlearn as methods, and its benchmark suite",
    "hub": "a run as a model folder with card and receipt, ready to publish",
}
TRAINERS_SINCE = Version("0.1.1")


def rows() -> list[tuple[str, str, str]]:
    """Return name, reason why it is unavailable (empty if it is not) and summary of each."""
    checks: dict[str, Callable[[], str]] = {
        "mubench": _mubench,
        "erasure": _erasure,
        "torchunlearn": _torchunlearn,
    }
    return [(name, checks.get(name, str)(), about) for name, about in SUMMARIES.items()]


def _mubench() -> str:
    home = _home("MUBENCH_HOME")
    if home is None:
        known = _installed("mubench")
        return "" if known else "MUBENCH_HOME is not set and mubench is not installed"
    found = any((place / "df").is_dir() for place in (home, home / "mubench"))
    return "" if found else f"MUBENCH_HOME: {home} has no mubench/df"


def _erasure() -> str:
    if _installed("erasure"):
        return ""
    home = _home("ERASURE_HOME")
    if home is None:
        return "ERASURE_HOME is not set and erasure is not importable"
    return "" if (home / "erasure").is_dir() else f"ERASURE_HOME: {home} has no folder erasure"


def _torchunlearn() -> str:
    home = _home("TORCHUNLEARN_HOME")
    if home is not None:
        found = (home / "torchunlearn" / "unlearn").is_dir()
        return "" if found else f"TORCHUNLEARN_HOME: {home} has no torchunlearn/unlearn"
    if not _installed("torchunlearn"):
        return "TORCHUNLEARN_HOME is not set and torchunlearn is not installed"
    try:
        version = metadata.version("torchunlearn")
    except metadata.PackageNotFoundError:
        return ""  # a checkout on the path
    if Version(version) < TRAINERS_SINCE:
        return f"torchunlearn {version} has no trainers; set TORCHUNLEARN_HOME to a checkout"
    return ""


def _home(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
