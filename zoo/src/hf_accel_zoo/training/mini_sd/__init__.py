"""Training of `mini-sd`: a miniature Stable Diffusion of captioned pictures of shapes.

Two CPU cores are enough::

    python -m hf_accel_zoo.training.mini_sd.train vae --out DIR --minutes 13 --batch 16 --half
    python -m hf_accel_zoo.training.mini_sd.train unet --out DIR --minutes 62 --half --compile
    python -m hf_accel_zoo.training.mini_sd.assemble --checkpoint DIR --out zoo/src/hf_accel_zoo/mini-sd
    python -m hf_accel_zoo.training.mini_sd.judge report --model zoo/src/hf_accel_zoo/mini-sd --out DIR
"""
