"""`unsc`: list, show, run, bench, board, check. Tables on stdout, everything else on stderr.

Exit codes: 0 done; 1 ran, but a run failed or diverged, a check failed, or a verification did not
match; 2 usage; 3 something optional is missing; 4 version outside a window; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from unsc_plugin import __version__
from unsc_plugin.errors import ConfigError, DivergedError, UnknownName, UnscError

app = typer.Typer(
    name="unsc",
    help="Machine unlearning for any timm or Hugging Face classifier, measured against retraining.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
board_app = typer.Typer(
    name="board", help="Leaderboards from records: build, verify.", no_args_is_help=True
)
app.add_typer(board_app)


@dataclass
class Globals:
    """What the global flags said."""

    plugins: list[str] = field(default_factory=list)
    as_json: bool = False
    quiet: bool = False
    debug: bool = False


state = Globals()
err = Console(stderr=True)


def out() -> Console:
    """Return the console of stdout; made anew, so that a redirected stdout is used."""
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 160))
    return Console(width=width, soft_wrap=False)


def say(message: str) -> None:
    """Print a line of progress to stderr unless --quiet was given."""
    if not state.quiet:
        err.print(message, markup=False, highlight=False)


def emit(value: Any) -> None:
    """Print one JSON value to stdout."""
    print(json.dumps(value, indent=2, sort_keys=False, default=str, allow_nan=False))


# --------------------------------------------------------------------------- global flags

Plugin = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="registry .yaml, .py file or pkg.mod:Class; repeatable"),
]
AsJson = Annotated[bool, typer.Option("--json", help="stdout is one JSON value, nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def _globals(plugin: list[str] | None, as_json: bool, quiet: bool, debug: bool) -> None:
    state.plugins += plugin or []
    state.as_json |= as_json
    state.quiet |= quiet
    state.debug |= debug


def _version(value: bool) -> None:
    if value:
        print(f"unsc-plugin {__version__}")
        raise typer.Exit


@app.callback()
def root(
    plugin: Plugin = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Machine unlearning for any timm or Hugging Face classifier, measured against retraining."""
    _globals(plugin, as_json, quiet, debug)


def _registry() -> Any:
    from unsc_plugin.registry import load

    return load(state.plugins)


# --------------------------------------------------------------------------- list and show

LISTS = ("methods", "backbones", "datasets", "forget-sets", "metrics", "boards")


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help=" | ".join(LISTS))] = "methods",
    show_all: Annotated[bool, typer.Option("--all", help="also unavailable names")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="exit 1 if a plugin is broken")] = False,
    plugin: Plugin = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List names: methods, backbones, datasets, forget-sets, metrics or boards.

    Raises:
        UnknownName: another word than these.
    """
    _globals(plugin, as_json, quiet, debug)
    if what not in LISTS:
        raise UnknownName("list", what, LISTS, f"one of: {', '.join(LISTS)}")
    registry = _registry()
    rows = _rows(registry, what, show_all)
    if state.as_json:
        emit(rows)
    else:
        table = Table(title=what)
        for column in ("name", "origin", "status", "summary"):
            table.add_column(column, overflow="fold")
        for row in rows:
            status = row["status"] + (f": {row['reason']}" if row["reason"] else "")
            table.add_row(row["name"], row["origin"], status, row["summary"])
        out().print(table)
    if strict and registry.broken:
        raise typer.Exit(1)


def _rows(registry: Any, what: str, show_all: bool) -> list[dict[str, str]]:
    if what == "metrics":
        from unsc_plugin.metrics import METRICS

        return [
            _row(spec.name, "built-in", f"[{spec.unit}] {spec.summary}")
            for spec in METRICS.values()
        ]
    if what == "boards":
        from unsc_plugin import bench

        return [_row(name, f"benchmarks/{name}", "") for name in bench.names()]
    section = getattr(registry, what.replace("-", "_"))
    named = [*section.values()]
    if what == "methods":
        named += registry.broken
    return [
        {
            "name": one.name,
            "origin": one.origin,
            "status": one.status,
            "reason": one.reason,
            "summary": one.summary if one.status != "broken" else "",
        }
        for one in sorted(named, key=lambda one: one.name)
        if show_all or one.status != "unavailable"
    ]


def _row(name: str, origin: str, summary: str) -> dict[str, str]:
    return {"name": name, "origin": origin, "status": "ok", "reason": "", "summary": summary}


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a registered name, or a record .json")],
    plugin: Plugin = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show a method with its settings, another registered entry, a metric, or a record."""
    _globals(plugin, as_json, quiet, debug)
    if name.endswith(".json"):
        _show_record(Path(name))
        return
    registry = _registry()
    for kind in ("backbones", "datasets", "forget_sets"):
        if name in getattr(registry, kind):
            _show_entry(kind, getattr(registry, kind)[name])
            return
    from unsc_plugin.metrics import METRICS

    if name in METRICS:
        emit(vars(METRICS[name])) if state.as_json else out().print(METRICS[name])
        return
    _show_method(registry, name)


