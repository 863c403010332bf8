"""Fine-tuning of denoisers that carry a method with parameters; see :class:`.finetuner.Finetuner`."""
