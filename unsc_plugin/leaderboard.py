"""Records to LEADERBOARD.md, SVG plots and terminal tables.

A board is generated, never typed: the same records give the same bytes, in whatever order they
come, so that a check can rebuild and compare. Every column says its direction in words, an absent
number prints as a dash, and a failing board shows no ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from unsc_plugin._board import curve_sheets, curves, scatter
from unsc_plugin._board import sheets as tables
from unsc_plugin._board.cells import DOWN, UP, Sheet
from unsc_plugin._board.standings import Standings, standings
from unsc_plugin._board.study import BoardSummary, ScenarioSummary
from unsc_plugin.metrics import score as scoring
from unsc_plugin.record import Record

__all__ = ["BoardSummary", "Leaderboard", "ScenarioSummary", "build"]


def build(records: Sequence[Record], board: BoardSummary) -> Leaderboard:
    """Rank the entries of a board.

    Args:
        records: of any entries of the board, in any order; `retrain` (R_B, the floor), `original`
            and the controls are entries like the others, known by their names.
        board: what the board file says.

    Raises:
        RecordError: if two records hold one unit, or one lies outside the board's grid.
    """
    return Leaderboard(standings(records, board))


@dataclass(frozen=True)
class Leaderboard:
    """The shown form of a board's standings."""

    standings: Standings

    @property
    def health(self) -> scoring.Health:
        """Failures (no ranks are shown then) and notes."""
        return self.standings.health

    @property
    def ok(self) -> bool:
        """Whether the board is healthy."""
        return self.health.ok

    @cached_property
    def sheets(self) -> tuple[Sheet, ...]:
        """All tables, in the order in which they are shown."""
        return tables.sheets(self.standings)

    def markdown(self) -> str:
        """Return the text of LEADERBOARD.md."""
        template = _environment().get_template("leaderboard.md.j2")
        return template.render(
            board=self.standings.board,
            health=self.health,
            sheets=self.sheets,
            captions=tables.captions(self.standings),
        )

    def svg(self) -> str:
        """Return a scatter of forgetting (x) against kept utility (y), one marker per entry."""
        template = _environment().get_template("scatter.svg.j2")
        return template.render(**scatter.drawing(self.standings))

    def plots(self) -> dict[str, str]:
        """Return the further plots as file name -> SVG: only those that the records have."""
        template = _environment().get_template("curves.svg.j2")
        drawn = {}
        if self.standings.matched:
            drawn[curve_sheets.MATCHED] = curves.matched_drawing(self.standings)
        if self.standings.drift:
            drawn[curve_sheets.DRIFT] = curves.drift_drawing(self.standings)
        return {name: template.render(**drawing) for name, drawing in drawn.items()}

    def terminal(self, width: int = 160) -> Group:
        """Return the main tables and a small text scatter for a terminal of `width` columns."""
        board = self.standings
        parts: list[Any] = [_health_text(board)]
        main = (tables.ranking_sheet(board), *tables.unranked_sheets(board))
        parts += [_rich_table(_narrow(sheet, width)) for sheet in main]
        parts += [_rich_table(sheet) for sheet in tables.problem_sheets(board)]
        parts.append(Text(scatter.text(board)))
        return Group(*parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; numbers keep six significant digits, absent ones go."""
        tree: dict[str, Any] = _prune(asdict(self.standings))
        tree["ok"] = self.ok
        return tree


def _prune(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _prune(item) for key, item in value.items() if item is not None}
    if hasattr(value, "_asdict"):
        return _prune(value._asdict())
    if isinstance(value, list | tuple):
        return [_prune(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


# --------------------------------------------------------------------------- rendering


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.endswith(".svg.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = markdown_cell
    return environment


def markdown_cell(text: str) -> str:
    r"""Return one line of text that cannot break out of a Markdown table, nor smuggle in HTML.

    >>> markdown_cell("a|b <c>")
    'a\\|b &lt;c>'
    """
    line = re.sub(r"\s+", " ", text).strip()
    code = len(line) > 1 and line[0] == line[-1] == "`"
    if code:
        return "`" + line[1:-1].replace("`", "'").replace("|", r"\|") + "`"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace("](", r"]\(")
    return re.sub(r"([|*`])", r"\\\1", line)


_NARROW = ("tier", "entry", "why", "S [", "rank [", "a_", "u", "acc_forget", "acc_test")
_NARROWEST = ("tier", "entry", "why", "S [", "rank [", "u")
_WIDE = 150
_SHORT = {
    UP: "higher",
    f"{UP}; retrain is 1": "higher",
    f"{UP}; Δ 0 is retrain": "higher",
    DOWN: "lower",
    tables.TO_RETRAIN: "as retrain",
}


def _narrow(sheet: Sheet, width: int) -> Sheet:
    """Keep the columns that fit a terminal, directions cut to one or two words."""
    wanted = _NARROW if width >= _WIDE else _NARROWEST
    kept = [i for i, column in enumerate(sheet.columns) if column.label.startswith(wanted)]
    columns = tuple(
        sheet.columns[i]._replace(
            direction=_SHORT.get(sheet.columns[i].direction, sheet.columns[i].direction)
        )
        for i in kept
    )
    rows = tuple(tuple(row[i] for i in kept) for row in sheet.rows)
    return Sheet(sheet.title, columns, rows, (*sheet.text, "The direction is the better one."))


def _rich_table(sheet: Sheet) -> Table:
    table = Table(
        title=sheet.title, caption=" ".join(sheet.text) or None, box=box.SIMPLE, padding=0
    )
    for column in sheet.columns:
        header = Text(column.label)
        if column.direction:
            header.append(f"\n{column.direction}", style="dim")
        justify: Literal["left", "right"] = "left" if column.text else "right"
        width = 16 if column.label.startswith("entry") else None
        table.add_column(header, justify=justify, overflow="fold", min_width=width)
    for row in sheet.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _health_text(board: Standings) -> Text:
    health = board.health
    text = Text(f"{board.board.title}, version {board.board.version}: ")
    text.append("healthy" if health.ok else "FAILING, no ranks are shown", style="bold")
    for line in (*health.failures, *(f"note: {note}" for note in health.notes)):
        text.append(f"\n- {line}")
    return text
