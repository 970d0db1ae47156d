"""What the shell offers after the tab key, asked for as the shells ask."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import board, python, unsc

from unsc_plugin import registry

SCRIPT = Path(sys.executable).with_name("unsc")
SAMPLE = Path(__file__).parent.parent / "examples/plugin-package/src/unsc_plugin_sample"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNSC_DATA_DIR", raising=False)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch):
    """Return `offered(line)`: the words that bash gets for the last word of a line."""

    def ask(line: str) -> list[str]:
        words = shlex.split(line)
        words += [""] if line.endswith(" ") else []
        monkeypatch.setenv("_UNSC_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(words) if words[-1] else " ".join(words) + ' ""')
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        done = unsc()
        assert (done.code, done.err) == (0, "")
        return done.out.split()

    return ask


OFFERS = {
    "unsc li": ["list"],
    "unsc board ve": ["verify"],
    "unsc list me": ["methods", "metrics"],
    "unsc list ad": ["adapters"],
    "unsc run retr": ["retrain"],
    "unsc run finetune.": ["finetune.paper"],
    "unsc run finet": ["finetune", "finetune.paper"],
    "unsc run l2ul_adv_": ["l2ul_adv_imp"],
    "unsc run unsc --model tiny-": ["tiny-digits", "tiny-text"],
    "unsc run unsc --data wi": ["wine"],
    "unsc run unsc --forget digits/cl": ["digits/class-0", "digits/class-3"],
    "unsc run --data digits-noisy --forget di": [
        "digits-noisy/mislabelled",
        "digits-noisy/random-10",
    ],
    "unsc run --data wine --forget digits/": [],
    "unsc run --recipe optimizer=a": ["optimizer=adam", "optimizer=adamw"],
    "unsc run --recipe batch": ["batch_size="],
    "unsc run --metrics core,m": ["core,mia", "core,mubench"],
    "unsc run --metrics mia,m": ["mia,mubench"],
    "unsc run --device c": ["cpu", "cuda"],
    "unsc run --precision b": ["bf16"],
    "unsc run --mubench-orig ": ["measured", "table"],
    "unsc check retr": ["retrain"],
    "unsc show js_": ["js_forget", "js_test"],
    "unsc show tiny-d": ["tiny-digits"],
    "unsc run --dry": ["--dry-run"],
    "unsc run nothing-like-it": [],
    "unsc run --data adul": [],  # needs UNSC_DATA_DIR, which is not set
}


@pytest.mark.parametrize("line", OFFERS)
def test_what_bash_is_offered(line: str, offered) -> None:
    assert offered(line) == OFFERS[line]


def test_every_method_is_offered_and_presets_once_something_is_typed(offered) -> None:
    known = registry.load()
    usable = [name for name, named in known.methods.items() if named.status == "ok"]
    assert sorted(offered("unsc run ")) == sorted(usable)
    typed = offered("unsc check unsc")
    assert {f"unsc.{tag}" for tag in known.methods["unsc"].entry.presets} < set(typed)


def test_boards_are_offered(offered, tmp_path: Path) -> None:
    for name in ("one", "other"):
        board(tmp_path / "benchmarks" / name)
    for command in ("bench", "board build", "board verify"):
        assert offered(f"unsc {command} o") == ["one", "other"]


def test_registry_files_that_are_typed_count_and_nothing_is_executed(
    offered, tmp_path: Path
) -> None:
    path = SAMPLE / "registry.yaml"
    assert offered(f"unsc run --plugin {path} sample_fi") == [
        "sample_finetune",
        "sample_finetune.gentle",
    ]
    assert offered(f"unsc --plugin {path} run --model sample") == ["sample-net"]
    mine = tmp_path / "mine.py"
    mine.write_text("raise SystemExit('executed')\n")
    assert offered(f"unsc run --plugin {mine} retr") == ["retrain"]


@pytest.mark.parametrize("text", ["a: [", "schema: 1\nmethods: 3\n"])
def test_a_faulty_registry_offers_nothing_and_says_nothing(
    text: str, offered, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert offered("unsc run --plugin bad.yaml retr") == []
    assert offered("unsc run --plugin gone.yaml retr") == []
    assert offered("unsc --plugin bad.yaml li") == ["list"]


@pytest.mark.parametrize(
    ("shell", "says"),
    [
        ("zsh", '"finetune.paper":"lr=0.01 epochs=10 (reference_code)"'),
        ("fish", "finetune.paper\tlr=0.01 epochs=10 (reference_code)"),
        ("powershell", "finetune.paper:::lr=0.01 epochs=10 (reference_code)"),
    ],
)
def test_other_shells_get_help_too(shell: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_UNSC_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "unsc run finetune.")
    monkeypatch.setenv("_TYPER_COMPLETE_WORD_TO_COMPLETE", "finetune.")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    done = unsc()
    assert (done.code, done.err) == (0, "")
    assert says in done.out


def test_help_of_every_offer_is_one_line_without_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_UNSC_COMPLETE", "complete_fish")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    methods = registry.load().methods.values()
    usable = [named.name for named in methods if named.status == "ok"]
    asked = {"run": usable, "run --data": [""], "run --forget": [""], "show": [""]}
    for command, words in asked.items():
        for word in words:
            monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"unsc {command} {word}")
            for line in unsc().out.splitlines():
                name, _, about = line.partition("\t")
                assert name.startswith(word)
                assert '"' not in about
                assert len(about) <= 60


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_the_shell(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_UNSC_COMPLETE", f"source_{shell}")
    done = unsc()
    assert done.code == 0
    assert f"complete_{shell}" in done.out
    assert "unsc" in done.out


def test_bash_itself() -> None:
    """The whole way: the script is sourced, and bash calls the function it defines."""
    program = f"""
        eval "$(_UNSC_COMPLETE=source_bash {SCRIPT})"
        complete -p unsc
        COMP_WORDS=(unsc run fine); COMP_CWORD=2
        _unsc_completion {SCRIPT}
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "_unsc_completion" in first
    assert second == "finetune finetune.paper"


@pytest.mark.parametrize("line", ["unsc run fine", "unsc run --recipe ba", "unsc show js_"])
def test_nothing_heavy_is_loaded(line: str) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'timm', 'transformers', 'datasets', 'accelerate', 'sklearn', 'pandas')\n"
        "atexit.register(lambda: print([n for n in heavy if n in sys.modules], file=sys.stderr))\n"
        "from unsc_plugin import cli\ncli.main()\n"
    )
    words = {"COMP_WORDS": "\n".join(line.split()), "COMP_CWORD": str(line.count(" "))}
    done = python("-c", code, _UNSC_COMPLETE="complete_bash", **words)
    assert done.stdout.split()
    assert done.stderr.strip() == "[]"
