"""The face of :mod:`hf_accel_zoo.llama`."""

from hf_accel_zoo.llama import *  # noqa: F403
