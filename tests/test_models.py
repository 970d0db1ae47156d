from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import numpy as np
import pytest
import timm
import torch
from torch import nn

from unsc_plugin.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingOptional,
    NotApplicable,
    UnknownName,
)
from unsc_plugin.models import (
    Classifier,
    build,
    load_checkpoint,
    load_model,
    resolve,
    save_model,
    save_weights,
    state_sha256,
    tokenizer_for,
    wrap,
)
from unsc_plugin.spec import BackboneEntry, DataInfo, Recipe

torch.set_num_threads(1)
K = 5
MLP = BackboneEntry(source="torch", id="mlp")
IMAGE_NAMES = [
    "timm:test_resnet",
    "timm:test_convnext",
    "timm:test_vit",
    "timm:test_nfnet",
    "timm:test_coatnet",
    "timm:resnet18",
    "timm:mobilenetv3_small_050",
    "timm:vit_tiny_patch16_224",
    "timm:gmixer_12_224",
    "hf-config:vit",
    "hf-config:swin",
    "hf-config:convnext",
    "hf-config:resnet",
    "hf-config:deit",
]
TEXT_NAMES = [
    "hf-config:bert",
    "hf-config:roberta",
    "hf-config:distilbert",
    "hf-config:electra",
    "hf-config:gpt2",
]
OWN = {
    "mlp": "image tabular",
    "logistic": "image tabular",
    "small-cnn": "image",
    "tiny-text": "text",
}
OWN_CASES = [(name, modality) for name, found in OWN.items() for modality in found.split()]


def image_info(channels=1, side=8, classes=K):
    return info("image", (channels, side, side), classes)


def info(modality, shape, classes=K, **more):
    return DataInfo(
        name="toy",
        modality=modality,
        num_classes=classes,
        input_shape=shape,
        labels_sha256="",
        **more,
    )


TEXT = info("text", (9,), vocab_size=40, pad_token_id=0)
TABLE = info("tabular", (6,))
INFOS = {"image": image_info(3, 8), "text": TEXT, "tabular": TABLE}


def inputs_of(data, rows=3):
    draw = torch.Generator().manual_seed(7)
    if data.modality == "image":
        return {"pixel_values": torch.rand(rows, *data.input_shape, generator=draw)}
    if data.modality == "tabular":
        return {"features": torch.randn(rows, *data.input_shape, generator=draw)}
    ids = torch.randint(1, data.vocab_size, (rows, *data.input_shape), generator=draw)
    ids[0, 5:] = data.pad_token_id
    return {"input_ids": ids, "attention_mask": (ids != data.pad_token_id).long()}


def names_and_infos():
    cases = [(name, image_info(1 + 2 * (place % 2))) for place, name in enumerate(IMAGE_NAMES)]
    cases += [(name, TEXT) for name in TEXT_NAMES]
    return [pytest.param(name, data, id=name) for name, data in cases] + [
        pytest.param(name, INFOS[modality], id=f"{name}-{modality}") for name, modality in OWN_CASES
    ]


def entry_of(name):
    return BackboneEntry(source="torch", id=name) if name in OWN else resolve(name, {})