def _show_entry(kind: str, named: Any) -> None:
    fields = named.entry.model_dump(mode="json", exclude_defaults=True)
    tree = {"kind": kind, "name": named.name, "origin": named.origin, "status": named.status}
    if state.as_json:
        emit({**tree, "reason": named.reason, "entry": fields})
        return
    _print_pairs(named.name, {**tree, **fields})


def _print_pairs(title: str, pairs: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False)
    for key, value in pairs.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        table.add_row(key, text)
    out().print(table)


def _show_method(registry: Any, name: str) -> None:
    from unsc_plugin.registry import config_table

    named, tag = registry.method(name)
    kind = registry.method_class(name)
    settings = config_table(kind)
    presets = {key: preset.args for key, preset in named.entry.presets.items()}
    chosen = vars(registry.create(name).config)
    command = f"unsc run {name} --model tiny-digits --data digits --forget class:3"
    if state.as_json:
        entry = named.entry.model_dump(mode="json", exclude_defaults=True)
        tree = {"name": named.name, "preset": tag, "origin": named.origin, "entry": entry}
        emit({**tree, "settings": settings, "config": chosen, "presets": presets})
        return
    console = out()
    console.print(f"[bold]{name}[/bold] ({named.origin})\n{kind.__doc__}", highlight=False)
    table = Table("setting", "type", "value", "default", "meaning")
    for row in settings:
        value = chosen[row["name"]]
        table.add_row(row["name"], row["type"], str(value), str(row["default"]), row["meaning"])
    if settings:
        console.print(table)
    console.print(f"needs: {', '.join(named.entry.needs) or 'no data'}")
    console.print(f"scenarios: {', '.join(named.entry.scenarios)}")
    for key, args in presets.items():
        console.print(f"preset {named.name}.{key}: {args}", highlight=False)
    console.print(f"example: {command}", highlight=False)


def _show_record(path: Path) -> None:
    from unsc_plugin import record

    found = record.read(path)
    if state.as_json:
        emit(found.model_dump(mode="json", by_alias=True))
        return
    console = out()
    console.print(
        f"[bold]{found.entry}[/bold] on {found.scenario}, {found.unit}: {found.status}"
        + (f" ({found.reason})" if found.reason else "")
    )
    _print_pairs("receipt", {
        "experiment": found.experiment, "config": found.config, "seed": found.seed,
        "hashes": found.hashes, "cost": found.cost, "environment": found.environment,
        "commit": found.commit, "created": found.created, "command": found.command,
    })  # fmt: skip
    console.print(_numbers_table(found, None))


def _numbers_table(found: Any, original: Any) -> Table:
    from unsc_plugin import run
    from unsc_plugin.metrics import METRICS

    columns = ["metric", "original", "unlearned", "retrained", "gap", "better"]
    table = Table(title=f"{found.entry} on {found.scenario}: {found.status}")
    for column in columns:
        table.add_column(column, justify="left" if column in ("metric", "better") else "right")
    words = {
        "up": "higher",
        "down": "lower",
        "retrain": "closer to retrained",
        "zero": "closer to 0",
    }
    for name, before, value, retrained, gap in run.comparison(found, original):
        numbers = [_text(before), _text(value), _text(retrained), _text(gap, sign=True)]
        direction = words[METRICS[name].direction] if name in METRICS else ""
        table.add_row(name, *numbers, direction)
    for name, reason in found.missing.items():
        table.add_row(name, "–", "–", "–", "–", reason)
    return table


def _text(value: float | None, sign: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:+.4f}" if sign else f"{value:.4f}"


# --------------------------------------------------------------------------- run


