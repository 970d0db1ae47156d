"""The command line as a user meets it: what it prints, what it leaves behind, how it exits."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checks import METHODS
from command_line import BOARD, Done, board, commands, python, tree, unsc

from unsc_plugin import bench, cli, conformance, record, registry
from unsc_plugin._cli import arguments, console, progress, views
from unsc_plugin.errors import ConfigError
from unsc_plugin.metrics import METRICS

COMMANDS = list(commands())
GROUPS = [words for words, one in commands().items() if hasattr(one, "commands")]
HEAVY = ("torch", "timm", "transformers", "evaluate", "datasets", "accelerate", "sklearn")
QUICK = ("--data", "wine", "--model", "logistic", "--recipe", "epochs=2")
SMALL_BERT = (
    "hf-config:bert?num_hidden_layers=1&hidden_size=16&num_attention_heads=1&intermediate_size=16"
)
HAS_DATA = pytest.mark.skipif(
    "UNSC_DATA_DIR" not in os.environ, reason="UNSC_DATA_DIR names no data folder"
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep badges that no suite has given out of the cache of the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNSC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


def finished(*words: str | Path) -> Done:
    done = unsc(*words)
    assert done.code == 0, done.err
    return done


# --------------------------------------------------------------------------- help, start, streams


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("width", [80, 160])
def test_help_fits_and_speaks_to_users(
    words: tuple[str, ...], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERMINAL_WIDTH", str(width))
    done = finished(*words, "--help")
    assert "Usage: unsc" in done.out
    assert "Raises" not in done.out, "a docstring's section for developers"
    assert "…" not in done.out, "a name that was cut"
    assert max(map(len, done.out.splitlines())) <= width


@pytest.mark.parametrize("words", [c for c in COMMANDS if c not in GROUPS], ids=" ".join)
def test_every_command_knows_the_global_flags(words: tuple[str, ...]) -> None:
    text = finished(*words, "--help").out
    assert all(flag in text for flag in ("--plugin", "--json", "--quiet", "--debug"))


def test_no_words_is_help_and_a_usage_error() -> None:
    done = unsc()
    assert done.code == 2
    assert "Commands" in done.out + done.err


def test_version() -> None:
    assert finished("--version").out == "unsc-plugin 0.1.0\n"


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["list"], ["list", "datasets", "--json"], ["--nope"]],
    ids=" ".join,
)  # fmt: skip
def test_nothing_heavy_is_loaded(words: list[str]) -> None:
    code = f"""
import sys
from unsc_plugin import cli
try:
    cli.main({words!r})
