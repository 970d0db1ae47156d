"""Two teachers: an untrained network for the forget set, the original for the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.method import TrainingConfig, UnlearningMethod, UnlearningTask, option
from unsc_plugin.methods import _teachers as teachers
from unsc_plugin.rows import Batch, Rows
from unsc_plugin.spec import Scenario, Split

WORK_PER_ROW = 4 / 3
"""One pass of the student with gradient, one of the row's teacher without; a third each."""
LARGEST_LR = 1e-4


class BadTeaching(UnlearningMethod):
    """Steps on KL(q ‖ p^T) over D_f and a share of D_r, shuffled; q = p_bad^T on D_f, p_O^T on D_r.

    Chundawat, Tarun, Mandal and Kankanhalli, *Can Bad Teaching Induce Forgetting?* (AAAI 2023,
    arXiv 2205.08096). The student starts at θ_O; the competent teacher is θ_O, the incompetent one
    an untrained network of the same architecture, both frozen and in eval mode. The share of D_r is
    drawn once. Weighted: Σ r·KL(p_bad ‖ p) over the forget stream plus Σ a·KL(p_O ‖ p) over the
    share of the retained one, over the rows of the batch; r = max(−ε, 0), a = max(1 + ε, 0).
    Deviations: the mean over rows, not over rows and classes, so that the rate does not depend on
    K; AdamW at min(1e-4, lr_scale × the recipe's rate). `bad_teaching.paper`: rate 1e-4, 1 epoch,
    batches of 256. `bad_teaching.streisand`: the forget term × 5 for three times the epochs, the
    under-confidence control of a board.
    """

    @dataclass(frozen=True)
    class Config(TrainingConfig):
        """Settings of `bad_teaching`."""

        lr: float | None = option(
            None,
            "absolute learning rate; default min(1e-4, lr_scale × the recipe's)",
            above=0,
            search=(1e-5, 1e-3, "log"),
            probe=0.02,
        )
        lr_scale: float = option(
            0.1, "learning rate as a share of the recipe's, at most 1e-4", above=0, probe=1e-4
        )
        retain_share: float = option(
            0.3, "share of the retain set in the stream", low=0, high=1, search=(0.1, 1, "linear")
        )
        temperature: float = option(
            1.0, "divides the logits of student and teachers", above=0, search=(0.5, 8, "log")
        )
        forget_weight: float = option(
            1.0, "factor of the forget term", low=0, search=(0.1, 10, "log")
        )
        epochs_factor: int = option(1, "times the default number of epochs", low=1)

    name = "bad_teaching"
    needs = frozenset({Split.RETAIN, Split.FORGET})
    scenarios = frozenset(
        {Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.WEIGHTED, Scenario.SEQUENTIAL}
    )
    supports_weights = True
    config: Config

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the student."""
        good = teachers.frozen(copy.deepcopy(model))
        bad = teachers.frozen(task.fresh_model())
        stream = two_streams(task.rows("forget"), self._share(task))
        loader = task.loader_over(stream, "taught", batch_size=self.config.batch_size)
        engine.fit_config(
            model,
            task,
            [engine.Stage(loader, self._loss(good, bad))],
            self.config,
            epochs=self._epochs(task, len(stream)),
            lr=self._rate(task),
            optimizer="adamw",
        )
        return model

    def _share(self, task: UnlearningTask) -> Rows:
        retain = task.rows("retain")
        order = torch.randperm(len(retain), generator=task.generator)
        count = round(self.config.retain_share * len(retain))
        return retain.subset(order[:count].sort().values)

    def _epochs(self, task: UnlearningTask, rows: int) -> int:
        if self.config.epochs is not None:
            return self.config.epochs
        work = WORK_PER_ROW * rows / max(task.size("retain"), 1)
        return self.config.epochs_factor * self.config.passes_for(task.recipe, work)

    def _rate(self, task: UnlearningTask) -> float:
        wanted = self.config.learning_rate(task.recipe)
        return wanted if self.config.lr is not None else min(LARGEST_LR, wanted)

    def _loss(self, good: nn.Module, bad: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
        config = self.config

        def loss(student: nn.Module, batch: Batch) -> Tensor:
            taught = targets(good, bad, batch)
            losses = teachers.divergence(taught, student(**batch.inputs), config.temperature)
            gone = batch.labels == FORGET
            return engine.weighted_mean(
                torch.where(gone, config.forget_weight * losses, losses), batch
            )

        return loss


KEEP, FORGET = 0, 1
"""Labels of a stream of both sets: which of them a row comes from."""


def two_streams(forget: Rows, retain: Rows) -> Rows:
    """Return the rows of both, labelled by where they come from; a row may be in both."""
    gone = forget.relabelled(torch.full((len(forget),), FORGET))
    return gone.merged(retain.relabelled(torch.full((len(retain),), KEEP)))


def targets(good: nn.Module, bad: nn.Module, batch: Batch) -> Tensor:
    """Return the logits (B, K) of every row's teacher: `bad` on forget rows, `good` on the rest.

    Each teacher sees its own rows only.
    """
    parts = [
        (teacher, torch.nonzero(batch.labels == origin)[:, 0])
        for teacher, origin in ((good, KEEP), (bad, FORGET))
    ]
    with torch.no_grad():
        outputs = [
            teacher(**{key: value[rows] for key, value in batch.inputs.items()})
            for teacher, rows in parts
            if len(rows)
        ]
    order = torch.cat([rows for _, rows in parts])
    found: Tensor = torch.cat(outputs)[torch.argsort(order)]
    return found
