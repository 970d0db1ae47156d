"""Gram matrices of convolution windows from correlations, not from copies of the windows.

Two offsets i and j of a window [h, w] meet in the block G_ij = Σ_p x(p+i) x(p+j)ᵀ [c, c], p over
the P×Q positions of the window in a map x [c, H, W]. All blocks with the same j − i = δ are sums of
one product x(q) x(q+δ)ᵀ that differ in q at the borders only, and its sum over the whole map is

    A(δ) = Σ_q x(q) x(q+δ)ᵀ = 1/(H'W') Σ_f Re( conj(z(f)) z(f)ᵀ exp(iθ_f·δ) ),   z = DFT(x),

the correlation theorem (Oppenheim, Schafer, *Discrete-Time Signal Processing*, section 8), with
maps filled up by zeros to H' ≥ H + h − 1 and W' ≥ W + w − 1. One Hermitian product per frequency
serves all δ. What an offset does not reach at the border is taken out of A(δ) line by line: a line
t meets the line t + δ_0 in the same sum of one dimension, two crossing lines in one point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from scipy.fft import next_fast_len
from torch import Tensor

FOURIER = 64
"""Longest line that is transformed by a matrix; longer ones take the fast transform."""
SAMPLES = 16, 128
"""Fewest and most maps per transform."""
SPECTRA = 2**22
"""Numbers of one transform, if that leaves enough maps."""
BLOCK = 2**16
"""Entries of the products that are held at once, so that they stay in the processor's cache."""


class Workspace:
    """Memory that calls after each other use again; fresh pages cost more than the numbers."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return a float64 tensor of any content, valid until the next one of this name."""
        count, found = math.prod(shape), self.held.get(name)
        if found is None or len(found) < count or found.device != like.device:
            found = torch.empty(count, dtype=torch.float64, device=like.device)
            self.held[name] = found
        return found[:count].view(shape)


def window_gram(
    x: Tensor, groups: int, kernel: Sequence[int], room: Workspace
) -> tuple[Tensor, Tensor, int]:
    """Return Σ u uᵀ [g, d, d], Σ u [g, d] and the number of all windows u of stride 1 of maps x.

    `x` [n, C, H, W] is padded already; d = C/groups·h·w in the order (channel, row, column).
    Everything is computed in float64, on the device of x.
    """
    places = math.prod(side - k + 1 for side, k in zip(x.shape[2:], kernel, strict=True))
    windows = [_Windows(part, kernel) for part in x.chunk(groups, 1)]
    sums = [one.sums(room) for one in windows]
    product = torch.stack([one.product(found) for one, found in zip(windows, sums, strict=True)])
    total = torch.stack([one.total(found) for one, found in zip(windows, sums, strict=True)])
    return product, total, len(x) * places


@dataclass
class _Sums:
    """Sums over all maps: of x(q) [H, W, c] and of x(q) x(q+δ)ᵀ [c, c] in several ranges of q.

    `whole` [δ, c, c] everywhere; `rows` {(t, t'): [δ_1, c, c]} with q in row t and q+δ in row t';
    `columns` {(s, s'): [δ_0, c, c]} likewise, s ≤ s'; `points` {(t, s, t', s'): [c, c]}.
    """

    maps: Tensor
    whole: Tensor
    rows: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    columns: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    points: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def between(self, column: int, other: int, down: int) -> Tensor:
        """Return the sum of q in one column and q + (down, ·) in another."""
        pair = min(column, other), max(column, other)
        found = self.columns[pair]
        middle = len(found) // 2
        return found[middle + down] if column <= other else found[middle - down].mT


