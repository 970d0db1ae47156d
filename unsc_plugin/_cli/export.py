"""`unsc export`: a finished run as a folder to publish, as MU-Bench's run folder, as a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from unsc_plugin._cli import flags
from unsc_plugin._cli.console import complain, emit, line, state

app = typer.Typer(
    name="export",
    help="Finished runs for others: a model folder to publish, MU-Bench's files, leaderboard rows.",
    no_args_is_help=True,
)


@app.command()
def hub(
    run: flags.RunFolder,
    directory: flags.Destination,
    push: flags.Push = None,
    license: flags.License = None,
    with_indices: flags.WithIndices = False,
    data_dir: flags.DataDir = None,
    cache: flags.Cache = None,
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Write the unlearned model with its card and receipt, as its own library reads it."""
    state.add(plugin, as_json, quiet, debug)
    registry = state.registry()
    from unsc_plugin.adapters import hub as adapter

    done = adapter.export(
        run,
        directory,
        push=push,
        license=license,
        with_indices=with_indices,
        registry=registry,
        data_dir=data_dir,
        cache=cache,
    )
    for note in done.notes:
        complain(f"warning: {note}")
    if state.as_json:
        emit(vars(done))
        return
    _list(done.files)
    line(f"{done.library} reads it; {done.rows} test rows give the same logits, bit for bit")
    line(f"written to {done.directory}")
    if done.url:
        line(f"published at {done.url}")


@app.command()
def mubench(
    run: flags.RunFolder,
    directory: flags.Destination,
    data_dir: flags.DataDir = None,
    cache: flags.Cache = None,
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Write the folder that MU-Bench would have left: logits, numbers, weights."""
    state.add(plugin, as_json, quiet, debug)
    registry = state.registry()
    from unsc_plugin.adapters import hub as adapter

    files = adapter.export_mubench(
        run, directory, registry=registry, data_dir=data_dir, cache=cache
    )
    _told(directory, files)


@app.command("hf-row")
def hf_row(
    run: flags.RunFolder,
    directory: flags.Destination,
    org: flags.Org = "local",
    license: flags.License = None,
    data_dir: flags.DataDir = None,
    cache: flags.Cache = None,
    plugin: flags.Plugins = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Write the two files of a leaderboard made from the hub's template: result and request."""
    state.add(plugin, as_json, quiet, debug)
    registry = state.registry()
    from unsc_plugin.adapters import hub as adapter

    files, absent = adapter.export_rows(
        run, directory, org=org, license=license, registry=registry, data_dir=data_dir, cache=cache
    )
    if absent:
        complain(
            f"warning: the row has no {', '.join(absent)}: the run did not measure it; run the "
            "method with --metrics core,mia,mubench"
        )
    _told(directory, files)


def _told(directory: Path, files: dict[str, str]) -> None:
    if state.as_json:
        emit({"directory": directory, "files": files})
        return
    _list(files)
    line(f"written to {directory}")


def _list(files: Mapping[str, str]) -> None:
    for name, digest in files.items():
        line(f"{digest}  {name}")
