"""Fine-tune vision-language models: full and LoRA, on image+text chat data."""

import logging
from typing import Any

from tuning.data.torchvision_import import patch_torchvision_import

# PEFT imports bitsandbytes where it is installed. Without an optional package that prints a warning at every start.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
patch_torchvision_import()


def train(config: Any):
    """Run one fine-tuning. `config`: options by name, the path of a JSON file, or a `RunConfig`.

    Returns a `tuning.sft_trainer.TrainingResult`. Raises `tuning.errors.UserError` where the input is at fault.
    """
    from tuning.sft_trainer import train

    return train(config)