def same_state(one, two):
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(("name", "data"), names_and_infos())
def test_every_family_keeps_the_contract(name, data):
    model = build(entry_of(name), data, seed=3)
    inputs = inputs_of(data)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_()  # mixers start with a head of zeros, which would hide everything
        logits = model(**inputs, unknown=torch.zeros(3))
        features = model.features(**inputs)
        again = copy.deepcopy(model)(**inputs)
    assert not model.training
    assert logits.shape == (3, K)
    assert logits.dtype == torch.float32
    assert features.ndim == 2
    assert isinstance(model.head, nn.Linear)
    torch.testing.assert_close(model.head(features), logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(again, logits)
    assert model.pixel_domain == (data.modality == "image")
    assert not torch.equal(logits[0], logits[1])
    assert same_state(fresh, build(entry_of(name), data, seed=3))
    assert not same_state(fresh, build(entry_of(name), data, seed=4))


@pytest.mark.parametrize(("name", "data"), names_and_infos())
def test_one_step_of_training_runs_and_moves_the_weights(name, data):
    model = build(entry_of(name), data, seed=0).train()
    before = state_sha256(model)
    loss = nn.functional.cross_entropy(model(**inputs_of(data)), torch.arange(3))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert state_sha256(model) != before


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", ["timm:test_convnext", "hf-config:vit", "small-cnn"])
def test_any_number_of_channels(name, channels):
    data = image_info(channels)
    model = build(entry_of(name), data, seed=0)
    assert model(**inputs_of(data)).shape == (3, K)
    assert model.pixels.channels == channels


@pytest.mark.parametrize("name", ["timm:test_vit", "hf-config:bert", "mlp"])
def test_building_leaves_the_global_generators_alone(name):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    states = random.getstate(), np.random.get_state()[1].tolist()
    build(entry_of(name), TEXT if "bert" in name else image_info(), seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize(
    ("name", "side", "size"),
    [
        ("timm:test_vit", 8, 32),
        ("timm:test_vit", 33, 64),
        ("timm:inception_v3", 8, 128),
        ("hf-config:vit", 8, 8),
        ("hf-config:vit", 30, 32),
        ("hf-config:convnext", 28, 32),
    ],
)
def test_the_input_size_is_the_smallest_legal_one(name, side, size):
    assert build(resolve(name, {}), image_info(1, side), seed=0).pixels.size == (size, size)


def test_rectangular_images_stay_rectangular():
    data = info("image", (1, 20, 40))
    model = build(resolve("timm:test_resnet", {}), data, seed=0)
    assert model.pixels.size == (32, 64)
    assert model(**inputs_of(data)).shape == (3, K)


def test_pixels_are_repeated_resized_and_normalised():
    entry = BackboneEntry(source="torch", id="mlp", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    model = build(entry, image_info(1, 4), seed=0)
    pixels = torch.rand(2, 1, 4, 4)
    expected = torch.stack(
        [(pixels[:, 0] - m) / s for m, s in ((0.1, 1), (0.2, 2), (0.3, 4))], dim=1
    )
    torch.testing.assert_close(model.pixels(pixels), expected)
    torch.testing.assert_close(
        model.pixels(torch.full((1, 1, 9, 9), 0.7)), model.pixels(torch.full((1, 1, 4, 4), 0.7))
    )
    assert not any("pixels" in key for key in model.state_dict())
    with pytest.raises(DataError, match="1 or 3 channels"):
        model.pixels(torch.rand(2, 2, 4, 4))


def test_logits_of_float64_models_stay_float64():
    model = build(MLP, TABLE, seed=0).double()
    assert model(features=torch.randn(2, 6)).dtype == torch.float64


def test_missing_input_is_named():
    with pytest.raises(DataError, match=r"expected the input 'features', got \['x'\]"):
        build(MLP, TABLE, seed=0)(x=torch.randn(2, 6))


def test_cifar_stem():
    entry = BackboneEntry(source="timm", id="resnet18", stem="cifar")
    model = build(entry, image_info(3, 32), seed=0)
    assert model.backbone.conv1.kernel_size == (3, 3)
    assert model.backbone.conv1.stride == (1, 1)
    assert isinstance(model.backbone.maxpool, nn.Identity)
    assert model.pixels.size == (32, 32)
    assert build(entry, image_info(1, 8), seed=0)(pixel_values=torch.rand(2, 1, 8, 8)).shape == (
        2,
        K,
    )


@pytest.mark.parametrize("name", ["test_vit", "mobilenetv3_small_050"])
def test_cifar_stem_needs_a_resnet(name):
    with pytest.raises(NotApplicable, match="stem"):
        build(BackboneEntry(source="timm", id=name, stem="cifar"), image_info(), seed=0)


def test_distilled_models_have_two_heads_and_no_linear_one():
    data = image_info()
    model = build(resolve("timm:deit_tiny_distilled_patch16_224", {}), data, seed=0)
    first, second = model.head
    features = model.features(**inputs_of(data)).chunk(2, dim=1)
    mean = (first(features[0]) + second(features[1])) / 2
    torch.testing.assert_close(mean, model(**inputs_of(data)), atol=1e-5, rtol=1e-5)


def test_padding_behind_the_mask_changes_no_logit():
    ids = torch.tensor([[3, 4, 0, 0], [3, 4, 9, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    for entry in (BackboneEntry(source="torch", id="tiny-text"), resolve("hf-config:bert", {})):
        logits = build(entry, TEXT, seed=0)(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(logits[0], logits[1])


# ------------------------------------------------------------------------------- names


def test_names_resolve():
    entries = {"resnet18-cifar": BackboneEntry(source="timm", id="resnet18", stem="cifar")}
    assert resolve("resnet18-cifar", entries) is entries["resnet18-cifar"]
    assert resolve("timm:resnet18.a1_in1k", {}).id == "resnet18.a1_in1k"
    assert resolve("hf:google/vit-base-patch16-224", {}).source == "hf"
    assert resolve("hf-config:swin?depths=[1,1]&embed_dim=8", {}).args == {
        "depths": [1, 1],
        "embed_dim": 8,
    }


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet19", "timm:resnet18"),
        ("resnet18-cifer", "resnet18-cifar"),
        ("timm:resnet1", "resnet18"),
        ("timm:resnet18.a1_in2k", "resnet18.a1_in1k"),
        ("hf-config:berd", "bert"),
    ],
)
def test_unknown_names_list_the_nearest(name, nearest):
    with pytest.raises(UnknownName) as caught:
        resolve(name, {"resnet18-cifar": MLP})
    assert nearest in str(caught.value)


@pytest.mark.parametrize("name", ["../model", "hf:../../model", "timm:../x", "a/../b"])
def test_names_do_not_climb(name):
    with pytest.raises(ConfigError, match=r"without '\.\.'"):
        resolve(name, {})


@pytest.mark.parametrize("name", ["hf:no such/thing", "nonsense:thing", "hf:a/b/c"])
def test_malformed_names(name):
    with pytest.raises(UnknownName):
        resolve(name, {})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (resolve("hf-config:vit?patch_sze=2", {}), "did you mean 'patch_size'"),
        (BackboneEntry(source="torch", id="mlp", args={"hiden": (3,)}), "did you mean 'hidden'"),
        (BackboneEntry(source="timm", id="resnet18", args={"nonsense": 1}), "nonsense"),
    ],
)
def test_unknown_arguments(entry, message):
    with pytest.raises(ConfigError, match=message):
        build(entry, image_info(), seed=0)


def test_config_keys_go_by_their_common_names():
    entry = resolve("hf-config:distilbert?hidden_size=32&num_hidden_layers=1", {})
    assert build(entry, TEXT, seed=0).features(**inputs_of(TEXT)).shape == (3, 32)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("timm:test_vit", TEXT),
        ("hf-config:bert", image_info()),
        ("hf-config:vit", TABLE),
        ("mlp", TEXT),
        ("tiny-text", TABLE),
        ("small-cnn", TABLE),
    ],
)
def test_other_modalities_are_refused(name, data):
    with pytest.raises(NotApplicable):
        build(entry_of(name), data, seed=0)


def test_text_needs_a_vocabulary():
    with pytest.raises(ConfigError, match="vocab_size"):
        build(resolve("hf-config:bert", {}), info("text", (4,)), seed=0)


@pytest.mark.parametrize("name", ["hf:google/vit-base-patch16-224-in21k", "timm:resnet18"])
def test_offline_weights_name_the_alternatives(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingOptional) as caught:
        build(resolve(name, {}), image_info(), seed=0, pretrained=True)
    assert name in str(caught.value)
    assert "local folder" in str(caught.value)
    assert caught.value.exit_code == 3


def test_weights_that_were_never_published():
    with pytest.raises(ConfigError, match="published weights"):
        build(resolve("timm:test_vit4", {}), image_info(), seed=0, pretrained=True)
    with pytest.raises(ConfigError, match="published weights"):
        build(MLP, TABLE, seed=0, pretrained=True)


# ------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["timm:test_resnet", "hf-config:electra", "tiny-text"])
def test_weights_round_trip_bit_for_bit(name, tmp_path):
    data = TEXT if name != "timm:test_resnet" else image_info()
    model, other = (build(entry_of(name), data, seed=seed) for seed in (0, 1))
    save_weights(model, tmp_path / "w.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pt")
    assert state_sha256(model) != state_sha256(other)
    load_checkpoint(other, tmp_path / "w.safetensors")
    assert state_sha256(model) == state_sha256(other)
    fresh = build(entry_of(name), data, seed=2)
    load_checkpoint(fresh, tmp_path / "w.pt")
    assert state_sha256(model) == state_sha256(fresh)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "_orig_mod."])
