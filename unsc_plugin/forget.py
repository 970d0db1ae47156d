"""Forget sets: which training rows to forget, by class, chance, sub-label, list or sequence.

A request names rows by their position in the original training split, so that it means the same
rows whatever was carved from the split, and carries the SHA-256 of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from unsc_plugin._data.indices import check_indices, check_order, read_indices, take_prefix
from unsc_plugin._data.indices import reorder as reorder  # part of this module's public face
from unsc_plugin._data.pieces import int64_sha256, stratified
from unsc_plugin.errors import ForgetSetError, RowOrderMismatch, UnknownName, nearest
from unsc_plugin.rows import Rows
from unsc_plugin.spec import DataInfo, ForgetSpec, Scenario, canonical_json, derive

Kind = Literal["instance", "class", "subclass", "sequence", "correction"]
SHORTHANDS = (
    "class:3,5  random:0.1  random:100  subclass:COLUMN=VALUE  file:PATH  indices:1,2,3  "
    "sequence:random:16x8  correction"
)
VAL_FRACTION = 0.2
"""Share of the training rows that a correction validates on where the data have no such rows."""

_KINDS: dict[str, tuple[Kind, Scenario]] = {
    "class": ("class", Scenario.CLASS),
    "subclass": ("subclass", Scenario.SUBCLASS),
    "sequence": ("sequence", Scenario.SEQUENTIAL),
    "correction": ("correction", Scenario.CORRECTION),
}


@dataclass(frozen=True, eq=False)
class Request:
    """A forget set on a certain training split.

    `forget` and `retain` are positions in the split's rows, int64, ascending, disjoint and together
    all rows. `forget_index` and both hashes speak of positions in the original training split.
    `classes` are the classes that only forget rows have. In a sequence `steps` are its requests in
    order: the forget rows of a step are its own, its retain rows exclude those of all steps so far.
    A correction has no forget rows; `val` are the positions that it takes for validation, if any.
    """

    spec: ForgetSpec
    kind: Kind
    scenario: Scenario
    forget: np.ndarray
    retain: np.ndarray
    forget_index: np.ndarray
    forget_sha256: str
    retain_sha256: str
    classes: tuple[int, ...]
    steps: tuple[Request, ...] = ()
    val: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def n(self) -> int:
        """Number of rows to forget."""
        return len(self.forget)


def split_sha256(indices: Any) -> str:
    """Return the SHA-256 of the indices, ascending, as little-endian int64.

    >>> split_sha256([2, 1]) == split_sha256([1, 2])
    True
    """
    return int64_sha256(np.sort(np.asarray(indices, np.int64)))


# --------------------------------------------------------------------------- names


def parse(text: str) -> ForgetSpec:
    """Return the forget set that a shorthand describes; it needs no registry.

    `class:3,5`, `random:0.1` (a share), `random:100` (a number), `subclass:COLUMN=VALUE[,VALUE]`,
    `file:PATH`, `indices:1,2,3`, `sequence:random:16x8` (8 disjoint requests of 16), `correction`
    or `correction:0.3` (nothing to forget; the share for validation). A whole forget set as one
    JSON object is read too.

    >>> parse("random:0.1").fraction, parse("random:100").n, parse("class:3,5").classes
    (0.1, 100, (3, 5))

    Raises:
        ForgetSetError: a shorthand of no known kind, or with a value it cannot have.
    """
    if text.lstrip().startswith("{"):
        try:
            return ForgetSpec.model_validate_json(text)
        except ValidationError as error:
            raise ForgetSetError(f"forget set {text!r}: {error.errors()[0]['msg']}") from None
    kind, _, value = text.partition(":")
    readers: dict[str, Callable[[], dict[str, Any]]] = {
        "class": lambda: {"kind": "class", "classes": _integers(text, value)},
        "indices": lambda: {"kind": "indices", "indices": _integers(text, value)},
        "random": lambda: {"kind": "random", **_amount(text, value)},
        "file": lambda: {"kind": "index_file", "path": value},
        "subclass": lambda: {"kind": "subclass", **_sub_label(text, value)},
        "sequence": lambda: {"kind": "sequence", "steps": _steps(text, value)},
        "correction": lambda: {"kind": "correction", "val_fraction": _number(text, value)},
    }
    if text == "correction":
        return ForgetSpec(kind="correction")
    if kind not in readers or not value:
        close = nearest(kind, readers)
        hint = f"did you mean {close[0]}:...?" if close and kind not in readers else SHORTHANDS
        raise ForgetSetError(f"expected a forget set such as class:3, got {text!r}; {hint}")
    return _spec(text, **readers[kind]())


def resolve(
    text: str | ForgetSpec, registry_entries: Mapping[str, ForgetSpec], data_name: str
) -> ForgetSpec:
    """Return the forget set of a registered name, `name@value` or shorthand, checked for the data.

    `value` is the ratio of an index prefix, or the share or number of a random set. Registered
    names inside a sequence are replaced by what they stand for.

    Raises:
        UnknownName: no such registered forget set.
        ForgetSetError: made for other data, or a value that the set does not take.
    """
    spec = text if isinstance(text, ForgetSpec) else _named(text, registry_entries)
    if spec.data is not None and spec.data != data_name:
        raise ForgetSetError(
            f"expected a forget set for {data_name!r}, got "
            f"{text if isinstance(text, str) else spec.kind!r}, which is made for {spec.data!r}; "
            f"use --data {spec.data}, or a shorthand: {SHORTHANDS}"
        )
    if spec.kind != "sequence":
        return spec
    steps = [
        step if ":" in step else _as_text(resolve(step, registry_entries, data_name))
        for step in spec.steps
    ]
    return spec.model_copy(update={"steps": tuple(steps)})


def _as_text(spec: ForgetSpec) -> str:
    return canonical_json(spec.model_dump(mode="json", exclude_defaults=True))


def _named(text: str, registry_entries: Mapping[str, ForgetSpec]) -> ForgetSpec:
    if ":" in text or text == "correction":
        return parse(text)
    name, at, value = text.partition("@")
    if name not in registry_entries:
        raise UnknownName("forget set", name, registry_entries, f"or a shorthand: {SHORTHANDS}")
    spec = registry_entries[name]
    if not at:
        return spec
    if spec.kind == "index_prefix":
        change: dict[str, Any] = {"ratio": _number(text, value)}
    elif spec.kind == "random":
        change = {"fraction": None, "n": None, **_amount(text, value)}
    else:
        raise ForgetSetError(f"{text!r}: a forget set of kind {spec.kind} takes no value after @")
    return _spec(text, **{**spec.model_dump(), **change})


def _spec(text: str, **fields: Any) -> ForgetSpec:
    try:
        return ForgetSpec(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ForgetSetError(
            f"forget set {text!r}: {where} {fault['msg']}, got {fault['input']!r}"[:200]
        ) from None


def _integers(text: str, value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",")]
    if not all(re.fullmatch(r"-?\d{1,18}", part) for part in parts):
        raise ForgetSetError(f"expected whole numbers with commas between, got {text!r}")
    return tuple(int(part) for part in parts)


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ForgetSetError(f"expected a number, got {value!r} in {text!r}") from None


def _amount(text: str, value: str) -> dict[str, Any]:
    """Return `n` for a whole number and `fraction` for one with a point."""
    if re.fullmatch(r"\d{1,18}", value):
        return {"n": int(value)}
    return {"fraction": _number(text, value)}


def _sub_label(text: str, value: str) -> dict[str, Any]:
    column, equals, values = value.partition("=")
    if not column or not equals or not values:
        raise ForgetSetError(f"expected subclass:COLUMN=VALUE[,VALUE], got {text!r}")
    return {"column": column, "values": tuple(part.strip() for part in values.split(","))}


def _steps(text: str, value: str) -> tuple[str, ...]:
    found = re.fullmatch(r"random:(\d{1,9})x(\d{1,4})", value)
    if not found or not int(found[1]) or not int(found[2]):
        raise ForgetSetError(f"expected sequence:random:SIZExCOUNT, got {text!r}")
    return (f"random:{int(found[1])}",) * int(found[2])


# --------------------------------------------------------------------------- selection


def select(
    spec: ForgetSpec,
    train: Rows,
    *,
    seed: int = 0,
    info: DataInfo,
    allow_foreign_order: bool = False,
    has_val: bool = True,
) -> Request:
    """Return the rows of `train` that `spec` describes, and the rest.

    Args:
        spec: the forget set; a seed of its own stands over `seed`.
        train: the training rows.
        seed: seed of random draws; step t of a sequence draws from what the steps before it left,
            with a seed derived from it and t.
        info: the data set that `train` belongs to.
        allow_foreign_order: take an index list although it was made for another row order.
        has_val: whether the data set has validation rows, which a correction then takes.

    Raises:
        ForgetSetError: an empty set, all rows, a class, column, value or index that the training
            rows do not have, or steps that overlap.
        RowOrderMismatch: an index list made for another order of the rows.
    """
    if not len(train):
        raise ForgetSetError("expected training rows to choose from, got none")
    everything = np.ones(len(train), bool)
    if spec.kind == "correction":
        return _correction(spec, train, seed, has_val)
    if spec.kind != "sequence":
        forget = _positions(spec, train, everything, seed, info, allow_foreign_order)
        return _request(spec, train, forget, everything, ())
    free = everything.copy()
    steps: list[Request] = []
    for number, text in enumerate(spec.steps):
        step = parse(text)
        if step.kind == "sequence":
            raise ForgetSetError(f"step {number + 1} ({text}): a sequence cannot hold a sequence")
        own = derive(seed, "forget-step", number)
        try:
            forget = _positions(step, train, free, own, info, allow_foreign_order)
        except RowOrderMismatch:
            raise
        except ForgetSetError as error:
            raise ForgetSetError(f"step {number + 1} ({text}): {error}") from None
        taken = int((~free[forget]).sum())
        if taken:
            raise ForgetSetError(
                f"expected disjoint steps, got {taken} rows of step {number + 1} ({text}) that an "
                "earlier step forgets; take them out of one of the two"
            )
        steps.append(_request(step, train, forget, free, ()))
        free = free.copy()
        free[forget] = False
    return _request(spec, train, np.flatnonzero(~free), everything, tuple(steps))


def _correction(spec: ForgetSpec, train: Rows, seed: int, has_val: bool) -> Request:
    """Return a request that forgets nothing, with validation rows drawn from every cell.

    Raises:
        ForgetSetError: no row is left to train on.
    """
    val = np.empty(0, np.int64)
    if spec.val_fraction is not None or not has_val:
        labels = train.labels.numpy()
        cells = labels if train.group is None else labels + train.group.numpy() * (labels.max() + 1)
        generator = np.random.default_rng(derive(seed, "validation"))
        share = VAL_FRACTION if spec.val_fraction is None else spec.val_fraction
        val = stratified(cells, round(share * len(train)), generator)
    retain = np.setdiff1d(np.arange(len(train)), val)
    if not len(retain):
        raise ForgetSetError(f"expected training rows beside {len(val)} for validation, got none")
    index = train.index.numpy()
    nothing = np.empty(0, np.int64)
    return Request(
        spec=spec,
        kind="correction",
        scenario=Scenario.CORRECTION,
        forget=nothing,
        retain=retain,
        forget_index=nothing,
        forget_sha256=split_sha256(nothing),
        retain_sha256=split_sha256(index[retain]),
        classes=(),
        val=val,
    )


def _request(
    spec: ForgetSpec,
    train: Rows,
    forget: np.ndarray,
    among: np.ndarray,
    steps: tuple[Request, ...],
) -> Request:
    """Return the request to forget `forget` of the rows that are left, `among` (bool mask).

    Raises:
        ForgetSetError: nothing to forget, or nothing left.
    """
    kept = among.copy()
    kept[forget] = False
    retain = np.flatnonzero(kept)
    if not len(forget):
        raise ForgetSetError(f"expected rows to forget, got none for {_short(spec)}")
    if not len(retain):
        raise ForgetSetError(
            f"expected rows to retain, got none: {_short(spec)} takes all {int(among.sum())} "
            "training rows; forget fewer"
        )
    labels, index = train.labels.numpy(), train.index.numpy()
    kind, scenario = _KINDS.get(spec.kind, ("instance", Scenario.RANDOM))
    gone = np.setdiff1d(labels[forget], labels[retain])
    return Request(
        spec=spec,
        kind=kind,
        scenario=spec.scenario or scenario,
        forget=forget,
        retain=retain,
        forget_index=np.sort(index[forget]),
        forget_sha256=split_sha256(index[forget]),
        retain_sha256=split_sha256(index[retain]),
        classes=tuple(int(label) for label in gone),
        steps=steps,
    )


def _short(spec: ForgetSpec) -> str:
    fields = spec.model_dump(mode="json", exclude_defaults=True)
    return ", ".join(f"{key} {value}" for key, value in fields.items())[:160]


def _positions(
    spec: ForgetSpec,
    train: Rows,
    free: np.ndarray,
    seed: int,
    info: DataInfo,
    allow_foreign_order: bool,
) -> np.ndarray:
    """Return the positions of one request, ascending; random ones are drawn from `free` rows."""
    if spec.kind == "class":
        return _of_classes(spec, train, info)
    if spec.kind == "subclass":
        return _of_sub_labels(spec, train)
    if spec.kind == "random":
        return _drawn(spec, train, free, seed if spec.seed is None else spec.seed)
    if not allow_foreign_order:
        check_order(spec, info)
    if spec.kind == "indices":
        indices = check_indices(spec.indices, "indices", "entry")
    else:
        indices = read_indices(spec.path or "")
    if spec.kind == "index_prefix":
        indices = take_prefix(spec, indices)
    return _located(indices, train)


def _of_classes(spec: ForgetSpec, train: Rows, info: DataInfo) -> np.ndarray:
    wrong = [label for label in spec.classes if not 0 <= label < info.num_classes]
    if wrong:
        names = ", ".join(f"{i} {name}" for i, name in enumerate(info.class_names[:20]))
        raise ForgetSetError(
            f"expected classes 0..{info.num_classes - 1} of {info.name}, got {wrong[0]}"
            + (f"; there are: {names}" if names else "")
        )
    return np.flatnonzero(np.isin(train.labels.numpy(), spec.classes))


def _of_sub_labels(spec: ForgetSpec, train: Rows) -> np.ndarray:
    column, columns = str(spec.column), train.extra
    if column not in columns:
        close = nearest(column, columns)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {sorted(columns)}"
        raise ForgetSetError(
            f"expected a sub-label column, got {column!r}; {hint} (columns.sub_labels names them)"
        )
    values = np.array([str(value) for value in columns[column].tolist()], object)
    known = sorted(set(values.tolist()))
    for wanted in map(str, spec.values):
        if wanted not in known:
            close = nearest(wanted, known) or known[:10]
            raise ForgetSetError(
                f"no training row has {column} = {wanted!r}; the nearest: {', '.join(close)}"
            )
    return np.flatnonzero(np.isin(values, [str(value) for value in spec.values]))


def _drawn(spec: ForgetSpec, train: Rows, free: np.ndarray, seed: int) -> np.ndarray:
    """Return a draw from the free rows: every class with its share, or plainly uniform.

    Raises:
        ForgetSetError: less than one row, or more than there are.
    """
    among = np.flatnonzero(free)
    count = round(spec.fraction * len(train)) if spec.fraction is not None else spec.n or 0
    if not count:
        raise ForgetSetError(
            f"expected rows to forget, got none: {spec.fraction} of {len(train)} rows is less than "
            "one; raise the share or give a number, as random:10"
        )
    if count > len(among):
        raise ForgetSetError(f"expected at most {len(among)} rows to draw, got {count}")
    generator = np.random.default_rng(derive(seed, "forget"))
    if not spec.stratified:
        return np.sort(generator.permutation(among)[:count])
    drawn: np.ndarray = among[stratified(train.labels.numpy()[among], count, generator)]
    return drawn


def _located(indices: np.ndarray, train: Rows) -> np.ndarray:
    """Return the positions of original indices in `train`, ascending.

    Raises:
        ForgetSetError: indices that the training rows do not have.
    """
    index = train.index.numpy()
    order = np.argsort(index)
    at = np.minimum(np.searchsorted(index, indices, sorter=order), len(index) - 1)
    missing = indices[index[order[at]] != indices]
    beyond = missing[missing > index.max()]
    if len(beyond):
        raise ForgetSetError(
            f"expected indices of training rows, 0..{index.max()}, got {beyond[0]} "
            f"({len(beyond)} of {len(indices)} are larger); check that the list is for this data, "
            "and set val_fraction: 0 if its last rows are validation rows"
        )
    if len(missing):
        raise ForgetSetError(
            f"expected indices of training rows, got {len(missing)} of {len(indices)} that lie in "
            f"the validation split (the first: {missing[0]}); set val_fraction: 0 for this data "
            "set, so that no validation rows are carved from train"
        )
    return np.sort(order[at])
