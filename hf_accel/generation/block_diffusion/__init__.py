"""The sampler of block-diffusion language models."""
