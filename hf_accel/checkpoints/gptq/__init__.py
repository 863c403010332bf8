"""Packed linears in files: the GPTQ layout, read and written, for transformers and diffusers."""
