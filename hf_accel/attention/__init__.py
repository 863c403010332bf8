"""What methods share: calls, block maps, selectors, gates. Plain torch; knows nothing of models."""
