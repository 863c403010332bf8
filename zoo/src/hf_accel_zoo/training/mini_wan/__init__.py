"""Training of `mini-wan`: a small text-to-video model of moving, textured shapes.

The modules import each other relatively and nothing else of hf_accel, so that the folder also runs alone on a
machine that has only torch, transformers and diffusers::

    PYTHONPATH=zoo/src/hf_accel_zoo/training python3 -m mini_wan.train --out DIR --minutes 9
    python3 -m hf_accel_zoo.training.mini_wan.assemble --checkpoint DIR --out zoo/src/hf_accel_zoo/mini-wan
    python3 -m hf_accel_zoo.training.mini_wan.judge --model zoo/src/hf_accel_zoo/mini-wan --out DIR
"""