class _Windows:
    """All windows of the maps x [n, c, H, W] of one group."""

    def __init__(self, x: Tensor, kernel: Sequence[int]) -> None:
        self.x = x
        self.c = x.shape[1]
        self.high, self.wide = kernel
        self.places = x.shape[2] - self.high + 1, x.shape[3] - self.wide + 1
        self.downs, self.rights = range(1 - self.high, self.high), range(1 - self.wide, self.wide)
        self.shifts = [(a, b) for a in self.downs for b in self.rights if (a, b) >= (0, 0)]
        self.live = _live(x, 2, self.high), _live(x, 3, self.wide)
        self.rows = {a: self._outside(0, a) for a, _ in self.shifts}
        self.columns = {b: self._outside(1, b) for _, b in self.shifts}

    def _outside(self, axis: int, step: int) -> list[tuple[int, slice]]:
        """Return (line, which offsets do not reach it) of all lines that do not meet a 0.

        Offset k of `count` covers the lines from first + k on, as many as it has places; a line
        meets the one `step` further on.
        """
        count, first = (self.high, self.wide)[axis] - abs(step), max(-step, 0)
        lines = [(first + k, slice(k + 1, count)) for k in range(count - 1)]
        lines += [(first + self.places[axis] + k, slice(0, k + 1)) for k in range(count - 1)]
        live = self.live[axis]
        return [(line, missed) for line, missed in lines if live[line] and live[line + step]]

    def total(self, sums: _Sums) -> Tensor:
        """Return the sum of all windows [d]."""
        total = sums.maps.new_empty(self.c, self.high, self.wide)
        for row, column in itertools.product(range(self.high), range(self.wide)):
            window = sums.maps[row : row + self.places[0], column : column + self.places[1]]
            total[:, row, column] = window.sum((0, 1))
        return total.flatten()

    def product(self, sums: _Sums) -> Tensor:
        """Return the sum of all windows times themselves [d, d]."""
        found = sums.whole.new_empty(*2 * (self.c, self.high, self.wide))
        for (down, right), whole in zip(self.shifts, sums.whole, strict=True):
            left = max(-right, 0)
            counts = self.high - down, self.wide - abs(right)
            blocks = whole.repeat(*counts, 1, 1)
            for t, missed in self.rows[down]:
                blocks[missed] -= sums.rows[t, t + down][right - self.rights[0]]
            for s, missed in self.columns[right]:
                blocks[:, missed] -= sums.between(s, s + right, down)
            for (t, low), (s, far) in itertools.product(self.rows[down], self.columns[right]):
                blocks[low, far] += sums.points[t, s, t + down, s + right]
            for row, column in itertools.product(*map(range, counts)):
                i, j = (row, left + column), (row + down, left + column + right)
                found[:, j[0], j[1], :, i[0], i[1]] = blocks[row, column].mT
                found[:, i[0], i[1], :, j[0], j[1]] = blocks[row, column]
        return found.view(self.c * self.high * self.wide, -1)

    def sums(self, room: Workspace) -> _Sums:
        """Return all that is needed of the maps, read in parts."""
        height, width = self.x.shape[2:]
        tall, broad = _length(height + self.high - 1), _length(width + self.wide - 1)
        down, right = zip(*self.shifts, strict=True)
        plane = _half_turns(tall, down)[..., None] * _turns(broad, right, broad)[:, None] / broad
        turns = [plane.flatten(1), _half_turns(tall, self.downs), _half_turns(broad, self.rights)]
        plane, along, across = (one.to(self.x.device) for one in turns)
        above = sorted({(t, t + a) for a, lines in self.rows.items() for t, _ in lines})
        beside = sorted(
            {(s, s + b) for b, lines in self.columns.items() for s, _ in lines if b >= 0}
        )
        points = sorted(
            {
                (t, s, t + a, s + b)
                for a, b in self.shifts
                for (t, _), (s, _) in itertools.product(self.rows[a], self.columns[b])
            }
        )
        zeros = plane.real.new_zeros
        sums = _Sums(zeros(height, width, self.c), zeros(len(plane), self.c, self.c))
        at_once = SPECTRA // (2 * self.c * plane.shape[1])
        for part in torch.split(self.x, min(max(at_once, SAMPLES[0]), SAMPLES[1])):
            maps = room.take("maps", part, height, width, len(part), self.c)
            maps.flatten(2).flatten(0, 1).copy_(part.reshape(-1, height * width).T.contiguous())
            sums.maps += maps.sum(2)
            columns = _spectra(maps, tall, room)
            whole = _spectra_of_lines(columns, broad, room)
            sums.whole += _correlations(whole, whole, plane)
            level = {
                t: _spectra(maps[t], broad, Workspace()).flatten(1, 2)
                for t in {t for p in above for t in p}
            }
            upright = {s: columns[:, :, s].flatten(1, 2) for s in {s for p in beside for s in p}}
            for t, u in above:
                _add(sums.rows, (t, u), _correlations(level[t], level[u], across))
            for s, v in beside:
                _add(sums.columns, (s, v), _correlations(upright[s], upright[v], along))
            for t, s, u, v in points:
                _add(sums.points, (t, s, u, v), maps[t, s].mT @ maps[u, v])
        return sums


