"""Data: names to splits, the same rows every time, no leak between splits, errors that help."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_breast_cancer, load_digits

from unsc_plugin import data
from unsc_plugin.errors import (
    DataError,
    MissingOptional,
    RowOrderMismatch,
    UnknownName,
)
from unsc_plugin.rows import Loader
from unsc_plugin.spec import Columns, DatasetEntry, read_yaml

ROOT = Path(__file__).parent.parent
DTYPES = {"double": "float64"}
DIGITS = DatasetEntry(source="sklearn", id="digits", modality="image")


def png(pixels):
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}


def write(path, columns, names=None, image=None):
    """Write a Parquet file with the hub's metadata: class names and the type of an image column."""
    if image:
        cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = columns | {image: pa.array(columns[image], cell)}
    table = pa.table(columns)
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    features = {
        name: {"_type": "Value", "dtype": DTYPES.get(kind, kind)} for name, kind in types.items()
    }
    if names:
        features["label"] = {"_type": "ClassLabel", "names": names}
    if image:
        features[image] = {"_type": "Image"}
    huggingface = json.dumps({"info": {"features": features}})
    table = table.replace_schema_metadata({"huggingface": huggingface})
    parquet.write_table(table, path, compression="zstd")


def table_entry(folder, **fields):
    return DatasetEntry(
        **{"source": "parquet", "path": str(folder), "modality": "tabular"} | fields
    )


@pytest.fixture
def numbers(tmp_path):
    """A table whose feature `row` says which row it is."""
    for split, count in (("train", 40), ("test", 10)):
        row = np.arange(count)
        write(tmp_path / f"{split}.parquet", {"row": row.astype(float), "label": row % 2})
    return tmp_path


# --------------------------------------------------------------------------- sources


def test_digits_are_scaled_to_eight_bits():
    splits = data.load(DIGITS, "digits")
    assert splits.info.input_shape == (1, 8, 8)
    assert splits.info.num_classes == 10
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [1213, 135, 449]
    stored = torch.cat([s.storage["pixel_values"] for s in (splits.train, splits.val, splits.test)])
    reference = np.rint(load_digits().images * 255 / 16)
    assert stored.dtype == torch.uint8
    assert stored.sum() == reference.sum()
    batch = splits.train.gather([0])
    assert batch.inputs["pixel_values"].max() <= 1


def test_loading_twice_gives_the_same_rows():
    first, second = data.load(DIGITS, "digits"), data.load(DIGITS, "digits")
    for a, b in ((first.train, second.train), (first.val, second.val), (first.test, second.test)):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.storage["pixel_values"], b.storage["pixel_values"])
    assert first.info == second.info


def test_carved_splits_are_stratified():
    splits = data.load(DIGITS, "digits")
    whole = np.bincount(load_digits().target)
    assert np.abs(torch.bincount(splits.test.labels).numpy() - whole * 0.25).max() <= 1


def test_table_is_standardised_by_training_rows_only():
    entry = DatasetEntry(source="sklearn", id="breast_cancer", modality="tabular")
    splits = data.load(entry, "breast_cancer")
    features = splits.train.storage["features"].double()
    torch.testing.assert_close(features.mean(0), torch.zeros(30).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        features.std(0, correction=0), torch.ones(30).double(), atol=1e-6, rtol=0
    )
    assert splits.test.storage["features"].mean(0).abs().max() > 1e-3
    assert splits.info.class_names == tuple(load_breast_cancer().target_names)


