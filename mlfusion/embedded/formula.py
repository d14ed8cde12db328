"""Images by formula: what the embedded model learns from instead of photographs.

Formula-driven supervised learning (Kataoka et al., arXiv 2101.08515 and 2206.09132; Takashima et al., arXiv 2303.01112)
draws its images and its labels from mathematics: a *class* is a set of formula parameters, an *instance* one rendering
of them, its phases, noise and small deformations drawn anew. No photograph, no licence and no download is involved, and
the data set is as large as one cares to draw.

`pattern(family, klass, instance, px, seed)` is a pure function of its arguments: one gray picture, uint8 `[px, px]`.
`draw_into` draws many into one array. Colour, ground and viewpoint are not the formula's business: `pair` gives them to
a batch of patterns, with torch, from a stream of its own.
"""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

Rng = np.random.Generator
Gray = np.ndarray  # float32 [px, px], 0 … 1: how much of the ink is here


def stream(*key: int | str) -> Rng:
    """An independent random stream named by its key; the same key gives the same stream on every machine."""
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key])


# --- The plane -------------------------------------------------------------------------------------------------------


def plane(px: int) -> tuple[Gray, Gray]:
    """x and y of every pixel's centre, −1 … 1, y downwards."""
    axis = (np.arange(px, dtype=np.float32) + 0.5) * (2 / px) - 1
    return np.broadcast_to(axis, (px, px)), np.broadcast_to(axis[:, None], (px, px))


def turned(px: int, rng: Rng, angle: float, scale: float, shift: float, stretch: float = 0.2) -> tuple[Gray, Gray]:
    """The plane as an instance sees it: turned by up to ±`angle` radians, scaled by up to `scale`, shifted, stretched."""
    a, s = rng.uniform(-angle, angle), scale ** rng.uniform(-1, 1)
    e = math.exp(rng.uniform(-stretch, stretch))
    c, d = math.cos(a) * s, math.sin(a) * s
    x, y = plane(px)
    x, y = x - np.float32(rng.uniform(-shift, shift)), y - np.float32(rng.uniform(-shift, shift))
    return np.float32(c * e) * x + np.float32(d * e) * y, np.float32(-d / e) * x + np.float32(c / e) * y


def inked(distance: Gray, px: int) -> Gray:
    """1 where a signed distance (in half pictures) is negative, 0 where it is positive, one pixel of ramp between."""
    return np.clip(0.5 - distance * np.float32(px / 2), 0, 1)


def stretched(values: Gray) -> Gray:
    """Values spread over 0 … 1, the outermost percents clipped."""
    low, high = np.percentile(values[::2, ::2], (1, 99))
    return np.clip((values - np.float32(low)) / np.float32(max(high - low, 1e-6)), 0, 1)


# --- Shapes: a figure on an empty ground -----------------------------------------------------------------------------


def fractal(klass: Rng, rng: Rng, px: int) -> Gray:
    """An iterated function system: where 2 to 4 contractions, applied again and again, send a point (2101.08515)."""
    while True:
        n = int(klass.integers(2, 5))
        turn = klass.uniform(-math.pi, math.pi, (2, n))
        # The squares of the maps' scales sum to 1 … 1.7: less gives dust, more a blob.
        size = klass.dirichlet(np.full(n, 4.0)) ** 0.5 * klass.uniform(1.0, 1.3)
        squash = klass.uniform(0.5, 1.0, n) * klass.choice([-1.0, 1.0], n)
        shift = klass.uniform(-1, 1, (n, 2))
        style = klass.uniform(0.25, 0.7)
        if (np.abs(size) < 0.95).all():
            break
    turn = turn + rng.normal(0, 0.07, turn.shape)
    size = size * rng.uniform(0.93, 1.07, n)
    shift = shift + rng.normal(0, 0.06, shift.shape)

    def rotation(a: np.ndarray) -> np.ndarray:
        return np.stack([np.stack([np.cos(a), -np.sin(a)], -1), np.stack([np.sin(a), np.cos(a)], -1)], -2)

    stretch = np.stack([size, size * squash], -1)[:, :, None] * np.eye(2)
    maps = (rotation(turn[0]) @ stretch @ rotation(turn[1])).astype(np.float32)
    points = rng.uniform(-1, 1, (1, 2)).astype(np.float32)
    shift = shift.astype(np.float32)
    while len(points) * n <= 20_000:
        points = (points @ maps.transpose(0, 2, 1) + shift[:, None]).reshape(-1, 2)
    low, high = np.percentile(points, (1, 99), axis=0)
    half = max((high - low).max() / 2, 1e-3)
    at = ((points - (low + high) / 2) * np.float32(0.46 * px / half) + np.float32(px / 2)).astype(np.int32)
    at = at[((at >= 0) & (at < px)).all(1)]
    if rng.random() < 0.5:
        at[:, 0] = px - 1 - at[:, 0]
    hits = np.bincount(at[:, 1] * px + at[:, 0], minlength=px * px).reshape(px, px).astype(np.float32)
    hits = hits + 0.5 * (np.roll(hits, 1, 0) + np.roll(hits, -1, 0) + np.roll(hits, 1, 1) + np.roll(hits, -1, 1))
    return np.clip(hits / np.percentile(hits[hits > 0], 80), 0, 1) ** np.float32(style)


