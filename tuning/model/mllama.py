"""Cross-attention models: a row of a batch must see its own images only, as when it is alone."""

import torch
from torch import nn

MASK, OPEN_ROWS = "cross_attention_mask", "full_text_row_masked_out_mask"


def patch_mllama_cross_attention(model: nn.Module) -> None:
    """Keep cross-attention of one row from what fills its place where other rows have more images.

    transformers' Mllama opens the mask of a token that may see no image (before the first, or in a row without any)
    to all image slots of the batch, padding included, so that a row's loss depends on the rows beside it. Here such a
    token sees the slots of its own row's images, as when the row is alone; and to a row without images, which alone
    skips these layers, they add nothing. Layers are known by their `cross_attn`.
    """
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "cross_attn", None), nn.Module)]
    if not layers:
        return

    def remember_images(body: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get(MASK)  # [B, T, images, tiles], 1 where a token sees a tile
        has_image = (
            None if mask is None else (mask > 0).any(dim=1).any(dim=2, keepdim=True).expand(-1, -1, mask.shape[3])
        )
        for layer in layers:
            layer.own_slots = None if has_image is None else has_image.flatten(1)  # [B, images · tiles]

    model.base_model.register_forward_pre_hook(remember_images, with_kwargs=True)
    for layer in layers:
        layer.register_forward_pre_hook(_close_other_slots, with_kwargs=True)
        layer.cross_attn.register_forward_hook(_silence_rows_without_images)


def _close_other_slots(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    own, mask = layer.own_slots, kwargs.get(MASK)  # mask [B, 1, T, images · tiles · patches], added to the scores
    layer.cross_attn.has_image = None if own is None else own.any(dim=1)
    if own is None or mask is None:
        return args, kwargs
    own = own.repeat_interleave(mask.shape[-1] // own.shape[1], dim=1)[:, None, None]
    closed = mask.masked_fill((kwargs[OPEN_ROWS] == 0) & ~own, torch.finfo(mask.dtype).min)
    return args, {**kwargs, MASK: closed}


def _silence_rows_without_images(attention: nn.Module, args: tuple, output: tuple) -> tuple:
    if attention.has_image is None:
        return output
    return (output[0] * attention.has_image[:, None, None], *output[1:])
