"""Run a script of MU-Bench as it stands: everything it needs is put in before, and out after."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from unsc_plugin.adapters._mubench_checkout import (
    Checkout,
    around,
    check_data,
    check_window,
    known_backbone,
    locate,
    model_id,
)
from unsc_plugin.adapters._mubench_config import (
    DEFECTS,
    Options,
    check_request,
    known_method,
    make_config,
    parse_run,
    read_config,
    translate_config,
    typed,
)
from unsc_plugin.adapters._mubench_folder import DONE, NUMBERS, RECEIPT
from unsc_plugin.adapters._mubench_install import (
    Installed,
    install,
    installed,
    offline_accuracy,
)
from unsc_plugin.errors import ConfigError, MissingOptional, UnknownName, UnscError
from unsc_plugin.registry import load as load_registry
from unsc_plugin.runtime import sealed


def run_script(script: str | Path, config: str | Path, options: Options | None = None) -> int:
    """Run an experiment script of MU-Bench with a configuration file; return its exit code.

    The configuration may hold a block `unsc_plugin` with the fields of :class:`Options`; `options`
    stand over it. The script is not edited and the checkout not written to (but for the run folder,
    if the configuration puts it there). All global state is put back.

    Raises:
        ConfigError: no such script, or a run folder that is complete.
        UnscError: what is wrong before the script starts, or what a method of ours refuses.
    """
    script, config = Path(script).resolve(), Path(config).resolve()
    if not script.is_file():
        raise ConfigError(f"{script}: no such script; give experiment/<data>/unlearn.py")
    given, block = read_config(config)
    options = (options or Options()).over(block)
    untested = check_window(allow_untested=options.allow_untested)
    checkout = locate(options.home or around(script))
    registry = load_registry(options.plugins)
    method = known_method(given.get("unlearn_method", "neggrad"), registry)
    _check(given, checkout, method)
    translated, changes = translate_config(
        given, plugin=method is not None, allow_push=options.allow_push
    )
    folder = (script.parent / str(translated.get("output_dir", ""))).resolve()
    if (folder / DONE).is_file():
        if options.resume:
            print(f"{folder} is complete; nothing to do")
            return 0
        raise ConfigError(
            f"{folder} holds a complete run and is never overwritten; use --resume to keep it, or "
            "another output_dir"
        )
    _tell(given, method, changes, untested)
    with (
        _modules_kept(),
        _installed(checkout, options, changes) as suite,
        _local_data(suite, given["dataset_name"]),
        tempfile.TemporaryDirectory() as scratch,
    ):
        file = Path(scratch) / "config.json"
        file.write_text(json.dumps(translated), encoding="utf-8")
        with sealed(int(translated.get("seed", 42))), _place(script, file), offline_accuracy():
            code = _run(script)
    if code == 0:
        code = _report(folder)
    return code


def _check(given: Mapping[str, Any], checkout: Checkout, method: str | None) -> None:
    """Refuse before anything runs what the script would stumble over.

    Raises:
        ConfigError: no data set or no base model.
    """
    for key in ("dataset_name", "model_name_or_path"):
        if key not in given:
            raise ConfigError(f"expected {key} in the configuration, got none")
    check_data(given["dataset_name"])
    known_backbone(checkout, given["model_name_or_path"], method or "finetune")
    if method is not None:
        check_request(SimpleNamespace(**{**given, "data_name": given["dataset_name"]}))


def _tell(
    given: Mapping[str, Any], method: str | None, changes: Sequence[str], untested: str | None
) -> None:
    name = given.get("unlearn_method", "neggrad")
    if method is not None:
        print(f"unlearn_method {name}: {method} of unsc_plugin")
    elif name in DEFECTS:
        print(f"note on MU-Bench's own {name}: {DEFECTS[name]}")
    if changes:
        print(f"changed in the configuration: {'; '.join(changes)}")
    if untested is not None:
        print(f"transformers {untested} is outside the window that MU-Bench was tried on")


@contextlib.contextmanager
def _installed(checkout: Checkout, options: Options, changes: list[str]) -> Iterator[Installed]:
    """Install for one run, or take what the caller has installed.

    Raises:
        ConfigError: another checkout is installed.
    """
    before = installed()
    place = str(checkout.package)
    found = before or install(home=place, allow_untested=options.allow_untested)
    if found.checkout.package != checkout.package:
        raise ConfigError(f"{found.checkout.package} is installed; uninstall it before {place}")
    try:
        with found.using(options, changes):
            yield found
    finally:
        if before is None:
            found.uninstall()


@contextlib.contextmanager
def _modules_kept() -> Iterator[None]:
    """Forget what the body imported of MU-Bench, so that another checkout may come after it."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "mubench":
                del sys.modules[name]


