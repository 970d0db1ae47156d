"""Our models in torchunlearn's `BenchmarkSuite`, and its numbers under names that explain them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from unsc_plugin import own_data
from unsc_plugin.adapters._foreign import no_bytecode
from unsc_plugin.adapters._pairs import Positional, only_input
from unsc_plugin.adapters._torchunlearn_trainer import package
from unsc_plugin.method import Split, UnlearningTask
from unsc_plugin.models import Classifier
from unsc_plugin.rows import Loader
from unsc_plugin.runtime import quiet, sealed

NAMES = {
    "RA": ("retain_accuracy", 0.01),
    "FA": ("forget_accuracy", 0.01),
    "TA": ("test_accuracy", 0.01),
    "UG": ("tu_retain_gap", 0.01),
    "MIA_Efficiency": ("tu_nonmember_share", 1.0),
    "ZRF": ("tu_cosine", 1.0),
}
"""Their key -> our name, and what makes a fraction of their number."""

Row = dict[str, float | None]


@no_bytecode()
def to_benchmark_suite(
    models: Mapping[str, nn.Module],
    task: UnlearningTask,
    retrained: nn.Module | None = None,
    n_limit: int | None = None,
    *,
    test: Any,
) -> tuple[Any, dict[str, Row]]:
    """Measure `models` with torchunlearn; return its suite, and its numbers as fractions.

    `tu_retain_gap` is |retrained − model| in *retain* accuracy (only with `retrained`; they call it
    UG); `tu_nonmember_share` the share of forget rows that their attack takes for non-members,
    higher is more forgotten (their MIA_Efficiency, whose report says the opposite); `tu_cosine` the
    cosine of the logits with those of a re-initialised copy, mapped to [0, 1] (their ZRF, which is
    not the published one). None stands for a number that failed there and was dropped in silence.

    Args:
        models: name -> model; a `Classifier` is given its inputs by position.
        task: whose forget and retain rows are measured.
        retrained: the reference.
        n_limit: rows per split at most, rounded up to a batch; None: all (their default is 1,000).
        test: test rows, or anything that :func:`unsc_plugin.own_data.rows_of` reads.

    Raises:
        MissingOptional: torchunlearn is not there.
        NotApplicable: rows of several tensors.
    """
    known = task.guarded(frozenset({Split.FORGET, Split.RETAIN}), task.seed)
    rows = own_data.rows_of({"test": test}).parts["test"]
    test_loader = known.loader_over(rows, "test", train=False, shuffle=False)
    train = {title: known.loader(title.lower(), train=False) for title in ("Retain", "Forget")}  # type: ignore[arg-type]
    key = only_input(rows.gather([0]))
    reference = None if retrained is None else _plain(retrained, key)
    suite = package().BenchmarkSuite(
        {title: _Plain(loader, key) for title, loader in train.items()},
        {"Test": _Plain(test_loader, key)},
        retrained_model=reference,
        n_limit=n_limit,
    )
    wanted = [theirs for theirs in NAMES if theirs != "UG" or retrained is not None]
    found = {}
    for name, model in models.items():
        with sealed(task.seed), quiet(model), quiet(reference or model):
            numbers = suite.add(name, _plain(model, key), verbose=False)
        found[name] = {
            NAMES[theirs][0]: _fraction(numbers.get(theirs), NAMES[theirs][1]) for theirs in wanted
        }
    return suite, found


def _plain(model: nn.Module, key: str) -> nn.Module:
    return Positional(model, key) if isinstance(model, Classifier) else model


def _fraction(number: float | None, unit: float) -> float | None:
    return None if number is None else float(number) * unit


class _Plain:
    """The batches of a loader as (inputs, labels), as they are."""

    def __init__(self, loader: Loader, key: str) -> None:
        self.loader, self.key = loader, key

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        return ((batch.inputs[self.key], batch.labels) for batch in self.loader)
