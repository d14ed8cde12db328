"""Textures by formula: a pattern that fills the picture."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from mlfusion.embedded.plane import Gray, Rng, deformed_plane, filtered_noise, spectrum, stretch_contrast


def band(klass: Rng, rng: Rng, px: int) -> Gray:
    """Noise within a few bands of frequency and direction, then a pointwise curve: grain, fur, ripples (Gabor noise)."""
    bands = int(klass.integers(1, 4))
    centre = np.exp(klass.uniform(math.log(3), math.log(20), bands))
    spread = klass.uniform(0.08, 0.4, bands)
    towards = klass.uniform(-math.pi / 2, math.pi / 2, bands)
    sharp = np.where(klass.random(bands) < 0.3, 0.0, np.exp(klass.uniform(0, 4, bands)))
    curve = int(klass.integers(0, 5))

    zoom, tilt = rng.uniform(0.8, 1.25), rng.normal(0, 0.12)
    f, a = spectrum(px)
    gain = np.zeros_like(f)
    for c, w, d, k in zip(centre * zoom, spread, towards + tilt, sharp, strict=True):
        gain += np.exp(-((np.log(np.maximum(f, 0.5) / c) / w) ** 2) / 2) * np.exp(k * (np.cos(2 * (a - d)) - 1)) / c
    curves: tuple[Callable[[Gray], Gray], ...] = (
        lambda v: v,
        np.abs,
        lambda v: np.tanh(4 * v),
        lambda v: np.maximum(v, 0.3),
        lambda v: -np.sqrt(np.abs(v)),
    )
    return stretch_contrast(curves[curve](filtered_noise(rng, gain, px)))


def cloud(klass: Rng, rng: Rng, px: int) -> Gray:
    """Noise with a power-law spectrum, warped by itself, then ridged, banded or cut: clouds, marble, wood (Perlin's)."""
    power = klass.uniform(0.8, 2.2)
    lean, towards = klass.uniform(0, 1.6), klass.uniform(-math.pi / 2, math.pi / 2)
    warp = klass.uniform(0, 0.25) * (klass.random() < 0.6)
    curve = int(klass.integers(0, 5))
    lines = klass.uniform(1.0, 5.0)
    floor = klass.uniform(1.0, 6.0)

    f, a = spectrum(px)
    tilt = rng.normal(0, 0.12)
    gain = (f + np.float32(floor)) ** np.float32(-power) * np.exp(lean * np.cos(2 * (a - towards - tilt)))
    gain[0, 0] = 0
    values = filtered_noise(rng, gain, px)
    if warp:
        smooth = (f + 1) ** np.float32(-2.5)
        dx, dy = filtered_noise(rng, smooth, px), filtered_noise(rng, smooth, px)
        i = (np.arange(px)[:, None] + (dy * np.float32(warp * px / 2)).astype(np.int32)) % px
        j = (np.arange(px)[None] + (dx * np.float32(warp * px / 2)).astype(np.int32)) % px
        values = values[i, j]
    curves: tuple[Callable[[Gray], Gray], ...] = (
        lambda v: v,
        lambda v: -np.abs(v),
        lambda v: np.sin(np.float32(lines) * v + np.float32(rng.uniform(0, 6.3))),
        lambda v: np.floor(v * np.float32(lines / 2)),
        lambda v: np.tanh(6 * v),
    )
    return stretch_contrast(curves[curve](values))


def weave(klass: Rng, rng: Rng, px: int) -> Gray:
    """Up to three periodic profiles across the plane, added, multiplied or the larger taken: stripes, checks, rings."""
    n = int(klass.choice([1, 2, 2, 3]))
    cycles = np.exp(klass.uniform(math.log(1.5), math.log(10), n))
    towards = klass.choice([0, math.pi / 2, math.pi / 4, -math.pi / 4], n, replace=False)
    towards = towards + klass.normal(0, 0.25) + klass.normal(0, 0.1, n)
    if klass.random() < 0.5 and n > 1:
        cycles[:] = cycles[0]
    shape = klass.integers(0, 4, n)
    duty = klass.uniform(0.15, 0.6, n)
    joined = int(klass.integers(0, 4))
    rings = klass.random() < 0.25
    wobble = klass.uniform(0, 0.05) * (klass.random() < 0.5)

    x, y = deformed_plane(px, rng, angle=0.2, scale=1.25, shift=1.0, stretch=0.1)
    if wobble:
        f, _ = spectrum(px)
        x = x + np.float32(wobble) * filtered_noise(rng, (f + 2) ** np.float32(-2.2), px)
        y = y + np.float32(wobble) * filtered_noise(rng, (f + 2) ** np.float32(-2.2), px)
    layers = []
    for i, (c, d, k, w, phase) in enumerate(zip(cycles, towards, shape, duty, rng.random(n), strict=True)):
        along = np.hypot(x, y) if rings and i == 0 else np.float32(math.cos(d)) * x + np.float32(math.sin(d)) * y
        t = np.mod(along * np.float32(c / 2 * 1.5) + np.float32(phase), 1)
        if k == 0:
            layers.append(0.5 + 0.5 * np.cos(2 * math.pi * t, dtype=np.float32))
        elif k == 1:
            layers.append(np.clip((np.float32(w / 2) - np.abs(t - 0.5)) * np.float32(px / c / 1.5) + 0.5, 0, 1))
        elif k == 2:
            layers.append(t.astype(np.float32))
        else:
            layers.append(np.clip(1 - np.abs(t - 0.5) / np.float32(w), 0, 1))
    out = layers[0]
    for other in layers[1:]:
        out = (out + other, out * other, np.maximum(out, other), np.abs(out - other))[joined]
    return stretch_contrast(out)


def neighbour_cells(
    x: Gray, y: Gray, cells: float, looseness: float, brick: float, rng: Rng
) -> Iterator[tuple[Gray, Gray, Gray]]:
    """For each of the 3 × 3 cells around every pixel: x and y from the cell's seed point (in cells), and its random value."""
    side = int(cells * 3) + 8
    jitter = ((rng.random((3, side, side), dtype=np.float32) - 0.5) * np.float32(looseness)).astype(np.float32)
    values = rng.random((side, side), dtype=np.float32)
    u, v = x * np.float32(cells / 2), y * np.float32(cells / 2)
    row = np.floor(v).astype(np.int32)
    for dj in (-1, 0, 1):
        j = row + dj
        slide = np.float32(brick) * (j & 1)
        col = np.floor(u - slide).astype(np.int32)
        for di in (-1, 0, 1):
            i = col + di
            index = (j % side, i % side)
            yield u - (i + 0.5 + slide + jitter[0][index]), v - (j + 0.5 + jitter[1][index]), values[index]


def cell(klass: Rng, rng: Rng, px: int) -> Gray:
    """Cells around seed points on a jittered lattice (Worley): honeycomb, cobbles, cracks, scales, bricks, mosaics."""
    cells = math.exp(klass.uniform(math.log(2.5), math.log(12)))
    looseness = klass.choice([0.0, 0.3, 0.7, 1.0])
    brick = klass.choice([0.0, 0.5])
    norm = int(klass.integers(0, 3))
    reading = int(klass.integers(0, 5))
    cut = klass.uniform(0.06, 0.3)
    flat = klass.uniform(0.6, 1.6)

    x, y = deformed_plane(px, rng, angle=0.2, scale=1.25, shift=1.0, stretch=0.1)
    first = np.full((px, px), 9, dtype=np.float32)
    second, value = first.copy(), np.zeros_like(first)
    for p, q, cell_value in neighbour_cells(x * np.float32(flat), y, cells, looseness, brick, rng):
        p, q = np.abs(p), np.abs(q)
        d = np.sqrt(p * p + q * q) if norm == 0 else p + q if norm == 1 else np.maximum(p, q)
        closer = d < first
        second = np.where(closer, first, np.minimum(second, d))
        first, value = np.where(closer, d, first), np.where(closer, cell_value, value)
    if reading < 2:
        return stretch_contrast(second - first if reading else first)
    if reading < 4:
        inside = np.clip((second - first) / np.float32(cut), 0, 1)
        return value * inside if reading == 3 else inside
    return 1 - np.clip((first - np.float32(cut)) * np.float32(px / cells / 2) + 0.5, 0, 1)


def scatter(klass: Rng, rng: Rng, px: int) -> Gray:
    """One small wavy figure at the points of a lattice, in random sizes and directions: dots, petals, confetti, foliage."""
    cells = math.exp(klass.uniform(math.log(2.0), math.log(8)))
    looseness = klass.choice([0.0, 0.4, 0.8])
    brick = klass.choice([0.0, 0.5])
    petals, depth = int(klass.integers(2, 8)), klass.uniform(0, 0.6) * (klass.random() < 0.7)
    size, spread = klass.uniform(0.22, 0.55), klass.uniform(0, 0.35)
    slim = klass.uniform(0.35, 1.0)
    spin = klass.choice([0.0, 0.3, 3.14])
    tones = klass.uniform(0, 0.7)
    hollow = klass.random() < 0.25

    x, y = deformed_plane(px, rng, angle=0.2, scale=1.25, shift=1.0, stretch=0.1)
    facing = np.float32(rng.uniform(-math.pi, math.pi))
    ink = np.zeros((px, px), dtype=np.float32)
    for p, q, value in neighbour_cells(x, y, cells, looseness, brick, rng):
        nearby = np.maximum(np.abs(p), np.abs(q)) < 1.2
        p, q, value = p[nearby], q[nearby], value[nearby]
        turn = facing + (value * 7 % 1 - 0.5) * np.float32(2 * spin)
        c, s = np.cos(turn), np.sin(turn)
        p, q = c * p + s * q, (c * q - s * p) / np.float32(slim)
        edge = np.float32(size) * (1 + np.float32(spread) * (value * 13 % 1 - 0.5) * 2)
        if depth:
            edge = edge * (1 + np.float32(depth) * np.cos(np.float32(petals) * np.arctan2(q, p)))
        inside = np.hypot(p, q) - edge
        if hollow:
            inside = np.abs(inside) - np.float32(0.06)
        part = np.clip(0.5 - inside * np.float32(px / cells), 0, 1) * (1 - np.float32(tones) * value)
        ink[nearby] = np.maximum(ink[nearby], part)
    return ink


TEXTURES: dict[str, Callable[[Rng, Rng, int], Gray]] = {
    draw.__name__: draw for draw in (band, cloud, weave, cell, scatter)
}
"""Family → draws an instance, as in `shapes.SHAPES`."""
