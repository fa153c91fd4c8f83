"""The loss of supervised tokens, computed without the logits of all the others."""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tuning.console import print0
from tuning.errors import UserError
from tuning.model.head import HeadCode, OutputHead, StandIn, find_head, measure_distance, record_inner_body
from tuning.model.row_by_row import PackedRows

IGNORED = -100  # the label of a position that is not trained: PyTorch's `ignore_index`
MAX_LOGITS = 2**25
"""Logits that exist at a time: 128 MB in float32, and a few times that with what their gradient needs."""
SHARE_OF_LOGITS = 1 / 128
"""The share of a GPU's memory that float32 logits may take where that is more: 0.6 of 80 GB."""
COMPARED_TOKENS = 64
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1  # of the standard deviation of logits


def patch_supervised_loss(model: PreTrainedModel) -> None:
    """Replace `model.forward`: with `labels` it returns `supervised_loss` and no logits.

    The stock forward computes the logits of every token, and some leave out arithmetic of the text model (see
    `OutputHead`). Without labels the stock forward runs. Only this instance is changed, so that the wrappers of DDP,
    FSDP and PEFT, which act on `forward`, still work. It can go once transformers computes the logits of supervised
    tokens only, with that arithmetic. Raises `UserError` for a model without a body and a head. It prints
    where the loss is more than the stock one, unless the model is a skeleton.

    `model.packed_rows` says where the rows of a packed batch end, to layers that run row by row.

    With `compare_logits` it returns logits `[2, N, V]` of the first row's last tokens: ours, and the stock forward's.
    """
    head, stock_forward, rows = find_head(model), model.forward, PackedRows()
    chunk_size = max(1, count_logits_at_once() // model.config.get_text_config().vocab_size)
    places = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    last_places = {"logits_to_keep": COMPARED_TOKENS} if places else {}
    router_outputs = {"output_router_logits": True} if asks_for_router_loss(model) else {}

    def run_body(*args, **inputs):
        inputs = {**{name: value for name, value in inputs.items() if value is not None}, "use_cache": False}
        if head.stock.owner is model:
            return head.stock.body(*args, **inputs, return_dict=True)
        with record_inner_body(head.stock) as outputs:
            stock_forward(*args, **inputs)
        return outputs[-1]

    def forward(self, *args, labels=None, num_items_in_batch=None, compare_logits=False, **inputs):
        with rows.running(inputs.get("cu_seq_lens_q")):
            if compare_logits:
                ours = head.stock_logits(run_body(*args, **inputs).last_hidden_state[0, -COMPARED_TOKENS:])
                stock = stock_forward(*args, **inputs, **last_places, use_cache=False).logits[0, -COMPARED_TOKENS:]
                return CausalLMOutput(logits=torch.stack([ours, stock]))
            if labels is None:
                return stock_forward(*args, **inputs)
            body = run_body(*args, **inputs, **router_outputs)
        loss = supervised_loss(
            body.last_hidden_state, labels, head.stock.head, head.logits, num_items_in_batch, chunk_size=chunk_size
        )
        if router_outputs:
            share = 1 if num_items_in_batch is None else (labels[:, 1:] != IGNORED).sum() / max(1, num_items_in_batch)
            loss = loss + share * router_loss(head.stock, body, inputs.get("attention_mask"))
        return CausalLMOutput(loss=loss)

    # `generate` looks for `logits_to_keep` in the signature; without it, it computes the logits of whole prompts.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    model.packed_rows = rows
    if model.device.type != "meta":  # a skeleton's plan says nothing of it
        for line in describe_loss(model, head):
            print0(line)


def count_logits_at_once() -> int:
    """How many logits exist at a time: more where a GPU has room for them, as every chunk is computed twice."""
    if not torch.cuda.is_available():
        return MAX_LOGITS
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return max(MAX_LOGITS, int(memory / 4 * SHARE_OF_LOGITS))


def asks_for_router_loss(model: PreTrainedModel) -> bool:
    """Whether the configuration asks for the auxiliary loss of mixture-of-experts routers, and the model has one."""
    asks = getattr(model.config.get_text_config(), "output_router_logits", False)
    return bool(asks) and "output_router_logits" in inspect.signature(type(model).forward).parameters


def router_loss(stock: HeadCode, body: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """What the stock forward adds to the loss of the labels: its loss for the output of `body` without any label.

    `supervised_loss` divides by the supervised tokens of a whole global batch. A batch adds its share of them of this.
    """
    labels = torch.full((1, 1), IGNORED, device=body.last_hidden_state.device)
    inputs = {"labels": labels, "attention_mask": attention_mask, "num_items_in_batch": 1}
    return stock.run(stock.head, body.last_hidden_state[:1, :1], body.router_logits, **inputs).loss


def describe_loss(model: PreTrainedModel, head: OutputHead) -> list[str]:
    """The lines that a run prints about its loss, where it is more than the stock cross-entropy."""
    text, lines = model.config.get_text_config(), [head.describe()] if head.left_out else []
    if asks_for_router_loss(model):
        weight = getattr(text, "router_aux_loss_coef", 0.0)
        lines.append(f"Loss: the auxiliary loss of the routers is added, {weight:g} of it, as config.json asks.")
    return lines


@torch.no_grad()
def check_logits(model: nn.Module, forward: Callable[..., Any], batch: dict[str, Any], *, half: bool) -> None:
    """Compare our logits with those of the stock forward on a batch, as the model is wrapped for training.

    Raises `UserError` where they differ. What the stock forward is known to leave out is left out of both. `half`: the
    model computes in 16 bits. Every process makes the same calls.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    was_training = model.training
    model.eval()
    try:
        ours, stock = forward(**inputs, compare_logits=True).logits
    finally:
        model.train(was_training)
    distance = measure_distance(ours, stock)
    if distance > (HALF_TOLERANCE if half else TOLERANCE):
        raise UserError(
            problem=(
                f"our logits of {type(model).__name__} differ from those of its own forward, by up to {distance:.3g} "
                "standard deviations, so its loss would be wrong."
            ),
            fix="Choose another model, or another version of transformers.",
        )


def supervised_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: nn.Module,
    make_logits: Callable[[Any, torch.Tensor], torch.Tensor],
    num_items: int | None = None,
    *,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Mean cross-entropy of the next token at supervised positions, in nats, at least in float32.

    `hidden` is `[B, T, H]`. `labels` is `[B, T]`, with -100 where nothing is trained; position t predicts label t + 1.
    `make_logits` makes logits `[N, V]` with `head`, or what is called in its place, of hidden states `[N, H]`. The sum
    is divided by `num_items`, the supervised tokens of the whole global batch, so that neither accumulation nor the
    number of processes changes the gradient. Where it is None, the sum is divided by the supervised tokens of this
    batch. Logits exist for `chunk_size` positions at a time. With more positions than that, the backward computes them
    again, chunk by chunk.
    """
    rows, positions = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    places = rows * labels.shape[1] + positions
    targets, hidden = labels.flatten()[places + 1], hidden.flatten(0, 1).index_select(0, places)

    def sum_losses(own_head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = make_logits(own_head, hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum")

    def sum_chunks(own_head: Any, hidden: torch.Tensor) -> torch.Tensor:
        chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        if len(targets) <= chunk_size:
            return sum_losses(own_head, hidden, targets)
        sums = [checkpoint(sum_losses, own_head, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(sums).sum()

    total = run_within(head, sum_chunks, hidden)
    return total / max(1, len(targets) if num_items is None else num_items)


def run_within(module: nn.Module, function: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
    """`function(own, *args)` as the forward of `module`, whose own forward is called as `own` then.

    FSDP and ZeRO-3 gather a module's weights around a call of it, once in the forward and once in the backward, and
    reduce its gradient after that. `own` can be called any number of times, a different number in each process.
    """
    own, was_replaced = module.forward, "forward" in vars(module)
    module.forward = lambda *args: function(StandIn(module, own), *args)  # type: ignore[method-assign]
    try:
        return module(*args)
    finally:
        del module.forward
        if was_replaced:
            module.forward = own  # type: ignore[method-assign]
