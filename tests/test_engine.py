"""The one fit loop and the one predict loop, against loops written out by hand."""

from __future__ import annotations

import gc
import math
import os
import runpy
import socket
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from unsc_plugin import engine
from unsc_plugin.errors import DivergedError, UnscError
from unsc_plugin.method import Budget, Context, Recipe
from unsc_plugin.rows import Batch, Loader, Rows
from unsc_plugin.runtime import state_sha256

Net = Callable[..., nn.Module]
MakeRows = Callable[..., Rows]


def equal(left: nn.Module, right: nn.Module) -> bool:
    return state_sha256(left) == state_sha256(right)


def distance(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


# --------------------------------------------------------------------------- the fit loop

RECIPES = {
    "sgd": Recipe(epochs=3, lr=0.1, momentum=0.9, weight_decay=5e-3, batch_size=5),
    "nesterov": Recipe(epochs=2, lr=0.1, momentum=0.8, nesterov=True, batch_size=5),
    "plain sgd": Recipe(epochs=2, lr=0.1, momentum=0.0, nesterov=True, batch_size=7),
    "adam": Recipe(epochs=3, optimizer="adam", lr=0.01, weight_decay=1e-3, batch_size=5),
    "adamw": Recipe(epochs=3, optimizer="adamw", lr=0.01, weight_decay=1e-2, batch_size=5),
    "cosine": Recipe(epochs=3, lr=0.1, schedule="cosine", batch_size=5),
    "warm cosine": Recipe(epochs=4, lr=0.1, schedule="cosine", warmup_epochs=1.5, batch_size=5),
    "warm constant": Recipe(epochs=3, lr=0.1, warmup_epochs=2.0, batch_size=5),
    "smooth": Recipe(epochs=2, lr=0.1, label_smoothing=0.1, batch_size=5),
    "clipped": Recipe(epochs=2, lr=0.5, max_grad_norm=0.05, batch_size=5),
    "one batch": Recipe(epochs=3, lr=0.1, batch_size=64),
    "no epochs": Recipe(epochs=0),
}


def by_hand(model: nn.Module, rows: Rows, recipe: Recipe, seed: int) -> list[float]:
    """Train as the recipe says with nothing but torch; return the losses."""
    if recipe.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov and recipe.momentum > 0,
        )
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
        optimizer = kind(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    losses = []
    loader = Loader(rows, recipe.batch_size, seed=seed, name="retain", shuffle=True)
    model.train()
    for epoch in range(recipe.epochs):
        batches = list(loader.epoch(epoch))
        for step, batch in enumerate(batches):
            now = epoch + step / len(batches)
            factor = 1.0
            if now < recipe.warmup_epochs:
                factor = max(now / recipe.warmup_epochs, 1e-3)
            elif recipe.schedule == "cosine":
                rest = recipe.epochs - recipe.warmup_epochs
                factor = 0.5 * (1 + math.cos(math.pi * (now - recipe.warmup_epochs) / rest))
            optimizer.param_groups[0]["lr"] = recipe.lr * factor
            optimizer.zero_grad()
            logits = model(batch.inputs["features"])
            each = functional.cross_entropy(
                logits, batch.labels, reduction="none", label_smoothing=recipe.label_smoothing
            )
            loss = each.sum() / len(batch)
            loss.backward()
            if recipe.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_equals_a_loop_by_hand_to_the_bit(
    name: str, dtype: torch.dtype, mlp: Net, make_rows: MakeRows
) -> None:
    rows = make_rows(22, dtype=dtype)
    expected, found = mlp(dtype=dtype), mlp(dtype=dtype)
    losses = by_hand(expected, rows, RECIPES[name], seed=3)
    context = engine.train(found, rows, RECIPES[name], seed=3)
    assert equal(expected, found)
    assert context.losses == losses
    assert context.epochs == RECIPES[name].epochs
    assert not found.training


def test_training_with_batchnorm_and_dropout_equals_a_loop_by_hand(
    normed: Net, make_rows: MakeRows
) -> None:
    expected, found = normed(), normed()
    torch.manual_seed(5)
    by_hand(expected, make_rows(22), RECIPES["sgd"], seed=3)
    torch.manual_seed(5)
    engine.train(found, make_rows(22), RECIPES["sgd"], seed=3)
    assert equal(expected, found)
    assert int(found.norm.num_batches_tracked) == 15


def test_weights_enter_the_mean(mlp: Net, make_rows: MakeRows) -> None:
    rows = make_rows(5, dtype=torch.float64)
    rows = rows.weighted(torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25]))
    model = mlp(dtype=torch.float64)
    loss = engine.cross_entropy(model, rows.gather([0, 1, 2, 3, 4]))
    each = functional.cross_entropy(model(rows.storage["features"]), rows.labels, reduction="none")
    assert loss.item() == pytest.approx(float((each.detach() * rows.weight).sum() / 5), abs=1e-14)
    others = torch.tensor([0, 1, 2, 0, 1])
    again = engine.cross_entropy(model, rows.gather([0, 1, 2, 3, 4]), others, 0.2)
    each = functional.cross_entropy(
        model(rows.storage["features"]), others, reduction="none", label_smoothing=0.2
    )
    expected = float((each.detach() * rows.weight).sum() / 5)
    assert again.item() == pytest.approx(expected, abs=1e-14)


