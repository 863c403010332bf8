"""Tensors in, tensors out. Knows nothing of models.

Each operation is a folder: ``reference.py`` (plain torch, the definition of the result), ``triton.py`` (GPU),
``cpu.py`` where a faster plain-torch form exists, and ``__init__.py`` (signature, documentation, dispatch).
"""
