"""Gram matrices of a model on its data, per class, in memory and on disk.

An entry belongs to one model (the anchor) and one set of samples. A later request adds and
subtracts its matrices instead of reading data. On disk an entry is a folder of safetensors files
under `<cache>/grams/<key of model and settings>/<key of samples>`; a lineage record in the same
place says that an unlearned model lives on the entry of its anchor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unsc_plugin.errors import CacheMismatch, RequestError
from unsc_plugin.linalg import Gram
from unsc_plugin.spec import fingerprint

FORMAT = 1
"""Raised whenever an entry's meaning changes; part of every key."""

MANIFEST, LINEAGE, ANCHOR, SAMPLES = (
    "manifest.json",
    "lineage.json",
    "anchor.safetensors",
    "samples.safetensors",
)


@dataclass(frozen=True)
class Samples:
    """Rows of the training set: `index` int64 (n,) rising, and their `labels` (n,)."""

    index: Tensor
    labels: Tensor

    @classmethod
    def of(cls, *parts: tuple[Tensor, Tensor]) -> Samples:
        """Return the rows of all parts (index, labels), sorted by index."""
        index = torch.cat([part[0] for part in parts]).long()
        labels = torch.cat([part[1] for part in parts]).long()
        order = torch.argsort(index)
        return cls(index[order], labels[order])

    def __len__(self) -> int:
        return len(self.index)

    def without(self, index: Tensor) -> Samples:
        """Return the rows that are not in `index`."""
        kept = ~torch.isin(self.index, index)
        return Samples(self.index[kept], self.labels[kept])

    def counts(self, classes: int) -> Tensor:
        """Return the rows per class, int64 (classes,)."""
        return torch.bincount(self.labels, minlength=classes)

    @property
    def key(self) -> str:
        """SHA-256 of indices and labels."""
        digest = hashlib.sha256(self.index.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


@dataclass
class Moments:
    """Packed Gram matrices of one layer: `gram` [B, g, d(d+1)/2], `total` [B, g, d], `count` [B].

    B buckets; float64, counts int64; on the CPU.
    """

    gram: Tensor
    total: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, buckets: int, groups: int, d: int) -> Moments:
        """Return the moments of nothing."""
        return cls(
            torch.zeros(buckets, groups, d * (d + 1) // 2, dtype=torch.float64),
            torch.zeros(buckets, groups, d, dtype=torch.float64),
            torch.zeros(buckets, dtype=torch.int64),
        )

    def put(self, bucket: int, gram: Gram) -> None:
        """Store the Gram of a bucket."""
        self.gram[bucket] = gram.pack().cpu()
        self.total[bucket] = gram.total.cpu()
        self.count[bucket] = gram.count

    def at(self, bucket: int) -> Gram:
        """Return the Gram of a bucket."""
        return Gram.unpack(self.gram[bucket], self.total[bucket], int(self.count[bucket]))

    def energy(self) -> Tensor:
        """Return the trace of every bucket's Gram, summed over the groups [B]."""
        d = self.total.shape[-1]
        rows = torch.arange(d)
        diagonal = rows * d - rows * (rows - 1) // 2
        return self.gram[..., diagonal].sum((-2, -1))

    def plus(self, other: Moments) -> Moments:
        """Return the columns of both."""
        return Moments(self.gram + other.gram, self.total + other.total, self.count + other.count)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors as a file holds them."""
        return {"gram": self.gram, "sum": self.total, "count": self.count}


@dataclass
class Entry:
    """Gram matrices of an anchor on its samples.

    `moments` parameter -> Moments over all samples; `frozen` weights whose view did not hold;
    `drawn` the indices that were captured, None for all; `keep_padding` whether masked tokens
    count; `seconds` what the capture took; `folder` where it lies, None in memory.
    """

    samples: Samples
    moments: dict[str, Moments]
    frozen: dict[str, str]
    drawn: Tensor | None
    keep_padding: bool
    seconds: float
    folder: Path | None = None

    def captured(self, index: Tensor) -> Tensor:
        """Return which of the rows `index` are in the Gram matrices, bool."""
        if self.drawn is None:
            return torch.ones(len(index), dtype=torch.bool)
        return torch.isin(index, self.drawn)


@dataclass
class Known:
    """What is known about the data of a model: an anchor's entry and what has gone since.

    `gone` indices that earlier requests removed; `taken` their moments where a bucket lives on;
    `bounds` parameter -> sums of the earlier requests' drift bounds per bucket.
    """

    entry: Entry
    gone: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    taken: dict[str, Moments] = field(default_factory=dict)
    bounds: dict[str, list[float]] = field(default_factory=dict)
    anchored: bool = True

    @property
    def samples(self) -> Samples:
        """The rows that are left."""
        return self.entry.samples.without(self.gone)

    def gram(self, parameter: str, bucket: int) -> Gram:
        """Return a layer's Gram over the rows of a bucket that are left."""
        found = self.entry.moments[parameter].at(bucket)
        if parameter in self.taken:
            found.subtract(self.taken[parameter].at(bucket))
        return found


class Store:
    """The entries of one model and one set of capture settings.

    `key_parts` is everything a Gram depends on but the samples.
    """

    def __init__(self, cache: Path, key_parts: Mapping[str, Any]) -> None:
        self.root = cache / "grams"
        self.parts = {"format": FORMAT, **key_parts}
        self.home = self.root / fingerprint(self.parts)

    def sibling(self, model_sha256: str) -> Store:
        """Return the store of another model with the same settings."""
        parts = {k: v for k, v in self.parts.items() if k != "format"} | {"model": model_sha256}
        return Store(self.root.parent, parts)

    def find(self, samples: Samples | None, forget: Tensor) -> Known | None:
        """Return what is known about `samples`, or of any set that holds `forget` if None.

        Raises:
            CacheMismatch: a file that is not what was written.
            RequestError: several sets fit and no samples say which is meant.
        """
        if samples is not None:
            return self._read(self.home / samples.key)
        fitting = []
        for folder in sorted(self.home.glob("[!.]*")):
            found = self._read(folder)
            if found is not None and bool(torch.isin(forget, found.samples.index).all()):
                fitting.append(found)
        if len(fitting) > 1:
            raise RequestError(
                f"{self.home} holds {len(fitting)} sets of samples with these forget samples; give "
                "the retained rows once more, so that one of them is meant"
            )
        return fitting[0] if fitting else None

    def write(self, entry: Entry, anchor: Mapping[str, Tensor]) -> Entry:
        """Write an entry; one that is there already stays. Returns the entry with its folder."""
        folder = self.home / entry.samples.key
        if not (folder / MANIFEST).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # a lineage that is of no use any more
        return _write(self.home, self.parts, entry, anchor)

    def write_lineage(self, known: Known, samples: Samples) -> None:
        """Record that this store's model lives on the entry of `known`, with `samples` left."""
        folder = known.entry.folder
        if folder is None:
            return
        target = self.home / samples.key
        if not (target / MANIFEST).is_file():
            shutil.rmtree(target, ignore_errors=True)  # an earlier lineage, maybe of another entry
        with _new_folder(target) as scratch:
            held = {"gone": known.gone}
            for name, moments in known.taken.items():
                held |= {f"{name}|{key}": value for key, value in moments.tensors().items()}
            save_file(held, scratch / "taken.safetensors")
            lineage = {
                "entry": str(folder.relative_to(self.root)),
                "bounds": known.bounds,
                "sha256": {"taken.safetensors": _sha256(scratch / "taken.safetensors")},
            }
            _write_json(scratch / LINEAGE, lineage)

    def _read(self, folder: Path) -> Known | None:
        if (folder / MANIFEST).is_file():
            return Known(self._entry(folder))
        if not (folder / LINEAGE).is_file():
            return None
        lineage = _read_json(folder / LINEAGE)
        parent = self.root / lineage["entry"]
        if not (parent / MANIFEST).is_file():
            return None  # the entry was deleted; there is nothing to live on
        held = _verified(folder, lineage["sha256"])["taken.safetensors"]
        names = sorted({key.rpartition("|")[0] for key in held} - {""})
        taken = {
            name: Moments(held[f"{name}|gram"], held[f"{name}|sum"], held[f"{name}|count"])
            for name in names
        }
        return Known(self._entry(parent), held["gone"], taken, lineage["bounds"], anchored=False)

    def _entry(self, folder: Path) -> Entry:
        manifest = _read_json(folder / MANIFEST)
        hashes = {k: v for k, v in manifest["sha256"].items() if k != ANCHOR}
        files = _verified(folder, hashes)
        moments = {
            name: Moments(files[file]["gram"], files[file]["sum"], files[file]["count"])
            for name, file in manifest["layers"].items()
        }
        held = files[SAMPLES]
        return Entry(
            Samples(held["index"], held["labels"]),
            moments,
            manifest["frozen"],
            held.get("drawn"),
            manifest["keep_padding"],
            manifest["seconds"],
            folder,
        )


def _write(
    home: Path, parts: Mapping[str, Any], entry: Entry, anchor: Mapping[str, Tensor] | None
) -> Entry:
    names = {name: f"layer{at:03d}.safetensors" for at, name in enumerate(entry.moments)}
    with _new_folder(home / entry.samples.key) as scratch:
        for name, moments in entry.moments.items():
            save_file(moments.tensors(), scratch / names[name])
        held = {"index": entry.samples.index, "labels": entry.samples.labels}
        if entry.drawn is not None:
            held["drawn"] = entry.drawn
        save_file(held, scratch / SAMPLES)
        if anchor is not None:
            own = {name: tensor.cpu().contiguous().clone() for name, tensor in anchor.items()}
            save_file(own, scratch / ANCHOR)
        manifest = {
            "key": parts,
            "layers": names,
            "frozen": entry.frozen,
            "keep_padding": entry.keep_padding,
            "seconds": entry.seconds,
            "samples_per_class": torch.bincount(entry.samples.labels).tolist(),
            "sha256": {path.name: _sha256(path) for path in sorted(scratch.iterdir())},
        }
        _write_json(scratch / MANIFEST, manifest)
    return replace(entry, folder=home / entry.samples.key)


def rewrite(old: Entry, new: Entry) -> Entry:
    """Put `new`, of the same anchor, in the place of `old`, and return it with its folder."""
    if old.folder is None:
        return new
    target = old.folder.parent / new.samples.key
    if not (old.folder / MANIFEST).is_file():  # done already
        return replace(new, folder=target if (target / MANIFEST).is_file() else None)
    parts = _read_json(old.folder / MANIFEST)["key"]
    written = _write(old.folder.parent, parts, new, anchor_of(old))
    root = old.folder.parent.parent
    for record in root.glob(f"*/*/{LINEAGE}"):  # they hold statistics of what is forgotten
        if root / _read_json(record)["entry"] == old.folder:
            shutil.rmtree(record.parent)
    shutil.rmtree(old.folder)
    return written


def anchor_of(entry: Entry) -> dict[str, Tensor] | None:
    """Return the weights an entry belongs to, None where they were not kept.

    Raises:
        CacheMismatch: the file is not what was written.
    """
    if entry.folder is None or not (entry.folder / ANCHOR).is_file():
        return None
    manifest = _read_json(entry.folder / MANIFEST)
    return _verified(entry.folder, {ANCHOR: manifest["sha256"][ANCHOR]})[ANCHOR]


def drop_anchor(entry: Entry) -> None:
    """Delete the weights an entry belongs to; its Gram matrices stay."""
    if entry.folder is not None:
        (entry.folder / ANCHOR).unlink(missing_ok=True)


def bucket_map(classes: int, bytes_per_class: int, gib: float) -> list[int]:
    """Return the bucket of every class: its own while they fit in `gib`, else class mod B."""
    room = int(gib * 2**30 // max(bytes_per_class, 1))
    buckets = max(min(classes, room), 1)
    return [label % buckets for label in range(classes)]


def _verified(folder: Path, hashes: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, wanted in hashes.items():
        path = folder / name
        try:
            good = _sha256(path) == wanted
            found[name] = load_file(path) if good else {}
        except (OSError, SafetensorError):
            good = False
        if not good:
            raise CacheMismatch(
                f"{path}: expected the file with SHA-256 {wanted[:12]}..., found another or none; "
                f"delete {folder} to have it captured again"
            )
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CacheMismatch(
            f"{path}: expected the JSON that was written, found something else; delete "
            f"{path.parent} to have it captured again"
        ) from None


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes `target` whole or not at all; one that is there already wins.

    Raises:
        OSError: the folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # made private by mkdtemp
        if not target.exists():
            try:
                os.replace(scratch, target)
            except OSError:
                if not target.exists():  # or another process was first
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def weighted_classes(buckets: Sequence[int], retained: Tensor) -> dict[int, int]:
    """Return bucket -> number of its classes with retained rows, buckets with none left out."""
    found: dict[int, int] = {}
    for label, bucket in enumerate(buckets):
        if int(retained[label]):
            found[bucket] = found.get(bucket, 0) + 1
    return found
