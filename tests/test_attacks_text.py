"""Attacks on real architectures: texts through their word embeddings, images of timm and HF."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from torch import nn

from unsc_plugin import attacks
from unsc_plugin._data.text import describe, train_words
from unsc_plugin.attacks import PGD, open_space, perturbed, pgd
from unsc_plugin.errors import DataError, NotApplicable
from unsc_plugin.models import build, resolve, wrap
from unsc_plugin.spec import BackboneEntry, DataInfo

torch.set_num_threads(1)
DOUBLE = torch.float64
K, TOKENS, WORDS = 3, 7, 30
PAD, START, END = 0, 1, 2
SPECIAL = (PAD, START, END)


def info_of(modality, shape, **more):
    return DataInfo(
        name="toy",
        modality=modality,
        num_classes=K,
        input_shape=shape,
        labels_sha256="",
        **more,
    )


TEXT = info_of("text", (TOKENS,), vocab_size=WORDS, pad_token_id=PAD, special_token_ids=SPECIAL)


# --------------------------------------------------------------------------- models and inputs


def redrawn(model, seed=1):
    """Redraw every weight: embeddings N(0, 1), the others N(0, 1/inputs)."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
        scale = 1.0 if id(parameter) in tables else parameter[0].numel() ** -0.5
        if parameter.ndim > 1:
            parameter.data.copy_(noise * scale)
        elif "gamma" in name:
            parameter.data.copy_(0.5 + 0.1 * noise)  # layer scales start at 1e-6
    return model


def encoder_decoder(kind):
    """A T5 or BART classifier, whose decoder reads the shifted tokens through a shared table."""
    ids = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=WORDS,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=2,
            num_labels=K,
            **ids,
        )
        return transformers.T5ForSequenceClassification(config)
    config = transformers.BartConfig(
        vocab_size=WORDS,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        scale_embedding=True,
        num_labels=K,
        **ids,
    )
    return transformers.BartForSequenceClassification(config)


@cache
def network(name):
    """A tiny text classifier in float64; callers leave it as it is."""
    if name == "tiny-text":
        model = build(BackboneEntry(source="torch", id="tiny-text"), TEXT, seed=0)
    elif name in ("t5", "bart"):
        with torch.random.fork_rng(devices=[]):
            model = wrap(encoder_decoder(name), num_classes=K, modality="text")
        model.special_token_ids = frozenset(SPECIAL)
    else:
        model = build(resolve(f"hf-config:{name}", {}), TEXT, seed=0)
    return redrawn(model).double().eval()


FAMILIES = ["bert", "roberta", "gpt2", "llama", "t5", "bart", "xlnet", "albert", "tiny-text"]
READS_SHIFTED = ("t5", "bart")


def texts(rows=5, seed=0):
    """Right-padded rows: start, 2 to 5 words, end."""
    ids = torch.randint(3, WORDS, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = START
    for row in range(rows):
        end = 3 + row % 4
        ids[row, end], ids[row, end + 1 :] = END, PAD
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def words(inputs):
    return ~torch.isin(inputs["input_ids"], torch.tensor(SPECIAL))


def others(model, inputs):
    with torch.no_grad():
        return (model(**inputs).argmax(dim=1) + 1) % K


def hooks_of(model):
    return [len(module._forward_hooks) for module in model.modules()]


# --------------------------------------------------------------------------- through the embedding


@pytest.mark.parametrize("name", FAMILIES)
def test_a_perturbation_of_zero_is_the_plain_forward_pass(name):
    model, inputs = network(name), texts()
    before = hooks_of(model)
    space = open_space(model, inputs)
    assert space.transposed == (name == "xlnet")
    assert space.x.shape[:2] == (5, TOKENS)
    with torch.no_grad():
        plain = model(**inputs)
        logits = perturbed(model, inputs, torch.zeros_like(space.x), space)
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-6)
    assert hooks_of(model) == before
    table = model.get_submodule(space.path)
    with torch.no_grad():
        torch.testing.assert_close(space.x, table(inputs["input_ids"]))


