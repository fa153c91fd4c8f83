"""Estimate the peak device memory of training: run a step without weights and count its tensors."""

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Trainer, TrainingArguments

from tuning.config.legacy_names import CHECKPOINTING, CHECKPOINTING_KWARGS
from tuning.data.encode import IGNORED
from tuning.distributed.fsdp import cast_trainable_to_fp32, padded_numel
from tuning.errors import describe_failure, try_optional
from tuning.model.dry_run import META, DryRun
from tuning.model.quantize import scales_of
from tuning.model.recompute import Recomputed, recompute_only

_aten = torch.ops.aten
# The operations of these models that autocast computes in half precision, and those that it computes in float32.
_HALF = {F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm, torch.addmm}
_HALF |= {torch.conv1d, torch.conv2d, torch.conv3d, F.scaled_dot_product_attention}
_FULL = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.cross_entropy}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors on one device, without the CUDA context and what the allocator wastes.

    `weights`: parameters, buffers and quantisation scales; under FSDP also the weights of the gathered blocks.
    `gradients` and `optimizer`: as they are at the optimizer's step. `activations`: the rest of the peak, that is the
    batch, temporary tensors, and tensors saved for the backward. They are `None` where the model does not run without
    weights, for the reason in `unknown`; `peak` does not contain them then.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    peak: int
    unknown: str = ""


def estimate_memory(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    training: TrainingArguments,
    *,
    processes: int = 1,
    replicated: bool = False,
    recomputed: Recomputed | None = None,
    patch_optimizer: Callable[[Optimizer], Optimizer] | None = None,
) -> MemoryEstimate:
    """The peak of a run's steps on batches like `batch`, without loading weights.

    `model` is a skeleton on the meta device in the weights' dtype, prepared as for training. Do not use it afterwards:
    its precision, mode and gradients change. `batch` holds what the collator made for the model, on the CPU. Leave out
    its `attention_mask` for FlashAttention-2, which never builds a mask of tokens × tokens. With `processes` above 1,
    FSDP shards the model over that many devices. `replicated`: DDP keeps a second copy of the gradients, which it
    exchanges. `recomputed`: the layers that gradient checkpointing recomputes, where these are not all.
    `patch_optimizer` gives the optimizer float32 master weights. FSDP then shards trained 16-bit weights in float32.

    The step really runs, forward, backward and optimizer, on tensors without values, while a meter counts the live
    tensors. Where gradients are accumulated, a second batch runs too. The peak is the largest sum of weights,
    optimizer state, gradients and activations at one moment.
    """
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    if processes > 1 and half:
        cast_trainable_to_fp32(model)
    gathered = _gathered_bytes(model, half, processes) if processes > 1 else 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    meter = _Meter(model, processes)
    device = _DeviceEmulation(half, meter.ignore if processes > 1 else None)
    simulated = try_optional(lambda: _simulate_step(model, batch, training, meter, device, recomputed))
    if simulated.error:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    if processes > 1 and patch_optimizer:
        _cast_with_gradients_to_fp32(trained)
    weights = bytes_of(tensors_of(model))
    gradients = bytes_of(parameter.grad for parameter in trained if parameter.grad is not None) * (1 + replicated)
    optimizer, temporary = _optimizer_bytes(trained, training, patch_optimizer)
    weights, gradients, optimizer = weights // processes + gathered, gradients // processes, optimizer // processes
    total = weights + gradients + optimizer
    if simulated.error:
        unknown = describe_failure(simulated.error)
        return MemoryEstimate(weights, gradients, optimizer, activations=None, peak=total, unknown=unknown)
    buckets = gradients // 2 if replicated else 0
    peak = max(weights + optimizer + buckets + meter.peak, total + temporary // processes)
    return MemoryEstimate(weights, gradients, optimizer, activations=peak - total, peak=peak)


def _simulate_step(
    model: nn.Module,
    batch: dict[str, Any],
    training: TrainingArguments,
    meter: "_Meter",
    device: "_DeviceEmulation",
    recomputed: Recomputed | None,
) -> None:
    """Run forward and backward as the trainer does, under `meter`.

    With accumulation, a second batch runs while the gradients of the first exist.
    """
    model.train()
    if getattr(training, CHECKPOINTING):
        _enable_checkpointing(model, getattr(training, CHECKPOINTING_KWARGS) or {}, device)
        if recomputed:
            recompute_only(model, recomputed)
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}  # not the lengths
    tensors = {name: value.to(META) if value.is_floating_point() else value for name, value in tensors.items()}
    steps = training.gradient_accumulation_steps
    items = steps * int((batch["labels"][:, 1:] != IGNORED).sum())
    meter.count_permanent(tensors.values(), steps)  # all batches of a step are on the device before it begins
    with warnings.catch_warnings(), device, meter:
        warnings.simplefilter("ignore")
        for _ in range(min(steps, 2)):
            with device.keep_casts():
                loss = model(**{**batch, **tensors}, num_items_in_batch=items).loss
            loss.backward()
            del loss