def test_checkpoints_of_the_bare_or_parallel_model_load(prefix, tmp_path):
    model, other = (build(MLP, TABLE, seed=seed) for seed in (0, 1))
    state = {prefix + name: tensor for name, tensor in model.backbone.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    load_checkpoint(other, tmp_path / "w.pth")
    assert same_state(model, other)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids):
        return self.head(self.table(input_ids).mean(dim=1))


def test_tied_weights_are_written_and_may_be_missing(tmp_path):
    model, other = Tied(), Tied()
    save_weights(model, tmp_path / "w.safetensors")
    load_checkpoint(other, tmp_path / "w.safetensors")
    assert state_sha256(model) == state_sha256(other)
    assert other.head.weight is other.table.weight
    torch.save({"table.weight": model.table.weight.detach() + 1}, tmp_path / "half.pt")
    load_checkpoint(other, tmp_path / "half.pt")
    assert torch.equal(other.head.weight, model.table.weight + 1)


class Payload:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_damaged_unsafe_and_foreign_checkpoints_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build(MLP, TABLE, seed=0)
    before = state_sha256(model)
    save_weights(model, tmp_path / "whole.safetensors")
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    for suffix in ("safetensors", "pt"):
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
        (tmp_path / f"empty.{suffix}").write_bytes(b"")
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Payload()))
    torch.save({"model": model}, tmp_path / "object.pt")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    names = ["cut.safetensors", "cut.pt", "empty.safetensors", "empty.pt", "bomb.pt", "object.pt"]
    for name in [*names, "list.pt", "absent.safetensors"]:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(model, tmp_path / name)
        assert name in str(caught.value)
        assert len(str(caught.value).splitlines()) < 12
    assert not (tmp_path / "executed").exists()
    assert state_sha256(model) == before


