"""Cost of the metric classes: the direct path against Arrow and against the bare function.

Prints seconds and ratios at 10,000 × 1,000 and 50,000 × 10 logits (targets: the direct path at
least 50 × faster than Arrow at 10,000 × 1,000, and at most 3 × the bare function), and MU-Bench's
two drawn metrics against the loops that define them (ZRF at 5,000 × 100: at most 1 s; knowledge
gap: at least 1,000 × faster). `--json` prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from unsc_plugin.metrics import Accuracy
from unsc_plugin.metrics.accuracy import accuracy
from unsc_plugin.metrics.mubench import knowledge_gap, zrf


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the best of `repeats`: the machine may be shared."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def classes_over_functions(rows: int, classes: int, repeats: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    given = {
        "predictions": rng.normal(size=(rows, classes)).astype(np.float32),
        "references": rng.integers(classes, size=rows),
    }
    metric = Accuracy()

    def through_arrow():
        metric.add_batch(**given)
        return metric.compute()

    if through_arrow() != metric.compute(**given):
        raise SystemExit("the two paths give different numbers")
    bare = seconds(lambda: accuracy(given["predictions"], given["references"]), repeats)
    direct = seconds(lambda: metric.compute(**given), repeats)
    arrow = seconds(through_arrow, 2)
    return {
        "function_s": bare,
        "direct_s": direct,
        "arrow_s": arrow,
        "arrow_over_direct": arrow / direct,
        "direct_over_function": direct / bare,
    }


def zrf_against_loop(rows: int, classes: int, draws: int) -> dict[str, float]:
    from scipy.spatial.distance import jensenshannon
    from scipy.special import softmax

    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(rows, classes))
    p = softmax(logits, axis=1)

    def one_draw():
        return (jensenshannon(p, softmax(rng.random(p.shape), axis=1), axis=1) ** 2).mean()

    ours = seconds(lambda: zrf(logits, seed=0), 3)
    loop = seconds(one_draw, 3) * draws
    return {"ours_s": ours, "loop_s": loop, "loop_over_ours": loop / ours}


def gap_against_loop(forget: int, retain: int, draws: int) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    known, kept = rng.random(forget) < 0.6, rng.random(retain) < 0.9
    member = np.repeat([1, 0], forget)

    def one_draw():
        return roc_auc_score(member, np.r_[rng.choice(kept, forget, replace=False), known])

    ours = seconds(lambda: knowledge_gap(kept.mean(), known.mean()), 20)
    loop = seconds(one_draw, 5) * draws
    return {"ours_s": ours, "loop_s": loop, "loop_over_ours": loop / ours}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the rows, for tests")
    options = parser.parse_args()
    scale = 100 if options.quick else 1
    result = {
        "accuracy 10000x1000": classes_over_functions(10_000 // scale, 1000, 7),
        "accuracy 50000x10": classes_over_functions(50_000 // scale, 10, 7),
        "zrf 5000x100": zrf_against_loop(5000 // scale, 100, 500),
        "knowledge_gap 1000 of 49000": gap_against_loop(1000 // scale, 49_000 // scale, 500),
    }
    if options.json:
        print(json.dumps(result))
        return
    for name, numbers in result.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()