def atom(klass: Rng, rng: Rng, px: int) -> Gray:
    """A visual atom: nested closed contours, their radius a product of waves round the centre (2206.09132, 2303.01112)."""
    waves = int(klass.integers(1, 4))
    counts = klass.choice(np.arange(1, 13), waves, replace=False)
    depths = klass.dirichlet(np.ones(waves)) * klass.uniform(0.05, 0.6)
    phases = klass.uniform(0, 2 * math.pi, waves)
    corners = int(klass.choice([0, 0, 3, 4, 5, 6, 8]))
    rings = int(klass.integers(1, 5))
    hollow = klass.random() < 0.35
    twist = klass.uniform(-0.8, 0.8) if klass.random() < 0.4 else 0.0

    x, y = turned(px, rng, angle=0.3, scale=1.15, shift=0.1)
    theta, radius = np.arctan2(y, x), np.sqrt(x * x + y * y)
    edge = np.full_like(radius, 0.72)
    bend = theta + np.float32(twist) * radius if twist else theta
    drawn_depths, drawn_phases = depths * rng.uniform(0.8, 1.2, waves), phases + rng.normal(0, 0.15, waves)
    for m, d, p in zip(counts, drawn_depths, drawn_phases, strict=True):
        edge = edge * (1 + np.float32(d) * np.sin(np.float32(m) * bend + np.float32(p)))
    if corners:
        step = 2 * math.pi / corners
        edge = (
            edge
            * np.float32(math.cos(step / 2))
            / np.cos(np.mod(bend + np.float32(phases[0]), step) - np.float32(step / 2))
        )
    inside = (radius - edge) / (1 + np.float32(depths.max() * counts.max() * 0.3))
    if hollow:
        inside = np.abs(inside) - np.float32(rng.uniform(0.03, 0.1))
    ink = inked(inside, px)
    for ring in range(1, rings):
        inner = inked(radius - edge * np.float32(1 - ring / rings), px)
        ink = (
            ink * (1 - inner * np.float32(0.75 if ring % 2 else 0.25))
            if ring % 2
            else np.maximum(ink, inner * np.float32(0.8))
        )
    return ink


def stroke(klass: Rng, rng: Rng, px: int) -> Gray:
    """A written sign: one to three polylines, arcs or loops from a pen of some width. A class is its control points."""
    lines = [
        klass.uniform(-0.75, 0.75, (int(klass.integers(2, 6)), 2)) for _ in range(int(klass.choice([1, 1, 2, 2, 3])))
    ]
    curved = klass.random(len(lines)) < 0.65
    closed = klass.random(len(lines)) < 0.25

    wide = 2 * px  # drawn at twice the size, then averaged down: PIL's lines have no smooth edge
    canvas = Image.new("L", (wide, wide))
    pen = ImageDraw.Draw(canvas)
    breadth = rng.uniform(0.06, 0.26) * px
    turn, size = rng.normal(0, 0.12), rng.uniform(0.8, 1.12)
    slant = rng.normal(0, 0.15)
    frame = size * np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn) + slant, math.cos(turn)]])
    for points, smooth, loop in zip(lines, curved, closed, strict=True):
        points = (points + rng.normal(0, 0.05, points.shape)) @ frame
        if loop and len(points) > 2:
            points = np.concatenate([points, points[:1]])
        if smooth and len(points) > 2:
            points = rounded_off(points)
        at = [(float(u), float(v)) for u, v in (points + 1) * px]
        pen.line(at, fill=255, width=max(int(breadth), 2), joint="curve")
        for u, v in (at[0], at[-1]):
            pen.ellipse((u - breadth / 2, v - breadth / 2, u + breadth / 2, v + breadth / 2), fill=255)
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


