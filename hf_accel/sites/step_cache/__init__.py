"""How much of a denoiser each step computes.

A :class:`.base.StepCacheMethod` works inside a U-Net (``seam.py``, ``unet_views.py``), a
:class:`.base.OutputCacheMethod` at the output of any denoiser (``output.py``). One of each can stand at once.
"""

from hf_accel.facts import SITES

SITE = SITES["step cache"]
