"""What every correction begins with: objective, criteria on two parts of the validation rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.errors import ConfigError, DataError
from unsc_plugin.influence import Objective, objective, ridge_of
from unsc_plugin.linalg import max_linear_under_box
from unsc_plugin.method import Rows, UnlearningTask
from unsc_plugin.methods import _criteria as criteria_
from unsc_plugin.methods import _last_modules as last
from unsc_plugin.methods._correction_settings import CorrectionConfig
from unsc_plugin.methods._criteria import Criterion, mean_loss
from unsc_plugin.methods._ground import Ground, Point
from unsc_plugin.methods._rounds import Course, Request
from unsc_plugin.methods._weight_planner import effects
from unsc_plugin.spec import derive

WEAK = 0.01
"""An attack that raises the loss by less than this share of it is no goal."""
FAR_FROM_OPTIMUM = 0.05
"""|∇J(θ̂)| as a share of Σ|g_j| from which the model is far from the optimum of its objective."""


@dataclass(frozen=True)
class Setup:
    """One model and request, ready to be planned for.

    `fixed` marks the samples that must go (n,); `count` is the length of the training set that
    their index speaks of.
    """

    objective: Objective
    ground: Ground
    rows: Rows
    fixed: Tensor
    count: int
    num_classes: int
    fit: Rows
    selection: Rows | None
    on_selection: tuple[Criterion, ...]
    config: CorrectionConfig

    @property
    def groups(self) -> Tensor:
        """The group of every training row.

        Raises:
            DataError: the training rows have none.
        """
        if self.rows.group is None:
            raise DataError(
                "expected groups of the training rows, got none; name the group column of the data "
                "set (columns.group)"
            )
        return self.rows.group

    def worth_correcting(
        self, request: Request, first: Point, config: CorrectionConfig
    ) -> tuple[Tensor, str | None]:
        """Return which goals are significant (k,), or all and why nothing is to be done."""
        all_of_them = torch.ones(len(request.size), dtype=torch.bool)
        if bool(self.fixed.any()):
            return all_of_them, None
        for one, f in zip(self.ground.criteria, first.f.tolist(), strict=True):
            if one.name == "robust" and f - first.u < WEAK * first.u:
                return all_of_them, "attack_too_weak"
        clear = request.size >= config.min_z * self.ground.errors(first)
        if not bool(clear.any()):
            return all_of_them, "no_significant_gap"
        return clear, None

    def only(self, kept: Tensor) -> Setup:
        """Return the setup with some of its goals, `kept` (k,)."""
        chosen = kept.tolist()
        ground = copy.copy(self.ground)
        ground.criteria = tuple(compress(self.ground.criteria, chosen))
        on_selection = tuple(compress(self.on_selection, chosen))
        return replace(self, ground=ground, on_selection=on_selection)

    def measure(
        self, logits: Mapping[str, Tensor], model: nn.Module, device: Any = None
    ) -> dict[str, dict[str, Any]]:
        """Return criteria, their standard errors and utility of a model's logits per part."""
        found = {}
        for part, own in (("fit", self.ground.criteria), ("selection", self.on_selection)):
            if part not in logits:
                continue
            rows = self.fit if part == "fit" else self.selection
            assert rows is not None
            z = logits[part].double()
            utility = mean_loss(rows, smoothing=self.ground.utility.smoothing)
            moved = [self._outputs(one, rows, z, model, device) for one in own]
            found[part] = {
                "f": [one.value(at) for one, at in zip(own, moved, strict=True)],
                "se": [one.standard_error(at) for one, at in zip(own, moved, strict=True)],
                "u": utility.value(z),
            }
        return found

    def _outputs(
        self, one: Criterion, rows: Rows, clean: Tensor, model: nn.Module, device: Any
    ) -> Tensor:
        if one.name != "robust":
            return clean
        assert self.ground.adversary is not None
        moved = self.ground.adversary(model, rows)
        return engine.predict(model, moved, device=device).logits.double()

    def diagnosis(self, box: tuple[float, float], config: CorrectionConfig) -> dict[str, Any]:
        """Return the goals' gaps and what of each the box and utility allow to remove.

        Without a box there is no limit, which stays open in the table.
        """
        first = self.ground.at(self.objective.theta)
        request = Request.of(self.ground.criteria, first, config.target, True)
        slopes = self.ground.slopes(first)
        slopes[:, :-1] *= request.sign.to(slopes)
        none = torch.zeros(self.objective.n, dtype=torch.float64)
        known = effects(self.objective, first.theta, none, slopes, config)
        errors = self.ground.errors(first)
        table = []
        for number, one in enumerate(self.ground.criteria):
            best = [
                max_linear_under_box(known.gains[number], utility, 0.0, *box)[0]
                if all(map(math.isfinite, box))
                else None
                for utility in (None, known.utility)
            ]
            size = float(request.size[number])
            table.append(
                {
                    "goal": one.name,
                    "value": float(first.f[number]),
                    "standard error": float(errors[number]),
                    "asked": config.target * size,
                    "attainable": best[0],
                    "attainable at no utility cost": best[1],
                }
            )
        return {"table": table, "utility loss": first.u}


