"""Splits on their way: labels as 0..K-1, validation and test carved, noise.

All draws have fixed seeds, so that every run on a data set sees the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unsc_plugin._data.sources import Part
from unsc_plugin.errors import DataError
from unsc_plugin.spec import DatasetEntry, derive

TEST_INDEX = 10**9
MISLABELLED = "mislabelled"


def int64_sha256(values: Any) -> str:
    """Return the SHA-256 of `values` as little-endian int64, in the order given.

    >>> int64_sha256([0] * 12_500 + [1] * 12_500)[:16]  # the labels of IMDB's training split
    '82ab65b9803953c4'
    """
    return hashlib.sha256(np.ascontiguousarray(np.asarray(values, "<i8")).tobytes()).hexdigest()


def stratified(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return `count` positions, ascending, every class with its share of them.

    A class with n_c of n rows gets ⌊count·n_c/n⌋; what is left goes to the largest remainders
    (ties: the lower class).

    >>> stratified(np.array([0, 0, 0, 0, 1, 1]), 3, np.random.default_rng(0)).size
    3
    """
    classes, sizes = np.unique(labels, return_counts=True)
    quota, remainder = np.divmod(count * sizes, max(len(labels), 1))
    order = np.argsort(-remainder, kind="stable")
    quota[order[: count - int(quota.sum())]] += 1
    drawn = [
        generator.permutation(np.flatnonzero(labels == label))[:size]
        for label, size in zip(classes, quota, strict=True)
    ]
    return np.sort(np.concatenate(drawn)) if drawn else np.empty(0, np.int64)


@dataclass(frozen=True)
class Piece:
    """A split on its way: what the source holds, labels as 0..K-1, positions, group codes."""

    part: Part
    labels: np.ndarray
    index: np.ndarray
    group: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, at: np.ndarray) -> Piece:
        """Return the rows at `at`, in that order."""
        group = None if self.group is None else self.group[at]
        return Piece(self.part.take(at), self.labels[at], self.index[at], group)

    @property
    def strata(self) -> np.ndarray:
        """One number per label, or per (label, group) cell; rows of no group are cells too."""
        if self.group is None or not len(self):
            return self.labels
        cells: np.ndarray = self.labels * (self.group.max() + 2) + self.group + 1
        return cells

    def carve(self, fraction: float, role: str) -> tuple[Piece, Piece]:
        """Return what stays and a stratified draw, which has a fixed seed of its own."""
        generator = np.random.default_rng(derive(0, f"split/{role}"))
        drawn = stratified(self.strata, round(fraction * len(self)), generator)
        return self.take(np.setdiff1d(np.arange(len(self)), drawn)), self.take(drawn)


def class_codes(
    parts: Mapping[str, Part], names: Sequence[str], count: int | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the labels of every split as 0..K-1, and the K class names.

    Whole numbers that already are 0..K-1 stay; any other values are numbered in the sorted order of
    those that occur in train.

    Raises:
        DataError: a missing or fractional label, another number of classes than `count`, a label
            out of range or one that train does not have.
    """
    raw = {split: _checked_labels(part.labels, split) for split, part in parts.items()}
    seen = np.unique(raw["train"])
    if count and names and count != len(names):
        raise DataError(f"expected {count} classes (num_classes), got {len(names)} class names")
    expected = count or len(names) or None
    if len(seen) < 2 and expected is None:
        raise DataError(
            f"expected at least two classes in train, got {list(seen)}; give num_classes"
        )
    whole = raw["train"].dtype != object
    if whole and (expected is not None or (len(seen) and seen[0] == 0 and seen[-1] < len(seen))):
        total = expected or len(seen)
        for split, labels in raw.items():
            _check_range(labels, total, split)
        return raw, tuple(names) or tuple(str(label) for label in range(total))
    if expected not in (None, len(seen)):
        raise DataError(f"expected {expected} classes, got {len(seen)} in train: {list(seen)[:8]}")
    code = {value: position for position, value in enumerate(seen.tolist())}
    coded = {}
    for split, labels in raw.items():
        strange = [value for value in labels.tolist() if value not in code]
        if strange:
            raise DataError(
                f"label {strange[0]!r} occurs in {split} ({len(strange)} rows) but not in train; "
                "remove those rows or name another label column"
            )
        coded[split] = np.array([code[value] for value in labels.tolist()], np.int64)
    return coded, tuple(str(value) for value in seen)


def _checked_labels(labels: np.ndarray, split: str) -> np.ndarray:
    """Return labels as int64, or as objects when they are text.

    Raises:
        DataError: a fractional or missing label.
    """
    if labels.dtype == object:
        return labels
    bad = ~np.isfinite(labels.astype(float)) | (labels != np.round(labels.astype(float)))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"expected whole-number or text labels, got {labels[row]} in row {row} of {split} "
            f"({int(bad.sum())} such rows); this package handles classification only"
        )
    return labels.astype(np.int64)


def _check_range(labels: np.ndarray, total: int, split: str) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= total))
    if len(wrong):
        value = int(labels[wrong[0]])
        hint = "; rows of this split carry no labels" if value == -1 else ""
        raise DataError(
            f"expected labels 0..{total - 1}, got {value} in row {wrong[0]} of {split} "
            f"({len(wrong)} such rows){hint}; check num_classes and columns.label"
        )


def arrange(
    entry: DatasetEntry,
    parts: Mapping[str, Part],
    codes: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray | None],
) -> tuple[dict[str, Piece], str]:
    """Return train, val and test with their index, and the hash of the original training labels."""
    pieces = {
        split: Piece(part, codes[split], np.arange(len(part)), groups[split])
        for split, part in parts.items()
    }
    if "test" not in pieces:
        pieces["train"], pieces["test"] = pieces["train"].carve(entry.test_fraction, "test")
    for split, limit in entry.limit.items():
        pieces[split] = pieces[split].take(np.arange(min(limit, len(pieces[split]))))
    train = replace(pieces["train"], index=np.arange(len(pieces["train"])))
    labels_sha256 = int64_sha256(train.labels)
    val = pieces.get("val")
    if val is None:
        train, val = train.carve(entry.val_fraction, "val")
    test = pieces["test"]
    arranged = {
        "train": train,
        "val": replace(val, index=-1 - np.arange(len(val))),
        "test": replace(test, index=-1 - TEST_INDEX - np.arange(len(test))),
    }
    return arranged, labels_sha256


def with_noise(piece: Piece, share: float, classes: int) -> Piece:
    """Return the rows with round(share·n) labels replaced by another class, drawn uniformly."""
    generator = np.random.default_rng(derive(0, "label-noise"))
    wrong = generator.permutation(len(piece))[: round(share * len(piece))]
    labels = piece.labels.copy()
    labels[wrong] = (labels[wrong] + generator.integers(1, classes, len(wrong))) % classes
    told = np.full(len(piece), "no", object)
    told[wrong] = "yes"
    part = replace(piece.part, beside={**piece.part.beside, MISLABELLED: told})
    return replace(piece, part=part, labels=labels)
