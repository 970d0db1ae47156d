"""A method from outside: found, checked, run and ranked, without a file of ours being touched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import board, python, unsc

from unsc_plugin import bench, conformance, record, registry

CLASS_FORM = '''\
"""The class form: it sees the task and uses the one training loop."""

from dataclasses import dataclass

from unsc_plugin import UnlearningMethod, engine, register_method
from unsc_plugin.method import Scenario, Split, TrainingConfig, option


@register_method("short_tuning")
class ShortTuning(UnlearningMethod):
    """Steps on the cross-entropy of D_r from θ_O (Warnecke et al. 2021), from elsewhere."""

    @dataclass(frozen=True)
    class Config(TrainingConfig):
        """Settings of `short_tuning`."""

        lr_scale: float = option(0.1, "learning rate as a share of the recipe's", above=0)

    needs = frozenset({Split.RETAIN})
    scenarios = frozenset({Scenario.CLASS, Scenario.RANDOM})

    def run(self, model, task):
        """Return the model fine-tuned on the retain set."""
        stage = engine.Stage(
            task.loader("retain", batch_size=self.config.batch_size), engine.cross_entropy
        )
        epochs = self.config.passes_for(task.recipe, 1.0)
        engine.fit_config(model, task, [stage], self.config, epochs=epochs)
        return model
'''
FUNCTION_FORM = '''\
"""The function form, as README.md has it."""

import torch

from unsc_plugin import register_method


@register_method("shrink_head", summary="Scales the head down", deterministic=True)
def shrink_head(model, *, ctx, rate: float = 0.5):
    """Scales the head by 1 - rate. For tests only (nobody 2026)."""
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(1 - rate)
    return model
'''
REGISTRY = """\
schema: 1
package: sample-methods
methods:
  sample_tuning:
    target: sample_methods.methods:SampleTuning
    summary: Fine-tuning of another package
    needs: [retain]
    scenarios: [class, random]
    presets:
      gentle: {args: {lr_scale: 0.01}, source: tuned}
backbones:
  sample-net: {source: torch, id: mlp, args: {hidden: [16]}, summary: A small perceptron}
forget_sets:
  sample/class-1: {kind: class, data: wine, classes: [1], summary: All of the second grower}
"""
PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "sample-methods"
version = "0.3"
dependencies = ["unsc-plugin"]

[project.entry-points."unsc_plugin.registries"]
sample = "sample_methods"
"""
QUICK = ("--data", "wine", "--forget", "class:0", "--model", "logistic", "--recipe", "epochs=2")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNSC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, and leave no module or registration behind."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_session", [])
    monkeypatch.setenv("COLUMNS", "160")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("sample_methods", "_unsc_plugin_file_", "outside")):
            del sys.modules[name]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Both forms as files outside the repository: name of the method -> file."""
    found = {}
    for name, text in (("short_tuning", CLASS_FORM), ("shrink_head", FUNCTION_FORM)):
        found[name] = tmp_path / f"outside_{name}.py"
        found[name].write_text(text, encoding="utf-8")
    return found


def package(folder: Path, text: str = REGISTRY, init: str = "") -> Path:
    """Write the package of a separate project and return the folder it lies in."""
    inside = folder / "sample_methods"
    inside.mkdir(parents=True)
    (inside / "__init__.py").write_text(init)
    (inside / "registry.yaml").write_text(text)
    methods = CLASS_FORM.replace('@register_method("short_tuning")\nclass Short', "class Sample")
    methods = methods.replace("    needs =", '    name = "sample_tuning"\n    needs =')
    (inside / "methods.py").write_text(methods.replace("`short_tuning`", "`sample_tuning`"))
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution on the path as an installer leaves it: the package and its metadata."""
    site = package(tmp_path / "site")
    distribute(site)
    monkeypatch.syspath_prepend(site)
    return site


def distribute(site: Path) -> None:
    info = site / "sample_methods-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample-methods\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[unsc_plugin.registries]\nsample = sample_methods\n")


