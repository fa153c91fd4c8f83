"""Count the floating-point operations of a training step from its shapes, and its share of a card's peak (MFU).

A multiplication and the addition after it count as two. This counts what the definition of the model needs, not what a
run computes: no padding, no recomputation by checkpointing, no logits without a loss, and no vision layer after the
last one that is used.

    forward   = 2 · Σ in·out of the decoder's linear layers · tokens
              + Σ over rows of 2 · T² · heads · head size · layers          causal: half of the two products of T × T
              + tiles · (2 · Σ in·out of the tower's layers in use · N + 4 · N² · width · layers
                         + 2 · patch values · width · patches)              N positions a tile, attended in full
              + 2 · Σ in·out of the projector · its positions
              + 2 · hidden · vocabulary · supervised tokens
    backward  = 2 · forward in full tuning: the gradients of the inputs and of the weights;
                with LoRA of the language model: 1 · its linear layers (inputs only), 1 · the head, 2 · attention,
                0 for the frozen tower and projector, which no gradient reaches
    adapters  = 3 · 2 · rank · (in + out) · tokens, over the adapted layers

Norms, activations, rotary embeddings and the optimizer do not count, as is usual for MFU
(https://arxiv.org/abs/2204.02311, appendix B). With LoRA, the first decoder layer needs slightly less than counted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

# Dense bf16 operations per second, from NVIDIA's data sheets (H100 and H200: SXM), by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
PARTS = {"language_model": "decoder", "vision_tower": "tower", "multi_modal_projector": "projector"}


@dataclass(frozen=True)
class RowShape:
    """The tokens of a row, image tokens included, and its image tiles."""

    tokens: int
    tiles: int


def count_step(
    config: Any,
    rows: Sequence[RowShape],
    supervised_tokens: int,
    *,
    rank: int = 0,
    adapted: Sequence[str] = (),
) -> dict[str, float]:
    """The operations of one optimizer step by part, and their `total`.

    `config` is that of a LLaVA or LLaVA-NeXT model. With `rank` above 0, LoRA of that rank adapts the language model's
    layers whose names end in `adapted`; otherwise everything trains.
    """
    layers = linear_shapes(config)
    text, vision = config.text_config, config.vision_config
    tokens, tiles = sum(row.tokens for row in rows), sum(row.tiles for row in rows)
    patches = (vision.image_size // vision.patch_size) ** 2
    positions = patches + (vision.model_type == "clip_vision_model")
    shown = patches if config.vision_feature_select_strategy == "default" else positions
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    values = vision.num_channels * vision.patch_size**2

    decoder = 2 * tokens * sum(map(prod, layers["decoder"].values()))
    attention = sum(2 * row.tokens**2 for row in rows) * text.num_attention_heads * head_size * text.num_hidden_layers
    tower = tiles * (
        2 * positions * sum(map(prod, layers["tower"].values()))
        + 4 * positions**2 * vision.hidden_size * layers_in_use(config)
        + 2 * patches * values * vision.hidden_size
    )
    projector = tiles * 2 * shown * sum(map(prod, layers["projector"].values()))
    head = 2 * text.hidden_size * text.vocab_size * supervised_tokens
    if rank:
        adapted_shapes = [shape for name, shape in layers["decoder"].items() if name.rpartition(".")[2] in adapted]
        parts = {
            "decoder": 2 * decoder + 3 * sum(2 * rank * sum(shape) for shape in adapted_shapes) * tokens,
            "attention": 3 * attention,
            "tower": tower,
            "projector": projector,
            "head": 2 * head,
        }
    else:
        forward = {"decoder": decoder, "attention": attention, "tower": tower, "projector": projector, "head": head}
        parts = {name: 3 * operations for name, operations in forward.items()}
    return {**parts, "total": sum(parts.values())}


def linear_shapes(config: Any) -> dict[str, dict[str, tuple[int, int]]]:
    """By part and name, (inputs, outputs) of every linear layer in use, read from a model on the meta device."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    shapes: dict[str, dict[str, tuple[int, int]]] = {part: {} for part in PARTS.values()}
    for name, module in model.named_modules():
        part = next((PARTS[word] for word in PARTS if f"{word}." in name), None)
        if part is None or not isinstance(module, torch.nn.Linear):
            continue
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if part == "tower" and (layer is None or int(layer[1]) >= layers_in_use(config)):
            continue  # SigLIP's pooling head, and layers after the last one that is read
        shapes[part][name] = (module.in_features, module.out_features)
    return shapes


def layers_in_use(config: Any) -> int:
    """Layers of the vision tower up to the last one that `vision_feature_layer` reads."""
    read, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return max(layers + 1 + number if number < 0 else number for number in (read if isinstance(read, list) else [read]))


def peak_of(device_name: str) -> float | None:
    """Peak operations per second of a card by its name; None where the card is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def utilisation(operations: float, seconds: float, peak: float | None) -> float | None:
    """MFU: the operations of a step ÷ (its seconds · the peak operations per second)."""
    return operations / (seconds * peak) if peak else None
