"""What was typed, checked before anything is loaded: settings, choices, folders, the experiment."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unsc_plugin.errors import ConfigError, MissingOptional

if TYPE_CHECKING:
    from unsc_plugin.record import Record
    from unsc_plugin.registry import Registry
    from unsc_plugin.spec import Experiment, Recipe

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16", "fp16")
GROUPS = ("core", "mia", "mubench")
LAYOUTS = ("unsc", "mubench")
TRACKERS = ("tensorboard",)


def pairs(flag: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """Return key -> value of `key=value` texts; values are typed as YAML types them.

    Raises:
        ConfigError: no `key=value`, a value that is no YAML, or one key twice.
    """
    from unsc_plugin.spec import parse_yaml

    found: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{flag}: expected key=value, got {text!r}")
        if key in found:
            raise ConfigError(f"{flag}: {key} is given twice; keep one of them")
        found[key] = _number(parse_yaml(value, f"{flag} {key}").tree)
    return found


def variants(texts: Sequence[str] | None) -> list[list[str]]:
    """Return every combination of settings whose values are lists with commas, in their order.

    >>> variants(["eps=.9,.97", "merge=pooled"])
    [['eps=.9', 'merge=pooled'], ['eps=.97', 'merge=pooled']]
    """
    choices = []
    for text in texts or []:
        key, equals, value = text.partition("=")
        many = equals and "," in value and value.lstrip()[:1] not in ("[", "{", "'", '"')
        parts = value.split(",") if many else [value]
        choices.append([f"{key}{equals}{part.strip() if many else part}" for part in parts])
    return [list(chosen) for chosen in itertools.product(*choices)]


def _number(value: Any) -> Any:
    """Return text that is a number, such as 1e-3 (a string in YAML 1.1), as a number."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def one_of(flag: str, value: str, allowed: Sequence[str]) -> str:
    """Return `value` if it is allowed.

    Raises:
        ConfigError: it is not.
    """
    if value not in allowed:
        raise ConfigError(f"{flag}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def groups(text: str) -> tuple[str, ...]:
    """Return the metric groups of a list with commas."""
    return tuple(one_of("--metrics", part.strip(), GROUPS) for part in text.split(","))


def in_layout(layout: str, chosen: Experiment) -> Experiment:
    """Return the experiment as its folder's layout needs it: MU-Bench's has all retained rows."""
    if one_of("--layout", layout, LAYOUTS) == "unsc":
        return chosen
    whole = chosen.evaluation.model_copy(update={"retain_eval": "all"})
    return chosen.model_copy(update={"evaluation": whole})


def integers(flag: str, text: str | None) -> list[int] | None:
    """Return the numbers of a list with commas.

    Raises:
        ConfigError: something else than numbers.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag}: expected numbers with commas, got {text!r}") from None


def place(device: str, precision: str) -> None:
    """Check that the device is there and can do the precision.

    Raises:
        ConfigError: a word that is not known, or half precision without a GPU.
        MissingOptional: CUDA where there is none.
    """
    one_of("--device", device, DEVICES)
    one_of("--precision", precision, PRECISIONS)
    import torch

    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise MissingOptional("--device cuda: no CUDA device was found; use --device auto or cpu")
    if precision == "fp16" and (device == "cpu" or not cuda):
        raise ConfigError("--precision fp16: expected a CUDA device, got a CPU; use bf16 or fp32")


def tracker(name: str | None) -> None:
    """Check that the tracker is known and installed.

    Raises:
        MissingOptional: it is not installed.
    """
    if name is not None and importlib.util.find_spec(one_of("--log-with", name, TRACKERS)) is None:
        raise MissingOptional(
            f"--log-with {name}: the package is not installed; install it with: "
            f"pip install 'unsc-plugin[{name}]'"
        )


def weights(text: str) -> Path | None:
    """Return the file of `--reference`, None for auto and none.

    Raises:
        ConfigError: no such file.
    """
    if text in ("auto", "none"):
        return None
    if not Path(text).is_file():
        raise ConfigError(f"--reference: expected auto, none or a weights file, got {text}")
    return Path(text)


def writable(flag: str, folder: Path) -> Path:
    """Return the folder if it can be made and written to.

    Raises:
        ConfigError: a file stands in its way, or there is no permission.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"{flag}: expected a folder that can be written, got {folder} ({there})")
    return folder


# --------------------------------------------------------------------------- the experiment


