"""MU-Bench's run folder, written and read without MU-Bench."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from unsc_plugin import __version__, models
from unsc_plugin.errors import NotApplicable, RecordError
from unsc_plugin.metrics.accuracy import accuracy
from unsc_plugin.record import Record, Unit

DONE = "all_results.json"
FINAL = "unlearn_final_results.json"
RECEIPT = "plugin_results.json"
SPLITS = ("test", "df", "dr", "ood")
NUMBERS = (
    "dt_accuracy",
    "df_accuracy",
    "dr_accuracy",
    "ood_accuracy",
    "knowledge_gap",
    "zrf",
    "unlearn_overall_accuracy",
    "unlearn_time",
)
_OURS = {"test": "dt", "df": "df", "dr": "dr", "ood": "ood"}


def write_json(path: Path, tree: Any) -> Path:
    """Write a JSON file as MU-Bench does (indent 4, sorted); it appears whole or not at all."""
    text = json.dumps(tree, indent=4, sort_keys=True, allow_nan=False)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def write_run(
    folder: str | Path,
    record: Record,
    logits: Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    labels: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run as MU-Bench leaves it; `all_results.json` comes last, so that it means "done".

    Args:
        folder: made if it is not there; files of other names in it stay.
        record: of a run that is ok, with the numbers `mubench.*`.
        logits: (n, K) of `test`, `df`, `dr` (and `ood`), rows by ascending original index.
        model: the unlearned one; left out, no weights are written.
        labels: int (n,) of the same splits, for the losses.

    Raises:
        RecordError: the run is not ok, or its numbers `mubench.*` are missing.
        DataError: logits and labels that do not belong together.
    """
    folder = Path(folder)
    lacking = [
        one for one in ("dt_accuracy", "df_accuracy") if f"mubench.{one}" not in record.metrics
    ]
    if record.status != "ok" or lacking:
        raise RecordError(
            "expected a record that is ok and has mubench.dt_accuracy and mubench.df_accuracy, "
            f"got status {record.status!r} without {lacking or 'nothing'}; run with --metrics "
            "core,mubench"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    everything: dict[str, float] = {}
    for split in (one for one in SPLITS if one in logits):
        array = np.asarray(logits[split], np.float32)
        numbers = _of_split(split, array, record, (labels or {}).get(split))
        np.save(folder / f"pred_logit_{split}.npy", array)
        write_json(folder / f"{split}_results.json", numbers)
        everything |= numbers
    final = {
        name: record.metrics[f"mubench.{name}"]
        for name in NUMBERS
        if f"mubench.{name}" in record.metrics
    }
    write_json(folder / FINAL, final)
    if model is not None:
        _save_model(model, folder)
    tree = {"schema": 1, "status": record.status}
    kept = record.model_dump(mode="json", by_alias=True)
    write_json(folder / RECEIPT, {**tree, "record": kept})
    (folder / "README.md").write_text(_card(record, final), encoding="utf-8")
    write_json(folder / DONE, everything | final)
    return folder


def _of_split(split: str, array: np.ndarray, record: Record, labels: Any) -> dict[str, float]:
    name = f"mubench.{_OURS[split]}_accuracy"
    found = {}
    if labels is not None:
        found[f"{split}_accuracy"] = accuracy(array, labels, split=split)
        z, y = torch.from_numpy(array).double(), torch.as_tensor(labels).long()
        found[f"{split}_loss"] = float(functional.cross_entropy(z, y))
    elif name in record.metrics:
        found[f"{split}_accuracy"] = record.metrics[name]
    return found


def _save_model(model: nn.Module, folder: Path) -> None:
    backbone: Any = getattr(model, "backbone", model)
    if hasattr(backbone, "save_pretrained"):
        backbone.save_pretrained(folder, safe_serialization=True)
        return
    try:
        models.save_model(model, folder)  # type: ignore[arg-type]  # others are refused there
    except (NotApplicable, AttributeError):
        models.save_weights(backbone, folder / "model.safetensors")


def _card(record: Record, final: Mapping[str, float]) -> str:
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in final.items())
    return (
        f"---\nlibrary_name: unsc_plugin\ntags: [machine-unlearning, {record.method}]\n---\n\n"
        f"# {record.entry} on {record.scenario}\n\nAn unlearned model in MU-Bench's layout. "
        "Accuracies are fractions; see `plugin_results.json` for the whole record.\n\n"
        f"| number | value |\n|---|---|\n{rows}\n\n```\n{record.command}\n```\n"
    )


