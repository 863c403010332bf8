"""The door to ``hf-accel-zoo``: miniature trained models, a distribution of its own since it is mostly weights.

::

    from diffusers import WanPipeline
    from hf_accel import zoo

    pipe = WanPipeline.from_pretrained(zoo.path("mini-wan"))
"""

from hf_accel.errors import HFAccelError

try:
    from hf_accel_zoo import heldout, names, path, trained
except ModuleNotFoundError as error:
    if error.name != "hf_accel_zoo":
        raise
    raise HFAccelError(
        "The miniature models come in a distribution of their own, which is not installed here: "
        "pip install hf-accel-zoo (or, in a checkout, pip install ./zoo)."
    ) from error

__all__ = ["heldout", "names", "path", "trained"]