@contextlib.contextmanager
def _local_data(suite: Installed, data: str) -> Iterator[None]:
    """Let MU-Bench load parquet files of a folder in place of the hub's data set.

    Raises:
        MissingOptional: the folder lacks train or test.
    """
    place = suite.options.data_dir
    if place is None:
        yield
        return
    folder = Path(place).expanduser().resolve()
    files = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in _PARTS}
    lacking = [split for split in ("train", "test") if not files[split]]
    if lacking:
        raise MissingOptional(f"{folder}: expected {lacking[0]}*.parquet, found none")
    base = suite.module("data.base")
    columns = {"img": "image", "fine_label": "label"}

    def load() -> Any:
        found = base.load_dataset("parquet", data_files={k: v for k, v in files.items() if v})
        there = found["train"].column_names
        return found.rename_columns({k: v for k, v in columns.items() if k in there})

    name = "load_ddi2013" if data == "ddi" else f"load_{data}"
    original = getattr(base, name)
    setattr(base, name, load)
    try:
        yield
    finally:
        setattr(base, name, original)


_PARTS = ("train", "validation", "test", "ood")


@contextlib.contextmanager
def _place(script: Path, config: Path) -> Iterator[None]:
    """Stand where the script expects to be: its folder, its arguments, its environment."""
    words, path, folder, bytecode = sys.argv, list(sys.path), Path.cwd(), sys.dont_write_bytecode
    lent = {"HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_MODE": "offline"}
    added = {key: value for key, value in lent.items() if key not in os.environ}
    try:
        os.environ.update(added)
        os.chdir(script.parent)
        sys.argv = [str(script), str(config)]
        sys.path.insert(0, str(script.parent))
        sys.dont_write_bytecode = True
        yield
    finally:
        sys.argv, sys.path[:], sys.dont_write_bytecode = words, path, bytecode
        os.chdir(folder)
        for key in added:
            os.environ.pop(key, None)


def _run(script: Path) -> int:
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
            return 1
        return int(left.code or 0)
    except UnscError:
        raise
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _report(folder: Path) -> int:
    """Print the numbers of a run folder; return 1 if the run is not complete."""
    if not (folder / DONE).is_file():
        print(f"{folder}: the script ended without {DONE}", file=sys.stderr)
        return 1
    numbers = json.loads((folder / DONE).read_text(encoding="utf-8"))
    for name in NUMBERS:
        if name in numbers:
            print(f"{name:<26} {numbers[name]:.6g}")
    if (folder / RECEIPT).is_file():
        tree = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        print(f"{'split':<26} {tree['split']}  ({tree['split_sha256'][:16]})")
        for name, value in tree["record"]["metrics"].items():
            if name.startswith(("delta_", "js_")):
                print(f"{name:<26} {value:.6g}")
    print(folder)
    return 0


# --------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m unsc_plugin.adapters.mubench`."""
    found = argparse.ArgumentParser(
        prog="python -m unsc_plugin.adapters.mubench",
        description="Run a script of MU-Bench, unedited, with methods of unsc_plugin.",
    )
    found.add_argument("script", nargs="?", help="experiment/<data>/unlearn.py of a checkout")
    found.add_argument("config", nargs="?", help="the script's .json, with a block unsc_plugin")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    found.add_argument("--preset", metavar="TAG")
    found.add_argument("--reference", metavar="DIR", help="run folder of a retrained model")
    found.add_argument("--data-dir", metavar="DIR", help="parquet files in place of the hub")
    found.add_argument("--home", metavar="DIR", help="checkout, where the script is outside of it")
    found.add_argument("--plugin", action="append", default=[], metavar="PATH")
    for flag in ("--resume", "--allow-foreign-order", "--allow-untested", "--allow-push"):
        found.add_argument(flag, action="store_true")
    found.add_argument("--make-config", metavar="DATA/BACKBONE/METHOD/RATIO/SEED")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error of ours is one message."""
    commands = parser()
    parsed = commands.parse_args(words)
    if parsed.make_config is None and parsed.config is None:
        commands.error("expected SCRIPT and CONFIG, or --make-config")
    try:
        if parsed.make_config is not None:
            print(json.dumps(_made(parsed.make_config, parsed.home), indent=4))
            return 0
        options = Options.of(
            {
                "home": parsed.home,
                "preset": parsed.preset,
                "set": typed("--set", parsed.set),
                "reference": _absolute(parsed.reference),
                "data_dir": _absolute(parsed.data_dir),
                "allow_foreign_order": parsed.allow_foreign_order,
                "allow_untested": parsed.allow_untested,
                "resume": parsed.resume,
                "allow_push": parsed.allow_push,
                "plugins": parsed.plugin,
            }
        )
        return run_script(parsed.script, parsed.config, options)
    except UnscError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _absolute(path: str | None) -> str | None:
    """Return a path that still holds after the script's folder was entered."""
    return None if path is None else str(Path(path).expanduser().resolve())


def _made(text: str, home: str | None) -> dict[str, Any]:
    """Return a new configuration; names come from the checkout, else from our registry.

    Raises:
        UnknownName: a backbone or a method that nobody knows.
    """
    _, backbone, method, _, _ = parse_run(text)
    registry = load_registry()
    known_method(method, registry)
    try:
        return make_config(text, model_id(locate(home), backbone))
    except MissingOptional:
        ids = {one.mubench: one.id for one in registry.entries("backbones").values() if one.mubench}
        if backbone not in ids:
            raise UnknownName("backbone of MU-Bench", backbone, ids) from None
        return make_config(text, ids[backbone])