def test_a_weight_of_two_equals_a_row_twice_at_the_same_divisor(
    mlp: Net, make_rows: MakeRows
) -> None:
    recipe = Recipe(epochs=3, lr=0.1, weight_decay=0.0, batch_size=64)
    rows = make_rows(7, dtype=torch.float64)
    heavy, doubled = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    weight = torch.full((7,), 7 / 8)  # 8 rows are divided by 8, 7 rows by 7
    weight[2] *= 2
    engine.train(heavy, rows.weighted(weight), recipe, seed=0)
    engine.train(doubled, rows.subset([0, 1, 2, 2, 3, 4, 5, 6]), recipe, seed=0)
    assert distance(heavy, doubled) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("parts", [2, 3, 50])
def test_micro_batches_change_nothing(
    mlp: Net, make_rows: MakeRows, dtype: torch.dtype, tolerance: float, parts: int
) -> None:
    rows = make_rows(22, dtype=dtype).weighted(torch.rand(22) + 0.5)
    found = []
    for micro in (1, parts):
        model = mlp(dtype=dtype)
        context = Context(Recipe(lr=0.1, batch_size=8), seed=0)
        stage = engine.Stage(engine.loader_for(rows, context, "x"), engine.cross_entropy)
        engine.fit(model, context, [stage], epochs=3, lr=0.05, micro_batches=micro)
        found.append((model, context.losses))
    assert distance(found[0][0], found[1][0]) < tolerance
    assert found[0][1] == pytest.approx(found[1][1], abs=tolerance)


def joint_loss(model: nn.Module, pair: tuple[Batch, Batch]) -> torch.Tensor:
    kept, gone = pair
    return engine.cross_entropy(model, kept) - 0.1 * engine.cross_entropy(model, gone)


@pytest.mark.parametrize("parts", [2, 3, 4, 50])
def test_micro_batches_of_joint_steps_drop_no_row(
    mlp: Net, make_rows: MakeRows, parts: int
) -> None:
    rows = make_rows(22, dtype=torch.float64)
    models = []
    for micro in (1, parts):
        model = mlp(dtype=torch.float64)
        context = Context(Recipe(lr=0.1, batch_size=6), seed=0)
        retain = engine.loader_for(rows.subset(list(range(7, 22))), context, "retain")
        forget = engine.loader_for(rows.subset(list(range(4))), context, "forget")
        stage = engine.Stage(lambda _, r=retain, f=forget: engine.joint(r, f), joint_loss, steps=3)
        engine.fit(model, context, [stage], epochs=2, lr=0.05, micro_batches=micro)
        models.append(model)
    assert distance(*models) < 1e-12


def test_gradients_left_over_are_not_stepped_on(mlp: Net, make_rows: MakeRows) -> None:
    clean, soiled = mlp(), mlp()
    for parameter in soiled.parameters():
        parameter.grad = torch.ones_like(parameter)
    for model in (clean, soiled):
        engine.train(model, make_rows(), RECIPES["sgd"], seed=0)
    assert equal(clean, soiled)
    assert all(p.grad is None for p in clean.parameters())


