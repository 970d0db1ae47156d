"""Who may import whom, where each library's door is, and that everything public is explained."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import unsc_plugin

ROOT = Path(unsc_plugin.__file__).parent

# --------------------------------------------------------------------------- the table

GROUND = {"errors", "spec", "rows"}
NUMERICS = {"linalg", "hooks", "attacks", "influence"}
TRAINING = GROUND | NUMERICS | {"runtime", "method", "engine"}
DATA = GROUND | {"data", "forget"}
MEASURING = TRAINING | DATA | {"metrics", "models", "evaluation"}
EVERYTHING = MEASURING | {"methods", "registry", "record", "leaderboard", "pool", "conformance"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "runtime": set(),
    "spec": {"errors"},
    "rows": {"errors", "spec"},
    "linalg": GROUND,
    "hooks": GROUND | {"linalg"},
    "attacks": GROUND | {"linalg", "hooks", "runtime"},
    "influence": GROUND | {"linalg", "hooks", "runtime"},
    "method": GROUND | {"linalg", "runtime"},
    "engine": GROUND | {"linalg", "runtime", "method"},
    "data": GROUND | {"runtime"},
    "models": GROUND | {"runtime"},
    "record": GROUND | {"runtime"},
    "forget": GROUND | {"data"},
    "methods": TRAINING - {"runtime"},
    "metrics": {"errors", "linalg", "metrics"},
    "registry": {"errors", "spec", "method"},
    "evaluation": MEASURING - {"evaluation", "models"},
    "leaderboard": GROUND | {"linalg", "record", "metrics"},
    "pool": EVERYTHING - {"pool", "conformance"},
    "conformance": EVERYTHING - {"conformance"},
    "own_data": TRAINING - {"engine"} | {"models"},
    "api": EVERYTHING | {"own_data"},
    "adapters": EVERYTHING | {"adapters", "api", "own_data", "run"},
    "run": EVERYTHING,
    "bench": EVERYTHING | {"run"},
    "pytest_plugin": {"conformance", "registry"},
    "cli": EVERYTHING | {"run", "bench", "adapters"},
}
"""Module or folder of the package -> what it may import. A private module (`_name`) may import what
all public modules that use it may, and is used by nobody else."""

LENT = {"metrics._stats": {"leaderboard"}}
"""Private modules used elsewhere: the statistics of a board are pure numerics, kept with those."""

TOP = {"pool", "conformance", "adapters", "run", "bench", "cli"}
"""What may import the package itself, for its version."""

DOORS = {
    "accelerate": {"engine"},
    "timm": {"models"},
    "transformers": {"models"},
    "datasets": {"data", "metrics._base"},
    "evaluate": {"metrics._base"},
    "typer": {"cli"},
    "ray": {"bench"},
    "fairlearn": {"metrics"},
    "pytest": {"pytest_plugin"},
    "huggingface_hub": {"adapters"},
}
"""Library -> the modules that may import it, private modules of theirs included."""

LIGHT = {"__init__", "errors", "spec", "registry", "cli", "pytest_plugin"}
HEAVY = {"torch", "timm", "transformers", "evaluate", "datasets", "accelerate", "sklearn", "pandas"}
"""Modules that `import unsc_plugin` and `unsc list` load, and what they must not load."""

# --------------------------------------------------------------------------- reading the code


def dotted(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {dotted(path): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = [name for name in FILES if name != "__init__"]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imported(module: str, *, at_load: bool = False) -> Iterator[str]:
    """Yield the absolute dotted name of every import; `at_load` leaves lazy and type ones out."""
    for node in nodes(tree(module), at_load):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = module.split(".")
                is_package = FILES[module].name == "__init__.py"
                home = home[: len(home) - node.level + is_package]
                base = ".".join(["unsc_plugin", *home, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def nodes(root: ast.AST, at_load: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(root):
        yield node
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (at_load and (lazy or typing_only)):
            yield from nodes(node, at_load)


@cache
def ours(module: str, at_load: bool = False) -> frozenset[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for name in imported(module, at_load=at_load):
        parts = name.split(".")
        if parts[0] != "unsc_plugin" or name == "unsc_plugin.__version__":
            continue
        for size in range(len(parts), 1, -1):
            if ".".join(parts[1:size]) in FILES:
                found.add(".".join(parts[1:size]))
                break
        else:
            found.add("__init__")
    return frozenset(found - {module})


def private(module: str) -> bool:
    return module != "__init__" and any(part.startswith("_") for part in module.split("."))


def layer(module: str) -> str:
    """Return the row of the table: the module itself, or the folder it lies in."""
    return module.split(".")[0]


@cache
def users(module: str) -> frozenset[str]:
    """Return the public modules that use a private one, directly or through private ones."""
    found: set[str] = set()
    for other in MODULES:
        if module in ours(other):
            found |= users(other) if private(other) and other != module else {other}
    return frozenset(found)


@cache
def allowed(module: str) -> frozenset[str]:
    rows = {layer(user) for user in users(module)} if private(module) else {layer(module)}
    known = [MAY_IMPORT[row] for row in rows if row in MAY_IMPORT]
    return frozenset(set.intersection(*known)) if known else frozenset()


# --------------------------------------------------------------------------- the tests


def test_every_public_module_has_its_row() -> None:
    missing = {layer(m) for m in MODULES if not private(layer(m))} - set(MAY_IMPORT)
    assert not missing, f"say in MAY_IMPORT what these may import: {sorted(missing)}"


def test_the_table_itself_has_no_cycle() -> None:
    for low, row in MAY_IMPORT.items():
        for high in row - {low}:
            assert low not in MAY_IMPORT[high], f"{low} and {high} may import each other"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    own = layer(module)
    for other in sorted(ours(module)):
        if private(other):
            continue  # held by test_private_modules_stay_at_home
        if other == "__init__":
            assert own in TOP, f"{module} imports the package's front; name the module"
            continue
        target = layer(other)
        inside = target == own != "methods"  # methods never import each other
        assert inside or target in allowed(module), f"{module} must not import {other}"


def test_private_modules_stay_at_home() -> None:
    for module in MODULES:
        if not private(module):
            continue
        folder = module.rpartition(".")[0]
        homes = {layer(user) for user in users(module)}
        if folder and not folder.startswith("_"):
            home = {layer(folder)} | LENT.get(module, set())
            assert homes <= home, f"{module} is used by {sorted(homes)}"
        else:
            assert len(homes) <= 2, f"{module} is shared by {sorted(homes)}; give it a name"


def test_private_modules_are_used() -> None:
    idle = [m for m in MODULES if private(m) and not users(m) and FILES[m].name != "__init__.py"]
    assert not idle, f"nobody imports {idle}"


@pytest.mark.parametrize("at_load", [True, False], ids=["at load", "ever"])
def test_there_is_no_cycle(at_load: bool) -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for other in sorted(ours(module, at_load)):
            visit(other, (*path, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library: str) -> None:
    for module in FILES:
        if not any(name.split(".")[0] == library for name in imported(module)):
            continue
        behind = users(module) if private(module) else {module}
        doors = DOORS[library]
        through = module in doors or (behind and {layer(user) for user in behind} <= doors)
        assert through, f"{module} imports {library}; its door is {' and '.join(sorted(doors))}"


def test_the_front_of_the_package_is_light() -> None:
    reached, todo = set(), [module for module in LIGHT if module in FILES]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += ours(module, True)
    for module in sorted(reached):
        heavy = {name.split(".")[0] for name in imported(module, at_load=True)} & HEAVY
        assert not heavy, f"{module} loads {sorted(heavy)}"


@pytest.mark.parametrize("module", FILES)
def test_everything_public_is_explained(module: str) -> None:
    assert ast.get_docstring(tree(module)), f"{module} has no docstring"
    for name, node in () if private(module) else definitions(tree(module)):
        assert ast.get_docstring(node), f"{module}:{node.lineno}: {name} has no docstring"


def definitions(
    root: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef]]:
    """Yield public functions, classes and methods; not what is defined inside functions."""
    for node in ast.iter_child_nodes(root):
        if isinstance(node, ast.If | ast.Try):
            yield from definitions(node, prefix)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            continue
        marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
        if node.name.startswith("_") or marks & {"overload", "setter"}:
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{prefix}{node.name}.")


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "helpers", "misc", "common", "tools"}
    assert not [m for m in MODULES if {p.strip("_") for p in m.split(".")} & drawers]


def test_no_module_moves_things_to_a_device_by_name() -> None:
    for module in FILES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                to_cuda = node.func.attr == "cuda" or (
                    node.func.attr == "to" and [ast.unparse(a) for a in node.args[:1]] == ["'cuda'"]
                )
                assert not to_cuda, f"{module}:{node.lineno} names a device"
