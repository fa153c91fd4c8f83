"""Peak device memory of a training step, found by running one without weights and counting tensors."""

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
from tuning.distributed.fsdp import cast_trainable_to_fp32
from tuning.model.dry_run import CANNOT_SIMULATE, META, DryRun
from tuning.model.quantize import scales_of

CANNOT_BUILD = (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError)

_aten = torch.ops.aten
# What autocast computes in half precision, and in float32, as far as these models call it.
_HALF = {F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm, torch.addmm}
_HALF |= {torch.conv1d, torch.conv2d, torch.conv3d, F.scaled_dot_product_attention}
_FULL = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.cross_entropy}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors on one device; what the allocator wastes and the CUDA context itself are not in them.

    `weights`: parameters, buffers and scales, under FSDP also those of the blocks that are gathered. `gradients` and
    `optimizer`: all of them, as at the step. `activations`: what the peak has beyond these three: saved for the
    backward, temporary, and the batch itself; `None` where the model cannot be simulated, for the reason in `unknown`:
    `peak` lacks it then.
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
    hold_masters: Callable[[Optimizer], Optimizer] | None = None,
) -> MemoryEstimate:
    """The peak of the steps of a run on batches like `batch`, without loading a weight.

    `model` is a skeleton on the meta device in the weights' dtype, prepared as for training; it is used up: its
    precision, mode and gradients change. `batch` is what the collator made, without its facts, on the CPU. Leave out
    its `attention_mask` for FlashAttention-2, which never builds a mask of tokens × tokens. `processes` above 1: FSDP
    over so many devices. `hold_masters`: what makes the optimizer one that steps float32 copies of 16-bit weights, if
    it is to be one; FSDP shards those weights in float32 then.

    The step really runs, forward, backward and optimizer, on tensors without contents, and its live tensors are
    counted; a second one where gradients are accumulated. The peak is the largest sum of weights, optimizer state,
    gradients and activations at one moment.
    """
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    if processes > 1 and half:
        cast_trainable_to_fp32(model)
    gathered = _gathered_bytes(model, half) if processes > 1 else 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    meter = _Meter(model, processes)
    arithmetic = _DeviceArithmetic(half, meter.disown if processes > 1 else None)
    unknown = ""
    try:
        _simulate(model, batch, training, meter, arithmetic)
    except CANNOT_SIMULATE as error:
        unknown = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    if processes > 1 and hold_masters:
        _raise_with_gradients(trained)
    weights = bytes_of(tensors_of(model))
    gradients = bytes_of(parameter.grad for parameter in trained if parameter.grad is not None)
    optimizer, in_step = _optimizer_bytes(trained, training, hold_masters)
    held = weights // processes + gathered, gradients // processes, optimizer // processes
    if unknown:
        return MemoryEstimate(*held, activations=None, peak=sum(held), unknown=unknown)
    peak = max(held[0] + held[2] + meter.peak, sum(held) + in_step // processes)
    return MemoryEstimate(*held, activations=peak - sum(held), peak=peak)


def _simulate(
    model: nn.Module,
    batch: dict[str, Any],
    training: TrainingArguments,
    meter: "_Meter",
    arithmetic: "_DeviceArithmetic",
) -> None:
    """Run a step, as `SupervisedTrainer` does, under `meter`. A second batch finds the gradients of the first."""
    model.train()
    if getattr(training, CHECKPOINTING):
        _checkpoint(model, getattr(training, CHECKPOINTING_KWARGS) or {}, arithmetic)
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}  # the longest length is none
    tensors = {name: value.to(META) if value.is_floating_point() else value for name, value in tensors.items()}
    steps = training.gradient_accumulation_steps
    items = steps * int((batch["labels"][:, 1:] != IGNORED).sum())
    meter.hold(tensors.values(), steps)  # all batches of a step are on the device before it
    with warnings.catch_warnings(), arithmetic, meter:
        warnings.simplefilter("ignore")
        for _ in range(min(steps, 2)):
            with arithmetic.forward():
                loss = model(**{**batch, **tensors}, num_items_in_batch=items).loss
            loss.backward()
            del loss


