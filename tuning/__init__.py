"""Fine-tune vision-language models: full and LoRA, on image+text chat data."""

from typing import Any


def train(config: Any):
    """Run one fine-tuning. `config`: options by name, the path of a JSON file, or a `RunConfig`.

    Returns a `tuning.sft_trainer.TrainingResult`; raises `tuning.errors.UserError` where the input is at fault.
    """
    from tuning.sft_trainer import train

    return train(config)
