"""Per-sample weights found by influence functions, handed to any method that honours weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.errors import ConfigError
from unsc_plugin.linalg import analytic_weights
from unsc_plugin.method import (
    MethodRef,
    Scenario,
    Split,
    UnlearningMethod,
    UnlearningTask,
    Weights,
    option,
)
from unsc_plugin.methods import _selection as selection
from unsc_plugin.methods import _weight_planner as planner
from unsc_plugin.methods._correction_settings import CorrectionConfig
from unsc_plugin.methods._corrections import Setup, set_up, told
from unsc_plugin.methods._ground import Point
from unsc_plugin.methods._rounds import Course, Request
from unsc_plugin.spec import derive

Solver = Literal["qp", "hard", "hard_utility", "li_liu", "reweighing", "permuted"]
OF_ONE_GOAL = ("hard", "hard_utility", "li_liu")
OVERSHOT = 0.7
"""Factor of the target where the base method goes beyond it."""


class SoftWeighted(UnlearningMethod):
    """Find ε (delete −1 .. keep 0 .. count more) that closes a measured gap, and let `base` act.

    Qiao, Ding, Cheng and Zhang, *Soft-Weighted Machine Unlearning* (arXiv 2505.18783). With
    F_j = ∇f(θ)ᵀ H_ε⁻¹ ∇ℓ_j(θ) the predicted change of the criterion f if sample j is removed, U_j
    the same of the utility loss, s the sign of f and F̃ = s·F, every round solves

        min ½|ε|²  subject to  F̃·(ε − ε_t) ≥ τ,  U·(ε − ε_t) ≥ −δ,  ε in the box,

    refits θ on J_ε(θ) = Σ (1 + ε_j) ℓ_j + μ/2 |θ|² and measures again. Criteria are fitted on one
    part of the validation rows, another part stops the plan where utility suffers. A forget set, if
    there is one, stays at ε = −1. Corrected against the published code: signed gaps, a box, a
    trust region, validation and test data apart, no hidden constants.

    Solvers other than `qp` are rules to compare with: `hard` (drop the worst), `hard_utility`,
    `li_liu` (a linear programme), `reweighing` (Kamiran & Calders), `permuted` (the solved ε,
    shuffled). The plan does not depend on `base`.

    `soft_weighted.reference` repeats the published formulas: without a box, in one step at θ̂ for
    the whole of |f|, F and U of H_0, all validation rows for fitting, and with q = F/(2λ) and a
    `case` of the closed form that is chosen by hand; a robust loss is summed over its rows, and to
    go to 0. `attack={"kind": "reference_overshoot"}` adds the published attack, frozen at the
    original. None of it is compared with anything: `protocol` says so in the record.
    """

    @dataclass(frozen=True)
    class Config(CorrectionConfig):
        """Settings of `soft_weighted`."""

        base: MethodRef = option(
            MethodRef("influence", {"solver": "auto", "scope": "head"}),
            "method that applies the weights", probe=MethodRef("finetune", {"epochs": 1}),
        )  # fmt: skip
        solver: Solver = option(
            "qp", "rule that gives the weights",
            choices=("qp", "hard", "hard_utility", "li_liu", "reweighing", "permuted"),
            probe="hard",
        )  # fmt: skip
        eps_min: float | None = option(-1.0, "lower end of the box; None: none", probe=-0.05)
        eps_max: float | None = option(1.0, "upper end of the box; None: none", probe=0.05)
        trust: float | None = option(
            0.5, "largest change of a weight per round; None: no limit", above=0, probe=0.02
        )
        form: Literal["reach", "cap"] = option(
            "reach", "ask for at least, or as published at most, the target",
            choices=("reach", "cap"), inert="without lam the smallest change meets a cap with 0",
        )  # fmt: skip
        lam: float | None = option(
            None, "λ of the published objective; None: ∞, the smallest change", above=0, probe=1e-3
        )
        case: Literal["auto", "none", "metric", "utility", "both"] | None = option(
            None, "constraints that bind in the closed form without a box, of protocol reference; "
            "auto: by its tests; None: no closed form",
            inert="of protocol reference",
        )  # fmt: skip
        signed: bool = option(
            True, "follow the sign of the gap; off: |f| as published",
            inert="the gap of the toy is positive",
        )  # fmt: skip
        k: float | Literal["match"] = option(
            "match", "solver hard: share of the samples; match: as many as reach the target",
            low=0, high=1, inert="of the solver hard",
        )  # fmt: skip
        alpha: float = option(
            0.2, "solver li_liu: most samples, as a share", low=0, high=1,
            inert="of the solver li_liu",
        )  # fmt: skip
        gamma: float = option(
            0.0, "solver li_liu: utility asked for", low=0, high=1, inert="of the solver li_liu"
        )
        threshold: float | Literal["match"] = option(
            "match", "for a base that knows sets only: drop ε ≤ −threshold; match: as predicted",
            above=0, inert="of a base that knows sets only",
        )  # fmt: skip
        max_base_runs: int = option(
            1, "more: rerun with 0.7 × the target where the base overshoots", low=1,
            inert="only where the base overshoots",
        )  # fmt: skip
        protocol: Literal["ours", "reference"] = option(
            "ours", "reference: published formulas, never ranked", choices=("ours", "reference"),
            inert="allows more settings; changes none",
        )  # fmt: skip

        @property
        def published(self) -> bool:
            """Whether settings are allowed that are there only to repeat what was published."""
            return self.protocol == "reference"

    name = "soft_weighted"
    needs = frozenset({Split.FORGET, Split.RETAIN, Split.VAL})
    optional = frozenset({Split.FORGET})
    scenarios = frozenset({Scenario.CORRECTION})
    config: Config

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._check_settings()

    def _check_settings(self) -> None:
        """Refuse settings that exclude each other.

        Raises:
            ConfigError: bounds outside what they may be, or several goals for a rule of one.
        """
        config = self.config
        low, high = self._box
        if low > 0 or (low < -1 and not config.published):
            raise ConfigError(
                f"eps_min: expected a value within [-1, 0], got {config.eps_min}; a sample cannot "
                "count less than never (protocol: reference allows it)"
            )
        if high < 0:
            raise ConfigError(f"eps_max: expected a value >= 0, got {config.eps_max}")
        if config.solver in OF_ONE_GOAL and len(config.goals) > 1:
            raise ConfigError(
                f"solver {config.solver}: expected one goal, got {len(config.goals)}; use qp"
            )
        if config.fit_fraction == 1 and config.max_base_runs > 1:
            raise ConfigError("max_base_runs: more than 1 needs selection rows (fit_fraction < 1)")
        config.check_attack()
        if config.case is not None:
            self._check_case()

    def _check_case(self) -> None:
        """Refuse what the closed form does not have: a box, rounds, several goals.

        Raises:
            ConfigError: naming every setting that is not as the closed form needs it.
        """
        config, case = self.config, self.config.case
        wanted = {
            "protocol": "reference", "solver": "qp", "eps_min": None, "eps_max": None,
            "trust": None, "step": 1.0, "max_rounds": 1, "utility_slack": 0.0, "strict": False,
        }  # fmt: skip
        wrong = [
            f"{name} {_text(value)} (got {_text(getattr(config, name))})"
            for name, value in wanted.items()
            if getattr(config, name) != value
        ]
        if len(config.goals) != 1:
            wrong.append(f"one goal (got {len(config.goals)})")
        if wrong:
            raise ConfigError(
                f"case {case}: the closed form is one step without a box and needs "
                f"{', '.join(wrong)}; begin with soft_weighted.reference, or set case to null"
            )
        if case in ("none", "utility") and config.lam is None:
            raise ConfigError(
                f"case {case}: without lam all of its weights are 0; give lam, or case metric or "
                "both, where it cancels"
            )

    @property
    def _box(self) -> tuple[float, float]:
        low, high = self.config.eps_min, self.config.eps_max
        return (
            -planner.Infinite if low is None else low,
            planner.Infinite if high is None else high,
        )

    @property
    def base(self) -> UnlearningMethod:
        """The method that applies the weights.

        Raises:
            ConfigError: this instance was not made by name.
        """
        if "base" not in self.parts:
            raise ConfigError(
                "soft_weighted: the base method is missing; make it with "
                "unsc_plugin.create('soft_weighted', base=...)"
            )
        return self.parts["base"]

    # -- the plan

    def prepare(self, model: nn.Module, task: UnlearningTask) -> tuple[planner.Plan, Setup]:
        """Return the plan and what it was made on; neither depends on the base."""
        setup = set_up(model, task, self.config)
        plan = self._plan(setup, self.config.target, task.seed)
        task.stats.update(self._report(setup, plan))
        return plan, setup

    def _plan(self, setup: Setup, target: float, seed: int) -> planner.Plan:
        """Return the weights for a target."""
        config = replace(self.config, target=target)
        first = setup.ground.at(setup.objective.theta)
        request = Request.of(setup.ground.criteria, first, target, config.signed)
        kept, reason = setup.worth_correcting(request, first, config)
        setup, request = setup.only(kept), request.only(kept)
        first = replace(first, f=first.f[kept])
        if reason is not None:
            e = torch.zeros(len(setup.rows), dtype=torch.float64)
            nothing = Course(first, first, reason, torch.zeros_like(request.size))
            return planner.Plan(e, nothing, request, kept, reason)
        if config.solver in ("qp", "permuted") and config.case is None:
            e, course = self._in_rounds(setup, request, first, config)
            if config.solver == "permuted":
                e = self._permuted(e, setup.fixed, seed)
                refit = setup.objective.refit(e, first.theta, config.solver_settings)
                none = torch.zeros_like(course.asked)
                course = Course(first, setup.ground.at(refit.theta), "permuted", none)
        else:
            e, course = planner.one_step(
                setup.objective,
                setup.ground,
                request,
                first,
                self._chosen(setup),
                config,
                linear=config.case is not None,
            )
        noop = None if bool(e.any()) else course.reason
        return planner.Plan(e, course, request, kept, noop)

    def _in_rounds(
        self, setup: Setup, request: Request, first: Point, config: Config
    ) -> tuple[Tensor, Course]:
        move = planner.WeightMove(
            setup.objective,
            config,
            self._box,
            planner.Infinite if config.trust is None else config.trust,
            fixed=setup.fixed,
            theta=first.theta,
            linear=planner.Infinite if config.lam is None else config.lam,
            form=config.form,
        )
        course = planner.rounds(move, setup.ground, request, config, first)
        return move.e, course

    @staticmethod
    def _permuted(e: Tensor, fixed: Tensor, seed: int) -> Tensor:
        mixed = e.clone()
        mixed[~fixed] = selection.permuted(e[~fixed], derive(seed, "permuted"))
        return mixed

    def _chosen(self, setup: Setup) -> Any:
        """Return the rule of the solver: effects, what is asked -> weights and notes.

        Raises:
            ConfigError: several goals for a rule of one.
        """
        config, rows = self.config, setup.rows
        share = None if config.k == "match" else float(config.k)
        names = [one.name for one in setup.ground.criteria]
        if len(names) > 1 and (config.solver in OF_ONE_GOAL or config.case is not None):
            what = f"solver {config.solver}" if config.case is None else f"case {config.case}"
            raise ConfigError(f"{what}: expected one goal, got {names}; use qp without a case")

        def choose(known: planner.Effects, asked: Tensor) -> tuple[Tensor, dict[str, Any]]:
            if config.case is not None:
                return self._in_closed_form(setup, known, float(asked[0]))
            if config.solver == "reweighing":
                e = selection.reweighing(rows.labels, setup.groups, setup.num_classes)
                return torch.where(setup.fixed, -1.0, e), {}
            gain, utility, target = known.gains[0], known.utility, float(asked[0])
            if config.solver == "hard":
                found = selection.hard(gain, target, share, utility)
            elif config.solver == "hard_utility":
                found = selection.hard_utility(gain, utility, target, share)
            else:
                found = selection.li_liu(gain, utility, target, config.gamma, config.alpha)
            notes = {"size": found.size, "shortfall": found.shortfall, "relaxed": found.relaxed}
            return torch.where(setup.fixed, -1.0, found.e), notes

        return choose

    def _in_closed_form(
        self, setup: Setup, known: planner.Effects, asked: float
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the published weights; a loss is the sum over its rows there, which λ sees."""
        config, [goal] = self.config, setup.ground.criteria
        assert config.case is not None
        times = len(goal.rows) if goal.loss else 1
        lam = planner.Infinite if config.lam is None else config.lam
        e, case, dual = analytic_weights(
            times * known.gains[0], known.utility, times * asked, lam, config.form, config.case
        )
        notes = {"case": case, "dual": list(dual), "norm": float(e.norm())}
        return torch.where(setup.fixed, -1.0, e), notes

    def _report(self, setup: Setup, plan: planner.Plan) -> dict[str, Any]:
        weights = self._weights(plan.e, setup.rows.index, setup.count)
        names = [one.name for one in setup.ground.criteria]
        report = told(setup.only(plan.kept), plan.course, plan.request)
        report |= {
            "left_out": list(compress(names, (~plan.kept).tolist())),
            "protocol": self.config.protocol,
            "noop": plan.noop,
            "shortfall": plan.shortfall,
            "shortfall_predicted": plan.shortfall_predicted,
            "weights_sha256": weights.sha256,
            "weights": planner.audit(plan.e, setup.rows.labels, setup.rows.group, setup.rows.index),
        }
        return {"plan": report}

    def _weights(self, e: Tensor, index: Tensor, count: int) -> Weights:
        eps = torch.zeros(count, dtype=torch.float64)
        eps[index] = e
        return Weights(eps, f"soft_weighted, solver {self.config.solver}")

    # -- the base

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return what the base method makes of the model by the planned weights."""
        base, config = self.base, self.config
        plan, whole = task.prepared
        setup = whole.only(plan.kept)
        target = config.target
        for number in range(config.max_base_runs):
            if number:
                target *= OVERSHOT
                plan = self._plan(whole, target, task.seed)
                task.stats.update(self._report(whole, plan))
            if not bool(plan.e.any()):
                return model
            e = self._realisable(setup, plan, base, task)
            if not bool(e.any()):
                task.stats["plan"]["noop"] = "empty_hard_set"
                return model
            weights = self._weights(e, setup.rows.index, setup.count)
            found, stats = task.delegate(base, model, weights)
            task.stats["base"] = {"method": base.name, **stats}
            beyond = self._realised(setup, plan, found, task)
            if not beyond:
                break
        task.stats["base_runs"] = number + 1
        return found

    def _realisable(
        self, setup: Setup, plan: planner.Plan, base: UnlearningMethod, task: UnlearningTask
    ) -> Tensor:
        """Return the weights as the base can honour them: as they are, or as a set.

        Raises:
            ConfigError: a threshold that no weight reaches.
        """
        soft = not bool(((plan.e == 0) | (plan.e == -1)).all())
        task.stats["realised"] = "soft" if soft and base.supports_weights else "hard"
        if base.supports_weights or not soft:
            return plan.e
        config, request = self.config, plan.request
        slopes = setup.ground.slopes(plan.course.start)
        slopes[:, :-1] *= request.sign.to(slopes)
        none = torch.zeros_like(plan.e)
        known = planner.effects(setup.objective, plan.course.start.theta, none, slopes, config)
        threshold = None if config.threshold == "match" else float(config.threshold)
        found = selection.harden(plan.e, known.gains.sum(dim=0), known.utility, threshold)
        if threshold is not None and found.size == 0:
            raise ConfigError(
                f"threshold: no weight is <= -{threshold}, so that the set for {base.name}, which "
                'knows sets only, is empty; use threshold "match"'
            )
        task.stats["hard_set"] = {
            "size": found.size,
            "threshold": found.threshold,
            "improvement": found.improvement,
            "utility": found.utility,
        }
        return found.e

    def _realised(
        self, setup: Setup, plan: planner.Plan, model: nn.Module, task: UnlearningTask
    ) -> bool:
        """Note what the base's model does on the validation rows; return whether it overshot."""
        rows = {"fit": setup.fit, "selection": setup.selection}
        logits = {
            name: engine.predict(model, part, device=task.accelerator).logits
            for name, part in rows.items()
            if part is not None
        }
        found = setup.measure(logits, model, task.accelerator)
        left = plan.request.remaining(torch.tensor(found["fit"]["f"], dtype=torch.float64))
        found["fit"]["missing"] = (left.clamp(min=0) / plan.request.size).tolist()
        task.stats["realised_values"] = found
        if self.config.max_base_runs == 1 or "selection" not in found:
            return False
        request, values = plan.request, found["selection"]
        loss = torch.tensor([one.loss and self.config.signed for one in setup.ground.criteria])
        zero = torch.where(loss, plan.course.start.u_selection or 0.0, request.zero)
        beyond = torch.tensor(values["f"], dtype=torch.float64) * request.sign - zero
        errors = torch.tensor(values["se"], dtype=torch.float64)
        limit = torch.maximum(2 * errors, self.config.tol * request.size)
        return bool((beyond < -limit).any())

    def diagnose(self, model: nn.Module, task: UnlearningTask) -> Mapping[str, Any]:
        """Return every goal's gap, its standard error, and what share of it can be removed."""
        setup = set_up(model, task, self.config)
        return setup.diagnosis(self._box, self.config)


def _text(value: Any) -> str:
    """Return a value of a setting as a file has it."""
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
