"""Training scripts of the miniature models. None of this is imported by hf_accel itself."""