except SystemExit:
    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = python("-c", code)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_the_installed_command_exits_as_main_does(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("unsc")
    done = subprocess.run([script, "show", "finetun"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean" in done.stderr


def test_a_reader_that_stops_early_is_no_error() -> None:
    unsc_command = f"{sys.executable} -m unsc_plugin.cli"
    done = subprocess.run(
        ["bash", "-c", f"{unsc_command} list metrics --json | head -n 1"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "[\n"
    assert "Traceback" not in done.stderr


def test_an_error_that_follows_from_an_interrupt_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise AttributeError("half an import")

    monkeypatch.setattr(cli.state, "registry", broken_off)
    done = unsc("list")
    assert (done.code, done.out) == (130, "")
    assert "interrupted" in done.err


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.state, "registry", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unsc("list")


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" not in unsc("show", "nothing-like-it").err
    done = unsc("show", "nothing-like-it", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err


def test_commands_of_one_process_do_not_know_each_other(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from unsc_plugin import register_method\n"
        "@register_method('mine', summary='mine')\n"
        "def mine(model, forget):\n"
        "    return model\n"
    )
    assert "mine" in finished("--plugin", plugin, "list", "--plugin", plugin, "--json").out
    assert finished("list").out.startswith("methods")
    assert unsc("show", "mine").code == 2


def test_foreign_text_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.complain("red \x1b[31mtext\x1b[0m, bell \x07, next\nline")
    assert capsys.readouterr().err == "red text, bell , next\nline\n"


@pytest.mark.parametrize("columns", ["", "wide", "0", "-3"])
def test_a_strange_width_is_ignored(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "finetune" in finished("list").out


# --------------------------------------------------------------------------- list and show


@pytest.mark.parametrize(
    "what", ["methods", "backbones", "datasets", "forget-sets", "metrics", "adapters"]
)
@pytest.mark.parametrize("width", [80, 160])
def test_lists_show_every_name_whole(
    what: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = finished("list", what, "--all", "--json").json
    text = finished("list", what, "--all").out
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert [row["name"] for row in rows]
    for row in rows:
        assert set(row) >= {"name", "origin", "status", "reason", "summary"}
        assert row["summary"], f"{row['name']} says nothing of itself"
        assert row["name"] in text or width < 100


def test_lists_are_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSC_DATA_DIR", raising=False)
    known = registry.load()
    for what in ("methods", "backbones", "datasets", "forget_sets"):
        rows = finished("list", what.replace("_", "-"), "--all", "--json").json
        assert [row["name"] for row in rows] == sorted(getattr(known, what))
    done = finished("list", "datasets")
    assert "adult" not in done.out
    assert re.search(r"\d+ unavailable names are not shown; --all", done.err)
    adult = next(
        r for r in finished("list", "datasets", "--all", "--json").json if r["name"] == "adult"
    )
    assert (adult["status"], adult["reason"]) == ("unavailable", "UNSC_DATA_DIR is not set")
    assert "unavailable: UNSC_DATA_DIR is not set" in finished("list", "datasets", "--all").out


def test_metrics_are_listed_with_unit_and_direction() -> None:
    rows = finished("list", "metrics", "--json").json
    assert {row["name"]: row["unit"] for row in rows} == {m.name: m.unit for m in METRICS.values()}
    line = next(x for x in finished("list", "metrics").out.splitlines() if "js_forget" in x)
    assert line.split()[1:3] == ["bits", "lower"]


def test_boards_are_those_of_the_folder(tmp_path: Path) -> None:
    assert "no board in" in unsc("list", "boards").err
    assert finished("list", "boards", "--json").json == []
    board(tmp_path / "benchmarks" / "good")
    board(tmp_path / "benchmarks" / "bad", ("schema: 1", "schema: 2"))
    rows = {row["name"]: row for row in finished("list", "boards", "--json").json}
    assert rows["good"]["summary"] == "A little board"
    assert rows["bad"]["status"] == "broken"
    assert "A little board" in finished("list", "boards").out


SHOWN = {
    "finetune": ["lr_scale", "retain", "finetune.paper: lr=0.01 epochs=10", "arXiv 2108.11577"],
    "neggrad.diverged": ["passes", "10", "neggrad in mubench", "(control)", "unsc run neggrad.div"],
    "logit_mask": ["scenarios: class", "--forget class:3"],
    "tiny-digits": ["backbone", "hidden: [64, 128, 64]", "lr: 0.05"],
    "digits": ["data set", "sklearn", "CC BY 4.0"],
    "adult": ["${UNSC_DATA_DIR}/adult"],
    "digits/class-0": ["forget set", "classes", "[0]"],
    "js_forget": ["bits", "lower", "Jensen-Shannon", "forget, pool"],
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("width", [80, 160])
def test_show(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = finished("show", name).out
    for part in SHOWN[name]:
        assert part in text
    assert finished("show", name, "--json").json["name"] == name.partition(".")[0]


def test_show_gives_the_values_of_the_preset() -> None:
    plain, preset = (finished("show", n, "--json").json for n in ("neggrad", "neggrad.diverged"))
    assert plain["config"]["passes"] == 5
    assert preset["config"]["passes"] == 10
    assert preset["preset"] == "diverged"
    defaults = {row["name"]: row["default"] for row in preset["settings"]}
    assert defaults["passes"] == 5


@pytest.mark.parametrize("method", METHODS)
def test_the_example_of_a_method_is_an_experiment(method: str) -> None:
    words = finished("show", method, "--json").json["example"].split()
    assert words[:2] == ["unsc", "run"]
    assert finished(*words[1:], "--dry-run").json["method"] == method


# --------------------------------------------------------------------------- run


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """One finished run and what it printed; tests only read it."""
    folder = tmp_path_factory.mktemp("ran") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        done = unsc("run", "neggrad_plus", *QUICK, "--forget", "class:0", "--set", "lr=1e-2",
                    "--seed", "7", "--out", folder)  # fmt: skip
    assert done.code == 0, done.err
    return folder, done


def test_a_run_leaves_a_record_outputs_and_weights(ran: tuple[Path, Done]) -> None:
    folder, _ = ran
    assert tree(folder) == {"record.json", "outputs.safetensors", "model.safetensors"}
    found = record.read(folder / "record.json")
    assert found.status == "ok"
    assert found.config["lr"] == 0.01
    assert found.experiment["recipe"]["epochs"] == 2
    assert found.experiment["seed"] == 7
    assert tree(folder.parent) == {"first", *(f"first/{name}" for name in tree(folder))}


def test_a_run_prints_its_numbers(ran: tuple[Path, Done]) -> None:
    folder, done = ran
    found = record.read(folder / "record.json")
    table = [line for line in done.out.splitlines() if line.startswith(" ")]
    assert max(map(len, table)) <= 80
    assert done.out.splitlines()[0].split() == ["neggrad_plus", "on", "wine", "with", "logistic"]
    assert done.out.splitlines()[-1] == f"written to {folder}", "one line, to be copied"
    line = next(x for x in done.out.splitlines() if x.split()[:1] == ["acc_test"])
    _, original, unlearned, retrained, gap, better = line.split()
    assert unlearned == f"{found.metrics['acc_test']:.4f}"
    assert retrained == f"{found.reference['acc_test']:.4f}"
    assert float(gap) == pytest.approx(
        found.metrics["acc_test"] - found.reference["acc_test"], abs=1e-4
    )
    assert better == "higher"
    assert 0 <= float(original) <= 1
    for name in found.metrics:
        assert re.search(rf"^ {name}\b", done.out, re.MULTILINE), name
    for name in found.missing:
        assert re.search(rf"^not measured: .*{name}", done.out, re.MULTILINE), name


def test_progress_goes_to_stderr(ran: tuple[Path, Done]) -> None:
    _, done = ran
    assert "original 0: epoch 2 of 2, loss" in done.err
    assert "retrained 0.0: epoch 2 of 2" in done.err
    assert "epoch" not in done.out


def test_a_finished_run_is_kept(ran: tuple[Path, Done], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(ran[0], folder)
    same = ("run", "neggrad_plus", *QUICK, "--forget", "class:0", "--set", "lr=1e-2", "--seed", "7",
            "--out", folder)  # fmt: skip
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert unsc(*same).code == 2
    done = finished(*same, "--resume")
    assert "nothing to do" in done.err
    assert "acc_forget" in done.out
    assert (
        finished(*same, "--resume", "--json").json["seed"]
        == record.read(folder / "record.json").seed
    )
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--set", "lr=0.02"), "set"),
        (("--seed", "8"), "seed"),
        (("--forget", "class:1"), "forget"),
        (("--recipe", "batch_size=8"), "recipe"),
        (("--reference-pool", "2"), "evaluation"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_another_run_is_not_taken_for_a_finished_one(
    ran: tuple[Path, Done], changed: tuple[str, str], said: str
) -> None:
    flags = {"--set": "lr=1e-2", "--seed": "7", "--forget": "class:0"}
    if changed[0] in flags:
        flags[changed[0]] = changed[1]
        changed = ("--quiet", "--quiet")
    words = [word for pair in flags.items() for word in pair]
    done = unsc("run", "neggrad_plus", *QUICK, *words, *changed, "--out", ran[0], "--resume")
    assert done.code == 2
    assert f"another {said}" in done.err


def test_resume_without_a_run_runs() -> None:
    words = ("run", "original", *QUICK, "--forget", "class:0", "--resume", "--out", "new")
    finished(*words)
    assert Path("new/record.json").is_file()


def test_a_dry_run_writes_nothing_and_can_be_run(ran: tuple[Path, Done], tmp_path: Path) -> None:
    words = (
        "run",
        "neggrad_plus",
        *QUICK,
        "--forget",
        "class:0",
        "--set",
        "lr=1e-2",
        "--seed",
        "7",
    )
    done = finished(*words, "--dry-run")
    assert tree(tmp_path) == set()
    assert done.json["recipe"]["epochs"] == 2
    Path("experiment.yaml").write_text(done.out)
    finished("run", "--spec", "experiment.yaml", "--out", "again", "--quiet")
    before, after = (record.read(p / "record.json") for p in (ran[0], Path("again")))
    assert after.metrics == before.metrics
    assert after.reference == before.reference
    assert after.hashes == before.hashes


def test_runs_that_differ_never_share_a_default_folder() -> None:
    known = registry.load()

    def folder(**changes: Any) -> str:
        names = {"data": None, "model": None, "forget": None, "seed": None} | changes
        extra = {key: names.pop(key, None) for key in ("settings", "recipe", "reference_pool")}
        return arguments.folder_name(
            arguments.experiment(known, spec=None, method="finetune", names=names, **extra)
        )

    plain = folder()
    assert plain == "finetune--digits--tiny-digits--digits-class-0--s42"
    others = [
        folder(settings=["epochs=3"]), folder(settings=["epochs=4"]), folder(recipe=["epochs=3"]),
        folder(reference_pool=2), folder(seed=1), folder(forget="class:1"), folder(model="mlp"),
        folder(forget='{"kind": "class", "classes": [1]}'),
        folder(forget='{"kind": "class", "classes": [2]}'),
    ]  # fmt: skip
    assert len({plain, *others}) == 1 + len(others)
    assert all(Path(name).name == name for name in others)


@pytest.mark.parametrize("model", ["timm:test_convnext", "hf-config:vit", "mlp"])
def test_the_backbone_is_a_word(model: str) -> None:
    done = finished(
        "run", "neggrad_plus", "--model", model, "--data", "digits", "--forget", "class:3",
        "--recipe", "epochs=1", "--recipe", "batch_size=256", "--reference", "none",
        "--set", "epochs=1", "--metrics", "core", "--json",
    )  # fmt: skip
    assert done.json["experiment"]["model"] == model
    assert done.json["status"] == "ok"
    assert "delta_forget" not in done.json["metrics"], "there is no retrained model to compare with"
    assert "acc_forget" in done.json["metrics"]


def test_without_retrained_models_the_columns_are_empty() -> None:
    done = finished("run", "original", *QUICK, "--forget", "class:0", "--reference", "none")
    line = next(x for x in done.out.splitlines() if x.split()[:1] == ["acc_test"])
    assert line.split()[3:5] == ["–", "–"]


def test_a_reference_of_the_user(ran: tuple[Path, Done]) -> None:
    weights = ran[0] / "model.safetensors"
    done = finished("run", "original", *QUICK, "--forget", "class:0", "--seed", "7",
                    "--reference", weights, "--json")  # fmt: skip
    unlearned = record.read(ran[0] / "record.json").metrics
    assert done.json["reference"]["acc_test"] == pytest.approx(unlearned["acc_test"])


@HAS_DATA
@pytest.mark.parametrize(
    ("data", "model", "forget", "kind"),
    [
        ("sst2", SMALL_BERT, "random:100", "instance"),
        ("trec", "tiny-text", "subclass:fine_label=NUM:date", "subclass"),
        ("adult", "logistic", "random:0.05", "instance"),
    ],
    ids=["sst2", "trec", "adult"],
)
def test_text_and_tables(data: str, model: str, forget: str, kind: str) -> None:
    done = finished(
        "run", "finetune", "--data", data, "--model", model, "--forget", forget,
        "--recipe", "epochs=1", "--recipe", "batch_size=256", "--set", "epochs=1",
        "--reference", "none", "--json",
    )  # fmt: skip
    assert done.json["kind"] == kind
    assert 0.3 < done.json["metrics"]["acc_test"] < 1


def test_losses_go_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "runs" / "seen"
    finished("run", "finetune", *QUICK, "--forget", "class:0", "--set", "epochs=2",
             "--log-with", "tensorboard", "--out", out, "--seed", "91")  # fmt: skip
    events = EventAccumulator(str(tmp_path / "runs" / "logs" / "seen")).Reload()
    assert {"original 0/loss", "finetune/loss"} <= set(events.Tags()["scalars"])
    steps = [event.step for event in events.Scalars("finetune/loss")]
    assert steps == sorted(set(steps))
    assert len(steps) > 2


@pytest.mark.usefixtures("fresh_accelerate")
def test_bf16() -> None:
    done = finished(
        "run", "finetune", *QUICK, "--forget", "class:0", "--precision", "bf16", "--json"
    )
    assert done.json["environment"]["precision"] == "bf16"
    assert done.json["status"] == "ok"


def test_a_run_that_diverges_exits_1_and_is_recorded(tmp_path: Path) -> None:
    done = unsc("run", "neggrad", *QUICK, "--forget", "class:0", "--set", "lr=1e6", "--set",
                "passes=50", "--out", "gone")  # fmt: skip
    assert done.code == 1
    assert "diverged: loss" in done.err
    found = record.read(Path("gone/record.json"))
    assert (found.status, found.metrics) == ("diverged", {})
    text = finished("show", "gone").out
    assert "diverged: loss" in text
    assert unsc("run", "neggrad", *QUICK, "--forget", "class:0", "--set", "lr=1e6", "--set",
                "passes=50", "--out", "gone2", "--json").json["status"] == "diverged"  # fmt: skip


@pytest.mark.parametrize("width", [80, 160])
def test_a_record_is_shown(
    ran: tuple[Path, Done], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    folder, _ = ran
    found = record.read(folder / "record.json")
    text = finished("show", folder / "record.json").out
    assert max(map(len, text.splitlines())) <= width
    for part in ("lr=0.01", "epochs=2", found.hashes["forget"][:16], "--seed 7", "acc_forget"):
        assert part in text
    assert finished("show", folder).out == text
    assert finished("show", folder, "--json").json == json.loads(record.dumps(found))


@pytest.mark.parametrize("started", ["before training", "while training"])
def test_interrupting_a_run_leaves_nothing_half_done(tmp_path: Path, started: str) -> None:
    words = ["run", "finetune", "--recipe", "epochs=4000", "--threads", "1", "--out", "long"]
    if started == "before training":
        code = "os.kill(os.getpid(), signal.SIGINT)"
        script = "import os, signal\nfrom unsc_plugin import cli, data\n"
        script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        script += f"def load(*_, **__):\n    {code}\ndata.load = load\ncli.main({words!r})\n"
        done = python("-c", script, cwd=tmp_path, UNSC_CACHE=str(tmp_path / "cache"))
        code, err = done.returncode, done.stderr
    else:
        process = subprocess.Popen(
            [sys.executable, "-m", "unsc_plugin.cli", *words], cwd=tmp_path, text=True,
            env={**os.environ, "UNSC_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            # a shell ignores the signal in what it starts in the background
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        until = time.monotonic() + 60
        while not list(tmp_path.glob("cache/models/*/*.claim")) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        code = process.returncode
    assert code == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not [name for name in tree(tmp_path) if name.endswith((".json", ".claim", "long"))]


# --------------------------------------------------------------------------- boards


@pytest.fixture
def _no_badges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the conformance suite out: the badges of these boards are empty."""
    monkeypatch.setattr(conformance, "check_method", lambda *_, **__: [])


CONTROL = [
    ("[retrain, original]", "[retrain, original, neggrad.diverged]"),
    ("model: logistic", "model: mlp"),
    ("batch_size: 32", "batch_size: 16"),
]
DIVERGES = ("[retrain, original]", "[retrain, {method: neggrad, set: {lr: 1.0e+6, passes: 50}}]")
FAILS = ("[retrain, original]", "[retrain, unsuited]")
UNSUITED = """\
from unsc_plugin import register_method

@register_method("unsuited", summary="fails")
def unsuited(model, forget):
    raise ValueError("no luck")
"""


@pytest.mark.usefixtures("_no_badges")
def test_a_control_that_diverges_is_no_failure(tmp_path: Path) -> None:
    done = unsc("bench", board(tmp_path / "b", *CONTROL))
    found = record.read(tmp_path / "b" / "results" / "neggrad.diverged--s0d0.json")
    assert found.status == "diverged", "the test means nothing otherwise"
    assert done.code == 0, done.err
    assert "neggrad.diverged" in (tmp_path / "b" / "LEADERBOARD.md").read_text()
    assert unsc("bench", tmp_path / "b").code == 0


@pytest.mark.usefixtures("_no_badges")
@pytest.mark.parametrize(
    ("change", "status"), [(DIVERGES, "diverged"), (FAILS, "failed")], ids=["diverged", "failed"]
)
def test_a_unit_that_fails_makes_exit_1_and_stays_visible(
    tmp_path: Path, change: tuple[str, str], status: str
) -> None:
    plugin = tmp_path / "unsuited.py"
    plugin.write_text(UNSUITED)
    words = ("bench", board(tmp_path / "b", change), "--plugin", plugin)
    done = unsc(*words)
    assert done.code == 1
    assert "1 of 2 units failed or diverged" in done.err
    assert status in (tmp_path / "b" / "LEADERBOARD.md").read_text()
    assert unsc(*words).code == 1, "also when nothing is left to run"
    assert unsc(*words, "--only", "retrain").code == 0, "the failed unit was not asked for"


def test_only_the_preset_of_a_control_may_diverge() -> None:
    known = registry.load()

    def excused(method: str, preset: str | None, status: str) -> bool:
        run = SimpleNamespace(method=method, preset=preset, status=status)
        return cli._made_to_diverge(run, known)  # type: ignore[arg-type]

    assert excused("neggrad", "diverged", "diverged")
    assert not excused("neggrad", "diverged", "failed")
    assert not excused("neggrad", "paper", "diverged")
    assert not excused("neggrad", None, "diverged")
    assert not excused("random_init", None, "diverged")


CORRECTIONS = """
schema: 1
name: little
title: A little board
version: 1
seed: 7
scenarios:
  - {name: table, data: synthetic-bias, model: logistic, forget: [correction]}
entries:
  - original
  - retrain
  - {method: soft_weighted, sweep: {target: [0.2, 0.5]}}
  - soft_weighted.retrain
  - constrained_step
evaluation: {train_seeds: 2, draws: 3, correction: {oracle: true}}
"""


@pytest.mark.parametrize(("oracle", "per_unit"), [("true", 6), ("false", 3)])
def test_the_plan_of_corrections_counts_oracles_and_no_pool(
    tmp_path: Path, oracle: str, per_unit: int
) -> None:
    path = tmp_path / "board.yaml"
    path.write_text(CORRECTIONS.replace("oracle: true", f"oracle: {oracle}"))
    # an original per draw; retrain, and the base of soft_weighted.retrain; three plans of weights
    assert finished("bench", path, "--dry-run", "--json").json["trainings_at_most"] == 6 * per_unit
    assert f"at most {6 * per_unit} trainings" in finished("bench", path, "--dry-run").out


@pytest.mark.usefixtures("_no_badges")
def test_a_board_from_the_plan_to_the_verification(tmp_path: Path) -> None:
    path = board(tmp_path / "b", ("train_seeds: 1", "train_seeds: 2"))
    plan = finished("bench", path, "--dry-run", "--json").json
    assert (plan["units"], plan["finished"], len(plan["to_run"])) == (4, 0, 4)
    assert plan["trainings_at_most"] == 2 + (1 + 2)  # originals; the pool, retrain per original
    assert "original--s1d0" in finished("bench", path, "--dry-run").out
    assert tree(path.parent) == {"board.yaml"}

    done = finished("bench", path, "--limit", "1", "--json")
    assert done.json["ran"] == 1
    assert "[1/1]" in done.err
    assert len(list((path.parent / "results").glob("*.json"))) == 1
    finished("bench", path, "--only", "original", "--seeds", "1", "--quiet")
    assert (path.parent / "results" / "original--s1d0.json").is_file()
    done = finished("bench", path)
    assert "2 of 4 units finished, 2 to run" in done.err
    assert "A little board" in done.out
    assert finished("bench", path, "--json").json["ran"] == 0
    assert "--no-resume" in unsc("bench", path, "--no-resume").err

    verified = finished("board", "verify", path, "--json").json
    assert verified == {"checked": 4, "mismatches": []}
    assert "4 records checked, 0 mismatches" in finished("board", "verify", path).out

    assert finished("board", "build", path, "--check", "--json").err == ""
    (path.parent / "LEADERBOARD.md").write_text("typed by hand\n")
    stale = unsc("board", "build", path, "--check")
    assert stale.code == 1
    assert "stale" in stale.err
    assert (path.parent / "LEADERBOARD.md").read_text() == "typed by hand\n"
    finished("board", "build", path)
    assert "typed" not in (path.parent / "LEADERBOARD.md").read_text()

    changed = path.parent / "results" / "original--s0d0.json"
    kept = json.loads(changed.read_text())
    kept["metrics"]["acc_test"] = 0.123
    kept["hashes"]["forget"] = "0" * 64
    changed.write_text(json.dumps(kept))
    done = unsc("board", "verify", path)
    assert done.code == 1
    assert "0.123" in done.out
    assert "hash of forget" in done.out
    found = unsc("board", "verify", path, "--json")
    assert found.code == 1
    assert {one["what"] for one in found.json["mismatches"]} == {
        "hash of forget",
        "metrics.acc_test",
    }


@pytest.mark.usefixtures("_no_badges")
def test_a_board_that_is_not_healthy_cannot_be_missed(tmp_path: Path) -> None:
    path = board(tmp_path / "b", ("[retrain, original]", "[retrain]"))
    assert unsc("bench", path).code == 0, "the units themselves are fine"
    done = unsc("board", "build", path)
    assert done.code == 1
    assert "not healthy: original is not on the board" in done.err


@pytest.mark.usefixtures("_no_badges")
def test_results_may_lie_elsewhere(tmp_path: Path) -> None:
    path = board(tmp_path / "b")
    finished("bench", path.parent, "--out", tmp_path / "elsewhere", "--only", "original")
    assert tree(path.parent) == {"board.yaml"}
    assert {"LEADERBOARD.md", "plot.svg", "results/original--s0d0.json"} <= tree(
        tmp_path / "elsewhere"
    )


# --------------------------------------------------------------------------- check


def result(name: str, passed: bool = True) -> conformance.CheckResult:
    return conformance.CheckResult(name, passed, False, "because", 0.1)


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_check_exits_by_its_results(
    passed: bool, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = {}

    def checks(method: str, **how: Any) -> list[conformance.CheckResult]:
        seen.update(how, method=method)
        return [result("docs"), result("seed", passed)]

    monkeypatch.setattr(conformance, "check_method", checks)
    done = unsc("check", "finetune", "--quick", "--badge", tmp_path / "badge.json")
    assert done.code == code
    assert seen["method"] == "finetune"
    assert seen["quick"] is True
    assert "because" in done.out
    assert json.loads((tmp_path / "badge.json").read_text())["passed"][0] == "docs"
    told = unsc("check", "finetune", "--json")
    assert told.code == code
    assert [one["id"] for one in told.json["results"]] == ["docs", "seed"]
    assert seen["quick"] is False


def test_check_runs_the_suite() -> None:
    done = finished("check", "original", "--quick", "--json")
    assert [one["id"] for one in done.json["results"]] == list(conformance.CHECKS)


# --------------------------------------------------------------------------- small parts


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("1e-3", 1e-3), ("true", True), ("null", None), ("word", "word"),
     ("[1, 2]", [1, 2]), ("'3'", 3.0), ("", None), ("a=b", "a=b")],
)  # fmt: skip
def test_settings_are_typed_as_yaml(text: str, value: Any) -> None:
    found = arguments.pairs("--set", [f"key={text}"])
    assert found == {"key": value}
    assert type(found["key"]) is type(value)


@pytest.mark.parametrize("text", ["key", "=3", "a.b=3", "a b=3", "key=[", "key={a: 1, a: 2}"])
def test_settings_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        arguments.pairs("--set", [text])


def told(epochs: int, end: bool = True, seconds: float = 1.0) -> Any:
    return SimpleNamespace(steps=epochs, epochs=epochs, loss=0.5, seconds=seconds, epoch_end=end)


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console.state.clear()
    with progress.Watch() as watch:
        watch.epochs = {"original": 40}
        for epoch in range(1, 41):
            now[0] += 1.0
            watch("original 0", told(epoch, end=False))
            watch("original 0", told(epoch))
            watch("finetune", told(epoch))
        watch("nothing", None)
    lines = capsys.readouterr().err.splitlines()
    original = [line for line in lines if line.startswith("original")]
    assert len(original) == 4
    assert original[-1] == "original 0: epoch 40 of 40, loss 0.500, 1.0 s"
    assert len(lines) - len(original) == 3
    console.state.quiet = True
    with progress.Watch() as watch:
        watch.epochs = {"original": 1}
        watch("original 0", told(1))
    console.state.clear()
    assert capsys.readouterr().err == ""


def test_a_watch_that_saw_nothing_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Watch(SimpleNamespace(), "never"):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("value", "unit", "sign", "text"),
    [(0.1234, "fraction", False, "0.1234"), (12.34, "pp", True, "+12.34"), (None, "pp", True, "–"),
     (-0.5, "bits", True, "-0.5000"), (1234.0, "bytes", False, "1234")],
)  # fmt: skip
def test_numbers(value: float | None, unit: str, sign: bool, text: str) -> None:
    assert views._number(value, unit, sign) == text


def test_the_little_board_is_a_board(tmp_path: Path) -> None:
    assert bench.open_board(str(board(tmp_path))).spec.title in BOARD
