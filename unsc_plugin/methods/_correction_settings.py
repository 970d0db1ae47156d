"""Settings that all methods share which correct a model towards a measured goal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unsc_plugin.errors import ConfigError
from unsc_plugin.influence import Curvature
from unsc_plugin.method import option
from unsc_plugin.methods._criteria import Goal


@dataclass(frozen=True)
class Attack:
    """The attack behind the criterion `robust`.

    `adaptive`: made anew for every model, within `budget` in the units of the inputs: standardised
    columns, pixels in [0, 1]; a step is 2.5·budget/steps. `reference_overshoot`, of protocol
    reference: 1.3 times the way to the boundary of the original, which must be linear in its
    inputs; without a budget, and the same points for every model.
    """

    kind: Literal["adaptive", "reference_overshoot"] = "adaptive"
    norm: Literal["linf", "l2"] = "linf"
    budget: float = 0.1
    steps: int = 10
    starts: int = 1


@dataclass(frozen=True)
class CorrectionConfig:
    """Goals, targets, rounds, scope and curvature of a correction."""

    goals: tuple[str | Goal, ...] = option(
        ("dp",), "what is to be corrected: criteria, or {criterion, groups, positive_class}",
        probe=("eop",),
    )  # fmt: skip
    target: float = option(
        0.5, "share t of every gap that is to go; 0 only beside forced deletions", low=0, high=1
    )
    step: float | None = option(
        None, "largest share of a gap per round; None: .25, of a loss .1", above=0, high=1,
        probe=0.05,
    )  # fmt: skip
    max_rounds: int = option(20, "most rounds", low=1, probe=1)
    tol: float = option(
        0.02, "a goal is reached this close, as a share of the gap", above=0, high=1, probe=0.4
    )
    trust_min: float = option(
        0.02, "trust radius at which the plan ends", above=0, high=1,
        inert="only a plan whose predictions fail gets there",
    )  # fmt: skip
    utility_slack: float = option(
        0.0, "predicted relative rise of the utility loss that is allowed", low=0, probe=0.5
    )
    utility_stop: float | None = option(
        0.05, "measured relative rise on the selection rows that ends the plan; None: never",
        low=0, probe=1e-9, inert="only where utility suffers",
    )  # fmt: skip
    min_z: float = option(2.0, "a gap of fewer standard errors is left alone", low=0, probe=1e6)
    scope: str = option(
        "head", "parameters that the plan may move: head, full, last:K", probe="full"
    )
    curvature: Literal["auto", "exact", "ggn_cg", "diag", "identity"] = option(
        "auto", "exact for linear heads, else matrix-free with conjugate gradients; ablations",
        choices=("auto", "exact", "ggn_cg", "diag", "identity"), probe="identity",
    )  # fmt: skip
    exact_max: int = option(
        8192, "most parameters for the exact curvature", low=1, inert="chooses between solvers"
    )
    ridge: float | Literal["recipe"] = option(
        "recipe", "μ of the sum objective; recipe: n × weight decay", low=0, probe=50.0
    )
    damping: float = option(
        1e-3, "λ of the matrix-free curvature, as a share of its mean diagonal", above=0,
        inert="only the matrix-free curvature has it",
    )  # fmt: skip
    cg_tol: float | None = option(
        None, "relative residual of the solves; None: 1e-6, in float64 1e-10", above=0,
        inert="only the matrix-free curvature has it", probe=1e-4,
    )  # fmt: skip
    cg_max_iter: int = option(
        200, "most steps of a solve", low=1, inert="only the matrix-free curvature has it"
    )
    fit_fraction: float = option(
        0.7, "share of the validation rows that the plan is fitted on; the rest selects",
        above=0, high=1,
    )  # fmt: skip
    attack: Attack = option(
        Attack(), "of the criterion robust", inert="only the criterion robust attacks",
        probe=Attack(budget=0.2),
    )  # fmt: skip
    strict: bool = option(
        False, "a request beyond what can be attained is an error",
        inert="changes an outcome into an error",
    )  # fmt: skip

    @property
    def wanted(self) -> tuple[Goal, ...]:
        """The goals, names as :class:`Goal`."""
        return tuple(Goal(one) if isinstance(one, str) else one for one in self.goals)

    @property
    def solver_settings(self) -> Curvature:
        """Return the settings of the curvature."""
        return Curvature(
            self.curvature, self.exact_max, self.damping, self.cg_tol, self.cg_max_iter
        )

    @property
    def published(self) -> bool:
        """Whether settings are allowed that are there only to repeat what was published."""
        return False

    def check_attack(self) -> None:
        """Refuse the published attack outside of the published protocol.

        Raises:
            ConfigError: it is asked for.
        """
        if self.attack.kind == "reference_overshoot" and not self.published:
            raise ConfigError(
                "attack: expected kind adaptive, got reference_overshoot, which is frozen and has "
                "no budget, so that it measures no robustness; it is there for soft_weighted with "
                "protocol reference only"
            )

    def check(self, *, fixed: bool) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ConfigError: no goal, a target of 0 with nothing fixed, a stop without its rows, or
                the published attack outside of its protocol.
        """
        self.check_attack()
        if not self.goals:
            raise ConfigError("goals: expected at least one, got none")
        if self.target == 0 and not fixed:
            raise ConfigError(
                "target: expected a share > 0 of the gap, got 0; 0 (no more unfair than before) is "
                "for requests that also delete a forget set"
            )
        if self.fit_fraction == 1 and self.utility_stop is not None:
            raise ConfigError(
                "fit_fraction: 1 leaves no selection rows, which utility_stop needs; set "
                "utility_stop to null, or a smaller fraction"
            )
