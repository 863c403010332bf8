"""Training of `mini-sdar`: a miniature block-diffusion language model that looks things up in a long context."""