def origins(*words: str | Path) -> dict[str, str]:
    done = unsc("list", "methods", "--json", *words)
    assert done.code == 0, done.err
    return {row["name"]: row["origin"] for row in done.json}


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["short_tuning", "shrink_head"])
class TestFile:
    def test_is_listed_with_its_origin(self, name: str, files: dict[str, Path]) -> None:
        assert name not in origins()
        assert origins("--plugin", files[name])[name] == str(files[name])
        text = unsc("list", "--plugin", files[name]).out
        assert name in text
        assert "Scales the head down" in text or "Steps on the cross-entropy" in text

    def test_is_shown_with_its_settings(self, name: str, files: dict[str, Path]) -> None:
        tree = unsc("show", name, "--plugin", files[name], "--json").json
        settings = {row["name"]: row["default"] for row in tree["settings"]}
        assert (
            settings.items()
            >= {"short_tuning": {"lr_scale": 0.1}, "shrink_head": {"rate": 0.5}}[name].items()
        )
        assert tree["example"].endswith(f"--plugin {files[name]}")
        assert unsc("show", name, "--plugin", files[name]).code == 0

    def test_passes_the_conformance_suite(self, name: str, files: dict[str, Path]) -> None:
        done = unsc("check", name, "--quick", "--plugin", files[name], "--json")
        assert {r["id"]: r["detail"] for r in done.json["results"] if not r["passed"]} == {}
        assert done.code == 0
        assert list(conformance.CHECKS) == [r["id"] for r in done.json["results"]]

    def test_runs_and_its_settings_matter(self, name: str, files: dict[str, Path]) -> None:
        setting = {"short_tuning": "lr_scale=1", "shrink_head": "rate=0.9"}[name]
        words = ("run", name, "--plugin", files[name], *QUICK, "--json")
        plain, other = unsc(*words), unsc(*words, "--set", setting)
        assert plain.code == other.code == 0, plain.err + other.err
        assert plain.json["method"] == name
        assert plain.json["hashes"]["unlearned"] != other.json["hashes"]["unlearned"]
        assert plain.json["hashes"]["original"] == other.json["hashes"]["original"]
        key, _, value = setting.partition("=")
        assert other.json["config"][key] == float(value)

    def test_unknown_settings_are_refused(self, name: str, files: dict[str, Path]) -> None:
        done = unsc("run", name, "--plugin", files[name], *QUICK, "--set", "nonsense=1")
        assert done.code == 2
        assert "nonsense" in done.err


def test_a_faulty_method_fails_the_suite(tmp_path: Path) -> None:
    path = tmp_path / "outside_idle.py"
    path.write_text(FUNCTION_FORM.replace("parameter.mul_(1 - rate)", "pass"))
    done = unsc("check", "shrink_head", "--quick", "--plugin", path, "--json")
    assert done.code == 1
    failed = {r["id"] for r in done.json["results"] if not r["passed"]}
    assert {"changes", "config_matters"} <= failed
    assert "FAILED" in unsc("check", "shrink_head", "--quick", "--plugin", path).out


