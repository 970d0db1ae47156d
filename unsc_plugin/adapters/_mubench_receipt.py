"""What a run inside MU-Bench leaves behind for us: a record, and where its numbers come from."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from unsc_plugin import __version__
from unsc_plugin import run as pipeline
from unsc_plugin.adapters._mubench_config import as_json, recipe_of
from unsc_plugin.adapters._mubench_folder import RECEIPT, read_logits, read_run, write_json
from unsc_plugin.adapters._mubench_plan import Run
from unsc_plugin.errors import ConfigError
from unsc_plugin.metrics import distance, divergence, mubench
from unsc_plugin.record import Record, Unit
from unsc_plugin.runtime import state_sha256
from unsc_plugin.spec import derive

SPLITS = {"df": "forget", "dr": "retain", "test": "test"}

Seen = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Receipt:
    """The content of `plugin_results.json` and the run folder it belongs to."""

    folder: Path
    tree: dict[str, Any]

    @classmethod
    def of(cls, run: Run, seen: Seen) -> Receipt:
        """Return the receipt of a run; `seen` has logits and labels per split, none if it failed.

        Raises:
            ConfigError: a reference that is another run's.
        """
        host, plan = run.host, run.plan
        data = run.unlearn_config.data_name
        by_list = host.options.forgotten_class is None
        record = _record(run, seen)
        checkout = host.checkout
        tree = {
            "schema": 1,
            "status": record.status,
            "record": record.model_dump(mode="json", by_alias=True),
            "unlearn_wall_time": run.unlearn_wall_time,
            "split": plan.name,
            "not_mubench_split": not by_list,
            "row_order": plan.order,
            "split_sha256": plan.request.forget_sha256,
            "index_file": {"name": f"{data}.txt", "sha256": checkout.sha256.get(data)}
            if by_list
            else None,
            "checkout": checkout.commit,
            "untested": host.untested,
            "options": as_json(host.options),
            "config_changes": host.changes,
            "ignored_keys": run.ignored,
            "orig_dt": {key: run.original.get(key) for key in ("value", "source")},
            "original": {"trained_fraction": 0.85, "rows": "unknown"}
            if data.startswith("cifar")
            else {"trained_fraction": None, "rows": "unknown"},
        }
        return cls(Path(run.args.output_dir), tree)


def write(receipt: Receipt) -> Path:
    """Write `plugin_results.json` into the run folder at once."""
    receipt.folder.mkdir(parents=True, exist_ok=True)
    return write_json(receipt.folder / RECEIPT, receipt.tree)


def _record(run: Run, seen: Seen) -> Record:
    host, plan, config = run.host, run.plan, run.unlearn_config
    result = run.result
    named, preset = host.registry.method(run.name)
    preset = host.options.preset or preset
    ok = result is None or result.status != "diverged"
    metrics = _metrics(run, seen) if ok else {}
    reference = _reference(run, seen, metrics) if ok and seen else {}
    options = dataclasses.asdict(run.method.config)
    return Record(
        entry=config.unlearn_method,
        method=named.name,
        preset=preset,
        scenario=f"mubench-{config.data_name}-{config.backbone}",
        kind=plan.request.kind,
        unit=Unit(train_seed=0, draw=0),
        seed=run.run_seed,
        status="ok" if ok else "diverged",
        reason=None if ok or result is None else result.reason,
        experiment={
            "suite": "mubench",
            "data": config.data_name,
            "model": config.backbone,
            "recipe": recipe_of(run.args).model_dump(mode="json"),
            "forget": {"split": plan.name, "ratio": float(config.del_ratio)},
            "seed": run.seed,
        },
        config=json.loads(json.dumps(options)),
        hashes=_hashes(run),
        metrics=metrics,
        reference=reference,
        missing={}
        if "mubench.knowledge_gap" in metrics or not metrics
        else {"mubench.knowledge_gap": "fewer retained than forgotten rows"},
        cost=result.cost if result else {},
        stats={"samples_read": {str(k): v for k, v in result.read.items()}, **result.stats}
        if result
        else {},
        needs=sorted(str(split) for split in run.method.opens),
        n_hyperparameters=len(options),
        environment=pipeline.environment(),
        commit=pipeline.commit(),
        package_version=__version__,
        command=shlex.join(["python", *sys.argv]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _metrics(run: Run, seen: Seen) -> dict[str, float]:
    """Return our numbers of the logits; names, formulas and seeds are those of `unsc run`."""
    if not {"test", "df"} <= seen.keys():
        return {}
    config = run.unlearn_config
    seconds = None if run.result is None else run.unlearn_time
    found = mubench.block(
        test=seen["test"],
        forget=seen["df"],
        retain=seen.get("dr"),
        orig_dt=run.original["value"],
        dataset=config.data_name,
        method=config.unlearn_method,
        seconds=seconds,
        seed=derive(run.seed, "zrf", 0),
    )
    names = {"dt": "test", "df": "forget", "dr": "retain"}
    own = {
        f"acc_{split}": found[f"mubench.{short}_accuracy"]
        for short, split in names.items()
        if f"mubench.{short}_accuracy" in found
    }
    return own | found


def _reference(run: Run, seen: Seen, metrics: dict[str, float]) -> dict[str, float]:
    """Add the gaps to a retrained model's run folder to `metrics`; return its own numbers.

    Raises:
        ConfigError: the folder is another data set's, backbone's, ratio's or seed's.
    """
    place = run.host.options.reference
    if place is None:
        return {}
    other = read_run(Path(place))
    config = run.unlearn_config
    mine = (config.data_name, config.backbone, float(config.del_ratio), run.seed)
    theirs = (
        other.experiment["data"],
        other.experiment["model"],
        other.experiment["forget"]["ratio"],
        other.experiment["seed"],
    )
    if mine != theirs:
        raise ConfigError(f"--reference {place}: expected a run of {mine}, got one of {theirs}")
    logits = read_logits(Path(place))
    for short, split in SPLITS.items():
        name = f"acc_{split}"
        if name in metrics and name in other.metrics:
            metrics[f"delta_{split}"] = distance.delta(metrics[name], [other.metrics[name]])
        if short in seen and short in logits and split != "retain":
            metrics[f"js_{split}"] = divergence.js_to_pool(seen[short][0], [logits[short]])
    return {name: value for name, value in other.metrics.items() if name in metrics}


def _hashes(run: Run) -> dict[str, str]:
    plan = run.plan
    found = {
        "labels": plan.labels_sha256,
        "forget": plan.request.forget_sha256,
        "retain": plan.request.retain_sha256,
    }
    if "sha256" in run.original:
        found["original"] = run.original["sha256"]
    if run.result is not None:
        found["unlearned"] = state_sha256(run.result.model)
    return found
