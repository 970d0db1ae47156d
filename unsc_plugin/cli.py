"""`unsc`: list, show, run, bench, board, check, export. Tables on stdout, the rest on stderr.

Exit codes: 0 done; 1 ran, but a run failed or diverged, a check failed, or a verification did not
match; 2 usage; 3 something optional is missing; 4 version outside a window; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from unsc_plugin import __version__
from unsc_plugin._cli import arguments, export, flags, lists, views
from unsc_plugin._cli.console import complain, emit, err, line, out, say, state
from unsc_plugin.errors import (
    ConfigError,
    ScenarioNotSupported,
    UnknownName,
    UnscError,
    nearest,
)

if TYPE_CHECKING:
    from unsc_plugin.bench import Board, Job
    from unsc_plugin.leaderboard import Leaderboard
    from unsc_plugin.method import UnlearningMethod
    from unsc_plugin.record import Record
    from unsc_plugin.registry import Registry
    from unsc_plugin.run import Finished, Setting, Unit
    from unsc_plugin.spec import Experiment

app = typer.Typer(
    name="unsc",
    help="Machine unlearning for any timm or Hugging Face classifier, measured against retraining.",
    epilog="Exit codes: 0 done; 1 ran, but a run, a check or a verification failed; 2 usage; "
    "3 something optional is missing; 4 version outside a window; 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
board_app = typer.Typer(
    name="board", help="Leaderboards from records: build, verify.", no_args_is_help=True
)
app.add_typer(board_app)
app.add_typer(export.app)


def _version(value: bool) -> None:
    if value:
        print(f"unsc-plugin {__version__}")
        raise typer.Exit


@app.callback()
def root(
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="print the version"
        ),
    ] = False,
) -> None:
    """Machine unlearning for any timm or Hugging Face classifier, measured against retraining."""
    state.add(plugin, as_json, quiet, debug)


# --------------------------------------------------------------------------- list and show


@app.command("list")
def list_(
    what: flags.ListOf = "methods",
    show_all: flags.All = False,
    strict: flags.StrictPlugins = False,
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """List what can be named: methods, backbones, data sets, forget sets, and more."""
    state.add(plugin, as_json, quiet, debug)
    if what not in flags.LISTS:
        raise UnknownName("list", what, flags.LISTS, f"one of: {', '.join(flags.LISTS)}")
    registry = state.registry()
    rows = lists.list_rows(registry, what)
    shown = [row for row in rows if show_all or row["status"] != "unavailable"]
    if what == "adapters":  # few, and the reason is what one asks for
        shown = rows
    if state.as_json:
        emit(shown)
    else:
        if shown:
            lists.show_list(what, shown)
        _say_what_is_not_shown(what, len(rows) - len(shown), len(rows))
    if strict and registry.broken:
        raise typer.Exit(1)


def _say_what_is_not_shown(what: str, hidden: int, count: int) -> None:
    if hidden:
        say(f"{hidden} unavailable names are not shown; --all shows them and says why")
    if what == "boards" and not count:
        say(f"no board in {Path('benchmarks').absolute()}; `unsc bench FILE` runs any board.yaml")


@app.command()
def show(
    name: flags.ShownName,
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Show a method with its settings, another registered entry, a metric, or a record."""
    state.add(plugin, as_json, quiet, debug)
    if name.endswith(".json") or (Path(name) / "record.json").is_file():
        _show_record(Path(name) if name.endswith(".json") else Path(name) / "record.json")
        return
    registry = state.registry()
    named = next(
        (found for kind in views.KINDS if (found := getattr(registry, kind).get(name))), None
    )
    if named is not None:
        _present(views.entry_tree(named), views.show_entry)
    elif (metric := views.metric_tree(name)) is not None:
        _present(metric, views.show_metric)
    else:
        _present(_method_tree(registry, name), views.show_method)


def _present(tree: dict[str, Any], view: Any) -> None:
    if state.as_json:
        emit(tree)
    else:
        view(tree)


def _method_tree(registry: Registry, name: str) -> dict[str, Any]:
    try:
        return views.method_tree(registry, name)
    except UnknownName as error:
        from unsc_plugin.metrics import METRICS
        from unsc_plugin.registry import SYNONYMS

        others = [one for kind in views.KINDS for one in getattr(registry, kind)]
        known = error.kind != "method" or name in SYNONYMS
        if known or not nearest(name, [*others, *METRICS]):
            raise
        every = [*registry.methods, *others, *METRICS]
        raise UnknownName("name", name, every, "`unsc list` shows all names") from None


