"""The score S: 1 for retraining, about 0 for an untouched, a collapsed or a masked model.

For a forget draw d and the admitted components M, with ḡ the mean gap over train seeds,

    a_m = clip(1 − max(0, ḡ_m(U) − ḡ_m(R_B)) / (ḡ_m(O) − ḡ_m(R_B)), a_min, 1)
    u   = Π over utility accuracies of min(1, mean acc_U / mean acc_{R_A})
    S_d = (1 − q) · u · (Π_m a_m)^(1/|M|)

q is the share of units that failed or diverged. S of a scenario is the mean over admitted draws.
The module also decides what may be ranked at all: admission of components and draws, eligibility
of entries, and the health of a board.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

COMPONENTS = ("J", "P", "L", "H", "C")
CONTROLS = (
    "original",
    "random_init",
    "neggrad.diverged",
    "bad_teaching.streisand",
    "noise",
    "logit_mask",
)
CLASS_KINDS = frozenset({"class", "subclass"})

MIN_SEEDS, MIN_DRAWS, MIN_POOL, GOLD_SEEDS = 5, 2, 5, 64
TIMED_FROM_SECONDS = 60.0
RANKED_TRACKS = ("default", "budgeted")
LEAST_RETRAIN, MOST_ORIGINAL, MOST_CONTROL = 0.98, 0.05, 0.25


class Kind(NamedTuple):
    """What a kind of scenario scores: components and utility accuracies."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    utility: tuple[str, ...]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "instance": Kind(("J", "P"), ("L",), ("acc_retain", "acc_test")),
        "class": Kind(("J", "H"), ("L",), ("acc_retain", "acc_test_retained")),
        "subclass": Kind(("J", "H"), ("L", "P"), ("acc_retain", "acc_test_retained")),
        "sequence": Kind(("J", "P"), ("L",), ("acc_retain", "acc_test")),
        "corrective": Kind(("J", "C"), (), ("acc_retain",)),
        "weighted": Kind(("J", "C"), (), ("acc_test",)),
    }
)


