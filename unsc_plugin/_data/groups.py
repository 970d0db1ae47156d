"""Which group every row belongs to: the values of a column, or named groups made of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from unsc_plugin._data.sources import Part
from unsc_plugin.errors import DataError, nearest
from unsc_plugin.spec import Columns, GroupRule

MAX_GROUPS = 20
NO_GROUP = -1


def group_codes(
    parts: Mapping[str, Part], columns: Columns
) -> tuple[tuple[str, ...], dict[str, np.ndarray | None]]:
    """Return the names of the groups and the code of every row of every split, int64.

    Without rules the groups are the values of the column in sorted order; with rules a code is the
    place of the rule in the list, -1 for a row that no rule takes.

    Raises:
        DataError: too many groups to compare, a value that no row has, a range of a column that
            does not hold numbers, or a named group without a row in train.
    """
    if columns.group is None:
        return (), dict.fromkeys(parts)
    values = {split: part.beside[columns.group] for split, part in parts.items()}
    if columns.groups:
        _require_known(values, columns)
        coded = {split: _by_rule(column, columns) for split, column in values.items()}
        _require_rows(coded["train"], columns)
        return tuple(rule.name for rule in columns.groups), dict(coded)
    names = tuple(sorted({value for column in values.values() for value in column}))
    if len(names) > MAX_GROUPS:
        raise DataError(
            f"expected at most {MAX_GROUPS} groups in column {columns.group!r}, got {len(names)}; "
            "name groups of values in columns.groups, or name another column"
        )
    code = {name: position for position, name in enumerate(names)}
    return names, {
        split: np.array([code[value] for value in column], np.int64)
        for split, column in values.items()
    }


def _by_rule(column: np.ndarray, columns: Columns) -> np.ndarray:
    codes = np.full(len(column), NO_GROUP, np.int64)
    for code, rule in enumerate(columns.groups):
        if not rule.rest:
            taken = _taken(column, rule, str(columns.group))
            twice = taken & (codes != NO_GROUP)
            if twice.any():
                row = int(np.flatnonzero(twice)[0])
                first = columns.groups[codes[row]].name
                raise DataError(
                    f"expected every value of column {columns.group!r} in one group at most, got "
                    f"{column[row]!r} in {first!r} and {rule.name!r}; correct columns.groups"
                )
            codes[taken] = code
    for code, rule in enumerate(columns.groups):
        if rule.rest:
            codes[codes == NO_GROUP] = code
    return codes


def _taken(column: np.ndarray, rule: GroupRule, name: str) -> np.ndarray:
    """Return which rows a rule takes; a missing value lies in no range."""
    if rule.values:
        wanted = [text for value in rule.values for text in _spellings(value)]
        return np.isin(column.astype(str), wanted)
    numbers = _numbers(column, rule, name)
    low = -np.inf if rule.low is None else rule.low
    high = np.inf if rule.high is None else rule.high
    taken: np.ndarray = (numbers >= low) & (numbers < high)
    return taken


def _spellings(value: str | float) -> set[str]:
    """Return how a value may be written in a column of text: whole numbers with or without .0."""
    if isinstance(value, str):
        return {value}
    return {str(value), str(float(value))} | ({str(int(value))} if value == int(value) else set())


def _numbers(column: np.ndarray, rule: GroupRule, name: str) -> np.ndarray:
    try:
        return np.array([float(value) if value else np.nan for value in column], np.float64)
    except ValueError as error:
        raise DataError(
            f"expected numbers in column {name!r} for the range of group {rule.name!r}, got "
            f"{str(error).rpartition(': ')[2]}; list values instead"
        ) from None


def _require_known(values: Mapping[str, np.ndarray], columns: Columns) -> None:
    found = {str(value) for column in values.values() for value in column}
    for rule in columns.groups:
        for value in rule.values:
            if not found & _spellings(value):
                close = nearest(str(value), found)
                hint = (
                    f"did you mean {close[0]!r}?"
                    if close
                    else f"there are: {sorted(found)[:MAX_GROUPS]}"
                )
                raise DataError(
                    f"group {rule.name!r}: no row has {value!r} in column {columns.group!r}; {hint}"
                )


def _require_rows(codes: np.ndarray, columns: Columns) -> None:
    for code, rule in enumerate(columns.groups):
        if not (codes == code).any():
            counts = {r.name: int((codes == c).sum()) for c, r in enumerate(columns.groups)}
            raise DataError(
                f"expected rows of every group in train, got none of {rule.name!r} ({counts}); "
                "correct columns.groups"
            )
