"""The sample package as a newcomer meets it: built, installed, used, removed; and neighbours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from command_line import board

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "examples" / "plugin-package"


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own, which borrows what we depend on from this one."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    def call(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in an empty folder."""
        own = {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "UNSC_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
        }
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "UNSC_DATA_DIR")}
        here = self.folder / "here"
        here.mkdir(exist_ok=True)
        return subprocess.run(
            words, cwd=here, env={**kept, **own}, capture_output=True, text=True, timeout=120
        )

    def unsc(self, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.call(self.python.parent / "unsc", *words)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def pip(self, *words: str | Path) -> None:
        done = self.call(sys.executable, "-m", "pip", "--python", self.python, *words)
        assert done.returncode == 0, done.stderr

    def install(self, *wheels: Path) -> None:
        self.pip("install", "--quiet", "--no-index", "--no-deps", *wheels)

    def origins(self) -> dict[str, str]:
        rows = json.loads(self.unsc("list", "methods", "--all", "--json").stdout)
        return {row["name"]: row["origin"] for row in rows}


def wheel(project: Path, into: Path) -> Path:
    """Build the wheel of a project into an empty folder and return it."""
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(into)]
    done = subprocess.run(words, cwd=project, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    [found] = into.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(ROOT, tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(SAMPLE, tmp_path_factory.mktemp("sample"))


@pytest.fixture
def environment(tmp_path: Path, ours: Path, sample: Path) -> Environment:
    """An environment with our wheel and that of the sample."""
    found = Environment(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    [site] = (tmp_path / "venv").glob("lib/*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found.install(ours, sample)
    return found


def project(folder: Path, name: str, registry: dict[str, object], init: str = "") -> Path:
    """Write another package of methods and return its folder."""
    package = name.replace("-", "_")
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(init)
    (folder / package / "registry.yaml").write_text(yaml.safe_dump({"schema": 1, **registry}))
    text = (SAMPLE / "pyproject.toml").read_text()
    for old, new in (
        ("unsc-plugin-sample", name),
        ("src/unsc_plugin_sample", package),
        ("unsc_plugin_sample", package),
        ('readme = "README.md"\n', ""),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "pyproject.toml").write_text(text)
    return folder


# --------------------------------------------------------------------------- the sample


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_sample_from_install_to_removal(environment: Environment, tmp_path: Path) -> None:
    here = environment
    where = here.call(here.python, "-c", "import unsc_plugin; print(unsc_plugin.__file__)")
    assert where.stdout.startswith(str(here.folder)), "the wheel is what is tested"
    listed = here.origins()
    assert listed["sample_finetune"] == listed["sample_shrink"] == "unsc-plugin-sample 0.1.0"
    assert listed["retrain"] == "built-in"
    for what, name in (("backbones", "sample-net"), ("forget-sets", "sample/class-1")):
        rows = {row["name"]: row for row in json.loads(here.unsc("list", what, "--json").stdout)}
        assert (rows[name]["origin"], rows[name]["status"]) == ("unsc-plugin-sample 0.1.0", "ok")

    assert "FAILED" not in here.unsc("check", "sample_finetune", "--quick").stdout
    here.unsc("run", "sample_finetune", "--out", "run")
    found = json.loads((here.folder / "here" / "run" / "record.json").read_text())
    assert (found["method"], found["status"]) == ("sample_finetune", "ok")

    path = board(
        tmp_path / "board",
        (
            "[retrain, original]",
            "[sample_finetune.gentle, {method: sample_shrink, set: {rate: 0.9}}]",
        ),
        ("data: wine", "data: digits"),
        ("model: logistic", "model: sample-net"),
        ('"class:0"', "sample/class-1"),
    )
    here.unsc("bench", path)
    text = (path.parent / "LEADERBOARD.md").read_text()
    assert "sample_finetune.gentle" in text
    assert "sample_shrink" in text
    records = [json.loads(p.read_text()) for p in (path.parent / "results").glob("*.json")]
    assert [(r["status"], r["checks"]["failed"]) for r in records] == [("ok", [])] * 2

    tests = SAMPLE / "tests"
    done = here.call(here.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
    assert done.returncode == 0, done.stdout
    assert "50 passed" in done.stdout

    here.pip("uninstall", "--yes", "--quiet", "unsc-plugin-sample")
    gone = here.unsc("run", "sample_finetune", code=2)
    assert "unknown method 'sample_finetune'; did you mean 'finetune'" in gone.stderr
    assert gone.stdout == ""


def test_the_readme_of_the_sample_is_what_can_be_done() -> None:
    text = (SAMPLE / "README.md").read_text()
    registry = yaml.safe_load((SAMPLE / "src/unsc_plugin_sample/registry.yaml").read_text())
    for section in ("methods", "backbones", "forget_sets"):
        assert registry[section]
        assert all(name in text for name in registry[section])
    [shown] = [block for block in text.split("```yaml\n")[1:]]
    entries = yaml.safe_load(shown.split("```")[0])["entries"]
    assert "sample_finetune" in entries


# --------------------------------------------------------------------------- its neighbours


def test_a_package_that_raises_and_one_with_a_name_that_is_taken(
    environment: Environment, tmp_path: Path
) -> None:
    here = environment
    folder = project(
        tmp_path / "raises", "unsc-raises", {"package": "unsc-raises"},
        init="raise RuntimeError('no luck today')\n",
    )  # fmt: skip
    here.install(wheel(folder, folder / "dist"))
    rows = {row["name"]: row for row in json.loads(here.unsc("list", "--json").stdout)}
    [broken] = [row for row in rows.values() if row["status"] == "broken"]
    assert (broken["status"], broken["origin"]) == ("broken", "unsc-raises 0.1.0")
    assert "no luck today" in broken["reason"]
    assert rows["sample_finetune"]["status"] == rows["finetune"]["status"] == "ok"
    here.unsc("list", "--strict", code=1)
    here.unsc("run", "sample_finetune", "--dry-run")
    assert "no luck today" in here.unsc("run", broken["name"], "--dry-run", code=2).stderr

    entry = {
        "target": "unsc_twin:Anything", "summary": "Taken", "needs": [], "scenarios": ["class"],
    }  # fmt: skip
    folder = project(
        tmp_path / "twin",
        "unsc-twin",
        {"package": "unsc-twin", "methods": {"sample_shrink": entry}},
    )
    here.install(wheel(folder, folder / "dist"))
    for words in (("list",), ("run", "finetune", "--dry-run")):
        said = here.unsc(*words, code=2).stderr
        assert "'sample_shrink' is registered twice" in said
        assert "unsc-plugin-sample 0.1.0" in said
        assert "unsc-twin 0.1.0" in said
