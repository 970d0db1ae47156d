"""Subspaces of retained classes: Gram matrices against the published loop over patches and SVD.

Both sides see the same columns, the interior windows (stride 1, no padding) of the first images of
every class, in an all-convolutional network (48 and 96 filters, random weights, BatchNorm
statistics settled on the images); layer l uses its first 24 to 256 images. Both forward passes are
counted, loading images is not. All seconds are CPU-seconds of this process, summed over threads.

- published: the procedure in our own words. A Python loop copies window after window into a float64
  matrix [d, N]; `numpy.linalg.svd` with full_matrices=False (numpy's own BLAS) gives the first
  class's basis; every further class takes two such SVDs, one of its columns (total energy) and one
  of what the basis so far leaves of them (new directions). Measured on the first `--classes`
  classes; those after them count with the seconds of the last measured one (linear extrapolation).
- ours: `hooks.collect_grams` (products of 3x3 windows from correlations, all in float64 here) and
  `linalg.gpm_basis` with the same thresholds, .97 + .003·class, and the same rule, so that ranks
  must be equal. One class: the median of three runs. Nine classes: all of them are measured.

`max_sine` is the largest sine of a principal angle between both sides' first-class subspaces, over
the layers; rounding of relative size u in a Gram turns the subspace by about u/gap, the gap of its
eigenvalues at the cut over the first one. Images are CIFAR-10's where UNSC_DATA_DIR names them,
else seeded images with a 1/f spectrum. Targets: one class at least 12 times, nine classes at least
70 times, sine at most 1e-5.

A second request: what `unsc` (default settings, so real patches and all images in all layers)
prepares for forgetting class 3, and then, Gram matrices stored, for class 5 on the same model:
CPU-seconds of the second over those of the first, and batches with retained images that the second
read. The second costs the same for any number of images, the first grows with it:
`--request-images` per class (5,000; CIFAR-10 has 4,500 beside its validation rows). Target: at
most 0.02, and no batch.

    python benchmarks/perf/unsc_subspace.py [--json] [--quick] [--classes 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from unsc_plugin import data, registry
from unsc_plugin.hooks import View, Workspace, collect_grams, views
from unsc_plugin.linalg import Gram, eigh, gpm_basis, largest_sine
from unsc_plugin.method import Recipe, Scenario, UnlearningTask
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import warm_up

RETAINED = (0, 1, 2, 4, 5, 6, 7, 8, 9)
"""Classes in the order of the merge; class 3 is the forgotten one."""
SAMPLES = (24, 100, 100, 125, 125, 250, 250, 256, 256)
"""Images per layer."""
BATCH = 64
"""Images per forward pass of ours; the published way holds the inputs of all images at once."""
REPEATS = 3


@dataclass(frozen=True)
class Setting:
    """Sizes of one measurement."""

    widths: tuple[int, int] = (48, 96)
    side: int = 32
    samples: tuple[int, ...] = SAMPLES

    @classmethod
    def quick(cls) -> Setting:
        return cls((6, 8), 16, tuple(max(count // 32, 2) for count in SAMPLES))


def threshold(label: int) -> float:
    return 0.97 + 0.003 * label


# --------------------------------------------------------------------------- network and images


class Net(nn.Sequential):
    """Modules one after the other, called as backbones are."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values)