def test_synthetic_images_have_classes_and_variants_in_balance():
    entry = DatasetEntry(
        source="synthetic",
        id="images",
        modality="image",
        columns=Columns(sub_labels=("variant",)),
        args={"n": 80, "n_test": 40, "classes": 4, "size": 12, "channels": 3, "noise": 0.05},
        val_fraction=0.0,
    )
    splits = data.load(entry, "synthetic")
    assert splits.info.input_shape == (3, 12, 12)
    assert torch.bincount(splits.train.labels).tolist() == [20] * 4
    variants = splits.train.extra["variant"]
    assert (variants == "a").sum() == (variants == "b").sum() == 40
    pixels = splits.train.storage["pixel_values"].double()
    means = {(c, v): pixels[(splits.train.labels == c) & torch.from_numpy(variants == v)].mean(0)
             for c in range(4) for v in "ab"}  # fmt: skip
    test = splits.test.storage["pixel_values"].double()
    nearest = [min(means, key=lambda key: float((means[key] - x).square().sum()))[0] for x in test]
    assert np.mean(np.array(nearest) == splits.test.labels.numpy()) > 0.9


def test_synthetic_table_favours_one_group():
    columns = Columns(group="group")
    entry = DatasetEntry(source="synthetic", id="table", modality="tabular", columns=columns)
    splits = data.load(entry, "synthetic")
    assert splits.info.groups == ("a", "b")
    rate = [splits.test.labels[splits.test.group == g].double().mean() for g in (0, 1)]
    assert rate[0] - rate[1] > 0.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "digit"}, "did you mean 'digits'"),
        ({"id": "digits", "modality": "tabular"}, "does not hold tabular"),
        ({"id": "digits", "columns": Columns(group="sex")}, "no column 'sex'"),
        ({"source": "synthetic", "id": "images", "args": {"classe": 3}}, "did you mean 'classes'"),
        ({"source": "synthetic", "id": "images", "args": {"n": 1.5}}, "whole number"),
        ({"source": "synthetic", "id": "images", "args": {"classes": 1}}, "classes ≥ 2"),
        ({"source": "synthetic", "id": "images", "args": {"n_test": 0}}, "rows in test"),
    ],
)
def test_built_in_sources_refuse_what_they_lack(fields, message):
    with pytest.raises((DataError, UnknownName), match=message):
        data.load(DatasetEntry(**{"source": "sklearn", "modality": "image"} | fields), "x")


# --------------------------------------------------------------------------- splits


def test_index_is_the_position_before_validation_was_carved(numbers):
    splits = data.load(table_entry(numbers), "numbers")
    assert sorted(splits.train.index.tolist()) == splits.train.index.tolist()
    assert len(splits.train) == 36
    row = np.arange(40.0)[splits.train.index.numpy()]
    expected = torch.from_numpy((row - row.mean()) / row.std()).float()
    torch.testing.assert_close(splits.train.storage["features"][:, 0], expected)
    assert splits.val.index.tolist() == [-1, -2, -3, -4]
    assert splits.test.index[:2].tolist() == [-1 - 10**9, -2 - 10**9]


def test_official_validation_and_limit(numbers):
    write(numbers / "validation.parquet", {"row": np.arange(6.0), "label": np.arange(6) % 2})
    names = {"train": "train", "val": "validation", "test": "test"}
    entry = table_entry(numbers, splits=names, limit={"train": 20, "test": 5})
    splits = data.load(entry, "numbers")
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [20, 6, 5]
    assert splits.train.index.tolist() == list(range(20))


def test_no_validation_rows_on_request(numbers):
    splits = data.load(table_entry(numbers, val_fraction=0.0), "numbers")
    assert len(splits.train) == 40
    assert len(splits.val) == 0


def test_test_is_carved_when_there_is_none(numbers):
    splits = data.load(table_entry(numbers, splits={"train": "train"}), "numbers")
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [27, 3, 10]


def test_labels_hash_is_of_the_original_training_split(numbers):
    labels = (np.arange(40) % 2).astype("<i8")
    expected = hashlib.sha256(labels.tobytes()).hexdigest()
    entry = table_entry(numbers, labels_sha256=expected, label_noise=0.5)
    assert data.load(entry, "numbers").info.labels_sha256 == expected
    with pytest.raises(RowOrderMismatch, match=f"0{{64}}.*got {expected}"):
        data.load(table_entry(numbers, labels_sha256="0" * 64), "numbers")


