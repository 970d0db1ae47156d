"""What a correction did: its goals before, planned and realised; an audit of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unsc_plugin._cli.console import ABSENT, grid, line, show

if TYPE_CHECKING:
    from unsc_plugin.record import Record

WIDEST = 40
SHOWN = 5


def show_correction(found: Record) -> None:
    """Print goals and weights of a record that has a plan, and the intervals of its numbers."""
    for name, (low, high) in found.intervals.items():
        if name in INTERVALS:
            line(f"{name}: 95 % bootstrap interval of the test rows [{low:.4f}, {high:.4f}]")
    plan = found.stats.get("plan")
    if not plan:
        return
    if plan.get("noop"):
        line(f"nothing was changed: {plan['noop']}")
    if "goals" in plan:
        realised = found.stats.get("realised_values", {})
        show(grid("goals on validation rows", COLUMNS, _goals(plan, realised)))
        short = [
            f"; {100 * max(shares):.0f} % of a gap is missing {when}"
            for shares, when in (
                (plan.get("shortfall"), "in the plan"),
                (realised.get("fit", {}).get("missing"), "in the result"),
            )
            if shares and max(shares) > 0
        ]
        line(f"plan: {len(plan['rounds'])} rounds, stopped: {plan['stop']}{''.join(short)}")
    if "warning" in plan:
        line(f"warning: {plan['warning']}")
    if weights := plan.get("weights"):
        _show_weights(weights, found.stats)


INTERVALS = ("dp_soft", "dp_diff", "eop_diff", "eo_diff", "worst_group_acc", "acc")
COLUMNS = ("goal", ">before", ">asked", ">planned", ">realised", ">selection rows")


def _goals(plan: Mapping[str, Any], realised: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for at, goal in enumerate(plan["goals"]):
        before, planned = plan["before"]["f"][at], plan["planned"]["f"][at]
        asked = before - plan["sign"][at] * plan["asked_share"] * plan["gap"][at]
        ends = [realised.get(part, {}).get("f") for part in ("fit", "selection")]
        after = [ABSENT if f is None else f"{f[at]:.4f}" for f in ends]
        rows.append((goal, f"{before:.4f}", f"{asked:.4f}", f"{planned:.4f}", *after))
    return rows


def _show_weights(weights: Mapping[str, Any], stats: Mapping[str, Any]) -> None:
    base = stats.get("base", {}).get("method")
    how = f", applied by {base} as {stats.get('realised')} weights" if base else ""
    line(
        f"weights: {weights['changed']} samples changed, |ε| {weights['norm']:.3f}, effective "
        f"sample size {weights['effective_n']:.0f}{how}"
    )
    most = max([*weights["histogram"], 1])
    rows = [
        (f"{low:g} .. {high:g}", str(count), "█" * round(WIDEST * count / most))
        for low, high, count in zip(
            weights["edges"], weights["edges"][1:], weights["histogram"], strict=False
        )
    ]
    show(grid("ε", ("from .. to", ">samples", ""), rows))
    cells = [
        (str(one.get("group", ABSENT)), str(one["label"]), str(one["n"]), f"{one['mean']:+.4f}")
        for one in weights["cells"]
    ]
    show(grid("mean ε", ("group", "label", ">samples", ">mean"), cells))
    line(f"lowest: {_ends(weights['lowest'])}; highest: {_ends(weights['highest'])}")


def _ends(pairs: Sequence[Sequence[float]]) -> str:
    shown = ", ".join(f"{index} ({value:+.3f})" for index, value in pairs[:SHOWN])
    more = len(pairs) - SHOWN
    return (shown or "none") + (f" and {more} more in the record" if more > 0 else "")