@pytest.mark.parametrize("name", FAMILIES)
def test_swapping_words_by_a_perturbation_equals_swapping_the_ids(name):
    """δ = E[other word] − E[word] must do what the other ids do; decoders go on reading the old."""
    model, inputs = network(name), texts()
    swapped = inputs["input_ids"].clone()
    swapped[words(inputs)] = (swapped[words(inputs)] - 3 + 11) % (WORDS - 3) + 3
    space = open_space(model, inputs)
    table, seen = model.get_submodule(space.path), []
    with torch.no_grad():
        delta = table(swapped) - space.x
        logits = perturbed(model, inputs, delta, space)
        more = {}
        if name in READS_SHIFTED:
            decoder = next(m for p, m in model.named_modules() if p.endswith("decoder"))
            handle = decoder.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
            )
            model(**inputs)
            handle.remove()
            more["decoder_input_ids"] = seen[0]
        expected = model(**{**inputs, "input_ids": swapped, **more})
        plain = model(**inputs)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert float((logits - plain).abs().max()) > 1e-2
    if name in READS_SHIFTED:  # perturbing the decoder's call too would be something else
        with torch.no_grad():
            both = model(**{**inputs, "input_ids": swapped})
        assert float((logits - both).abs().max()) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_and_special_tokens_stay_and_the_ball_holds(name):
    model, inputs = network(name), texts(8)
    target, space = others(model, inputs), open_space(model, inputs)
    free = words(inputs)
    mean = torch.stack([x[at].norm(dim=1).mean() for x, at in zip(space.x, free, strict=True)])
    unit = mean * free.sum(dim=1).double().sqrt()
    torch.testing.assert_close(space.unit, unit, rtol=1e-12, atol=0)
    for eps, cfg in ((0.25, PGD(eps=0.25, stop_confidence=None, steps=50)), (1.0, PGD(eps=1.0))):
        found = pgd(model, inputs, target, cfg)
        assert not found.delta[~free].any()
        assert bool(found.delta[free].any())
        length = found.delta.flatten(1).norm(dim=1)
        assert bool((length <= eps * unit * (1 + 1e-5)).all())
        torch.testing.assert_close(found.norm, length)
        with torch.no_grad():
            scores = perturbed(model, inputs, found.delta, space).softmax(dim=1)
        p = scores.gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(found.confidence, p)
        with torch.no_grad():
            start = model(**inputs).softmax(dim=1).gather(1, target[:, None])[:, 0]
        assert bool((p > start).all())
    assert int(found.success.sum()) >= 4


def test_text_attacks_equal_one_row_at_a_time_through_input_embeddings():
    """An independent loop for BERT, where passing embeddings gives the same logits."""
    model, inputs = network("bert"), texts(6)
    bert, target = model.backbone, others(network("bert"), texts(6))
    cfg = PGD(eps=0.4)
    found = pgd(model, inputs, target, cfg)
    table = bert.get_input_embeddings()
    for row in range(6):
        ids = inputs["input_ids"][row : row + 1]
        mask = inputs["attention_mask"][row : row + 1]
        free = ~torch.isin(ids, torch.tensor(SPECIAL))[..., None]
        x = table(ids).detach()
        count = free.sum().double()
        radius = 0.4 * (x.norm(dim=2) * free[..., 0]).sum() / count * count.sqrt()
        delta = torch.zeros_like(x)
        for _ in range(cfg.steps):
            delta.requires_grad_()
            scores = bert(inputs_embeds=x + delta, attention_mask=mask).logits.log_softmax(dim=1)
            score = scores[0, target[row]]
            if scores.argmax() == target[row] and score.exp() >= 0.5:
                break
            (gradient,) = torch.autograd.grad(score, delta)
            gradient = gradient * free
            delta = delta.detach() + radius / 40 * gradient / gradient.norm()
            delta = delta * min(1.0, float(radius / delta.norm()))
        torch.testing.assert_close(found.delta[row], delta.detach()[0], rtol=0, atol=1e-10)
    assert int(found.success.sum()) > 0


@pytest.mark.parametrize("name", ["gpt2", "xlnet", "t5"])
def test_rows_of_texts_are_attacked_for_themselves(name):
    model, inputs = network(name), texts(7)
    target, cfg = others(model, inputs), PGD(eps=0.5, steps=12, init="ball", starts=2)
    whole = pgd(model, inputs, target, cfg, seeds=range(7))
    loose = pgd(model, inputs, target, PGD(eps=0.5, steps=12, init="ball", starts=2, compact=False))
    torch.testing.assert_close(loose.delta, whole.delta, rtol=0, atol=1e-10)
    for row in range(7):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        found = pgd(model, one, target[row : row + 1], cfg, seeds=[row])
        torch.testing.assert_close(found.delta, whole.delta[row : row + 1], rtol=0, atol=1e-10)


