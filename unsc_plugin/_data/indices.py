"""Index lists: read with an error for every line that is no index; the row order they mean."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from unsc_plugin.data import expand_path
from unsc_plugin.errors import ForgetSetError, MissingOptional, RowOrderMismatch
from unsc_plugin.spec import DataInfo, ForgetSpec

# CIFAR-10's training images come in five batches of 10,000: torchvision reads them 1 to 5, the hub
# in the order of the archive's members.
_HUB_BATCHES = (4, 3, 2, 5, 1)
_BATCH = 10_000


def read_indices(place: str | Path) -> np.ndarray:
    """Return the indices of a file in its order: .txt (one a line), .json (a list) or .npy.

    Raises:
        ForgetSetError: no such file, another format, or an entry that is no index or comes twice;
            the message names its line.
        MissingOptional: the path needs an environment variable, and it or the file is missing.
    """
    path = expand_path(str(place))
    if not path.is_file():
        if "${" in str(place):
            raise MissingOptional(f"{path}: no such file\ncomplete the folder that {place} names")
        raise ForgetSetError(f"{path}: no such file; give an existing .txt, .json or .npy file")
    if path.suffix not in (".txt", ".json", ".npy"):
        raise ForgetSetError(f"{path}: expected a .txt, .json or .npy file, got {path.suffix!r}")
    try:
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8").splitlines()
            values, unit = [line.strip() for line in lines], "line"
        elif path.suffix == ".json":
            values, unit = json.loads(path.read_text(encoding="utf-8")), "entry"
        else:
            values, unit = np.load(path, allow_pickle=False), "entry"
    except (OSError, EOFError, ValueError) as error:
        raise ForgetSetError(f"{path}: cannot be read: {error}") from None
    return check_indices(values, str(path), unit)


def check_indices(values: Any, source: str, unit: str) -> np.ndarray:
    """Return `values` as int64 (n,), in their order; empty lines are skipped.

    Raises:
        ForgetSetError: anything but distinct whole numbers ≥ 0, with its line, or none at all.
    """
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise ForgetSetError(
                f"{source}: expected a list of whole numbers, got {values.dtype} of shape "
                f"{values.shape}"
            )
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise ForgetSetError(f"{source}: expected a list of indices, got {type(values).__name__}")
    seen: dict[int, int] = {}
    for number, value in enumerate(values, start=1):
        if value == "":
            continue
        text = str(value)
        if isinstance(value, (bool, float)) or not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise ForgetSetError(f"{source}: {unit} {number}: expected an index, got {text[:40]!r}")
        index = int(text)
        if index < 0:
            raise ForgetSetError(f"{source}: {unit} {number}: expected an index ≥ 0, got {index}")
        if index in seen:
            raise ForgetSetError(
                f"{source}: {unit} {number}: index {index} was on {unit} {seen[index]} already; "
                "list every row once"
            )
        seen[index] = number
    if not seen:
        raise ForgetSetError(f"{source}: expected indices, got an empty list")
    return np.fromiter(seen, np.int64, len(seen))


def take_prefix(spec: ForgetSpec, indices: np.ndarray) -> np.ndarray:
    """Return the first int(ratio/10·n) of n indices, the rule of MU-Bench (arXiv 2406.14796).

    Raises:
        ForgetSetError: no ratio, or one that takes no index.
    """
    if spec.ratio is None:
        raise ForgetSetError(
            "expected how much of the index list to take, got nothing; add @RATIO to the name, in "
            "percent, where 10 is the whole list: @2"
        )
    count = int(spec.ratio / 10 * len(indices))
    if not count:
        raise ForgetSetError(
            f"expected rows to forget, got none: ratio {spec.ratio} of {len(indices)} indices"
        )
    return indices[:count]


def check_order(spec: ForgetSpec, info: DataInfo) -> None:
    """Accept an index list only for data with its rows in the order that the list was made for.

    Raises:
        RowOrderMismatch: the data's rows are in another order.
    """
    if spec.row_order is None or spec.row_order == info.row_order:
        return
    known = {spec.row_order, info.row_order} == {"hub", "torchvision"} and "cifar10" in info.name
    hint = (
        f'convert them: reorder(idx, "cifar10", "{spec.row_order}", "{info.row_order}")'
        if known
        else f"use a copy of the data with its rows in the order {spec.row_order!r}"
    )
    raise RowOrderMismatch(
        f"expected rows in the order {spec.row_order!r}, which the index list was made for, got "
        f"{info.row_order!r} ({info.name}, SHA-256 of labels {info.labels_sha256[:16]}); {hint}"
    )


def reorder(indices: Any, data: str, source: str, target: str) -> np.ndarray:
    """Return indices made for one order of the rows as indices of the same rows in another.

    Known for `cifar10` between `torchvision` and `hub`: with P = (4, 3, 2, 5, 1), row i of the
    first is row 10000·P.index(⌊i/10000⌋+1) + i mod 10000 of the second.

    >>> reorder([0, 9999, 30000, 49999], "cifar10", "torchvision", "hub").tolist()
    [40000, 49999, 0, 39999]

    Raises:
        ForgetSetError: an index outside 0..49999.
        RowOrderMismatch: no exact conversion is known.
    """
    orders = ("torchvision", "hub")
    if data != "cifar10" or source not in orders or target not in orders:
        raise RowOrderMismatch(
            f"expected cifar10 between {' and '.join(orders)}, got {data} from {source} to "
            f"{target}; no exact conversion of other orders is known"
        )
    index = np.asarray(indices, np.int64)
    if index.size and not 0 <= index.min() <= index.max() < 5 * _BATCH:
        raise ForgetSetError(
            f"expected indices 0..{5 * _BATCH - 1}, got {index.min()} to {index.max()}"
        )
    if source == target:
        return index.copy()
    to_torchvision = np.array(_HUB_BATCHES) - 1
    blocks = to_torchvision if source == "hub" else np.argsort(to_torchvision)
    moved: np.ndarray = blocks[index // _BATCH] * _BATCH + index % _BATCH
    return moved
