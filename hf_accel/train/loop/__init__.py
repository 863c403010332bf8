"""The loop that every training here shares: data, checkpoints, resuming, history."""
