"""The adapter against a real checkout of MU-Bench, with small local data and models in its place.

Needs `MUBENCH_HOME` and a transformers that MU-Bench runs on; everything here is skipped without.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import unsc
from mubench_stand_in import build_mubench, modules_kept
from packaging.version import Version

from unsc_plugin.adapters import mubench
from unsc_plugin.forget import split_sha256
from unsc_plugin.metrics import mubench as numbers

HOME = os.environ.get("MUBENCH_HOME", "")
INSTALLED = Version(metadata.version("transformers"))
pytestmark = pytest.mark.skipif(not HOME, reason="MUBENCH_HOME is not set to a MU-Bench checkout")
window = pytest.mark.skipif(
    not Version("4.46") <= INSTALLED < Version("4.49"),
    reason=f"MU-Bench runs on transformers 4.46 to 4.48, installed is {INSTALLED}",
)


@pytest.mark.parametrize(
    ("data", "start"),
    [
        ("cifar10", "b5144f05f227ef20"),
        ("cifar100", "5178622c4b92f2d5"),
        ("imdb", "f40dab2edd89eda9"),
        ("ddi", "de4a2e5f60c257e8"),
    ],
)
def test_index_lists_are_the_known_ones(data, start):
    assert mubench.locate(HOME).sha256[data].startswith(start)


@pytest.mark.parametrize(
    ("data", "ratio", "start"),
    [
        ("cifar10", 2, "f198e4b478d69cb8"),
        ("cifar10", 10, "a949dd66b3667f3e"),
        ("cifar100", 2, "8b9df7b0249b589c"),
        ("cifar100", 10, "bbd2fae40560b599"),
        ("imdb", 2, "131cc3e2f16815c3"),
        ("imdb", 10, "f7b1b7a59fe020f4"),
    ],
)
def test_forget_sets_are_the_known_ones(data, ratio, start):
    assert split_sha256(mubench.deletion_indices(data, ratio, home=HOME)).startswith(start)


# --------------------------------------------------------------------------- the stand-in holds

MEMBERS = {
    "mubench": ["model_map", "model_map_rev", "model_cls_map", "num_classes_map", "get_trainer"],
    "mubench.args": ["UnlearningArguments"],
    "mubench.utils": ["load_base_model"],
    "mubench.data.base": [
        "load_unlearn_data",
        "prepare_df_dr",
        "prepare_unlearning_data",
        "method_specific_transformation",
        "load_cifar10",
        "tokenize_data",
    ],
    "mubench.data.preprocess": ["AutoImageProcessor", "all_dataset_collators"],
    "mubench.trainer": ["get_trainer"],
    "mubench.trainer.base.UnlearningTrainer": [
        "method_specific_setup",
        "method_specific_unlearn",
        "unlearn",
        "evaluate_unlearn",
        "get_eval_dataloader",
    ],
    "mubench.evaluation.Evaluator": ["compute", "get_knowledge_gap"],
    "mubench.original_performance": ["orig_acc"],
}
"""What the adapter touches; parameters of functions must agree between stand-in and original."""


def described(suite):
    found = {}
    for owner, names in MEMBERS.items():
        module, _, kind = owner.removeprefix("mubench").lstrip(".").rpartition(".")
        inside = kind[:1].isupper()
        holder = suite.module(module if inside else owner.removeprefix("mubench").lstrip("."))
        holder = getattr(holder, kind) if inside else holder
        for name in names:
            member = getattr(holder, name)
            member = inspect.unwrap(member)
            plain = inspect.isfunction(member) or name == "UnlearningArguments"
            found[f"{owner}.{name}"] = list(inspect.signature(member).parameters) if plain else None
    return found


@window
def test_stand_in_has_the_members_of_the_original(tmp_path):
    with modules_kept(), mubench.install(home=HOME) as suite:
        original = described(suite)
    with modules_kept(), mubench.install(home=build_mubench(tmp_path)) as suite:
        standing = described(suite)
    different = {key for key in original if original[key] != standing[key]}
    assert not different, f"update the stand-in: {[(k, original[k]) for k in sorted(different)]}"


# --------------------------------------------------------------------------- its script, unedited

REGISTRY = """\
schema: 1
package: tiny-mubench
datasets:
  tiny-mubench:
    source: parquet
    path: {folder}
    splits: {{train: train, val: validation, test: test}}
    columns: {{input: image, label: label}}
    modality: image
    num_classes: 10
    val_fraction: 0.0
    row_order: hub
    mubench: cifar10
