"""QLoRA: the linear weights of a frozen language model in 4 or 8 bits, through bitsandbytes.

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

from tuning.errors import UserError
from tuning.model.parts import LANGUAGE_MODEL, Parts

SIZE_TRIED = 64  # one block of 4-bit weights
CANNOT_QUANTISE = (ImportError, OSError, AttributeError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Quantization:
    """How a model is loaded with quantised weights.

    `kind`: 4bit or 8bit. `layers`: full names of the linear layers that are quantised, `kept`: of those that are not.
    `compute`: dtype in which 4-bit weights are multiplied, and in whose elements they are packed: FSDP shards and
    gathers floats only, and must not convert them. `device`: where the weights go.
    """

    kind: str
    layers: list[str]
    kept: list[str]
    compute: torch.dtype
    device: torch.device

    def settings(self) -> BitsAndBytesConfig:
        """What transformers is given. It takes regular expressions for names, and would also match their ends."""
        return BitsAndBytesConfig(
            load_in_4bit=self.kind == "4bit",
            load_in_8bit=self.kind == "8bit",
            llm_int8_skip_modules=[f"^{re.escape(name)}$" for name in self.kept],
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.compute,
            bnb_4bit_quant_storage=self.compute,
        )


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

    Neither its head nor what is inside `modules_to_save` is, which trains. Raises `UserError` where that leaves
    nothing, or where bitsandbytes is missing or does not run on `device`.
    """
    if getattr(model.config, "quantization_config", None):
        raise UserError(
            where=f"quantization {kind}",
            problem="the checkpoint is quantised already.",
            fix="Give the original weights.",
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
            problem="there is no linear layer in the language model that stays as it is.",
            fix="Remove it, or name less in modules_to_save.",
        )
    try_quantised_layer(kind, compute, device)
    chosen = set(layers)
    return Quantization(kind, layers, [name for name in linear if name not in chosen], compute, device)


def _is_inside(name: str, saved: tuple[str, ...]) -> bool:
    """Whether a module or one that holds it ends with one of the names `saved`, which is PEFT's rule."""
    return any(holder.endswith(saved) for holder in accumulate(name.split("."), "{}.{}".format))


def try_quantised_layer(kind: str, compute: torch.dtype, device: torch.device) -> None:
    """Run a small quantised layer forward and backward. Raises `UserError` where this machine cannot."""
    where = f"quantization {kind}"
    if not is_bitsandbytes_available():
        raise UserError(
            where=where,
            problem="needs bitsandbytes, which is not there or too old.",
            fix="Run pip install -U bitsandbytes.",
        )
    try:
        with torch.random.fork_rng(devices=[]):  # the adapters of this run begin as those of any other
            layer = _make_layer(kind, compute).to(device)
        inputs = torch.ones(2, SIZE_TRIED, dtype=compute, device=device, requires_grad=True)
        layer(inputs).sum().backward()
        assert inputs.grad is not None
        problem = "" if torch.isfinite(inputs.grad).all() else "the gradient is no number"
    except CANNOT_QUANTISE as error:
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if problem:
        raise UserError(
            where=where,
            problem=(
                f"a quantised layer does not run on {device} with the installed bitsandbytes and PyTorch: {problem}."
            ),
            fix="Update bitsandbytes (pip install -U bitsandbytes), try the other of 4bit and 8bit, or remove it.",
        )


def _make_layer(kind: str, compute: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    size = (SIZE_TRIED, SIZE_TRIED, False)
    if kind == "8bit":
        return Linear8bitLt(*size, has_fp16_weights=False)
    return Linear4bit(*size, compute, compress_statistics=True, quant_type="nf4", quant_storage=compute)


def keep_bnb_weights_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights, and from a warning for every layer's every call.

    A 4-bit layer that is evaluated on a CPU with AVX512-BF16 packs its weights for inference, for good: training after
    an evaluation would go on without a gradient through it.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # that 8 bits compute in float16
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def scales_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """What quantised layers hold beside their weights, neither parameters nor buffers: scales and code books."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        for holder in (weight, state, getattr(state, "state2", None), getattr(module, "state", None)):
            yield from (value for value in getattr(holder, "__dict__", {}).values() if isinstance(value, torch.Tensor))


def quantise_skeleton(model: PreTrainedModel, plan: Quantization) -> None:
    """Give a skeleton on the meta device the layers and sizes of the loaded model, so that a dry run counts them.

    Call `try_quantised_layer` before: bitsandbytes keeps the code books of its first call, which must not be empty.
    """
    from transformers.integrations import replace_with_bnb_linear

    settings = plan.settings()
    replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings)
    setattr(model, f"is_loaded_in_{plan.kind}", True)  # PEFT goes by it
    for name in plan.layers:
        layer = model.get_submodule(name)
        layer.weight.data = layer.weight.data.to(plan.compute)
        layer.weight._quantize(torch.device("meta"))
        if plan.kind == "8bit":
            layer.state.threshold = 0.0  # how many columns are outliers cannot be told without numbers