@app.command()
def run(
    method: Annotated[str | None, typer.Argument(help="METHOD or METHOD.tag")] = None,
    model: Annotated[
        str | None, typer.Option(help="timm:ID, hf:ID, hf-config:TYPE, shortcut")
    ] = None,
    data: Annotated[str | None, typer.Option(help="data set name, hub:ORG/ID or a folder")] = None,
    forget: Annotated[
        str | None, typer.Option(help="class:3, random:0.1, file:PATH, a name")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything that is drawn")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="setting=value of the method; repeatable")
    ] = None,
    reference: Annotated[
        str, typer.Option(help="auto (train or take from the cache), none, or weights")
    ] = "auto",
    reference_pool: Annotated[
        int, typer.Option(min=1, help="retrained models to compare with")
    ] = 1,
    metrics: Annotated[str, typer.Option(help="groups of core, mia, mubench")] = "core,mia",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    pretrained: Annotated[bool, typer.Option(help="start from published weights (timm)")] = False,
    mubench_orig: Annotated[str, typer.Option(help="measured or table")] = "measured",
    data_dir: Annotated[
        Path | None, typer.Option(help="folder of Parquet data sets; wins over UNSC_DATA_DIR")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="trained models; default $UNSC_CACHE")] = None,
    allow_foreign_order: Annotated[
        bool, typer.Option(help="use indices made for another row order; never comparable")
    ] = False,
    spec: Annotated[Path | None, typer.Option(help="experiment .yaml instead of flags")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", help="field=value of the recipe; repeatable")
    ] = None,
    log_with: Annotated[str | None, typer.Option(help="tracker: tensorboard")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="folder; default runs/<id>")] = None,
    resume: Annotated[bool, typer.Option(help="exit 0 if the run is complete")] = False,
    dry_run: Annotated[bool, typer.Option(help="print the resolved experiment only")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's default")] = 0,
    plugin: Plugin = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train (or load) the original, unlearn, compare with retraining, write a record."""
    _globals(plugin, as_json, quiet, debug)
    registry = _registry()
    chosen = _experiment(registry, spec, method, model, data, forget, seed, settings, recipe,
                         reference_pool)  # fmt: skip
    registry.create(chosen.method, **chosen.set)
    if dry_run:
        emit(chosen.model_dump(mode="json"))
        return
    forget_text = chosen.forget if isinstance(chosen.forget, str) else chosen.forget.kind
    from unsc_plugin import engine
    from unsc_plugin import run as pipeline

    folder = out_dir or Path("runs") / pipeline.run_id(
        chosen.method, chosen.data, chosen.model, forget_text, chosen.seed
    )
    if _complete(folder, resume):
        return
    pipeline.quiet_libraries()
    _threads(threads)
    place = engine.accelerator(
        _one_of("--device", device, ("auto", "cpu", "cuda", "mps")),
        _one_of("--precision", precision, ("fp32", "bf16", "fp16")),
        log_with=log_with,
        project_dir=str(folder.parent / "logs") if log_with else None,
    )
    state.quiet |= not place.is_main_process
    groups = tuple(part.strip() for part in metrics.split(","))
    for part in groups:
        _one_of("--metrics", part, ("core", "mia", "mubench"))
    with _progress(place, log_with, folder.name) as tell:
        setting = pipeline.setting(
            registry,
            data_name=chosen.data,
            model_name=chosen.model,
            forget_sets=[chosen.forget],
            evaluation_spec=chosen.evaluation,
            seed=chosen.seed,
            device=place,
            recipe=chosen.recipe,
            data_dir=data_dir,
            cache=cache,
            pretrained=pretrained,
            allow_foreign_order=allow_foreign_order,
            tell=tell,
            groups=groups,
            mubench_original=_one_of("--mubench-orig", mubench_orig, ("measured", "table")),
            with_reference=reference == "auto",
            reference=None if reference in ("auto", "none") else _existing(Path(reference)),
        )
        from unsc_plugin.spec import EntrySpec

        unit = pipeline.Unit(EntrySpec(method=chosen.method, set=chosen.set))
        finished = pipeline.run_unit(setting, unit, catch=False)
        original = pipeline.evaluate_original(setting, unit)
    if not place.is_main_process:
        return
    pipeline.write_run(finished, folder)
    _report(finished.record, original, folder)


def _experiment(
    registry: Any,
    spec: Path | None,
    method: str | None,
    model: str | None,
    data: str | None,
    forget: str | None,
    seed: int | None,
    settings: list[str] | None,
    recipe: list[str] | None,
    reference_pool: int,
) -> Any:
    from unsc_plugin.spec import EvaluationSpec, Experiment, Recipe, read_yaml

    if spec is not None:
        if any(value is not None for value in (method, model, data, forget, seed)):
            raise ConfigError(
                "--spec already says method, model, data, forget and seed; drop those"
            )
        return read_yaml(spec).validate(Experiment)
    if method is None:
        raise ConfigError("expected a method (see `unsc list methods`) or --spec FILE")
    defaults = registry.defaults
    single = EvaluationSpec(train_seeds=1, draws=1, reference_pool=reference_pool)
    tree = {
        "method": method,
        "set": _pairs("--set", settings),
        "data": data or defaults.dataset,
        "model": model or defaults.backbone,
        "forget": forget or defaults.forget_set,
        "seed": defaults.seed if seed is None else seed,
        "evaluation": single.model_dump(mode="json"),
    }
    chosen = _validated(Experiment, tree)
    if recipe:
        from unsc_plugin import models

        base = models.resolve(chosen.model, registry.entries("backbones")).recipe or Recipe()
        changed = {**base.model_dump(mode="json"), **_pairs("--recipe", recipe)}
        chosen = chosen.model_copy(update={"recipe": _validated(Recipe, changed)})
    return chosen


def _validated(kind: Any, tree: Any) -> Any:
    from unsc_plugin.spec import Document

    return Document("command line", tree).validate(kind)


def _pairs(flag: str, texts: list[str] | None) -> dict[str, Any]:
    """Return key -> value of `key=value` texts; values as YAML has them, dots not allowed."""
    import yaml

    pairs = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{flag}: expected key=value, got {text!r}")
        try:
            pairs[key] = _number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"{flag} {key}: {value!r} is no YAML value ({error})") from None
    return pairs


def _number(value: Any) -> Any:
    """Return text that is a number, such as 1e-3 (a string in YAML 1.1), as a number."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _one_of(flag: str, value: str, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise ConfigError(f"{flag}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"--reference: expected auto, none or a weights file, got {path}")
    return path


