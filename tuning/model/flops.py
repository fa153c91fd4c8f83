"""Count the floating-point operations of a training step from a model's shapes, and its share of a device's peak (MFU).

A multiplication and the addition after it count as two. This counts what the definition of the model needs, not what a
run computes: no padding, no recomputation by checkpointing, no logits without a loss, and no vision layer after the
last one that is used.

    forward   = 2 · Σ in·out of the decoder's linear layers · tokens
              + Σ over rows and layers of 2 · T² · heads · head size     causal: half of the two products of T × T;
                                                                         (2 · T · W − W²) for T² in a window of W tokens
              + 2 · Σ in·out of the tower's layers in use · N            N positions of a picture or tile: its patches,
                                                                         and its class token
              + Σ over the tower's layers of 4 · N² · width              attended in full, or N · W in windows
              + 2 · Σ in·out of the projector · patches / patches merged into an image token
              + 2 · hidden · vocabulary · supervised tokens
    backward  = 1 · forward of each layer for the gradient of its input, where something in its part or before it
                trains, and 1 · forward for the gradient of its weight, where that trains. So LoRA's layers count as
                linear layers of their own, and a frozen tower counts once.

Experts count as those that a token is sent to. Norms, activations, rotary embeddings, convolutions and states along the
row, attention to chosen tokens only, cross-attention, resamplers' attention and the optimizer do not count, most of
them as is usual for MFU (https://arxiv.org/abs/2204.02311, appendix B).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import numpy as np
from torch import nn

from tuning.model.parts import LANGUAGE_MODEL, PROJECTOR, VISION_TOWER, Parts

# Dense bf16 operations per second from NVIDIA's data sheets (fp16 where a device has no bf16), by words of its name, of
# which the first that fit count.
PEAKS = {
    **{"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12},
    **{"B200": 2250e12, "H20": 148e12, "A100": 312e12, "A30": 165e12, "A10": 125e12},
    **{"L40S": 362e12, "L4": 121e12, "V100": 125e12, "T4": 65e12},
}
# The layers that make the queries of a tower, and how many times the queries' width their output has.
QUERIES = {"q_proj": 1, "query": 1, "q": 1, "wq": 1, "query_proj": 1, "qkv": 3, "qkv_proj": 3, "Wqkv": 3, "c_attn": 3}
# The kinds of a decoder's layers that attend, and what the config calls their window.
WINDOWS = {"full_attention": "", "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# What configs call the layers of a tower that attend in full, where the others have windows.
FULL_LAYERS = ("fullatt_block_indexes", "global_attn_indexes")
ACTIVE_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
CLASS_TOKENS = ("class_embedding", "cls_token")
NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Flops:
    """The operations of training, forward and backward, by what they grow with.

    `decoder`: per token. `attention`: per squared token of a row, by the window of a layer, which may be infinite.
    `head`: per supervised token. `tower`: per position of a picture or tile, which has its patches and `class_tokens`.
    `tower_attention`: per squared position, by window. `projector`: per patch. `patch_values`: numbers in a patch, so
    `pixel_values` have as many patches as numbers ÷ these; None for a model that cuts no patches.
    """

    decoder: float
    attention: Mapping[float, float]
    head: float
    tower: float
    tower_attention: Mapping[float, float]
    projector: float
    patch_values: int | None
    class_tokens: int = 0

    def count(self, tokens: Sequence[int], tiles: Sequence[float], supervised_tokens: float) -> dict[str, float]:
        """The operations of a step by part, and their `total`.

        `tokens`: of each row, image tokens included. `tiles`: the patches of each picture, or of each of its tiles.
        """
        parts = {
            "decoder": self.decoder * float(sum(tokens)),
            "attention": float(self.count_attention(np.asarray(tokens)).sum()),
            "tower": float(self.count_tower(np.asarray(tiles)).sum()),
            "projector": self.projector * float(sum(tiles)),
            "head": self.head * supervised_tokens,
        }
        return {**parts, "total": sum(parts.values())}

    def find_tiles(self, shape: Sequence[int], pictures: int = 1) -> list[float]:
        """The patches of each tile in `pixel_values` of this shape, […, channels, height, width].

        Where patches lie in a row instead, those of each of `pictures`, on average.
        """
        if not self.patch_values:
            return []
        patches, of_tile = prod(shape) / self.patch_values, prod(shape[-3:]) / self.patch_values
        if len(shape) >= 4 and of_tile > 1:
            return [of_tile] * round(patches / of_tile)
        return [patches / pictures] * pictures

    def count_attention(self, tokens: np.ndarray) -> np.ndarray:
        """The operations of the decoder's attention for each row."""
        rows = np.asarray(tokens, dtype=float)
        spans = ((operations, np.minimum(rows, window)) for window, operations in self.attention.items())
        return sum((operations * (2 * rows * span - span**2) for operations, span in spans), np.zeros(rows.shape))

    def count_tower(self, tiles: np.ndarray) -> np.ndarray:
        """The operations of the tower for each picture or tile, of so many patches."""
        positions = np.asarray(tiles, dtype=float) + self.class_tokens
        spans = (operations * np.minimum(positions, window) for window, operations in self.tower_attention.items())
        return positions * sum(spans, np.full(positions.shape, self.tower))


