"""What the shell offers for a word that is not finished: names of the light registry, fixed words.

Nothing heavy is loaded and nothing of a user is executed: of the `--plugin` files that are already
typed only registry `.yaml` files count. A registry that cannot be read offers nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import typer

from unsc_plugin._cli.lists import plain
from unsc_plugin.errors import UnscError

Offers = list[tuple[str, str]]
Complete = Callable[[typer.Context, str], Offers]

SECTIONS = ("backbones", "datasets", "forget_sets")
SHORT = 60
"""Characters of help beside an offer: shells put both on one line."""


def fixed(*words: str) -> Complete:
    """Return the completion of an option that takes one of a few words."""

    def complete(ctx: typer.Context, incomplete: str) -> Offers:
        return _fitting([(word, "") for word in words], incomplete)

    return complete


def several(*words: str) -> Complete:
    """Return the completion of a list of such words with commas."""

    def complete(ctx: typer.Context, incomplete: str) -> Offers:
        done, comma, _ = incomplete.rpartition(",")
        used = done.split(",")
        free = [(f"{done}{comma}{word}", "") for word in words if word not in used]
        return _fitting(free, incomplete)

    return complete


def methods(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer methods, and once something is typed their aliases and presets too."""
    return _fitting(_methods(ctx, bool(incomplete)), incomplete)


def backbones(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer shortcuts of backbones."""
    return _fitting(_section(ctx, "backbones"), incomplete)


def datasets(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer data sets that can be loaded here."""
    return _fitting(_section(ctx, "datasets"), incomplete)


def forget_sets(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer forget sets, those of `--data` only where that is typed already."""
    data = ctx.params.get("data")
    found = _section(ctx, "forget_sets", lambda entry: data in (None, entry.data))
    return _fitting([*found, ("correction", "correct the model, forget nothing")], incomplete)


def anything(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer whatever `unsc show` knows by name."""
    from unsc_plugin.metrics import METRICS

    metrics = [(spec.name, spec.summary) for spec in METRICS.values()]
    named = [one for section in SECTIONS for one in _section(ctx, section)]
    return _fitting([*_methods(ctx, bool(incomplete)), *named, *metrics], incomplete)


def boards(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer the boards of the folder `benchmarks`."""
    from unsc_plugin import bench

    return _fitting([(name, "") for name in bench.names()], incomplete)


def recipe(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer the fields of a recipe, and the values of those that take a word."""
    from unsc_plugin.spec import Recipe

    found = []
    for name, info in Recipe.model_fields.items():
        words = get_args(info.annotation) if get_origin(info.annotation) is Literal else ("",)
        found += [(f"{name}={word}", "") for word in words]
    return _fitting(found, incomplete)


# --------------------------------------------------------------------------- the registry


def _methods(ctx: typer.Context, with_presets: bool) -> Offers:
    found: Offers = []
    for name, entry in _entries(ctx, "methods"):
        found.append((name, entry.summary))
        if with_presets:
            found += [(alias, f"{name}.{tag}") for alias, tag in entry.aliases.items()]
            for tag, preset in entry.presets.items():
                settings = " ".join(f"{key}={plain(value)}" for key, value in preset.args.items())
                found.append((f"{name}.{tag}", f"{settings} ({preset.source})".strip()))
    return found


def _section(
    ctx: typer.Context, section: str, wanted: Callable[..., bool] = lambda entry: True
) -> Offers:
    return [(name, entry.summary) for name, entry in _entries(ctx, section) if wanted(entry)]


def _entries(ctx: typer.Context, section: str) -> list[tuple[str, Any]]:
    from unsc_plugin.registry import load

    try:
        registry = load(_typed_files(ctx))
    except (UnscError, OSError):
        return []
    named = getattr(registry, section).values()
    return [(one.name, one.entry) for one in named if one.status == "ok"]


def _typed_files(ctx: typer.Context) -> list[str]:
    here: Any = ctx
    found: list[str] = []
    while here is not None:
        found += here.params.get("plugin") or []
        here = here.parent
    return [path for path in dict.fromkeys(found) if path.endswith((".yaml", ".yml"))]


def _fitting(offers: Sequence[tuple[str, str]], incomplete: str) -> Offers:
    """Return the offers that go on from what is typed; their help is one short line, no markup."""
    return [(name, _short(about)) for name, about in offers if name.startswith(incomplete)]


def _short(about: str) -> str:
    bare = about.replace('"', "")  # the shells' own
    return textwrap.shorten(bare, SHORT, placeholder=" ...").replace("[", r"\[")