def test_frozen_parameters_and_nets_without_any(mlp: Net, make_rows: MakeRows) -> None:
    model, original = mlp(), mlp()
    model.body.requires_grad_(False)
    engine.train(model, make_rows(), RECIPES["sgd"], seed=0)
    assert torch.equal(model.body.weight, original.body.weight)
    assert not torch.equal(model.head.weight, original.head.weight)
    model.head.requires_grad_(False)
    before = state_sha256(model)
    assert engine.train(model, make_rows(), RECIPES["sgd"], seed=0).steps == 0
    assert state_sha256(model) == before


def test_hooks_of_a_step_come_in_order(mlp: Net, make_rows: MakeRows) -> None:
    model, calls = mlp(), []
    context = Context(Recipe(lr=0.1, batch_size=11), seed=0)

    def before() -> None:
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        calls.append(("before", float(norm) > 0.01, state_sha256(model)))

    def after() -> None:
        calls.append(("after", None, state_sha256(model)))

    stage = engine.Stage(engine.loader_for(make_rows(22), context, "x"), engine.cross_entropy)
    engine.fit(
        model,
        context,
        [stage],
        epochs=5,
        lr=0.1,
        max_grad_norm=0.01,
        before_step=before,
        after_step=after,
        on_epoch_end=lambda epoch: epoch == 1,
    )
    assert [call[0] for call in calls] == ["before", "after"] * 4
    assert all(call[1] for call in calls[::2])
    assert calls[0][2] != calls[1][2] == calls[2][2]
    assert context.epochs == 2


def test_stages_alternate(mlp: Net, make_rows: MakeRows) -> None:
    rows, seen = make_rows(22), []
    context = Context(Recipe(lr=0.1, batch_size=4), seed=0)

    def loss(name: str) -> Callable[[nn.Module, Batch], torch.Tensor]:
        def told(model: nn.Module, batch: Batch) -> torch.Tensor:
            seen.append(name)
            return engine.cross_entropy(model, batch)

        return told

    first = engine.Stage(engine.loader_for(rows.subset(list(range(6))), context, "f"), loss("f"))
    second = engine.Stage(engine.loader_for(rows, context, "r"), loss("r"))
    engine.fit(mlp(), context, [first, second], epochs=2, lr=0.1)
    assert "".join(seen) == ("f" * 2 + "r" * 6) * 2
    assert (len(first), len(second)) == (2, 6)


def test_a_budget_ends_within_a_step(mlp: Net, make_rows: MakeRows) -> None:
    context = Context(Recipe(lr=0.1, batch_size=5), seed=0, budget=Budget(steps=3))
    engine.fit_recipe(mlp(), context, engine.loader_for(make_rows(22), context, "x"))
    assert (context.steps, context.stop_reason) == (3, "budget")


def test_a_loss_that_is_not_finite_stops(mlp: Net, make_rows: MakeRows) -> None:
    with pytest.raises(DivergedError) as raised:
        engine.train(mlp(), make_rows(), Recipe(epochs=30, lr=1e30, batch_size=5), seed=0)
    assert raised.value.step is not None
    assert raised.value.loss is not None
    assert not math.isfinite(raised.value.loss)


def test_steps_at_constant_rate(mlp: Net, make_rows: MakeRows) -> None:
    recipe = Recipe(lr=9.0, schedule="cosine", weight_decay=0.5, momentum=0.9, batch_size=5)
    seen, model, expected = [], mlp(), mlp()
    settings: dict[str, Any] = {"steps": 7, "lr": 0.05, "seed": 2}
    engine.fit_steps(
        model, make_rows(22), recipe, at=(1, 4, 7), observe=lambda s: seen.append(s), **settings
    )
    assert seen == [1, 4, 7]
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9)
    loader = Loader(make_rows(22), 5, seed=2, name="relearn", shuffle=True)
    for batch in [*loader.epoch(0), *loader.epoch(1)][:7]:
        optimizer.zero_grad()
        functional.cross_entropy(expected(**batch.inputs), batch.labels).backward()
        optimizer.step()
    assert distance(model, expected) < 1e-6
    assert not model.training