def test_weights_of_another_architecture_are_explained(tmp_path):
    model = build(resolve("timm:test_resnet", {}), image_info(), seed=0)
    before = state_sha256(model)
    wider = build(resolve("timm:test_resnet", {}), image_info(classes=7), seed=0)
    save_weights(wider, tmp_path / "k7.safetensors")
    with pytest.raises(CheckpointError, match=r"fc.weight expected \(5, \d+\) found \(7, \d+\)"):
        load_checkpoint(model, tmp_path / "k7.safetensors")
    save_weights(build(MLP, image_info(), seed=0), tmp_path / "mlp.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: .* more\n  unexpected: ") as caught:
        load_checkpoint(model, tmp_path / "mlp.safetensors")
    assert len(str(caught.value).splitlines()) < 8
    assert state_sha256(model) == before


def test_the_hash_sees_names_types_shapes_and_bytes():
    def digest(**tensors):
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return state_sha256(module)

    base = digest(a=torch.zeros(2, 2), b=torch.tensor(0))
    assert base == digest(b=torch.tensor(0), a=torch.zeros(2, 2).T)
    others = [
        digest(a=torch.zeros(4), b=torch.tensor(0)),
        digest(c=torch.zeros(2, 2), b=torch.tensor(0)),
        digest(a=torch.zeros(2, 2, dtype=torch.bfloat16), b=torch.tensor(0)),
        digest(a=torch.tensor([[0.0, -0.0], [0, 0]]), b=torch.tensor(0)),
    ]
    assert len({base, *others}) == 5


# ------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("entry", "data"),
    [
        (BackboneEntry(source="timm", id="resnet18", stem="cifar"), image_info(1, 12)),
        (BackboneEntry(source="torch", id="mlp", args={"hidden": [7]}), TABLE),
        (BackboneEntry(source="hf-config", id="vit", recipe=Recipe()), image_info(3, 10)),
        (BackboneEntry(source="hf-config", id="bert"), TEXT),
    ],
)
def test_exported_folders_load_bit_for_bit(entry, data, tmp_path):
    model = build(entry, data, seed=5)
    save_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        "unsc_model.json",
    ]
    assert state_sha256(again) == state_sha256(model)
    assert torch.equal(again(**inputs_of(data)), model(**inputs_of(data)))
    save_model(again, tmp_path / "twice")
    assert state_sha256(load_model(tmp_path / "twice")) == state_sha256(model)
    fresh = build(resolve(str(tmp_path / "out"), {}), data, seed=6)
    assert state_sha256(fresh) != state_sha256(model)
    assert fresh.state_dict().keys() == model.state_dict().keys()


