"""A board: the grid of experiments, run here or on a Ray cluster, resumed where it stopped.

A finished unit is a record file. Nothing else is remembered between runs, so that a board can be
killed at any moment and started again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fnmatch
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsc_plugin import leaderboard, record
from unsc_plugin.errors import ConfigError, MissingOptional, RecordError, UnknownName
from unsc_plugin.leaderboard import BoardSummary, Leaderboard, ScenarioSummary
from unsc_plugin.record import Record
from unsc_plugin.registry import Registry, load
from unsc_plugin.spec import (
    BoardSpec,
    CorrectionSpec,
    EntrySpec,
    EvaluationSpec,
    MethodEntry,
    Recipe,
    canonical_json,
    fingerprint,
    read_yaml,
)

RESULTS = "results"
MARKDOWN, PLOT = "LEADERBOARD.md", "plot.svg"


@dataclass(frozen=True)
class Board:
    """A board file, where its results are, and how its units are run."""

    spec: BoardSpec
    source: Path
    out: Path
    plugins: tuple[str, ...] = ()
    device: str = "auto"
    precision: str = "fp32"
    threads: int = 1
    data_dir: Path | None = None
    cache: Path | None = None

    @property
    def results(self) -> Path:
        """The folder of records."""
        return self.out / RESULTS

    @property
    def prefix(self) -> bool:
        """Whether file names carry the scenario."""
        return len(self.spec.scenarios) > 1


@dataclass(frozen=True)
class Job:
    """One unit of a board: which scenario, which entry, which train seed and draw."""

    scenario: int
    entry: EntrySpec
    train_seed: int
    draw: int

    @property
    def label(self) -> str:
        """The name of the unit, as in its file name."""
        return f"{self.entry.label}--s{self.train_seed}d{self.draw}"


def find(name: str) -> Path:
    """Return the board file that `name` stands for: a file, a folder, or `benchmarks/<name>`.

    Raises:
        UnknownName: there is no such board.
        ConfigError: the name leaves the benchmarks folder.
    """
    for path in (Path(name), Path(name) / "board.yaml"):
        if path.is_file():
            return path
    if ".." in Path(name).parts:
        raise ConfigError(f"expected a board's name or folder, got {name!r}; no such board.yaml")
    inside = Path("benchmarks") / name / "board.yaml"
    if inside.is_file():
        return inside
    raise UnknownName("board", name, names(), "give a board.yaml, its folder, or a name below")


def names() -> list[str]:
    """Return the names of the boards under `benchmarks/`."""
    return sorted(path.parent.name for path in Path("benchmarks").glob("*/board.yaml"))


def open_board(name: str, *, out: Path | None = None, **how: Any) -> Board:
    """Read and validate a board.

    Raises:
        UnknownName: there is no such board.
        ConfigError: the file is not a valid board.
    """
    path = find(name)
    return Board(read_yaml(path).validate(BoardSpec), path, out or path.parent, **how)


def jobs(board: Board, *, only: str | None = None, seeds: Sequence[int] | None = None) -> list[Job]:
    """Return the units of a board; units that share trained models stand together.

    Raises:
        ConfigError: a train seed that the board does not have, or nothing matches `only`.
    """
    wanted = range(board.spec.evaluation.train_seeds)
    if seeds is not None and not set(seeds) <= set(wanted):
        raise ConfigError(f"--seeds: expected some of {list(wanted)}, got {list(seeds)}")
    found = [
        Job(scenario, entry, train_seed, draw)
        for scenario in range(len(board.spec.scenarios))
        for draw in range(board.spec.evaluation.draws)
        for train_seed in (wanted if seeds is None else seeds)
        for entry in board.spec.rows
    ]
    if only is not None:
        found = [
            job
            for job in found
            if fnmatch.fnmatch(job.label, only) or fnmatch.fnmatch(job.entry.label, only)
        ]
        if not found:
            raise ConfigError(f"--only {only!r} matches no unit of {board.spec.name}")
    return found


# --------------------------------------------------------------------------- what is done


def unit_setting(
    board: Board, index: int, registry: Registry, device: Any, tell: Any = None
) -> Any:
    """Return the setting of one scenario of a board."""
    from unsc_plugin import run

    scenario = board.spec.scenarios[index]
    return run.setting(
        registry,
        data_name=scenario.data,
        model_name=scenario.model,
        forget_sets=scenario.forget,
        evaluation_spec=board.spec.evaluation,
        seed=board.spec.seed,
        device=device,
        recipe=scenario.recipe,
        data_dir=board.data_dir,
        cache=board.cache,
        name=scenario.name,
        board=board.spec.name,
        board_path=board.source.parent.as_posix(),
        tell=tell,
    )


def split_done(board: Board, wanted: Sequence[Job]) -> tuple[list[Job], list[Record]]:
    """Return the units still to run and the records that are there.

    Raises:
        RecordError: a record is broken, doubled, or of another version of the board.
    """
    found = record.read_folder(board.results) if board.results.is_dir() else []
    there = {(r.scenario, r.entry, r.unit.train_seed, r.unit.draw): r for r in found}
    registry = load(board.plugins)
    todo = []
    for job in wanted:
        name = board.spec.scenarios[job.scenario].name
        done = there.get((name, job.entry.label, job.train_seed, job.draw))
        if done is None:
            todo.append(job)
        else:
            _same_board(board, job, done, registry)
    return todo, found


def _same_board(board: Board, job: Job, done: Record, registry: Registry) -> None:
    """Refuse a record that was made under another version of the board file.

    Raises:
        RecordError: naming what has changed.
    """
    from unsc_plugin import run
    from unsc_plugin.method import build_config

    scenario = board.spec.scenarios[job.scenario]
    names = run.resolve(
        registry,
        data_name=scenario.data,
        model_name=scenario.model,
        forget_sets=scenario.forget,
        recipe=scenario.recipe,
    )
    forget = names.forget[job.draw if len(names.forget) > 1 else 0]
    named, preset = registry.method(job.entry.method)
    now = {
        "data": names.data,
        "model": scenario.model,
        "recipe": names.recipe.model_dump(mode="json"),
        "forget": forget.model_dump(mode="json", exclude_defaults=True),
        "evaluation": board.spec.evaluation.model_dump(mode="json"),
        "seed": board.spec.seed,
        "method": [named.name, preset],
        "track": job.entry.track,
    }
    kept = {**done.experiment, "method": [done.method, done.preset], "track": done.track}
    for key, kind in (("recipe", Recipe), ("evaluation", EvaluationSpec)):
        # read through the model, so that a field which is new since then has its default
        stored = json.dumps(kept.get(key, {}))
        kept[key] = kind.model_validate_json(stored).model_dump(mode="json")
    changed = [key for key, value in now.items() if kept.get(key) != value]
    config = registry.create(job.entry.method, **job.entry.set).config
    both = sorted({item.name for item in dataclasses.fields(config)} & done.config.keys())
    then = build_config(type(config), {key: done.config[key] for key in both})  # as above
    changed += [f"set.{key}" for key in both if getattr(config, key) != getattr(then, key)]
    if changed:
        raise RecordError(
            f"{board.results}: {job.label} was run with another {', '.join(changed)} than "
            f"{board.source} has now; boards are never edited: raise `version` in a new folder, or "
            "delete the results to run them again"
        )


# --------------------------------------------------------------------------- running


Report = Callable[[Job, Record], None]


def run_jobs(
    board: Board,
    todo: Sequence[Job],
    *,
    workers: int = 1,
    ray: bool = False,
    report: Report | None = None,
    tell: Any = None,
) -> list[Record]:
    """Run units and write their records; a unit that fails is a record, and the rest goes on.

    Raises:
        MissingOptional: `ray` without the package.
    """
    done: list[Record] = []
    source = _through_ray(board, todo) if ray else _local(board, todo, workers, tell)
    for job, finished in source:
        if finished is not None:
            done.append(finished)
            if report is not None:
                report(job, finished)
    return done


def _local(
    board: Board, todo: Sequence[Job], workers: int, tell: Any
) -> Iterator[tuple[Job, Record | None]]:
    if workers <= 1:
        for job in todo:
            yield job, run_job(board, job, tell)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_end_with, initargs=(os.getpid(),)
    ) as executor:
        futures = {executor.submit(run_job, board, job): job for job in todo}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with(parent: int) -> None:
    """End this worker when its parent is gone: a killed parent cannot tell its workers."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _through_ray(board: Board, todo: Sequence[Job]) -> Iterator[tuple[Job, Record | None]]:
    try:
        import ray
    except ImportError:
        raise MissingOptional(
            "--ray needs the package ray; install it with: pip install 'unsc-plugin[ray]'"
        ) from None
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    remote = ray.remote(run_job)
    waiting = {remote.remote(board, job): job for job in todo}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        for reference in ready:
            yield waiting.pop(reference), ray.get(reference)


