"""How far two videos of the same prompt and seed are apart: PSNR and SSIM through torchmetrics."""

from __future__ import annotations

import torch


def _images(video: torch.Tensor) -> torch.Tensor:
    """``[F, H, W, 3]`` in 0..1 as ``[F, 3, H, W]`` fp32."""
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"A video is [frames, height, width, 3] in 0..1; got a tensor of shape {tuple(video.shape)}.")
    return video.detach().float().cpu().permute(0, 3, 1, 2)


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all frames, peak 1. Infinite for equal videos.

    Args:
        video, reference: ``[F, H, W, 3]`` in 0..1.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(_images(video), _images(reference), data_range=1.0))


def ssim(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity, mean over frames; 1 for equal videos. Arguments as :func:`psnr`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    ours, theirs = _images(video), _images(reference)
    total = 0.0
    for index in range(ours.shape[0]):  # its Gaussian windows need many times a frame's memory
        pair = ours[index : index + 1], theirs[index : index + 1]
        found = structural_similarity_index_measure(*pair, data_range=1.0)
        total += float(found[0] if isinstance(found, tuple) else found)
    return total / ours.shape[0]