def count_flops(model: Any, parts: Parts) -> Flops:
    """Count from the shapes of a model, or a skeleton, with its adapters and with what is frozen.

    Sharded and quantised linear layers have the shapes that they had before. Experts do not.
    """
    modules = [
        (parts.of(name), name, module) for name, module in model.named_modules() if "original_module" not in name
    ]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text, times = base.config.get_text_config(), _count_passes(model, parts)
    head = next((name for _, name, module in modules if module is base.get_output_embeddings()), None)
    linear = dict.fromkeys((LANGUAGE_MODEL, PROJECTOR, "head"), 0.0)
    for part, name, module in modules:
        if part == LANGUAGE_MODEL and not isinstance(module, nn.Linear):
            linear[part] += _count_experts(module, text, times[part])
        elif part != VISION_TOWER and isinstance(module, nn.Linear):
            is_head = head is not None and f"{name}.".startswith(f"{head}.")
            linear["head" if is_head else part] += _count_map(module, times[part])

    in_use = layers_in_use(base.config)
    audio = base.get_encoder(modality="audio")  # the model itself where it has none
    heard = {id(module) for module in audio.modules()} if audio is not None and audio is not base else set()
    tower = {name: module for part, name, module in modules if part == VISION_TOWER and id(module) not in heard}
    layers = {name: module for name, module in tower.items() if _is_in_layer(name, module, in_use)}
    queries, windows = _find_queries(layers), _TowerWindows.of(base, parts)
    attention = Counter[float]()
    for name, width in queries.items():
        attention[windows.window_of(name)] += 4 * width * (2 * times[VISION_TOWER] - 1)
    embedding, values = _find_patch_embedding(tower)
    used = [*layers.values(), *([embedding] if embedding else [])]
    projector = next((m for part, _, m in modules if part == PROJECTOR and isinstance(m, nn.Linear)), None)
    merged = _count_merged(projector, max(queries.values(), default=0), base.config)
    return Flops(
        decoder=linear[LANGUAGE_MODEL],
        attention=_count_decoder_attention(text, 2 * times[LANGUAGE_MODEL] - 1),
        head=linear["head"],
        tower=sum(_count_map(module, times[VISION_TOWER]) for module in used),
        tower_attention=attention,
        projector=linear[PROJECTOR] / merged,
        patch_values=values,
        class_tokens=_count_class_tokens(tower),
    )


def _count_passes(model: nn.Module, parts: Parts) -> dict[str, int]:
    """By part, 2 where its layers' inputs get a gradient, as something in it or before it trains; else 1."""
    trained = {parts.of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    order, passes = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL), {}
    for number, part in enumerate(order, start=1):
        passes[part] = 1 + (not trained.isdisjoint(order[:number]))
    return passes


def _count_map(module: Any, passes: int) -> float:
    """The operations of a linear layer, or of a convolution that cuts patches, for one position."""
    if isinstance(module, nn.Linear):
        size = int(module.in_features * module.out_features)  # Inkling's are tensors
    else:
        size = prod(module.kernel_size) * module.in_channels * module.out_channels
    return 2.0 * size * (passes + module.weight.requires_grad)


def _count_experts(module: nn.Module, text: Any, passes: int) -> float:
    """The operations of experts that are stacked in tensors [experts, out, in], for one token."""
    active = next((count for name in ACTIVE_EXPERTS if isinstance(count := getattr(text, name, None), int)), None)
    stacked = [weight for weight in module.parameters(recurse=False) if weight.dim() == 3]
    if active is None:
        return 0.0
    return sum(2.0 * weight.numel() * active / weight.shape[0] * (passes + weight.requires_grad) for weight in stacked)


