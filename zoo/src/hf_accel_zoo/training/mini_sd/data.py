"""The renderer of `mini-sd`: scenes of :mod:`grammar` as anti-aliased pictures, vectorised over the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..mini_wan.data import SHAPE_RGB, signed_distance
from .grammar import Scenes

SIDE = 64
# Order of grammar.BACK_COLOURS, RGB in 0..1; no background is as bright as a shape.
BACK_RGB = (
    (0.45, 0.45, 0.46),
    (0.46, 0.27, 0.12),
    (0.10, 0.13, 0.40),
    (0.05, 0.38, 0.37),
    (0.37, 0.12, 0.37),
    (0.38, 0.41, 0.10),
)
RADIUS = ((8.0, 9.0), (12.5, 14.0))  # pixels, small and large
STRIDE = 4  # pixels to a latent
STRIPE = 8.0  # pixels from one dark stripe to the next
TOWARDS = ((-1.0, 0.0), (0.0, -1.0))  # x, y of grammar.RELATIONS; y grows downward


def render(scenes: Scenes, generator: torch.Generator, free: bool = False) -> Tensor:
    """Pictures `[N, 3, 64, 64]` float32 in -1..1. `generator` draws what captions do not tell: places.

    Places are multiples of 4 pixels, the stride of the latents, so that a form of a size is one pattern of latents
    wherever it stands, which is easier to learn to draw. `free` is for what shall know more than the U-Net
    draws, autoencoder and judge: any place, sizes that vary, and a tilt.
    """
    return render_with_places(scenes, generator, free)[0]


def render_with_places(scenes: Scenes, generator: torch.Generator, free: bool = False) -> tuple[Tensor, Tensor]:
    """As :func:`render`, and where both shapes are: x, y in pixels from the middle, `[N, 2, 2]`."""
    n = len(scenes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    def place(reach: float, *shape: int) -> Tensor:
        value = uniform(-reach, reach, *shape)
        return value if free else STRIDE * (value / STRIDE).round()

    axis = torch.arange(SIDE, dtype=torch.float32) + 0.5 - SIDE / 2
    grid_y, grid_x = axis.view(1, SIDE, 1), axis.view(1, 1, SIDE)

    slope = torch.where(scenes.back[:, 1] == 1, 0.5, 0.0).view(-1, 1, 1)
    light = 1 + slope * grid_y / (SIDE / 2)  # dark above, bright below
    picture = torch.tensor(BACK_RGB)[scenes.back[:, 0]].view(n, 3, 1, 1) * light[:, None]

    towards = torch.tensor(TOWARDS)[scenes.relation]  # [N, 2]
    across = towards.flip(1)
    single = (scenes.count == 1)[:, None]
    places = []
    for shape in range(2):
        centre = towards * (1 - 2 * shape) * (uniform(15.5, 17.5, 1) if free else 16.0) + across * place(6, 1)
        centre = torch.where(single, place(12, 2), centre)
        places.append(centre)
        tilt = uniform(-0.15, 0.15, 1, 1) * float(free)
        dx, dy = grid_x - centre[:, 0].view(-1, 1, 1), grid_y - centre[:, 1].view(-1, 1, 1)
        x, y = tilt.cos() * dx + tilt.sin() * dy, tilt.cos() * dy - tilt.sin() * dx
        low, high = torch.tensor(RADIUS)[scenes.size[:, shape]].unbind(1)
        radius = (low + (high - low) * (uniform(0, 1) if free else 0.5)).view(-1, 1, 1)
        distance = signed_distance(scenes.form[:, shape].view(-1, 1, 1), x, y, radius)
        cover = (0.5 - distance).clamp(0, 1) * (scenes.count > shape).view(-1, 1, 1)
        stripes = torch.sigmoid(5 * torch.sin(2 * math.pi / STRIPE * (x + y) / math.sqrt(2)))
        shade = 1 - 0.55 * stripes * (scenes.texture[:, shape] == 1).view(-1, 1, 1)
        colour = torch.tensor(SHAPE_RGB)[scenes.colour[:, shape]].view(n, 3, 1, 1) * shade[:, None]
        picture = picture + cover[:, None] * (colour - picture)
    return picture.clamp(0, 1) * 2 - 1, torch.stack(places, 1)


def contact_sheet(pictures: Tensor, columns: int = 8, zoom: int = 2) -> Tensor:
    """Pictures `[N, 3, H, W]` in 0..1 side by side, uint8 `[H', W', 3]`, each pixel `zoom` wide."""
    n, _, height, width = pictures.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = torch.ones(rows * columns, 3, height + 2, width + 2)
    sheet[:n, :, 1:-1, 1:-1] = pictures.clamp(0, 1).float().cpu()
    sheet = sheet.view(rows, columns, 3, height + 2, width + 2).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * (height + 2), columns * (width + 2), 3)
    return (sheet * 255 + 0.5).to(torch.uint8).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
