"""Samplers for models that come without one. See :func:`hf_accel.generate_blocks`."""
