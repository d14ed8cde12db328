"""The plane on which patterns are drawn: random streams, coordinates, ink, and noise of a given spectrum."""

import math
import zlib

import numpy as np

Rng = np.random.Generator
Gray = np.ndarray  # float32 [px, px], 0 … 1: the amount of ink


def stream(*key: int | str) -> Rng:
    """An independent random stream named by its key; the same key gives the same stream on every machine."""
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key])


def plane(px: int) -> tuple[Gray, Gray]:
    """x and y of every pixel's centre, each [px, px], −1 … 1, y downwards."""
    axis = (np.arange(px, dtype=np.float32) + 0.5) * (2 / px) - 1
    return np.broadcast_to(axis, (px, px)), np.broadcast_to(axis[:, None], (px, px))


def deformed_plane(
    px: int, rng: Rng, angle: float, scale: float, shift: float, stretch: float = 0.2
) -> tuple[Gray, Gray]:
    """The plane of one instance: rotated by up to ±`angle` radians, scaled by up to `scale`, shifted and stretched."""
    a, s = rng.uniform(-angle, angle), scale ** rng.uniform(-1, 1)
    e = math.exp(rng.uniform(-stretch, stretch))
    c, d = math.cos(a) * s, math.sin(a) * s
    x, y = plane(px)
    x, y = x - np.float32(rng.uniform(-shift, shift)), y - np.float32(rng.uniform(-shift, shift))
    return np.float32(c * e) * x + np.float32(d * e) * y, np.float32(-d / e) * x + np.float32(c / e) * y


def coverage(distance: Gray, px: int) -> Gray:
    """Share of each pixel inside a shape: 1 for a negative signed distance (in half pictures), 0 for a positive one."""
    return np.clip(0.5 - distance * np.float32(px / 2), 0, 1)


def stretch_contrast(values: Gray) -> Gray:
    """Values rescaled to 0 … 1, with the lowest and the highest percent clipped."""
    low, high = np.percentile(values[::2, ::2], (1, 99))
    return np.clip((values - np.float32(low)) / np.float32(max(high - low, 1e-6)), 0, 1)


def spectrum(px: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequency (cycles a picture) and direction (radians) of every coefficient of `rfft2`."""
    v, u = np.fft.fftfreq(px, 1 / px)[:, None], np.fft.rfftfreq(px, 1 / px)[None]
    return np.hypot(u, v).astype(np.float32), np.arctan2(v, u).astype(np.float32)


def filtered_noise(rng: Rng, gain: np.ndarray, px: int) -> Gray:
    """White noise times a gain in the frequency plane, [px, px] at unit standard deviation."""
    noise = np.fft.rfft2(rng.standard_normal((px, px), dtype=np.float32)) * gain
    out = np.fft.irfft2(noise, s=(px, px)).astype(np.float32)
    return out / np.float32(out.std() + 1e-6)
