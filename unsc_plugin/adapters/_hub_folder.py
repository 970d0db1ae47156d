"""A folder that appears whole, and only if what it holds gives the same logits when read again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unsc_plugin import models
from unsc_plugin.adapters import _hub_card
from unsc_plugin.adapters._hub_card import Card
from unsc_plugin.adapters._receipt import Receipt
from unsc_plugin.errors import ConfigError, RoundTripFailed, UnscError
from unsc_plugin.models import Classifier, Library


@contextlib.contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `directory`, which becomes it if the block ends well.

    Raises:
        ConfigError: `directory` exists, or cannot be written.
    """
    refuse_existing(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=directory.parent))
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error}") from None
    try:
        yield scratch
        for path in scratch.iterdir():
            path.chmod(0o755 if path.is_dir() else 0o644)
        scratch.chmod(0o755)  # made private by mkdtemp
        refuse_existing(directory)
        os.replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_existing(directory: Path) -> None:
    """Stop if there is something at `directory`.

    Raises:
        ConfigError: there is.
    """
    if directory.exists() or directory.is_symlink():
        raise ConfigError(
            f"{directory} exists and is never overwritten; give another folder or delete it"
        )


def fill(
    folder: Path,
    model: Classifier,
    card: Card,
    receipt: Receipt,
    inputs: Mapping[str, Tensor],
    tokenizer: Any = None,
) -> Library:
    """Write weights, model card and receipt into `folder`, and read the weights again.

    Raises:
        RoundTripFailed: they give other logits on `inputs`.
    """
    pixels = inputs.get("pixel_values")
    size = None if pixels is None else (int(pixels.shape[-2]), int(pixels.shape[-1]))
    library = models.save_native(model, folder, size=size, tokenizer=tokenizer)
    prepared = tokenizer is not None if model.modality == "text" else model.pixels is not None
    if size is not None and model.pixels is not None and model.pixels.size not in (None, size):
        card = dataclasses.replace(card, limits=(*card.limits, _resized(size, model.pixels.size)))
    text = _hub_card.render(card, receipt, library, prepared=prepared)
    (folder / "README.md").write_text(text, encoding="utf-8")
    tree = json.dumps(receipt.tree(), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "receipt.json").write_text(tree + "\n", encoding="utf-8")
    check_round_trip(folder, model, inputs)
    return library


def _resized(given: tuple[int, int], size: tuple[int, int]) -> str:
    sides = ["×".join(map(str, reversed(one))) for one in (given, size)]
    return (
        f"Images of {sides[0]} pixels are resized to {sides[1]}. This package does so in floating "
        "point, other libraries round to 8 bits: their logits then differ a little."
    )


def check_round_trip(folder: Path, model: Classifier, inputs: Mapping[str, Tensor]) -> None:
    """Read `folder` by its own library, and by ours, and compare the logits bit by bit.

    Raises:
        RoundTripFailed: a reader fails, or gives other logits than `model`.
    """
    expected = _logits(model, inputs)
    readers: dict[str, Callable[[], Classifier]] = {
        models.library_of(model): lambda: models.load_native(folder, model)
    }
    if model.origin is not None:
        readers["unsc_plugin"] = lambda: models.load_model(folder)
    for name, read in readers.items():
        try:
            found = _logits(read(), inputs)
        except (UnscError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RoundTripFailed(
                f"the exported model cannot be read again by {name}: {reason}; nothing was kept. "
                "Export a model whose architecture that library can build"
            ) from error
        if not torch.equal(expected, found):
            far = float((expected - found).abs().max()) if expected.shape == found.shape else None
            raise RoundTripFailed(
                f"expected the same logits from the exported model, read by {name}, on "
                f"{len(expected)} rows; they differ by up to {far}; nothing was kept"
            )


def _logits(model: Classifier, inputs: Mapping[str, Tensor]) -> Tensor:
    place = next(iter(model.parameters())).device
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(**{key: value.to(place) for key, value in inputs.items()})
    finally:
        for part, training in modes:
            part.training = training
    return logits.cpu()


def sha256_of(folder: Path) -> dict[str, str]:
    """Return path -> SHA-256 of every file in `folder`."""
    found = {}
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = digest
    return found
