"""Columns of a `datasets.Dataset` to a `Part`: labels, texts, tables, images; and guessing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unsc_plugin._data.images import EncodedImages
from unsc_plugin._data.sources import Column, Part
from unsc_plugin.errors import DataError, nearest
from unsc_plugin.spec import Columns, DatasetEntry

TEXT_NAMES = ("text", "sentence", "content", "question", "review", "comment")
LABEL_NAMES = ("label", "labels", "target", "class")


def is_image(feature: Any) -> bool:
    """Return whether a feature of `datasets` holds images, or files, as a column without types.

    Told by the name of its type: `datasets` need not be imported.
    """
    return type(feature).__name__ == "Image" or (isinstance(feature, dict) and "bytes" in feature)


def guess_columns(features: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return modality and columns, from the types and names of the features.

    An image column makes it an image set; a text column with a telling name, or alone beside the
    label, a text set; anything else is a table.

    Raises:
        DataError: no column that looks like labels.
    """
    labels = [column for column in LABEL_NAMES if column in features]
    labels += [column for column, kind in features.items() if hasattr(kind, "names")]
    if not labels:
        raise DataError(
            f"{name}: expected a column named {', '.join(LABEL_NAMES)}, got {list(features)}; "
            "write a registry entry that names it"
        )
    label, rest = labels[0], [column for column in features if column != labels[0]]
    images = [column for column in rest if is_image(features[column])]
    texts = [c for c in rest if "string" in str(getattr(features[c], "dtype", ""))]
    named = [column for column in texts if column in TEXT_NAMES]
    if images:
        return {"modality": "image", "columns": Columns(input=images[0], label=label)}
    if named or (texts and texts == rest and len(rest) == 1):
        return {"modality": "text", "columns": Columns(input=(named or texts)[0], label=label)}
    return {"modality": "tabular", "columns": Columns(label=label)}


def read_part(table: Any, entry: DatasetEntry, split: str) -> Part:
    columns = entry.columns
    beside = dict.fromkeys([*columns.sub_labels, *([columns.group] if columns.group else [])])
    given = (columns.input,) if isinstance(columns.input, str) else columns.input
    for column in (columns.label, *beside, *given, *columns.drop):
        if column not in table.column_names:
            close = nearest(column, table.column_names)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {table.column_names}"
            raise DataError(f"split {split} has no column {column!r}; {hint}")
    if entry.modality == "tabular":
        taken = {columns.label, *columns.drop, *columns.sub_labels}
        names = [name for name in given or table.column_names if name not in taken]
        inputs: dict[str, Column] = {name: _values(table, name) for name in names}
    elif entry.modality == "text":
        if not 1 <= len(given) <= 2:
            raise DataError(f"expected columns.input to name one or two text columns, got {given}")
        inputs = {name: _texts(table, name, split) for name in given}
    else:
        inputs = {"image": _encoded(table, given)}
    return Part(inputs, _labels(table, columns.label), {c: _names(table, c) for c in beside})


def _arrow(table: Any, column: str) -> Any:
    return table.select_columns([column]).with_format("arrow")[:].column(column)


def _labels(table: Any, column: str) -> np.ndarray:
    values = _arrow(table, column)
    if values.null_count:
        raise DataError(f"expected a label in every row, got {values.null_count} empty ones")
    kind = str(values.type)
    if "string" in kind or "dictionary" in kind:
        return np.array(values.to_pylist(), object)
    numbers: np.ndarray = values.to_numpy()
    return numbers.astype(np.int64) if kind == "bool" else numbers


def _values(table: Any, column: str) -> np.ndarray:
    """Return a column of a table: numbers as float64 (missing ones NaN), categories as text.

    Raises:
        DataError: a column of another type.
    """
    kind = str(_arrow(table, column).type)
    named = hasattr(table.features[column], "names")
    if named or "string" in kind or "dictionary" in kind:
        return _names(table, column)
    if not kind.startswith(("int", "uint", "float", "double", "halffloat", "bool", "decimal")):
        raise DataError(
            f"expected numbers or text in column {column!r}, got {kind}; list it in columns.drop"
        )
    numbers: np.ndarray = _arrow(table, column).cast("float64").to_numpy()
    return numbers


def _names(table: Any, column: str) -> np.ndarray:
    """Return a column as text; a missing value is the empty text, a category of its own."""
    feature, values = table.features[column], _arrow(table, column).to_pylist()
    if hasattr(feature, "names"):
        values = [None if value is None else feature.names[value] for value in values]
    return np.array(["" if value is None else str(value) for value in values], object)


def _texts(table: Any, column: str, split: str) -> np.ndarray:
    values = _arrow(table, column).to_pylist()
    wrong = [row for row, value in enumerate(values) if not isinstance(value, str)]
    if wrong:
        raise DataError(
            f"expected text in column {column!r}, got {values[wrong[0]]!r} in row {wrong[0]} of "
            f"{split} ({len(wrong)} such rows)"
        )
    return np.array(values, object)


def _encoded(table: Any, given: tuple[str, ...]) -> EncodedImages:
    images = [c for c, kind in table.features.items() if is_image(kind)]
    column = given[0] if given else next(iter(images), None)
    if column is None or len(given) > 1:
        raise DataError(
            f"expected columns.input to name one image column, got {given or table.column_names}"
        )
    if type(table.features[column]).__name__ == "Image":
        table = table.cast_column(column, type(table.features[column])(decode=False))
    return EncodedImages(table.select_columns([column]), column, np.arange(len(table)))
