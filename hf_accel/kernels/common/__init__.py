"""What the kernels share: dispatch, checks, tiles, the online softmax."""
