"""Does a model give a row in a padded batch what it gives the row alone? Tried on short rows before the first step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import nn

from tuning.config.options import RunConfig
from tuning.data.collator import Collator
from tuning.data.dummy_samples import trial_samples
from tuning.data.encode import Encoder
from tuning.errors import UserError
from tuning.model.batch_trial import try_batch


def find_batch_fault(
    model: Any, forward: Callable[..., Any], encoder: Encoder, collator: Collator, *, half: bool
) -> str:
    """How rows in a padded batch get other results than alone; "" where they do not.

    `model`: without wrappers. `forward`: the model as it runs; it takes a batch with labels on the CPU. `half`: it
    computes in 16 bits. All processes must call this.
    """
    samples = trial_samples(encoder)
    padded = replace(collator, padding_free=False, dummy_image_sample=None)
    separate = [padded.join([sample]) for sample in samples]
    trial = try_batch(model, forward, separate, lambda numbers: padded.join([samples[number] for number in numbers]))
    fault = trial.find_fault(half=half)
    images = ", ".join(dict.fromkeys(name for sample in samples for name in sample.images))
    return f"{fault}; its tensors for images are {images}" if fault else ""


def options_of_several_rows(config: RunConfig, *, evaluates: bool) -> list[str]:
    """The options that put several rows into a batch."""
    options = ["max_tokens_per_batch"] if config.data.max_tokens_per_batch else []
    if not options and config.training.train_batch_size > 1:
        options.append("per_device_train_batch_size")
    if evaluates and config.training.eval_batch_size > 1:
        options.append("per_device_eval_batch_size")
    return options


def rows_differ(model: nn.Module, options: Sequence[str], fault: str) -> UserError:
    """The error of a model whose rows get other results in a batch, which `options` ask for."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    to_one, fix = list(options), ""
    if options[0] == "max_tokens_per_batch":
        to_one[0], fix = "per_device_train_batch_size", "Leave out max_tokens_per_batch. "
    return UserError(
        where=", ".join(options),
        problem=f"{type(model).__name__} gives a row in a batch other results than alone ({fault}).",
        fix=f"{fix}Set {' and '.join(to_one)} to 1. gradient_accumulation_steps makes the batches of steps larger.",
    )
