"""The loss of supervised tokens, computed without the logits of all the others."""

import inspect
import types
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tuning.config.families import MULTIPLIES_LOGITS_SCALING
from tuning.errors import UserError

IGNORED = -100  # the label of a position that is not trained: PyTorch's `ignore_index`
MAX_LOGITS = 2**25
"""Logits that exist at a time: 128 MB in float32, and a few times that with what their gradient needs."""
FSDP_ALLOWS_CHUNKS = torch.__version__ >= (2, 13)
"""Before, a module that FSDP wraps could not be called again in the backward (pytorch issues 171779, 180428)."""


def patch_supervised_loss(model: PreTrainedModel) -> None:
    """Replace `model.forward`: with `labels` it returns `supervised_loss` and no logits.

    The stock forward computes the logits of every token, and since transformers 4.52 without the text model's own
    scaling (see `logit_transform`). Without labels the stock forward runs. Only this instance is changed, so that the
    wrappers of DDP, FSDP and PEFT, which act on `forward`, still work. It can go once transformers computes the logits
    of supervised tokens only, with that scaling. Raises `UserError` for a model without a body and a head.
    """
    if model.base_model is model or model.get_output_embeddings() is None:
        raise UserError(
            problem=f"{type(model).__name__} has no separate body and output head, so it cannot be trained here.",
            fix="Choose another model.",
        )
    stock_forward = model.forward
    transform = logit_transform(model.config)
    chunk_size = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)

    def forward(self, *args, labels=None, num_items_in_batch=None, **inputs):
        if labels is None:
            return stock_forward(*args, **inputs)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        body = self.base_model(*args, **{**inputs, "use_cache": False, "return_dict": True})
        loss = supervised_loss(
            body.last_hidden_state,
            labels,
            self.get_output_embeddings(),
            transform,
            num_items_in_batch,
            chunk_size=chunk_size,
        )
        return CausalLMOutput(loss=loss)

    # `generate` looks for `logits_to_keep` in the signature; without it, it computes the logits of whole prompts.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def supervised_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    transform: Callable[[torch.Tensor], torch.Tensor],
    num_items: torch.Tensor | int | None = None,
    *,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Mean cross-entropy of the next token at supervised positions, in nats, at least in float32.

    `hidden` is `[B, T, H]`. `labels` is `[B, T]`, with -100 where nothing is trained; position t predicts label t + 1.
    `transform` is applied to the output of `head`. The sum is divided by `num_items`, the supervised tokens of the
    whole global batch, so that neither accumulation nor the number of processes changes the gradient. Where it is
    None, the sum is divided by the supervised tokens of this batch. Logits exist for `chunk_size` positions at a time.
    With more positions than that, the backward computes them again, chunk by chunk.
    """

    def sum_losses(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = transform(head(hidden))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum")

    targets = labels[:, 1:]
    supervised = targets != IGNORED
    targets, hidden = targets[supervised], hidden[:, :-1][supervised]
    if not FSDP_ALLOWS_CHUNKS and _is_fsdp(head):
        chunk_size = max(1, len(targets))
    chunks = list(zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True))
    missing = _largest_chunk_count(len(chunks), head, hidden.device) - len(chunks)
    chunks += [(hidden[:0], targets[:0])] * missing
    if len(chunks) == 1:
        total = sum_losses(hidden, targets)
    else:
        total = torch.stack([checkpoint(sum_losses, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    if num_items is None:
        num_items = targets.numel()
    return total / torch.as_tensor(num_items, device=total.device).clamp(min=1)


def logit_transform(config: PreTrainedConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the text model's `…ForCausalLM` does to the output of its head; elementwise, the shape stays.

    Since transformers 4.52 the vision-language wrappers leave some of it out. `LlavaNextForConditionalGeneration`, for
    one, does not divide by Granite's `logits_scaling`, though Granite was trained and is served with it. Sources:
    `logits_scaling` (GraniteForCausalLM divides, HyperCLOVAXForCausalLM multiplies), `logit_scale` (CohereForCausalLM),
    `final_logit_softcapping` (Gemma2ForCausalLM: `cap * tanh(logits / cap)`).
    """
    text = config.get_text_config()
    scaling = getattr(text, "logits_scaling", None) or 1.0
    if not text.model_type.startswith(MULTIPLIES_LOGITS_SCALING):
        scaling = 1.0 / scaling
    scaling *= getattr(text, "logit_scale", None) or 1.0
    cap = getattr(text, "final_logit_softcapping", None)

    def transform(logits: torch.Tensor) -> torch.Tensor:
        if scaling != 1.0:
            logits = logits * scaling
        return torch.tanh(logits / cap) * cap if cap else logits

    return transform


def _largest_chunk_count(count: int, head: Callable, device: torch.device) -> int:
    """The largest `count` of all processes: where each call gathers the head's weight, all must call it equally often.

    FSDP and ZeRO-3 gather it. Elsewhere, this process's own `count`.
    """
    if not (isinstance(head, nn.Module) and _is_gathered(head)):
        return count
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _is_gathered(head: nn.Module) -> bool:
    return _is_fsdp(head) or any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def _is_fsdp(head: Callable) -> bool:
    return isinstance(head, nn.Module) and any(isinstance(module, FSDPModule) for module in head.modules())
