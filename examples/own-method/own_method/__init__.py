"""Methods for hf_accel. The entry points in ``pyproject.toml`` name them; importing this package does nothing."""