def test_label_noise_touches_a_share_of_train_only():
    clean = data.load(DIGITS, "digits")
    noisy = data.load(DIGITS.model_copy(update={"label_noise": 0.15}), "digits")
    changed = clean.train.labels != noisy.train.labels
    assert int(changed.sum()) == round(0.15 * 1213)
    assert ((noisy.train.extra["mislabelled"] == "yes") == changed.numpy()).all()
    assert torch.equal(clean.train.index, noisy.train.index)
    assert torch.equal(clean.val.labels, noisy.val.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    shift = (noisy.train.labels - clean.train.labels)[changed] % 10
    assert torch.bincount(shift, minlength=10)[1:].min() > 5


# --------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        (["no", "yes", "no", "yes"], ["yes", "no"], ("no", "yes")),
        ([5, 7, 5, 7], [7, 5], ("5", "7")),
        ([0, 1, 0, 1], [1, 0], ("0", "1")),
        ([False, True, False, True], [True, False], ("0", "1")),
        ([0.0, 1.0, 0.0, 1.0], [1.0, 0.0], ("0", "1")),
    ],
)
def test_labels_become_0_to_k(tmp_path, train, test, names):
    write(tmp_path / "train.parquet", {"x": np.arange(4.0), "label": train})
    write(tmp_path / "test.parquet", {"x": np.arange(2.0), "label": test})
    splits = data.load(table_entry(tmp_path, val_fraction=0.0), "x")
    assert splits.train.labels.tolist() == [0, 1, 0, 1]
    assert splits.test.labels.tolist() == [1, 0]
    assert splits.info.class_names == names


@pytest.mark.parametrize(
    ("train", "test", "fields", "message"),
    [
        ([0, 1, 2], [0], {"num_classes": 2}, r"labels 0..1, got 2 in row 2 of train"),
        ([0, 1, 0], [-1], {}, "-1 in row 0 of test .*no labels"),
        ([0.5, 1.0, 0.0], [0.0], {}, "whole-number"),
        (["a", "b", "a"], ["c"], {}, "'c' occurs in test .* not in train"),
        (["a", "b", "a"], ["a"], {"num_classes": 3}, "expected 3 classes, got 2"),
        ([0, 0, 0], [0], {}, "two classes"),
        ([0, None, 1], [0], {}, "label in every row"),
    ],
)
def test_bad_labels_are_refused(tmp_path, train, test, fields, message):
    write(tmp_path / "train.parquet", {"x": np.arange(3.0), "label": train})
    write(tmp_path / "test.parquet", {"x": np.arange(1.0), "label": test})
    with pytest.raises(DataError, match=message):
        data.load(table_entry(tmp_path, **fields), "x")


# --------------------------------------------------------------------------- tables


def test_table_columns(tmp_path):
    train = {
        "age": [20, 30, 40, 50],
        "constant": [1.0] * 4,
        "job": ["?", "cook", "cook", "nurse"],
        "sex": ["F", "M", "F", "M"],
        "later": [0, 1, 0, 1],
        "label": [0, 1, 0, 1],
    }
    test = {
        "age": [60, 20],
        "constant": [2.0] * 2,
        "job": ["pilot", "?"],
        "sex": ["M", "F"],
        "later": [1, 0],
        "label": [1, 0],
    }
    write(tmp_path / "train.parquet", train, names=["no", "yes"])
    write(tmp_path / "test.parquet", test, names=["no", "yes"])
    entry = table_entry(tmp_path, val_fraction=0.0, columns=Columns(group="sex", drop=("later",)))
    splits = data.load(entry, "x")
    z = (np.array([60, 20]) - 35) / np.std([20, 30, 40, 50])
    expected = torch.tensor([[z[0], 0, 0, 0, 1], [z[1], 1, 0, 0, 0]], dtype=torch.float32)
    torch.testing.assert_close(splits.test.storage["features"], expected)
    assert splits.info.groups == ("F", "M")
    assert splits.test.group.tolist() == [1, 0]
    assert splits.train.extra["sex"].tolist() == ["F", "M", "F", "M"]
    assert splits.info.class_names == ("no", "yes")


