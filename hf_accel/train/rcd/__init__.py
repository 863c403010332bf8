"""Training of residual context diffusion; see :mod:`.trainer`."""

from hf_accel.train.rcd.config import RCDTrainingConfig
from hf_accel.train.rcd.trainer import RCDTrainer

__all__ = ["RCDTrainer", "RCDTrainingConfig"]
