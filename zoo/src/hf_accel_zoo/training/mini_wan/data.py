"""The renderer of `mini-wan`: scenes of :mod:`grammar` as anti-aliased video, vectorised over the batch.

Forms are signed distance functions in a frame that moves and turns with the shape; textures live in the
same frame, so that a shape carries its pattern along and only another frame of the clip tells how it
continues. The background has a pattern named by the caption and a mottle of random waves that none tells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .grammar import MAX_SHAPES, Scenes

FRAMES, SIDE = 17, 64

# Order of grammar.COLOURS and grammar.BACK_COLOURS, linear RGB in 0..1.
SHAPE_RGB = (
    (0.93, 0.13, 0.12),
    (0.96, 0.85, 0.10),
    (0.12, 0.78, 0.20),
    (0.10, 0.85, 0.88),
    (0.16, 0.28, 0.95),
    (0.90, 0.18, 0.85),
    (0.95, 0.95, 0.95),
)
BACK_RGB = (
    (0.36, 0.36, 0.37),
    (0.36, 0.24, 0.14),
    (0.11, 0.14, 0.32),
    (0.08, 0.29, 0.29),
    (0.29, 0.14, 0.29),
    (0.29, 0.30, 0.12),
)
HEADING = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # x, y of grammar.DIRECTIONS; y grows downward
RADIUS = ((7.0, 8.5), (10.0, 12.0))  # pixels of 64, small and large


def signed_distance(form: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels to the outline, negative inside; `form` selects one of grammar.FORMS per item."""
    r = torch.sqrt(x * x + y * y + 1e-6)
    ax, ay = x.abs(), y.abs()
    disc = r - radius
    ring = (r - 0.72 * radius).abs() - 0.28 * radius
    square = torch.maximum(ax, ay) - 0.86 * radius
    triangle = torch.maximum(ax * math.sin(math.pi / 3) - y * 0.5, y) - 0.58 * radius
    bar, width = 1.02 * radius, 0.36 * radius
    cross = torch.minimum(torch.maximum(ax - bar, ay - width), torch.maximum(ax - width, ay - bar))
    out = disc
    for index, distance in enumerate((ring, square, triangle, cross), start=1):
        out = torch.where(form == index, distance, out)
    return out


def _pattern(kind: Tensor, x: Tensor, y: Tensor, period: Tensor, order: tuple[str, ...]) -> Tensor:
    """A soft pattern in -1..1 at coordinates in pixels; 0 where `order[kind]` has no pattern of its own."""
    sx, sy = torch.sin(x * (2 * math.pi) / period), torch.sin(y * (2 * math.pi) / period)
    shapes = {
        "striped": torch.tanh(2.5 * sx),
        "checkered": torch.tanh(4.0 * sx * sy),
        "dotted": torch.tanh(3.0 * (sx + sy - 0.75)),
    }
    out = torch.zeros_like(sx)
    for name, value in shapes.items():
        out = torch.where(kind == order.index(name), value, out)
    return out


def _mottle(x: Tensor, y: Tensor, waves: Tensor) -> Tensor:
    """Sum of random plane waves. `waves`: `[N, W, 3]` = (kx, ky) in radians per pixel and phase."""
    out = torch.zeros_like(x)
    for wave in waves.unbind(1):
        kx, ky, phase = (value.view(-1, 1, 1, 1) for value in wave.unbind(-1))
        out = out + torch.sin(kx * x + ky * y + phase)
    return out * (2 / waves.shape[1]) ** 0.5