def test_the_perturbation_follows_a_table_that_moves():
    model, inputs = build(resolve("hf-config:bert", {}), TEXT, seed=0).double(), texts()
    redrawn(model)
    space = open_space(model, inputs)
    found = pgd(model, inputs, others(model, inputs), PGD(eps=0.5))
    table = model.get_submodule(space.path)
    with torch.no_grad():
        table.weight.add_(0.3 * torch.randn(table.weight.shape, dtype=DOUBLE))
        there = table(inputs["input_ids"]) + found.delta
        expected = model.backbone(
            inputs_embeds=there, attention_mask=inputs["attention_mask"]
        ).logits
    logits = perturbed(model, inputs, found.delta, space)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    logits.sum().backward()
    assert bool(table.weight.grad.any())


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_rows_can_be_passed_in_parts(name):
    model, inputs = network(name), texts(6)
    space = open_space(model, inputs)
    delta = attacks.noise_like(space, space.unit / 2, range(6))
    assert not delta[~words(inputs)].any()
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), space.unit / 2)
    with torch.no_grad():
        whole = perturbed(model, inputs, delta, space)
        part = {key: value[[4, 1]] for key, value in inputs.items()}
        torch.testing.assert_close(perturbed(model, part, delta[[4, 1]], space), whole[[4, 1]])
    with pytest.raises(DataError, match="expected a perturbation of shape"):
        perturbed(model, part, delta, space)


