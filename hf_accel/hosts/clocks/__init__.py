"""Where in a generation a model is: denoising steps, steps of block diffusion, the end of a pipeline's call."""
