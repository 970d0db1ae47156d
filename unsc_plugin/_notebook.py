"""How an unlearned model looks: on a terminal, in a notebook, as a figure."""

from __future__ import annotations

import html as escaping
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from unsc_plugin.errors import ConfigError

if TYPE_CHECKING:
    import plotly.graph_objects as plotly

COLUMNS = ("split", "rows", "accuracy before", "after", "loss before", "after")
BEFORE, AFTER = "#8c9aa8", "#1f6f8b"
BINS = 20


@dataclass(frozen=True)
class Measured:
    """A model on one split: accuracy and mean cross-entropy (nats) of `n` rows.

    `confidence` is the probability of the true class of every row, float32 (n,).
    """

    n: int
    accuracy: float
    loss: float
    confidence: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Sheet:
    """What is shown: a title, numbers per split before and after, status and cost, notes."""

    title: str
    before: Mapping[str, Measured]
    after: Mapping[str, Measured]
    closing: str
    notes: tuple[str, ...] = ()


def rows(found: Sheet) -> list[tuple[str, ...]]:
    """Return one row per split: rows, accuracy in per cent and loss in nats, before and after."""
    return [
        (
            name,
            f"{before.n:,}",
            f"{100 * before.accuracy:.1f} %",
            f"{100 * found.after[name].accuracy:.1f} %",
            f"{before.loss:.4f}",
            f"{found.after[name].loss:.4f}",
        )
        for name, before in found.before.items()
    ]


def table(found: Sheet) -> Table:
    """Return the table for a terminal."""
    made = Table(
        title=found.title, caption="\n".join([found.closing, *found.notes]), title_justify="left"
    )
    for number, name in enumerate(COLUMNS):
        made.add_column(name, justify="left" if number == 0 else "right")
    for cells in rows(found):
        made.add_row(*cells)
    return made


def text(found: Sheet) -> str:
    """Return the table as plain text."""
    cells = [COLUMNS, *rows(found)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([found.title, *lines, found.closing, *found.notes])


def html(found: Sheet) -> str:
    """Return the table as HTML."""
    head = "".join(f"<th>{escaping.escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escaping.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in rows(found)
    )
    return (
        f"<p><b>{escaping.escape(found.title)}</b></p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        + "".join(f"<p>{escaping.escape(line)}</p>" for line in (found.closing, *found.notes))
    )


def figure(found: Sheet, kind: str) -> plotly.Figure:
    """Return the figure of a kind.

    Raises:
        ConfigError: an unknown kind.
    """
    makers = {"accuracy": _accuracy, "confidence": _confidence}
    if kind not in makers:
        raise ConfigError(f"plot: expected one of {', '.join(makers)}, got {kind!r}")
    return makers[kind](found)


def _accuracy(found: Sheet) -> plotly.Figure:
    import plotly.graph_objects as plotly

    names = list(found.before)
    made = plotly.Figure()
    for label, part, colour in (("before", found.before, BEFORE), ("after", found.after, AFTER)):
        made.add_bar(
            name=label,
            x=names,
            y=[100 * part[name].accuracy for name in names],
            text=[f"{100 * part[name].accuracy:.1f}" for name in names],
            textposition="outside",
            marker_color=colour,
        )
    return made.update_layout(
        **_layout(found.title), barmode="group", yaxis={"title": "accuracy, %", "range": [0, 112]}
    )


def _confidence(found: Sheet) -> plotly.Figure:
    import plotly.graph_objects as plotly
    from plotly.subplots import make_subplots

    names = [name for name in found.before if name != "val"]
    made = make_subplots(rows=1, cols=len(names), subplot_titles=names, shared_yaxes=True)
    for at, name in enumerate(names, 1):
        for label, part, colour in (
            ("before", found.before, BEFORE),
            ("after", found.after, AFTER),
        ):
            bars = plotly.Histogram(
                name=label,
                x=part[name].confidence,
                xbins={"start": 0, "end": 1, "size": 1 / BINS},
                histnorm="percent",
                marker_color=colour,
                opacity=0.6,
                showlegend=at == 1,
                legendgroup=label,
            )
            made.add_trace(bars, row=1, col=at)
    made.update_xaxes(title="probability of the true class", range=[0, 1])
    made.update_yaxes(title="rows, %", col=1)
    return made.update_layout(**_layout(found.title), barmode="overlay")


def _layout(heading: str) -> dict[str, Any]:
    return {
        "title": heading,
        "template": "plotly_white",
        "height": 420,
        "margin": {"t": 110},
        "legend": {"orientation": "h", "y": 1.14, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    }
