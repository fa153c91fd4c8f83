"""Hidden states → logits, with the text model's own arithmetic after the head."""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from tuning.model.families import MULTIPLIES_LOGITS_SCALING


def logit_arithmetic(config: PreTrainedConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the text model's `…ForCausalLM` does to its head's output; elementwise, shape kept.

    Since transformers 4.52 the vision-language wrappers leave some of it out: `LlavaNextForConditionalGeneration` does
    not divide by Granite's `logits_scaling`, though Granite was trained and is served that way. Sources:
    `logits_scaling` (GraniteForCausalLM divides, HyperCLOVAXForCausalLM multiplies), `logit_scale` (CohereForCausalLM),
    `final_logit_softcapping` (Gemma2ForCausalLM: `cap * tanh(logits / cap)`).
    """
    text = config.get_text_config()
    scaling = getattr(text, "logits_scaling", None) or 1.0
    if not text.model_type.startswith(MULTIPLIES_LOGITS_SCALING):
        scaling = 1.0 / scaling
    scaling *= getattr(text, "logit_scale", None) or 1.0
    cap = getattr(text, "final_logit_softcapping", None)

    def apply(logits: torch.Tensor) -> torch.Tensor:
        if scaling != 1.0:
            logits = logits * scaling
        return torch.tanh(logits / cap) * cap if cap else logits

    return apply
