"""The flags and arguments of the commands: names, placeholders, one line of help each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unsc_plugin._cli import completion

WHAT, HOW, WHERE, EVERY = "What is run", "How it is run", "Where things are", "Every command"
LISTS = ("methods", "backbones", "datasets", "forget-sets", "metrics", "adapters", "boards")


def _option(panel: str, placeholder: str, meaning: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, metavar=placeholder, help=meaning, rich_help_panel=panel, **more)


def _flag(panel: str, name: str, meaning: str, *names: str) -> Any:
    """Return a switch; an empty placeholder keeps the word `bool` out of the help."""
    return typer.Option(name, *names, metavar="", help=meaning, rich_help_panel=panel)


def _argument(placeholder: str, meaning: str, **more: Any) -> Any:
    return typer.Argument(metavar=placeholder, help=meaning, **more)


# --------------------------------------------------------------------------- every command

Plugins = Annotated[
    list[str] | None,
    _option(EVERY, "PATH", "registry .yaml, .py file or pkg.mod:Class; repeatable", "--plugin"),
]
AsJson = Annotated[bool, _flag(EVERY, "--json", "stdout is one JSON value, nothing else")]
Quiet = Annotated[bool, _flag(EVERY, "--quiet", "no progress on stderr", "-q")]
Debug = Annotated[bool, _flag(EVERY, "--debug", "show the traceback of an error")]

# --------------------------------------------------------------------------- list, show, check

ListOf = Annotated[
    str, _argument("WHAT", ", ".join(LISTS), autocompletion=completion.fixed(*LISTS))
]
All = Annotated[bool, _flag(WHAT, "--all", "also names that cannot be used here, with the reason")]
StrictPlugins = Annotated[bool, _flag(HOW, "--strict", "exit 1 if a plugin is broken")]
ShownName = Annotated[
    str,
    _argument(
        "NAME",
        "a registered name, a metric, a record .json or its folder",
        autocompletion=completion.anything,
    ),
]
Method = Annotated[
    str,
    _argument(
        "METHOD",
        "a registered method, METHOD.preset, or one of --plugin",
        autocompletion=completion.methods,
    ),
]
Quick = Annotated[bool, _flag(HOW, "--quick/--full", "the cheap half of the suite, or all")]
Badge = Annotated[Path | None, _option(WHERE, "FILE", "write the badge record here")]

# --------------------------------------------------------------------------- run

OptionalMethod = Annotated[
    str | None,
    _argument("METHOD", "a registered method, or METHOD.preset", autocompletion=completion.methods),
]
Model = Annotated[
    str | None,
    _option(
        WHAT,
        "NAME",
        "timm:ID, hf:ID, hf-config:TYPE, a shortcut or a folder",
        autocompletion=completion.backbones,
    ),
]
Data = Annotated[
    str | None,
    _option(
        WHAT,
        "NAME",
        "data set name, hub:ORG/ID or a folder",
        autocompletion=completion.datasets,
    ),
]
Forget = Annotated[
    str | None,
    _option(
        WHAT,
        "SET",
        "class:3, random:0.1, subclass:COLUMN=VALUE, file:PATH, a name",
        autocompletion=completion.forget_sets,
    ),
]
Seed = Annotated[int | None, _option(WHAT, "N", "seed of everything that is drawn")]
Settings = Annotated[
    list[str] | None,
    _option(
        WHAT, "KEY=VALUE", "setting of the method, see `unsc show METHOD`; repeatable", "--set"
    ),
]
Recipes = Annotated[
    list[str] | None,
    _option(
        WHAT,
        "KEY=VALUE",
        "field of the training recipe; repeatable",
        "--recipe",
        autocompletion=completion.recipe,
    ),
]
Pretrained = Annotated[bool, _flag(WHAT, "--pretrained", "start from published weights (timm)")]
Spec = Annotated[Path | None, _option(WHAT, "FILE", "experiment .yaml that says all of the above")]
Reference = Annotated[
    str, _option(HOW, "WORD", "auto (train or take from the cache), none, or a weights file")
]
ReferencePool = Annotated[
    int | None, _option(HOW, "N", "retrained models to compare with; default 1", min=1)
]
Metrics = Annotated[
    str,
    _option(
        HOW,
        "GROUPS",
        "some of core, mia, mubench with commas",
        autocompletion=completion.several("core", "mia", "mubench"),
    ),
]
Trajectory = Annotated[
    bool, _flag(HOW, "--trajectory", "measure along the steps, for comparison at equal forgetting")
]
MubenchOrig = Annotated[
    str,
    _option(
        HOW,
        "WORD",
        "accuracy of the original for MU-Bench's overall score: measured or table",
        autocompletion=completion.fixed("measured", "table"),
    ),
]
Layout = Annotated[
    str,
    _option(
        WHERE,
        "WORD",
        "unsc, or mubench: beside the record also the files that MU-Bench leaves",
        autocompletion=completion.fixed("unsc", "mubench"),
    ),
]
AllowForeignOrder = Annotated[
    bool,
    _flag(HOW, "--allow-foreign-order", "take indices of another row order; never comparable"),
]
Device = Annotated[
    str,
    _option(
        HOW,
        "WORD",
        "auto, cpu or cuda",
        autocompletion=completion.fixed("auto", "cpu", "cuda"),
    ),
]
Precision = Annotated[
    str,
    _option(
        HOW,
        "WORD",
        "fp32, bf16 or fp16",
        autocompletion=completion.fixed("fp32", "bf16", "fp16"),
    ),
]
MicroBatches = Annotated[int, _option(HOW, "N", "split every step in N to save memory", min=1)]
RunThreads = Annotated[int, _option(HOW, "N", "CPU threads; 0: torch's default", min=0)]
LogWith = Annotated[str | None, _option(HOW, "WORD", "tracker of the losses: tensorboard")]
RunOut = Annotated[
    Path | None, _option(WHERE, "DIR", "folder of the run; default runs/<id>", "--out")
]
DataDir = Annotated[
    Path | None, _option(WHERE, "DIR", "folder of Parquet data sets; wins over UNSC_DATA_DIR")
]
Cache = Annotated[
    Path | None, _option(WHERE, "DIR", "folder of trained models; default UNSC_CACHE")
]
ResumeRun = Annotated[bool, _flag(WHERE, "--resume", "exit 0 if this very run is complete")]
Preflight = Annotated[
    bool, _flag(HOW, "--preflight", "diagnose before a single step; --set eps=.9,.97 tries several")
]
DryRun = Annotated[
    bool, _flag(WHERE, "--dry-run", "print the resolved experiment, a file for --spec")
]

# --------------------------------------------------------------------------- export

RunFolder = Annotated[Path, _argument("RECORD", "the folder of a run, or the record.json in it")]
Destination = Annotated[Path, _argument("DIR", "the folder to write")]
Push = Annotated[
    str | None, _option(WHERE, "ORG/NAME", "publish it there, with the token you have", "--push")
]
License = Annotated[
    str | None, _option(WHAT, "ID", "licence of the model, such as mit or cc-by-4.0", "--license")
]
WithIndices = Annotated[
    bool, _flag(WHAT, "--with-indices", "say in the receipt which rows were forgotten")
]
Org = Annotated[str, _option(WHAT, "ORG", "what stands before the model's name", "--org")]

# --------------------------------------------------------------------------- boards

BoardName = Annotated[
    str,
    _argument(
        "BOARD",
        "board.yaml, its folder, or a name in benchmarks/",
        autocompletion=completion.boards,
    ),
]
Only = Annotated[str | None, _option(WHAT, "GLOB", "on the entry or on entry--s0d0")]
Seeds = Annotated[str | None, _option(WHAT, "LIST", "train seeds such as 0,1; default all")]
Limit = Annotated[int | None, _option(WHAT, "N", "run at most N units", min=1)]
Workers = Annotated[int, _option(HOW, "N", "local processes", min=1)]
OnRay = Annotated[bool, _flag(HOW, "--ray", "spread over a Ray cluster")]
Threads = Annotated[int, _option(HOW, "N", "CPU threads per process", min=1)]
Resume = Annotated[
    bool, _flag(WHERE, "--resume/--no-resume", "skip finished units, or refuse where there are any")
]
Plan = Annotated[bool, _flag(WHERE, "--dry-run", "print the grid and an estimate only")]
Out = Annotated[
    Path | None, _option(WHERE, "DIR", "write results here, not beside board.yaml", "--out")
]
CheckOnly = Annotated[bool, _flag(HOW, "--check", "write nothing; exit 1 if stale or unhealthy")]
Tolerance = Annotated[float, _option(HOW, "X", "largest difference of a metric", min=0.0)]
