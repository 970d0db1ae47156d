"""What is known before a single step (`--preflight`) and after the last (certificates)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command_line import tree, unsc

from unsc_plugin import bench, record
from unsc_plugin._cli import views
from unsc_plugin._cli.arguments import variants

REQUEST = ("--data", "digits", "--forget", "class:3", "--recipe", "epochs=2", "--device", "cpu")
QUICK = (*REQUEST, "--reference", "none", "--metrics", "core", "--quiet")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_preflight_sweeps_without_a_step_and_without_a_second_pass(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("run", "unsc", *REQUEST, "--cache", cache, "--preflight", "--quiet")
    done = unsc(*words, "--set", "eps=.9,.97,.999", "--json")
    assert done.code == 0, done.err
    assert [one["source"] for one in done.json] == ["captured", "stored", "stored"]
    ranks = [[row["rank"] for row in one["table"]] for one in done.json]
    assert all(low < high for low, high in zip(ranks[0], ranks[2], strict=True))
    for one, eps in zip(done.json, (0.9, 0.97, 0.999), strict=True):
        for row in one["table"]:
            assert row["rank"] + row["free"] == row["d"] * row["groups"]
            assert row["worst_energy"] >= eps - 1e-9
            assert row["contrast"] == pytest.approx(
                row["forget_energy"] / (1 - row["worst_energy"]), rel=1e-3
            )
    assert tree(tmp_path) == set()  # nothing is run, nothing is written


def test_preflight_prints_a_table_and_warns(cache):
    words = ("run", "unsc", *REQUEST, "--cache", cache, "--preflight", "--quiet")
    done = unsc(*words, "--set", "eps=0.999", "--forget", "random:20")
    assert done.code == 0, done.err
    assert "contrast" in done.out
    assert "backbone.head" in done.out
    assert "warning: no layer's free directions see the forget data better" in done.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("finetune",), "finetune has no diagnosis"),
        (("unsc", "--set", "projection=false"), "set projection=true"),
        (("unsc", "--set", "eps=.9,2"), "(0, 1]"),
        (("unsc", "--set", "eps=.9,nonsense"), "eps"),
    ],
)
def test_preflight_says_what_cannot_be_diagnosed(words, told, cache):
    done = unsc("run", *words, *REQUEST, "--cache", cache, "--preflight", "--quiet")
    assert done.code == 2
    assert told in done.err
    assert done.out == ""


def test_lists_and_maps_are_one_value():
    assert variants(["include=[a, b]", "eps={'*': .9, head: .5}", "lr=1"]) == [
        ["include=[a, b]", "eps={'*': .9, head: .5}", "lr=1"]
    ]
    assert len(variants(["eps=.9, .95", "merge=balanced,pooled"])) == 4
    assert variants(None) == [[]]


def test_a_second_request_reads_no_retained_row_and_shows_its_certificate(cache, tmp_path):
    for name, classes in (("first", "3"), ("second", "5")):
        words = [word if word != "class:3" else f"class:{classes}" for word in QUICK]
        done = unsc("run", "unsc", *words, "--cache", cache, "--out", tmp_path / name)
        assert done.code == 0, done.err
    assert "certificate of retained drift" in done.out
    assert "an estimate, not a proof" in done.out
    stats = record.read(tmp_path / "second" / "record.json").stats
    assert stats["subspaces"]["source"] == "stored"
    assert "retain" not in stats["samples_read"]
    assert stats["certificate"]["drift"] > 0
    assert unsc("show", tmp_path / "second").out.count("certificate of retained drift") == 1


BOARD = {
    "schema": 1,
    "name": "toy",
    "title": "Toy",
    "scenarios": [
        {
            "name": "toy",
            "data": "digits",
            "model": "tiny-digits",
            "recipe": {"epochs": 2, "lr": 0.05},
            "forget": [{"kind": "class", "classes": [3]}],
        }
    ],
    "entries": ["retrain", "original", "unsc", "unsc.random_labels"],
    "evaluation": {"train_seeds": 1, "draws": 1, "reference_pool": 2},
}


def test_a_board_shows_certificates_and_which_controls_are_missing(cache, tmp_path):
    file = tmp_path / "board.yaml"
    file.write_text(yaml.safe_dump(BOARD), encoding="utf-8")
    done = unsc("bench", file, "--cache", cache, "--quiet")
    assert done.code == 0, done.err
    text = (tmp_path / "LEADERBOARD.md").read_text(encoding="utf-8")
    assert "unsc says little without logit_mask, unsc.no_projection beside it" in text
    rows = [line for line in text.split("## Certificates of retained drift")[1].splitlines()
            if line.startswith("| unsc")]  # fmt: skip
    assert [row.split(" | ")[0] for row in rows] == ["| unsc", "| unsc.random_labels"]
    built = bench.build(bench.open_board(str(file)))
    drifts = [found.drifts for found in built.standings.certificates]
    stored = [
        record.read(tmp_path / "results" / f"{entry}--s0d0.json").stats["certificate"]["drift"]
        for entry in ("unsc", "unsc.random_labels")
    ]
    assert drifts == [(drift,) for drift in stored]


def test_every_layer_shows_its_own_numbers_whatever_the_order_of_the_record(capsys):
    layer = {"d": 4, "rank": 1, "free": 3, "worst_energy": 0.98, "contrast": 1.0}
    stats = {
        "subspaces": {"layers": [{"layer": "stem", **layer}, {"layer": "head", **layer}]},
        "certificate": {
            "drift": 0.75,
            "buckets": [0, 7],
            "delta": {"head.weight": [0.25, 0.125], "stem.weight": [0.25, 0.5]},  # sorted by name
            "bound": {"head.weight": [1.0, 2.0], "stem.weight": [4.0, 3.0]},
        },
    }
    views.show_notes(stats)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {row[0]: row[-3:] for row in rows if row and row[0] in ("stem", "head")}
    assert shown == {"stem": ["0.5000", "7", "4.0000"], "head": ["0.2500", "0", "2.0000"]}