def render(
    scenes: Scenes,
    device: torch.device | str,
    generator: torch.Generator,
    frames: int = FRAMES,
    side: int = SIDE,
    start: int | None = None,
) -> Tensor:
    """Video `[N, 3, frames, side, side]` float32 in -1..1 on `device`.

    `generator` (of `device`) draws what captions do not tell: positions, speeds, phases, mottle. Lengths
    scale with `side / 64`, so a smaller video shows the same scene. `start`: render the `frames` frames of a full
    clip that begin there; without it the clip is sampled at `frames` moments.
    """
    n = len(scenes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device) * (high - low) + low

    def waves(count: int, shortest: float, longest: float) -> Tensor:
        angle, period = uniform(0, 2 * math.pi, count), uniform(shortest, longest, count)
        k = 2 * math.pi / period
        return torch.stack([k * angle.cos(), k * angle.sin(), uniform(0, 2 * math.pi, count)], -1)

    def label(value: Tensor) -> Tensor:
        return value.to(device, non_blocking=True)

    def table(values: tuple) -> Tensor:  # built on the CPU and sent: building on the GPU would wait for it
        return torch.tensor(values).to(device, non_blocking=True)

    scale = 64 / side
    axis = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) * scale - 32
    grid_y, grid_x = axis.view(1, 1, side, 1), axis.view(1, 1, 1, side)
    time = torch.linspace(-1, 1, frames if start is None else FRAMES, device=device)  # a clip lasts 17 frames, always
    if start is not None:
        time = time[start : start + frames]
    headings = table(HEADING)

    colour, kind, heading = label(scenes.back).unbind(1)
    shift = headings[heading] * uniform(0.7, 1.1, 1)  # [N, 2] pixels per frame
    x = grid_x - (shift[:, :1] * time * 8).view(n, frames, 1, 1) + uniform(0, 64, 1, 1, 1)
    y = grid_y - (shift[:, 1:] * time * 8).view(n, frames, 1, 1) + uniform(0, 64, 1, 1, 1)
    order = ("striped", "checkered", "dotted", "cloudy")
    pattern = _pattern(kind.view(n, 1, 1, 1), x, y, uniform(13, 15, 1, 1, 1), order)
    mottle = _mottle(x, y, waves(5, 7, 20))
    cloudy = (kind == order.index("cloudy")).view(n, 1, 1, 1)
    light = 1 + torch.where(cloudy, 0.32 * mottle, 0.30 * pattern + 0.13 * mottle)
    video = table(BACK_RGB)[colour].view(n, 3, 1, 1, 1) * light[:, None]

    # Depth: shape 1 at 0, its neighbours in the caption before or behind it, ties broken at random.
    behind = label(scenes.relation) == 0  # [N, 2]
    above = uniform(0.5, 1.5, 2)
    depth = torch.stack(
        [
            torch.where(behind[:, 0], -above[:, 0], above[:, 0]),
            torch.zeros(n, device=device),
            torch.where(behind[:, 1], above[:, 1], -above[:, 1]),
        ],
        1,
    )
    back_to_front = depth.argsort(1)
    shape_colours = table(SHAPE_RGB)
    radii = table(RADIUS)
    item = torch.arange(n, device=device)
    labels = {name: label(getattr(scenes, name)) for name in ("colour", "form", "texture", "size", "tumble")}
    direction, count = label(scenes.direction), label(scenes.count)
    for layer in range(MAX_SHAPES):
        which = back_to_front[:, layer]
        own = {name: value[item, which] for name, value in labels.items()}
        low, high = radii[own["size"]].unbind(-1)
        radius = (low + (high - low) * uniform(0, 1)).view(n, 1, 1, 1)
        path = headings[direction[item, which]] * uniform(8, 13, 1)  # half the way, pixels
        centre = uniform(-11, 11, 2)[:, None] + path[:, None] * time[None, :, None]  # [N, F, 2]
        turn = own["tumble"].float()[:, None] * (
            uniform(0, 2 * math.pi, 1) + uniform(1.0, 1.6, 1) * (uniform(-1, 1, 1).sign()) * time
        )
        cos, sin = turn.cos().view(n, frames, 1, 1), turn.sin().view(n, frames, 1, 1)
        dx = grid_x - centre[..., 0].view(n, frames, 1, 1)
        dy = grid_y - centre[..., 1].view(n, frames, 1, 1)
        x, y = cos * dx + sin * dy, cos * dy - sin * dx
        distance = signed_distance(own["form"].view(n, 1, 1, 1), x, y, radius) / scale
        alpha = (0.5 - distance).clamp(0, 1) * (which < count).float().view(n, 1, 1, 1)
        rim = (distance + 1.6).clamp(0, 1)  # a darker outline separates a shape from one of the same brightness
        pattern = _pattern(
            own["texture"].view(n, 1, 1, 1),
            x + uniform(0, 8, 1, 1, 1),
            y + uniform(0, 8, 1, 1, 1),
            uniform(6.5, 7.5, 1, 1, 1),
            ("plain", "striped", "checkered", "dotted"),
        )
        light = 0.84 + 0.22 * pattern + 0.06 * _mottle(x, y, waves(3, 6, 14)) - 0.25 * rim
        paint = shape_colours[own["colour"]].view(n, 3, 1, 1, 1) * light[:, None]
        video = torch.lerp(video, paint, alpha[:, None])
    return video.clamp(0, 1) * 2 - 1


def contact_sheet(videos: Tensor, columns: int = 6) -> Tensor:
    """One row per video, `columns` frames spread over the clip: `[H, W, 3]` uint8 on the CPU."""
    frames = torch.linspace(0, videos.shape[2] - 1, min(columns, videos.shape[2])).round().long()
    picked = videos[:, :, frames].float().cpu()  # [N, 3, C, H, W]
    picked = torch.nn.functional.pad(picked, (1, 1, 1, 1), value=1.0)
    n, _, c, h, w = picked.shape
    sheet = picked.permute(0, 3, 2, 4, 1).reshape(n * h, c * w, 3)
    return ((sheet + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