def test_a_class_by_its_dotted_name(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(files["short_tuning"].parent)
    words = ("--plugin", "outside_short_tuning:ShortTuning", "--json")
    path = board(tmp_path / "board", ("[retrain, original]", "[short_tuning]"))
    for _ in range(2):  # the decorator runs once, on import, and must not count as another origin
        assert unsc("run", "short_tuning", *QUICK, "--dry-run", *words).json["data"] == "wine"
        assert unsc("bench", path, "--dry-run", *words).json["units"] == 1


def test_a_board_of_methods_from_outside(tmp_path: Path, files: dict[str, Path]) -> None:
    entries = "[retrain, original, short_tuning, {method: shrink_head, set: {rate: 0.9}}]"
    plugins = [word for path in files.values() for word in ("--plugin", path)]
    paths = {
        workers: board(tmp_path / f"board{workers}", ("[retrain, original]", entries))
        for workers in (1, 2)
    }
    for workers, path in paths.items():
        done = unsc("bench", path, *plugins, "--workers", str(workers))
        assert done.code == 0, done.err
        assert "[4/4]" in done.err
    found = [record.read_folder(path.parent / "results") for path in paths.values()]
    for one, two in zip(*found, strict=True):
        assert one.key == two.key
        assert one.hashes == two.hashes
        assert {**one.metrics, "mubench.unlearn_time": 0} == {
            **two.metrics,
            "mubench.unlearn_time": 0,
        }
    by_name = {one.entry: one for one in found[0]}
    assert by_name["shrink_head"].config == {"rate": 0.9}
    assert by_name["shrink_head"].checks is not None
    assert by_name["shrink_head"].checks["failed"] == []
    text = (paths[1].parent / "LEADERBOARD.md").read_text()
    assert "short_tuning" in text
    assert "shrink_head" in text
    assert unsc("board", "verify", paths[1], *plugins).code == 0
    assert unsc("board", "build", paths[1], *plugins, "--check").code == 0
    refused = unsc("bench", paths[1])
    assert refused.code == 2
    assert "'short_tuning'" in refused.err


# --------------------------------------------------------------------------- packages


def test_a_package_is_found(installed: Path) -> None:
    assert origins()["sample_tuning"] == "sample-methods 0.3"
    for what, name in (("backbones", "sample-net"), ("forget-sets", "sample/class-1")):
        rows = {row["name"]: row for row in unsc("list", what, "--json").json}
        assert rows[name]["origin"] == "sample-methods 0.3"
        assert rows[name]["status"] == "ok"
    assert "sample_methods.methods" not in sys.modules, "listing imports no target"


def test_a_package_is_used(installed: Path) -> None:
    assert unsc("check", "sample_tuning", "--quick").code == 0
    done = unsc(
        "run", "sample_tuning.gentle", "--data", "wine", "--model", "sample-net", "--forget",
        "sample/class-1", "--recipe", "epochs=2", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (done.json["method"], done.json["preset"]) == ("sample_tuning", "gentle")
    assert done.json["config"]["lr_scale"] == 0.01
    assert done.json["experiment"]["backbone"]["args"] == {"hidden": [16]}


def test_a_package_that_is_gone(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(installed)
    done = unsc("run", "sample_tuning", *QUICK)
    assert done.code == 2
    assert "'sample_tuning'" in done.err
    assert "group unsc_plugin.registries" in done.err


@pytest.mark.parametrize("fault", ["import", "file"])
def test_a_broken_package_takes_nobody_down(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {
        "import": {"init": "raise RuntimeError('no luck')"},
        "file": {"text": REGISTRY.replace("summary:", "sumary:", 1)},
    }
    site = package(tmp_path / "site", **faults[fault])
    distribute(site)
    monkeypatch.syspath_prepend(site)
    done = unsc("list", "methods")
    assert done.code == 0
    row = next(line for line in done.out.splitlines() if "sample-methods 0.3" in line)
    assert "broken" in row
    assert "finetune" in done.out
    assert unsc("list", "methods", "--strict").code == 1
    assert unsc("run", "original", *QUICK).code == 0
    asked = unsc("run", "sample", *QUICK)
    assert asked.code == 2
    assert "broken" in asked.err
    assert ("no luck" if fault == "import" else "registry.yaml:4") in asked.err


def test_a_project_installed_by_pip(tmp_path: Path) -> None:
    project, target = package(tmp_path / "project"), tmp_path / "target"
    (project / "pyproject.toml").write_text(PROJECT)
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
            "--no-build-isolation", "--disable-pip-version-check", "--target", target, project,
        ],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (target / "sample_methods" / "registry.yaml").is_file()

    listed = python("-m", "unsc_plugin.cli", "list", "--json", PYTHONPATH=str(target))
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["sample_tuning"]["origin"] == "sample-methods 0.3"
    ran = python(
        "-m", "unsc_plugin.cli", "run", "sample_tuning", *QUICK, "--json", "--out", "out",
        cwd=tmp_path, PYTHONPATH=str(target),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == json.loads((tmp_path / "out" / "record.json").read_text())


def test_badges_are_given_for_the_code_that_was_checked(files: dict[str, Path]) -> None:
    root = Path("badges-here")
    for text in (FUNCTION_FORM, FUNCTION_FORM.replace("1 - rate", "(1 - rate)")):
        files["shrink_head"].write_text(text)
        known = registry.load([str(files["shrink_head"])])
        assert bench.badge_of("shrink_head", known, root)["failed"] == []
    assert len(list(root.rglob("*.json"))) == 2
