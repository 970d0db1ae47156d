"""Finding an input size at which an architecture runs: build it, run it, take the first success."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from unsc_plugin._backbones.classifier import Classifier
from unsc_plugin.errors import NotApplicable, UnscError
from unsc_plugin.spec import DataInfo

Size = tuple[int, int]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator inside the block and put it back afterwards; nothing else is touched.

    `torch.manual_seed` would also reseed the accelerators, whose state is not forked here.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def sizes(data: Sequence[int], step: int, native: Size) -> list[Size]:
    """Return sizes to try: the data's, rounded up to `step`, doubled up to `native`, then that.

    >>> sizes((8, 8), 32, (224, 224))
    [(32, 32), (64, 64), (128, 128), (224, 224)]
    >>> sizes((32, 32), 8, (28, 28))
    [(32, 32), (28, 28)]
    """
    height, width = (-(-side // step) * step for side in data[-2:])
    found: list[Size] = [(height, width)]
    while 2 * max(found[-1]) < max(native):
        found.append((2 * found[-1][0], 2 * found[-1][1]))
    return found if native in found else [*found, native]


def first_that_runs(
    attempts: Sequence[Callable[[], Classifier]],
    example: dict[str, Tensor],
    *,
    seed: int,
    what: str,
) -> Classifier:
    """Return the first classifier that can be built, run and checked on `example`.

    Every attempt starts from `seed`, so the weights do not depend on how many failed before it.
    Architectures refuse sizes in many ways (assertions, shapes, divisions by zero), hence the broad
    catch; errors that we raise ourselves about the request are final.

    Raises:
        NotApplicable: none of them runs; the message has the last reason.
        UnscError: whatever an attempt raised on purpose.
    """
    reason: Exception | None = None
    for attempt in attempts:
        try:
            with seeded(seed):
                model = attempt()
                model.check(example)
        except UnscError:
            raise
        except Exception as error:
            reason = error
        else:
            return model
    text = f"{type(reason).__name__}: {reason}".strip().splitlines()[0][:200]
    raise NotApplicable(
        f"{what}: expected an architecture that runs on this data, got {text}; "
        "set input_size or args of the backbone, or take another one"
    )


def image_example(info: DataInfo) -> dict[str, Tensor]:
    """Return two images of noise of the data's shape (call it inside :func:`seeded`)."""
    return {"pixel_values": torch.rand(2, *info.input_shape)}
