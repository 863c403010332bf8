"""Training: what a recipe changes in how a model is trained, on transformers' ``Trainer`` or on a loop of ours.

A method here derives from :class:`~hf_accel.sites.training.base.Recipe` and writes any of: how gradients are exchanged
(``comm_hook``), which examples come when (``sampler``, ``batch_sampler``), the learning rate (``schedule``), the loss
(``loss``), how the optimizer's moments are kept between steps (``encode_state``, ``decode_state``), and a ``callback``.
``base.py`` has the class, ``transformers.py`` and ``loop.py`` put it on a training, ``ddp.py`` and ``optimizer.py`` do
what both need, ``statistics.py`` tells what it did.
"""
