"""Targeted L2 attacks on all (instance, target) pairs: flat and early against round by round.

Both sides attack the same trained network (`--model`, evaluation mode) from the same k instances
towards the same targets, radius 4 in pixels, step .1, at most 100 steps.

- published: the procedure in our own words. One call per round over batches of at most 32 images,
  from a uniformly random image scaled into the ball, gradients of the parameters computed along
  (`loss.backward()`), all 100 steps.
- ours: `attacks.pgd` on flat batches of `--batch` pairs, from the image itself, gradients of the
  perturbation only; a row stops as soon as its target is predicted with probability `--tau`, and
  batches shrink.

`image_step_ratio` is gradient evaluations times rows, theirs over ours; `time_ratio` is seconds,
theirs over ours, each the median of `--repeats` runs in turn; `target_success` the share of our
pairs whose stored example is predicted as the target with probability at least tau.
`full_time_ratio` compares with ours without the early stop (as many steps as theirs).
How many steps a row needs depends on how far the network's borders are from the images: a network
that fits its training images closely, as one that is asked to unlearn does, needs few. Targets: at
least 8 times fewer image-steps at success 1, and at least 6 times less time on the CPU.

    python benchmarks/perf/attack.py [--json] [--quick] [--device cpu] [--batch 64] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from unsc_plugin import attacks, data, engine, models, registry
from unsc_plugin.spec import Recipe

EPS, STEP, STEPS, PUBLISHED_BATCH = 4.0, 0.1, 100, 32


@dataclass(frozen=True)
class Pairs:
    """Images [0, 1] (k, C, H, W), labels and index (k,), and targets (rounds, k)."""

    images: Tensor
    index: Tensor
    targets: Tensor


def published(model: nn.Module, pairs: Pairs, seed: int) -> tuple[int, float]:
    """Attack round by round; return image-steps and the share of rows that end at their target."""
    generator = torch.Generator(device=pairs.images.device).manual_seed(seed)
    image_steps = hit = 0
    for targets in pairs.targets:
        batches = zip(
            pairs.images.split(PUBLISHED_BATCH), targets.split(PUBLISHED_BATCH), strict=True
        )
        for images, target in batches:
            noise = torch.rand(images.shape, generator=generator, device=images.device)
            delta = shortened(noise - images)
            for _ in range(STEPS):
                delta.requires_grad_(True)
                functional.cross_entropy(model(pixel_values=images + delta), target).backward()
                gradient = delta.grad
                size = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
                delta = delta.detach() - STEP * gradient / size
                delta = shortened((images + delta).clamp(0, 1) - images)
                image_steps += len(images)
            with torch.no_grad():
                hit += int((model(pixel_values=images + delta).argmax(1) == target).sum())
    return image_steps, hit / pairs.targets.numel()


def shortened(delta: Tensor) -> Tensor:
    """Return δ scaled down to the radius where it is longer."""
    size = delta.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    return delta * (EPS / size).clamp(max=1)


def ours(model: nn.Module, pairs: Pairs, batch: int, tau: float | None) -> tuple[int, float, float]:
    """Attack flat batches; return image-steps, success and the smallest kept target probability."""
    rounds, k = pairs.targets.shape
    rows, targets = torch.arange(k).repeat(rounds), pairs.targets.reshape(-1)
    cfg = attacks.PGD(eps=EPS, step=STEP, steps=STEPS, stop_confidence=tau)
    image_steps, hit, least = 0, 0, 1.0
    for at in torch.arange(rounds * k).split(batch):
        inputs = {"pixel_values": pairs.images[rows[at].to(pairs.images.device)]}
        found = attacks.pgd(model, inputs, targets[at.to(targets.device)], cfg, seeds=at.tolist())
        image_steps += found.image_steps
        hit += int(found.success.sum())
        if bool(found.success.any()):
            least = min(least, float(found.confidence[found.success].min()))
    return image_steps, hit / (rounds * k), least


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, object]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def problem(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, Pairs, dict[str, float | str]]:
    """Train the network and draw instances and targets."""
    known = registry.load()
    name = arguments.data
    splits = data.load(known.entries("datasets")[name], name)
    entry = models.resolve(arguments.model, known.entries("backbones"))
    recipe = entry.recipe or Recipe()
    recipe = recipe.model_copy(update={"epochs": arguments.epochs})
    model = models.build(entry, splits.info, seed=0)
    accelerator = engine.accelerator("cpu" if device.type == "cpu" else "cuda")
    model = model.to(device)
    rows = splits.train
    engine.train(model, rows, recipe, seed=0, device=accelerator)
    model.eval()
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: arguments.k]
    batch = rows.gather(chosen)
    targets = torch.stack(
        [
            attacks.draw_targets(
                batch.labels.cpu(), batch.index.cpu(), splits.info.num_classes, seed=0, round=number
            )
            for number in range(arguments.rounds)
        ]
    )
    found = engine.predict(model, splits.test, device=accelerator)
    accuracy = float((found.logits.argmax(1) == found.labels).float().mean())
    images = batch.inputs["pixel_values"].to(device)
    return model, Pairs(images, batch.index, targets.to(device)), {"test_accuracy": accuracy}


def measure(arguments: argparse.Namespace) -> dict[str, float | str]:
    device = torch.device(arguments.device)
    model, pairs, notes = problem(arguments, device)
    seconds: dict[str, list[float]] = {"published": [], "ours": [], "full": []}
    for _ in range(arguments.repeats):
        spent, theirs = timed(lambda: published(model, pairs, 0), device)
        seconds["published"].append(spent)
        spent, early = timed(lambda: ours(model, pairs, arguments.batch, arguments.tau), device)
        seconds["ours"].append(spent)
        spent, full = timed(lambda: ours(model, pairs, arguments.batch, None), device)
        seconds["full"].append(spent)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return notes | {
        "image_step_ratio": theirs[0] / early[0],
        "time_ratio": median["published"] / median["ours"],
        "full_time_ratio": median["published"] / median["full"],
        "target_success": early[1],
        "least_confidence": early[2],
        "published_success": theirs[1],
        "full_success": full[1],
        "image_steps": float(early[0]),
        "published_image_steps": float(theirs[0]),
        "seconds": median["ours"],
        "published_seconds": median["published"],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="sizes for a test; says nothing")
    known = "cifar10-small" if os.environ.get("UNSC_DATA_DIR") else "digits"
    parser.add_argument("--data", default=known, help="data set (default: %(default)s)")
    parser.add_argument(
        "--model", default="timm:test_resnet", help="backbone (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=30, help="epochs of training")
    parser.add_argument("--k", type=int, default=32, help="instances")
    parser.add_argument("--rounds", type=int, default=20, help="targets per instance")
    parser.add_argument("--batch", type=int, default=64, help="pairs per flat batch")
    parser.add_argument("--tau", type=float, default=0.5, help="probability that ends a row")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.data, arguments.model = "digits", "small-cnn"
        arguments.k, arguments.rounds = 4, 2
        arguments.repeats, arguments.epochs = 1, 2
    torch.set_num_threads(arguments.threads)
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:24} {value:.4g}" if isinstance(value, float) else f"{key:24} {value}")


if __name__ == "__main__":
    main()
