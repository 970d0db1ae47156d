"""A user's MU-Bench: where it lies, its index lists and name maps, read without importing it."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from packaging.version import Version

from unsc_plugin import forget
from unsc_plugin._data.indices import read_indices, take_prefix
from unsc_plugin.errors import (
    ConfigError,
    MissingOptional,
    ScenarioNotSupported,
    UnknownName,
    VersionWindow,
)
from unsc_plugin.spec import ForgetSpec, canonical_json

HOME = "MUBENCH_HOME"
SUPPORTED: Mapping[str, str] = {
    "cifar10": "image",
    "cifar100": "image",
    "imdb": "text",
    "ddi": "text",
}
"""MU-Bench's data sets whose loaders work, and their modality."""

OWNED = frozenset(
    {"bad_teaching", "grad_ascent", "neggrad", "random_label", "scrub"}
    | {"salun", "grad_diff", "npo", "l1_sparse", "delete"}
)
"""Names of methods that stay MU-Bench's own; ours of the same name is `plugin-<name>`."""

SEEDS = (42, 87, 21, 100, 13)
LOWEST, BELOW = Version("4.46"), Version("4.49")
PIP_LINE = "pip install 'transformers>=4.46,<4.49' 'datasets>=2.21,<4' 'accelerate>=1.1,<2'"


@dataclass(frozen=True)
class Checkout:
    """A MU-Bench on this machine; `sha256` is of every index list, by name of the data set.

    `root` is the folder that holds the package, None where the package is installed.
    """

    root: Path | None
    package: Path
    df_dir: Path
    commit: str | None
    sha256: Mapping[str, str]

    def index_file(self, data: str) -> Path:
        """Return the index list of a data set.

        Raises:
            ScenarioNotSupported: a data set that MU-Bench cannot load, or that needs more.
            MissingOptional: the checkout lacks the list.
        """
        check_data(data)
        path = self.df_dir / f"{data}.txt"
        if not path.is_file():
            raise MissingOptional(f"{path}: no such index list; complete the checkout of MU-Bench")
        return path

    def literal(self, name: str) -> Any:
        """Return a dictionary that the package's front spells out, such as `model_map_rev`.

        Raises:
            MissingOptional: it is not there.
        """
        front = self.package / "__init__.py"
        for node in ast.parse(front.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets]
            if named == [name]:
                return ast.literal_eval(node.value)  # type: ignore[attr-defined]
        raise MissingOptional(f"{front}: expected {name} = {{...}}; is this MU-Bench?")

    @property
    def short_names(self) -> dict[str, str]:
        """Hub id of a base model -> MU-Bench's short name."""
        return dict(self.literal("model_map_rev"))


def check_data(data: str) -> None:
    """Accept a data set of MU-Bench that its loaders can load.

    Raises:
        ScenarioNotSupported: another one.
    """
    if data not in SUPPORTED:
        hint = "use ddi" if data == "ddi2013" else f"supported: {', '.join(SUPPORTED)}"
        raise ScenarioNotSupported(
            f"data_name: expected a data set that MU-Bench can load and split, got {data!r}; {hint}"
        )


def locate(home: str | Path | None = None) -> Checkout:
    """Return the MU-Bench at `home`, else of $MUBENCH_HOME, else the installed package.

    `home` is the root of a checkout or its package folder. Nothing is imported.

    Raises:
        MissingOptional: none of these, or a folder without the package and its index lists.
    """
    for place in (home, os.environ.get(HOME)):
        if place:
            return _checkout(Path(place).expanduser())
    found = importlib.util.find_spec("mubench")
    if found is None or not found.submodule_search_locations:
        raise MissingOptional(
            f"expected a checkout of MU-Bench (mubench/ with df/): {HOME} is not set and no "
            f"package mubench is installed\nset {HOME} to the checkout's folder"
        )
    return replace(_checkout(Path(next(iter(found.submodule_search_locations)))), root=None)


def around(script: Path) -> Path | None:
    """Return the root of the checkout that a script lies in, None if it lies in none."""
    roots = (parent for parent in script.resolve().parents if (parent / "mubench" / "df").is_dir())
    return next(roots, None)


def _checkout(place: Path) -> Checkout:
    package = place if place.name == "mubench" and (place / "df").is_dir() else place / "mubench"
    lacking = [one for one in (package / "__init__.py", package / "df") if not one.exists()]
    if lacking:
        raise MissingOptional(
            f"{place}: expected a checkout of MU-Bench, found no {lacking[0]}\nset {HOME} to the "
            "folder that holds mubench/ (with df/) or to mubench itself"
        )
    package = package.resolve()
    lists = sorted((package / "df").glob("*.txt"))
    return Checkout(
        root=package.parent,
        package=package,
        df_dir=package / "df",
        commit=_commit(package.parent),
        sha256={path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in lists},
    )


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=20,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def prefix(checkout: Checkout, data: str, del_ratio: float) -> ForgetSpec:
    """Return the forget set of a ratio in percent, 10 being the whole list.

    Raises:
        ForgetSetError: a ratio outside (0, 10].
    """
    tree = {"kind": "index_prefix", "path": str(checkout.index_file(data)), "ratio": del_ratio}
    return forget.parse(canonical_json({**tree, "unit": "percent_of_10", "row_order": "hub"}))


def deletion_indices(data: str, del_ratio: float, *, home: str | Path | None = None) -> np.ndarray:
    """Return MU-Bench's forget set: positions in the original train split, int64 (n,), ascending.

    n = int(del_ratio/10 · L) of the L entries, from the front of the list; prefixes are nested.

    Raises:
        ForgetSetError: a ratio outside (0, 10] or too small, or a list with a faulty line.
        MissingOptional: no checkout.
        ScenarioNotSupported: a data set that MU-Bench cannot load.
    """
    checkout = locate(home)
    spec = prefix(checkout, data, float(del_ratio))
    return np.sort(take_prefix(spec, read_indices(checkout.index_file(data))))


def check_window(*, allow_untested: bool = False) -> str | None:
    """Return None if MU-Bench runs on the installed transformers, else the version if allowed.

    Raises:
        VersionWindow: another version, and it is not allowed.
        MissingOptional: transformers is not installed.
    """
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise MissingOptional(f"transformers is not installed; {PIP_LINE}") from None
    if LOWEST <= Version(installed) < BELOW:
        return None
    if allow_untested:
        return installed
    raise VersionWindow(
        f"MU-Bench runs on transformers >={LOWEST},<{BELOW}, installed is {installed}\n{PIP_LINE} "
        "(or --allow-untested; the run is then marked as untested)"
    )


def known_backbone(checkout: Checkout, model_id: str, method: str) -> str:
    """Return MU-Bench's short name of a base model.

    Raises:
        UnknownName: MU-Bench does not know it; with its names and the way that takes any model.
    """
    names = checkout.short_names
    if model_id in names:
        return names[model_id]
    raise UnknownName(
        "base model of MU-Bench", model_id, names,
        f"its {len(names)} names: {', '.join(names)}\nany other model runs without its script: "
        f"unsc run {method} --model hf:{model_id} --data ... --layout mubench",
    )  # fmt: skip


def model_id(checkout: Checkout, short: str) -> str:
    """Return the hub id of MU-Bench's short name.

    Raises:
        UnknownName: it does not know the name.
    """
    names = {name: one for one, name in checkout.short_names.items()}
    if short not in names:
        raise UnknownName("backbone of MU-Bench", short, names, f"known: {', '.join(names)}")
    return names[short]


def check_mapping(value: Any, where: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ConfigError: something else.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
