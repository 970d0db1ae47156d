"""What the docstrings of the package hold beside Markdown, made Markdown for the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

PACKAGE = "unsc_plugin"
ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`(~?)([\w.]+)`")
EXAMPLE = re.compile(r"^>>> .*?(?=\n[ \t]*\n|\Z)", re.MULTILINE | re.DOTALL)


def linked(text: str, place: griffe.Object) -> str:
    """Return `text` with cross-references (`:func:`~module.name``) as links where there is a page."""

    def link(found: re.Match[str]) -> str:
        short, name = found.groups()
        shown = name.rpartition(".")[2] if short else name
        return f'<autoref identifier="{full_name(name, place)}" optional>`{shown}`</autoref>'

    return ROLE.sub(link, text)


def full_name(name: str, place: griffe.Object) -> str:
    """Return the dotted path that `name` stands for inside the docstring of `place`."""
    if name.startswith(f"{PACKAGE}."):
        return name
    parents: list[Any] = [place, *(one for one in (place.parent, place.module) if one)]
    for parent in parents:
        if name.partition(".")[0] in parent.members:
            return f"{parent.path}.{name}"
    return f"{PACKAGE}.{name}"


def fenced(text: str) -> str:
    """Return `text` with doctests, and what follows a double colon, as blocks of code."""
    text = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class Markdown(griffe.Extension):
    """Every docstring of the package, before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = linked(fenced(obj.docstring.value), obj)