"""
RECIPE = {"epochs": 0, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-4, "batch_size": 128}
METHODS = [
    ("unsc", "unsc", {"forget": "class-0"}),
    ("instance_wise", "instance_wise", {}),
    ("soft_weighted", "soft_weighted", {"set": {"goals": ["robust"], "attack": {"steps": 2}}}),
    ("neggrad_plus", "neggrad_plus", {"set": {"epochs": 1, "lr": 1e-3}}),
    ("plugin-scrub", "scrub", {"set": {"epochs": 1, "lr": 1e-3}}),
]


def pictures(labels, generator, shapes):
    """Return PNG files of 16×16 pixels whose class can be seen."""
    from PIL import Image

    noise = generator.normal(0, 45, (len(labels), 16, 16, 3))
    pixels = np.clip(shapes[labels] + noise, 0, 255).astype(np.uint8)
    found = []
    for one in pixels:
        file = io.BytesIO()
        Image.fromarray(one).save(file, "PNG", compress_level=1)
        found.append({"bytes": file.getvalue(), "path": None})
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Small files in place of CIFAR-10 and the base model: 50,000 rows, one transformer layer."""
    import datasets
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("tiny")
    generator = np.random.default_rng(0)
    shapes = generator.integers(60, 196, (10, 16, 16, 3))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    for split, count in (("train", 50_000), ("validation", 400), ("test", 1000)):
        labels = generator.permutation(np.arange(count) % 10)
        columns = {"image": pictures(labels, generator, shapes), "label": labels.tolist()}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / "data" / f"{split}.parquet")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=10, hidden_dropout_prob=0.0,
    )  # fmt: skip
    net = ViTForImageClassification(config)
    steps = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        labels = generator.integers(0, 10, 128)
        pixels = np.clip(shapes[labels] + generator.normal(0, 45, (128, 16, 16, 3)), 0, 255)
        x = (torch.tensor(pixels).float().permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        steps.zero_grad()
        net(x, labels=torch.tensor(labels)).loss.backward()
        steps.step()
    net.save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    (folder / "registry.yaml").write_text(REGISTRY.format(folder=folder / "data"))
    return folder


@pytest.fixture(scope="module")
def suite(tiny):
    """MU-Bench with the small files in its place; the checkout itself is not touched."""
    from datasets import load_dataset

    before = fingerprint(Path(HOME))
    with (
        modules_kept(),
        mubench.install(home=HOME) as found,
        pytest.MonkeyPatch.context() as patch,
    ):
        files = {s: str(tiny / "data" / f"{s}.parquet") for s in ("train", "validation", "test")}
        cache = str(tiny / "cache")
        base, front = found.module("data.base"), found.module("")
        patch.setattr(
            base, "load_cifar10", lambda: load_dataset("parquet", data_files=files, cache_dir=cache)
        )
        patch.setitem(front.model_map, "resnet-18", str(tiny / "model"))
        patch.setattr(
            found.module("trainer.base"),
            "load_base_model",
            lambda _: front.model_cls_map["cifar10"].from_pretrained(tiny / "model"),
        )
        yield found
    assert fingerprint(Path(HOME)) == before


def fingerprint(root):
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and ".git" not in path.parts:
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def run_theirs(tiny, out, method, block, **more):
    config = {
        **mubench.make_config("cifar10/resnet-18/unsc/2.0/42", "microsoft/resnet-18"),
        "unlearn_method": method,
        "num_train_epochs": 0,
        "learning_rate": RECIPE["lr"],
        "dataloader_num_workers": 0,
        "output_dir": str(out),
        "use_cpu": True,
        "disable_tqdm": True,
        "unsc_plugin": block,
        **more,
    }
    path = tiny / f"{out.name}.json"
    path.write_text(json.dumps(config))
    return mubench.main([str(Path(HOME) / "experiment/cifar10/unlearn.py"), str(path)])


def run_ours(tiny, out, method, block):
    forget = {"kind": "class", "classes": [0]}
    if "forget" not in block:
        forget = {
            "kind": "index_prefix", "path": str(Path(HOME) / "mubench/df/cifar10.txt"),
            "ratio": 2.0, "row_order": "hub",
        }  # fmt: skip
        if method == "soft_weighted":
            forget["scenario"] = "correction"
    words = ["run", method, "--plugin", tiny / "registry.yaml", "--data", "tiny-mubench"]
    words += ["--model", f"hf:{tiny / 'model'}", "--forget", json.dumps(forget), "--seed", 42]
    for key, value in {**RECIPE, "schedule": "cosine"}.items():
        words += ["--recipe", f"{key}={value}"]
    for key, value in block.get("set", {}).items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    words += ["--reference", "none", "--metrics", "core", "--layout", "mubench", "--json"]
    return unsc(*words, "--device", "cpu", "--out", out, "--quiet").json


FILES = {
    *(f"{split}_results.json" for split in ("test", "df", "dr", "unlearn_final", "all", "plugin")),
    *(f"pred_logit_{split}.npy" for split in ("test", "df", "dr")),
    *("model.safetensors", "config.json", "README.md", "trainer_state.json", "training_args.bin"),
}
FINAL = {
    *("dt_accuracy", "df_accuracy", "dr_accuracy", "knowledge_gap", "zrf"),
    *("unlearn_overall_accuracy", "unlearn_time"),
}


@window
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "method", "block"), METHODS, ids=[one[0] for one in METHODS])
def test_its_script_and_our_run_agree(suite, tiny, tmp_path, name, method, block):
    torch.set_num_threads(1)
    theirs = tmp_path / name
    assert run_theirs(tiny, theirs, name, block) == 0
    assert {path.name for path in theirs.iterdir() if path.is_file()} >= FILES
    final = json.loads((theirs / "unlearn_final_results.json").read_text())
    assert set(final) == FINAL
    receipt = json.loads((theirs / "plugin_results.json").read_text())
    assert receipt["orig_dt"]["source"] == "measured"

    ours = run_ours(tiny, tmp_path / "ours", method, block)
    record = receipt["record"]
    assert record["hashes"]["forget"] == ours["hashes"]["forget"]
    assert record["hashes"]["labels"] == ours["hashes"]["labels"]
    assert record["hashes"]["original"] == ours["hashes"]["original"]
    shared = set(record["metrics"]) & set(ours["metrics"]) - {"mubench.unlearn_time"}
    assert {"acc_forget", "acc_test", "mubench.zrf", "mubench.unlearn_overall_accuracy"} <= shared
    for key in sorted(shared):
        assert record["metrics"][key] == pytest.approx(ours["metrics"][key], abs=1e-6), key
    for split in ("test", "df", "dr"):
        pair = [np.load(at / f"pred_logit_{split}.npy") for at in (theirs, tmp_path / "ours")]
        assert pair[0].shape == pair[1].shape
        print(name, split, "largest difference of a logit", np.abs(pair[0] - pair[1]).max())
    _numbers_agree(final, theirs, record)


