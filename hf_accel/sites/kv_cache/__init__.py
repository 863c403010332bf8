"""The K/V cache of language models.

A :class:`.base.CodecMethod` says how tokens are stored, a :class:`.base.PolicyMethod` which stay (``seam.py``); a
:class:`.base.PrefixCacheMethod` keeps K/V where a model keeps none (``llada2.py``). ``transformers.py`` has the
caches and cache layers themselves.
"""

from hf_accel.facts import SITES

SITE = SITES["kv cache"]
