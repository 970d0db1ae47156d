"""How a correction is measured: groups and robustness on the test rows, distance to the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.attacks import full_attack, open_space, perturbed, pgd
from unsc_plugin.errors import NotApplicable
from unsc_plugin.metrics import divergence, fairness
from unsc_plugin.metrics.robustness import robust_block, transfer_block
from unsc_plugin.rows import Batch, Rows
from unsc_plugin.spec import CorrectionSpec, derive

RESAMPLES = 1000
BATCH = 2048
ATTACKED = ("robust_acc", "robust_nll", "transfer_acc")

Perturbations = Sequence[Tensor]
"""δ of all rows of a split, one tensor per batch of :data:`BATCH` rows, on the CPU."""


def perturbations(
    model: nn.Module, rows: Rows, spec: CorrectionSpec, seed: int, device: Any = None
) -> Perturbations | None:
    """Return what PGD adds to the rows against this very model.

    Untargeted, every step taken, step 2.5·budget/steps; the best of `starts` starts, the first at
    the input itself. Every row has a seed of its own. None where the board does not attack, or the
    inputs cannot be attacked.
    """
    if spec.attack is None:
        return None
    attack = spec.attack
    cfg = full_attack(attack.norm, attack.budget, attack.steps, attack.starts)
    parts = []
    for batch in _batches(rows, device):
        seeds = [derive(seed, "attack", abs(int(index))) for index in batch.index]
        try:
            space = open_space(model, batch.inputs)
            found = pgd(model, batch.inputs, batch.labels, cfg, space=space, seeds=seeds)
        except NotApplicable:
            return None
        parts.append(found.delta.cpu())
    return parts


def perturbed_logits(
    model: nn.Module, rows: Rows, added: Perturbations, device: Any = None
) -> np.ndarray:
    """Return the logits of the rows with what was added to them, float32 (n, K)."""
    parts = []
    for batch, delta in zip(_batches(rows, device), added, strict=True):
        space = open_space(model, batch.inputs)
        with engine.quiet(model), torch.no_grad():
            logits = perturbed(model, batch.inputs, delta.to(space.x.device), space)
        parts.append(logits.float().cpu().numpy())
    return np.concatenate(parts)


def _batches(rows: Rows, device: Any) -> Iterator[Batch]:
    where = device.device if device is not None else torch.device("cpu")
    for start in range(0, len(rows), BATCH):
        yield rows.gather(torch.arange(start, min(start + BATCH, len(rows)))).to(where)


def robustness(
    model: nn.Module,
    rows: Rows,
    clean: np.ndarray,
    spec: CorrectionSpec,
    seed: int,
    device: Any,
    transferred: Perturbations | None = None,
) -> dict[str, float]:
    """Return robust accuracy and loss where the board attacks and the inputs can be attacked.

    And the accuracy under perturbations that were made against another model, if they are given.
    """
    own = perturbations(model, rows, spec, seed, device)
    if own is None:
        return {}
    found = robust_block(clean, perturbed_logits(model, rows, own, device), rows.labels)
    if transferred is not None:
        found |= transfer_block(perturbed_logits(model, rows, transferred, device), rows.labels)
    return found


def numbers(
    logits: np.ndarray, rows: Rows, spec: CorrectionSpec
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers of one model on the test rows, and why others are absent."""
    labels, group = rows.labels.numpy(), _group(rows)
    found = fairness.block(logits, labels, group, spec.positive_class)
    absent = fairness.missing(
        labels, group, num_classes=logits.shape[1], positive_class=spec.positive_class
    )
    return found, absent


def intervals(
    logits: np.ndarray, rows: Rows, spec: CorrectionSpec, seed: int, confidence: float
) -> dict[str, tuple[float, float]]:
    """Return bootstrap intervals of the numbers; equal rows and seed share their resamples."""
    return fairness.bootstrap(
        logits,
        rows.labels.numpy(),
        _group(rows),
        resamples=RESAMPLES,
        seed=seed,
        confidence=confidence,
        positive_class=spec.positive_class,
    )


def to_oracle(
    logits: np.ndarray, oracle: Sequence[np.ndarray], own: float | None, its: float | None
) -> dict[str, float]:
    """Return how far a model is from the one retrained with the same weights.

    `oracle_js` in bits, `oracle_agree` the share of equal answers, `oracle_gap_diff` the difference
    of the board's criterion.
    """
    found = {
        "oracle_js": divergence.js_to_pool(logits, oracle),
        "oracle_agree": 1.0 - divergence.disagree(logits, oracle),
    }
    if own is not None and its is not None:
        found["oracle_gap_diff"] = own - its
    return found


def _group(rows: Rows) -> np.ndarray | None:
    return None if rows.group is None else rows.group.numpy()
