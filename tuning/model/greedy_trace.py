"""A greedy answer with its log probabilities: to compare how two programs run one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tuning.model.generate import greedy_settings, prepare_prompts

TOP = 5


@dataclass(frozen=True)
class Trace:
    """A greedy answer without special tokens and outer blanks, and its N `ids`.

    `top`: for each id the log probabilities of the `TOP` likeliest tokens by id, its own first.
    """

    text: str
    ids: list[int]
    top: Sequence[Mapping[int, float]]


def trace_answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    batch: dict[str, Any],
    *,
    max_new_tokens: int,
    end_of_turn: str = "",
) -> Trace:
    """The answer to a batch of one prompt, `[1, T]`. `end_of_turn`: see `generate_texts`."""
    settings = greedy_settings(model, tokenizer, max_new_tokens=max_new_tokens, end_of_turn=end_of_turn)
    batch = prepare_prompts(model, batch)
    with torch.no_grad():
        made = model.generate(**batch, generation_config=settings, return_dict_in_generate=True, output_logits=True)
    ids = made.sequences[0, batch["input_ids"].shape[1] :].tolist()
    top = []
    for logits in made.logits:
        values, tokens = torch.log_softmax(logits[0].float(), dim=-1).topk(TOP)
        top.append(dict(zip(tokens.tolist(), values.tolist(), strict=True)))
    return Trace(tokenizer.decode(ids, skip_special_tokens=True).strip(), ids, top)
