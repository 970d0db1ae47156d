"""What a metric accepts, turned into float64 arrays once and checked once.

Numpy arrays, nested lists and torch tensors on any device (bfloat16 and float16 included) are
accepted; torch itself is never imported, tensors are recognised by their methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from unsc_plugin.errors import DataError, DivergedError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def to_numpy(values: Any, what: str = "values") -> npt.NDArray[Any]:
    """Return `values` as a numpy array; floating tensors become float64 (numpy has no bfloat16).

    Raises:
        DataError: if rows of different lengths do not form an array.
    """
    if hasattr(values, "detach"):
        tensor = values.detach().to("cpu")
        converted: npt.NDArray[Any] = (
            tensor.double() if tensor.is_floating_point() else tensor
        ).numpy()
        return converted
    if isinstance(values, list | tuple) and values and hasattr(values[0], "detach"):
        values = [to_numpy(value, what) for value in values]
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(
            f"{what}: expected an array, got rows of different lengths ({error}); "
            "give every row the same number of entries"
        ) from error


def floats(values: Any, what: str, ndim: int) -> FloatArray:
    """Return `values` as a float64 array of `ndim` dimensions with at least one row.

    Raises:
        DataError: if the entries are no numbers, the dimensions differ or there is no row.
    """
    array = to_numpy(values, what)
    if array.shape[:1] == (0,):
        raise DataError(f"{what}: expected at least one row, got an empty split; check the split")
    try:
        array = array.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: expected numbers, got {array.dtype}; convert them") from error
    if array.ndim != ndim:
        raise DataError(
            f"{what}: expected {ndim} dimension(s), got shape {array.shape}; reshape the array"
        )
    return array


def finite(array: FloatArray, what: str) -> FloatArray:
    """Return `array` if all of it is finite.

    Raises:
        DivergedError: naming the first row that holds NaN or infinity.
    """
    if not np.isfinite(array).all():
        rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
        raise DivergedError(
            f"{what}: expected finite numbers, got NaN or infinity in {len(rows)} row(s), "
            f"first row {rows[0]}; the model has diverged, its metrics are not computed"
        )
    return array


def scores(values: Any, what: str) -> FloatArray:
    """Return one finite number per example, shape (B,)."""
    return finite(floats(values, what, ndim=1), what)


def logits(values: Any, what: str, *, masked: bool = False) -> FloatArray:
    """Return finite logits (B, K), K ≥ 2; with `masked`, −∞ (a class shut off) is let through.

    Raises:
        DataError: if the shape is not (B, K) with K ≥ 2.
        DivergedError: if a logit is not finite.
    """
    array = floats(values, what, ndim=2)
    if array.shape[1] < 2:
        raise DataError(
            f"{what}: expected logits of at least two classes, got shape {array.shape}; "
            "give one column per class"
        )
    finite(np.where(np.isneginf(array), 0.0, array) if masked else array, what)
    return array


def labels(values: Any, what: str, *, rows: int, classes: int) -> IntArray:
    """Return labels (B,) int64, each in [0, K).

    Raises:
        DataError: if there is not one integer per row, or a label lies outside [0, K).
    """
    array = integers(values, what)
    if len(array) != rows:
        raise DataError(
            f"{what}: expected one label per row, got labels {array.shape} for logits "
            f"({rows}, {classes}); pass logits and labels of the same rows"
        )
    outside = np.flatnonzero((array < 0) | (array >= classes))
    if len(outside):
        raise DataError(
            f"{what}: expected labels in [0, {classes}), got {array[outside[0]]} at row "
            f"{outside[0]}; map the labels to class numbers"
        )
    return array


def integers(values: Any, what: str) -> IntArray:
    """Return one integer per row, shape (B,), at least one row.

    Raises:
        DataError: if the values are not a non-empty list of integers.
    """
    array = to_numpy(values, what)
    if array.shape == (0,):
        raise DataError(f"{what}: expected at least one row, got an empty split; check the split")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"{what}: expected integers of shape (B,), got {array.dtype} of shape {array.shape}; "
            "give one integer per row"
        )
    return array.astype(np.int64, copy=False)


def labelled(logit_rows: Any, label_rows: Any, what: str) -> tuple[FloatArray, IntArray]:
    """Return checked logits (B, K) and labels (B,) of the same rows."""
    z = logits(logit_rows, what)
    return z, labels(label_rows, what, rows=z.shape[0], classes=z.shape[1])


def members(pool_logits: Iterable[Any], what: str, shape: tuple[int, ...]) -> Iterator[FloatArray]:
    """Yield the members of a pool (m, B, K) one by one, so that only one lies in float64.

    Raises:
        DataError: if the pool is empty or a member has another shape than the subject.
    """
    count = 0
    for count, member in enumerate(pool_logits, start=1):
        z = logits(member, f"{what}, pool member {count - 1}")
        if z.shape != shape:
            raise DataError(
                f"{what}: expected pool logits of shape {shape}, got {z.shape} in member "
                f"{count - 1}; score subject and pool on the same rows"
            )
        yield z
    if count == 0:
        raise DataError(f"{what}: expected at least one retrained model, got none; give a pool")


def log_sum_exp(array: FloatArray) -> FloatArray:
    """Return log Σ_k exp(z_k) of every row, shape (B,); a row of −∞ gives −∞."""
    top = array.max(axis=1, keepdims=True)
    top[np.isneginf(top)] = 0.0
    with np.errstate(divide="ignore"):
        result: FloatArray = np.log(np.exp(array - top).sum(axis=1)) + top[:, 0]
    return result


def softmax(array: FloatArray) -> FloatArray:
    """Return exp(z_k) / Σ_j exp(z_j) of every row, shape (B, K)."""
    result: FloatArray = np.exp(array - array.max(axis=1, keepdims=True))
    result /= result.sum(axis=1, keepdims=True)
    return result