def set_up(model: nn.Module, task: UnlearningTask, config: CorrectionConfig) -> Setup:
    """Return objective and criteria of a request.

    Raises:
        ConfigError: settings that contradict each other, or a scope that does not exist.
        DataError: validation rows that a criterion cannot be measured on.
    """
    config.check(fixed=task.size("forget") > 0)
    rows, val = task.training_rows(), task.rows("val")
    fit, selection = criteria_.cut(val, config.fit_fraction, derive(task.seed, "selection"))
    smoothing = task.recipe.label_smoothing
    build = partial(_criteria, config, num_classes=task.num_classes, smoothing=smoothing)
    scope = _scope(model, task, config.scope)
    ridge = ridge_of(task.recipe, len(rows)) if config.ridge == "recipe" else float(config.ridge)
    found = objective(model, rows, scope=scope, ridge=ridge, label_smoothing=smoothing)
    fixed = torch.zeros(len(rows), dtype=torch.bool)
    if task.size("forget"):
        fixed = torch.isin(rows.index, task.samples("forget")[0])
    ground = Ground(
        copy.deepcopy(model), found, build(fit), fit, selection, config.attack, smoothing
    )
    return Setup(
        objective=found,
        ground=ground,
        rows=rows,
        fixed=fixed,
        count=int(rows.index.max()) + 1,
        num_classes=task.num_classes,
        fit=fit,
        selection=selection,
        on_selection=() if selection is None else tuple(build(selection)),
        config=config,
    )


def _criteria(
    config: CorrectionConfig, rows: Rows, *, num_classes: int, smoothing: float
) -> list[Criterion]:
    found = [
        one for goal in config.wanted for one in criteria_.build(goal, rows, num_classes, smoothing)
    ]
    if any(one.name == "utility" for one in found):
        raise ConfigError("goals: utility is what every correction keeps, and no goal of its own")
    return found


def _scope(model: nn.Module, task: UnlearningTask, text: str) -> str | tuple[str, ...]:
    """Return the scope of the objective: `head`, `full`, or the parameters of the last modules.

    Raises:
        ConfigError: another word, or no number behind `last:`.
    """
    if text in ("head", "full"):
        return text
    word, _, number = text.partition(":")
    if word != "last" or not number.isdigit() or int(number) < 1:
        raise ConfigError(f"scope: expected head, full or last:K with K >= 1, got {text!r}")
    modules = last.selected(model, task, int(number))
    return tuple(
        f"{module}.{name}" if module else name
        for module in modules
        for name, _ in model.get_submodule(module).named_parameters(recurse=False)
    )


def told(setup: Setup, course: Course, request: Request) -> dict[str, Any]:
    """Return what a record keeps of a course: goals, points, rounds, and why it ended."""
    stationarity = setup.objective.stationarity
    rows = {"train": len(setup.rows), "fit": len(setup.fit)}
    if setup.selection is not None:
        rows["selection"] = len(setup.selection)
    notes: dict[str, Any] = {
        "goals": [one.name for one in setup.ground.criteria],
        "sign": request.sign.tolist(),
        "gap": request.size.tolist(),
        "asked_share": request.target,
        "rounds": course.rounds,
        "stop": course.reason,
        "rows": rows,
        "fixed": int(setup.fixed.sum()),
        "scope_parameters": setup.objective.p,
        "ridge": setup.objective.ridge,
        "stationarity": stationarity,
    }
    for name, point in (("before", course.start), ("planned", course.end)):
        notes[name] = {"f": point.f.tolist(), "u": point.u, "u_selection": point.u_selection}
    if stationarity is not None and stationarity > FAR_FROM_OPTIMUM:
        notes["warning"] = (
            f"the model is {stationarity:.2g} from an optimum of its objective, so that influences "
            "are rough"
        )
    return notes
