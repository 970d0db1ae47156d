"""Importing a package from somebody's checkout: nothing is written there, `sys.path` stays."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def importable(name: str) -> bool:
    """Say whether a top-level package is imported, or could be."""
    return name in sys.modules or importlib.util.find_spec(name) is not None


def from_folder(name: str, folder: Path) -> ModuleType:
    """Return the package `name` imported from `folder`; submodules are found there afterwards.

    Raises:
        ImportError: no such package, or it lacks what it imports; nothing of it stays imported.
    """
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if not (folder / "__init__.py").is_file() or spec is None or spec.loader is None:
        raise ImportError(f"no package {name} in {folder}")
    forget(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with no_bytecode():
            spec.loader.exec_module(module)
    except BaseException:
        forget(name)
        raise
    return module


def forget(name: str) -> None:
    """Take a package and its submodules out of what is imported."""
    for one in [n for n in sys.modules if n == name or n.startswith(f"{name}.")]:
        del sys.modules[one]


@contextlib.contextmanager
def no_bytecode() -> Iterator[None]:
    """Leave no `__pycache__` behind in the body."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
