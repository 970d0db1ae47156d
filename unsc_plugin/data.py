"""A name becomes three splits: read, labels checked and hashed, carved, encoded.

Nothing here depends on the seed of a run: splits and label noise are drawn with fixed seeds, so
that all runs on one data set see the same rows. The only module that opens `datasets`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unsc_plugin._data.biased import biased_draws as biased_draws  # part of the public face
from unsc_plugin._data.biased import colour_patch as colour_patch
from unsc_plugin._data.columns import guess_columns, read_part
from unsc_plugin._data.groups import group_codes
from unsc_plugin._data.images import IN_MEMORY_BYTES, ImageDecoder, PixelFormat
from unsc_plugin._data.pieces import Piece, arrange, class_codes, with_noise
from unsc_plugin._data.sources import Part, Source, read_sklearn
from unsc_plugin._data.synthetic import read_synthetic
from unsc_plugin._data.tables import TableEncoder
from unsc_plugin._data.text import describe, encode, train_words
from unsc_plugin.errors import DataError, MissingOptional, RowOrderMismatch, UnknownName
from unsc_plugin.rows import Rows
from unsc_plugin.spec import DataInfo, DatasetEntry, canonical_json, parse_settings

DECODE_WORKERS = 2

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SPLIT_WORDS: dict[Literal["train", "val", "test"], tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Splits:
    """A data set ready for a backbone.

    `train.index` is the position in the original training split (before validation rows were
    carved from it); validation rows count -1, -2, ..., test rows -1-10⁹, -2-10⁹, ... `tokenizer` is
    the one that made the token ids (None for other data). `extra` holds the sub-label columns and
    the group column as text; in train, where labels are noisy, also `mislabelled` (yes or no).
    """

    train: Rows
    val: Rows
    test: Rows
    info: DataInfo
    tokenizer: Any = None


def expand_path(text: str, data_dir: Path | None = None) -> Path:
    """Return `text` as a path, `${NAME}` replaced; `data_dir` stands in for `${UNSC_DATA_DIR}`.

    Raises:
        MissingOptional: a variable that is not set.
    """
    known = dict(os.environ) | ({"UNSC_DATA_DIR": str(data_dir)} if data_dir else {})

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not known.get(name):
            hint = " or give --data-dir" if name == "UNSC_DATA_DIR" else ""
            raise MissingOptional(
                f"{text}: ${name} is not set\nset {name} to the folder that holds these files{hint}"
            )
        return known[name]

    return Path(re.sub(r"\$\{(\w+)\}", value, text)).expanduser()


# --------------------------------------------------------------------------- names


def resolve(name: str, registry_entries: Mapping[str, DatasetEntry]) -> tuple[str, DatasetEntry]:
    """Return the canonical name and the entry of a registered name, hub id or local folder.

    `NAME?key=value&key=value` is a registered name with other arguments in its `args`; in the
    canonical name they are sorted, and those that the entry has anyway are left out.

    `hub:<org>/<id>` (or `<org>/<id>`), `parquet:<folder, file or glob>` (or the path of a folder)
    need no registration: splits come from the file or split names, columns from the features. An
    image column makes it an image set; a text column with a telling name, or alone beside the
    label, a text set; anything else is a table.

    Raises:
        UnknownName: nothing has this name.
        MissingOptional: a path that does not exist, or a hub id that cannot be reached.
        DataError: no valid hub id, or columns that cannot be guessed.
        ConfigError: something behind `?` that is not key=value.
    """
    base, _, query = name.partition("?")
    if base in registry_entries:
        return _with_args(base, registry_entries[base], parse_settings(query, base))
    scheme, colon, rest = name.partition(":")
    if colon and scheme == "hub":
        return name, _guess_hub(rest)
    if colon and scheme == "parquet":
        return name, _guess_parquet(rest)
    if name.startswith((".", "/", "~", "${")) or Path(name).is_dir():
        return f"parquet:{name}", _guess_parquet(name)
    if name.count("/") == 1:
        return f"hub:{name}", _guess_hub(name)
    raise UnknownName(
        "data set",
        base,
        registry_entries,
        "see `unsc list datasets`, or give hub:<org>/<id>, or a folder of Parquet files",
    )


def _with_args(name: str, entry: DatasetEntry, args: Mapping[str, Any]) -> tuple[str, DatasetEntry]:
    changed = {key: args[key] for key in sorted(args) if args[key] != entry.args.get(key)}
    if not changed:
        return name, entry
    words = "&".join(f"{key}={canonical_json(value)}" for key, value in changed.items())
    return f"{name}?{words}", entry.model_copy(update={"args": {**entry.args, **changed}})


def _guess_hub(name: str) -> DatasetEntry:
    _check_hub_id(name)
    import datasets

    try:
        builder = datasets.load_dataset_builder(name)
        features, names = builder.info.features, list(builder.info.splits or ())
        if not features or not names:
            loaded = datasets.load_dataset(name)
            features, names = next(iter(loaded.values())).features, list(loaded)
    except (OSError, ValueError) as error:
        raise _hub_error(name, error) from None
    splits = {split: found[0] for split, found in _by_split(names).items()}
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    return DatasetEntry(source="hub", id=name, splits=dict(splits), **guess_columns(features, name))


def _guess_parquet(text: str) -> DatasetEntry:
    place = expand_path(text)
    folder = place if place.is_dir() else place.parent
    files = sorted(place.glob("*.parquet") if place.is_dir() else folder.glob(place.name))
    if not files:
        raise MissingOptional(
            f"{place}: no Parquet file there\ngive a folder with train*.parquet, a file or a glob"
        )
    features = _read_parquet(files[:1]).features
    splits = {split: tuple(found) for split, found in _by_split([f.name for f in files]).items()}
    return DatasetEntry(
        source="parquet", path=str(folder), splits=dict(splits), **guess_columns(features, text)
    )


def _by_split(names: Sequence[str]) -> dict[Literal["train", "val", "test"], list[str]]:
    """Sort split or file names under train, val and test; no telling name: all are train."""
    found: dict[Literal["train", "val", "test"], list[str]] = {}
    for split, words in _SPLIT_WORDS.items():
        pattern = re.compile(rf"(^|[-_.])({'|'.join(words)})($|[-_.\d])")
        matching = [name for name in names if pattern.search(name)]
        if matching:
            found[split] = matching
    return found if "train" in found else {"train": list(names)}


def _check_hub_id(name: str) -> None:
    if not _HUB_ID.fullmatch(name) or ".." in name:
        raise DataError(f"expected a hub id such as org/name, got {name!r}")


def _hub_error(name: str, error: Exception) -> Exception:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, OSError) or first.startswith("Couldn't find cache"):
        return MissingOptional(
            f"looked for the hub data set {name!r} on the hub and in the local cache: {first}\n"
            "check the name and the network, or load it once where there is one"
        )
    return DataError(f"hub data set {name!r}: {first}")


# --------------------------------------------------------------------------- reading


def _read(entry: DatasetEntry, data_dir: Path | None) -> Source:
    if entry.source == "sklearn":
        return _selected(read_sklearn(str(entry.id), entry.args), entry)
    if entry.source == "synthetic":
        return _selected(read_synthetic(str(entry.id), entry.args), entry)
    if entry.args and entry.modality != "image":
        raise DataError(f"expected no args for {entry.modality} data, got {sorted(entry.args)}")
    tables = _hub_tables(entry) if entry.source == "hub" else _parquet_tables(entry, data_dir)
    if "train" not in tables:
        raise DataError(f"expected a split train, got {sorted(tables)}; name it in splits")
    parts = {split: read_part(table, entry, split) for split, table in tables.items()}
    feature = tables["train"].features[entry.columns.label]
    return Source(parts, tuple(getattr(feature, "names", ())))


def _selected(source: Source, entry: DatasetEntry) -> Source:
    """Return a built-in source with only the columns that the entry wants.

    Raises:
        DataError: another modality, or a column that the source does not have.
    """
    train = source.parts["train"]
    if ("image" in train.inputs) != (entry.modality == "image") or entry.modality == "text":
        raise DataError(f"{entry.source} {entry.id} does not hold {entry.modality} data")
    columns = entry.columns
    beside = {*columns.sub_labels, *([columns.group] if columns.group else [])}
    given = (columns.input,) if isinstance(columns.input, str) else columns.input
    for wanted, known in (({*given, *columns.drop}, train.inputs), (beside, train.beside)):
        strange = sorted(wanted - set(known))
        if strange:
            raise DataError(
                f"{entry.source} {entry.id} has no column {strange[0]!r} for this; "
                f"there are: {sorted(known)}"
            )
    names = [name for name in given or train.inputs if name not in columns.drop]
    parts = {
        split: Part(
            {name: part.inputs[name] for name in names},
            part.labels,
            {name: part.beside[name] for name in sorted(beside)},
        )
        for split, part in source.parts.items()
    }
    return Source(parts, source.class_names)


def _hub_tables(entry: DatasetEntry) -> dict[str, Any]:
    import datasets

    name = str(entry.id)
    _check_hub_id(name)
    tables = {}
    for split, source in entry.splits.items():
        wanted = source if isinstance(source, str) else "+".join(source)
        try:
            tables[str(split)] = datasets.load_dataset(
                name, entry.config, split=wanted, revision=entry.revision
            )
        except (OSError, ValueError) as error:
            raise _hub_error(name, error) from None
    return tables


def _parquet_tables(entry: DatasetEntry, data_dir: Path | None) -> dict[str, Any]:
    folder = expand_path(str(entry.path), data_dir)
    if not folder.is_dir():
        hint = "set UNSC_DATA_DIR or give --data-dir" if "UNSC_DATA_DIR" in str(entry.path) else ""
        raise MissingOptional(f"{folder}: no such folder\n{hint or 'check the path of the data'}")
    return {
        str(split): _read_parquet(_files(folder, source)) for split, source in entry.splits.items()
    }


def _files(folder: Path, source: str | tuple[str, ...]) -> list[Path]:
    """Return the files of a split: names or globs in their order, or a bare split name.

    Raises:
        MissingOptional: no file matches.
    """
    found: list[Path] = []
    for pattern in (source,) if isinstance(source, str) else source:
        bare = not pattern.endswith(".parquet") and not set("*?[") & set(pattern)
        tries = (f"{pattern}.parquet", f"{pattern}-*.parquet") if bare else (pattern,)
        matching = next((files for at in tries if (files := sorted(folder.glob(at)))), [])
        if not matching:
            raise MissingOptional(
                f"{folder / tries[0]}: no such file\ncomplete the folder, or change splits"
            )
        found += matching
    return found


def _read_parquet(files: Sequence[Path]) -> Any:
    """Return files of one schema as one data set: in memory, or mapped from disk when big.

    Raises:
        DataError: files that are no Parquet, or of different schemas.
    """
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        if sum(file.stat().st_size for file in files) > IN_MEMORY_BYTES:
            return datasets.Dataset.from_parquet([str(file) for file in files])
        tables = [parquet.ParquetFile(file).read() for file in files]
        return datasets.Dataset(pa.concat_tables(tables))
    except (pa.ArrowException, OSError) as error:
        named = ", ".join(file.name for file in files)
        raise DataError(f"{files[0].parent}: {named} cannot be read as Parquet: {error}") from None


# --------------------------------------------------------------------------- the pipeline


def load(
    entry: DatasetEntry, name: str, *, data_dir: Path | None = None, tokenizer: Any = None
) -> Splits:
    """Return the splits of a data set.

    An official test or validation split is taken as it is. Otherwise test is a stratified draw of
    `test_fraction` and validation one of `val_fraction` of what is left, both with fixed seeds;
    strata are the labels, with groups the (label, group) cells. Label noise gives a fixed share of
    the training rows another class, drawn uniformly.

    Args:
        entry: where the rows are and what they mean.
        name: what the data set is called in records.
        data_dir: stands in for `${UNSC_DATA_DIR}`.
        tokenizer: texts only: a fast tokenizer of transformers; None trains a small word list on
            the training texts.

    Raises:
        DataError: columns, labels, groups or values that cannot be used, or a split without rows.
        RowOrderMismatch: other training labels, or in another order, than the entry's hash says.
    """
    source = _read(entry, data_dir)
    codes, class_names = class_codes(source.parts, source.class_names, entry.num_classes)
    names, groups = group_codes(source.parts, entry.columns)
    pieces, labels_sha256 = arrange(entry, source.parts, codes, groups)
    if entry.labels_sha256 and entry.labels_sha256 != labels_sha256:
        raise RowOrderMismatch(
            f"{name}: expected training labels with SHA-256 {entry.labels_sha256}, got "
            f"{labels_sha256}; the rows or their order differ, so index lists mean other rows: "
            "use the files that the entry describes, or correct its labels_sha256"
        )
    for split in ("train", "test"):
        if not len(pieces[split]):
            raise DataError(f"{name}: expected rows in {split}, got none; check splits and limits")
    if entry.label_noise:
        pieces["train"] = with_noise(pieces["train"], entry.label_noise, len(class_names))
    inputs, tokenizer, described = _inputs(entry, pieces, tokenizer)
    rows = {split: _rows(piece, inputs[split]) for split, piece in pieces.items()}
    shape = next(iter(rows["train"].gather([0]).inputs.values())).shape[1:]
    info = DataInfo(
        name=name,
        modality=entry.modality,
        num_classes=len(class_names),
        class_names=class_names,
        input_shape=tuple(shape),
        row_order=entry.row_order,
        revision=entry.revision,
        labels_sha256=labels_sha256,
        groups=names,
        **described,
    )
    return Splits(rows["train"], rows["val"], rows["test"], info, tokenizer)


def _rows(piece: Piece, inputs: dict[str, torch.Tensor] | ImageDecoder) -> Rows:
    labels, index = torch.from_numpy(piece.labels), torch.from_numpy(piece.index)
    group = None if piece.group is None else torch.from_numpy(piece.group)
    extra = dict(piece.part.beside)
    if isinstance(inputs, ImageDecoder):
        return Rows.of(
            {}, labels, index, group=group, extra=extra, decode=inputs, workers=DECODE_WORKERS
        )
    return Rows.of(inputs, labels, index, group=group, extra=extra)


def _inputs(
    entry: DatasetEntry, pieces: Mapping[str, Piece], tokenizer: Any
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Return the inputs of every split (tensors, or a decoder of images) and the tokenizer used.

    Last come the fields of :class:`DataInfo` that only this modality has.
    """
    columns = {split: piece.part.inputs for split, piece in pieces.items()}
    if entry.modality == "tabular":
        encoder = TableEncoder.fit(columns["train"])  # type: ignore[arg-type]
        features = {split: {"features": encoder(part)} for split, part in columns.items()}  # type: ignore[arg-type]
        return features, None, {"feature_numeric": encoder.numeric}
    if entry.modality == "text":
        texts = {
            split: [list(column[:]) for column in part.values()] for split, part in columns.items()
        }
        if tokenizer is None:
            tokenizer = train_words([text for column in texts["train"] for text in column])
        ids = {split: encode(tokenizer, found, entry.max_length) for split, found in texts.items()}
        return ids, tokenizer, describe(tokenizer)
    images: dict[str, Any] = {split: part["image"] for split, part in columns.items()}
    if isinstance(images["train"], np.ndarray):
        arrays = {
            split: {"pixel_values": torch.from_numpy(pixels)} for split, pixels in images.items()
        }
        return arrays, None, {}
    wanted = PixelFormat.of(images["train"], entry.args)
    decoders = {split: ImageDecoder(encoded, wanted) for split, encoded in images.items()}
    bytes_ = sum(len(encoded) for encoded in images.values()) * math.prod(wanted.shape)
    if bytes_ > IN_MEMORY_BYTES:
        return dict(decoders), None, {}
    decoded = {split: {"pixel_values": decoder.all()} for split, decoder in decoders.items()}
    return decoded, None, {}