def test_folders_of_transformers_load_with_their_weights(tmp_path):
    data = image_info(3, 8)
    model = build(resolve("hf-config:vit", {}), data, seed=0)
    model.backbone.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again(**inputs_of(data)), model(**inputs_of(data)))
    assert again.pixels.size == (8, 8)
    resized = build(resolve(f"hf:{tmp_path}", {}), image_info(1, 20, 7), seed=0, pretrained=True)
    body = "backbone.vit.encoder.layer.0"
    kept = {k: v for k, v in model.state_dict().items() if k.startswith(body)}
    assert all(torch.equal(resized.state_dict()[k], v) for k, v in kept.items())
    assert resized(pixel_values=torch.rand(2, 1, 20, 20)).shape == (2, 7)
    assert tokenizer_for(resolve(f"hf:{tmp_path}", {})) is None
    with pytest.raises(NotApplicable, match="save_pretrained"):
        save_model(again, tmp_path / "no")


def test_damaged_folders_of_transformers(tmp_path):
    build(resolve("hf-config:bert", {}), TEXT, seed=0).backbone.save_pretrained(tmp_path)
    entry = resolve(str(tmp_path), {})
    assert build(entry, TEXT, seed=0, pretrained=True).num_classes == K
    with pytest.raises(ConfigError, match="at most 11 tokens"):
        build(entry, info("text", (30,), vocab_size=40), seed=0)
    with pytest.raises(ConfigError, match="token ids below 40"):
        build(entry, info("text", (9,), vocab_size=41), seed=0)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        build(entry, TEXT, seed=0, pretrained=True)
    save_weights(nn.Linear(2, 2), weights)
    with pytest.raises(CheckpointError, match="weights of every layer"):
        build(entry, TEXT, seed=0, pretrained=True)


def test_folders_of_timm_load_with_their_weights(tmp_path):
    data = image_info(1, 32)
    model = build(resolve("timm:test_resnet", {}), data, seed=0)
    settings = model.backbone.pretrained_cfg | {
        "input_size": (1, 32, 32),
        "mean": tuple(model.pixels.mean.flatten().tolist()),
        "std": tuple(model.pixels.std.flatten().tolist()),
    }
    for key in ("tag", "test_input_size", "pool_size"):
        settings.pop(key, None)
    model.backbone.pretrained_cfg = settings
    timm.models.save_for_hf(model.backbone, tmp_path, safe_serialization=True)
    again = load_model(tmp_path)
    assert torch.equal(again(**inputs_of(data)), model(**inputs_of(data)))


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="expected an exported model"):
        resolve(str(tmp_path), {})
    (tmp_path / "unsc_model.json").write_text('{"schema": 1, "source": "pickle"}')
    with pytest.raises(ConfigError, match="source"):
        resolve(str(tmp_path), {})


def test_load_model_says_what_is_missing():
    with pytest.raises(ConfigError, match="expected num_classes"):
        load_model("timm:test_vit")
    model = load_model("timm:test_vit", num_classes=4)
    assert model(pixel_values=torch.rand(1, 3, 64, 64)).shape == (1, 4)


# ------------------------------------------------------------------------------- wrapping


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, K)
        self.out = nn.Linear(K, K)

    def forward(self, x):
        features = torch.relu(self.body(x))
        return features, self.out(features)


def test_wrapped_tuples_pick_the_logits():
    module = Pair()
    model = wrap(module, num_classes=K, modality="tabular", output=1)
    x = torch.randn(4, 6)
    assert torch.equal(model(features=x), module(x)[1])
    assert torch.equal(model.features(features=x), module(x)[0])
    assert model.head is module.out
    assert wrap(module, num_classes=K, modality="tabular", head="body").head is module.body
    assert model.origin is None


