"""Records to LEADERBOARD.md, SVG plots and terminal tables.

A board is generated, never typed: the same records give the same bytes, in whatever order they
come, so that a check can rebuild and compare. Every column says its direction in words, an absent
number prints as a dash, and a failing board shows no ranks. Boards of forget sets rank by the score
S; boards of corrections compare at an equal gap and rank nothing.
"""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from unsc_plugin._board import correction_plot, correction_sheets, curve_sheets, curves, scatter
from unsc_plugin._board import sheets as tables
from unsc_plugin._board.cells import DOWN, UP, Sheet
from unsc_plugin._board.corrections import Corrections, corrections
from unsc_plugin._board.standings import Standings, standings
from unsc_plugin._board.study import BoardSummary, ScenarioSummary
from unsc_plugin.errors import RecordError
from unsc_plugin.metrics import score as scoring
from unsc_plugin.record import Record

__all__ = [
    "BoardSummary",
    "CorrectionBoard",
    "Leaderboard",
    "ScenarioSummary",
    "ScoreBoard",
    "build",
]

CORRECTION = "correction"


def build(records: Sequence[Record], board: BoardSummary) -> Leaderboard:
    """Rank the entries of a board, or compare them where its scenarios are corrections.

    Args:
        records: of any entries of the board, in any order; `retrain` (R_B, the floor), `original`
            and the controls are entries like the others, known by their names.
        board: what the board file says.

    Raises:
        RecordError: if two records hold one unit, one lies outside the board's grid, or corrections
            stand beside forget sets.
    """
    kinds = [scenario.kind == CORRECTION for scenario in board.scenarios]
    if any(kinds) and not all(kinds):
        names = ", ".join(s.name for s in board.scenarios if s.kind == CORRECTION)
        raise RecordError(
            f"expected forget sets or corrections on one board, got both: {names} of "
            f"{board.name} are corrections, which have no score; give them a board of their own"
        )
    if any(kinds):
        return CorrectionBoard(corrections(records, board))
    return ScoreBoard(standings(records, board))


class Leaderboard(abc.ABC):
    """The shown form of a board."""

    failing = "FAILING, no ranks are shown"

    @property
    @abc.abstractmethod
    def found(self) -> Standings | Corrections:
        """The board as numbers."""

    @property
    @abc.abstractmethod
    def sheets(self) -> tuple[Sheet, ...]:
        """All tables, in the order in which they are shown."""

    @abc.abstractmethod
    def svg(self) -> str:
        """Return the main plot."""

    @abc.abstractmethod
    def plots(self) -> dict[str, str]:
        """Return the further plots as file name -> SVG: only those that the records have."""

    @abc.abstractmethod
    def terminal(self, width: int = 160) -> Group:
        """Return the main tables for a terminal of `width` columns."""

    @abc.abstractmethod
    def _told(self) -> tuple[str, list[str]]:
        """Return what stands before the first table and after the last one."""

    @property
    def health(self) -> scoring.Health:
        """Failures (no ranks are shown then) and notes."""
        return self.found.health

    @property
    def ok(self) -> bool:
        """Whether the board is healthy."""
        return self.health.ok

    def markdown(self) -> str:
        """Return the text of LEADERBOARD.md."""
        intro, captions = self._told()
        return (
            _environment()
            .get_template("leaderboard.md.j2")
            .render(
                board=self.found.board,
                health=self.health,
                failing=self.failing,
                intro=intro,
                sheets=self.sheets,
                captions=captions,
            )
        )

    def _health_text(self) -> Text:
        board, health = self.found.board, self.health
        text = Text(f"{board.title}, version {board.version}: ")
        text.append("healthy" if health.ok else self.failing, style="bold")
        for line in (*health.failures, *(f"note: {note}" for note in health.notes)):
            text.append(f"\n- {line}")
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; numbers keep six significant digits, absent ones go."""
        tree: dict[str, Any] = _prune(asdict(self.found))
        tree["ok"] = self.ok
        return tree


@dataclass(frozen=True)
class ScoreBoard(Leaderboard):
    """A board that ranks by the score S."""

    standings: Standings

    @property
    def found(self) -> Standings:
        """The standings."""
        return self.standings

    @cached_property
    def sheets(self) -> tuple[Sheet, ...]:
        """All tables, in the order in which they are shown."""
        return tables.sheets(self.standings)

    def _told(self) -> tuple[str, list[str]]:
        return tables.INTRO, tables.captions(self.standings)

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
        parts: list[Any] = [self._health_text()]
        main = (tables.ranking_sheet(board), *tables.unranked_sheets(board))
        parts += [_rich_table(_narrow(sheet, width)) for sheet in main]
        parts += [_rich_table(sheet) for sheet in tables.problem_sheets(board.problems)]
        parts.append(Text(scatter.text(board)))
        return Group(*parts)


@dataclass(frozen=True)
class CorrectionBoard(Leaderboard):
    """A board that compares corrections at an equal gap and ranks nothing."""

    corrections: Corrections
    failing = "FAILING"

    @property
    def found(self) -> Corrections:
        """The comparisons."""
        return self.corrections

    @cached_property
    def sheets(self) -> tuple[Sheet, ...]:
        """All tables, scenario by scenario."""
        return correction_sheets.sheets(self.corrections)

    def _told(self) -> tuple[str, list[str]]:
        board = self.corrections
        return correction_sheets.intro(board), correction_sheets.captions(board)

    def svg(self) -> str:
        """Return the size of the criterion (x) against NLL (y), one line per family."""
        return self._drawn("nll")

    def plots(self) -> dict[str, str]:
        """Return the same against accuracy."""
        return {correction_sheets.ACCURACY: self._drawn("acc")}

    def _drawn(self, name: str) -> str:
        template = _environment().get_template("corrections.svg.j2")
        return template.render(**correction_plot.drawing(self.corrections, name))

    def terminal(self, width: int = 160) -> Group:
        """Return the tables at an equal gap, and what follows from them, for `width` columns."""
        board = self.corrections
        parts: list[Any] = [self._health_text()]
        for found in board.scenarios:
            main = correction_sheets.main_sheets(board, found)
            parts += [_rich_table(_fitting(sheet, width)) for sheet in main]
            said = correction_sheets.words_sheet(board, found)
            lines = "\n".join(f"- {line}" for line in said.text)
            parts += [Text(said.title, style="italic"), Text(f"{lines}\n")]
        parts += [_rich_table(sheet) for sheet in tables.problem_sheets(board.problems)]
        return Group(*parts)


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


_ESSENTIAL = ("left", "entry", "units", "NLL", "acc", "Δ NLL")


def _fitting(sheet: Sheet, width: int) -> Sheet:
    """Keep the columns of a comparison that fit a terminal, with short directions."""
    if width >= _WIDE:
        return sheet
    kept = [i for i, column in enumerate(sheet.columns) if column.label.startswith(_ESSENTIAL)]
    columns = tuple(
        column._replace(direction=_SHORT.get(column.direction, ""))
        for column in (sheet.columns[i] for i in kept)
    )
    rows = tuple(tuple(row[i] for i in kept) for row in sheet.rows)
    note = "Δ: less that of the reference; above 0 speaks for the latter."
    text = (*sheet.text, note) if columns[-1].label == "Δ NLL" else sheet.text
    return replace(sheet, columns=columns, rows=rows, text=text)


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
