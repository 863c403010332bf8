"""The very module :mod:`hf_accel_zoo.llama`, by the name that it had before the zoo was a distribution of its own."""

import sys

from hf_accel_zoo import llama

sys.modules[__name__] = llama
