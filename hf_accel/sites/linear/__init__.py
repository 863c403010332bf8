"""Linear layers.

A method derives from :class:`.base.LinearMethod` and writes ``replacement(site)``. ``places.py`` finds linears by
role, name or pattern and exchanges them; ``samples.py``, ``stream.py``, ``gates.py`` and ``store.py`` run calibration
block by block; ``originals.py`` keeps, offloads or drops the full weights.
"""

from hf_accel.facts import SITES

SITE = SITES["linear"]
