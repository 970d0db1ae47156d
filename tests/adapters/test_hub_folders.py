"""What is exported is what the model's own library reads: same inputs, same logits."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from unsc_plugin._data.text import encode, train_words
from unsc_plugin.adapters import hub
from unsc_plugin.errors import ConfigError, RoundTripFailed
from unsc_plugin.models import (
    Classifier,
    library_of,
    load_model,
    load_native,
    save_native,
    state_sha256,
    wrap,
)

torch.set_num_threads(1)
K = 5
TIMM = ("test_vit", "test_resnet", "test_convnext", "test_nfnet", "mobilenetv3_small_050")
HF_IMAGE = ("vit", "resnet", "convnext", "swin", "mobilenet_v2")
HF_TEXT = ("bert", "distilbert", "roberta", "gpt2")
NAMES = [
    *((f"timm:{name}", 1 + 2 * (at % 2)) for at, name in enumerate(TIMM)),
    *((f"hf-config:{name}", 3 - 2 * (at % 2)) for at, name in enumerate(HF_IMAGE)),
    *((f"hf-config:{name}", 0) for name in HF_TEXT),
]


def made(name: str, channels: int, *, side: int = 32) -> tuple[Classifier, dict[str, torch.Tensor]]:
    """Return a model whose weights are not those of a fresh one, and 8 rows for it."""
    draw = torch.Generator().manual_seed(3)
    if channels:
        model = load_model(name, num_classes=K, input_shape=(channels, side, side), seed=1)
        inputs = {"pixel_values": torch.rand(8, channels, side, side, generator=draw)}
    else:
        more = {"vocab_size": 40, "pad_token_id": 0, "modality": "text"}
        model = load_model(name, num_classes=K, input_shape=(9,), seed=1, **more)
        ids = torch.randint(1, 40, (8, 9), generator=draw)
        ids[0, 5:] = 0
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return changed(model), inputs


def changed(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=draw))
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.add_(0.1)
    return model


def logits(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return getattr(found, "logits", found)


@pytest.mark.parametrize(("name", "channels"), NAMES, ids=[name for name, _ in NAMES])
def test_an_exported_model_gives_the_same_bits_when_read_again(tmp_path, name, channels):
    model, inputs = made(name, channels)
    library = save_native(model, tmp_path)
    assert library == ("timm" if name.startswith("timm") else "transformers")
    expected = logits(model, **inputs)
    assert expected.std() > 0
    assert torch.equal(logits(load_native(tmp_path, model), **inputs), expected)
    assert torch.equal(logits(load_model(tmp_path), **inputs), expected)
    files = {path.name for path in tmp_path.iterdir()}
    assert files <= {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(("name", "channels"), NAMES[:5], ids=[name for name, _ in NAMES[:5]])
def test_plain_timm_gives_the_same_bits_on_normalised_pixels(tmp_path, name, channels):
    model, inputs = made(name, channels)
    save_native(model, tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(plain)
    assert settings["input_size"] == (channels, 32, 32)
    assert (settings["crop_pct"], settings["interpolation"]) == (1.0, "bilinear")
    mean, std = (torch.tensor(settings[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        found = plain((inputs["pixel_values"] - mean) / std)
    assert torch.equal(found, logits(model, **inputs))


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_timm_gives_the_same_logits_for_a_picture(tmp_path, channels):
    model, _ = made("timm:test_resnet", channels)
    save_native(model, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, channels), np.uint8)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    prepare = timm.data.create_transform(
        **timm.data.resolve_model_data_config(plain), is_training=False
    )
    ours = {"pixel_values": torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None] / 255}
    with torch.no_grad():
        found = plain(prepare(picture)[None])
    torch.testing.assert_close(found, logits(model, **ours), rtol=1e-4, atol=1e-5)


def test_the_configuration_says_nothing_of_the_weights_it_started_from(tmp_path):
    model, _ = made("timm:test_resnet", 3)
    assert model.backbone.pretrained_cfg["hf_hub_id"]
    save_native(model, tmp_path)
    assert model.backbone.pretrained_cfg["hf_hub_id"]  # the model itself is left alone
    stored = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    gone = {"tag", "url", "hf_hub_id", "license", "test_input_size", "test_crop_pct", "pool_size"}
    assert not {key for key in gone & stored.keys() if stored[key]}


@pytest.mark.parametrize("name", HF_IMAGE)
@pytest.mark.parametrize("channels", [1, 3])
def test_plain_transformers_gives_the_same_logits_for_a_picture(tmp_path, name, channels):
    model, _ = made(f"hf-config:{name}", channels)
    save_native(model, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, channels), np.uint8)
    pictures = [Image.fromarray(one[..., 0] if channels == 1 else one) for one in pixels]
    size = model.pixels.size
    pictures = [one.resize(size[::-1], Image.Resampling.NEAREST) for one in pictures]
    exact = np.stack([np.asarray(one).reshape(*size, channels) for one in pictures])
    ours = {"pixel_values": torch.from_numpy(exact.transpose(0, 3, 1, 2)).float() / 255}
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    given = processor(pictures, return_tensors="pt")
    expected = logits(model, **ours)
    torch.testing.assert_close(given["pixel_values"], model.pixels(ours["pixel_values"]))
    torch.testing.assert_close(logits(plain, **given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_plain_transformers_gives_the_same_bits_on_the_same_pixels(tmp_path, name):
    model, inputs = made(f"hf-config:{name}", 3)
    save_native(model, tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    for tensor in plain.parameters():
        tensor.data = tensor.data.clone()  # kernels round differently on memory mapped from a file
    given = model.pixels(inputs["pixel_values"])
    assert torch.equal(logits(plain.eval(), pixel_values=given), logits(model, **inputs))


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_plain_transformers_gives_the_same_logits_for_a_text(tmp_path, name):
    texts = ["who wrote the book", "where is the river", "what is it ?", "who ran"]
    words = train_words(texts)
    ours = encode(words, [texts], 8)
    more = {"vocab_size": words.get_vocab_size(), "pad_token_id": 0, "modality": "text"}
    model = changed(load_model(f"hf-config:{name}", num_classes=3, input_shape=(8,), **more))
    save_native(model, tmp_path, tokenizer=words)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    given = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(given["input_ids"], ours["input_ids"])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain, **given), logits(model, **ours), rtol=1e-4, atol=1e-5)


def test_a_model_with_the_small_stem_is_read_by_this_package(tmp_path):
    entry = load_model("timm:test_resnet", num_classes=K, input_shape=(3, 32, 32)).origin.entry
    cifar = entry.model_copy(update={"id": "resnet18", "stem": "cifar", "input_size": (3, 32, 32)})
    model = changed(
        load_model("small", num_classes=K, input_shape=(3, 32, 32), entries={"small": cifar})
    )
    assert save_native(model, tmp_path) == "unsc_plugin"
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "unsc_model.json"}
    inputs = {"pixel_values": torch.rand(2, 3, 32, 32)}
    assert torch.equal(logits(load_model(tmp_path), **inputs), logits(model, **inputs))


# --------------------------------------------------------------------------- models of one's own


def receipt_for(model: nn.Module) -> dict[str, object]:
    return {
        "schema": 1,
        "method": {"name": "mine", "version": "1"},
        "request": {"scenario": "random", "n": 120, "fraction": 0.1, "split_sha256": "0" * 64},
        "original": {"sha256": "1" * 64, "source": "mine"},
        "unlearned": {"sha256": state_sha256(model)},
        "after": {"acc_test": 0.5, "own_number": 3.0},
        "date": "2026-01-01T00:00:00+00:00",
    }


def own_models() -> list[tuple[str, Classifier, dict[str, torch.Tensor]]]:
    rows = {"features": torch.randn(8, 6)}
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    hf = made("hf-config:vit", 3)[0].backbone
    of_timm = timm.create_model("test_resnet", num_classes=K)
    pixels = {"pixel_values": torch.rand(8, 3, 32, 32)}
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3)}
    return [
        ("torch", wrap(plain, num_classes=3, modality="tabular"), rows),
        ("transformers", wrap(hf, num_classes=K, modality="image", **statistics), pixels),
        ("timm", wrap(of_timm, num_classes=K, modality="image", **statistics), pixels),
        ("timm", wrap(of_timm, num_classes=K, modality="image"), pixels),
    ]


@pytest.mark.parametrize("place", range(4))
def test_a_wrapped_module_is_exported_as_its_library_reads_it(tmp_path, place):
    library, model, inputs = own_models()[place]
    model = changed(model).eval()
    before = state_sha256(model)
    assert library_of(model) == library
    card = hub.Card(name="mine", data="own", modality=model.modality)
    done = hub.export_model(
        model, tmp_path / "out", card=card, receipt=receipt_for(model), inputs=inputs
    )
    assert (done.library, done.rows) == (library, 8)
    assert {"README.md", "receipt.json", "model.safetensors"} <= done.files.keys()
    assert state_sha256(model) == before
    again = load_native(tmp_path / "out", model)
    assert torch.equal(logits(again, **inputs), logits(model, **inputs))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| own_number | `own_number` | – | 3.0000 | – | – |  |" in text
    assert "no retrained model to compare with" in text


def test_a_receipt_of_another_model_or_form_is_refused(tmp_path):
    _, model, inputs = own_models()[0]
    card = hub.Card(name="mine", data="own", modality="tabular")
    for change, told in (
        ({"unlearned": {"sha256": "2" * 64}}, "unlearned.sha256"),
        ({"methd": 1}, "did you mean 'method'"),
        ({"date": 3}, "date"),
    ):
        receipt = receipt_for(model) | change
        with pytest.raises(ConfigError, match=told):
            hub.export_model(model, tmp_path / "out", card=card, receipt=receipt, inputs=inputs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["other bits", "unreadable"])
def test_a_failed_round_trip_leaves_nothing_behind(tmp_path, monkeypatch, fault):
    _, model, inputs = own_models()[0]
    from unsc_plugin import models

    def read(folder, like):
        twin = load_native(folder, like)
        if fault == "unreadable":
            raise OSError("no such disk")
        with torch.no_grad():
            next(twin.parameters()).mul_(1 + 1e-6)
        return twin

    monkeypatch.setattr(models, "load_native", read)
    card = hub.Card(name="mine", data="own", modality="tabular")
    with pytest.raises(RoundTripFailed, match="nothing was kept"):
        hub.export_model(
            model, tmp_path / "out", card=card, receipt=receipt_for(model), inputs=inputs
        )
    assert not list(tmp_path.iterdir())
    assert RoundTripFailed.exit_code == 1
