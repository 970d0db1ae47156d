"""Sets whose training labels lean on a group, drawn to the last bit: known answers hang on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from unsc_plugin._data.sources import Part, Source, numbered
from unsc_plugin.errors import DataError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
SPLITS = ("train", "val", "test")
BIASED_SIZES = (1500, 800, 4000)
DIGITS_SIZES = (1000, 300, 497)
PATCH_CHANNELS = 3


# --------------------------------------------------------------------------- a biased table


class Biased(NamedTuple):
    """Rows of one part: features x float64 (n, 20), labels y and groups s, int64 (n,), 0 or 1."""

    x: FloatArray
    y: IntArray
    s: IntArray


def biased_draws(
    k: int = 0, n: tuple[int, int, int] = BIASED_SIZES, *, standardise: bool = True
) -> dict[str, Biased]:
    """Return train, val and test of a table whose labels favour the group s = 1.

    Part i = 1, 2, 3 is drawn by `numpy.random.default_rng(10k + i)` in this order:

        s = random(n) < 0.67
        x = standard_normal((n, 19)),   x[:, :4] += 0.6·(s − ½),   last column 2s − 1
        y = random(n) < σ(x·w + 0.6·(s − ½)),   w = (½·linspace(1.2, −0.8, 19), ½)

    and all 20 columns are then standardised by the training part (ddof 0).

    Args:
        k: number of the draw.
        n: rows of train, val and test.
        standardise: False for x as drawn.

    >>> {split: part.x.shape for split, part in biased_draws().items()}
    {'train': (1500, 20), 'val': (800, 20), 'test': (4000, 20)}
    """
    parts = {
        split: _biased_part(np.random.default_rng(10 * k + place), count)
        for place, (split, count) in enumerate(zip(SPLITS, n, strict=True), start=1)
    }
    if not standardise:
        return parts
    mean, deviation = parts["train"].x.mean(axis=0), parts["train"].x.std(axis=0)
    return {split: part._replace(x=(part.x - mean) / deviation) for split, part in parts.items()}


def _biased_part(generator: np.random.Generator, count: int) -> Biased:
    s = generator.random(count) < 0.67
    lean = 0.6 * (s - 0.5)
    x = generator.standard_normal((count, 19))
    x[:, :4] += lean[:, None]
    x = np.column_stack([x, 2.0 * s - 1])
    weights = np.append(0.5 * np.linspace(1.2, -0.8, 19), 0.5)
    y = generator.random(count) < 1 / (1 + np.exp(-(x @ weights + lean)))
    return Biased(x, y.astype(np.int64), s.astype(np.int64))


def biased_source(k: int = 0, n: int = 1500, n_val: int = 800, n_test: int = 4000) -> Source:
    """Return :func:`biased_draws` as columns x0..x18 and `side`, which is the group as a feature.

    Raises:
        DataError: so few training rows that a column may be constant.
    """
    if n < 2:
        raise DataError(f"expected n ≥ 2 training rows to standardise by, got {n}")
    names = [*(f"x{place}" for place in range(19)), "side"]
    parts = {
        split: Part(
            dict(zip(names, np.ascontiguousarray(part.x.T), strict=True)),
            part.y,
            {"group": part.s.astype(str).astype(object)},
        )
        for split, part in biased_draws(k, (n, n_val, n_test), standardise=False).items()
    }
    return Source(parts, numbered(2))


# --------------------------------------------------------------------------- a coloured patch


def colour_patch(
    images: npt.NDArray[np.generic],
    labels: IntArray,
    aligned: npt.NDArray[np.bool_],
    size: int | None = None,
) -> tuple[npt.NDArray[np.generic], IntArray]:
    """Return images with a patch whose colour tells the label where `aligned`, and the colours.

    The colour c of a row is its label where aligned, else 1 − label. The top left `size`×`size`
    pixels are black but in channel c, which is full there: a spurious feature.

    Args:
        images: (n, 3, H, W), float in [0, 1] or uint8; they are left as they are.
        labels: (n,), 0 or 1 (of more classes: whether it is one of the upper half, say).
        aligned: (n,), where colour and label agree.
        size: side of the patch in pixels; None for ⌈H/8⌉.

    Raises:
        DataError: images without three channels, other labels, or a patch that does not fit.

    >>> _, colour = colour_patch(np.zeros((2, 3, 8, 8)), np.array([1, 1]), np.array([True, False]))
    >>> colour.tolist()
    [1, 0]
    """
    if images.ndim != 4 or images.shape[1] != PATCH_CHANNELS:
        raise DataError(f"expected images (n, 3, H, W), got {images.shape}; repeat grey channels")
    if not len(images) == len(labels) == len(aligned) or not np.isin(labels, (0, 1)).all():
        raise DataError(
            f"expected a label of 0 or 1 and a truth value for each of {len(images)} images, got "
            f"{len(labels)} labels within {sorted(set(labels.tolist()))[:4]} and {len(aligned)}"
        )
    side = -(-images.shape[2] // 8) if size is None else size
    if not 1 <= side <= min(images.shape[2:]):
        raise DataError(
            f"expected a patch of 1 to {min(images.shape[2:])} pixels a side, got {side}"
        )
    colour = np.where(aligned, labels, 1 - labels).astype(np.int64)
    patched = images.copy()
    patched[:, :, :side, :side] = 0
    full = 255 if images.dtype == np.uint8 else 1
    patched[np.arange(len(images)), colour, :side, :side] = full
    return patched, colour


def patched_digits(seed: int = 0, p: float = 0.9) -> Source:
    """Return scikit-learn's digits in three channels, label [digit ≥ 5], group = patch colour.

    The 1,797 images are permuted by `default_rng(seed)` and cut into 1,000, 300 and 497; the same
    generator then draws, part by part, where colour and label agree: a share p of the training
    rows, half of the others. Pixels are float32 in [0, 1], the patch is 2×2.

    Raises:
        DataError: a share p above 1.
    """
    if p > 1:
        raise DataError(f"expected a share 0 ≤ p ≤ 1 of aligned rows, got {p}")
    from sklearn.datasets import load_digits

    bunch, generator = load_digits(), np.random.default_rng(seed)
    order = generator.permutation(len(bunch.target))
    shares: Mapping[str, float] = {"train": p, "val": 0.5, "test": 0.5}
    parts, start = {}, 0
    for split, count in zip(SPLITS, DIGITS_SIZES, strict=True):
        rows = order[start : start + count]
        labels = (bunch.target[rows] >= 5).astype(np.int64)
        pixels = np.repeat(bunch.images[rows][:, None] / 16, PATCH_CHANNELS, axis=1)
        aligned = generator.random(count) < shares[split]
        patched, colour = colour_patch(pixels.astype(np.float32), labels, aligned, size=2)
        names = np.array(["channel-0", "channel-1"], object)
        parts[split] = Part({"image": patched}, labels, {"colour": names[colour]})
        start += count
    return Source(parts, ("0-4", "5-9"))