@pytest.mark.parametrize(
    ("column", "fields", "message"),
    [
        ([1.0, None, np.nan, 2.0], {}, "'x', got [12] missing"),
        ([1.0, np.inf, 2.0, 3.0], {}, "'x', got 1 missing or infinite"),
        ([1.0] * 4, {}, "one column that varies"),
        ([1.0, 2.0, 3.0, 4.0], {"columns": Columns(group="sx")}, "no column 'sx'"),
        ([1.0, 2.0, 3.0, 4.0], {"columns": Columns(drop=("xx",))}, "did you mean 'x'"),
        ([[1], [2], [3], [4]], {}, "numbers or text in column 'x'"),
        ([1.0, 2.0, 3.0, 4.0], {"args": {"size": 3}}, "no args"),
    ],
)
def test_bad_tables_are_refused(tmp_path, column, fields, message):
    table = pa.table({"x": column, "label": [0, 1, 0, 1]})
    parquet.write_table(table, tmp_path / "train.parquet")
    entry = table_entry(tmp_path, splits={"train": "train"}, val_fraction=0.0, **fields)
    with pytest.raises(DataError, match=message):
        data.load(entry, "x")


def test_a_group_column_needs_few_values(tmp_path):
    write(tmp_path / "train.parquet", {"age": np.arange(40), "label": np.arange(40) % 2})
    entry = table_entry(tmp_path, splits={"train": "train"}, columns=Columns(group="age"))
    with pytest.raises(DataError, match="at most 20 groups"):
        data.load(entry, "x")


# --------------------------------------------------------------------------- images


@pytest.fixture
def pictures(tmp_path):
    """Ten colour images in two training files, four for test, and the pixels they hold."""
    pixels = np.random.default_rng(0).integers(0, 256, (14, 6, 5, 3), np.uint8)
    for name, rows in (("train-0", range(6)), ("train-1", range(6, 10)), ("test", range(10, 14))):
        columns = {"image": [png(pixels[r]) for r in rows], "label": [r % 2 for r in rows]}
        write(tmp_path / f"{name}.parquet", columns, names=["cat", "dog"], image="image")
    return tmp_path, torch.from_numpy(pixels).permute(0, 3, 1, 2)


def picture_entry(folder, **fields):
    splits = {"train": "train-*.parquet", "test": "test.parquet"}
    return table_entry(folder, modality="image", splits=splits, **{"val_fraction": 0.2} | fields)


def test_images_come_back_bit_for_bit(pictures):
    folder, pixels = pictures
    splits = data.load(picture_entry(folder), "pictures")
    assert torch.equal(splits.train.storage["pixel_values"], pixels[splits.train.index])
    assert torch.equal(splits.test.storage["pixel_values"], pixels[10:])
    assert splits.info.class_names == ("cat", "dog")
    assert splits.info.input_shape == (3, 6, 5)


def test_images_that_do_not_fit_are_decoded_on_access(pictures, monkeypatch):
    folder, _ = pictures
    eager = data.load(picture_entry(folder), "pictures")
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(data, "_read_parquet", in_memory(data._read_parquet))
    lazy = data.load(picture_entry(folder), "pictures")
    assert not lazy.train.storage
    assert lazy.info == eager.info
    assert isinstance(pickle.loads(pickle.dumps(lazy.train.decode)), type(lazy.train.decode))
    for a, b in zip(
        Loader(eager.train, 3, shuffle=True), Loader(lazy.train, 3, shuffle=True), strict=True
    ):
        assert torch.equal(a.inputs["pixel_values"], b.inputs["pixel_values"])
        assert torch.equal(a.index, b.index)


def in_memory(read):
    """Keep small files off the disk cache that big ones use."""

    def small(files):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "IN_MEMORY_BYTES", 10**9)
            return read(files)

    return small