def _checkpoint(model: nn.Module, settings: dict[str, Any], arithmetic: "_DeviceArithmetic") -> None:
    """Recompute activations in the backward, during which torch suspends `arithmetic`: recomputation resumes it."""
    beside = {name: value for name, value in settings.items() if name in ("every_n_layers", "offload")}
    own = {name: value for name, value in settings.items() if name not in beside}
    own |= {"use_reentrant": False, "context_fn": lambda: (nullcontext(), arithmetic)}
    getattr(model, f"{CHECKPOINTING}_enable")(**{CHECKPOINTING_KWARGS: own}, **beside)


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers(), *scales_of(model)]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`; shared ones count once."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


class _Meter(DryRun):
    """Counts the bytes of live tensors of a dry run."""

    def __init__(self, model: nn.Module, processes: int):
        super().__init__()
        self.processes = processes
        self.activations, self.gradients, self.peak = 0, 0, 0
        self.known: dict[int, str | None] = {}  # storage → what it counts as, if anything
        for tensor in tensors_of(model):
            self.known[tensor.untyped_storage()._cdata] = None
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._keep_gradient)

    def hold(self, tensors: Iterable[torch.Tensor], times: int) -> None:
        """Count `tensors` as there all the time, `times` over."""
        tensors = list(tensors)
        self._count("activations", times * bytes_of(tensors))
        self.known.update({tensor.untyped_storage()._cdata: None for tensor in tensors})

    def disown(self, tensor: torch.Tensor) -> None:
        """Count `tensor` no longer: it is counted elsewhere."""
        storage = tensor.untyped_storage()
        self._count("activations", -storage.nbytes())
        self.known[storage._cdata] = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage(), "activations")
        return result

    def _see(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = kind
        self._count(kind, storage.nbytes())
        weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False

    def _forget(self, key: int, size: int) -> None:
        if kind := self.known.pop(key):
            self._count(kind, -size)

    def _keep_gradient(self, parameter: torch.Tensor) -> None:
        storage = parameter.grad.untyped_storage()
        if self.known.get(storage._cdata) == "activations":
            self._count("activations", -storage.nbytes())
            self.known[storage._cdata] = "gradients"
            self._count("gradients", storage.nbytes())

    def _count(self, kind: str, size: int) -> None:
        setattr(self, kind, getattr(self, kind) + size)
        self.peak = max(self.peak, self.activations + self.gradients // self.processes)


class _DeviceArithmetic(TorchFunctionMode):
    """What a GPU does and the meta device does not: attention in one kernel, and autocast to `half`.

    Autocast casts the inputs of matrix products, and keeps the cast of a trained weight until the end of the forward.
    FSDP gathers weights in half precision already: `on_cast` is then told of every weight's cast.
    """

    def __init__(self, half: torch.dtype | None, on_cast: Callable[[torch.Tensor], None] | None):
        super().__init__()
        self.half, self.on_cast, self.in_forward = half, on_cast, False
        self.casts: dict[torch.Tensor, torch.Tensor] = {}

    @contextmanager
    def forward(self) -> Iterator[None]:
        self.in_forward = True
        yield
        self.in_forward = False
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
        if self.on_cast and isinstance(tensor, nn.Parameter):
            self.on_cast(cast)
        elif self.in_forward and tensor.is_leaf and tensor.requires_grad:
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
    """Attention that keeps query, key, value, output and one float per row, never a score of token × token.

    A mask of truth values is made into one to add at every call, as PyTorch's kernels want it.
    """
    if query.device != META or query.dim() != 4 or query.shape[-1] != value.shape[-1]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=META)
    attend = _aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _raise_with_gradients(parameters: list[nn.Parameter]) -> None:
    """Weights and their gradients in float32, as FSDP shards them where 16-bit weights are trained."""
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.float()
        parameter.grad = None if gradient is None else gradient.float()


def _gathered_bytes(model: nn.Module, half: torch.dtype | None) -> int:
    """Of weights that FSDP holds whole: the two largest blocks at a time, one of them ahead, and what is in no block.

    Blocks are the modules that transformers does not split (`_no_split_modules`), which accelerate wraps.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    within = {parameter for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if parameter not in within]

    def size(parameters: Iterable[torch.Tensor]) -> int:
        return sum(parameter.numel() * (half or parameter.dtype).itemsize for parameter in parameters)

    return size(outside) + 2 * max((size(block.parameters()) for block in blocks), default=0)


def _optimizer_bytes(
    parameters: list[nn.Parameter],
    training: TrainingArguments,
    hold_masters: Callable[[Optimizer], Optimizer] | None,
) -> tuple[int, int]:
    """Bytes of the optimizer's state after a step on `parameters`, whose gradients are there, and of what goes after.

    The real optimizer makes its state, of tensors without contents. Of one that cannot (it is not installed, or its
    first step looks at numbers) the rule is Adam's two states per trained number: in the weight's dtype, or of one
    byte for those named 8bit and half a byte for 4bit. Master weights are float32, and so are states beside them.
    """
    try:
        make, settings = Trainer.get_optimizer_cls_and_kwargs(training)
        one_by_one = {"fused": False, "foreach": False}
        known = inspect.signature(make).parameters
        settings |= {name: value for name, value in one_by_one.items() if name in known}
        optimizer = make(parameters, **settings)
        if hold_masters:
            optimizer = hold_masters(optimizer)
        meter = _Meter(nn.Module(), 1)
        meter.hold([*parameters, *(p.grad for p in parameters if p.grad is not None)], 0)  # counted elsewhere
        with meter:
            optimizer.step()
    except CANNOT_BUILD:
        name = str(getattr(training.optim, "value", training.optim))
        sizes = {"8bit": 1.0, "4bit": 0.5}
        each = next((size for part, size in sizes.items() if part in name), None)
        size = sum(int(2 * parameter.numel() * (each or parameter.dtype.itemsize)) for parameter in parameters)
        if hold_masters:
            low = [parameter for parameter in parameters if parameter.dtype.itemsize == 2]
            size += sum(parameter.numel() * (4 if each else 8) for parameter in low)
        return size, 0
    states = tree_leaves([list(state.values()) for state in optimizer.state.values()])
    size = bytes_of(value for value in states if isinstance(value, torch.Tensor))
    return size, max(0, meter.peak - size)
