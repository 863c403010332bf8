"""Fine-tuning models that carry a trainable method: the flow-matching loss, or distillation from the dense model.

::

    from hf_accel.train import Finetuner, FinetuneConfig

    hf_accel.apply(pipe, "sla", topk=0.1)
    tuner = Finetuner(pipe, FinetuneConfig(loss="distill", steps=2000), out="run")
    tuner.fit(batches, validation=held_out_batches)
    hf_accel.save_trained(pipe, "my-sla")

Any method whose facts say ``backward`` and that names ``trainable_parameters()`` can be trained. See docs/training.md.
Masked diffusion language models are trained for residual context diffusion by :class:`RCDTrainer`. See docs/rcd.md.
"""

from hf_accel.train.finetune.config import FinetuneConfig
from hf_accel.train.finetune.finetuner import Finetuner
from hf_accel.train.finetune.teacher import teacher
from hf_accel.train.loop.history import History
from hf_accel.train.rcd.config import RCDTrainingConfig
from hf_accel.train.rcd.trainer import RCDTrainer

__all__ = ["FinetuneConfig", "Finetuner", "History", "RCDTrainer", "RCDTrainingConfig", "teacher"]
