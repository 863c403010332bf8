"""What masked diffusion language models embed at open positions.

A :class:`.base.ResidualMethod` mixes the last prediction in (``residual.py``, ``start.py``), a
:class:`.base.SoftEmbeddingMethod` computes the expected embedding of DiffusionGemma (``self_conditioning.py``).
"""

from hf_accel.facts import SITES

SITE = SITES["embedding"]
