"""What low-precision methods share: element formats, grids, packing, Gram matrices. Plain torch; knows no models."""
