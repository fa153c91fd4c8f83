"""The precision of the weights of a run, decided once it is known how the checkpoint stores them."""

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from tuning.config.options import AUTO, RunConfig
from tuning.config.rules import trains_stored_weights
from tuning.console import print0
from tuning.errors import UserError
from tuning.model.load import choose_dtype


def decide_dtype(config: RunConfig, model_config: PreTrainedConfig) -> RunConfig:
    """The config with another `dtype` than auto where the weights cannot train as they are stored, and a line why.

    A run is resumed by the `dtype` that was asked for, so this comes after its fingerprint.

    With `fp16`, a gradient scaler multiplies the loss, and it takes gradients in float32 only. Without it, gradients
    in float16 underflow: a checkpoint in float16 becomes bfloat16, which has the range of float32. Raises `UserError`
    where the device has no bfloat16. `rules.py` refuses such a `dtype` that is not auto.
    """
    training, stored = config.training, choose_dtype(config.model, model_config)
    if config.model.dtype != AUTO or stored == torch.float32:
        return config
    name = str(stored).removeprefix("torch.")
    if training.fp16 and trains_stored_weights(vars(config.lora)):
        return _with_dtype(config, "float32", f"the checkpoint is {name}, and fp16 scales gradients in float32")
    if training.fp16 or stored != torch.float16:
        return config
    underflow = f"the checkpoint is {name}, and without loss scaling its small gradients would become zero"
    if has_bfloat16(training.device):
        return _with_dtype(config, "bfloat16", underflow)
    raise UserError(where="dtype auto", problem=f"{underflow}.", fix="Set fp16 true: this GPU has no bfloat16.")


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 itself: NVIDIA's GPUs do from the Ampere generation on."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _with_dtype(config: RunConfig, dtype: str, reason: str) -> RunConfig:
    print0(f"The weights are loaded in {dtype}: {reason}.")
    return replace(config, model=replace(config.model, dtype=dtype), auto=config.auto | {"dtype"})
