"""MU-Bench's own numbers under their own definitions, for the table beside the ranking.

Their target is chance accuracy on the forget set, not the retrained model, so they never enter the
ranking. Definitions: Cheng and Amiri, "MU-Bench: a multitask multimodal benchmark for machine
unlearning", arXiv 2406.14796, and its public code (2026-01).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import _arrays
from unsc_plugin.metrics._arrays import FloatArray
from unsc_plugin.metrics.accuracy import accuracy

# MU-Bench's table: accuracy of guessing, and test accuracy of its original checkpoints.
RANDOM_ACCURACY = {"cifar10": 0.1, "cifar100": 0.01, "imdb": 0.5, "ddi": 0.2}
ORIGINAL_DT = {
    "cifar10": {
        "resnet-34": 0.9676,
        "resnet-50": 0.9674,
        "swin-tiny": 0.9818,
        "swin-base": 0.991,
        "vit-base": 0.9899,
    },
    "cifar100": {
        "resnet-50": 0.8328,
        "swin-tiny": 0.8714,
        "swin-base": 0.9301,
        "vit-base": 0.922,
        "vit-large": 0.9356,
    },
    "imdb": {
        "bert-base": 0.88608,
        "bert-large": 0.89004,
        "roberta-base": 0.90164,
        "roberta-large": 0.9126,
        "electra-base": 0.90932,
    },
    "ddi": {
        "biobert": 0.945766,
        "pubmedbert-abstract": 0.952239,
        "pubmedbert-fulltext": 0.950665,
    },
}
_LENIENT_METHODS = frozenset({"neggrad", "grad_ascent"})
_CHUNK = 2**15  # doubles per temporary array: small enough to stay in the cache


def random_accuracy(dataset: str, classes: int) -> float:
    """Return MU-Bench's accuracy of guessing, or 1/K for a data set outside its table.

    >>> random_accuracy("ddi", 5), random_accuracy("digits", 10)
    (0.2, 0.1)
    """
    return RANDOM_ACCURACY.get(dataset, 1.0 / classes)


def table_orig_dt(dataset: str, backbone: str) -> float | None:
    """Return the original's test accuracy in MU-Bench's table, None where it has no entry."""
    return ORIGINAL_DT.get(dataset, {}).get(backbone)


def knowledge_gap(dr_accuracy: float, df_accuracy: float) -> float:
    """Return ½ + (dr − df)/2, in [0, 1]; higher: the forget set is known less.

    MU-Bench averages over random draws of |D_f| retained examples the ROC-AUC of "the prediction is
    right". For 0/1 scores an AUC is ½ + (difference of the means)/2, so the average of the draws
    converges to this value, which also exists when D_r is smaller than D_f.

    >>> round(knowledge_gap(0.9, 0.5), 9)
    0.7
    """
    return 0.5 + (dr_accuracy - df_accuracy) / 2.0


def zrf(logits: Any, *, seed: int, draws: int = 50) -> float:
    """Return 1 − mean over draws and rows of JS(softmax z_U, softmax v), v ~ U[0, 1)^K.

    JS in nats. Higher is MU-Bench's direction. The range depends on K: one-hot rows have 0.473 for
    K = 10 and 0.335 for K = 100, uniform rows 0.99. There is no untrained teacher in it: this is
    not the published ZRF. The v depend on the seed and on (B, K) only: with rows in one fixed order
    (by index) all models see the same v.

    Args:
        logits: of the forget set, (B, K).
        seed: of the draws (MU-Bench draws 500 times without a seed).
        draws: number of v per row.

    Raises:
        DataError: if `draws` is below 1.
    """
    z = _arrays.logits(logits, "mubench.zrf on forget")
    if draws < 1:
        raise DataError(f"mubench.zrf: expected at least one draw, got {draws}; use 50")
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // z.shape[1])
    total = 0.0
    for start in range(0, len(z), step):
        p = _arrays.softmax(z[start : start + step])
        total += sum(_js_to_noise(p, rng.random(p.shape)) for _ in range(draws))
        # Σ H(p)/2 does not depend on the draw, so it is taken once per row.
        total -= draws * 0.5 * _entropy_sum(p)
    return float(1.0 - total / (len(z) * draws))


def unlearn_overall(
    dt_accuracy: float, df_accuracy: float, *, orig_dt: float, random: float, method: str = ""
) -> float:
    """Return 2ab/(a + b), a = 1 − |dt − dt_O|, b = 1 − |df − r|, in [0, 1]; higher is better.

    0 if a + b = 0, if dt is more than 20 % (of dt_O) away from dt_O (40 % for the MU-Bench names
    `neggrad` and `grad_ascent`), or if df is more than 20 % (of r) below r.

    Args:
        dt_accuracy: test accuracy, a fraction.
        df_accuracy: forget accuracy, a fraction.
        orig_dt: test accuracy of the original model.
        random: accuracy of guessing, see :func:`random_accuracy`.
        method: MU-Bench's name of the method, if it has one.

    >>> round(unlearn_overall(0.985, 0.983, orig_dt=0.9899, random=0.1), 4)
    0.2094
    """
    tolerance = 0.4 if method in _LENIENT_METHODS else 0.2
    utility = 1.0 - abs(dt_accuracy - orig_dt)
    forgetting = 1.0 - abs(df_accuracy - random)
    lost = abs(dt_accuracy - orig_dt) > tolerance * orig_dt
    overshot = random - df_accuracy > 0.2 * random
    if lost or overshot or utility + forgetting == 0:
        return 0.0
    return 2.0 * utility * forgetting / (utility + forgetting)


def overall_v1(dt_accuracy: float, df_accuracy: float, gap: float | None = None) -> float:
    """Return (dt + (1 − df) + knowledge gap)/3, without D_r (dt + 1 − df)/2; higher is better.

    The formula of MU-Bench's first code; not comparable with :func:`unlearn_overall`.

    >>> overall_v1(0.5, 0.5), overall_v1(0.5, 0.5, 0.5)
    (0.5, 0.5)
    """
    parts = [dt_accuracy, 1.0 - df_accuracy]
    if gap is not None:
        parts.append(gap)
    return sum(parts) / len(parts)


def block(
    *,
    test: tuple[Any, Any],
    forget: tuple[Any, Any],
    retain: tuple[Any, Any] | None = None,
    orig_dt: float | None = None,
    dataset: str = "",
    method: str = "",
    seconds: float | None = None,
    seed: int,
) -> dict[str, float]:
    """Return the numbers `mubench.*` that can be computed from what is given.

    Without `retain` there is no dr_accuracy and no knowledge gap, without `orig_dt` no
    unlearn_overall_accuracy, without `seconds` no unlearn_time: absent, never filled.

    Args:
        test: logits (n_t, K) and labels (n_t,) of the whole test set.
        forget: logits and labels of the forget set.
        retain: logits and labels of the retain set.
        orig_dt: test accuracy of the original model.
        dataset: MU-Bench's name of the data set, for its accuracy of guessing.
        method: MU-Bench's name of the method, if it has one.
        seconds: preparation + unlearning; MU-Bench's own also holds evaluation and checkpointing.
        seed: of the draws of `zrf`.
    """
    dt = accuracy(*test, metric="mubench.dt_accuracy", split="test")
    df = accuracy(*forget, metric="mubench.df_accuracy", split="forget")
    numbers = {"dt_accuracy": dt, "df_accuracy": df}
    gap = None
    if retain is not None:
        dr = accuracy(*retain, metric="mubench.dr_accuracy", split="retain")
        gap = knowledge_gap(dr, df)
        numbers |= {"dr_accuracy": dr, "knowledge_gap": gap}
    numbers["zrf"] = zrf(forget[0], seed=seed)
    if orig_dt is not None:
        chance = random_accuracy(dataset, classes=np.shape(forget[0])[1])
        numbers["unlearn_overall_accuracy"] = unlearn_overall(
            dt, df, orig_dt=orig_dt, random=chance, method=method
        )
    numbers["overall_v1"] = overall_v1(dt, df, gap)
    if seconds is not None:
        numbers["unlearn_time"] = float(seconds)
    return {f"mubench.{name}": number for name, number in numbers.items()}


def _js_to_noise(p: FloatArray, v: FloatArray) -> float:
    """Return Σ over rows of H((p + q)/2) − H(q)/2 in nats, q = softmax v.

    With q = exp v / s its entropy is log s − Σ q v: no logarithm per entry is needed for it.
    """
    q = np.exp(v)
    size = q.sum(axis=1)
    q /= size[:, None]
    entropy_q = np.log(size).sum() - np.vdot(q, v)
    q += p
    q *= 0.5
    return float(np.vdot(q, np.log(q)) * -1.0 - 0.5 * entropy_q)


def _entropy_sum(p: FloatArray) -> float:
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    return float(-np.vdot(p, logs))
