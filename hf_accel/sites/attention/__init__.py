"""Self-attention of denoisers and of language models in their prefill.

A method derives from :class:`.base.AttentionMethod` and writes ``attend(call, state)``; the same
:class:`~hf_accel.attention.call.AttentionCall` comes from every host. ``diffusers.py`` and ``transformers.py`` reach
the attentions of a model, ``seam.py`` holds what runs while a forward does, ``token_order.py`` puts tokens into
another order once per forward.
"""

from hf_accel.facts import SITES

SITE = SITES["attention"]
