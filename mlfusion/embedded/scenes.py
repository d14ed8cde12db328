"""Pictures composed from patterns: colour, background, viewpoint and disturbances, drawn by torch from a random stream."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlfusion.embedded.formula import Bank


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Content of a picture before a viewpoint is chosen: a figure or a texture, its colours and its background."""

    ink: Tensor  # float32 [b, px, px], the pattern whose class is the label
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
    """Give patterns (uint8 `[b, px, px]`) colours or grays, light on dark as often as dark on light."""
    b = len(ink)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=draw)

    # Black and white grounds are more frequent than any gray between them.
    light = (1.4 * uniform(b, 1, 1) - 0.2).clamp(0, 1)
    contrast = 0.3 + 0.7 * uniform(b, 1, 1)
    # The figure is lighter or darker than the ground by `contrast`, whichever stays within 0 … 1.
    upwards = torch.where(uniform(b, 1, 1) < 0.5, light + contrast <= 1, light - contrast < 0)
    other = torch.where(upwards, light + contrast, light - contrast).clamp(0, 1)
    spread = (uniform(b, 2, 1) - 0.5) * torch.tensor([0.0, 0.5])[None, :, None]
    lightness = torch.cat([light + spread, other + spread.flip(0)], 1)
    tint = (uniform(b, 4, 3) - 0.5) * (1.2 * uniform(b, 1, 1))
    tinted = uniform(b) > 0.3
    tint = tint * tinted[:, None, None]
    # In half of the scenes ground and figure have one hue each; in the others all four colours differ.
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


def warp(ink: Tensor, zoom: Tensor, angle: Tensor, shift: Tensor, flip: Tensor, px: int, padding: str) -> Tensor:
    """Resample patterns `[b, p, p]` → `[b, 1, px, px]`: a view of `zoom` times their width, rotated by `angle` radians."""
    c, s = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    sign = 1 - 2 * flip.float()
    view = torch.stack([torch.stack([c * sign, -s, shift[:, 0]], -1), torch.stack([s * sign, c, shift[:, 1]], -1)], 1)
    grid = F.affine_grid(view, [len(ink), 1, px, px], align_corners=False)
    return F.grid_sample(ink[:, None], grid, padding_mode=padding, align_corners=False)