def _show_record(path: Path) -> None:
    from unsc_plugin import record

    if not path.is_file():
        raise ConfigError(f"expected the .json file of a record, found no file {path}")
    found = record.read(path)
    if state.as_json:
        emit(found.model_dump(mode="json", by_alias=True))
    else:
        views.show_record(found)


# --------------------------------------------------------------------------- run


@app.command()
def run(
    method: flags.OptionalMethod = None,
    model: flags.Model = None,
    data: flags.Data = None,
    forget: flags.Forget = None,
    seed: flags.Seed = None,
    settings: flags.Settings = None,
    recipe: flags.Recipes = None,
    pretrained: flags.Pretrained = False,
    spec: flags.Spec = None,
    reference: flags.Reference = "auto",
    reference_pool: flags.ReferencePool = None,
    trajectory: flags.Trajectory = False,
    metrics: flags.Metrics = "core,mia",
    mubench_orig: flags.MubenchOrig = "measured",
    layout: flags.Layout = "unsc",
    allow_foreign_order: flags.AllowForeignOrder = False,
    device: flags.Device = "auto",
    precision: flags.Precision = "fp32",
    micro_batches: flags.MicroBatches = 1,
    threads: flags.RunThreads = 0,
    log_with: flags.LogWith = None,
    out_dir: flags.RunOut = None,
    data_dir: flags.DataDir = None,
    cache: flags.Cache = None,
    resume: flags.ResumeRun = False,
    preflight: flags.Preflight = False,
    dry_run: flags.DryRun = False,
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Train (or load) the original, unlearn, compare with retraining, write a record."""
    state.add(plugin, as_json, quiet, debug)
    groups = arguments.groups(metrics)
    original_from = arguments.one_of("--mubench-orig", mubench_orig, ("measured", "table"))
    weights = arguments.weights(reference)
    arguments.tracker(log_with)
    registry = state.registry()
    tried = arguments.variants(settings) if preflight else [settings]
    every = [
        arguments.experiment(
            registry,
            spec=spec,
            method=method,
            names={"data": data, "model": model, "forget": forget, "seed": seed},
            settings=one or None,
            recipe=recipe,
            reference_pool=reference_pool,
            trajectory=trajectory,
        )
        for one in tried
    ]
    every = [arguments.in_layout(layout, one) for one in every]
    if layout == "mubench":
        groups = tuple(dict.fromkeys((*groups, "mubench")))
    chosen = every[0]
    makers = [registry.create(one.method, **one.set) for one in every]
    maker = makers[0]
    if dry_run:
        emit(arguments.resolved(registry, chosen).model_dump(mode="json", exclude_defaults=True))
        return
    if preflight:
        _check_diagnosis(maker)
    folder = out_dir or Path("runs") / arguments.folder_name(chosen)
    if not preflight and _complete(registry, chosen, folder, resume):
        return
    arguments.place(device, precision)
    from unsc_plugin import engine, pool
    from unsc_plugin import run as pipeline
    from unsc_plugin._cli.progress import Watch
    from unsc_plugin.spec import EntrySpec

    if not preflight:
        arguments.writable("--out", folder)
    arguments.writable("--cache", cache or pool.default_root())
    pipeline.quiet_libraries()
    _threads(threads)
    place = engine.accelerator(
        device,  # type: ignore[arg-type]  # checked above
        precision,  # type: ignore[arg-type]
        log_with=log_with,
        project_dir=str(folder.parent / "logs") if log_with else None,
    )
    state.quiet |= not place.is_main_process
    with Watch(place, folder.name if log_with else None) as watch:
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
            micro_batches=micro_batches,
            allow_foreign_order=allow_foreign_order,
            tell=watch,
            groups=groups,
            mubench_original=original_from,
            with_reference=reference == "auto" and not preflight,
            reference=weights,
        )
        watch.epochs = dict.fromkeys(("original", "retrained"), setting.recipe.epochs)
        unit = pipeline.Unit(EntrySpec(method=chosen.method, set=chosen.set))
        _check_before_training(setting, unit, maker, layout)
        if preflight:
            methods = {_label(one): made for one, made in zip(every, makers, strict=True)}
            _diagnose(setting, unit, methods, shown=place.is_main_process)
            return
        finished = pipeline.run_unit(setting, unit, catch=False)
        original = pipeline.evaluate_original(setting, unit)
    if not place.is_main_process:
        return
    also = partial(_mubench_files, finished, setting) if layout == "mubench" else None
    pipeline.write_run(finished, folder, also)
    if state.as_json:
        emit(finished.record.model_dump(mode="json", by_alias=True))
    else:
        views.show_run(finished.record, original, folder)
    if finished.record.status != "ok":
        complain(f"{finished.record.status}: {finished.record.reason}")
        raise typer.Exit(1)


def _mubench_files(finished: Finished, setting: Setting, folder: Path) -> None:
    """Write what MU-Bench leaves in a run folder, if the run has a forget set and ended well."""
    from unsc_plugin.adapters import mubench

    frame, outputs = setting.frame(0), finished.outputs
    if outputs is None:
        return
    rows = {"test": frame.test, "df": frame.forget, "dr": frame.retain_eval}
    logits = {"test": outputs.test, "df": outputs.forget, "dr": outputs.retain_eval}
    labels = {split: one.labels.numpy() for split, one in rows.items()}
    mubench.write_run(folder, finished.record, logits, finished.model, labels=labels)


def _check_diagnosis(method: UnlearningMethod) -> None:
    from unsc_plugin.errors import NotApplicable
    from unsc_plugin.method import UnlearningMethod

    if type(method).diagnose is UnlearningMethod.diagnose:
        raise NotApplicable(f"--preflight: {method.name} has no diagnosis; unsc has one")


def _label(chosen: Experiment) -> str:
    settings = " ".join(f"{key}={value}" for key, value in chosen.set.items())
    return f"{chosen.method} on {chosen.data} with {chosen.model} {settings}".strip()


def _diagnose(
    setting: Setting, unit: Unit, methods: dict[str, UnlearningMethod], *, shown: bool
) -> None:
    from unsc_plugin import run as pipeline

    found = {label: pipeline.diagnose(setting, unit, one) for label, one in methods.items()}
    if not shown:
        return
    if state.as_json:
        emit([{"run": label, **one} for label, one in found.items()])
        return
    for label, one in found.items():
        views.show_preflight(label, one)


def _check_before_training(
    setting: Setting, unit: Unit, method: UnlearningMethod, layout: str
) -> None:
    """Find what cannot work before the original and the retrained models are trained for it."""
    request = setting.request(unit.draw)
    if layout == "mubench" and not request.n:
        raise ConfigError("--layout mubench: expected a forget set, got a goal; use --layout unsc")
    if request.steps and setting.evaluation.trajectory:
        say("--trajectory is for a single request; a sequence is measured after each of its own")
    for step in request.steps or (request,):
        if step.scenario not in method.scenarios:
            raise ScenarioNotSupported(
                f"{method.name} does not accept scenario {step.scenario}; it supports: "
                f"{', '.join(sorted(method.scenarios))}; choose another --forget or method"
            )
    built = setting.build(0)
    if setting.reference is not None:
        from unsc_plugin import models

        models.load_checkpoint(built, setting.reference)


def _complete(registry: Registry, chosen: Experiment, folder: Path, resume: bool) -> bool:
    path = folder / "record.json"
    if resume and path.is_file():
        from unsc_plugin import record

        found = record.read(path)
        wanted = arguments.resolved(registry, chosen)
        other = arguments.differences(found, wanted, registry)
        if other:
            raise ConfigError(
                f"{folder} holds a run with another {', '.join(other)}; give another --out"
            )
        say(f"{folder} is complete; nothing to do")
        if state.as_json:
            emit(found.model_dump(mode="json", by_alias=True))
        else:
            views.show_run(found, None, folder)
        return True
    if folder.exists():
        raise ConfigError(
            f"{folder} exists and is never overwritten; use --resume to keep it or another --out"
        )
    return False


def _threads(count: int) -> None:
    if count:
        import torch

        torch.set_num_threads(count)


# --------------------------------------------------------------------------- bench and boards


@app.command("bench")
def bench_(
    board: flags.BoardName,
    only: flags.Only = None,
    seeds: flags.Seeds = None,
    limit: flags.Limit = None,
    workers: flags.Workers = 1,
    ray: flags.OnRay = False,
    device: flags.Device = "auto",
    precision: flags.Precision = "fp32",
    threads: flags.Threads = 1,
    resume: flags.Resume = True,
    dry_run: flags.Plan = False,
    out_dir: flags.Out = None,
    data_dir: flags.DataDir = None,
    cache: flags.Cache = None,
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Run a board: every entry at every train seed and forget draw; then build it."""
    state.add(plugin, as_json, quiet, debug)
    wanted_seeds = arguments.integers("--seeds", seeds)
    arguments.one_of("--device", device, arguments.DEVICES)
    arguments.one_of("--precision", precision, arguments.PRECISIONS)
    from unsc_plugin import bench as boards

    opened = boards.open_board(
        board, out=out_dir, plugins=tuple(state.plugins), device=device, precision=precision,
        threads=threads, data_dir=data_dir, cache=cache,
    )  # fmt: skip
    registry = state.registry()
    _check_names(opened, registry)
    wanted = boards.jobs(opened, only=only, seeds=wanted_seeds)
    todo, found = boards.split_done(opened, wanted)
    if not resume and len(todo) < len(wanted):
        raise ConfigError(
            f"--no-resume: {opened.results} holds {len(found)} records, which are never "
            "overwritten; delete them or use another --out"
        )
    there = len(wanted) - len(todo)
    todo = todo[:limit]
    if dry_run:
        _plan(opened, registry, len(wanted), there, todo, found)
        return
    arguments.place(device, precision)
    arguments.writable("--out", opened.results)
    say(f"{opened.spec.name}: {there} of {len(wanted)} units finished, {len(todo)} to run")
    done = [*_of(opened, wanted, found), *_run_units(opened, todo, workers, ray)]
    built = boards.build(opened)
    for path, text in boards.files(opened, built).items():
        boards.write_text(path, text)
    _show_board(opened, built, len(todo))
    failed = [one for one in done if one.status != "ok" and not _made_to_diverge(one, registry)]
    if failed:
        complain(
            f"{len(failed)} of {len(done)} units failed or diverged; they are on the board with "
            "their reasons"
        )
        raise typer.Exit(1)


def _check_names(opened: Board, registry: Registry) -> None:
    """Find unknown names and settings of a board before anything is trained for it."""
    from unsc_plugin import run as pipeline

    for entry in opened.spec.rows:
        with _noted(f"in entry {entry.label!r} of {opened.source}"):
            registry.create(entry.method, **entry.set)
    for scenario in opened.spec.scenarios:
        with _noted(f"in scenario {scenario.name!r} of {opened.source}"):
            pipeline.resolve(
                registry,
                data_name=scenario.data,
                model_name=scenario.model,
                forget_sets=scenario.forget,
                recipe=scenario.recipe,
            )


@contextlib.contextmanager
def _noted(where: str) -> Iterator[None]:
    try:
        yield
    except UnscError as error:
        error.add_note(where)
        raise


def _of(opened: Board, wanted: Sequence[Job], found: Iterable[Record]) -> list[Record]:
    """Return the records of the wanted units among those of the whole board."""
    names = [scenario.name for scenario in opened.spec.scenarios]
    keys = {(names[job.scenario], job.entry.label, job.train_seed, job.draw) for job in wanted}
    return [record for record in found if record.key in keys]


def _made_to_diverge(record: Record, registry: Registry) -> bool:
    """Return whether a run diverged as the preset of a control is there to do."""
    entry: Any = registry.methods[record.method].entry
    preset = entry.presets.get(record.preset)
    return record.status == "diverged" and preset is not None and preset.source == "control"


def _run_units(opened: Board, todo: Sequence[Job], workers: int, ray: bool) -> list[Record]:
    from unsc_plugin import bench as boards
    from unsc_plugin._cli.progress import Watch

    began, count = time.perf_counter(), 0

    def report(job: Job, done: Record) -> None:
        nonlocal count
        count += 1
        spent = time.perf_counter() - began
        note = "" if done.status == "ok" else f" {done.status}: {done.reason}"
        say(f"[{count}/{len(todo)}] {spent:6.1f} s  {job.label}{note}")

    if not todo:
        return []
    with Watch() as watch:
        tell = watch if workers == 1 and not ray else None
        return boards.run_jobs(opened, todo, workers=workers, ray=ray, report=report, tell=tell)


def _plan(
    opened: Board,
    registry: Registry,
    units: int,
    finished: int,
    todo: Sequence[Job],
    found: Sequence[Record],
) -> None:
    known = [r.cost.get("seconds_prepare", 0) + r.cost.get("seconds_unlearn", 0) for r in found]
    estimate = len(todo) * sum(known) / len(known) if known else None
    tree = {
        "board": opened.spec.name, "units": units, "finished": finished,
        "to_run": [job.label for job in todo], "trainings_at_most": _trainings(opened, registry),
        "unlearning_seconds_estimate": estimate,
    }  # fmt: skip
    _present(tree, views.show_plan)


def _trainings(opened: Board, registry: Registry) -> int:
    """Return how many originals and retrained models a board trains at most.

    Corrections have no pool: an original per draw where validation rows are taken from its data,
    and an oracle for every plan of weights.
    """
    from unsc_plugin import run as pipeline
    from unsc_plugin.spec import CorrectionSpec

    spec, how = opened.spec, opened.spec.evaluation
    oracles = (how.correction or CorrectionSpec()).oracle
    methods = [registry.create(row.method, **row.set) for row in spec.rows]
    weigh = sum(bool(method.parts) for method in methods)
    retrain = sum(
        "retrain" in (method.name, *(part.name for part in method.parts.values()))
        for method in methods
    )
    count = 0
    for scenario in spec.scenarios:
        names = pipeline.resolve(
            registry,
            data_name=scenario.data,
            model_name=scenario.model,
            forget_sets=scenario.forget,
        )
        if any(one.kind == "correction" for one in names.forget):
            count += how.train_seeds * how.draws * (1 + retrain + oracles * weigh)
        else:
            per_draw = how.reference_pool + how.train_seeds * bool(retrain)
            count += how.train_seeds + how.draws * per_draw
    return count


def _show_board(opened: Board, built: Leaderboard, ran: int) -> None:
    if state.as_json:
        emit({**built.to_dict(), "ran": ran, "out": str(opened.out)})
        return
    from unsc_plugin import bench as boards

    console = out()
    console.print(built.terminal(console.width))
    names = ", ".join(path.name for path in boards.files(opened, built))
    line(f"written to {opened.out}: {names}")


@board_app.command("build")
def board_build(
    board: flags.BoardName,
    out_dir: flags.Out = None,
    check: flags.CheckOnly = False,
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Build LEADERBOARD.md and its plots from the records, or check that they are up to date."""
    state.add(plugin, as_json, quiet, debug)
    from unsc_plugin import bench as boards

    opened = boards.open_board(board, out=out_dir, plugins=tuple(state.plugins))
    built = boards.build(opened)
    old = boards.stale(opened, built) if check else []
    if not check:
        for path, text in boards.files(opened, built).items():
            boards.write_text(path, text)
    _show_board(opened, built, 0)
    if old:
        complain(f"stale: {', '.join(map(str, old))}; run `unsc board build {board}`")
    if not built.ok:
        complain("the board is not healthy: " + "; ".join(built.health.failures))
    if old or not built.ok:
        raise typer.Exit(1)


@board_app.command("verify")
def board_verify(
    board: flags.BoardName,
    tolerance: flags.Tolerance = 1e-6,
    threads: flags.Threads = 1,
    out_dir: flags.Out = None,
    data_dir: flags.DataDir = None,
    cache: flags.Cache = None,
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Recompute hashes and metrics of every record (from kept logits, or by running again)."""
    state.add(plugin, as_json, quiet, debug)
    from unsc_plugin import bench as boards

    opened = boards.open_board(
        board, out=out_dir, plugins=tuple(state.plugins), threads=threads, data_dir=data_dir,
        cache=cache,
    )  # fmt: skip
    checked, mismatches = boards.verify(opened, tolerance=tolerance, report=say)
    if state.as_json:
        emit({"checked": checked, "mismatches": [vars(one) for one in mismatches]})
    else:
        views.show_mismatches(checked, mismatches)
    if mismatches:
        raise typer.Exit(1)


# --------------------------------------------------------------------------- check


@app.command()
def check(
    method: flags.Method,
    quick: flags.Quick = False,
    badge: flags.Badge = None,
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Run the conformance suite over a method: does it do what its name says?"""
    state.add(plugin, as_json, quiet, debug)
    registry = state.registry()
    registry.create(method)
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

INTERRUPTED = 130
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""The parser's own error. Older typer takes it from click, newer typer brings a copy."""


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; every error of ours is one message and an exit code.

    `words` are the arguments, those of the process by default.

    Raises:
        SystemExit: always, with the exit code.
    """
    state.clear()
    try:
        given = None if words is None else list(words)
        code = app(given, prog_name="unsc", standalone_mode=False) or 0
        sys.stdout.flush()  # inside, so that a reader who has gone is noticed here
    except UnscError as error:
        code = _fail(error, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on
        code = 1
    except OSError as error:
        code = _fail(error, 2)
    except USAGE_ERROR as error:
        code = _usage(error)
    except Exception as error:
        if not _interrupted(error):
            raise
        code = INTERRUPTED
    if code == INTERRUPTED:
        complain("interrupted; trained models and finished units are kept")
    sys.stdout.flush()
    sys.exit(code)


def _fail(error: BaseException, code: int) -> int:
    if state.debug:
        err.print_exception()
    complain("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
    return code


def _interrupted(error: BaseException | None) -> bool:
    """Return whether an error only follows from Ctrl-C, as when an import is broken off."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _usage(error: Any) -> int:
    error.show()
    return int(error.exit_code)


if __name__ == "__main__":
    main()