def experiment(
    registry: Registry,
    *,
    spec: Path | None,
    method: str | None,
    names: dict[str, Any],
    settings: Sequence[str] | None,
    recipe: Sequence[str] | None,
    reference_pool: int | None,
    trajectory: bool = False,
) -> Experiment:
    """Return what is to be run: the file of `--spec`, or the flags over the registry's defaults.

    `names` holds data, model, forget and seed, None where a flag was left out.

    Raises:
        ConfigError: neither a method nor a file, both, or data without a forget set of its own.
    """
    from unsc_plugin.spec import EvaluationSpec, Experiment, read_yaml

    given = (method, settings, recipe, reference_pool, trajectory or None, *names.values())
    if spec is not None:
        if any(value is not None for value in given):
            raise ConfigError(
                "--spec says everything about the experiment; drop the method and the flags "
                "--data, --model, --forget, --seed, --set, --recipe, --reference-pool and "
                "--trajectory"
            )
        return read_yaml(spec).validate(Experiment)
    method = method or (registry.defaults.method if registry.defaults else None)
    if method is None:
        raise ConfigError("expected a method (see `unsc list methods`) or --spec FILE")
    single = EvaluationSpec(
        train_seeds=1, draws=1, reference_pool=reference_pool or 1, trajectory=trajectory
    )
    tree = {
        "method": method,
        "set": pairs("--set", settings),
        **_with_defaults(registry, names),
        "evaluation": single.model_dump(mode="json"),
    }
    chosen: Experiment = _validated(Experiment, tree, "command line")
    if not recipe:
        return chosen
    changed = {**_recipe_of(registry, chosen).model_dump(mode="json"), **pairs("--recipe", recipe)}
    return chosen.model_copy(update={"recipe": _recipe(changed)})


def _with_defaults(registry: Registry, names: dict[str, Any]) -> dict[str, Any]:
    defaults = registry.defaults
    assert defaults is not None
    data = names["data"]
    if names["forget"] is None and data not in (None, defaults.dataset):
        own = [name for name in sorted(registry.forget_sets) if name.startswith(f"{data}/")]
        known = f"; registered for it: {', '.join(own)}" if own else ""
        raise ConfigError(
            f"--data {data}: expected --forget too, for example class:0 or random:0.1{known}"
        )
    usual: dict[str, Any] = {
        "data": defaults.dataset,
        "model": defaults.backbone,
        "forget": defaults.forget_set,
        "seed": defaults.seed,
    }
    found = {key: usual[key] if value is None else value for key, value in names.items()}
    if found["seed"] < 0:
        raise ConfigError(f"--seed: expected a number >= 0, got {found['seed']}")
    return found


def _recipe_of(registry: Registry, chosen: Experiment) -> Recipe:
    from unsc_plugin import run

    names = run.resolve(
        registry, data_name=chosen.data, model_name=chosen.model, forget_sets=[chosen.forget]
    )
    return names.recipe


def _recipe(tree: dict[str, Any]) -> Recipe:
    from unsc_plugin.spec import Recipe

    found: Recipe = _validated(Recipe, tree, "--recipe")
    return found


def _validated(kind: Any, tree: Any, source: str) -> Any:
    from unsc_plugin.spec import Document

    return Document(source, tree).validate(kind)


def resolved(registry: Registry, chosen: Experiment) -> Experiment:
    """Return the experiment with its recipe and forget set in full: enough to run it by --spec."""
    from unsc_plugin import run

    names = run.resolve(
        registry,
        data_name=chosen.data,
        model_name=chosen.model,
        forget_sets=[chosen.forget],
        recipe=chosen.recipe,
    )
    return chosen.model_copy(update={"recipe": names.recipe, "forget": names.forget[0]})


def folder_name(chosen: Experiment) -> str:
    """Return `<method>--<data>--<model>--<forget>--s<seed>`, with a code for whatever else is set.

    Two runs that differ in a setting never share a default folder.
    """
    from unsc_plugin import run
    from unsc_plugin.spec import EvaluationSpec, fingerprint

    whole = chosen.forget if isinstance(chosen.forget, str) else chosen.forget.kind
    name = run.run_id(chosen.method, chosen.data, chosen.model, whole, chosen.seed)
    usual = chosen.model_copy(
        update={
            "set": {},
            "recipe": None,
            "forget": whole,
            "evaluation": EvaluationSpec(train_seeds=1, draws=1, reference_pool=1),
        }
    )
    return name if chosen == usual else f"{name}--{fingerprint(chosen)[:6]}"


def differences(found: Record, wanted: Experiment, registry: Registry) -> list[str]:
    """Return in what a finished run differs from the (resolved) experiment."""
    import dataclasses
    import json

    from unsc_plugin.spec import canonical_json

    named, preset = registry.method(wanted.method)
    config = dataclasses.asdict(registry.create(wanted.method, **wanted.set).config)
    assert wanted.recipe is not None
    assert not isinstance(wanted.forget, str)
    now = {
        "method": [named.name, preset],
        "data": wanted.data,
        "model": wanted.model,
        "forget": wanted.forget.model_dump(mode="json", exclude_defaults=True),
        "seed": wanted.seed,
        "recipe": wanted.recipe.model_dump(mode="json"),
        "evaluation": wanted.evaluation.model_dump(mode="json"),
        "set": json.loads(canonical_json(config)),  # tuples as lists, as a record has them
    }
    kept = {**found.experiment, "method": [found.method, found.preset], "set": found.config}
    return [key for key, value in now.items() if kept.get(key) != value]