def run_job(board: Board, job: Job, tell: Any = None) -> Record | None:
    """Run one unit and write its record; None if another process has written it meanwhile."""
    from unsc_plugin import run

    setting = _setting(board, job.scenario, tell)
    finished = run.run_unit(setting, run.Unit(job.entry, job.train_seed, job.draw))
    named, _ = setting.registry.method(job.entry.method)
    badge = badge_of(named.name, setting.registry, setting.pool.root)
    result = finished.record.model_copy(update={"checks": badge})
    if finished.outputs is not None:
        keep_outputs(finished.outputs, result, setting.pool.root)
    if not run.is_main(setting.pool.device):
        return None
    try:
        record.write(result, board.results, prefix=board.prefix)
    except RecordError:
        return None  # a second bench on the same board was faster; its record stands
    return result


_SETTINGS: dict[str, Any] = {}


def _setting(board: Board, index: int, tell: Any = None) -> Any:
    """Return the setting of a scenario, made once per process."""
    place = [str(board.out), str(board.cache), os.environ.get("UNSC_CACHE"), str(board.data_dir)]
    how = [board.device, board.precision, board.threads, board.plugins]
    key = fingerprint([board.spec, place, how, index])
    if key not in _SETTINGS:
        import torch

        from unsc_plugin import engine, run

        run.quiet_libraries()
        torch.set_num_threads(board.threads)
        device = engine.accelerator(board.device, board.precision)  # type: ignore[arg-type]
        _SETTINGS[key] = unit_setting(board, index, load(board.plugins), device, tell)
    return _SETTINGS[key]


