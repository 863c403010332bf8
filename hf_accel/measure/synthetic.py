"""Queries, keys and values that look like a video's, for benchmarks without a model."""

from __future__ import annotations

import torch


def video_tokens(
    grid: tuple[int, int, int],
    heads: int,
    head_dim: int,
    generator: torch.Generator,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    peak: float = 14.0,
    noise: float = 0.3,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value ``[1, heads, F * H * W, head_dim]``, smooth in space and time, with noise.

    Every channel of a head is a random field over the grid, blurred by a Gaussian; query and key share it, so that
    near tokens attend to each other. Half of the heads are smooth within a frame and change from frame to frame
    (they attend in space), the others are smooth along time and vary within a frame: the two kinds that video
    transformers have. Values are smooth in both. With the defaults about a tenth of the pairs holds most of the mass.
    By construction this favours methods that look along space or time; clusters of like things far apart, as in
    real videos, are not in it.

    Args:
        grid: frames, height, width; ``(1, 1, n)`` for a plain sequence.
        generator: on the CPU, so that every device gets the same tokens.
        peak: logit (with scale ``head_dim**-0.5``) of a query with its own key, without noise.
        noise: share of the variance of query and key that is independent noise.
    """
    frames, height, width = grid
    out: list[list[torch.Tensor]] = [[], [], []]
    strength = (peak / head_dim**0.5) ** 0.5
    for head in range(heads):
        in_space = head % 2 == 0
        blur = (0.05 * frames, 0.12 * height, 0.12 * width) if in_space else (0.5 * frames, 1.0, 1.0)
        shared = _field(grid, head_dim, blur, generator)
        for place in range(2):
            own = torch.randn(frames * height * width, head_dim, generator=generator)
            out[place].append(strength * ((1 - noise) ** 0.5 * shared + noise**0.5 * own))
        value = _field(grid, head_dim, (0.1 * frames, 2.0, 2.0), generator)
        out[2].append(value + 0.3 * torch.randn(value.shape, generator=generator))
    query, key, value = (torch.stack(rows)[None].to(device, dtype) for rows in out)
    return query, key, value


def _field(
    grid: tuple[int, int, int], channels: int, blur: tuple[float, float, float], generator: torch.Generator
) -> torch.Tensor:
    """``[tokens, channels]`` of unit variance: white noise under a Gaussian of standard deviations ``blur``."""
    field = torch.randn(channels, *grid, generator=generator)
    spectrum = torch.fft.rfftn(field, dim=(1, 2, 3))
    for axis, (size, width) in enumerate(zip(grid, blur, strict=True)):
        frequency = torch.fft.rfftfreq(size) if axis == 2 else torch.fft.fftfreq(size)
        # A Gaussian of deviation w has the transform exp(-2 (pi w f)^2).
        damping = torch.exp(-2 * (torch.pi * width * frequency) ** 2)
        spectrum = spectrum * damping.reshape([-1 if place == axis else 1 for place in range(3)])
    field = torch.fft.irfftn(spectrum, s=grid, dim=(1, 2, 3)).reshape(channels, -1)
    field = field - field.mean(1, keepdim=True)
    return (field / field.std(1, keepdim=True, unbiased=False).clamp(min=1e-6)).T.contiguous()