def test_the_hook_is_gone_after_an_exception():
    model, inputs = network("bert"), texts()
    space = open_space(model, inputs)
    before = hooks_of(model)

    def stop(*_):
        raise ZeroDivisionError

    handle = model.head.register_forward_hook(stop)
    with pytest.raises(ZeroDivisionError):
        perturbed(model, inputs, torch.zeros_like(space.x), space)
    with pytest.raises(ZeroDivisionError):
        pgd(model, inputs, torch.zeros(5).long(), PGD(), space=space)
    with pytest.raises(ZeroDivisionError):
        open_space(model, inputs)
    handle.remove()
    assert hooks_of(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_further_inputs_pass_through():
    model, inputs = network("bert"), texts()
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    space = open_space(model, inputs)
    with torch.no_grad():
        logits = perturbed(model, inputs, torch.zeros_like(space.x), space)
        torch.testing.assert_close(logits, model(**inputs))
        assert not torch.allclose(logits, model(**texts()))
    found = pgd(model, inputs, others(model, inputs), PGD(eps=1.0))
    assert bool(found.success.any())


# --------------------------------------------------------------------------- finding the module


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_a_square_batch_that_equals_its_transpose_is_not_confused(name):
    ids = torch.arange(16).reshape(4, 4) % 7 + 5
    ids = torch.minimum(ids, ids.T)
    model, inputs = network(name), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    space = open_space(model, inputs)
    assert space.transposed == (name == "xlnet")
    assert space.x.shape[0] == 4
    delta = attacks.noise_like(space, space.unit, range(4))
    with torch.no_grad():
        first = {key: value[:1] for key, value in inputs.items()}
        alone = perturbed(model, first, delta[:1], space)
        torch.testing.assert_close(perturbed(model, inputs, delta, space)[:1], alone)


class Positions(nn.Module):
    """Calls its position table first, and its word table twice."""

    def __init__(self, plain=False):
        super().__init__()
        self.places = nn.Embedding(TOKENS, 8)
        self.table = nn.Embedding(WORDS, 8)
        self.head = nn.Linear(8, K)
        self.plain = plain

    def forward(self, input_ids, attention_mask=None):
        if self.plain:
            vectors = nn.functional.one_hot(input_ids, WORDS).float() @ self.table.weight
            return self.head(vectors.mean(dim=1))
        place = self.places(torch.arange(input_ids.shape[1]))
        return self.head((place + self.table(input_ids) * self.table(input_ids)).mean(dim=1))


def test_the_word_table_is_found_by_what_it_is_called_with():
    model, inputs = Positions(), texts()
    space = open_space(model, inputs)
    assert space.path == "table"
    delta = torch.ones_like(space.x)
    words_ = space.x
    expected = model.head((model.places.weight + (words_ + 1) * words_).mean(dim=1))
    torch.testing.assert_close(perturbed(model, inputs, delta, space), expected)
    with pytest.raises(NotApplicable, match="receives input_ids, found none"):
        open_space(Positions(plain=True), inputs)
    with pytest.raises(NotApplicable, match=r"input_ids \(rows, tokens\)"):
        open_space(model, {"input_ids": torch.zeros(3, dtype=torch.long)})


# --------------------------------------------------------------------------- masks


def test_rows_without_a_word_do_not_move_and_never_succeed():
    model, inputs = network("bert"), texts(4)
    inputs["input_ids"][1] = torch.tensor([START, END] + [PAD] * (TOKENS - 2))
    inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
    with torch.no_grad():
        predicted = model(**inputs).argmax(dim=1)
    for init in ("zero", "ball"):
        for stop in (None, 0.5):
            cfg = PGD(eps=1.0, init=init, starts=2, stop_confidence=stop, steps=40)
            found = pgd(model, inputs, (predicted + 1) % K, cfg)
            assert found.norm[1] == 0
            assert not found.delta[1].any()
            assert not found.success[1]
            assert bool((found.norm[[0, 2, 3]] > 0).all())
    assert not pgd(model, inputs, predicted, PGD(stop_confidence=0.0)).success[1]
    only = {key: value[1:2] for key, value in inputs.items()}
    assert pgd(model, only, (predicted[1:2] + 1) % K, PGD()).image_steps == 0


def test_unknown_special_tokens_leave_padding_masked_only():
    model, inputs = Positions(), texts()
    space = open_space(model, inputs)
    assert space.guessed_mask
    assert torch.equal(space.mask[..., 0], inputs["attention_mask"] == 1)
    assert bool(open_space(model, {"input_ids": inputs["input_ids"]}).mask.all())
    model.special_token_ids = frozenset(SPECIAL)
    known = open_space(model, inputs)
    assert not known.guessed_mask
    assert torch.equal(known.mask[..., 0], words(inputs))
    model.special_token_ids = frozenset({START, END})
    assert torch.equal(open_space(model, inputs).mask[..., 0], words(inputs))


def test_the_words_tokenizer_says_what_is_special():
    told = describe(train_words(["who wrote it", "who did"]))
    assert told == {"vocab_size": 8, "pad_token_id": 0, "special_token_ids": (0, 2, 3)}
    info = info_of("text", (TOKENS,), **told)
    for entry in (BackboneEntry(source="torch", id="tiny-text"), resolve("hf-config:gpt2", {})):
        assert build(entry, info, seed=0).special_token_ids == {0, 2, 3}


# --------------------------------------------------------------------------- images of any family


IMAGES = [
    "timm:test_resnet",
    "timm:test_vit",
    "timm:test_convnext",
    "timm:test_efficientnet",
    "timm:test_mambaout",
    "timm:test_nfnet",
    "timm:test_coatnet",
    "hf-config:vit",
    "hf-config:convnext",
    "hf-config:resnet",
]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", IMAGES)
def test_ball_and_box_hold_for_every_family(name, norm):
    side = 16 if name == "hf-config:vit" else 32
    model = redrawn(build(resolve(name, {}), info_of("image", (1, side, side)), seed=0))
    generator = torch.Generator().manual_seed(4)
    drawn = torch.rand(4, 1, side, side, generator=generator)
    inputs = {"pixel_values": (1.3 * drawn - 0.15).clamp(0, 1)}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    target, eps = others(model, inputs), 0.8 if norm == "l2" else 0.03
    cfg = PGD(norm=norm, eps=eps, steps=9, stop_confidence=None)
    space = open_space(model, inputs)
    found, seen = pgd(model, inputs, target, cfg), []
    handle = model.pixels.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        perturbed(model, inputs, found.delta, space)
        before = model(**inputs).softmax(dim=1).gather(1, target[:, None])[:, 0]
    handle.remove()
    change = (seen[0] - inputs["pixel_values"]).flatten(1)
    length = change.norm(dim=1) if norm == "l2" else change.abs().amax(dim=1)
    assert float(length.max()) <= eps * (1 + 1e-5)
    assert float(length.min()) > 0.5 * eps
    assert seen[0].min() >= 0
    assert seen[0].max() <= 1
    assert float((found.confidence - before).mean()) > 0
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