def component_metrics(kind: str, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the metric that each component of a kind reads, required ones first.

    Args:
        kind: a key of `KINDS`.
        names: component to metric, where a board measures another one (its criterion for C).

    Raises:
        ValueError: for an unknown kind or component.

    >>> component_metrics("class")
    {'J': 'js_forget', 'H': 'gap_probe5', 'L': 'gap_relearn'}
    """
    if kind not in KINDS:
        raise ValueError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}; correct the board")
    if unknown := sorted(set(names or {}) - set(COMPONENTS)):
        raise ValueError(f"expected components of {', '.join(COMPONENTS)}, got {unknown[0]!r}")
    # Without a forget set that both models can be asked about, J is read on the test set.
    on_test = kind in {"corrective", "weighted"}
    metrics = {
        "J": "js_test" if on_test else "js_forget",
        "P": "gap_umia_auc",
        "L": "gap_relearn",
        "H": "gap_probe5",
        "C": "gap_criterion",
        **(names or {}),
    }
    return {name: metrics[name] for name in (*KINDS[kind].required, *KINDS[kind].optional)}


# --------------------------------------------------------------------------- admission


class AdmissionTest(NamedTuple):
    """Whether original and retrained models can be told apart, elementwise over trailing axes."""

    original: Array
    floor: Array
    separation: Array
    admitted: NDArray[np.bool_]


def admission(original: ArrayLike, floor: ArrayLike, z: float = 3.0) -> AdmissionTest:
    """Test ḡ(O) − ḡ(R_B) > z · √(var_O/n + var_{R_B}/n), and > 0.

    Args:
        original: (n, ...) gaps of the originals, one row per train seed.
        floor: (n, ...) gaps of the retrained models R_B, measured against R_A.
        z: standard errors of separation that are asked for.

    Returns:
        Means, separation in standard errors and verdicts, of the trailing shape. A missing gap or
        a single seed gives separation NaN and is not admitted.

    >>> admission([0.30, 0.31, 0.29], [0.10, 0.11, 0.09]).admitted.item()
    True
    """
    first, second = np.asarray(original, dtype=np.float64), np.asarray(floor, dtype=np.float64)
    n = first.shape[0]
    means = first.mean(axis=0), second.mean(axis=0)
    difference = means[0] - means[1]
    if n < 2:
        separation = np.full_like(difference, np.nan)
    else:
        error = np.sqrt((first.var(axis=0, ddof=1) + second.var(axis=0, ddof=1)) / n)
        with np.errstate(divide="ignore", invalid="ignore"):
            separation = np.asarray(difference / error)
    return AdmissionTest(*means, separation, (separation > z) & (difference > 0))


class ComponentTest(NamedTuple):
    """One line of the admission table."""

    component: str
    metric: str
    draw: int
    required: bool
    original: float
    floor: float
    separation: float
    admitted: bool


@dataclass(frozen=True)
class Admission:
    """What of a scenario is scored, decided from original and retrained models alone.

    `components` is M, the same for every draw in `draws`; `reason` says why the scenario is not
    ranked and is None where it is.
    """

    tests: tuple[ComponentTest, ...]
    components: tuple[str, ...]
    draws: tuple[int, ...]
    reason: str | None

    @property
    def ranked(self) -> bool:
        """Whether the scenario counts."""
        return self.reason is None


def admit(
    kind: str,
    original: Mapping[str, Array],
    floor: Mapping[str, Array],
    *,
    z: float = 3.0,
    names: Mapping[str, str] | None = None,
) -> Admission:
    """Admit draws and components of one scenario.

    A draw needs every required component of its kind. An optional component joins only if it is
    admitted in every admitted draw. A scenario needs two admitted draws (one from 64 seeds on).

    Args:
        kind: of the scenario.
        original: metric to (n, n_d) gaps of the originals; NaN or no key where absent.
        floor: the same of R_B.
        z: passed to :func:`admission`.
        names: passed to :func:`component_metrics`.
    """
    wanted = component_metrics(kind, names)
    required = KINDS[kind].required
    tests: list[ComponentTest] = []
    verdicts: dict[str, NDArray[np.bool_]] = {}
    for component, metric in wanted.items():
        if metric not in original or metric not in floor:
            continue
        result = admission(original[metric], floor[metric], z)
        verdicts[component] = result.admitted
        for draw in range(result.admitted.size):
            means = float(result.original[draw]), float(result.floor[draw])
            separation, passed = float(result.separation[draw]), bool(result.admitted[draw])
            need = component in required
            tests.append(ComponentTest(component, metric, draw, need, *means, separation, passed))
    if absent := [wanted[name] for name in required if name not in verdicts]:
        unmeasured = f"{', '.join(absent)} not measured for original and retrain"
        return Admission(tuple(tests), (), (), unmeasured)
    everywhere = np.all([verdicts[name] for name in required], axis=0)
    draws = tuple(int(d) for d in np.nonzero(everywhere)[0])
    components = tuple(
        name for name, verdict in verdicts.items() if draws and verdict[list(draws)].all()
    )
    seeds = next(iter(original.values())).shape[0]
    least = 1 if seeds >= GOLD_SEEDS else MIN_DRAWS
    reason = None
    if len(draws) < least:
        reason = (
            "uninformative: original not separable from retrained "
            f"({len(draws)} of {everywhere.size} draws admitted, {least} needed)"
        )
    return Admission(tuple(tests), components, draws, reason)


# --------------------------------------------------------------------------- the score


@dataclass(frozen=True)
class Gaps:
    """The numbers that S reads, of E entries at n seeds, D admitted draws, M components.

    Attributes:
        entries: (E, n, D, M) gaps; NaN where a unit is not finished.
        accuracies: (E, n, D, A) utility accuracies; NaN where a unit is not finished.
        finished: (E, n, D) False where a unit failed or diverged.
        original: (n, D, M) gaps of O.
        floor: (n, D, M) gaps of R_B.
        reference: (D, A) utility accuracies of R_A.
    """

    entries: Array
    accuracies: Array
    finished: NDArray[np.bool_]
    original: Array
    floor: Array
    reference: Array


@dataclass(frozen=True)
class Scores:
    """S_d and its factors for B weightings of the seeds: (B, E, D), components (B, E, D, M).

    Factors are NaN where no unit is finished; S is 0 there. A finished unit without one of the
    numbers makes factors and S NaN: absent is not 0.
    """

    score: Array
    components: Array
    utility: Array
    failed: Array
    closeness: Array


def draw_scores(
    gaps: Gaps,
    weights: ArrayLike | None = None,
    *,
    exponents: Sequence[float] | None = None,
    a_min: float = 0.01,
) -> Scores:
    """Compute S_d of every entry and draw, for many weightings of the train seeds at once.

    The seeds of U, O and R_B are weighted together. Where a weighting leaves less than a quarter of
    the full-sample ḡ(O) − ḡ(R_B), that quarter is the denominator.

    Args:
        gaps: the numbers of one scenario.
        weights: (B, n) shares of the seeds, rows summing to 1; None weighs all seeds alike once.
        exponents: (M,) weights of the components in the geometric mean; None for equal ones.
        a_min: lower clip of a component.

    Returns:
        Scores with B = 1 for `weights=None`.

    Raises:
        ValueError: if the exponents do not fit the components.
    """
    n, count = gaps.original.shape[0], gaps.original.shape[-1]
    alpha = np.ones(count) if exponents is None else np.asarray(exponents, dtype=np.float64)
    if alpha.shape != (count,) or alpha.min() < 0 or alpha.sum() == 0:
        raise ValueError(
            f"expected {count} exponents >= 0 that are not all 0, got {alpha.tolist()}; "
            "correct the weights of the board"
        )
    even = np.full((1, n), 1 / n)
    shares = even if weights is None else np.asarray(weights, dtype=np.float64)
    span = _mean(shares, gaps.original - gaps.floor)
    span = np.maximum(span, _mean(even, gaps.original - gaps.floor) / 4)
    floor = _mean(shares, gaps.floor)
    excess = _finished_mean(shares, gaps.entries, gaps.finished) - floor[:, None]
    a = np.clip(1 - np.maximum(excess, 0) / span[:, None], a_min, 1)
    accuracy = _finished_mean(shares, gaps.accuracies, gaps.finished)
    # A reference accuracy of 0 cannot be fallen short of.
    worthless = gaps.reference == 0
    ratio = np.where(worthless, 1.0, accuracy / np.where(worthless, 1.0, gaps.reference))
    u = np.minimum(ratio, 1).prod(axis=-1)
    closeness = np.exp(np.log(a) @ (alpha / alpha.sum()))
    alive = _mean(shares, np.moveaxis(gaps.finished.astype(np.float64), 0, 1))
    score = np.where(alive > 0, alive * u * closeness, 0.0)
    return Scores(score, a, u, 1 - alive, closeness)


def scenario_statistic(
    gaps: Gaps, *, exponents: Sequence[float] | None = None, a_min: float = 0.01
) -> Callable[[Array, Array], Array]:
    """Return the function of (B, n) seed and (B, D) draw weights that gives (B, E) scores."""

    def statistic(seed_weights: Array, draw_weights: Array) -> Array:
        scores = draw_scores(gaps, seed_weights, exponents=exponents, a_min=a_min).score
        return np.asarray(np.einsum("bed,bd->be", scores, draw_weights))

    return statistic


def _mean(shares: Array, values: Array) -> Array:
    """(B, n) shares and (n, ...) values to (B, ...)."""
    return np.tensordot(shares, values, axes=1)


def _finished_mean(shares: Array, values: Array, finished: NDArray[np.bool_]) -> Array:
    """Mean over the finished seeds: (B, n), (E, n, D, X), (E, n, D) to (B, E, D, X)."""
    kept = np.where(finished[..., None], values, 0.0)
    mass = _mean(shares, np.moveaxis(finished.astype(np.float64), 0, 1))[..., None]
    with np.errstate(invalid="ignore"):
        return _mean(shares, np.moveaxis(kept, 0, 1)) / mass


# --------------------------------------------------------------------------- eligibility, health


class CostRatios(NamedTuple):
    """Cost of an entry over retraining in one scenario; None where it was not measured."""

    scenario: str
    work: float | None
    time: float | None
    retrain_seconds: float | None


@dataclass(frozen=True)
class Candidate:
    """What decides whether an entry gets a rank.

    Attributes:
        checks: names of conformance checks that fail without a stated reason; None: never checked.
        absent: units or numbers that the admitted scenarios lack, in words.
        seeds: n of the board.
        draws: n_d of the board.
        pool: n_A, the smallest pool that a unit was measured against.
        costs: one item per admitted scenario.
        track: default, budgeted or oracle.
        foreign: why some of its records are not runs of the board's own units, in words.
    """

    checks: Sequence[str] | None
    absent: Sequence[str]
    seeds: int
    draws: int
    pool: int
    costs: Sequence[CostRatios]
    track: str
    foreign: Sequence[str] = ()


def eligibility(candidate: Candidate, *, cost_gate: float = 0.2) -> list[str]:
    """Return the reasons that keep an entry from being ranked; empty if it may be ranked."""
    reasons = []
    if candidate.checks is None:
        reasons.append("conformance not checked (run `unsc check`)")
    elif candidate.checks:
        reasons.append("fails checks: " + ", ".join(candidate.checks))
    reasons += candidate.absent
    draws = 1 if candidate.seeds >= GOLD_SEEDS else MIN_DRAWS
    sizes = (
        ("train seeds", candidate.seeds, MIN_SEEDS),
        ("draws", candidate.draws, draws),
        ("retrained models in the pool", candidate.pool, MIN_POOL),
    )
    reasons += [f"{got} {what}, {least} needed" for what, got, least in sizes if got < least]
    for cost in candidate.costs:
        reasons += _cost_reasons(cost, cost_gate)
    if candidate.track not in RANKED_TRACKS:
        reasons.append(f"track {candidate.track} is never ranked")
    return reasons + list(candidate.foreign)


def _cost_reasons(cost: CostRatios, gate: float) -> list[str]:
    reasons = []
    if cost.work is None:
        reasons.append(f"{cost.scenario}: work ratio not measured")
    elif cost.work > gate:
        reasons.append(f"{cost.scenario}: work ratio {cost.work:.3g} above {gate:g}")
    # Below a minute of retraining, start-up dominates the clock, so time is shown but not gated.
    if (cost.retrain_seconds or 0.0) >= TIMED_FROM_SECONDS:
        if cost.time is None:
            reasons.append(f"{cost.scenario}: time ratio not measured on the retraining's device")
        elif cost.time > gate:
            reasons.append(f"{cost.scenario}: time ratio {cost.time:.3g} above {gate:g}")
    return reasons


@dataclass(frozen=True)
class Health:
    """What is wrong with a board (it then shows no ranks), and what could not be looked at."""

    failures: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether ranks may be shown."""
        return not self.failures


def board_health(
    scores: Mapping[str, float],
    tiers: Mapping[str, int] | None = None,
    *,
    class_kinds: bool = False,
) -> Health:
    """Judge a board by its reference and its negative controls.

    S(retrain) ≥ 0.98, S(original) ≤ 0.05, every other control ≤ 0.25, no control in the first tier.

    Args:
        scores: global S of retrain and of the controls that have one.
        tiers: tier of each control when it is ranked together with the eligible entries.
        class_kinds: whether a class-wise scenario counts, so that `logit_mask` belongs here.

    >>> board_health({"retrain": 0.99, "original": 0.30}).failures
    ('original scores 0.300, expected at most 0.05',)
    """
    failures, notes = [], []
    if "retrain" not in scores:
        notes.append("retrain has no score on this board")
    elif not scores["retrain"] >= LEAST_RETRAIN:
        failures.append(
            f"retrain scores {scores['retrain']:.3f}, expected at least {LEAST_RETRAIN}"
        )
    for control in CONTROLS:
        if control == "logit_mask" and not class_kinds:
            continue
        most = MOST_ORIGINAL if control == "original" else MOST_CONTROL
        if control not in scores or math.isnan(scores[control]):
            notes.append(f"control {control} has no score on this board")
        elif scores[control] > most:
            failures.append(f"{control} scores {scores[control]:.3f}, expected at most {most}")
        if (tiers or {}).get(control) == 1:
            failures.append(f"control {control} stands in the first tier")
    return Health(tuple(failures), tuple(notes))