def _live(x: Tensor, axis: int, count: int) -> dict[int, bool]:
    """Return which of the first and last count − 1 lines of an axis hold anything but 0."""
    side = x.shape[axis]
    lines = {*range(min(count - 1, side)), *range(max(side - count + 1, 0), side)}
    return {line: bool(x.select(axis, line).any()) for line in lines}


def _add(sums: dict[tuple[int, ...], Tensor], key: tuple[int, ...], value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _length(least: int) -> int:
    """Return a length from `least` on that is transformed well."""
    return least if least <= FOURIER else int(next_fast_len(least, real=True))


def _turns(size: int, places: Sequence[int], count: int) -> Tensor:
    """Return exp(iθ_f·q) of the first `count` of `size` frequencies, [q, f], complex."""
    steps = torch.outer(torch.tensor(places), torch.arange(count)) % size
    angle = 2 * math.pi / size * steps.double()
    return torch.polar(torch.ones_like(angle), angle)


def _half_turns(size: int, places: Sequence[int]) -> Tensor:
    """Return the same of a half spectrum, where mirror images count for what it leaves out."""
    weight = torch.full((size // 2 + 1,), 2.0 / size, dtype=torch.float64)
    weight[0] = 1 / size
    if size % 2 == 0:
        weight[-1] = 1 / size
    return _turns(size, places, len(weight)) * weight


def _spectra(x: Tensor, size: int, room: Workspace) -> Tensor:
    """Return the half spectrum of the first axis, [q, ..., n, c] -> [f, (re, im), ..., n, c]."""
    if size > FOURIER:
        return torch.view_as_real(torch.fft.rfft(x, size, dim=0)).movedim(-1, 1).contiguous()
    turns = _turns(size, range(len(x)), size // 2 + 1).mH
    waves = torch.stack([turns.real, turns.imag], 1).to(x.device)
    flat, waves = x.flatten(1), waves.flatten(0, 1)
    found = room.take("spectra", x, len(waves), flat.shape[1])
    return torch.mm(waves, flat, out=found).view(-1, 2, *x.shape[1:])


def _spectra_of_lines(lines: Tensor, size: int, room: Workspace) -> Tensor:
    """Return the spectra across of the spectra along, as matrices.

    [f, (re, im), q, n, c] -> [f·f', (re, im)·n, c].
    """
    along, _, places, n, c = lines.shape
    if size > FOURIER:
        z = torch.fft.fft(torch.complex(lines[:, 0], lines[:, 1]), size, dim=1)
        return torch.view_as_real(z).movedim(-1, 2).reshape(along * size, 2 * n, c)
    turns = _turns(size, range(places), size).mH  # z = (C + iS)(a + ib), S below 0
    both = [torch.cat([turns.real, -turns.imag], 1), torch.cat([turns.imag, turns.real], 1)]
    waves = torch.stack(both, 1).view(1, 2 * size, 2 * places).expand(along, -1, -1)
    flat = lines.view(along, 2 * places, n * c)
    found = room.take("plane", lines, along, 2 * size, n * c)
    return torch.bmm(waves.to(lines.device), flat, out=found).view(along * size, 2 * n, c)


def _correlations(one: Tensor, two: Tensor, turns: Tensor) -> Tensor:
    """Return Σ_f Re( conj(z_1) z_2ᵀ exp(iθ_f·δ) ) of spectra [f, (re, im)·n, c], [δ, c, c].

    With z = a + ib: conj(z_1) z_2ᵀ = (a_1 a_2ᵀ + b_1 b_2ᵀ) + i (a_1 b_2ᵀ − b_1 a_2ᵀ), all real; for
    z_1 = z_2 the imaginary part is the first half of it less its transpose.
    """
    count, n, c = one.shape[0], one.shape[1] // 2, one.shape[2]
    cosines, sines = turns.real.contiguous(), turns.imag.contiguous()
    even = cosines.new_zeros(len(turns), c * c)
    odd = torch.zeros_like(even)
    step = max(BLOCK // (c * c), 16)
    for start in range(0, count, step):
        block = slice(start, start + step)
        a, b = one[block], two[block]
        even.addmm_(cosines[:, block], torch.bmm(a.mT, b).view(len(a), -1))
        mixed = torch.bmm(a[:, :n].mT, b[:, n:])
        if two is not one:
            mixed = torch.baddbmm(mixed, a[:, n:].mT, b[:, :n], alpha=-1)
        odd.addmm_(sines[:, block], mixed.view(len(a), -1))
    even, odd = even.view(-1, c, c), odd.view(-1, c, c)
    return even - (odd - odd.mT if two is one else odd)