def test_a_fit_keeps_no_model_alive(mlp: Net, make_rows: MakeRows) -> None:
    device, model = engine.accelerator("cpu"), mlp()
    engine.train(model, make_rows(), Recipe(epochs=1), seed=0, device=device)
    weight = weakref.ref(model.head.weight)
    del model
    gc.collect()
    assert weight() is None


# --------------------------------------------------------------------------- BatchNorm


def running(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for _, buffer in sorted(model.named_buffers())]


@pytest.mark.parametrize("statistics", ["move", "keep", "eval"])
def test_statistics_move_only_when_they_should(
    normed: Net, make_rows: MakeRows, statistics: Any
) -> None:
    model = normed()
    with torch.no_grad():
        model.norm.running_mean.fill_(0.3)
    before, weights = running(model), model.head.weight.clone()
    context = Context(Recipe(lr=0.1, batch_size=5), seed=0)
    loader = engine.loader_for(make_rows(22), context, "f")
    stage = engine.Stage(loader, engine.cross_entropy, statistics=statistics)
    model.train()
    engine.fit(model, context, [stage], epochs=2, lr=0.05)
    same = [torch.equal(a, b) for a, b in zip(before, running(model), strict=True)]
    assert len(same) == 3  # mean, var, num_batches_tracked
    assert all(same) if statistics != "move" else not any(same)
    assert not torch.equal(weights, model.head.weight)
    assert model.norm.training
    assert model.norm.track_running_stats


def test_kept_statistics_still_normalise_by_the_batch(normed: Net, make_rows: MakeRows) -> None:
    model, batch = normed(), make_rows(8).gather(list(range(8)))
    model.drop.p = 0.0
    with torch.no_grad():
        model.norm.running_mean.fill_(5.0)
        model.train()
        with engine.statistics_kept(model):
            kept = model(**batch.inputs)
        moved = model(**batch.inputs)
        model.eval()
        other = model(**batch.inputs)
    assert torch.equal(kept, moved)
    assert not torch.allclose(kept, other)


@pytest.mark.parametrize("statistics", ["move", "keep"])
def test_a_batch_of_one_row_meets_batchnorm(
    normed: Net, make_rows: MakeRows, statistics: Any
) -> None:
    model = normed()
    before = running(model)
    context = Context(Recipe(lr=0.1, batch_size=5), seed=0)
    loader = engine.loader_for(make_rows(1), context, "f")
    model.train()
    engine.fit(
        model,
        context,
        [engine.Stage(loader, engine.cross_entropy, statistics=statistics)],
        epochs=2,
        lr=0.05,
    )
    assert context.steps == 2
    assert all(torch.equal(a, b) for a, b in zip(before, running(model), strict=True))
    assert model.norm.training


def test_a_micro_batch_of_one_row_meets_batchnorm(normed: Net, make_rows: MakeRows) -> None:
    model = normed()
    context = Context(Recipe(lr=0.1, batch_size=3), seed=0)
    loader = engine.loader_for(make_rows(6), context, "f")
    model.train()
    stage = engine.Stage(loader, engine.cross_entropy)
    engine.fit(model, context, [stage], epochs=1, lr=0.05, micro_batches=2)
    assert context.steps == 2


