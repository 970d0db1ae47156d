"""What is seen while models train: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from unsc_plugin._cli.console import err, say, state

if TYPE_CHECKING:
    from unsc_plugin.method import Progress as Told

PAUSE = 10.0
"""Seconds between two lines of one model where there is no terminal."""


class Watch:
    """The callback of training and unlearning; losses go to the accelerator's trackers, if any.

    Nothing appears before the first step, so that a run that cannot start leaves no trace. `epochs`
    says how many epochs are to come, by the first word of what is watched.
    """

    def __init__(self, accelerator: Any = None, tracked_as: str | None = None) -> None:
        self.epochs: Mapping[str, int] = {}
        self._accelerator, self._tracked_as = accelerator, tracked_as
        self._started = False
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=err, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
        if self._started and self._tracked_as:
            self._accelerator.end_training()

    def __call__(self, what: str, told: Told | None) -> None:
        """Show how far `what` is."""
        if told is None:
            return
        if not self._started:
            self._start()
        total = self.epochs.get(what.partition(" ")[0])
        of = "" if total is None else f" of {total}"
        text = f"{what}: epoch {told.epochs}{of}, loss {told.loss:.3f}"
        if err.is_terminal and not state.quiet:
            self._draw(what, text, told, total)
        elif told.epoch_end:
            self._mention(what, text, told, done=told.epochs == total)
        if self._tracked_as and not told.epoch_end:  # the end of an epoch repeats its last step
            self._accelerator.log({f"{what}/loss": told.loss}, step=told.steps)

    def _start(self) -> None:
        self._started = True
        if self._tracked_as:
            self._accelerator.init_trackers(self._tracked_as)
        if err.is_terminal and not state.quiet:
            self._bar.start()

    def _draw(self, what: str, text: str, told: Told, total: int | None) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        if told.epoch_end:
            self._bar.update(self._tasks[what], description=text, completed=told.epochs)

    def _mention(self, what: str, text: str, told: Told, done: bool) -> None:
        now = time.monotonic()
        if done or now - self._said.setdefault(what, now) > PAUSE:
            self._said[what] = now
            say(f"{text}, {told.seconds:.1f} s")
