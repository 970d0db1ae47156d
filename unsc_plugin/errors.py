"""Every error that a user can cause, with the exit code the command line gives it.

A message has one line for what happened (expected and found) and one for what to do. `exit_code`
follows the table of the command line: 1 ran but failed, 2 usage, 3 something optional is missing,
4 version outside a supported window.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnscError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 2


class ConfigError(UnscError, ValueError):
    """A file or a setting does not have the form it must have."""


class DataError(UnscError, ValueError):
    """Data that cannot be used as asked."""


class ForgetSetError(DataError):
    """A forget set that is empty, too large, out of range or malformed."""


class RequestError(ForgetSetError):
    """A request that cannot be served: no class is left, or data it needs are not there."""


class RowOrderMismatch(ForgetSetError):
    """An index list made for another order of the rows."""


class DuplicateName(UnscError, ValueError):
    """Two origins registered one name."""


class BrokenPlugin(UnscError, ImportError):
    """A registered target that cannot be imported."""


class ScenarioNotSupported(UnscError, ValueError):
    """The method does not declare the scenario it is asked to run."""


class WeightsNotSupported(UnscError, ValueError):
    """Soft per-sample weights were given to a method that only knows sets."""


class SplitAccessError(UnscError, RuntimeError):
    """A method opened a split that it did not declare in `needs`."""


class NotApplicable(UnscError, ValueError):
    """The method has no meaning for this model or data; raised before anything changes."""


class InputDomainError(DataError):
    """Inputs that are not in the units they must be in, such as pixels outside [0, 1]."""


class NoFreeDirections(NotApplicable):
    """No layer has a direction that the retained data leave free."""


class GramMismatch(UnscError, ValueError):
    """Stored Gram matrices that belong to another model or to other data."""


class UnsupportedDistributed(UnscError, RuntimeError):
    """Weights are split over processes where every process must hold them whole."""


class ArchitectureChanged(UnscError, RuntimeError):
    """A method returned a model whose state has other names, shapes or dtypes."""


class FrozenChanged(UnscError, RuntimeError):
    """A method changed weights that it had promised to leave alone."""


class CheckpointError(UnscError, ValueError):
    """Weights on disk that are truncated, unsafe or of another model."""


class RoundTripFailed(CheckpointError):
    """An exported model that gives other logits when it is read again; nothing was kept."""

    exit_code = 1


class RecordError(UnscError, ValueError):
    """A record that is corrupted, incomplete or duplicated."""


class CacheMismatch(UnscError, ValueError):
    """A cached file whose hash is not the one written beside it."""


class MissingOptional(UnscError, RuntimeError):
    """An optional package, checkout, data folder or network is not there."""

    exit_code = 3


class VersionWindow(UnscError, RuntimeError):
    """An installed version lies outside the supported window."""

    exit_code = 4


class DivergedError(UnscError, ArithmeticError):
    """A loss, a weight or a logit stopped being finite."""

    exit_code = 1

    def __init__(self, message: str, *, step: int | None = None, loss: float | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.loss = loss


class AttackFailed(UnscError, RuntimeError):
    """No adversarial example reached its target, so that there is nothing to train on."""

    exit_code = 1


class NumericalError(UnscError, ArithmeticError):
    """A computation that did not succeed: no factorisation, no convergence, not finite."""

    exit_code = 1


class InfeasibleError(UnscError, ValueError):
    """No point satisfies the constraints that were asked for."""

    exit_code = 1


class NonFiniteError(DivergedError):
    """Activations or logits of the given model that are not finite."""


class UnknownName(UnscError, LookupError):
    """A name that no registry holds; the message lists the nearest ones.

    >>> print(UnknownName("method", "finetun", ["finetune", "neggrad"]))
    unknown method 'finetun'; did you mean 'finetune'?
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name = kind, name
        self.nearest = nearest(name, known)
        message = f"unknown {kind} {name!r}"
        if self.nearest:
            message += "; did you mean " + " or ".join(repr(n) for n in self.nearest) + "?"
        super().__init__(message + (f"\n{hint}" if hint else ""))


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` known names that look like `name`, best first."""
    return difflib.get_close_matches(name, sorted(set(known)), n=count, cutoff=0.5)
