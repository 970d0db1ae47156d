"""Rows for leaderboards made from the common template of the hub: one result, one request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open

from unsc_plugin.adapters._hub_run import Opened
from unsc_plugin.errors import ConfigError, NotApplicable
from unsc_plugin.record import Record

RESULTS, REQUESTS = "eval-results", "eval-queue"
NUMBERS = {
    "unlearn_overall_accuracy": ("mubench.unlearn_overall_accuracy",),
    "dt_accuracy": ("mubench.dt_accuracy", "acc_test"),
    "df_accuracy": ("mubench.df_accuracy", "acc_forget"),
    "dr_accuracy": ("mubench.dr_accuracy", "acc_retain"),
}
"""Key of a row -> the names that our records have it under, in the order of preference."""


@dataclass(frozen=True)
class RowName:
    """The five parts that MU-Bench names a model by; only the backbone's may hold hyphens."""

    data: str
    backbone: str
    method: str
    ratio: float
    seed: int

    def __str__(self) -> str:
        return f"{self.data}-{self.backbone}-{self.method}-{self.ratio}-{self.seed}"


def row_name(opened: Opened) -> RowName:
    """Return what the model of a run is called; `ratio` is in percent of the training rows."""
    spec = opened.request.spec
    ratio = spec.ratio if spec.ratio is not None else round(100 * opened.fraction, 2)
    dataset, entry = opened.setting.dataset, opened.setting.entry
    data = dataset.mubench if dataset is not None and dataset.mubench else opened.data_id
    model = opened.record.experiment["model"].partition("?")[0]
    short = entry.mubench or Path(model.rpartition(":")[2]).name
    return RowName(
        data=_clean(data.rpartition("/")[2], "_"),
        backbone=_clean(short, "-"),
        method=_clean(opened.unit.entry.method, "_"),
        ratio=float(ratio),
        seed=opened.setting.seed,
    )


def _clean(text: str, hyphen: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", hyphen, text).strip("-_.") or "unnamed"


def numbers_of(record: Record) -> dict[str, float]:
    """Return what a row holds of a record's numbers, fractions; an absent one stays absent.

    Raises:
        NotApplicable: a correction, which forgets no rows.
    """
    found = {
        key: next((record.metrics[name] for name in names if name in record.metrics), None)
        for key, names in NUMBERS.items()
    }
    present = {key: value for key, value in found.items() if value is not None}
    if "df_accuracy" not in present:
        raise NotApplicable(
            "expected a run that forgets rows, got one without accuracies on a forget set; such "
            "leaderboards have no place for it"
        )
    return present


def result(name: RowName, numbers: Mapping[str, float], org: str) -> dict[str, Any]:
    """Return a row's result file."""
    return {
        "config": {
            "model_dtype": "torch.float32",
            "model_name": f"{org}/{name}",
            "model_sha": "main",
        },
        "results": {f"{name.data}_{name.ratio}": dict(numbers)},
    }


def request(
    name: RowName, org: str, *, base_model: str, parameters: int, license: str, when: datetime
) -> dict[str, Any]:
    """Return a row's request file: the model as it is queued; it is finished already."""
    return {
        "model": f"{org}/{name}",
        "base_model": base_model,
        "revision": "main",
        "private": False,
        "precision": "float32",
        "weight_type": "Original",
        "params": parameters / 1e9,
        "status": "FINISHED",
        "submitted_time": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model_type": "fine-tuned",
        "license": license,
    }


def write(opened: Opened, directory: Path, *, org: str, license: str) -> tuple[Path, Path]:
    """Write both files of a run under `directory` and return their paths.

    Raises:
        ConfigError: the row is there already.
        NotApplicable: a correction.
    """
    name, numbers = row_name(opened), numbers_of(opened.record)
    now = datetime.now(UTC)
    asked = directory / REQUESTS / org / f"{name}_eval_request_False_float32_Original.json"
    if asked.exists():
        raise ConfigError(f"{asked} exists: this row has been written; give another folder")
    stamp = now.strftime("%Y-%m-%dT%H-%M-%S.%f")
    measured = directory / RESULTS / org / str(name) / f"results_{stamp}.json"
    queued = request(
        name,
        org,
        base_model=opened.base_model or "",
        parameters=parameters_in(opened.folder / "model.safetensors"),
        license=license,
        when=now,
    )
    for path, tree in ((measured, result(name, numbers, org)), (asked, queued)):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        scratch.replace(path)
    return measured, asked


def parameters_in(path: Path) -> int:
    """Return how many numbers a file of weights holds.

    Raises:
        ConfigError: no such file.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: expected the weights of the run, found none")
    with safe_open(path, "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        count = 1
        for side in shape:
            count *= side
        total += count
    return total
