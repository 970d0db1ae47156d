"""What the command line shows: entries, methods, records and numbers, as tables."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from unsc_plugin._cli.console import ABSENT, complain, grid, line, show
from unsc_plugin._cli.corrections import show_correction
from unsc_plugin._cli.lists import BETTER, plain, worded

if TYPE_CHECKING:
    from unsc_plugin.evaluation import Evaluation
    from unsc_plugin.record import Record
    from unsc_plugin.registry import Named, Registry

DIGITS = {"pp": 2, "bits": 4, "s": 2, "bytes": 0, "sample passes": 0}
"""Digits after the point of the units that are shown; shares and scores are bare, with four."""
KINDS = {
    "backbones": "backbone",
    "datasets": "data set",
    "forget_sets": "forget set",
}
REQUESTS = {
    "class": "--forget class:3",
    "random": "--forget random:0.1",
    "weighted": "--forget random:0.1",
    "sequential": "--forget sequence:random:30x4",
    "subclass": "--data trec --forget 'subclass:fine_label=NUM:date'",
    "correction": "--data digits-noisy --forget digits-noisy/mislabelled",
}
"""A forget set of every scenario, the commonest first: what an example is written with."""


def pairs(title: str, tree: Mapping[str, Any]) -> Table:
    """Return a two-column table; a map inside becomes one line per key, absent values go."""
    rows = [(key, _lines(value)) for key, value in tree.items() if value not in (None, {}, [], "")]
    table = grid(title, ("", ""), rows)
    table.show_header = False
    return table


def _lines(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {plain(item)}" for key, item in value.items())
    return plain(value)


# --------------------------------------------------------------------------- one name


def entry_tree(named: Named) -> dict[str, Any]:
    """Return what is known of a backbone, a data set or a forget set."""
    assert named.entry is not None
    return {
        "kind": KINDS[named.kind],
        "name": named.name,
        "origin": named.origin,
        "status": named.status,
        "reason": named.reason,
        "entry": named.entry.model_dump(mode="json", exclude_defaults=True),
    }


def show_entry(tree: Mapping[str, Any]) -> None:
    """Print a backbone, a data set or a forget set."""
    status = worded(tree["status"], tree["reason"])
    head = {"what": tree["kind"], "origin": tree["origin"], "status": status}
    show(pairs(tree["name"], {**head, **tree["entry"]}))


def metric_tree(name: str) -> dict[str, Any] | None:
    """Return what is known of a metric; None if there is none of that name."""
    import dataclasses

    from unsc_plugin.metrics import METRICS

    if name not in METRICS:
        return None
    spec = METRICS[name]
    return {
        "what": "metric",
        **dataclasses.asdict(spec),
        "better": BETTER[spec.direction],
    }


def show_metric(tree: Mapping[str, Any]) -> None:
    """Print what a metric means."""
    shown = {key: tree[key] for key in ("what", "summary", "unit", "better", "tier")}
    lists = {key: ", ".join(tree[key]) for key in ("needs", "kinds")}
    show(pairs(tree["name"], {**shown, **lists}))


def method_tree(registry: Registry, name: str) -> dict[str, Any]:
    """Return the entry of a method, its settings with their values, its presets, an example."""
    from unsc_plugin.registry import config_table

    named, tag = registry.method(name)
    kind = registry.method_class(name)
    entry: Any = named.entry
    chosen = vars(registry.create(name).config)
    flags = REQUESTS[min(entry.scenarios, key=list(REQUESTS).index)]
    plugins = "".join(f" --plugin {plugin}" for plugin in registry.plugins)
    return {
        "name": named.name,
        "preset": tag,
        "origin": named.origin,
        "about": inspect.cleandoc(kind.__doc__ or ""),
        "entry": entry.model_dump(mode="json", exclude_defaults=True),
        "settings": [{**row, "value": chosen[row["name"]]} for row in config_table(kind)],
        "config": chosen,
        "presets": {key: preset.args for key, preset in entry.presets.items()},
        "example": f"unsc run {name} {flags}{plugins}",
    }


def show_method(tree: Mapping[str, Any]) -> None:
    """Print a method."""
    entry = tree["entry"]
    tag = f".{tree['preset']}" if tree["preset"] else ""
    line(f"{tree['name']}{tag} ({tree['origin']}): {entry['summary']}\n\n{tree['about']}\n")
    if tree["settings"]:
        columns = ("setting", "type", ">value", ">default", "meaning")
        rows = [
            (row["name"], row["type"], plain(row["value"]), plain(row["default"]), row["meaning"])
            for row in tree["settings"]
        ]
        show(grid("", columns, rows))
    presets = entry.get("presets", {})
    facts = {
        "needs": ", ".join(entry["needs"]) or "no data",
        "scenarios": ", ".join(entry["scenarios"]),
        "paper": _cited(entry.get("paper")),
        "also called": _other_names(entry),
        "requires": ", ".join(entry.get("requires", ())),
        **{
            f"{tree['name']}.{key}": f"{_args(preset.get('args', {}))} ({preset['source']})"
            for key, preset in presets.items()
        },
        "example": tree["example"],
    }
    for key, fact in facts.items():
        if fact:
            line(f"{key}: {fact}")


def _other_names(entry: Mapping[str, Any]) -> str:
    suites = entry.get("known_as", {}).items()
    return ", ".join([*entry.get("aliases", {}), *(f"{name} in {suite}" for suite, name in suites)])


def _args(tree: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={plain(value)}" for key, value in tree.items())


def _cited(paper: Mapping[str, Any] | None) -> str:
    if not paper:
        return ""
    marks = [f"arXiv {paper['arxiv']}" if paper.get("arxiv") else "", paper.get("doi") or ""]
    where = "".join(f", {mark}" for mark in (*marks, paper.get("repo") or "") if mark)
    return f"{paper['title']} ({paper['year']}{where})"


# --------------------------------------------------------------------------- records


def show_record(found: Record) -> None:
    """Print the receipt of a run and its numbers."""
    recipe, forget = found.experiment.get("recipe"), found.experiment.get("forget")
    environment = {k: v for k, v in found.environment.items() if k != "versions"}
    versions = found.environment.get("versions", {})
    receipt = {
        "status": worded(found.status, found.reason or ""),
        "unit": f"{found.scenario}, {found.unit}",
        "data": found.experiment.get("data"),
        "model": found.experiment.get("model"),
        "forget": _args(forget) if isinstance(forget, dict) else forget,
        "recipe": _args(recipe) if isinstance(recipe, dict) else recipe,
        "config": _args(found.config),
        "seed": f"{found.experiment.get('seed')} (the method's own: {found.seed})",
        "hashes": {key: value[:16] for key, value in found.hashes.items()},
        "retrained": ", ".join(value[:16] for value in found.reference_hashes),
        "cost": _args(found.cost),
        "environment": _args(environment),
        "versions": " ".join(f"{key} {value}" for key, value in versions.items()),
        "commit": found.commit,
        "created": found.created,
        "command": found.command,
    }
    show(pairs(found.entry, receipt))
    show_numbers(found, None)
    show_curves(found)
    show_correction(found)
    show_notes(found.stats)


def show_numbers(found: Record, original: Evaluation | None) -> None:
    """Print the metrics of a run beside those of the original and the retrained models."""
    from unsc_plugin import run
    from unsc_plugin.metrics import METRICS

    order = {name: place for place, name in enumerate(METRICS)}
    rows = []
    for name, *numbers in sorted(
        run.comparison(found, original), key=lambda row: order.get(row[0], len(order))
    ):
        spec = METRICS.get(name)
        unit = spec.unit if spec else ""
        cells = [_number(value, unit, sign=i == 3) for i, value in enumerate(numbers)]
        label = f"{name} [{unit}]" if unit in DIGITS else name
        better = BETTER[spec.direction].removeprefix("as ") if spec else ""
        rows.append((label, *cells, better))
    columns = ["metric", ">original", ">unlearned", f">{_yardstick(found)}", ">gap", "better"]
    if original is None:
        columns.pop(1)
        rows = [(row[0], *row[2:]) for row in rows]
    experiment = found.experiment
    title = f"{found.entry} on {experiment.get('data')} with {experiment.get('model')}"
    if rows:
        show(grid(title, columns, rows))
    reasons: dict[str, list[str]] = {}
    for name, reason in found.missing.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        line(f"not measured: {', '.join(names)}: {reason}")


def _yardstick(found: Record) -> str:
    return "oracle" if found.kind == "correction" else "retrained"


def _number(value: float | None, unit: str, sign: bool = False) -> str:
    if value is None:
        return ABSENT
    digits = DIGITS.get(unit, 4)
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def show_run(found: Record, original: Evaluation | None, folder: Any) -> None:
    """Print the numbers of a finished run, what it cost and where it lies."""
    show_numbers(found, original)
    show_curves(found)
    show_correction(found)
    show_notes(found.stats)
    gap = f"gap: unlearned minus {_yardstick(found)}; " if found.reference else ""
    spent = found.cost.get("seconds_prepare", 0.0) + found.cost.get("seconds_unlearn", 0.0)
    ratio = found.cost.get("work_ratio")
    of = "" if ratio is None else f", {ratio:.3f} of retraining's work"
    line(f"{gap}unlearning took {spent:.2f} s{of}")
    line(f"written to {folder}")


# --------------------------------------------------------------------------- curves


def show_curves(found: Record) -> None:
    """Print what was measured on the way: the rounds of a sequence, the levels of a trajectory."""
    if rounds := found.curves.get("rounds"):
        columns = (
            "t", "status", ">steps", ">at goal", ">earlier", ">back", ">retain", ">test", ">KL",
            ">‖Δθ‖",
        )  # fmt: skip
        rows = [_round_cells(one, rounds[:number]) for number, one in enumerate(rounds)]
        show(grid("drift over the requests", columns, rows))
        line("at goal: instances of request t after it; earlier: of all before; back: came back")
        line("retain, test: accuracies; KL: KL_test in bits; ‖Δθ‖: distance to the first model")
    if trajectory := found.curves.get("trajectory"):
        line(f"forgotten: {trajectory_text(trajectory)}")


def _round_cells(one: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> list[str]:
    counts, before = one.get("at_goal"), sum(other["k"] for other in earlier)
    names = ("acc_retain", "acc_test", "kl_test", "distance_first")
    return [
        str(one["request"] + 1),
        one["status"],
        str(one["steps"]),
        f"{counts[-1]}/{one['k']}" if counts else ABSENT,
        f"{sum(counts[:-1])}/{before}" if counts and earlier else ABSENT,
        str(one.get("came_back", ABSENT)),
        *(_cell(one.get(name)) for name in names),
    ]


def trajectory_text(points: Sequence[Mapping[str, float]]) -> str:
    """Return when a run had forgotten a quarter, half, ... of the forget set, and what it kept."""
    from unsc_plugin.metrics.goal import LEVELS, first_reaching, forgotten_share

    shares = [forgotten_share(point["acc_forget"]) for point in points]
    parts = []
    for level in LEVELS:
        at = first_reaching(shares, level)
        if at is None:
            parts.append(f"{100 * level:g} % never ({100 * shares[-1]:.0f} % at the end)")
            break
        kept = f"retain {points[at]['acc_retain']:.4f}, test {points[at]['acc_test']:.4f}"
        parts.append(f"{100 * level:g} % at step {points[at]['step']} ({kept})")
    return "; ".join(parts)


# --------------------------------------------------------------------------- what methods note


def show_preflight(title: str, found: Mapping[str, Any]) -> None:
    """Print a diagnosis: its table, what else it says, its warnings."""
    rows = found.get("table", [])
    columns = list(rows[0]) if rows else []
    marked = [f">{column}" if column != "layer" else column for column in columns]
    show(grid(title, marked, ([_cell(row[column]) for column in columns] for row in rows)))
    for key, value in found.items():
        if key not in ("table", "warnings") and value not in (None, {}, [], ""):
            line(f"{key}: {_args(value) if isinstance(value, Mapping) else plain(value)}")
    for message in found.get("warnings", []):
        complain(f"warning: {message}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return ABSENT if value is None else str(value)


def show_notes(stats: Mapping[str, Any]) -> None:
    """Print a method's warnings and its drift certificate, if it left any."""
    for one in stats.get("requests") or [stats]:
        for message in one.get("warnings", []):
            line(f"warning: {message}")
    last = (stats.get("requests") or [stats])[-1]
    if "status" in last and "forgotten" in last:
        why = f" ({last['cap_reason']})" if "cap_reason" in last else ""
        done = f"{last['forgotten']} of {last['k']} instances after {last['steps']} steps"
        line(f"goal {last.get('goal', '')}: {last['status']}{why}, {done}")
    certificate, subspaces = last.get("certificate"), last.get("subspaces")
    if not certificate or not subspaces:
        return
    table = []
    for layer in subspaces["layers"]:
        weight = f"{layer['layer']}.weight".lstrip(".")  # a record sorts its keys
        deltas, bounds = certificate["delta"][weight], certificate["bound"][weight]
        worst = max(range(len(deltas)), key=lambda at: deltas[at] or 0.0, default=None)
        table.append(
            (
                layer["layer"],
                *(_cell(layer[key]) for key in ("d", "rank", "free", "worst_energy", "contrast")),
                ABSENT if worst is None else _cell(deltas[worst]),
                ABSENT if worst is None else str(certificate["buckets"][worst]),
                _cell(max((b for b in bounds if b is not None), default=None)),
            )
        )
    columns = ("layer", ">d", ">rank", ">free", ">least energy", ">contrast", ">largest δ")
    show(grid("certificate of retained drift", (*columns, ">class", ">bound ‖ΔW X‖"), table))
    line(
        f"drift {_cell(certificate['drift'])}: an estimate, not a proof, of the relative change of "
        "the retained logits, exact when only the head is trained; measured, it was .2 to .55 "
        "times drift in some 70 toy configurations, never above 1"
    )


# --------------------------------------------------------------------------- boards


def show_plan(tree: Mapping[str, Any]) -> None:
    """Print what a board would run."""
    seconds = tree["unlearning_seconds_estimate"]
    time = "unknown (no finished unit yet)" if seconds is None else f"about {seconds:.0f} s"
    line(
        f"{tree['board']}: {tree['units']} units, {tree['finished']} finished, "
        f"{len(tree['to_run'])} to run; at most {tree['trainings_at_most']} trainings of originals "
        f"and retrained models; unlearning time {time}"
    )
    for label in tree["to_run"]:
        line(f"  {label}")


def show_mismatches(checked: int, mismatches: Sequence[Any]) -> None:
    """Print what a verification found."""
    if mismatches:
        rows = [(one.unit, one.what, one.stored, one.found) for one in mismatches]
        show(grid("mismatches", ("unit", "what", ">stored", ">found"), rows))
    line(f"{checked} records checked, {len(mismatches)} mismatches")