def test_big_parquet_files_are_mapped_from_disk(pictures, monkeypatch, tmp_path):
    folder, pixels = pictures
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
    table = data._read_parquet([folder / "train-0.parquet", folder / "train-1.parquet"])
    assert table.cache_files
    assert len(table) == 10
    assert np.array_equal(np.asarray(table[7]["image"]), pixels[7].permute(1, 2, 0))


def test_grey_images_and_resizing(tmp_path):
    grey = np.full((2, 4, 4), [[[10]], [[200]]], np.uint8)
    columns = {"image": [png(g) for g in grey] * 2, "label": [0, 1, 0, 1]}
    write(tmp_path / "train.parquet", columns, image="image")
    entry = table_entry(tmp_path, modality="image", splits={"train": "train"}, val_fraction=0.0)
    assert data.load(entry, "grey").info.input_shape == (1, 4, 4)
    entry = entry.model_copy(update={"args": {"size": 8, "channels": 3}})
    splits = data.load(entry, "grey")
    assert splits.info.input_shape == (3, 8, 8)
    assert set(splits.train.storage["pixel_values"].flatten().tolist()) == {10, 200}


@pytest.mark.parametrize(
    ("second", "args", "message"),
    [
        (png(np.zeros((3, 4), np.uint8)), {}, r"4×4 pixels as in row 0, got 4×3 .*size"),
        ({"bytes": b"no image", "path": None}, {}, "row 1 cannot be opened"),
        (
            {"bytes": png(np.zeros((4, 4), np.uint8))["bytes"][:45], "path": None},
            {},
            "row 1 cannot",
        ),
        (None, {}, "row 1, got nothing"),
        (png(np.zeros((4, 4), np.uint16)), {}, "8-bit"),
        (png(np.zeros((4, 4), np.uint8)), {"sizes": 3}, "sizes"),
        (png(np.zeros((4, 4), np.uint8)), {"channels": 2}, "channels 1 or 3"),
    ],
)
def test_bad_images_are_refused(tmp_path, second, args, message):
    rows = [png(np.zeros((4, 4), np.uint8)), second]
    write(tmp_path / "train.parquet", {"image": rows, "label": [0, 1]}, image="image")
    write(tmp_path / "test.parquet", {"image": rows[:1], "label": [0]}, image="image")
    entry = table_entry(tmp_path, modality="image", val_fraction=0.0, args=args)
    with pytest.raises(DataError, match=message):
        data.load(entry, "x")


# --------------------------------------------------------------------------- texts


@pytest.fixture
def questions(tmp_path):
    train = {
        "text": ["Who wrote it?", "who did it", "When was it?", "when it was"],
        "label": [0, 0, 1, 1],
        "kind": ["a", "b", "c", None],
    }
    write(tmp_path / "train.parquet", train)
    write(tmp_path / "test.parquet", {"text": ["who flew ?"], "label": [0], "kind": ["a"]})
    return table_entry(
        tmp_path,
        modality="text",
        columns=Columns(input="text", sub_labels=("kind",)),
        max_length=6,
        val_fraction=0.0,
    )


