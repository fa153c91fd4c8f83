"""QLoRA: keep the linear weights of a frozen language model in 4 or 8 bits with bitsandbytes.

https://arxiv.org/abs/2305.14314 (4 bits: NF4, double quantisation), https://arxiv.org/abs/2208.07339 (8 bits).
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from tuning.errors import UserError, describe_failure, try_optional
from tuning.model.parts import LANGUAGE_MODEL, Parts

SIZE_TRIED = 64  # one block of 4-bit weights


@dataclass(frozen=True)
class Quantization:
    """How a model is loaded with quantised weights.

    `kind`: 4bit or 8bit. `layers`: full names of the linear layers to quantise. `kept`: of the other linear layers.
    `compute`: the dtype in which 4-bit weights are multiplied. They are also packed into elements of it, because FSDP
    shards and gathers floats only and must not convert them. `device`: where the weights go.
    """

    kind: str
    layers: list[str]
    kept: list[str]
    compute: torch.dtype
    device: torch.device

    def settings(self) -> BitsAndBytesConfig:
        """The settings for transformers, which takes regular expressions and would also match the end of a name."""
        return BitsAndBytesConfig(
            load_in_4bit=self.kind == "4bit",
            load_in_8bit=self.kind == "8bit",
            llm_int8_skip_modules=[f"^{re.escape(name)}$" for name in self.kept],
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.compute,
            bnb_4bit_quant_storage=self.compute,
        )

    def loading_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`: quantised weights are loaded onto their device."""
        return {"quantization_config": self.settings(), "device_map": {"": self.device}}


def plan_quantization(
    model: PreTrainedModel,
    parts: Parts,
    kind: str,
    *,
    modules_to_save: list[str] | None,
    compute: torch.dtype,
    device: torch.device,
) -> Quantization:
    """Choose the layers of the skeleton `model` to quantise: the language model's linear layers.

    Its head and the modules in `modules_to_save`, which are trained, are left out. Raises `UserError` if no layer is
    left, or if bitsandbytes is missing or does not run on `device`.
    """
    if getattr(model.config, "quantization_config", None):
        raise UserError(
            where=f"quantization {kind}",
            problem="the checkpoint is quantised already.",
            fix="Give the unquantised model.",
        )
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    head, saved = model.get_output_embeddings(), tuple(modules_to_save or ())
    layers = [
        name
        for name, module in linear.items()
        if parts.of(name) == LANGUAGE_MODEL and module is not head and not _is_inside(name, saved)
    ]
    if not layers:
        raise UserError(
            where=f"quantization {kind}",
            problem="modules_to_save covers every linear layer of the language model: none is left to quantise.",
            fix="Remove quantization, or name fewer modules in modules_to_save.",
        )
    try_quantised_layer(kind, compute, device)
    chosen = set(layers)
    return Quantization(kind, layers, [name for name in linear if name not in chosen], compute, device)


def _is_inside(name: str, saved: tuple[str, ...]) -> bool:
    """Whether the name of a module, or of one that contains it, ends with one of `saved`. This is PEFT's rule."""
    return any(holder.endswith(saved) for holder in accumulate(name.split("."), "{}.{}".format))


def try_quantised_layer(kind: str, compute: torch.dtype, device: torch.device) -> None:
    """Run a small quantised layer forward and backward. Raises `UserError` if this machine cannot."""
    where = f"quantization {kind}"
    if not is_bitsandbytes_available():
        raise UserError(
            where=where,
            problem="bitsandbytes is missing or too old.",
            fix="Install it: pip install -U bitsandbytes.",
        )
    attempt = try_optional(lambda: _run_quantised_layer(kind, compute, device))
    if attempt.error or not attempt.value:
        reason = describe_failure(attempt.error) if attempt.error else "the gradient is NaN or infinite"
        other = "4bit" if kind == "8bit" else "8bit"
        raise UserError(
            where=where,
            problem=f"with the installed bitsandbytes and PyTorch a layer does not run on {device}: {reason}.",
            fix=f"Update bitsandbytes (pip install -U bitsandbytes), try {other}, or remove quantization.",
        ) from attempt.error


def _run_quantised_layer(kind: str, compute: torch.dtype, device: torch.device) -> bool:
    """Whether the gradient through a quantised layer is finite."""
    with torch.random.fork_rng(devices=[]):  # so that adapters start from the same numbers with and without this trial
        layer = _make_layer(kind, compute).to(device)
    inputs = torch.ones(2, SIZE_TRIED, dtype=compute, device=device, requires_grad=True)
    layer(inputs).sum().backward()
    assert inputs.grad is not None
    return bool(torch.isfinite(inputs.grad).all())


def _make_layer(kind: str, compute: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    size = (SIZE_TRIED, SIZE_TRIED, False)
    if kind == "8bit":
        return Linear8bitLt(*size, has_fp16_weights=False)
    return Linear4bit(*size, compute, compress_statistics=True, quant_type="nf4", quant_storage=compute)


def keep_bnb_weights_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights for inference, and from a warning at every call of every layer.

    On a CPU with AVX512-BF16, evaluating a 4-bit layer repacks its weights, and they stay repacked: training after an
    evaluation would continue without a gradient through the layer.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # 8 bits: it computes in float16
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def scales_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """The scales and code books of quantised layers, which are neither parameters nor buffers."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        for holder in (weight, state, getattr(state, "state2", None), getattr(module, "state", None)):
            yield from (value for value in getattr(holder, "__dict__", {}).values() if isinstance(value, torch.Tensor))


def quantise_skeleton(model: PreTrainedModel, plan: Quantization) -> None:
    """Give a skeleton on the meta device the layers and sizes of the quantised model, so that a dry run counts them.

    Call `try_quantised_layer` first: bitsandbytes keeps the code books of its first call, which must not be empty.
    """
    from transformers.integrations import replace_with_bnb_linear

    settings = plan.settings()
    replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings)
    setattr(model, f"is_loaded_in_{plan.kind}", True)  # PEFT reads it
    for name in plan.layers:
        layer = model.get_submodule(name)
        layer.weight.data = layer.weight.data.to(plan.compute)
        layer.weight._quantize(torch.device("meta"))
        if plan.kind == "8bit":
            layer.state.threshold = 0.0  # without numbers, outlier columns cannot be counted