def rounded_off(points: np.ndarray) -> np.ndarray:
    """A polyline with its corners cut three times (Chaikin): nearly its quadratic B-spline."""
    for _ in range(3):
        a, b = points[:-1], points[1:]
        cut = np.stack([0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b], 1).reshape(-1, 2)
        points = np.concatenate([points[:1], cut, points[-1:]])
    return points


def solid(klass: Rng, rng: Rng, px: int) -> Gray:
    """A body of two to five boxes, discs, bars and wedges, joined or cut away, often mirrored: a thing's silhouette."""
    parts = int(klass.integers(2, 6))
    kinds = klass.integers(0, 4, parts)
    centre = klass.uniform(-0.55, 0.55, (parts, 2))
    half = klass.uniform(0.14, 0.55, (parts, 2))
    angle = klass.uniform(-math.pi / 2, math.pi / 2, parts)
    cut = klass.random(parts) < 0.2
    shade = klass.uniform(0.45, 1.0, parts)
    mirrored = klass.random() < 0.55
    upright = klass.random(parts) < 0.4
    cut[0], centre[0], half[0], angle[upright] = False, centre[0] * 0.3, half[0] + 0.15, 0.0

    centre = centre + rng.normal(0, 0.05, centre.shape)
    half = half * rng.uniform(0.8, 1.25, half.shape)
    angle = angle + rng.normal(0, 0.1, parts)
    shaded = rng.random() < 0.5
    x, y = turned(px, rng, angle=0.2, scale=1.15, shift=0.1)
    if mirrored:
        x = np.abs(x)
    ink = np.zeros((px, px), dtype=np.float32)
    for k, (u, v), (w, h), a, removed, tone in zip(kinds, centre, half, angle, cut, shade, strict=True):
        c, s = np.float32(math.cos(a)), np.float32(math.sin(a))
        p, q = c * (x - np.float32(u)) + s * (y - np.float32(v)), c * (y - np.float32(v)) - s * (x - np.float32(u))
        w, h = np.float32(w), np.float32(h)
        if k == 0:
            inside = np.maximum(np.abs(p) - w, np.abs(q) - h)
        elif k == 1:
            inside = (np.sqrt((p / w) ** 2 + (q / h) ** 2) - 1) * min(w, h)
        elif k == 2:
            inside = np.hypot(np.maximum(np.abs(p) - w, 0), q) - np.minimum(h, np.float32(0.22))
        else:
            inside = np.maximum(np.abs(p) - w * np.float32(0.5) * (1 - q / h), np.abs(q) - h)
        part = inked(inside, px)
        ink = ink * (1 - part)
        if not removed:
            ink = ink + part * np.float32(tone if shaded else 1.0)
    return ink


# --- Textures: something everywhere ----------------------------------------------------------------------------------