def test_words_are_numbered_by_training_texts(questions):
    splits = data.load(questions, "questions")
    words = splits.tokenizer.get_vocab()
    assert [words[w] for w in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    assert "flew" not in words
    ids = splits.test.storage["input_ids"]
    assert ids.tolist() == [[2, words["who"], 1, words["?"], 3, 0]]
    assert splits.test.storage["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0]]
    assert splits.info.vocab_size == len(words)
    assert splits.info.pad_token_id == 0
    assert splits.info.input_shape == (6,)
    assert splits.train.extra["kind"].tolist() == ["a", "b", "c", ""]
    again = data.load(questions, "questions")
    assert again.tokenizer.get_vocab() == words


def test_pairs_of_texts(tmp_path):
    columns = {"a": ["x y", "z"], "b": ["u", "v w"], "label": [0, 1]}
    write(tmp_path / "train.parquet", columns)
    write(tmp_path / "test.parquet", columns)
    entry = table_entry(
        tmp_path, modality="text", columns=Columns(input=("a", "b")), max_length=8, val_fraction=0.0
    )
    splits = data.load(entry, "pairs")
    decoded = [
        splits.tokenizer.id_to_token(i) for i in splits.train.storage["input_ids"][0].tolist()
    ]
    assert decoded == ["[CLS]", "x", "y", "[SEP]", "u", "[SEP]", "[PAD]", "[PAD]"]


def test_a_backbones_tokenizer_is_used(questions):
    from transformers import PreTrainedTokenizerFast

    words = data.load(questions, "questions").tokenizer
    words.no_padding()
    words.no_truncation()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    splits = data.load(questions, "questions", tokenizer=fast)
    assert splits.tokenizer is fast
    assert splits.info.vocab_size == len(fast)
    assert torch.equal(
        splits.train.storage["input_ids"],
        data.load(questions, "questions").train.storage["input_ids"],
    )
    fast.pad_token = None
    with pytest.raises(DataError, match="padding token"):
        data.load(questions, "questions", tokenizer=fast)


def test_missing_texts_are_refused(tmp_path):
    write(tmp_path / "train.parquet", {"text": ["a", None], "label": [0, 1]})
    columns = Columns(input="text")
    entry = table_entry(tmp_path, modality="text", columns=columns, splits={"train": "train"})
    with pytest.raises(DataError, match="None in row 1 of train"):
        data.load(entry, "x")


# --------------------------------------------------------------------------- places and names


def test_data_dir_stands_over_the_variable(numbers, monkeypatch):
    entry = table_entry("${UNSC_DATA_DIR}/" + numbers.name)
    monkeypatch.setenv("UNSC_DATA_DIR", "/nowhere")
    with pytest.raises(MissingOptional, match=r"/nowhere/.*no such folder\n.*--data-dir") as caught:
        data.load(entry, "x")
    assert caught.value.exit_code == 3
    assert len(data.load(entry, "x", data_dir=numbers.parent).test) == 10
    monkeypatch.delenv("UNSC_DATA_DIR")
    with pytest.raises(MissingOptional, match="UNSC_DATA_DIR is not set"):
        data.load(entry, "x")


def test_missing_and_broken_files(numbers):
    with pytest.raises(MissingOptional, match=r"valid\.parquet: no such file"):
        data.load(table_entry(numbers, splits={"train": "train", "test": "valid"}), "x")
    (numbers / "test.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"test\.parquet cannot be read as Parquet"):
        data.load(table_entry(numbers), "x")


def test_registered_names_come_first_and_unknown_ones_get_a_hint():
    assert data.resolve("digits", {"digits": DIGITS}) == ("digits", DIGITS)
    with pytest.raises(UnknownName, match="did you mean 'digits'"):
        data.resolve("digist", {"digits": DIGITS})


def test_local_folders_need_no_registration(pictures):
    folder, _ = pictures
    for name in (str(folder), f"parquet:{folder}"):
        found, entry = data.resolve(name, {})
        assert found == f"parquet:{folder}"
        assert entry.modality == "image"
        assert entry.columns.input == "image"
        assert len(data.load(entry, found).test) == 4
    _, entry = data.resolve(f"parquet:{folder}/train-*.parquet", {})
    splits = data.load(entry, "x")
    assert len(splits.train) + len(splits.val) + len(splits.test) == 10
    with pytest.raises(MissingOptional, match="no Parquet file"):
        data.resolve(f"parquet:{folder}/none", {})
    with pytest.raises(MissingOptional, match="no Parquet file"):
        data.resolve("/nowhere/at/all", {})


@pytest.mark.parametrize(
    ("columns", "modality"),
    [
        ({"sentence": ["a", "b"], "label": [0, 1]}, "text"),
        ({"words": ["a", "b"], "label": [0, 1]}, "text"),
        ({"job": ["a", "b"], "age": [1, 2], "label": [0, 1]}, "tabular"),
        ({"age": [1, 2], "label": [0, 1]}, "tabular"),
    ],
)
def test_columns_are_guessed(tmp_path, columns, modality):
    write(tmp_path / "train.parquet", columns)
    assert data.resolve(f"parquet:{tmp_path}", {})[1].modality == modality


def test_a_folder_without_labels_is_refused(tmp_path):
    write(tmp_path / "train.parquet", {"x": [1.0, 2.0]})
    with pytest.raises(DataError, match="column named label"):
        data.resolve(f"parquet:{tmp_path}", {})


@pytest.mark.parametrize(
    "name", ["hub:../etc/passwd", "hub:/etc/passwd", "hub:a/b/c", "hub:a..b/c", "hub:"]
)
def test_strange_hub_ids_are_refused(name):
    with pytest.raises(DataError, match="hub id"):
        data.resolve(name, {})


def test_unreachable_hub_set_says_what_was_looked_for(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(MissingOptional, match="'org/name' on the hub and in the local cache"):
        data.resolve("org/name", {})
    with pytest.raises(MissingOptional, match="'org/name'"):
        data.load(DatasetEntry(source="hub", id="org/name", modality="text"), "x")


def test_a_hub_set_is_loaded_through_datasets(monkeypatch, pictures):
    folder, pixels = pictures
    table = {
        "train": data._read_parquet([folder / "train-0.parquet", folder / "train-1.parquet"]),
        "validation": data._read_parquet([folder / "test.parquet"]),
    }

    class Builder:
        class info:
            features = table["train"].features
            splits = dict.fromkeys(table)

    def load(name, config=None, *, split, revision):
        assert (name, config, revision) == ("org/name", None, None)
        return table[split]

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: Builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    name, entry = data.resolve("org/name", {})
    assert (name, entry.splits) == ("hub:org/name", {"train": "train", "test": "validation"})
    splits = data.load(entry, name)
    assert torch.equal(splits.test.storage["pixel_values"], pixels[10:])


# --------------------------------------------------------------------------- the registered sets

# Rows of train and test and the classes' counts in train, as the README of the data states them.
REAL = {
    "cifar10-small": (10_000, 1000, [1000] * 10),
    "fashion_mnist-small": (8000, 5000, None),
    "fashion_mnist": (60_000, 10_000, [6000] * 10),
    "adult": (32_561, 16_281, [24_720, 7841]),
    "bank": (36_169, 9042, None),
    "compas": (5772, 1442, None),
    "german": (800, 200, [560, 240]),
    "sst2": (6920, 1821, None),
    "ag_news-small": (6000, 1600, [1500] * 4),
    "trec": (5452, 500, None),
    "sms_spam": (4450, 1124, None),
}


@pytest.fixture(scope="module")
def registered():
    tree = read_yaml(ROOT / "registry.yaml").tree
    return {
        name: DatasetEntry.model_validate_json(json.dumps(entry))
        for name, entry in tree["datasets"].items()
    }


def test_registered_built_in_sets_load(registered):
    for name, entry in registered.items():
        assert entry.summary, name
        if entry.source in ("sklearn", "synthetic"):
            info = data.load(entry, name).info
            assert (info.num_classes, info.modality) == (entry.num_classes, entry.modality)


@pytest.mark.skipif("UNSC_DATA_DIR" not in os.environ, reason="UNSC_DATA_DIR names no data folder")
@pytest.mark.parametrize("name", REAL)
def test_registered_real_sets_have_the_rows_they_state(registered, name):
    rows, tests, counts = REAL[name]
    splits = data.load(registered[name].model_copy(update={"label_noise": 0.0}), name)
    carved = 0 if "val" in registered[name].splits else len(splits.val)
    assert (len(splits.train) + carved, len(splits.test)) == (rows, tests)
    if counts:
        both = torch.cat([splits.train.labels, splits.val.labels])
        assert torch.bincount(both).tolist() == counts
    batch = splits.train.gather([0, 1])
    assert next(iter(batch.inputs.values())).shape[1:] == splits.info.input_shape
    assert all(torch.isfinite(tensor).all() for tensor in batch.inputs.values())
    assert len(splits.info.class_names) == registered[name].num_classes