def _complete(folder: Path, resume: bool) -> bool:
    done = (folder / "record.json").is_file()
    if done and resume:
        say(f"{folder} is complete; nothing to do")
        if state.as_json:
            emit(json.loads((folder / "record.json").read_text()))
        return True
    if folder.exists():
        raise ConfigError(
            f"{folder} exists and a finished run is never overwritten; use --resume to keep it or "
            "another --out"
        )
    return False


def _threads(count: int) -> None:
    if count:
        import torch

        torch.set_num_threads(count)


@contextlib.contextmanager
def _progress(place: Any, log_with: str | None, name: str) -> Iterator[Any]:
    """Yield the callback of training and unlearning: a bar on stderr, losses to trackers."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if log_with:
        place.init_trackers("unsc", init_kwargs={})
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=err, transient=True, disable=state.quiet)
    tasks: dict[str, Any] = {}

    def tell(what: str, told: Any) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=None)
        if told.epoch_end:
            text = f"{what}: epoch {told.epochs}, loss {told.loss:.3f}"
            bar.update(tasks[what], description=text, advance=1)
        if log_with:
            place.log({f"{what}/loss": told.loss}, step=told.steps)

    with bar:
        yield tell
    if log_with:
        place.end_training()


def _report(found: Any, original: Any, folder: Path) -> None:
    if state.as_json:
        emit(found.model_dump(mode="json", by_alias=True))
    else:
        out().print(_numbers_table(found, original))
        spent = found.cost.get("seconds_prepare", 0) + found.cost.get("seconds_unlearn", 0)
        ratio = found.cost.get("work_ratio")
        text = f"{spent:.2f} s" + (
            f", {ratio:.3f} of retraining's work" if ratio is not None else ""
        )
        out().print(f"{text}; written to {folder}", highlight=False)
    if found.status != "ok":
        err.print(f"{found.status}: {found.reason}", markup=False)
        raise typer.Exit(1)


# --------------------------------------------------------------------------- bench and boards

BoardName = Annotated[str, typer.Argument(help="board.yaml, its folder, or a name in benchmarks/")]
Out = Annotated[
    Path | None, typer.Option("--out", help="write results here, not beside board.yaml")
]


@app.command("bench")
def bench_(
    board: BoardName,
    only: Annotated[str | None, typer.Option(help="glob on entry or entry--s0d0")] = None,
    seeds: Annotated[str | None, typer.Option(help="train seeds, e.g. 0,1; default: all")] = None,
    workers: Annotated[int, typer.Option(min=1, help="local processes")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="spread over a Ray cluster")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="skip finished units")
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="run at most N units")] = None,
    dry_run: Annotated[bool, typer.Option(help="print the grid and an estimate only")] = False,
    out_dir: Out = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads per process")] = 1,
    data_dir: Annotated[Path | None, typer.Option(help="folder of Parquet data sets")] = None,
    cache: Annotated[Path | None, typer.Option(help="trained models; default $UNSC_CACHE")] = None,
    plugin: Plugin = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a board: every entry at every train seed and forget draw; then build it.

    Raises:
        ConfigError: --no-resume on a board that has results.
    """
    _globals(plugin, as_json, quiet, debug)
    from unsc_plugin import bench as boards

    opened = boards.open_board(
        board, out=out_dir, plugins=tuple(state.plugins), device=device, precision=precision,
        threads=threads, data_dir=data_dir, cache=cache,
    )  # fmt: skip
    registry = _registry()
    for entry in opened.spec.rows:
        registry.create(entry.method, **entry.set)
    wanted = boards.jobs(opened, only=only, seeds=_integers(seeds))
    todo, found = boards.split_done(opened, wanted)
    if not resume and len(todo) < len(wanted):
        raise ConfigError(
            f"--no-resume: {opened.results} holds {len(found)} records, which are never "
            "overwritten; delete them or use another --out"
        )
    todo = todo[:limit]
    if dry_run:
        _print_grid(opened, wanted, todo, found)
        return
    say(f"{opened.spec.name}: {len(wanted) - len(todo)} units finished, {len(todo)} to run")
    failed = _run_units(opened, todo, workers, ray)
    failed += sum(done.status != "ok" for done in found)
    built = boards.build(opened)
    for path, text in boards.files(opened, built).items():
        boards.write_text(path, text)
    _print_board(opened, built, len(todo))
    if failed:
        say(f"{failed} units failed or diverged; they are on the board with their reasons")
        raise typer.Exit(1)


