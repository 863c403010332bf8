"""Decoding: how many tokens one forward of a language model gives.

A method here guesses what comes next, or says when guessing pays. It derives from
:class:`~hf_accel.sites.decoding.base.DecodingMethod` and writes ``draft``, or from
:class:`~hf_accel.sites.decoding.base.GateMethod` and writes ``worth_drafting``; the model verifies every guess, so its
text stays its own. ``base.py`` has the classes, ``draft.py`` what a guess is, ``transformers.py`` makes plain
``model.generate(...)`` use them, ``statistics.py`` counts what was accepted.
"""
