"""The rows of `unsc list`, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unsc_plugin._cli import adapters
from unsc_plugin._cli.console import grid, show

if TYPE_CHECKING:
    from unsc_plugin.registry import Named, Registry

BETTER = {"up": "higher", "down": "lower", "retrain": "as retrained", "zero": "near 0"}


def plain(value: Any) -> str:
    """Return a value as `--set` takes it: null, true, numbers with up to six digits, text bare."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, default=str, ensure_ascii=False)


def list_rows(registry: Registry, what: str) -> list[dict[str, str]]:
    """Return one row per name of a list, unavailable and broken ones included."""
    if what == "metrics":
        return _metric_rows()
    if what == "boards":
        return _board_rows()
    if what == "adapters":
        return _adapter_rows()
    named = [*getattr(registry, what.replace("-", "_")).values()]
    if what == "methods":
        named += registry.broken
    return [
        _row(one.name, one.origin, _about(one), one.status, one.reason)
        for one in sorted(named, key=lambda one: one.name)
    ]


def _row(
    name: str, origin: str, summary: str, status: str = "ok", reason: str = ""
) -> dict[str, str]:
    return {
        "name": name, "origin": origin, "status": status, "reason": reason, "summary": summary,
    }  # fmt: skip


def _about(named: Named) -> str:
    """Return the summary, or what the entry says of itself."""
    entry: Any = named.entry
    if entry is None:
        return ""
    if named.summary or named.kind == "methods":
        return named.summary
    if named.kind == "backbones":
        return f"{entry.source}:{entry.id}"
    if named.kind == "datasets":
        return str(entry.path or entry.id)
    fields = entry.model_dump(mode="json", exclude_defaults=True, exclude={"kind", "data"})
    return ", ".join([entry.kind, *(f"{key} {plain(value)}" for key, value in fields.items())])


def _metric_rows() -> list[dict[str, str]]:
    from unsc_plugin.metrics import METRICS

    return [
        {
            **_row(spec.name, "built-in", spec.summary),
            "unit": spec.unit,
            "better": BETTER[spec.direction],
        }
        for spec in METRICS.values()
    ]


def _board_rows() -> list[dict[str, str]]:
    from unsc_plugin import bench
    from unsc_plugin.errors import UnscError

    rows = []
    for name in bench.names():
        try:
            title, status, reason = bench.open_board(name).spec.title, "ok", ""
        except UnscError as error:
            title, status, reason = "", "broken", str(error).splitlines()[0]
        rows.append(_row(name, f"benchmarks/{name}", title, status, reason))
    return rows


def _adapter_rows() -> list[dict[str, str]]:
    return [
        _row(name, "built-in", summary, "unavailable" if reason else "ok", reason)
        for name, reason, summary in adapters.rows()
    ]


def show_list(what: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print the rows of a list."""
    if what == "metrics":
        columns = ("name", "unit", "better", "summary")
        cells = [[row[column] for column in columns] for row in rows]
    else:
        columns = ("name", "origin", "status", "summary")
        cells = [
            [row["name"], row["origin"], worded(row["status"], row["reason"]), row["summary"]]
            for row in rows
        ]
    show(grid(what, columns, cells))


def worded(status: str, reason: str) -> str:
    """Return a status with the reason for it."""
    return f"{status}: {reason}" if reason else status