def _run_units(opened: Any, todo: list[Any], workers: int, ray: bool) -> int:
    from unsc_plugin import bench as boards

    began, count = time.perf_counter(), 0

    def report(job: Any, done: Any) -> None:
        nonlocal count
        count += 1
        spent = time.perf_counter() - began
        note = "" if done.status == "ok" else f" {done.status}: {done.reason}"
        say(f"[{count}/{len(todo)}] {spent:6.1f} s  {job.label}{note}")

    if not todo:
        return 0
    done = boards.run_jobs(opened, todo, workers=workers, ray=ray, report=report)
    return sum(record.status != "ok" for record in done)


def _integers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds: expected numbers with commas, got {text!r}") from None


def _print_grid(opened: Any, wanted: list[Any], todo: list[Any], found: list[Any]) -> None:
    spec, how = opened.spec, opened.spec.evaluation
    per_scenario = how.train_seeds + how.draws * how.reference_pool
    trainings = len(spec.scenarios) * per_scenario
    known = [r.cost.get("seconds_prepare", 0) + r.cost.get("seconds_unlearn", 0) for r in found]
    estimate = len(todo) * sum(known) / len(known) if known else None
    tree = {
        "board": spec.name, "units": len(wanted), "finished": len(wanted) - len(todo),
        "to_run": [job.label for job in todo], "trainings_at_most": trainings,
        "unlearning_seconds_estimate": estimate,
    }  # fmt: skip
    if state.as_json:
        emit(tree)
        return
    text = "unknown (no finished unit yet)" if estimate is None else f"{estimate:.0f} s"
    out().print(
        f"{spec.name}: {len(wanted)} units, {tree['finished']} finished, {len(todo)} to run; at "
        f"most {trainings} trainings of originals and retrained models; unlearning time {text}"
    )
    for job in todo:
        out().print(f"  {job.label}", highlight=False)


def _print_board(opened: Any, built: Any, ran: int) -> None:
    if state.as_json:
        emit({**built.to_dict(), "ran": ran, "out": str(opened.out)})
        return
    out().print(built.terminal())
    out().print(f"written to {opened.out}: LEADERBOARD.md, plot.svg", highlight=False)