def test_wrapped_pixels_are_normalised_when_told_how():
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, K))
    plain = wrap(module, num_classes=K, modality="image")
    inside = wrap(module, num_classes=K, modality="image", mean=(0.5,) * 3, std=(0.25,) * 3)
    x = torch.rand(2, 3, 2, 2)
    assert (plain.pixel_domain, inside.pixel_domain) == (False, True)
    torch.testing.assert_close(inside(pixel_values=x), plain(pixel_values=(x - 0.5) / 0.25))
    with pytest.raises(ConfigError, match="both mean and std"):
        wrap(module, num_classes=K, modality="image", mean=(0.5,) * 3)


def test_a_layer_before_a_softmax_is_not_taken_for_the_head():
    module = nn.Sequential(nn.Linear(6, K), nn.LogSoftmax(dim=1))
    example = {"features": torch.randn(2, 6)}
    model = wrap(module, num_classes=K, modality="tabular", example=example)
    assert isinstance(model.head, nn.ModuleList)
    assert model.features(**example).shape == (2, 6)


def test_convolutional_heads_give_pooled_features():
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, K, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model = wrap(module, num_classes=K, modality="image")
    x = torch.rand(2, 1, 6, 6)
    assert isinstance(model.head, nn.Conv2d)
    pooled = model.features(pixel_values=x)
    expected = model.head(pooled[:, :, None, None]).flatten(1)
    torch.testing.assert_close(expected, model(pixel_values=x))


def test_own_features_and_own_input_key():
    module = nn.Linear(6, K)
    model = wrap(
        module,
        num_classes=K,
        modality="tabular",
        input_key="x",
        features=lambda _, inputs: inputs["x"] * 2,
    )
    assert torch.equal(model.features(x=torch.ones(1, 6)), torch.full((1, 6), 2.0))


def test_wrong_heads_and_logits_are_refused():
    module = nn.Linear(6, 3)
    with pytest.raises(ConfigError, match="head"):
        wrap(module, num_classes=3, modality="tabular", head="classifier")
    wrong = wrap(module, num_classes=K, modality="tabular")
    with pytest.raises(NotApplicable, match=r"shape \(rows, 5\)"):
        wrong(features=torch.zeros(2, 6))
    with pytest.raises(NotApplicable, match="final layer with 5 outputs"):
        _ = wrong.head


def test_wrapping_keeps_the_modes_of_a_mixed_module():
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, K)).train()
    module[1].eval()
    before = state_sha256(module)
    example = {"features": torch.randn(3, 6)}
    model = wrap(module, num_classes=K, modality="tabular", example=example)
    assert (model.training, module[0].training, module[1].training) == (True, True, False)
    assert state_sha256(module) == before


# ------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", ["timm:test_convnext", "timm:test_vit", "hf-config:vit"])
def test_per_sample_gradients_equal_single_gradients(name):
    data = image_info()
    model = build(resolve(name, {}), data, seed=0)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    pixels, labels = inputs_of(data)["pixel_values"], torch.arange(3)

    def loss(weights, x, y):
        logits = torch.func.functional_call(model, weights, (), {"pixel_values": x[None]})
        return nn.functional.cross_entropy(logits, y[None])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: fused attention is mapped by a loop
        many = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
            parameters, pixels, labels
        )
    one = torch.func.grad(loss)(parameters, pixels[1], labels[1])
    for key, value in one.items():
        torch.testing.assert_close(many[key][1], value, atol=1e-5, rtol=1e-4)


def test_pixels_have_gradients():
    data = image_info()
    pixels = inputs_of(data)["pixel_values"].requires_grad_()
    build(resolve("timm:test_convnext", {}), data, seed=0)(pixel_values=pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0


# ------------------------------------------------------------------------------- registry, imports


def test_small_backbones_import_neither_timm_nor_transformers():
    code = (
        "import sys; from unsc_plugin.models import build, resolve\n"
        "from unsc_plugin.spec import BackboneEntry, DataInfo\n"
        "info = DataInfo(name='t', modality='tabular', num_classes=2, input_shape=(3,),"
        " labels_sha256='')\n"
        "build(BackboneEntry(source='torch', id='mlp'), info, seed=0)\n"
        "print(sorted({'timm', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


def test_classifier_is_a_module_with_named_attributes():
    model = build(MLP, image_info(), seed=0)
    assert isinstance(model, Classifier)
    assert model.input_key == "pixel_values"
    assert model.special_token_ids is None
    assert model.feature_scale is None
    assert model.origin.entry.input_size == (1, 8, 8)
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone"}
