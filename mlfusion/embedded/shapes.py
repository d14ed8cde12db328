"""Shapes by formula: a figure on an empty ground."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from mlfusion.embedded.plane import Gray, Rng, coverage, deformed_plane


def fractal(klass: Rng, rng: Rng, px: int) -> Gray:
    """An iterated function system: the points that repeated application of 2 to 4 contractions reaches (2101.08515)."""
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

    x, y = deformed_plane(px, rng, angle=0.3, scale=1.15, shift=0.1)
    theta, radius = np.arctan2(y, x), np.sqrt(x * x + y * y)
    edge = np.full_like(radius, 0.72)
    bend = theta + np.float32(twist) * radius if twist else theta
    drawn_depths, drawn_phases = depths * rng.uniform(0.8, 1.2, waves), phases + rng.normal(0, 0.15, waves)
    for m, d, p in zip(counts, drawn_depths, drawn_phases, strict=True):
        edge = edge * (1 + np.float32(d) * np.sin(np.float32(m) * bend + np.float32(p)))
    if corners:
        step = 2 * math.pi / corners
        towards = np.mod(bend + np.float32(phases[0]), step) - np.float32(step / 2)
        edge = edge * np.float32(math.cos(step / 2)) / np.cos(towards)
    inside = (radius - edge) / (1 + np.float32(depths.max() * counts.max() * 0.3))
    if hollow:
        inside = np.abs(inside) - np.float32(rng.uniform(0.03, 0.1))
    ink = coverage(inside, px)
    for ring in range(1, rings):
        inner = coverage(radius - edge * np.float32(1 - ring / rings), px)
        ink = ink * (1 - inner * np.float32(0.75)) if ring % 2 else np.maximum(ink, inner * np.float32(0.8))
    return ink


def stroke(klass: Rng, rng: Rng, px: int) -> Gray:
    """A written sign: one to three polylines, arcs or loops from a pen of some width. A class is its control points."""
    count = int(klass.choice([1, 1, 2, 2, 3]))
    lines = [klass.uniform(-0.75, 0.75, (int(klass.integers(2, 6)), 2)) for _ in range(count)]
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
            points = chaikin(points)
        at = [(float(u), float(v)) for u, v in (points + 1) * px]
        pen.line(at, fill=255, width=max(int(breadth), 2), joint="curve")
        for u, v in (at[0], at[-1]):
            pen.ellipse((u - breadth / 2, v - breadth / 2, u + breadth / 2, v + breadth / 2), fill=255)
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


def chaikin(points: np.ndarray) -> np.ndarray:
    """A polyline with its corners cut three times (Chaikin): nearly its quadratic B-spline."""
    for _ in range(3):
        a, b = points[:-1], points[1:]
        cut = np.stack([0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b], 1).reshape(-1, 2)
        points = np.concatenate([points[:1], cut, points[-1:]])
    return points


def solid(klass: Rng, rng: Rng, px: int) -> Gray:
    """A silhouette of two to five boxes, discs, bars and wedges, joined or cut away, often mirrored."""
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
    x, y = deformed_plane(px, rng, angle=0.2, scale=1.15, shift=0.1)
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
        part = coverage(inside, px)
        ink = ink * (1 - part)
        if not removed:
            ink = ink + part * np.float32(tone if shaded else 1.0)
    return ink


SHAPES: dict[str, Callable[[Rng, Rng, int], Gray]] = {draw.__name__: draw for draw in (fractal, atom, stroke, solid)}
"""Family → draws an instance: stream of the class, stream of the instance, side in pixels → [px, px] float32."""