def spectrum(px: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequency (cycles a picture) and direction (radians) of every coefficient of `rfft2`."""
    v, u = np.fft.fftfreq(px, 1 / px)[:, None], np.fft.rfftfreq(px, 1 / px)[None]
    return np.hypot(u, v).astype(np.float32), np.arctan2(v, u).astype(np.float32)


def filtered(rng: Rng, gain: np.ndarray, px: int) -> Gray:
    """White noise under a gain in the frequency plane, at unit deviation."""
    noise = np.fft.rfft2(rng.standard_normal((px, px), dtype=np.float32)) * gain
    out = np.fft.irfft2(noise, s=(px, px)).astype(np.float32)
    return out / np.float32(out.std() + 1e-6)


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
    values = filtered(rng, gain, px)
    if curve == 1:
        values = np.abs(values)
    elif curve == 2:
        values = np.tanh(4 * values)
    elif curve == 3:
        values = np.maximum(values, 0.3)
    elif curve == 4:
        values = -np.sqrt(np.abs(values))
    return stretched(values)


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
    values = filtered(rng, gain, px)
    if warp:
        smooth = (f + 1) ** np.float32(-2.5)
        dx, dy = filtered(rng, smooth, px), filtered(rng, smooth, px)
        i = (np.arange(px)[:, None] + (dy * np.float32(warp * px / 2)).astype(np.int32)) % px
        j = (np.arange(px)[None] + (dx * np.float32(warp * px / 2)).astype(np.int32)) % px
        values = values[i, j]
    if curve == 1:
        values = -np.abs(values)
    elif curve == 2:
        values = np.sin(np.float32(lines) * values + np.float32(rng.uniform(0, 6.3)))
    elif curve == 3:
        values = np.floor(values * np.float32(lines / 2))
    elif curve == 4:
        values = np.tanh(6 * values)
    return stretched(values)


def weave(klass: Rng, rng: Rng, px: int) -> Gray:
    """Up to three periodic profiles across the plane, added, multiplied or the larger taken: stripes, checks, rings."""
    n = int(klass.choice([1, 2, 2, 3]))
    cycles = np.exp(klass.uniform(math.log(1.5), math.log(10), n))
    towards = (
        klass.choice([0, math.pi / 2, math.pi / 4, -math.pi / 4], n, replace=False)
        + klass.normal(0, 0.25)
        + klass.normal(0, 0.1, n)
    )
    if klass.random() < 0.5 and n > 1:
        cycles[:] = cycles[0]
    shape = klass.integers(0, 4, n)
    duty = klass.uniform(0.15, 0.6, n)
    joined = int(klass.integers(0, 4))
    rings = klass.random() < 0.25
    wobble = klass.uniform(0, 0.05) * (klass.random() < 0.5)

    x, y = turned(px, rng, angle=0.2, scale=1.25, shift=1.0, stretch=0.1)
    if wobble:
        f, _ = spectrum(px)
        x = x + np.float32(wobble) * filtered(rng, (f + 2) ** np.float32(-2.2), px)
        y = y + np.float32(wobble) * filtered(rng, (f + 2) ** np.float32(-2.2), px)
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
    return stretched(out)


def neighbours(
    x: Gray, y: Gray, cells: float, loose: float, brick: float, rng: Rng
) -> Iterator[tuple[Gray, Gray, Gray]]:
    """For each of the 3 × 3 cells round every pixel: offset from the cell's seed point (in cells), its lot, 0 … 1."""
    side = int(cells * 3) + 8
    jitter = ((rng.random((3, side, side), dtype=np.float32) - 0.5) * np.float32(loose)).astype(np.float32)
    lots = rng.random((side, side), dtype=np.float32)
    u, v = x * np.float32(cells / 2), y * np.float32(cells / 2)
    row = np.floor(v).astype(np.int32)
    for dj in (-1, 0, 1):
        j = row + dj
        slide = np.float32(brick) * (j & 1)
        col = np.floor(u - slide).astype(np.int32)
        for di in (-1, 0, 1):
            i = col + di
            seat = (j % side, i % side)
            yield u - (i + 0.5 + slide + jitter[0][seat]), v - (j + 0.5 + jitter[1][seat]), lots[seat]


def cell(klass: Rng, rng: Rng, px: int) -> Gray:
    """Cells round seed points on a jittered lattice (Worley): honeycomb, cobbles, cracks, scales, bricks, mosaics."""
    cells = math.exp(klass.uniform(math.log(2.5), math.log(12)))
    loose = klass.choice([0.0, 0.3, 0.7, 1.0])
    brick = klass.choice([0.0, 0.5])
    norm = int(klass.integers(0, 3))
    reading = int(klass.integers(0, 5))
    cut = klass.uniform(0.06, 0.3)
    flat = klass.uniform(0.6, 1.6)

    x, y = turned(px, rng, angle=0.2, scale=1.25, shift=1.0, stretch=0.1)
    first = np.full((px, px), 9, dtype=np.float32)
    second, lot = first.copy(), np.zeros_like(first)
    for p, q, seat in neighbours(x * np.float32(flat), y, cells, loose, brick, rng):
        p, q = np.abs(p), np.abs(q)
        d = np.sqrt(p * p + q * q) if norm == 0 else p + q if norm == 1 else np.maximum(p, q)
        near = d < first
        second = np.where(near, first, np.minimum(second, d))
        first, lot = np.where(near, d, first), np.where(near, seat, lot)
    if reading == 0:
        return stretched(first)
    if reading == 1:
        return stretched(second - first)
    if reading == 2:
        return np.clip((second - first) / np.float32(cut), 0, 1)
    if reading == 3:
        return lot * np.clip((second - first) / np.float32(cut), 0, 1)
    return 1 - np.clip((first - np.float32(cut)) * np.float32(px / cells / 2) + 0.5, 0, 1)


def scatter(klass: Rng, rng: Rng, px: int) -> Gray:
    """One small wavy figure strewn over a lattice, turned and sized at random: dots, petals, confetti, foliage."""
    cells = math.exp(klass.uniform(math.log(2.0), math.log(8)))
    loose = klass.choice([0.0, 0.4, 0.8])
    brick = klass.choice([0.0, 0.5])
    petals, depth = int(klass.integers(2, 8)), klass.uniform(0, 0.6) * (klass.random() < 0.7)
    size, spread = klass.uniform(0.22, 0.55), klass.uniform(0, 0.35)
    slim = klass.uniform(0.35, 1.0)
    spin = klass.choice([0.0, 0.3, 3.14])
    tones = klass.uniform(0, 0.7)
    hollow = klass.random() < 0.25

    x, y = turned(px, rng, angle=0.2, scale=1.25, shift=1.0, stretch=0.1)
    facing = np.float32(rng.uniform(-math.pi, math.pi))
    ink = np.zeros((px, px), dtype=np.float32)
    for p, q, lot in neighbours(x, y, cells, loose, brick, rng):
        near = np.maximum(np.abs(p), np.abs(q)) < 1.2
        p, q, lot = p[near], q[near], lot[near]
        turn = facing + (lot * 7 % 1 - 0.5) * np.float32(2 * spin)
        c, s = np.cos(turn), np.sin(turn)
        p, q = c * p + s * q, (c * q - s * p) / np.float32(slim)
        edge = np.float32(size) * (1 + np.float32(spread) * (lot * 13 % 1 - 0.5) * 2)
        if depth:
            edge = edge * (1 + np.float32(depth) * np.cos(np.float32(petals) * np.arctan2(q, p)))
        inside = np.hypot(p, q) - edge
        if hollow:
            inside = np.abs(inside) - np.float32(0.06)
        part = np.clip(0.5 - inside * np.float32(px / cells), 0, 1) * (1 - np.float32(tones) * lot)
        ink[near] = np.maximum(ink[near], part)
    return ink


SHAPES: dict[str, Callable[[Rng, Rng, int], Gray]] = {
    "fractal": fractal,
    "atom": atom,
    "stroke": stroke,
    "solid": solid,
}
TEXTURES: dict[str, Callable[[Rng, Rng, int], Gray]] = {
    "band": band, "cloud": cloud, "weave": weave, "cell": cell, "scatter": scatter,
}  # fmt: skip
FAMILIES = SHAPES | TEXTURES


def pattern(family: str, klass: int, instance: int, px: int = 96, seed: int = 0) -> np.ndarray:
    """One picture by formula: uint8 `[px, px]`, 0 the empty ground, 255 full ink. A pure function of its arguments."""
    draw = FAMILIES[family]
    gray = draw(stream("class", seed, family, klass), stream("instance", seed, family, klass, instance), px)
    return (gray * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Many patterns in one array, and what each of them is."""

    ink: np.ndarray  # uint8 [patterns, px, px]
    labels: np.ndarray  # int64 [patterns]: class, counted over all families
    shapes: np.ndarray  # int64: the rows that are shapes
    textures: np.ndarray  # int64: the rows that are textures
    classes: int


def draw_into(
    ink: np.ndarray,
    families: Sequence[str],
    classes: int,
    instances: int,
    seed: int,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Every class of every family, `instances` times over, into `[patterns, px, px]`, a memory map say."""
    rows = [(f, k, i) for f in families for k in range(classes) for i in range(instances)]
    began = time.perf_counter()
    for row, (family, klass, instance) in enumerate(rows):
        ink[row] = pattern(family, klass, instance, ink.shape[1], seed)
        if (row + 1) % 256 == 0 or row + 1 == len(rows):
            tell({"stage": "draw", "done": row + 1, "of": len(rows), "seconds": time.perf_counter() - began})


def bank(ink: np.ndarray, families: Sequence[str], classes: int, instances: int) -> Bank:
    """What `draw_into` drew, with its labels."""
    is_shape = np.repeat([f in SHAPES for f in families], classes * instances)
    return Bank(
        ink=ink,
        labels=np.repeat(np.arange(len(families) * classes), instances),
        shapes=np.flatnonzero(is_shape),
        textures=np.flatnonzero(~is_shape),
        classes=len(families) * classes,
    )


# --- Pictures: colour, ground, viewpoint and weather -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is shown, before anyone looks: a figure or a texture in its colours on its ground."""

    ink: Tensor  # float32 [b, px, px], the pattern the label is about
    fill: Tensor  # float32 [b, px, px], a second texture, in the ground or in the figure
    shape: Tensor  # bool [b]: a figure on a ground, else a texture everywhere
    colours: Tensor  # float32 [b, 4, 3]: two of the ground, two of the figure
    ground: Tensor  # int64 [b]: 0 plain, 1 shaded, 2 textured by `fill`
    figure: Tensor  # int64 [b]: 0 plain, 1 coloured by its own ink, 2 textured by `fill`

    tinted: Tensor  # bool [b]: has colours other than grays

    @property
    def fill_shows(self) -> Tensor:
        """bool [b]: whether `fill` is anywhere in the picture."""
        return self.shape & ((self.ground == 2) | (self.figure == 2))


def scene(ink: Tensor, fill: Tensor, shape: Tensor, draw: torch.Generator) -> Scene:
    """Dress patterns (uint8 `[b, px, px]`): any colours or none, light on dark as often as dark on light."""
    b = len(ink)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=draw)

    # Black or white grounds are commoner than any one gray between them.
    light = (1.4 * uniform(b, 1, 1) - 0.2).clamp(0, 1)
    gap = 0.3 + 0.7 * uniform(b, 1, 1)
    # The figure lies `gap` above or below the ground in lightness, whichever there is room for.
    upwards = torch.where(uniform(b, 1, 1) < 0.5, light + gap <= 1, light - gap < 0)
    other = torch.where(upwards, light + gap, light - gap).clamp(0, 1)
    wander = (uniform(b, 2, 1) - 0.5) * torch.tensor([0.0, 0.5])[None, :, None]
    lightness = torch.cat([light + wander, other + wander.flip(0)], 1)
    tint = (uniform(b, 4, 3) - 0.5) * (1.2 * uniform(b, 1, 1))
    tinted = uniform(b) > 0.3
    tint = tint * tinted[:, None, None]
    # Half of the scenes have one hue per side, the others four of their own.
    tint = torch.where(uniform(b, 1, 1) < 0.5, tint[:, (0, 0, 2, 2)], tint)
    ground = torch.multinomial(torch.tensor([0.4, 0.2, 0.4]).expand(b, 3), 1, generator=draw)[:, 0]
    figure = torch.multinomial(torch.tensor([0.45, 0.3, 0.25]).expand(b, 3), 1, generator=draw)[:, 0]
    return Scene(
        ink=ink.float() / 255,
        fill=fill.float() / 255,
        shape=shape,
        colours=(lightness + tint - tint.mean(-1, keepdim=True)).clamp(0, 1),
        ground=ground,
        tinted=tinted,
        figure=torch.where((ground == 2) & (figure == 2), 0, figure),
    )


def looked_at(ink: Tensor, zoom: Tensor, turn: Tensor, shift: Tensor, flip: Tensor, px: int, outside: str) -> Tensor:
    """Patterns `[b, p, p]` through a camera that sees `zoom` times their width, turned by radians: `[b, 1, px, px]`."""
    c, s = torch.cos(turn) * zoom, torch.sin(turn) * zoom
    sign = 1 - 2 * flip.float()
    view = torch.stack([torch.stack([c * sign, -s, shift[:, 0]], -1), torch.stack([s * sign, c, shift[:, 1]], -1)], 1)
    grid = F.affine_grid(view, [len(ink), 1, px, px], align_corners=False)
    return F.grid_sample(ink[:, None], grid, padding_mode=outside, align_corners=False)


def view(what: Scene, px: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Look at scenes once: pictures `[b, 3, px, px]` in −1 … 1; `layout` and `grain` as they are without the weather."""
    b = len(what.ink)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return torch.rand(b, *size, generator=draw) * (high - low) + low

    flip = torch.rand(b, generator=draw) < 0.5
    # A shape stays mostly in the picture, a texture is looked at from near or far.
    shape_ink = looked_at(
        what.ink, uniform(0.75, 1.45), uniform(-0.3, 0.3), uniform(-0.3, 0.3, 2), flip & False, px, "zeros"
    )
    zoom = uniform(0.4, 1.0)
    whole = looked_at(
        what.ink, zoom, uniform(-0.3, 0.3), (1 - zoom)[:, None] * uniform(-1, 1, 2), flip, px, "reflection"
    )
    ink = torch.where(what.shape[:, None, None, None], shape_ink, whole)
    fill = looked_at(what.fill, uniform(0.4, 1.0), uniform(-0.3, 0.3), uniform(-0.3, 0.3, 2), flip, px, "reflection")

    axis = torch.linspace(-1, 1, px)
    slope = uniform(-1, 1, 2)
    ramp = slope[:, 0, None, None, None] * axis + slope[:, 1, None, None, None] * axis[:, None]
    a, z, c, d = (what.colours[:, i, :, None, None] for i in range(4))
    by = what.ground[:, None, None, None]
    on = what.figure[:, None, None, None]
    mix = torch.where(by == 2, fill, torch.where(by == 1, (ramp + 1) / 2, 0.0))
    ground = torch.lerp(a.expand(-1, -1, px, px), z, mix)
    ground_or_a = torch.where(what.shape[:, None, None, None], ground, torch.lerp(a, z, ink))
    mix = torch.where(on == 2, fill, torch.where(on == 1, ink, 0.0))
    figure = torch.lerp(c.expand(-1, -1, px, px), d, mix)
    clean = torch.lerp(ground_or_a, figure, ink)
    clean = clean * (1 + uniform(-0.25, 0.25, 1, 1, 1) * ramp)
    clean = (clean - 0.5) * uniform(0.75, 1.2, 1, 1, 1) + 0.5 + uniform(-0.1, 0.1, 1, 1, 1)
    clean = (clean + uniform(-0.08, 0.08, 3, 1, 1) * what.tinted[:, None, None, None]).clamp(0, 1)

    seen = clean
    # Something in the way: a plain rectangle over a fifth of the pictures.
    corner, size = uniform(-1, 0.6, 2), uniform(0.3, 0.8, 2)
    hidden = (((axis - corner[:, :1]) > 0) & ((axis - corner[:, :1]) < size[:, :1]))[:, None, None, :] & (
        ((axis - corner[:, 1:]) > 0) & ((axis - corner[:, 1:]) < size[:, 1:])
    )[:, None, :, None]
    hidden = hidden & (uniform(0, 1) < 0.2)[:, None, None, None]
    seen = torch.where(hidden, uniform(0, 1, 3, 1, 1), seen)
    # Pictures come in all sizes: some were small before they were scaled up. Rows come in random order: slices will do.
    parts, at = [], 0
    for side in (8, 12, 16, 24, 32):
        n = b // 14
        small = F.interpolate(seen[at : at + n], size=(side, side), mode="area")
        parts.append(
            F.interpolate(small, size=(px, px), mode="bilinear" if side % 3 else "bicubic", align_corners=False)
        )
        at += n
    seen = torch.cat([*parts, seen[at:]])
    noise = torch.randn(seen.shape, generator=draw) * (uniform(0, 0.08, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.4))
    edge = edges(clean)
    return (seen + noise).clamp(0, 1) * 2 - 1, layout(clean, ink, edge), grain(clean, edge)


LAYOUT = 6 * 6 + 3 * 6 * 6 + 8 * 6 * 6  # what `layout` says of a picture
GRAIN = 3 + 3 + 3 * 8  # what `grain` says of it
Edges = tuple[Tensor, Tensor, Tensor]  # at full, half and quarter size: 8 directions, [b, 8, side, side]


def edges(picture: Tensor) -> Edges:
    """How strong the edges are in each of 8 directions, at three sizes of the picture `[b, 3, px, px]`."""
    gray = picture.mean(1, keepdim=True)
    found = []
    for _ in range(3):
        dx = F.pad(gray[..., 2:] - gray[..., :-2], (1, 1))
        dy = F.pad(gray[..., 2:, :] - gray[..., :-2, :], (0, 0, 1, 1))
        direction = torch.atan2(dy, dx) * (8 / torch.pi)  # a full turn is 16, so that half turns fold onto 8
        apart = torch.remainder(direction - torch.arange(8.0)[None, :, None, None] + 4, 8) - 4
        found.append((1 - apart.abs()).clamp(min=0) * torch.sqrt(dx * dx + dy * dy))
        gray = F.avg_pool2d(gray, 2)
    return found[0], found[1], found[2]


def layout(clean: Tensor, ink: Tensor, edge: Edges) -> Tensor:
    """Where the ink, the colours and the edges are, on a 6 × 6 grid, each at about unit scale; `[b, LAYOUT]`."""
    grid = F.adaptive_avg_pool2d(edge[1], 6)
    grid = torch.sqrt(grid / (grid.mean((1, 2, 3), keepdim=True) + 2e-3))
    parts = (
        (F.adaptive_avg_pool2d(ink, 6) - 0.4) / 0.35,
        (F.adaptive_avg_pool2d(clean, 6) - 0.5) / 0.28,
        (grid - 0.8) / 0.6,
    )
    return torch.cat([part.flatten(1) for part in parts], 1)


def grain(clean: Tensor, edge: Edges) -> Tensor:
    """What the surface is like: mean and spread of the colours, edges by size and direction (log); `[b, GRAIN]`."""
    strength = torch.cat([e.mean((2, 3)) for e in edge], 1)
    return torch.cat(
        [(clean.mean((2, 3)) - 0.5) / 0.25, clean.std((2, 3)) / 0.15 - 1, torch.log(strength + 1e-3) + 5.3], 1
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Scenes seen twice: the second half of every field shows the scenes of the first half again."""

    pictures: Tensor  # float32 [2b, 3, px, px]
    layout: Tensor  # float32 [2b, LAYOUT]
    grain: Tensor  # float32 [2b, GRAIN]
    labels: Tensor  # int64 [2b]
    fill_labels: Tensor  # int64 [2b]
    fill_shows: Tensor  # bool [2b]


def pair(bank: Bank, rows: np.ndarray, fills: np.ndarray, px: int, draw: torch.Generator) -> Pair:
    """Dress patterns `rows` with textures `fills` of a bank and look at each scene twice."""
    shape = torch.from_numpy(np.isin(rows, bank.shapes))
    what = scene(torch.from_numpy(bank.ink[rows]), torch.from_numpy(bank.ink[fills]), shape, draw)
    pictures, where, surface = (
        torch.cat(both) for both in zip(view(what, px, draw), view(what, px, draw), strict=True)
    )
    return Pair(
        pictures=pictures,
        layout=where,
        grain=surface,
        labels=torch.from_numpy(bank.labels[rows]).repeat(2),
        fill_labels=torch.from_numpy(bank.labels[fills]).repeat(2),
        fill_shows=what.fill_shows.repeat(2),
    )