def all_convolutional(narrow: int, wide: int, side: int) -> Net:
    """Return 7 convolutions of 3x3, the third and sixth of stride 2, one of 1x1, and a head."""
    sizes = [(3, narrow, 1), (narrow, narrow, 1), (narrow, wide, 2), (wide, wide, 1)]
    sizes += [(wide, wide, 1), (wide, wide, 2), (wide, wide, 1)]
    layers: list[nn.Module] = []
    for before, after, stride in sizes:
        layers += [
            nn.Conv2d(before, after, 3, stride, 1),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        ]
    layers += [nn.Conv2d(wide, wide, 1), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
    layers += [nn.AvgPool2d(side // 4), nn.Flatten(), nn.Linear(wide, 10)]
    return Net(*layers)


def settled(setting: Setting, images: Sequence[Tensor]) -> Net:
    """Return the network with random weights and the BatchNorm statistics of some images."""
    torch.manual_seed(0)
    model = all_convolutional(*setting.widths, setting.side)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in images[:3]:
            model(batch)
    return model.eval()


def real_images(count: int) -> list[Tensor]:
    """Return the first `count` training images of every class of CIFAR-10, normalised."""
    rows = data.load(registry.load().entries("datasets")["cifar10"], "cifar10").train
    found = []
    for label in range(10):
        chosen = torch.nonzero(rows.labels == label)[:count, 0]
        found.append(rows.gather(chosen).inputs["pixel_values"])
    return normalised(found)


def drawn_images(count: int, side: int) -> list[Tensor]:
    """Return images whose amplitudes fall as 1/f, of correlated colours; a class has its mean."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    amplitude = 1 / (rows**2 + columns**2).sqrt().clamp(min=1 / side)
    colours = torch.tensor([[1.0, 0.2, 0.1], [1.0, 0.0, -0.1], [1.0, -0.2, 0.1]])
    found = []
    for _ in range(10):
        noise = torch.randn(count + 1, 3, side, side, generator=generator)
        waves = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(side, side))
        mixed = torch.einsum("ck,nkhw->nchw", colours, waves)
        found.append(mixed[1:] + mixed[:1] / 2)
    return normalised(found)


def normalised(images: list[Tensor]) -> list[Tensor]:
    pixels = torch.cat(images)
    mean, scale = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    return [(batch - mean) / scale for batch in images]


# --------------------------------------------------------------------------- seconds


@dataclass
class Clock:
    """CPU-seconds per name; `lap` gives the seconds since the last lap to a name."""

    seconds: Counter[str] = field(default_factory=Counter)
    last: float = field(default_factory=time.process_time)

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name] += now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def timed_grams(
    model: nn.Module,
    images: Tensor,
    chosen: Sequence[View],
    samples: Sequence[int],
    clock: Clock,
    room: Workspace | None = None,
) -> list[Gram]:
    """Collect the Gram matrices; a layer's seconds are those between its end and the next start."""
    parameters = {model.get_submodule(view.name): view.parameter for view in chosen}
    running = ["forward"]

    def ended(module: nn.Module, *_: object) -> None:
        clock.lap(running[0])
        running[0] = parameters.get(module, "forward")

    def started(*_: object) -> None:
        clock.lap(running[0])
        running[0] = "forward"

    handles = [
        torch_modules.register_module_forward_pre_hook(started),
        torch_modules.register_module_forward_hook(ended),
    ]
    try:
        limits = {view.parameter: count for view, count in zip(chosen, samples, strict=True)}
        batches = [{"pixel_values": part} for part in images.split(BATCH)]
        grams = collect_grams(model, batches, chosen, limits=limits, patches="interior", room=room)
    finally:
        for handle in handles:
            handle.remove()
    clock.lap("forward")
    return [grams[view.parameter] for view in chosen]


# --------------------------------------------------------------------------- the published way


def layer_inputs(
    model: nn.Module, images: Tensor, chosen: Sequence[View], samples: Sequence[int]
) -> list[np.ndarray]:
    """Return what enters the layers in one forward pass."""
    found: dict[str, np.ndarray] = {}
    handles = [
        model.get_submodule(view.name).register_forward_hook(
            lambda _module, args, _output, name=view.name: found.update({name: args[0].numpy()})
        )
        for view in chosen
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return [found[view.name][:count] for view, count in zip(chosen, samples, strict=True)]


def patch_matrix(inputs: np.ndarray, kernel: int) -> np.ndarray:
    """Return the windows of all images, copied one after the other; rows [N, d] are transposed."""
    if inputs.ndim == 2:
        return inputs.T.astype(np.float64)
    count, channels, side, _ = inputs.shape
    places = side - kernel + 1
    matrix = np.zeros((channels * kernel**2, places**2 * count))
    at = 0
    for image in range(count):
        for row in range(places):
            for column in range(places):
                window = inputs[image, :, row : row + kernel, column : column + kernel]
                matrix[:, at] = window.reshape(-1)
                at += 1
    return matrix


def first_span(matrix: np.ndarray, eps: float) -> np.ndarray:
    left, singular, _ = np.linalg.svd(matrix, full_matrices=False)
    share = np.cumsum(singular**2) / np.sum(singular**2)
    return left[:, : int(np.sum(share < eps))]


def next_span(span: np.ndarray, matrix: np.ndarray, eps: float) -> np.ndarray:
    _, singular, _ = np.linalg.svd(matrix, full_matrices=False)
    total = np.sum(singular**2)
    rest = matrix - span @ (span.T @ matrix)
    left, singular, _ = np.linalg.svd(rest, full_matrices=False)
    held, count = 1 - np.sum(singular**2) / total, 0
    for energy in singular**2:
        if held >= eps:
            break
        held += energy / total
        count += 1
    return np.hstack([span, left[:, :count]])[:, : len(matrix)]


# --------------------------------------------------------------------------- both sides


@dataclass
class Side:
    """What one side found: seconds of every measured class and bases after each of them."""

    clocks: list[Clock] = field(default_factory=list)
    spans: list[list[Tensor]] = field(default_factory=list)

    @property
    def ranks(self) -> list[list[int]]:
        return [[span.shape[1] for span in spans] for spans in self.spans]


Draw = Callable[[], Iterator[tuple[int, Tensor]]]


def published(model: nn.Module, chosen: Sequence[View], setting: Setting, draw: Draw) -> Side:
    side = Side()
    spans: list[np.ndarray] = []
    for number, (label, images) in enumerate(draw()):
        clock, found = Clock(), []
        inputs = layer_inputs(model, images, chosen, setting.samples)
        clock.lap("forward")
        for at, (view, entered) in enumerate(zip(chosen, inputs, strict=True)):
            kernel = model.get_submodule(view.name).weight.shape[-1]
            matrix = patch_matrix(entered, kernel)
            clock.lap(f"{view.parameter} loop")
            eps = threshold(label)
            found.append(next_span(spans[at], matrix, eps) if number else first_span(matrix, eps))
            clock.lap(view.parameter)
        spans = found
        side.clocks.append(clock)
        side.spans.append([torch.from_numpy(span) for span in spans])
    return side


def one_class(
    model: nn.Module, chosen: Sequence[View], setting: Setting, label: int, images: Tensor
) -> tuple[Clock, list[Gram], list[Tensor]]:
    clock = Clock()
    grams = timed_grams(model, images, chosen, setting.samples, clock)
    spans = []
    for view, gram in zip(chosen, grams, strict=True):
        spans.append(merged([gram], [label]))
        clock.lap(f"{view.parameter} basis")
    return clock, grams, spans


def gap(gram: Gram, rank: int) -> float:
    values = eigh(gram.matrix)[0][0]
    return float((values[rank - 1] - values[rank]) / values[0]) if 0 < rank < len(values) else 1.0


def merged(grams: Sequence[Gram], labels: Sequence[int]) -> Tensor:
    basis = gpm_basis(grams, [threshold(label) for label in labels], rule="below")
    return basis.vectors[0, :, : basis.ranks[0]]


def all_classes(
    model: nn.Module, chosen: Sequence[View], setting: Setting, draw: Draw
) -> tuple[float, list[list[Gram]]]:
    """Return the seconds of all bases together and the Gram matrices of every class."""
    clock, grams, room = Clock(), [], Workspace()
    for _, images in draw():
        grams.append(timed_grams(model, images, chosen, setting.samples, clock, room))
    for of_layer in zip(*grams, strict=True):
        merged(of_layer, RETAINED)
    clock.lap("basis")
    return clock.total, grams


def subspaces(
    model: nn.Module, setting: Setting, images: list[Tensor], classes: int
) -> dict[str, object]:
    """Measure both sides; keys of `table` are d, N, seconds and ranks of every layer."""
    chosen, _ = views(model)

    def draw(labels: Sequence[int] = RETAINED) -> Iterator[tuple[int, Tensor]]:
        return ((label, images[label]) for label in labels)

    measured = RETAINED[:classes]
    runs = [one_class(model, chosen, setting, *next(draw())) for _ in range(REPEATS)]
    clock, grams, spans = sorted(runs, key=lambda run: run[0].total)[REPEATS // 2]
    naive = published(model, chosen, setting, lambda: draw(measured))
    seconds, of_classes = all_classes(model, chosen, setting, draw)
    ours = [
        [merged(some, measured[:count]) for some in zip(*of_classes[:count], strict=True)]
        for count in range(1, classes + 1)
    ]
    totals = [clock.total for clock in naive.clocks]
    extrapolated = sum(totals) + (len(RETAINED) - classes) * totals[-1]
    sines = [largest_sine(*pair) for pair in zip(naive.spans[0], spans, strict=True)]
    first = naive.clocks[0].seconds
    table = [
        {
            "layer": f"{view.d} x {gram.count}",
            "published_loop_s": first[f"{view.parameter} loop"],
            "published_svd_s": first[view.parameter],
            "published_update_s": naive.clocks[-1].seconds[view.parameter],
            "ours_gram_s": clock.seconds[view.parameter],
            "ours_basis_s": clock.seconds[f"{view.parameter} basis"],
            "sine": sine,
            "gap": gap(gram, spans[at].shape[1]),
            "ranks_published": [ranks[at] for ranks in naive.ranks],
            "ranks_ours": [spans[at].shape[1] for spans in ours],
        }
        for at, (view, gram, sine) in enumerate(zip(chosen, grams, sines, strict=True))
    ]
    return {
        "ratio_one_class": totals[0] / clock.total,
        "ratio_nine_classes": extrapolated / seconds,
        "max_sine": max(sines),
        "ranks_equal": naive.ranks == [[span.shape[1] for span in spans] for spans in ours],
        "published_classes_s": totals,
        "published_nine_classes_s": extrapolated,
        "published_classes_measured": classes,
        "ours_one_class_s": clock.total,
        "ours_forward_s": clock.seconds["forward"],
        "ours_nine_classes_s": seconds,
        "table": table,
    }


# --------------------------------------------------------------------------- a second request


def second_request(model: nn.Module, images: list[Tensor]) -> dict[str, object]:
    """Return seconds of both preparations, their ratio, and retained batches read by the second."""
    labels = torch.arange(10).repeat_interleave(len(images[0]))
    pixels, reads = torch.cat(images), []

    def decode(positions: Tensor) -> dict[str, Tensor]:
        reads.append(positions)
        return {"pixel_values": pixels[positions]}

    rows = Rows.of({}, labels, decode=decode)
    method = registry.load().create("unsc")
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for gone in (3, 5):
            task = UnlearningTask(
                forget=rows.subset(labels == gone),
                retain=rows.subset(labels != gone),
                num_classes=10,
                recipe=Recipe(),
                fresh_model=lambda _: copy.deepcopy(model),
                scenario=Scenario.CLASS,
                cache=Path(folder),
                data_fingerprint=hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
            )
            reads.clear()
            clock = Clock()
            method.prepared(model, task, 0)
            clock.lap("prepare")
            seconds.append(clock.total)
    return {
        "second_request_ratio": seconds[1] / seconds[0],
        "second_request_retain_batches": sum(bool((labels[at] != 5).any()) for at in reads),
        "first_request_s": seconds[0],
        "second_request_s": seconds[1],
        "request_images": len(labels),
    }


# --------------------------------------------------------------------------- the command


COLUMNS = {
    "published_loop_s": "loop",
    "published_svd_s": "SVD",
    "published_update_s": "update",
    "ours_gram_s": "Gram",
    "ours_basis_s": "basis",
}


def report(result: dict) -> None:
    lines = {
        "one class": (result["published_classes_s"][0], result["ours_one_class_s"]),
        "nine classes": (result["published_nine_classes_s"], result["ours_nine_classes_s"]),
    }
    print(f"CPU-seconds, {result['threads']} thread(s), images: {result['images']}")
    for name, (slow, fast) in lines.items():
        print(f"{name:>15} {slow:9.2f} / {fast:6.2f} = {slow / fast:.1f}")
    first, second = result["first_request_s"], result["second_request_s"]
    print(f"{'second request':>15} {second:9.2f} / {first:6.2f} = {second / first:.4f}")
    print(
        "published (numpy SVD) / ours; published nine classes: "
        f"{result['published_classes_measured']} measured, the rest extrapolated\n"
        f"second request / first, {result['request_images']} images; retained batches "
        f"read: {result['second_request_retain_batches']}\n"
        f"largest sine {result['max_sine']:.1e}; ranks "
        f"{'' if result['ranks_equal'] else 'NOT '}equal\n"
    )
    heads = "".join(f"{head:>8}" for head in COLUMNS.values())
    print(f"{'d x N':>12}{heads}  sine    gap     ranks after each measured class")
    for row in result["table"]:
        shown = "".join(f"{row[key]:8.3f}" for key in COLUMNS)
        both = f"{row['ranks_published']} = {row['ranks_ours']}"
        print(f"{row['layer']:>12}{shown}  {row['sine']:.0e}  {row['gap']:.0e}  {both}")
    print(f"{'forward':>12}{'':24}{result['ours_forward_s']:8.3f}")
    print("loop, SVD: first class; update: loop excluded, last measured class; Gram, basis: ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small network, for tests")
    parser.add_argument("--classes", type=int, default=3, help="classes the published way runs on")
    parser.add_argument(
        "--request-images", type=int, help="per class, for the two requests; 5000, quick: 8"
    )
    options = parser.parse_args()
    if not 2 <= options.classes <= len(RETAINED):
        parser.error(f"--classes: expected 2 to {len(RETAINED)}, got {options.classes}")
    setting = Setting.quick() if options.quick else Setting()
    real = bool(os.environ.get("UNSC_DATA_DIR")) and not options.quick
    count = max(setting.samples)
    asked = options.request_images or (8 if options.quick else 5000)
    most = max(count, asked)
    pictures = real_images(most) if real else drawn_images(most, setting.side)
    images = [of_class[:count] for of_class in pictures]
    torch.set_num_threads(options.threads)
    warm_up()
    with threadpool_limits(options.threads):
        model = settled(setting, images)
        result = subspaces(model, setting, images, options.classes)
        result |= second_request(model, [of_class[:asked] for of_class in pictures])
    result |= {"images": "CIFAR-10" if real else "drawn, 1/f", "threads": options.threads}
    if options.json:
        print(json.dumps(result))
    else:
        report(result)


if __name__ == "__main__":
    main()