def _enable_checkpointing(model: nn.Module, settings: dict[str, Any], device: "_DeviceEmulation") -> None:
    """Recompute activations in the backward. There torch suspends `device`, so the recomputation enters it again."""
    for_model = {name: value for name, value in settings.items() if name in ("every_n_layers", "offload")}
    for_torch = {name: value for name, value in settings.items() if name not in for_model}
    for_torch |= {"use_reentrant": False, "context_fn": lambda: (nullcontext(), device)}
    getattr(model, f"{CHECKPOINTING}_enable")(**{CHECKPOINTING_KWARGS: for_torch}, **for_model)


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers(), *scales_of(model)]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of `tensors`; a shared storage counts once."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


class _Meter(DryRun):
    """Counts the bytes of the live tensors of a dry run, by the storages behind them."""

    def __init__(self, model: nn.Module, processes: int):
        super().__init__()
        self.processes = processes
        self.activations, self.gradients, self.peak = 0, 0, 0
        self.counted_as: dict[int, str | None] = {}  # storage → "activations", "gradients", or None: not counted here
        for tensor in tensors_of(model):
            self.counted_as[tensor.untyped_storage()._cdata] = None
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._move_to_gradients)

    def count_permanent(self, tensors: Iterable[torch.Tensor], times: int) -> None:
        """Count the bytes of `tensors` `times` over, as activations that exist during the whole step."""
        tensors = list(tensors)
        self._add("activations", times * bytes_of(tensors))
        self.counted_as.update({tensor.untyped_storage()._cdata: None for tensor in tensors})

    def ignore(self, tensor: torch.Tensor) -> None:
        """Stop counting `tensor`, because it is counted elsewhere."""
        storage = tensor.untyped_storage()
        self._add("activations", -storage.nbytes())
        self.counted_as[storage._cdata] = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.counted_as:
            return
        self.counted_as[key] = "activations"
        self._add("activations", storage.nbytes())
        weakref.finalize(storage, self._remove, key, storage.nbytes()).atexit = False

    def _remove(self, key: int, size: int) -> None:
        if kind := self.counted_as.pop(key):
            self._add(kind, -size)

    def _move_to_gradients(self, parameter: torch.Tensor) -> None:
        storage = parameter.grad.untyped_storage()
        if self.counted_as.get(storage._cdata) == "activations":
            self._add("activations", -storage.nbytes())
            self.counted_as[storage._cdata] = "gradients"
            self._add("gradients", storage.nbytes())

    def _add(self, kind: str, size: int) -> None:
        setattr(self, kind, getattr(self, kind) + size)
        self.peak = max(self.peak, self.activations + self.gradients // self.processes)


class _DeviceEmulation(TorchFunctionMode):
    """Does what a GPU does and the meta device does not: attention in one kernel, and autocast to `half`.

    Autocast casts the inputs of matrix products, and keeps the cast of a trained weight until the end of the forward.
    Under FSDP the weights are gathered in half precision already: then `on_weight_cast` gets each cast of a weight.
    """

    def __init__(self, half: torch.dtype | None, on_weight_cast: Callable[[torch.Tensor], None] | None):
        super().__init__()
        self.half, self.on_weight_cast, self.keeps_casts = half, on_weight_cast, False
        self.casts: dict[torch.Tensor, torch.Tensor] = {}

    @contextmanager
    def keep_casts(self) -> Iterator[None]:
        """Keep the casts of trained weights while inside, as autocast does in a forward."""
        self.keeps_casts = True
        try:
            yield
        finally:
            self.keeps_casts = False
            self.casts.clear()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.half and func in _HALF:
            args, kwargs = tree_map_only(torch.Tensor, self._to_half, (args, kwargs))
        elif self.half and func in _FULL:
            args, kwargs = tree_map_only(torch.Tensor, _to_full, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _to_half(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype in (self.half, torch.float64) or not tensor.is_floating_point():
            return tensor
        if tensor in self.casts:
            return self.casts[tensor]
        cast = tensor.to(self.half)
        if self.on_weight_cast and isinstance(tensor, nn.Parameter):
            self.on_weight_cast(cast)
        elif self.keeps_casts and tensor.is_leaf and tensor.requires_grad:
            self.casts[tensor] = cast
        return cast


def _to_full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention that keeps query, key, value, output and one float per row, but no scores of tokens × tokens.

    A boolean mask becomes an additive one at every call, as PyTorch's kernels need it.
    """
    if query.device != META or query.dim() != 4 or query.shape[-1] != value.shape[-1]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=META)
    attend = _aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _cast_with_gradients_to_fp32(parameters: list[nn.Parameter]) -> None:
    """Cast weights and their gradients to float32, as FSDP shards them where 16-bit weights train."""
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.float()
        parameter.grad = None if gradient is None else gradient.float()


def _gathered_bytes(model: nn.Module, half: torch.dtype | None, processes: int) -> int:
    """Bytes of the weights that FSDP gathers: what is in no block, and two blocks, the second one being prefetched.

    Blocks are the modules that transformers does not split (`_no_split_modules`), which accelerate wraps. The two
    largest count.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    within = {parameter for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if parameter not in within]

    def size(parameters: Iterable[torch.Tensor]) -> int:
        return sum(padded_numel(parameter, processes) * (half or parameter.dtype).itemsize for parameter in parameters)

    return size(outside) + 2 * max((size(block.parameters()) for block in blocks), default=0)


def _optimizer_bytes(
    parameters: list[nn.Parameter],
    training: TrainingArguments,
    patch_optimizer: Callable[[Optimizer], Optimizer] | None,
) -> tuple[int, int]:
    """Bytes of the optimizer's state, and of what it needs beyond that during a step on `parameters` with gradients.

    The real optimizer makes its state, of tensors without values. Where it cannot (it is not installed, or its first
    step reads numbers), the size follows from its name; see `_optimizer_bytes_by_name`.
    """

    def step() -> tuple[int, int]:
        make, settings = Trainer.get_optimizer_cls_and_kwargs(training)
        one_by_one = {"fused": False, "foreach": False}
        known = inspect.signature(make).parameters
        settings |= {name: value for name, value in one_by_one.items() if name in known}
        optimizer = make(parameters, **settings)
        if patch_optimizer:
            optimizer = patch_optimizer(optimizer)
        meter = _Meter(nn.Module(), 1)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        meter.count_permanent([*parameters, *gradients], 0)  # they are counted elsewhere
        with meter:
            optimizer.step()
        states = tree_leaves([list(state.values()) for state in optimizer.state.values()])
        size = bytes_of(value for value in states if isinstance(value, torch.Tensor))
        return size, max(0, meter.peak - size)

    name = str(getattr(training.optim, "value", training.optim))
    return try_optional(step).value or (_optimizer_bytes_by_name(name, parameters, bool(patch_optimizer)), 0)


def _optimizer_bytes_by_name(name: str, parameters: list[nn.Parameter], master_weights: bool) -> int:
    """Bytes of two states per trained number, as Adam has them.

    A state has the dtype of its weight, one byte in an optimizer called 8bit, or half a byte in one called 4bit. Master
    weights are float32, and so are their states, unless these are smaller.
    """
    state_size = next((size for part, size in {"8bit": 1.0, "4bit": 0.5}.items() if part in name), None)
    size = sum(int(2 * parameter.numel() * (state_size or parameter.dtype.itemsize)) for parameter in parameters)
    if master_weights:
        low = [parameter for parameter in parameters if parameter.dtype.itemsize == 2]
        size += sum(parameter.numel() * (4 if state_size else 8) for parameter in low)
    return size
