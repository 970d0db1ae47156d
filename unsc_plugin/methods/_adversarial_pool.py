"""Stand-ins for data that are gone: adversarial examples made of the forget rows, on demand.

The pool holds near copies of rows that must go. It lives in memory, only as long as a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unsc_plugin import attacks, engine
from unsc_plugin.attacks import PGD, Perturbation, Space
from unsc_plugin.errors import AttackFailed
from unsc_plugin.methods._instance_settings import Settings
from unsc_plugin.rows import Batch, Rows

DELTA, TEACHER = "perturbation", "teacher"
"""Keys under which a batch of the pool carries δ and the soft labels."""
SPILL_BYTES = 2**30
"""A larger pool is kept in float16 on the CPU."""
HALF = 2.0**-10
"""What rounding to float16 can add to a norm, with room to spare."""
POOR = 0.2
"""Share of successful attacks below which the user is warned."""


@dataclass
class Tally:
    """What attacking came to: pairs tried, reached their target, taken; norms; image-steps."""

    generated: int = 0
    used: int = 0
    hit: int = 0
    image_steps: int = 0
    confidence: float = 0.0
    norms: list[Tensor] = field(default_factory=list)
    rms: list[Tensor] = field(default_factory=list)

    def add(self, found: Perturbation) -> None:
        """Count the outcome of a chunk."""
        self.generated += len(found.success)
        self.hit += int(found.success.sum())
        self.image_steps += found.image_steps
        self.confidence += float(found.confidence.double().sum())
        hit = found.success.to(found.delta.device)  # a spilled δ lies on the CPU
        delta = found.delta[hit].float().flatten(1)
        if len(delta):
            self.norms.append(found.norm[found.success].float().cpu())
            self.rms.append(delta.square().mean(dim=1).sqrt().cpu())

    @property
    def success(self) -> float:
        """Share of the pairs that reached their target."""
        return self.hit / max(self.generated, 1)

    def stats(self) -> dict[str, Any]:
        """Return plain values for a record; norms are of successful attacks."""
        found: dict[str, Any] = {
            "generated": self.generated,
            "used": self.used,
            "success": self.success,
            "image_steps": self.image_steps,
        }
        if self.norms:
            norms, rms = torch.cat(self.norms), torch.cat(self.rms)
            found |= {"norm_mean": float(norms.mean()), "norm_max": float(norms.max())}
            found |= {"rms_mean": float(rms.mean())}
        return found


@dataclass(frozen=True)
class _Stock:
    """Pairs that are ready: rows of D_f, their δ, labels and soft labels."""

    rows: Tensor
    delta: Tensor
    labels: Tensor
    teacher: Tensor | None

    def joined(self, other: _Stock) -> _Stock:
        """Return these pairs and the others after them."""
        teacher = None
        if self.teacher is not None and other.teacher is not None:
            teacher = torch.cat([self.teacher, other.teacher])
        return _Stock(
            torch.cat([self.rows, other.rows]),
            torch.cat([self.delta, other.delta]),
            torch.cat([self.labels, other.labels]),
            teacher,
        )


class Pool:
    """Pairs (instance i, round r), r = 0..N−1, attacked in chunks of fixed borders when needed.

    Round by round, inside a round a seeded permutation, so that any k consecutive pairs cover every
    instance once; the order and every draw depend on (seed, instance, round) alone. :meth:`take`
    gives the next successes and starts over after the last pair, so that lazy and eager pools are
    the same to the bit. The model is the frozen anchor.
    """

    def __init__(
        self, anchor: nn.Module, rows: Rows, config: Settings, *, seed: int, num_classes: int,
        place: torch.device, clock: Callable[[], float], predicted: Tensor,
    ) -> None:  # fmt: skip
        self.anchor, self.rows, self.config, self.seed = anchor, rows, config, seed
        self.num_classes, self.place, self.clock = num_classes, place, clock
        self.predicted, self.tally, self.seconds = predicted, Tally(), 0.0
        self.rounds = config.n_adv or min(200, max(20, 2 * num_classes))
        self.pairs = self._order()
        default = 64 if place.type == "cpu" else 512
        self.chunk = config.attack_batch or default
        self.space: Space | None = None
        self._stock: _Stock | None = None
        self._count = self._next = self._cursor = 0
        self._radii: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of pairs, successful or not."""
        return len(self.pairs)

    @property
    def template(self) -> Space:
        """What `attacks.perturbed` needs of the space; known once a pair has been taken."""
        assert self.space is not None
        return self.space

    @property
    def exhausted(self) -> bool:
        """Whether every pair has been attacked."""
        return self._next >= len(self.pairs)

    def _order(self) -> list[tuple[int, int]]:
        index = self.rows.index.tolist()
        order = list(range(len(index)))
        pairs = []
        for number in range(self.rounds):
            if "unshuffled" not in self.config.quirks:
                stream = attacks.STREAMS["order"]
                keys = [attacks.draw(self.seed, stream, at, number) for at in index]
                order = sorted(range(len(index)), key=lambda i: (keys[i], index[i]))
            pairs += [(row, number) for row in order]
        return pairs

    # -- taking

    def take(self, count: int) -> Batch:
        """Return the next `count` stand-ins, all of them if there are fewer.

        Raises:
            AttackFailed: no pair reached its target.
        """
        self._fill(self._cursor + count)
        if not self._count:
            mean = self.tally.confidence / max(self.tally.generated, 1)
            raise AttackFailed(
                f"none of {self.tally.generated} attacks reached its target: mean final target "
                f"probability {mean:.3f}; raise eps (or eps_embed, eps_features), allow more "
                "attack_steps, or set source=noise"
            )
        at = self._next_positions(count)
        self.tally.used += len(at)
        return self._batch(at)

    def _next_positions(self, count: int) -> Tensor:
        """Return which of the ready pairs come next; after the last one the first comes again."""
        if not self.exhausted:
            self._cursor += count
            return torch.arange(self._cursor - count, self._cursor)
        if self._count <= count:
            return torch.arange(self._count)
        start = self._cursor % self._count
        if "partial_tail" in self.config.quirks:
            self._cursor = min(start + count, self._count)
            return torch.arange(start, self._cursor)
        self._cursor = start + count
        return (start + torch.arange(count)) % self._count

    def _batch(self, at: Tensor) -> Batch:
        stock = self._stock
        assert stock is not None
        batch = self.rows.gather(stock.rows[at]).to(self.place)
        at = at.to(stock.delta.device)
        delta = stock.delta[at].to(self.place)
        extra = {DELTA: delta.float() if delta.dtype == torch.float16 else delta}
        if stock.teacher is not None:
            extra[TEACHER] = stock.teacher[at.to(self.place)]
        return dataclasses.replace(
            batch,
            inputs={**batch.inputs, **extra},
            labels=stock.labels[at.to(self.place)],
            total=float(len(at)),
        )

    # -- making

    def _fill(self, count: int) -> None:
        began = self.clock()
        wanted = count if self.config.lazy else len(self.pairs)
        while self._count < wanted and not self.exhausted:
            pairs = self.pairs[self._next : self._next + self.chunk]
            self._next += len(pairs)
            made = self._noisy(pairs) if self.config.source == "noise" else self._attacked(pairs)
            self._stock = made if self._stock is None else self._stock.joined(made)
            self._count = len(self._stock.rows)
        self.seconds += self.clock() - began

    def _attacked(self, pairs: Sequence[tuple[int, int]]) -> _Stock:
        rows = torch.tensor([row for row, _ in pairs])
        inputs = self.rows.gather(rows).to(self.place).inputs
        target = self._targets(pairs).to(self.place)
        space = self._open(inputs)
        cfg = self.pgd(space)
        seeds = self._seeds(pairs)
        found = attacks.pgd(self.anchor, inputs, target, cfg, space=space, seeds=seeds)
        if self._spills(found.delta):
            found = self._spilled(found, inputs, target, space, cfg)
        self.tally.add(found)
        kept = torch.ones_like(found.success)
        if "keep_failures" not in self.config.quirks:
            kept = found.success
        teacher = None
        if self.config.adv_label == "teacher":
            teacher = self._teacher(inputs, found.delta.to(target.device), space)[kept]
        delta = found.delta[kept.to(found.delta.device)]
        return _Stock(rows[kept.cpu()], delta, target[kept], teacher)

    def _noisy(self, pairs: Sequence[tuple[int, int]]) -> _Stock:
        """Return seeded directions as long as the first adversary of the same instance."""
        if self._radii is None:
            self._radii = self._first_norms()
        rows = torch.tensor([row for row, _ in pairs])
        batch = self.rows.gather(rows).to(self.place)
        space = self._open(batch.inputs)
        radius = self._radii[rows].to(self.place)
        delta = attacks.noise_like(space, radius, self._seeds(pairs))
        teacher = self._teacher(batch.inputs, delta, space)
        return _Stock(rows, delta, batch.labels, teacher)

    def _first_norms(self) -> Tensor:
        """Return the norm of every instance's adversary of round 0, (k,); failed: the median.

        Raises:
            AttackFailed: all of them failed.
        """
        norms, hits = [], []
        for start in range(0, len(self.rows), self.chunk):
            rows = range(start, min(start + self.chunk, len(self.rows)))
            pairs = [(row, 0) for row in rows]
            inputs = self.rows.gather(list(rows)).to(self.place).inputs
            space, target = self._open(inputs), self._targets(pairs).to(self.place)
            found = attacks.pgd(
                self.anchor, inputs, target, self.pgd(space), space=space, seeds=self._seeds(pairs)
            )
            self.tally.add(found)
            norms.append(found.norm.cpu())
            hits.append(found.success.cpu())
        norm, hit = torch.cat(norms), torch.cat(hits)
        if not bool(hit.any()):
            mean = self.tally.confidence / max(self.tally.generated, 1)
            raise AttackFailed(
                "source=noise takes its norms from attacks, and none reached its target: mean "
                f"final target probability {mean:.3f}; raise eps or allow more attack_steps"
            )
        return torch.where(hit, norm, norm[hit].median())

    def _teacher(self, inputs: dict[str, Tensor], delta: Tensor, space: Space) -> Tensor:
        with engine.quiet(self.anchor), torch.no_grad():
            return attacks.perturbed(self.anchor, inputs, delta, space).float().softmax(dim=1)

    def _targets(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        quirks = self.config.quirks
        rule: Any = "fallback" if "target_fallback" in quirks else "uniform"
        rule = "fallback_ten" if "ten_classes" in quirks else rule
        target = torch.empty(len(pairs), dtype=torch.int64)
        for number in sorted({number for _, number in pairs}):
            at = [i for i, (_, r) in enumerate(pairs) if r == number]
            rows = torch.tensor([pairs[i][0] for i in at])
            target[at] = attacks.draw_targets(
                self.rows.labels[rows],
                self.rows.index[rows],
                self.num_classes,
                seed=self.seed,
                round=number,
                predicted=self.predicted[rows],
                rule=rule,
            )
        return target

    def _seeds(self, pairs: Sequence[tuple[int, int]]) -> list[int]:
        index, stream = self.rows.index, attacks.STREAMS["noise"]
        return [attacks.draw(self.seed, stream, int(index[row]), r) for row, r in pairs]

    def _open(self, inputs: dict[str, Tensor]) -> Space:
        space = attacks.open_space(self.anchor, inputs)
        if self.space is None:
            self.space = space.rows(torch.arange(1))  # all that `perturbed` needs of it
        return space

    def pgd(self, space: Space) -> PGD:
        """Return the attack on a space, with the radius that belongs to its kind of input."""
        config = self.config
        radii = {"pixel_values": config.eps, "input_ids": config.eps_embed}
        return PGD(
            eps=radii.get(space.key, config.eps_features),
            step=config.attack_step,
            steps=config.attack_steps,
            init=config.attack_init,
            stop_confidence=config.attack_stop,
            dtype=config.attack_dtype,
        )

    # -- a pool too large for the device

    def _spills(self, delta: Tensor) -> bool:
        return delta[0].numel() * delta.element_size() * len(self.pairs) > SPILL_BYTES

    def _spilled(
        self, found: Perturbation, inputs: dict[str, Tensor], target: Tensor, space: Space, cfg: PGD
    ) -> Perturbation:
        """Return δ in float16 on the CPU; box, ball and success hold for what is stored."""
        wide = found.delta.dtype
        inner = cfg.eps * space.unit * (1 - HALF)
        stored = attacks.impose(space, found.delta.half().to(wide), inner).half()
        delta = stored.to(wide)
        with engine.quiet(self.anchor), torch.no_grad():
            logits = attacks.perturbed(self.anchor, inputs, delta, space).float()
        sure = logits.softmax(dim=1).gather(1, target[:, None])[:, 0]
        success = (logits.argmax(dim=1) == target) & found.success
        if cfg.stop_confidence is not None:
            success &= sure >= cfg.stop_confidence
        kept = stored.cpu().pin_memory() if self.place.type == "cuda" else stored.cpu()
        norm = attacks.norms(space, delta)
        return dataclasses.replace(
            found, delta=kept, success=success, confidence=sure, norm=norm.to(found.norm.dtype)
        )
