"""One run is one record: written once, never edited, refused when it is not whole.

A record holds what is needed to trust or to repeat a number. Absent numbers stay absent: a metric
is either in `metrics`, in `missing` with the reason, or nowhere.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from unsc_plugin.errors import RecordError

Kind = Literal["instance", "class", "subclass", "sequence", "corrective", "weighted", "correction"]
Status = Literal["ok", "failed", "diverged", "cancelled"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=,-]*")


def _safe_name(name: str) -> str:
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"expected a name of letters, digits and _.+@=,- without '..', got {name!r}; "
            "rename it, because it becomes part of a file name"
        )
    return name


def _plain(value: Any, path: str = "", *, keep_non_finite: bool = False) -> Any:
    """Copy `value` as JSON has it, tuples as lists.

    Raises:
        ValueError: for what JSON cannot hold.
    """
    if isinstance(value, dict):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{path or 'top level'}: expected text keys, got {bad[0]!r}")
        return {
            key: _plain(item, f"{path}.{key}".lstrip("."), keep_non_finite=keep_non_finite)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, path, keep_non_finite=keep_non_finite) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        if keep_non_finite:
            return str(float(value))
        raise ValueError(f"{path}: expected a finite number, got {value}; leave it out")
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{path}: expected a JSON value, got {type(value).__name__}; convert it first")


def _plain_stats(value: Any) -> Any:
    # A method that diverges reports infinite losses; they are evidence, so they stay, as text.
    return _plain(value, keep_non_finite=True)


def _utc(text: str) -> str:
    moment = datetime.fromisoformat(text)
    if moment.utcoffset() != timedelta(0):
        raise ValueError(f"expected an ISO time in UTC, got {text!r}; use datetime.now(UTC)")
    return text


Name = Annotated[str, AfterValidator(_safe_name)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Numbers = dict[str, Finite]
Json = Annotated[dict[str, Any], BeforeValidator(_plain)]
Stats = Annotated[dict[str, Any], BeforeValidator(_plain_stats)]
UtcTime = Annotated[str, AfterValidator(_utc)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)


class Unit(_Strict):
    """The ids (train seed s, forget draw d) of one cell of the board's grid."""

    train_seed: NonNegativeInt
    draw: NonNegativeInt

    def __str__(self) -> str:
        return f"s{self.train_seed}d{self.draw}"


