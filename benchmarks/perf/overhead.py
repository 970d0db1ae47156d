"""What the framework adds to a training step: `finetune` against a bare torch loop.

Same data, same model, same optimiser, same number of steps, one after the other in one process; the
order alternates from round to round, so that a drift of the machine's speed hits both sides. The
ratio is the median over the rounds of framework seconds / bare seconds.

    python benchmarks/perf/overhead.py [--json] [--rounds 11] [--steps 60] [--device cpu]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

from unsc_plugin import engine
from unsc_plugin.method import Recipe, Scenario, UnlearningTask
from unsc_plugin.pool import device_name
from unsc_plugin.registry import create
from unsc_plugin.rows import Rows


class Net(nn.Module):
    """A plain convolutional classifier, heavy enough that a step takes 20 ms or more on a core."""

    def __init__(self, seed: int = 0, width: int = 48) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            self.head = nn.Linear(width, 10)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(pixel_values))


def bare_loop(model: nn.Module, pixels, labels, recipe: Recipe, lr: float, epochs: int) -> float:
    """Seconds of the steps as one would write them by hand: gather, scale, forward, backward."""
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    began = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(recipe.batch_size):
            where = rows.to(pixels.device)
            images, wanted = pixels[where].float() / 255, labels[where]
            loss = functional.cross_entropy(model(images), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not torch.isfinite(loss):
                raise ArithmeticError(loss)
    if pixels.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps per side and round")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    device = engine.accelerator(options.device)
    size, batch = (32, 1024) if options.device == "cuda" else (16, 64)
    steps_per_epoch = 10
    generator = torch.Generator().manual_seed(0)
    count = batch * steps_per_epoch
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    epochs = max(1, options.steps // steps_per_epoch)
    rows = Rows.of({"pixel_values": pixels}, labels).to(device.device)
    recipe = Recipe(lr=0.1, batch_size=batch)
    task = UnlearningTask(
        forget=None,
        retain=rows,
        num_classes=10,
        recipe=recipe,
        fresh_model=Net,
        scenario=Scenario.RANDOM,
        accelerator=device,
    )
    method = create("finetune", epochs=epochs)
    original = Net().to(device.device)
    held = pixels.to(device.device), labels.to(device.device)

    def framework() -> float:
        return method.unlearn(original, task, 0).seconds_unlearn

    def bare() -> float:
        return bare_loop(copy.deepcopy(original), *held, recipe, 0.01, epochs)

    framework(), bare()
    pairs = []
    for number in range(options.rounds):
        if number % 2:
            right, left = bare(), framework()
        else:
            left, right = framework(), bare()
        pairs.append((left, right))
    ratios = [left / right for left, right in pairs]
    result = {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": options.rounds,
        "bare_step_ms": 1e3 * statistics.median(r for _, r in pairs) / (epochs * steps_per_epoch),
        "device": device_name(device),
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"finetune through the framework / bare torch loop: {result['ratio']:.3f}")
    print(
        f"(median of {options.rounds} rounds, {result['ratio_min']:.3f} to "
        f"{result['ratio_max']:.3f}; bare step {result['bare_step_ms']:.1f} ms; {result['device']})"
    )


if __name__ == "__main__":
    main()