def _numbers_agree(final, folder, record):
    """MU-Bench's own numbers are ours: drawn ones within four standard errors of 500 draws."""
    ours = record["metrics"]
    overall = "unlearn_overall_accuracy"
    assert final[overall] == pytest.approx(ours[f"mubench.{overall}"], abs=1e-9)
    logits = np.load(folder / "pred_logit_df.npy")
    draws = [numbers.zrf(logits, seed=seed, draws=1) for seed in range(20)]
    error = np.std(draws, ddof=1) / np.sqrt(500) + np.std(draws, ddof=1) / np.sqrt(50)
    assert abs(final["zrf"] - ours["mubench.zrf"]) <= 4 * error
    # AUC of 0/1 scores: its spread over draws is that of the mean of |D_f| retained rows, halved.
    right = ours["mubench.dr_accuracy"]
    spread = np.sqrt(right * (1 - right) / len(logits)) / 2
    assert abs(final["knowledge_gap"] - ours["mubench.knowledge_gap"]) <= (
        4 * spread / np.sqrt(500) + 1e-12
    )


@window
def test_data_of_a_folder_take_the_place_of_the_hub(suite, tiny, monkeypatch):
    from unsc_plugin.adapters import _mubench_runner as runner

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tiny / "cache"))
    base = suite.module("data.base")
    before = base.load_cifar10
    options = mubench.Options.of({"data_dir": str(tiny / "data")})
    with suite.using(options, []), runner._local_data(suite, "cifar10"):
        found = base.load_cifar10()
    assert base.load_cifar10 is before
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 50_000, "validation": 400, "test": 1000,
    }  # fmt: skip
    assert set(found["train"].column_names) == {"image", "label"}


@window
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_retraining_and_l2ul_run_too(suite, tiny, tmp_path):
    for name in ("retrain", "l2ul"):
        assert run_theirs(tiny, tmp_path / name, name, {}, num_train_epochs=1) == 0
        assert (tmp_path / name / "all_results.json").is_file()


@pytest.fixture
def tiny_texts(tmp_path, monkeypatch):
    """Short texts in place of IMDB and a one-layer BERT, for the script as it stands."""
    import transformers
    from datasets import Dataset, DatasetDict

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=128)
    generator = np.random.default_rng(0)

    def part(count):
        labels = np.arange(count) * 2 // count  # negative ones first, as in the original
        texts = [f"the {'good' if y else 'bad'} {generator.choice(words[7:])}" for y in labels]
        return Dataset.from_dict({"text": texts, "label": labels.tolist()})

    data = DatasetDict({"train": part(25_000), "test": part(200), "ood": part(60)})
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=2,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    with modules_kept(), mubench.install(home=HOME) as found:
        front = found.module("")
        monkeypatch.setattr(found.module("data.base"), "load_imdb", lambda: data)
        monkeypatch.setattr(
            found.module("trainer.base"),
            "load_base_model",
            lambda _: front.model_cls_map["imdb"].from_pretrained(tmp_path / "model"),
        )
        yield found


@window
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_for_texts_runs_too(tiny_texts, tmp_path):
    config = {
        **mubench.make_config("imdb/bert-base/plugin-neggrad/2.0/42", "bert-base-uncased"),
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = Path(HOME) / "experiment/imdb/unlearn.py"
    assert mubench.main([str(script), str(tmp_path / "config.json")]) == 0
    final = json.loads((tmp_path / "run" / "unlearn_final_results.json").read_text())
    assert set(final) == FINAL | {"ood_accuracy"}
    assert np.load(tmp_path / "run" / "pred_logit_df.npy").shape == (500, 2)
    receipt = json.loads((tmp_path / "run" / "plugin_results.json").read_text())
    assert receipt["split_sha256"].startswith("131cc3e2f16815c3")
    assert receipt["orig_dt"]["source"] == "table"
