"""The places in a model that a method can take, one folder each.

Every folder has the same files, so that whoever knows one knows all:

    base.py          the class that a method derives from, and what runs it
    seam.py          state on one model, and what a call looks like to the method
    diffusers.py, transformers.py, peft.py or peft/    all that knows that library
    statistics.py    what the report says of it
    __init__.py      what the place is, and its row in :data:`hf_accel.facts.SITES`

Sites do not know each other; what they must agree on stands in ``hosts/``.
"""