# --------------------------------------------------------------------------- reading


def read_logits(folder: str | Path) -> dict[str, np.ndarray]:
    """Return the logits of a run folder by split, float (n, K).

    Raises:
        RecordError: a file that holds none.
    """
    found = {}
    for split in SPLITS:
        path = Path(folder) / f"pred_logit_{split}.npy"
        if path.is_file():
            try:
                found[split] = np.load(path, allow_pickle=False)
            except ValueError as error:
                raise RecordError(f"{path}: expected logits, got {error}") from None
    return found


def read_run(folder: str | Path, *, labels: Mapping[str, Any] | None = None) -> Record:
    """Return the record of a finished run folder, be it ours or MU-Bench's own.

    A folder of MU-Bench's says neither labels nor hashes: its record is marked
    `experiment.source: mubench`, with no checks. With `labels` (split -> int (n,)) accuracies are
    computed from the logits again.

    Raises:
        RecordError: the run is not finished, a file is broken, or the accuracies do not fit the
            logits.
    """
    folder = Path(folder)
    if not (folder / DONE).is_file():
        raise RecordError(
            f"{folder}: expected a finished run, found no {DONE}; it was interrupted, or is no run "
            "folder of MU-Bench"
        )
    numbers = _json(folder / DONE)
    if (folder / RECEIPT).is_file():
        record = Record.model_validate_json(json.dumps(_json(folder / RECEIPT)["record"]))
        _same(folder, numbers, {k: record.metrics.get(f"mubench.{k}") for k in NUMBERS[:4]})
    else:
        record = _foreign(folder, numbers)
    logits = read_logits(folder)
    again = {
        f"{_OURS[split]}_accuracy": accuracy(logits[split], one, split=split)
        for split, one in (labels or {}).items()
        if split in logits
    }
    _same(folder, numbers, again)
    return record


def _same(folder: Path, numbers: Mapping[str, float], own: Mapping[str, float | None]) -> None:
    for name, value in own.items():
        if value is not None and not math.isclose(numbers.get(name, value), value, abs_tol=1e-6):
            raise RecordError(
                f"{folder}: expected {name} {value}, got {numbers[name]} in {DONE}; the files are "
                "of different runs"
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(tree, dict):
        raise RecordError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _foreign(folder: Path, numbers: Mapping[str, Any]) -> Record:
    """Return the record of a run that MU-Bench made itself; its place says what it was.

    Raises:
        RecordError: another place than data/backbone/method/ratio/seed.
    """
    parts = folder.resolve().parts[-5:]
    try:
        data, backbone, method, ratio, seed = *parts[:3], float(parts[3]), int(parts[4])
    except (ValueError, IndexError):
        raise RecordError(
            f"{folder}: expected a folder data/backbone/method/ratio/seed, as MU-Bench makes them"
        ) from None
    found = {f"mubench.{one}": float(numbers[one]) for one in NUMBERS[:7] if one in numbers}
    if "unlearn_time" in numbers and float(numbers["unlearn_time"]) >= 0:
        found["mubench.unlearn_time"] = float(numbers["unlearn_time"])
    ours = {"dt": "test", "df": "forget", "dr": "retain"}
    for short, split in ours.items():
        if f"mubench.{short}_accuracy" in found:
            found[f"acc_{split}"] = found[f"mubench.{short}_accuracy"]
    weights = folder / "model.safetensors"
    hashes = {}
    if weights.is_file():
        with weights.open("rb") as handle:
            hashes["model_file"] = hashlib.file_digest(handle, "sha256").hexdigest()
    made = datetime.fromtimestamp((folder / DONE).stat().st_mtime, UTC)
    return Record(
        entry=method,
        method=method,
        scenario=f"mubench-{data}-{backbone}",
        kind="instance",
        unit=Unit(train_seed=0, draw=0),
        seed=seed,
        status="ok",
        experiment={
            "suite": "mubench",
            "source": "mubench",
            "data": data,
            "model": backbone,
            "forget": {"split": "mubench", "ratio": ratio},
            "seed": seed,
        },
        config={},
        hashes=hashes,
        metrics=found,
        package_version=__version__,
        command=f"MU-Bench: {'/'.join(parts)}",
        created=made.isoformat(timespec="seconds"),
    )
