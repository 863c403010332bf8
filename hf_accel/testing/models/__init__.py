"""Tiny models with random weights, in which the promises are checked. Importing this builds none.

``tiny`` has diffusers' denoisers and a language model, by family; ``sdar``, ``gemma``, ``llada``, ``llada2`` and
``dream`` language models that write by denoising. What bears the names of remote code on the Hub is written here, with
the same class names, module names and call signatures: remote code is not downloaded, and what is modelled is the
interface and which positions see which.
"""
