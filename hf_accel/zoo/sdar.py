"""The face of :mod:`hf_accel_zoo.sdar`."""

from hf_accel_zoo.sdar import *  # noqa: F403
