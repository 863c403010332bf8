"""Attention of an active block to its frozen prefix, in block-diffusion language models.

A method derives from :class:`.base.PrefixAttentionMethod` and writes ``attend(call, state)`` on a
:class:`.call.PrefixCall`. ``sdar.py`` and ``gemma.py`` are the two ways into a model, ``masks.py`` takes a mask over
prefix and block apart, ``split.py`` and ``pages.py`` are the arithmetic that methods share.
"""

from hf_accel.facts import SITES

SITE = SITES["attention"]
