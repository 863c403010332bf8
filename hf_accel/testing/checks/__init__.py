"""The promises as plain functions: ``forwards`` of methods that change what a forward computes, ``blocks`` of those on
models that write by denoising, ``linears`` of those that change weights, ``declarations`` of a method by itself."""
