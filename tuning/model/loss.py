"""Hidden states → logits, with the text model's own arithmetic after the head."""

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


IGNORED = -100  # the label of a position that is not trained: PyTorch's `ignore_index`
LOGITS_AT_ONCE = 2**25
"""So many logits exist at a time: 128 MB in float32, and a few times that with what their gradient needs."""
FSDP_TAKES_CHUNKS = torch.__version__ >= (2, 13)
"""Before, a module of FSDP's could not be called again in the backward (pytorch issues 171779, 180428)."""


def supervised_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    arithmetic: Callable[[torch.Tensor], torch.Tensor],
    num_items: torch.Tensor | int | None = None,
    *,
    positions_at_once: int = 1024,
) -> torch.Tensor:
    """Mean cross-entropy of the next token at supervised positions, in nats, at least in float32.

    `hidden` `[B, T, H]`, `labels` `[B, T]` with -100 where nothing is trained; position t predicts label t + 1. The
    sum is divided by `num_items`, the supervised tokens of the whole global batch, so that neither accumulation nor
    the number of processes changes the gradient; by this batch's own where it is None. Logits exist for
    `positions_at_once` only; where there are more, the backward makes them again, chunk by chunk.
    """

    def sum_losses(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = arithmetic(head(hidden))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum")

    targets = labels[:, 1:]
    supervised = targets != IGNORED
    targets, hidden = targets[supervised], hidden[:, :-1][supervised]
    if not FSDP_TAKES_CHUNKS and _is_fsdp(head):
        positions_at_once = max(1, len(targets))
    chunks = list(zip(hidden.split(positions_at_once), targets.split(positions_at_once), strict=True))
    chunks += [(hidden[:0], targets[:0])] * (most_chunks(len(chunks), head, hidden.device) - len(chunks))
    if len(chunks) == 1:
        total = sum_losses(hidden, targets)
    else:
        total = torch.stack([checkpoint(sum_losses, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    if num_items is None:
        num_items = targets.numel()
    return total / torch.as_tensor(num_items, device=total.device).clamp(min=1)


def most_chunks(number: int, head: Callable, device: torch.device) -> int:
    """How often to call `head`: where FSDP or ZeRO-3 gathers its weight for each call, as often as anywhere."""
    if not (isinstance(head, nn.Module) and _is_gathered(head)):
        return number
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _is_gathered(head: nn.Module) -> bool:
    return _is_fsdp(head) or any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def _is_fsdp(head: Callable) -> bool:
    return isinstance(head, nn.Module) and any(isinstance(module, FSDPModule) for module in head.modules())


def patch_supervised_loss(model: PreTrainedModel) -> None:
    """Make `model(**inputs, labels=…)` return `supervised_loss` without ever computing the other logits.

    Without labels the forward stays the stock one. It is replaced on the instance, so that DDP's, FSDP's and PEFT's
    wrapping, which act on `forward`, are kept. Raises `UserError` for models whose head does not follow their body.
    """
    if model.base_model is model or model.get_output_embeddings() is None:
        raise UserError(problem=f"{type(model).__name__} has no body and head of its own; it cannot be tuned here.")
    stock = model.forward
    arithmetic = logit_arithmetic(model.config)
    positions_at_once = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)

    def forward(self, *args, labels=None, num_items_in_batch=None, **inputs):
        if labels is None:
            return stock(*args, **inputs)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        body = self.base_model(*args, **{**inputs, "use_cache": False, "return_dict": True})
        loss = supervised_loss(
            body.last_hidden_state,
            labels,
            self.get_output_embeddings(),
            arithmetic,
            num_items_in_batch,
            positions_at_once=positions_at_once,
        )
        return CausalLMOutput(loss=loss)

    # `generate` looks there for `logits_to_keep`, without which it computes the logits of whole prompts.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