@board_app.command("build")
def board_build(
    board: BoardName,
    out_dir: Out = None,
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; exit 1 if stale or unhealthy")
    ] = False,
    plugin: Plugin = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Build LEADERBOARD.md and plot.svg from the records, or check that they are up to date."""
    _globals(plugin, as_json, quiet, debug)
    from unsc_plugin import bench as boards

    opened = boards.open_board(board, out=out_dir, plugins=tuple(state.plugins))
    built = boards.build(opened)
    old = boards.stale(opened, built)
    if not check:
        for path, text in boards.files(opened, built).items():
            boards.write_text(path, text)
    _print_board(opened, built, 0)
    if check and old:
        err.print(
            f"stale: {', '.join(map(str, old))}; run `unsc board build {board}`", markup=False
        )
    if not built.ok:
        err.print("the board is not healthy: " + "; ".join(built.health.failures), markup=False)
    if (check and old) or not built.ok:
        raise typer.Exit(1)


@board_app.command("verify")
def board_verify(
    board: BoardName,
    tolerance: Annotated[float, typer.Option(help="largest difference of a metric")] = 1e-6,
    out_dir: Out = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    data_dir: Annotated[Path | None, typer.Option(help="folder of Parquet data sets")] = None,
    cache: Annotated[Path | None, typer.Option(help="trained models; default $UNSC_CACHE")] = None,
    plugin: Plugin = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Recompute hashes and metrics of every record (from kept logits, or by running again)."""
    _globals(plugin, as_json, quiet, debug)
    from unsc_plugin import bench as boards

    opened = boards.open_board(
        board, out=out_dir, plugins=tuple(state.plugins), threads=threads, data_dir=data_dir,
        cache=cache,
    )  # fmt: skip
    checked, mismatches = boards.verify(opened, tolerance=tolerance, report=say)
    if state.as_json:
        emit({"checked": checked, "mismatches": [vars(one) for one in mismatches]})
    else:
        table = Table("unit", "what", "stored", "found", title=f"{len(mismatches)} mismatches")
        for one in mismatches:
            table.add_row(one.unit, one.what, one.stored, one.found)
        if mismatches:
            out().print(table)
        out().print(f"{checked} records checked, {len(mismatches)} mismatches", highlight=False)
    if mismatches:
        raise typer.Exit(1)


# --------------------------------------------------------------------------- check


@app.command()
def check(
    method: Annotated[str, typer.Argument(help="a registered method, also one of --plugin")],
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="the cheap half of the suite")
    ] = False,
    badge: Annotated[Path | None, typer.Option(help="write the badge record here")] = None,
    plugin: Plugin = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run the conformance suite over a method: does it do what its name says?"""
    _globals(plugin, as_json, quiet, debug)
    registry = _registry()
    registry.method(method)
    from unsc_plugin import conformance
    from unsc_plugin.bench import write_text

    results = conformance.check_method(method, quick=quick, registry=registry)
    made = conformance.badge(results)
    if badge is not None:
        write_text(badge, json.dumps(made, indent=2, sort_keys=True) + "\n")
    if state.as_json:
        emit({"method": method, "badge": made, "results": [vars(one) for one in results]})
    else:
        out().print(conformance.format_results(results))
    if not all(one.passed or one.skipped for one in results):
        raise typer.Exit(1)


# --------------------------------------------------------------------------- entry


def main() -> NoReturn:
    """Run the command line; every error of ours is one message and an exit code."""
    try:
        app(standalone_mode=False)
        code = 0
    except DivergedError as error:
        code = _fail(error, 1)
    except UnscError as error:
        code = _fail(error, error.exit_code)
    except KeyboardInterrupt:
        err.print("interrupted; finished units are kept", markup=False)
        code = 130
    except typer.Exit as error:
        code = error.exit_code
    except Exception as error:
        code = _usage(error)
    sys.stdout.flush()
    sys.exit(code)


def _fail(error: BaseException, code: int) -> int:
    if state.debug:
        err.print_exception()
    err.print(f"error: {error}", markup=False, highlight=False)
    return code


def _usage(error: Exception) -> int:
    """Return 2 for a usage error of the command-line parser; raise anything else.

    Raises:
        Exception: an error that is not ours.
    """
    import click

    if isinstance(error, click.exceptions.Abort):
        return 130
    if not isinstance(error, click.ClickException):
        raise error
    error.show()
    return int(error.exit_code)


if __name__ == "__main__":
    main()