# --------------------------------------------------------------------------- badges and outputs


@functools.cache
def _code_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def badge_of(name: str, registry: Registry, root: Path) -> dict[str, Any]:
    """Return the badge of a method: from the cache for this very code, else by the quick suite."""
    from unsc_plugin import conformance

    kind = registry.method_class(name)
    try:
        file = inspect.getsourcefile(getattr(kind, "function", kind))
        own = Path(file or "").read_text(encoding="utf-8")
    except (OSError, TypeError):
        own = repr(kind)  # made without a file
    path = root / "badges" / f"{name}-{fingerprint([_code_sha256(), own])[:16]}.json"
    if not path.is_file():
        badge = conformance.badge(conformance.check_method(kind, quick=True, registry=registry))
        write_text(path, canonical_json(badge))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def outputs_path(done: Record, root: Path) -> Path:
    """Return where the logits of a unit are kept for recomputing its metrics."""
    experiment = {key: done.experiment[key] for key in ("data", "evaluation", "recipe", "seed")}
    key = fingerprint([done.hashes, done.unit, experiment])
    return root / "units" / key[:2] / f"{key}.safetensors"


def keep_outputs(outputs: Any, done: Record, root: Path) -> None:
    """Keep the logits of a unit, so that `board verify` can recompute its numbers."""
    path = outputs_path(done, root)
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as scratch:
        outputs.save(Path(scratch) / path.name)
        os.replace(Path(scratch) / path.name, path)


# --------------------------------------------------------------------------- the leaderboard


def summary(board: Board, records: Sequence[Record]) -> BoardSummary:
    """Return what the leaderboard must know of a board."""
    spec, how = board.spec, board.spec.evaluation
    kinds = {done.scenario: done.kind for done in records}
    corrects = how.correction is not None or "correction" in kinds.values()
    unknown = "correction" if corrects else "instance"
    return BoardSummary(
        name=spec.name,
        title=spec.title,
        scenarios=tuple(
            ScenarioSummary(one.name, kinds.get(one.name, unknown), one.description)
            for one in spec.scenarios
        ),
        entries=tuple(entry.label for entry in spec.rows),
        version=spec.version,
        seed=spec.seed,
        train_seeds=how.train_seeds,
        draws=how.draws,
        reference_pool=how.reference_pool,
        admission_z=how.admission_z,
        a_min=how.a_min,
        confidence=how.confidence,
        bootstrap=how.bootstrap,
        cost_gate=how.cost_gate,
        weights={str(key): value for key, value in how.weights.items()},
        notes=_missing_beside(board),
        criterion=(how.correction or CorrectionSpec()).metric if corrects else None,
    )


def _missing_beside(board: Board) -> tuple[str, ...]:
    """Return a note per method whose own controls are not on the board."""
    methods = load(board.plugins).methods
    there = {entry.method for entry in board.spec.rows}
    notes = {}
    for entry in board.spec.rows:
        name, _, tag = entry.method.partition(".")
        known = methods[name].entry if name in methods else None
        beside = known.beside if isinstance(known, MethodEntry) and not tag else ()
        lacking = [one for one in beside if one not in there]
        if lacking:
            notes[name] = f"{name} says little without {', '.join(lacking)} beside it; add them"
    return tuple(notes.values())