class Record(_Strict):
    """Everything that one run of one entry at one unit left behind.

    `metrics` are the subject's numbers; `reference` and `reference_std` are the mean and the
    standard deviation of the same names over the retrained pool R_A whose members
    `reference_hashes` lists. A run that is not `ok` carries the reason; one that diverged has no
    metrics. Non-finite numbers are refused, except in `stats`, where they are kept as text.

    `curves` is what the runner measured on the way, also of a run that diverged: `rounds`, one
    entry per request of a sequence, or `trajectory`, accuracies along the steps of a run that
    forgets `k` instances. `intervals` are bootstrap limits of some metrics. A record without curves
    or intervals is written without the field.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    entry: Name
    method: str
    preset: str | None = None
    track: str = "default"
    board: str | None = None
    scenario: Name
    kind: Kind
    unit: Unit
    seed: NonNegativeInt
    status: Status
    reason: str | None = None
    experiment: Json
    config: Json
    hashes: dict[str, str] = Field(default_factory=dict)
    reference_hashes: list[str] = Field(default_factory=list)
    metrics: Numbers = Field(default_factory=dict)
    intervals: dict[str, list[Finite]] = Field(default_factory=dict)
    reference: Numbers = Field(default_factory=dict)
    reference_std: Numbers = Field(default_factory=dict)
    missing: dict[str, str] = Field(default_factory=dict)
    cost: Numbers = Field(default_factory=dict)
    stats: Stats = Field(default_factory=dict)
    curves: Json = Field(default_factory=dict)
    needs: list[str] = Field(default_factory=list)
    n_hyperparameters: NonNegativeInt = 0
    checks: Json | None = None
    environment: Json = Field(default_factory=dict)
    commit: str | None = None
    package_version: str
    command: str
    created: UtcTime

    @model_validator(mode="after")
    def _consistent(self) -> Record:
        if (self.status == "ok") != (self.reason is None):
            raise ValueError(
                f"expected a reason exactly when the run is not ok, got status {self.status!r} "
                f"with reason {self.reason!r}; give a reason for every other status"
            )
        if self.status == "diverged" and self.metrics:
            raise ValueError("expected no metrics for a diverged run; leave them out")
        if both := sorted(self.metrics.keys() & self.missing.keys()):
            raise ValueError(
                f"expected {both[0]!r} in either metrics or missing, got both; drop one"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is newer where there is none, so that older records stay as they are."""
        tree: dict[str, Any] = plain(self)
        newer = {"curves": self.curves, "intervals": self.intervals}
        return {k: v for k, v in tree.items() if newer.get(k, True)}

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What must be unique on a board: (scenario, entry, train seed, draw)."""
        return (self.scenario, self.entry, self.unit.train_seed, self.unit.draw)


def file_name(record: Record, *, prefix: bool = False) -> str:
    """Return `<entry>--s<seed>d<draw>.json`, with `<scenario>--` in front if `prefix`."""
    stem = f"{record.entry}--{record.unit}"
    return f"{record.scenario}--{stem}.json" if prefix else f"{stem}.json"


def dumps(record: Record) -> str:
    """Return the record as it stands on disk: sorted keys, two spaces, trailing newline."""
    tree = record.model_dump(mode="json", by_alias=True)
    return json.dumps(tree, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(record: Record, folder: str | Path, *, prefix: bool = False) -> Path:
    """Write a record once: all of it appears under its final name, or nothing does.

    Args:
        record: the finished run.
        folder: made if it is not there.
        prefix: put the scenario into the file name.

    Returns:
        The path of the new file.

    Raises:
        RecordError: if a file of that name exists; it is left as it is.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file_name(record, prefix=prefix)
    text = dumps(record)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".record-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        _publish(Path(temporary), target)
    except FileExistsError:
        raise RecordError(
            f"expected no record at {target}, got a finished one; it is never overwritten: "
            "delete it first to run this unit again"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(folder)
    return target


def read(path: str | Path) -> Record:
    """Read and validate one record.

    Raises:
        RecordError: if the file is absent, truncated, not JSON, has unknown keys or wrong types.
    """
    path = Path(path)
    try:
        tree = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
        )
        return Record.model_validate(tree)
    except ValidationError as error:
        raise RecordError(_complaint(path, _validation_text(error))) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(_complaint(path, str(error))) from None


def read_folder(folder: str | Path) -> list[Record]:
    """Read every `*.json` of a folder, sorted by (scenario, entry, unit).

    Hidden files (an interrupted writer's temporary ones) are not records.

    Raises:
        RecordError: if the folder is absent, a file is not a record, or two files hold one unit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordError(f"expected a folder of records at {folder}, got none; check the path")
    found: dict[tuple[str, str, int, int], list[tuple[str, Record]]] = {}
    for path in sorted(folder.glob("*.json")):
        if not path.name.startswith("."):
            record = read(path)
            found.setdefault(record.key, []).append((path.name, record))
    duplicates = [[name for name, _ in group] for group in found.values() if len(group) > 1]
    if duplicates:
        listing = "; ".join(", ".join(names) for names in duplicates)
        raise RecordError(
            f"expected one record per unit in {folder}, got duplicates: {listing}; "
            "keep one file of each group"
        )
    return [found[key][0][1] for key in sorted(found)]


def _publish(temporary: Path, target: Path) -> None:
    """Give the file its final name unless that name is taken; of two writers one wins.

    Raises:
        OSError: FileExistsError if the name is taken; whatever else the file system says.
    """
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}:
            raise
        # No hard links here: the exclusive creation decides who wins, the rename fills the file.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        os.replace(temporary, target)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} stands twice")
        result[key] = value
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a finite number")


def _validation_text(error: ValidationError, shown: int = 3) -> str:
    issues = [
        f"{'.'.join(str(part) for part in issue['loc']) or 'record'}: {issue['msg']}"
        for issue in error.errors(include_url=False)
    ]
    more = f" (and {len(issues) - shown} more)" if len(issues) > shown else ""
    return "; ".join(issues[:shown]) + more


def _complaint(path: Path, found: str) -> str:
    return (
        f"{path}: expected a whole record of schema 1, got: {found}\n"
        "delete the file and run its unit again, or read it with the version that wrote it"
    )
