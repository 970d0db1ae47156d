"""Influences on timm and Hugging Face classifiers: head and full scope against explicit gradients.

Every gradient of the reference is that of one row, by reverse mode on the model as it is, in
float64; the passes under test see batches and use forward mode.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from unsc_plugin.influence import Curvature, objective
from unsc_plugin.models import build
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import state_sha256
from unsc_plugin.spec import BackboneEntry, DataInfo

torch.set_num_threads(1)
DOUBLE = torch.float64
K, N, TOKENS, WORDS = 3, 7, 6, 24
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}

ENTRIES = {
    "vit": BackboneEntry(
        source="timm",
        id="vit_tiny_patch16_224",
        args={"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4},
    ),
    "resnet": BackboneEntry(source="timm", id="test_resnet"),
    "convnext": BackboneEntry(source="timm", id="test_convnext"),
    "hf vit": BackboneEntry(
        source="hf-config", id="vit", args={**SMALL, "intermediate_size": 16, "patch_size": 4}
    ),
    "bert": BackboneEntry(source="hf-config", id="bert", args={**SMALL, "intermediate_size": 16}),
}
SIDE = {"resnet": 32, "convnext": 32}
TOLERANCE = {"hf vit": 1e-6, "bert": 1e-6}
"""Transformers' own attention takes its softmax in float32; 1e-10 for the others."""


def is_text(name):
    return name == "bert"


def model_of(name):
    """Return a model in train mode with dropout, moved off its symmetric start."""
    side = SIDE.get(name, 8)
    info = DataInfo(
        name="toy",
        modality="text" if is_text(name) else "image",
        num_classes=K,
        input_shape=(TOKENS,) if is_text(name) else (3, side, side),
        vocab_size=WORDS,
        pad_token_id=0,
        labels_sha256="",
    )
    model = build(ENTRIES[name], info, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += noise * (0.3 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.double().train()


def rows_for(name, count=N):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, K, (count,), generator=generator)
    if is_text(name):
        tokens = torch.randint(1, WORDS, (count, TOKENS), generator=generator)
        mask = torch.ones_like(tokens)
        mask[::2, -2:] = 0
        return Rows.of({"input_ids": tokens * mask, "attention_mask": mask}, labels)
    side = SIDE.get(name, 8)
    pixels = torch.rand(count, 3, side, side, generator=generator, dtype=DOUBLE)
    return Rows.of({"pixel_values": pixels}, labels)


def explicit(model, rows, parameters):
    """Return the gradient (n, p) of every row's loss and of its logits (n, K, p), row by row."""
    model = copy.deepcopy(model).eval()
    known = dict(model.named_parameters())
    chosen = [known[name] for name in parameters]

    def flat(value):
        found = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
        parts = zip(chosen, found, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in parts])

    losses, jacobians = [], []
    for row in range(len(rows)):
        batch = rows.gather([row])
        logits = model(**batch.inputs)
        losses.append(flat(functional.cross_entropy(logits, batch.labels)))
        jacobians.append(torch.stack([flat(value) for value in logits[0]]))
    return torch.stack(losses), torch.stack(jacobians)


def close(one, other, tolerance):
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= tolerance * max(float(other.abs().max()), 1e-6)


@pytest.mark.parametrize("name", ENTRIES)
def test_full_scope(name):
    model, rows = model_of(name), rows_for(name)
    before = state_sha256(model)
    here = objective(model, rows, scope="full", ridge=0.5, batch_size=3)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    gradients, jacobians = explicit(model, rows, names)
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(here.p, 2, generator=generator, dtype=DOUBLE)
    c = torch.randn(N, generator=generator, dtype=DOUBLE)
    close(here.along(here.theta, v), (gradients @ v).T, TOLERANCE.get(name, 1e-10))
    assert here.stats["jvp_mode"] == "jvp"
    close(here.gradient(here.theta, c), gradients.T @ c, TOLERANCE.get(name, 1e-10))
    pi = torch.softmax(here.outputs(here.theta, rows), dim=1)
    moved = torch.einsum("nKp,pk->nKk", jacobians, v)
    curved = pi[:, :, None] * (moved - (pi[:, :, None] * moved).sum(1, keepdim=True))
    expected = torch.einsum("n,nKp,nKk->pk", c, jacobians, curved)
    close(here.ggn_product(here.theta, c, v), expected, TOLERANCE.get(name, 1e-9))
    assert state_sha256(model) == before
    assert all(module.training for module in model.modules())
    here.stats["jvp_mode"] = "double_vjp"
    close(here.along(here.theta, v), (gradients @ v).T, TOLERANCE.get(name, 1e-10))


@pytest.mark.parametrize("name", ENTRIES)
def test_head_scope(name):
    model, rows = model_of(name), rows_for(name)
    before = state_sha256(model)
    here = objective(model, rows, scope="head", ridge=0.5, batch_size=3)
    owned = set(model.head.parameters())
    names = [n for n, p in model.named_parameters() if p in owned]
    gradients, _ = explicit(model, rows, names)
    generator = torch.Generator().manual_seed(5)
    weight = gradients[:, : model.head.weight.numel()].view(N, K, -1)
    gradients = torch.cat([weight, gradients[:, -K:, None]], dim=2).flatten(1)
    v = torch.randn(here.p, 2, generator=generator, dtype=DOUBLE)
    close(here.along(here.theta, v), (gradients @ v).T, TOLERANCE.get(name, 1e-10))
    close(here.gradient(here.theta, torch.ones(N)), gradients.sum(0), TOLERANCE.get(name, 1e-10))
    assert state_sha256(model) == before
    assert all(module.training for module in model.modules())
    assert here.dense


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_influences_of_the_whole_network_in_float32(name):
    model, rows = model_of(name).float(), rows_for(name, 12)
    here = objective(model, rows, scope="full", ridge=1.0, batch_size=5)
    exact = objective(copy.deepcopy(model).double(), rows, scope="full", ridge=1.0)
    ones, settings = torch.ones(12), Curvature(damping=0.1)
    found = here.factor(here.theta, ones, settings)
    gradient = exact.gradient(exact.theta, ones)
    influences = here.along(here.theta, found.solve(gradient)[:, None])
    wide = exact.factor(exact.theta, ones, settings)
    expected = exact.along(exact.theta, wide.solve(gradient)[:, None])
    assert found.stats["residual"] <= 1e-4
    close(influences, expected, 1e-3)
