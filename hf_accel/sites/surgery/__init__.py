"""Surgery: a new model made of an old one, with other layers, fewer of them, or other weights.

A method here derives from :class:`~hf_accel.sites.surgery.base.Surgery` and writes ``convert(model, report)``, which
returns the new network and leaves the old one as it is. It stands on nothing and is not undone; users call
``hf_accel.convert(model, "name")``. ``base.py`` has the class and what it is held to.
"""
