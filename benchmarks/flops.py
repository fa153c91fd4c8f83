"""The floating-point operations of a training step of a benchmark's model. `tuning/model/flops.py` counts them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuning.model.flops import count_flops
from tuning.model.parts import find_parts


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

    `config` is that of a model whose tiles have one size. With `rank` above 0, LoRA of that rank adapts the language
    model's layers whose names end in `adapted`; otherwise everything trains.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
        parts = find_parts(model)
        if rank:
            names = rf".*language_model.*\.({'|'.join(adapted)})"
            model = get_peft_model(model, LoraConfig(r=rank, target_modules=names))
    vision, tiles = config.vision_config, sum(row.tiles for row in rows)
    patches = (vision.image_size // vision.patch_size) ** 2
    return count_flops(model, parts).count([row.tokens for row in rows], [patches] * tiles, supervised_tokens)