def _count_decoder_attention(text: Any, times: int) -> dict[float, float]:
    heads = getattr(text, "num_attention_heads", 0)
    size = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // max(heads, 1)
    sizes = getattr(text, "qk_head_dim", None) or size, getattr(text, "v_head_dim", None) or size
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        slides = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * getattr(text, "num_hidden_layers", 0)
    found = Counter[float]()
    for kind in kinds:
        if kind in WINDOWS:
            found[getattr(text, WINDOWS[kind], None) or inf] += sum(sizes) * heads * times
    return dict(found)


def layers_in_use(config: Any) -> float:
    """Layers of the vision tower up to the last one that `vision_feature_layer` reads; infinite where nothing says."""
    read = getattr(config, "vision_feature_layer", None)
    if read is None:
        return inf
    layers = getattr(getattr(config, "vision_config", None), "num_hidden_layers", inf)
    return max(layers + 1 + number if number < 0 else number for number in (read if isinstance(read, list) else [read]))


def _is_in_layer(name: str, module: nn.Module, in_use: float) -> bool:
    """Whether this is a linear layer of one of the tower's layers in use. SigLIP's pooling head is in none."""
    number = NUMBER.search(name)
    return isinstance(module, nn.Linear) and number is not None and int(number[1]) < in_use


def _find_queries(layers: Mapping[str, Any]) -> dict[str, int]:
    """The width of the queries that each layer of `QUERIES` makes."""
    children = {name: re.sub(r"(\.base_layer|\.linear)*$", "", name).rpartition(".")[2] for name in layers}
    return {name: layers[name].out_features // QUERIES[child] for name, child in children.items() if child in QUERIES}


@dataclass(frozen=True)
class _TowerWindows:
    """The windows of a tower's attention in positions, and the numbers of the layers that have none."""

    positions: float = inf
    full: frozenset[int] = frozenset()

    @classmethod
    def of(cls, base: Any, parts: Parts) -> "_TowerWindows":
        config: Any = getattr(base.get_submodule(parts.vision_tower[0]), "config", None) if parts.vision_tower else None
        full = next((found for name in FULL_LAYERS if (found := getattr(config, name, None)) is not None), None)
        side = getattr(config, "window_size", None)
        if full is None or not side:
            return cls()
        in_pixels = hasattr(config, "spatial_merge_size")  # Qwen's; SAM counts patches
        return cls((side // config.patch_size if in_pixels else side) ** 2, frozenset(full))

    def window_of(self, name: str) -> float:
        number = NUMBER.search(name)
        return inf if number is None or int(number[1]) in self.full else self.positions


def _find_patch_embedding(tower: Mapping[str, nn.Module]) -> tuple[nn.Module | None, int | None]:
    """The map that makes a position of a patch, and how many numbers a patch has.

    A tower of convolutions that overlap (FastVLM, Gemma 3n) makes a position of what all their strides span.
    """
    convolutions = [module for module in tower.values() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    for name, module in tower.items():
        if isinstance(module, nn.Linear) and "patch" in name:
            return module, module.in_features
        if module in convolutions[:1] and module.kernel_size == module.stride:
            return module, prod(module.kernel_size) * module.in_channels
        if module in convolutions[:1]:
            return None, prod(prod(other.stride) for other in convolutions) * module.in_channels
    return None, None


def _count_merged(projector: nn.Linear | None, width: int, config: Any) -> int:
    """How many patches a projector takes at once, which the width of its inputs shows."""
    read = getattr(config, "vision_feature_layer", None)
    features = width * (len(read) if isinstance(read, list) else 1)
    return max(1, round(projector.in_features / features)) if projector is not None and features else 1


def _count_class_tokens(tower: Mapping[str, nn.Module]) -> int:
    names = (name for module in tower.values() for name, _ in module.named_parameters(recurse=False))
    return int(any(name in CLASS_TOKENS for name in names))


def peak_of(device_name: str) -> float | None:
    """Peak operations per second of a device by its name; None where it is not in the table."""
    words = {*re.split(r"[ -]", device_name)}
    return next((peak for name, peak in PEAKS.items() if words.issuperset(name.split())), None)


def utilisation(operations: float, seconds: float, peak: float | None) -> float | None:
    """MFU: the operations of a step ÷ (its seconds · the peak operations per second)."""
    return operations / (seconds * peak) if peak else None
