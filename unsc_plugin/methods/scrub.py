"""A student that leaves its teacher on the forget set and obeys it on the retained one (SCRUB)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.errors import RequestError
from unsc_plugin.method import TrainingConfig, UnlearningMethod, UnlearningTask, option
from unsc_plugin.methods import _teachers as teachers
from unsc_plugin.rows import Batch, Rows
from unsc_plugin.spec import Scenario, Split

WORK_PER_ROW = 4 / 3
"""One pass of the student with gradient, one of the teacher without; a third each."""


class Scrub(UnlearningMethod):
    """Per epoch: a pass over D_f on −T²·KL(p_O^T ‖ p^T), then one over D_r on γ·CE + α·T²·KL.

    Kurmanji, Triantafillou, Hayes and Triantafillou, *Towards Unbounded Machine Unlearning*
    (NeurIPS 2023, arXiv 2302.09880). Only the first min(msteps, max(E − 1, 1)) of the E epochs have
    the forget pass, so that the last one repairs. The learning rate is a tenth after epochs ⌈.6E⌉
    and ⌈.9E⌉. The teacher is a frozen copy in eval mode, the student trains in train mode; forget
    passes leave BatchNorm's running statistics alone. Weighted: the forget pass weighs
    r = max(−ε, 0), the retain pass a = max(1 + ε, 0).
    Without BatchNorm, dropout and augmentation student and teacher agree at the first forget step:
    its loss and its gradient are zero.
    `scrub.rewind` (SCRUB+R) returns the checkpoint, θ_O included, whose error on D_f is nearest to
    the last model's error on validation rows of the labels that D_f has; ties go to the first.
    `scrub.paper` has the published large-scale values (SGD), `scrub.small` the small-scale ones
    (Adam), both with moving statistics.
    """

    @dataclass(frozen=True)
    class Config(TrainingConfig):
        """Settings of `scrub`."""

        lr_scale: float = option(
            5e-3, "learning rate as a share of the recipe's", above=0, search=(5e-4, 5e-2, "log")
        )
        alpha: float = option(
            0.001, "weight of KL on retained rows", low=0, search=(1e-4, 1.0, "log")
        )
        gamma: float = option(
            0.99, "weight of CE on retained rows", low=0, search=(0.1, 1.0, "log")
        )
        temperature: float = option(
            4.0, "divides the logits of student and teacher", above=0, search=(1, 8, "log")
        )
        msteps: int = option(
            2, "epochs with a forget pass", low=0, search=(1, 10, "linear"), probe=0
        )
        forget_batch_size: int = option(32, "rows per step of the forget pass", low=1, probe=5)
        optimizer: Literal["sgd", "adam", "adamw"] | None = option(
            None, "optimiser; default: the recipe's", probe="adam"
        )
        weight_decay: float | None = option(
            None, "weight decay; default: the recipe's", low=0, probe=0.1
        )
        rewind: bool = option(
            False,
            "return the checkpoint that forgets as much as never having seen; opens D_v",
            inert="the last model may be the nearest",
        )
        move_statistics: bool = option(
            False, "BatchNorm statistics move on forget passes too, as published code has it"
        )

    name = "scrub"
    needs = frozenset({Split.RETAIN, Split.FORGET, Split.VAL})
    scenarios = frozenset(
        {Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.WEIGHTED, Scenario.SEQUENTIAL}
    )
    supports_weights = True
    config: Config

    @property
    def opens(self) -> frozenset[Split]:
        """Validation data for the rewind only."""
        return self.needs if self.config.rewind else self.needs - {Split.VAL}

    def prepare(self, model: nn.Module, task: UnlearningTask) -> None:
        """Check that a rewind has validation rows to look at.

        Raises:
            RequestError: none has a label of the forget set.
        """
        if self.config.rewind:
            counts = task.label_counts("forget") > 0
            if not int(task.label_counts("val")[counts].sum()):
                raise RequestError(
                    "scrub.rewind needs validation rows with a label of the forget set, got none; "
                    "use scrub without rewind"
                )

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the student."""
        config = self.config
        share = task.size("forget") / max(task.size("retain"), 1)
        epochs = config.passes_for(task.recipe, WORK_PER_ROW * (1 + share))
        history = _History(model, task) if config.rewind else None
        engine.fit_config(
            model,
            task,
            self._stages(teachers.frozen(copy.deepcopy(model)), task, epochs),
            config,
            epochs=epochs,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            schedule=decay(epochs),
            on_epoch_end=history.keep if history else None,
        )
        if history:
            history.rewind()
        return model

    def _stages(self, teacher: nn.Module, task: UnlearningTask, epochs: int) -> list[engine.Stage]:
        config = self.config
        forget = task.loader("forget", batch_size=config.forget_batch_size)
        retain = task.loader("retain", batch_size=config.batch_size)
        maximised = min(config.msteps, max(epochs - 1, 1))
        task.stats["forget_passes"] = min(maximised, epochs)
        away = engine.Stage(
            lambda epoch: forget.epoch(epoch) if epoch < maximised else (),
            lambda student, batch: -self._distilled(student, teacher, batch, 0.0, 1.0),
            statistics="move" if config.move_statistics else "keep",
            steps=len(forget),
        )
        back = engine.Stage(
            retain,
            lambda student, batch: self._distilled(
                student, teacher, batch, config.gamma, config.alpha
            ),
        )
        return [away, back]

    def _distilled(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, gamma: float, alpha: float
    ) -> Tensor:
        """Return the mean of γ·CE + α·T²·KL over the batch; a term without weight is left out."""
        heat, logits = self.config.temperature, student(**batch.inputs)
        loss: Tensor = logits.new_zeros(())
        if gamma:
            losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
            loss = gamma * engine.weighted_mean(losses, batch)
        if alpha or not gamma:
            with torch.no_grad():
                wanted = teacher(**batch.inputs)
            losses = teachers.divergence(wanted, logits, heat)
            loss = loss + alpha * heat**2 * engine.weighted_mean(losses, batch)
        return loss


