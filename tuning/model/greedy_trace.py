"""A greedy answer with its log probabilities: to compare how two programs run one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tuning.errors import try_optional
from tuning.model.generate import greedy_settings, prepare_prompts
from tuning.model.head import StandIn, find_head

TOP = 5


@dataclass(frozen=True)
class Trace:
    """A greedy answer without special tokens and outer blanks, and its N `ids` with their `logprobs`.

    `top`: for each id the log probabilities of the `TOP` likeliest tokens in its place by id, falling. A penalty in the
    generation config may have chosen another token.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
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
    settings.return_dict_in_generate = settings.output_logits = True
    batch = prepare_prompts(model, batch)
    with torch.no_grad():
        made = model.generate(**batch, generation_config=settings)
        logits = put_back(model, torch.cat(made.logits)).float()
    ids = made.sequences[0, batch["input_ids"].shape[1] :].tolist()
    logprobs = torch.log_softmax(logits, dim=-1)
    values, tokens = logprobs.topk(TOP)
    top = [dict(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Trace(text, ids, logprobs[range(len(ids)), ids].tolist(), top)


def put_back(model: PreTrainedModel | PeftModel, logits: torch.Tensor) -> torch.Tensor:
    """The logits `[N, V]` of the stock forward with the arithmetic that it leaves out: see `OutputHead.left_out`.

    Training and servers have it. It changes no order, and so no answer.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = try_optional(lambda: find_head(base), catch_user_errors=True).value
    if head is None or not head.left_out:
        return logits
    hidden = logits.new_zeros(len(logits), base.config.get_text_config().hidden_size)
    return head.logits(StandIn(head.used.head, lambda _: logits[:, None]), hidden)