def test_quiet_restores_every_mode(normed: Net) -> None:
    model = normed()
    model.train()
    model.norm.eval()

    def inside() -> None:
        with engine.quiet(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert [m.training for m in (model, model.norm, model.drop)] == [True, False, True]


# --------------------------------------------------------------------------- predicting


@pytest.mark.parametrize("size", [1, 4, 22, 512])
def test_predictions_come_in_row_order(normed: Net, make_rows: MakeRows, size: int) -> None:
    model, rows = normed(), make_rows(22).subset(list(range(21, -1, -1)))
    model.train()
    model.norm.eval()
    before, generator = state_sha256(model), torch.get_rng_state()
    found = engine.predict(model, rows, batch_size=size, features=True)
    assert [m.training for m in (model, model.norm, model.drop)] == [True, False, True]
    assert state_sha256(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    model.eval()
    with torch.no_grad():
        inputs = make_rows(22).storage["features"].flip(0)
        assert torch.allclose(found.logits, model(inputs), atol=1e-6)
        assert found.features is not None
        assert torch.allclose(found.features, model.features(inputs), atol=1e-6)
    assert found.index.tolist() == list(range(21, -1, -1))
    assert torch.equal(found.labels, rows.labels)
    assert found.logits.dtype == torch.float32
    assert not found.logits.requires_grad
    assert engine.predict(model, rows).features is None


def test_predictions_are_not_augmented(make_rows: MakeRows) -> None:
    class Flat(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return pixel_values.flatten(1)

    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    rows = Rows.of({"pixel_values": pixels}, torch.zeros(5))
    found = engine.predict(Flat(), rows, batch_size=2)
    assert torch.equal(found.logits, pixels.float().flatten(1) / 255)


def test_predicting_no_rows(mlp: Net, make_rows: MakeRows) -> None:
    try:
        found = engine.predict(mlp(), make_rows(3).subset([]))
    except UnscError:
        return
    assert len(found.logits) == len(found.labels) == 0


# --------------------------------------------------------------------------- precision


@pytest.mark.usefixtures("fresh_accelerate")
def test_bfloat16_on_the_cpu(mlp: Net, make_rows: MakeRows) -> None:
    device, model, exact = engine.accelerator("cpu", "bf16"), mlp(), mlp()
    recipe = Recipe(epochs=3, lr=0.1, batch_size=5, max_grad_norm=1.0)
    context = engine.train(model, make_rows(), recipe, seed=0, device=device)
    assert all(math.isfinite(loss) for loss in context.losses)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found = engine.predict(model, make_rows(), device=device)
    assert found.logits.dtype == torch.float32
    assert bool(found.logits.isfinite().all())
    by_hand(exact, make_rows(), recipe, seed=0)
    assert 0 < distance(model, exact) < 0.1


@pytest.mark.usefixtures("fresh_accelerate")
def test_training_without_an_accelerator_beside_one_of_another_precision(
    mlp: Net, make_rows: MakeRows
) -> None:
    engine.accelerator("cpu", "bf16")
    found, expected = mlp(), mlp()
    engine.train(found, make_rows(), RECIPES["sgd"], seed=0)
    by_hand(expected, make_rows(), RECIPES["sgd"], seed=0)
    assert equal(found, expected)


@pytest.mark.usefixtures("fresh_accelerate")
def test_another_precision_later_is_told_in_our_words() -> None:
    engine.accelerator("cpu")
    try:
        device = engine.accelerator("cpu", "bf16")
    except UnscError:
        return
    assert device.mixed_precision == "bf16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to be had")
def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UnscError, match="cuda"):
        engine.accelerator("cuda")


# --------------------------------------------------------------------------- several processes

WORKER = textwrap.dedent(
    """
    import pathlib, sys
    import torch
    from torch import nn

    torch.set_num_threads(1)
    from conftest import Mlp, Normed, build, tabular
    from unsc_plugin import engine
    from unsc_plugin.method import Recipe, UnlearningTask
    from unsc_plugin.methods.finetune import Finetune
    from unsc_plugin.runtime import state_sha256

    class Spare(Mlp):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

    def finetuned(dtype, device):
        rows = tabular(22, dtype=dtype).weighted(torch.linspace(0.5, 2, 22))
        task = UnlearningTask(
            forget=rows.subset([0, 1]),
            retain=rows.subset(list(range(2, 22))),
            num_classes=3,
            recipe=Recipe(epochs=2, lr=0.5, batch_size=7),
            fresh_model=lambda seed: build(Mlp, seed, dtype),
            accelerator=device,
        )
        method = Finetune(epochs=3, lr=0.1, max_grad_norm=1.0)
        return method.unlearn(build(Mlp, 0, dtype), task, seed=5)

    def main(out):
        device = engine.accelerator("cpu")
        found = {}
        for dtype in (torch.float32, torch.float64):
            result = finetuned(dtype, device)
            found[f"finetune {dtype}"] = result.model.state_dict()
            found[f"losses {dtype}"] = list(result.losses)
        found["work"], found["read"] = result.work, {str(k): v for k, v in result.read.items()}
        model, rows = build(Mlp, 1), tabular(23)
        for size in (3, 4, 512):
            p = engine.predict(model, rows, device=device, batch_size=size, features=True)
            found[f"predict {size}"] = [p.logits, p.features, p.labels, p.index]
        one = engine.predict(model, rows.subset([4]), device=device)
        found["predict one"] = [one.logits, one.labels, one.index]
        spare = build(Spare, 2)
        recipe = Recipe(epochs=2, lr=0.1, weight_decay=0.1, batch_size=7)
        engine.train(spare, tabular(22), recipe, seed=0, device=device)
        found["spare"] = spare.state_dict()
        for size in (7, 3):  # of 3 rows one process gets 2 and the other 1
            normed = build(Normed, 2)
            sized = recipe.model_copy(update={"batch_size": size})
            engine.train(normed, tabular(22), sized, seed=0, device=device)
            found[f"normed {size}"] = state_sha256(normed)
        alone = build(Mlp, 2)
        engine.train(alone, tabular(22), recipe, seed=0)
        found["no device"] = alone.state_dict()
        found["same value"] = engine.broadcast(device.process_index + 10, device)
        if device.num_processes == 1:
            return found
        torch.save(found, out / f"{device.process_index}.pt")
        device.wait_for_everyone()

    if __name__ == "__main__":
        main(pathlib.Path(sys.argv[1]))
    """
)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what one process alone found, and what each of two found together.

    The two are started with the variables that `torchrun` sets: `accelerate launch --cpu` starts
    one process whatever it is told, unless there is an MPI.
    """
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env={**os.environ, **together, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    alone = runpy.run_path(str(script))["main"](folder)
    for process in running:
        try:
            _, complaint = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, complaint[-3000:]
    return [alone, *(torch.load(folder / f"{rank}.pt", weights_only=True) for rank in "01")]


def states(found: list[dict[str, Any]], key: str) -> Iterator[tuple[torch.Tensor, ...]]:
    for name in found[0][key]:
        yield tuple(process[key][name] for process in found)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("torch.float32", 1e-5), ("torch.float64", 1e-10)]
)
def test_two_processes_finetune_as_one(
    processes: list[dict[str, Any]], dtype: str, tolerance: float
) -> None:
    for alone, first, second in states(processes, f"finetune {dtype}"):
        assert torch.equal(first, second)
        assert float((alone - first).abs().max()) < tolerance
    losses = [found[f"losses {dtype}"] for found in processes]
    assert losses[1] == losses[2] == pytest.approx(losses[0], abs=tolerance)


@pytest.mark.parametrize("size", ["3", "4", "512", "one"])
def test_two_processes_predict_as_one(processes: list[dict[str, Any]], size: str) -> None:
    alone, *shared = (found[f"predict {size}"] for found in processes)
    for other in shared:
        for expected, column in zip(alone, other, strict=True):
            if expected.is_floating_point():
                assert torch.allclose(expected, column, atol=1e-6, rtol=0)
            else:
                assert torch.equal(expected, column)


def test_two_processes_count_the_work_of_both(processes: list[dict[str, Any]]) -> None:
    alone, first, second = ((found["read"], found["work"]) for found in processes)
    assert first == second == alone


def test_two_processes_leave_unused_parameters_alone_as_one(
    processes: list[dict[str, Any]],
) -> None:
    for alone, first, second in states(processes, "spare"):
        assert torch.equal(first, second)
        assert float((alone - first).abs().max()) < 1e-5


@pytest.mark.parametrize("size", [7, 3])
def test_two_processes_end_with_one_model(processes: list[dict[str, Any]], size: int) -> None:
    assert processes[1][f"normed {size}"] == processes[2][f"normed {size}"]


def test_two_processes_without_an_accelerator_given(processes: list[dict[str, Any]]) -> None:
    for alone, first, second in states(processes, "no device"):
        assert float((alone - first).abs().max()) < 1e-5
        assert float((alone - second).abs().max()) < 1e-5


def test_the_main_process_speaks_for_all(processes: list[dict[str, Any]]) -> None:
    assert [found["same value"] for found in processes] == [10, 10, 10]
