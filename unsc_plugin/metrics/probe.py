"""Few-shot prototype probe: is the forgotten class still there in the features?

Editing the output head hides a class from every number that reads logits. The probe reads the
features: prototypes from a few true labels, then the recall of the nearest prototype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays
from unsc_plugin.metrics._arrays import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Shots:
    """Which training examples the prototypes are made of; the same for all models of a draw.

    `classes` (C,) are the (sub-)labels in ascending order, `positions` (repeats, C, shots) the rows
    of the label column the shots were drawn from. Features are needed of `rows` only.
    """

    classes: IntArray
    positions: IntArray

    @property
    def rows(self) -> IntArray:
        """The distinct positions in ascending order: the rows whose features the probe reads."""
        return np.unique(self.positions)


def draw_shots(labels: Any, *, seed: int, shots: int = 5, repeats: int = 20) -> Shots:
    """Draw `shots` examples of every (sub-)label, `repeats` times, without replacement.

    A (sub-)label with fewer examples gives all it has, repeated in turn up to `shots`. The
    draw depends on the labels in their order and on the seed, never on a model.

    Args:
        labels: true (sub-)labels of the original training set, forget set included, (N,).
        seed: of the draws.
        shots: examples per label and repeat.
        repeats: number of draws.

    Raises:
        DataError: if `shots` or `repeats` is below 1.
    """
    column = _arrays.integers(labels, "probe on train")
    classes = np.unique(column)
    if min(shots, repeats) < 1:
        raise DataError(f"probe: expected shots and repeats of 1 or more, got {shots}, {repeats}")
    rng = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(column == label) for label in classes]
    positions = [
        [
            np.resize(rng.choice(rows, size=min(shots, len(rows)), replace=False), shots)
            for rows in rows_of
        ]
        for _ in range(repeats)
    ]
    return Shots(classes.astype(np.int64), np.array(positions, dtype=np.int64))


def prototype_recall(
    shot_features: Any, shots: Shots, test_features: Any, test_labels: Any
) -> float:
    """Return the share of test examples whose nearest prototype is of their (sub-)label.

    Features are scaled to length 1; a prototype is the mean of its shots; nearest means the
    smallest Euclidean distance, ties to the smallest label; mean over repeats. A fraction in
    [0, 1]; direction: towards the retrained model's value.

    Source: prototypes as in Snell et al., "Prototypical networks for few-shot learning",
    NeurIPS 2017, over features that were not trained for it.

    Args:
        shot_features: features of the training rows `shots.rows`, in that order, (R, D).
        shots: from :func:`draw_shots`.
        test_features: features of test examples of the forgotten (sub-)labels only, (n, D).
        test_labels: their (sub-)labels, (n,).

    Raises:
        DataError: if shapes do not match or a test label has no prototype.
    """
    support = _unit_rows(shot_features, "probe on train")
    query = _unit_rows(test_features, "probe on test")
    wanted = _arrays.integers(test_labels, "probe on test")
    rows = shots.rows
    if len(support) != len(rows) or len(query) != len(wanted):
        raise DataError(
            f"probe: expected features of {len(rows)} shot rows and of {len(wanted)} test rows, "
            f"got {support.shape} and {query.shape}; take the features of shots.rows"
        )
    if support.shape[1] != query.shape[1]:
        raise DataError(
            f"probe: expected features of one width, got {support.shape} for the shots and "
            f"{query.shape} for the test rows; use the same layer for both"
        )
    unknown = np.setdiff1d(wanted, shots.classes)
    if len(unknown):
        raise DataError(
            f"probe on test: expected labels with training examples, got {unknown.tolist()}; "
            "draw the shots from all (sub-)labels"
        )
    support_at = np.searchsorted(rows, shots.positions)
    recalls = [
        _nearest(query, support[at].mean(axis=1), shots.classes) == wanted for at in support_at
    ]
    return float(np.mean(recalls))


def _nearest(query: FloatArray, prototypes: FloatArray, classes: IntArray) -> IntArray:
    # ‖x − c‖² = ‖x‖² − 2(x·c − ‖c‖²/2): the smallest distance is the largest bracket.
    bracket = query @ prototypes.T - 0.5 * np.einsum("cd,cd->c", prototypes, prototypes)
    nearest: IntArray = classes[bracket.argmax(axis=1)]
    return nearest


def _unit_rows(values: Any, what: str) -> FloatArray:
    array = _arrays.finite(_arrays.floats(values, what, ndim=2), what)
    length = np.linalg.norm(array, axis=1, keepdims=True)
    length[length == 0] = 1.0  # a dead feature row stays at the origin
    scaled: FloatArray = array / length
    return scaled