def view(scenes: Scene, px: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Render scenes once → pictures `[b, 3, px, px]` in −1 … 1, and `layout` and `grain` of the undisturbed pictures."""
    b = len(scenes.ink)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return torch.rand(b, *size, generator=draw) * (high - low) + low

    flip = torch.rand(b, generator=draw) < 0.5
    # Shapes are moved but stay mostly in the picture; textures are enlarged.
    unflipped = torch.zeros_like(flip)
    shape_ink = warp(scenes.ink, uniform(0.75, 1.45), uniform(-0.3, 0.3), uniform(-0.3, 0.3, 2), unflipped, px, "zeros")
    zoom = uniform(0.4, 1.0)
    whole = warp(scenes.ink, zoom, uniform(-0.3, 0.3), (1 - zoom)[:, None] * uniform(-1, 1, 2), flip, px, "reflection")
    ink = torch.where(scenes.shape[:, None, None, None], shape_ink, whole)
    fill = warp(scenes.fill, uniform(0.4, 1.0), uniform(-0.3, 0.3), uniform(-0.3, 0.3, 2), flip, px, "reflection")

    axis = torch.linspace(-1, 1, px)
    slope = uniform(-1, 1, 2)
    ramp = slope[:, 0, None, None, None] * axis + slope[:, 1, None, None, None] * axis[:, None]
    a, z, c, d = (scenes.colours[:, i, :, None, None] for i in range(4))
    ground_kind = scenes.ground[:, None, None, None]
    figure_kind = scenes.figure[:, None, None, None]
    mix = torch.where(ground_kind == 2, fill, torch.where(ground_kind == 1, (ramp + 1) / 2, 0.0))
    ground = torch.lerp(a.expand(-1, -1, px, px), z, mix)
    ground_or_a = torch.where(scenes.shape[:, None, None, None], ground, torch.lerp(a, z, ink))
    mix = torch.where(figure_kind == 2, fill, torch.where(figure_kind == 1, ink, 0.0))
    figure = torch.lerp(c.expand(-1, -1, px, px), d, mix)
    clean = torch.lerp(ground_or_a, figure, ink)
    clean = clean * (1 + uniform(-0.25, 0.25, 1, 1, 1) * ramp)
    clean = (clean - 0.5) * uniform(0.75, 1.2, 1, 1, 1) + 0.5 + uniform(-0.1, 0.1, 1, 1, 1)
    clean = (clean + uniform(-0.08, 0.08, 3, 1, 1) * scenes.tinted[:, None, None, None]).clamp(0, 1)

    picture = clean
    # A plain rectangle hides a part of a fifth of the pictures.
    corner, size = uniform(-1, 0.6, 2), uniform(0.3, 0.8, 2)
    offset = axis - corner[:, :, None]  # [b, 2, px]
    within = (offset > 0) & (offset < size[:, :, None])
    hidden = within[:, None, None, 0] & within[:, None, 1, :, None] & (uniform(0, 1) < 0.2)[:, None, None, None]
    picture = torch.where(hidden, uniform(0, 1, 3, 1, 1), picture)
    # Some pictures are reduced and enlarged again, as small images are. Rows are in random order, so slices can be taken.
    parts, at = [], 0
    for side in (8, 12, 16, 24, 32):
        n = b // 14
        small = F.interpolate(picture[at : at + n], size=(side, side), mode="area")
        mode = "bilinear" if side % 3 else "bicubic"
        parts.append(F.interpolate(small, size=(px, px), mode=mode, align_corners=False))
        at += n
    picture = torch.cat([*parts, picture[at:]])
    noise = torch.randn(picture.shape, generator=draw) * (uniform(0, 0.08, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.4))
    edge = edges(clean)
    return (picture + noise).clamp(0, 1) * 2 - 1, layout(clean, ink, edge), grain(clean, edge)


LAYOUT = 6 * 6 + 3 * 6 * 6 + 8 * 6 * 6  # numbers in `layout`
GRAIN = 3 + 3 + 3 * 8  # numbers in `grain`
Edges = tuple[Tensor, Tensor, Tensor]  # at full, half and quarter size: 8 directions, [b, 8, side, side]


def edges(picture: Tensor) -> Edges:
    """The strength of the edges in each of 8 directions, at three sizes of the picture `[b, 3, px, px]`."""
    gray = picture.mean(1, keepdim=True)
    strengths = []
    for _ in range(3):
        dx = F.pad(gray[..., 2:] - gray[..., :-2], (1, 1))
        dy = F.pad(gray[..., 2:, :] - gray[..., :-2, :], (0, 0, 1, 1))
        direction = torch.atan2(dy, dx) * (8 / torch.pi)  # a full turn is 16, so that half turns fold onto 8
        distance = torch.remainder(direction - torch.arange(8.0)[None, :, None, None] + 4, 8) - 4
        strengths.append((1 - distance.abs()).clamp(min=0) * torch.sqrt(dx * dx + dy * dy))
        gray = F.avg_pool2d(gray, 2)
    return strengths[0], strengths[1], strengths[2]


def layout(clean: Tensor, ink: Tensor, edge: Edges) -> Tensor:
    """Ink, colours and edges on a 6 × 6 grid, each at about unit scale; `[b, LAYOUT]`."""
    grid = F.adaptive_avg_pool2d(edge[1], 6)
    grid = torch.sqrt(grid / (grid.mean((1, 2, 3), keepdim=True) + 2e-3))
    parts = (
        (F.adaptive_avg_pool2d(ink, 6) - 0.4) / 0.35,
        (F.adaptive_avg_pool2d(clean, 6) - 0.5) / 0.28,
        (grid - 0.8) / 0.6,
    )
    return torch.cat([part.flatten(1) for part in parts], 1)


def grain(clean: Tensor, edge: Edges) -> Tensor:
    """Mean and standard deviation of the colours, and edges by size and direction (log); `[b, GRAIN]`."""
    mean, spread = clean.mean((2, 3)), clean.std((2, 3))
    strength = torch.cat([e.mean((2, 3)) for e in edge], 1)
    return torch.cat([(mean - 0.5) / 0.25, spread / 0.15 - 1, torch.log(strength + 1e-3) + 5.3], 1)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two views of each scene: the second half of every field shows the scenes of the first half again."""

    pictures: Tensor  # float32 [2b, 3, px, px]
    layout: Tensor  # float32 [2b, LAYOUT]
    grain: Tensor  # float32 [2b, GRAIN]
    labels: Tensor  # int64 [2b]
    fill_labels: Tensor  # int64 [2b]
    fill_shows: Tensor  # bool [2b]


def pair(bank: Bank, rows: np.ndarray, fills: np.ndarray, px: int, draw: torch.Generator) -> Pair:
    """Compose scenes of the patterns `rows` and textures `fills` of a bank, and render each twice."""
    shape = torch.from_numpy(np.isin(rows, bank.shapes))
    scenes = scene(torch.from_numpy(bank.ink[rows]), torch.from_numpy(bank.ink[fills]), shape, draw)
    both = view(scenes, px, draw), view(scenes, px, draw)
    pictures, layouts, grains = map(torch.cat, zip(*both, strict=True))
    return Pair(
        pictures=pictures,
        layout=layouts,
        grain=grains,
        labels=torch.from_numpy(bank.labels[rows]).repeat(2),
        fill_labels=torch.from_numpy(bank.labels[fills]).repeat(2),
        fill_shows=scenes.fill_shows.repeat(2),
    )
