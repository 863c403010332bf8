"""Pipelines around the tiny models: everything a measurement asks of a pipeline, in milliseconds."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline

from hf_accel.testing.models import tiny


class TinyPipeline(DiffusionPipeline):
    """A few Euler steps of a tiny model; the first channels of its latents are the picture.

    ``family`` is a key of ``tiny.TINY``: "wan" gives videos, "flux" images. ``raises_at`` makes it fail in that call.
    """

    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)
        self.family, self.raises_at, self.calls = "wan", None, 0

    @classmethod
    def of(cls, family: str) -> TinyPipeline:
        pipe = cls(tiny.build(family))
        pipe.family = family
        return pipe

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pil", extra=None):
        self.calls += 1
        inputs = tiny.TINY[self.family].inputs(self.transformer, seed=zlib.crc32(prompt.encode()) % 1000)
        latents = torch.randn(inputs["hidden_states"].shape, generator=generator)
        for timestep in torch.linspace(1000, 100, num_inference_steps):
            if self.raises_at == self.calls:
                raise RuntimeError("out of order")
            level = torch.full_like(inputs["timestep"], float(timestep) / (1000 if self.family == "flux" else 1))
            given = inputs | {"hidden_states": latents, "timestep": level}
            latents = latents - self.transformer(**given, return_dict=False)[0] / num_inference_steps
        if self.family == "flux":  # [B, 64, C] -> [B, 3, 8, 8], enlarged for SSIM's windows
            picture = latents[..., :3].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
            return SimpleNamespace(images=picture.sigmoid().repeat_interleave(2, 2).repeat_interleave(2, 3))
        video = latents[:, :3].permute(0, 2, 1, 3, 4)
        return SimpleNamespace(frames=video.sigmoid().repeat_interleave(2, 3).repeat_interleave(2, 4))
