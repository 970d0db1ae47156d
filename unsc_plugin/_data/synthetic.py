"""Data sets that are generated: blobs, and tables and images whose labels favour a group."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from unsc_plugin._data.biased import biased_source, patched_digits
from unsc_plugin._data.sources import Column, Part, Source, numbered
from unsc_plugin.errors import DataError, UnknownName, nearest
from unsc_plugin.spec import derive


def read_synthetic(name: str, options: Mapping[str, Any]) -> Source:
    """Return a generated data set; `options` are the generator's arguments.

    Raises:
        UnknownName: another name.
        DataError: an argument that the generator does not have, or of the wrong type.
    """
    makers: dict[str, Callable[..., Source]] = {
        "images": synthetic_images,
        "table": biased_table,
        "bias": biased_source,
        "digits-patch": patched_digits,
    }
    if name not in makers:
        raise UnknownName("synthetic data set", name, makers, f"known: {', '.join(makers)}")
    maker = makers[name]
    known = inspect.signature(maker).parameters
    for key, value in options.items():
        if key not in known:
            close = nearest(key, known)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise DataError(f"synthetic {name} has no argument {key!r}; {hint}")
        whole = isinstance(known[key].default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = "a whole number" if whole else "a number"
            raise DataError(f"synthetic {name}: expected {kind} for {key}, got {value!r}")
        if value < 0:
            raise DataError(f"synthetic {name}: expected {key} ≥ 0, got {value!r}")
    return maker(**options)


def synthetic_images(
    n: int = 1000,
    n_test: int = 400,
    classes: int = 10,
    size: int = 16,
    channels: int = 1,
    noise: float = 0.1,
    seed: int = 0,
) -> Source:
    """Return images of blobs: two `variant`s a class, with shifts, contrast and noise.

    A variant is a fixed sum of three Gaussian blobs per channel; each image is its variant moved by
    at most one pixel, times a contrast in [0.7, 1], plus normal noise of deviation `noise` (pixels
    in [0, 1]). Classes and variants are balanced.

    Raises:
        DataError: fewer than two classes or four pixels a side, or channels other than 1 and 3.
    """
    if classes < 2 or size < 4 or channels not in (1, 3):
        raise DataError(
            "expected classes ≥ 2, size ≥ 4 and channels 1 or 3, "
            f"got {classes}, {size} and {channels}"
        )
    generator = np.random.default_rng(derive(seed, "synthetic-images"))
    centre = generator.uniform(0.15, 0.85, (classes, 2, channels, 3, 2)) * (size - 1)
    grid = np.arange(size)
    squared = (grid - centre[..., :1]) ** 2, (grid - centre[..., 1:]) ** 2
    distance = squared[0][..., :, None] + squared[1][..., None, :]
    template = np.clip(np.exp(-distance / (2 * (size / 8) ** 2)).sum(axis=3), 0, 1)

    def part(count: int) -> Part:
        order = generator.permutation(count)
        labels, variants = order % classes, order // classes % 2
        shift = generator.integers(-1, 2, (count, 2))
        rows = (grid - shift[:, :1]) % size
        columns = (grid - shift[:, 1:]) % size
        picked = template[labels, variants]
        at = np.arange(count)[:, None, None]
        moved = picked.transpose(0, 2, 3, 1)[at, rows[:, :, None], columns[:, None]]
        contrast = generator.uniform(0.7, 1, (count, 1, 1, 1))
        pixels = moved.transpose(0, 3, 1, 2) * contrast
        pixels = pixels + generator.normal(0, noise, pixels.shape)
        image = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
        names = np.array(["a", "b"], object)
        return Part({"image": image}, labels, {"variant": names[variants]})

    return Source({"train": part(n), "test": part(n_test)}, numbered(classes))


def biased_table(
    n: int = 1000,
    n_test: int = 400,
    features: int = 6,
    minority: float = 0.3,
    bias: float = 1.0,
    noise: float = 0.5,
    seed: int = 0,
) -> Source:
    """Return a table whose labels favour one `group`, so that a fair gap has something to close.

    Group `b` is a share `minority` of the rows. x ~ N(0, I); the first feature is raised by `bias`
    for group `a` (a proxy), and so is the score s = w·x + bias·1[a] + noise·ε; the label is
    1[s > median of the training scores]. A category `region` follows the group three times out of
    four.

    Raises:
        DataError: no feature, or a share of the minority that is not within (0, 1).
    """
    if features < 1 or not 0 < minority < 1:
        raise DataError(
            f"expected features ≥ 1 and 0 < minority < 1, got {features} and {minority}"
        )
    generator = np.random.default_rng(derive(seed, "synthetic-table"))
    weights = generator.normal(0, 1, features) / np.sqrt(features)

    def draw(count: int) -> tuple[dict[str, Column], np.ndarray, np.ndarray]:
        favoured = generator.random(count) >= minority
        x = generator.normal(0, 1, (count, features))
        x[:, 0] += bias * favoured
        score = x @ weights + bias * favoured + noise * generator.normal(0, 1, count)
        follows = generator.random(count) < 0.75
        group = np.where(favoured, "a", "b").astype(object)
        region = np.where(favoured == follows, "north", "south").astype(object)
        columns: dict[str, Column] = {f"x{i}": x[:, i].copy() for i in range(features)}
        return columns | {"region": region, "group": group}, score, group

    drawn = {"train": draw(n), "test": draw(n_test)}
    threshold = float(np.median(drawn["train"][1]))
    parts = {
        split: Part(columns, (score > threshold).astype(np.int64), {"group": group})
        for split, (columns, score, group) in drawn.items()
    }
    return Source(parts, numbered(2))