def build(board: Board) -> Leaderboard:
    """Return the leaderboard of the records that are there.

    Raises:
        RecordError: no records, or a broken one.
    """
    records = record.read_folder(board.results)
    if not records:
        raise RecordError(
            f"{board.results} holds no records; run `unsc bench {board.source.parent}`"
        )
    return leaderboard.build(records, summary(board, records))


def files(board: Board, built: Leaderboard) -> dict[Path, str]:
    """Return the generated files of a board: path -> text."""
    texts = {MARKDOWN: built.markdown(), PLOT: built.svg(), **built.plots()}
    return {board.out / name: text for name, text in texts.items()}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as handle:
        handle.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def stale(board: Board, built: Leaderboard) -> list[Path]:
    """Return the generated files that differ from what the records say."""
    return [
        path
        for path, text in files(board, built).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


# --------------------------------------------------------------------------- verifying


@dataclass(frozen=True)
class Mismatch:
    """One stored value that does not come out again."""

    unit: str
    what: str
    stored: str
    found: str


def verify(
    board: Board, *, tolerance: float = 1e-6, report: Callable[[str], None] | None = None
) -> tuple[int, list[Mismatch]]:
    """Recompute hashes and metrics of all records; return the number checked and all mismatches.

    Metrics come from the kept logits where the cache has them, else from running the unit again.

    Raises:
        RecordError: a record is broken, or of another version of the board.
    """
    todo = jobs(board)
    _, found = split_done(board, todo)
    by_unit = {(r.scenario, r.entry, r.unit.train_seed, r.unit.draw): r for r in found}
    mismatches: list[Mismatch] = []
    checked = 0
    for job in todo:
        name = board.spec.scenarios[job.scenario].name
        stored = by_unit.get((name, job.entry.label, job.train_seed, job.draw))
        if stored is None:
            mismatches.append(Mismatch(job.label, "record", "expected", "none"))
            continue
        mismatches += _recheck(board, job, stored, tolerance)
        checked += 1
        if report is not None:
            report(job.label)
    return checked, mismatches


ORACLE = ("oracle_js", "oracle_agree", "oracle_gap_diff")
"""Numbers that the outputs of a unit do not tell: they need its weights, and a retraining."""
LATER = ("metrics.transfer_acc",)
"""Numbers that older records of the same boards lack."""


def _recheck(board: Board, job: Job, stored: Record, tolerance: float) -> list[Mismatch]:
    from unsc_plugin import evaluation, run

    setting = _setting(board, job.scenario)
    unit = run.Unit(job.entry, job.train_seed, job.draw)
    path = outputs_path(stored, setting.pool.root)
    corrects, alone = stored.kind == "correction", stored.status == "ok" and path.is_file()
    if not alone:
        again = run.run_unit(setting, unit).record
        hashes, found = again.hashes, _numbers(again)
    else:
        numbers = run.evaluate_outputs(setting, unit, evaluation.Outputs.load(path))
        hashes, found = run.hashes_of(setting, unit), _numbers(numbers)
    # a correction is compared with the oracle of its own weights, not with a pool of its draw
    members = [] if corrects else [m.meta["sha256"] for m, _ in setting.references(job.draw)]
    if not corrects and stored.reference_hashes not in ([], members):
        return [Mismatch(job.label, "reference_hashes", "others", "those of the pool")]
    mismatches = [
        Mismatch(job.label, f"hash of {key}", stored.hashes[key][:16], hashes[key][:16])
        for key in sorted(stored.hashes.keys() & hashes.keys())
        if stored.hashes[key] != hashes[key]
    ]
    kept = _numbers(stored)
    for name in sorted(kept.keys() | found.keys()):
        part, key = name.split(".", 1)
        if name == "metrics.mubench.unlearn_time":
            continue  # a time is measured once
        if corrects and alone and (part == "reference" or key in ORACLE):
            continue
        before, after = kept.get(name), found.get(name)
        if before is None and name in LATER:
            continue
        if before is None or after is None or abs(before - after) > tolerance:
            mismatches.append(Mismatch(job.label, name, str(before), str(after)))
    return mismatches


def _numbers(of: Any) -> dict[str, float]:
    """Return the numbers of a record or an evaluation that must come out again, by full name."""
    parts = {part: getattr(of, part) for part in ("metrics", "reference", "reference_std")}
    ends = {f"{k}.{end}": x for k, pair in of.intervals.items() for end, x in enumerate(pair)}
    parts["intervals"] = ends
    return {f"{part}.{key}": x for part, found in parts.items() for key, x in found.items()}