def decay(epochs: int) -> Callable[[float], float]:
    """Return the factor of the learning rate by epochs done: × .1 after ⌈.6E⌉, again after ⌈.9E⌉.

    >>> factor = decay(10)
    >>> factor(5.9), factor(6.0), round(factor(9.0), 3)
    (1.0, 0.1, 0.01)
    """
    marks = [-(-6 * epochs // 10), -(-9 * epochs // 10)]
    return lambda done: 0.1 ** sum(done >= mark for mark in marks)


def nearest(errors: Sequence[float], wanted: float) -> int:
    """Return the position of the error nearest to `wanted`, the first of several.

    >>> nearest([0.0, 0.2, 0.4], 0.3)
    1
    """
    return min(range(len(errors)), key=lambda at: abs(errors[at] - wanted))


class _History:
    """The model after every epoch, on the CPU, and its error on the forget set; 0 is θ_O."""

    def __init__(self, model: nn.Module, task: UnlearningTask) -> None:
        self._model, self._task = model, task
        self._states: list[dict[str, Tensor]] = []
        self._errors: list[float] = []
        self._forget = task.rows("forget")
        self._steps = task.steps
        self.keep()

    def keep(self, epoch: int = -1) -> bool:
        """Keep the model as it is; never ends the run."""
        state = self._model.state_dict()
        self._states.append({n: t.detach().to("cpu", copy=True) for n, t in state.items()})
        self._errors.append(self._error(self._forget))
        self._steps = self._task.steps
        return False

    def rewind(self) -> None:
        """Put the model back to where its forget error is nearest to the reference."""
        if self._task.steps > self._steps:  # a limit ended the run within an epoch
            self.keep()
        val = self._task.rows("val")
        known = torch.isin(val.labels, self._forget.labels)
        reference = self._error(val.subset(known))
        chosen = nearest(self._errors, reference)
        self._model.load_state_dict(self._states[chosen])
        self._task.stats |= {
            "rewound_to": chosen,
            "forget_errors": self._errors,
            "reference_error": reference,
        }

    def _error(self, rows: Rows) -> float:
        """Return the share of wrong answers by weight."""
        found = engine.predict(self._model, rows, device=self._task.accelerator)
        wrong = (found.logits.argmax(dim=1) != found.labels).double()
        return float((rows.weight.double() * wrong).sum() / rows.weight.double().sum())
