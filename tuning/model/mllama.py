"""Mllama: the result of a row must not depend on the rows next to it, and pictures that only pad are not computed."""

import inspect
import types
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from tuning.model.vision_tower import find_tower

RATIOS = "aspect_ratio_ids"
MASK, OPEN_ROWS = "cross_attention_mask", "full_text_row_masked_out_mask"  # names of arguments in transformers


def patch_mllama_tower(model: PreTrainedModel) -> None:
    """Replace the `forward` of a tower that gets the aspect ratio of each picture: pictures that only pad have zeros.

    A row of a batch has as many pictures as the row with most, and transformers runs the tower on all of them. No token
    sees the features of a picture that only pads, see `patch_mllama_cross_attention`. A picture's own padded tiles must
    run: its other tiles attend to them. This can go once transformers leaves padding out (5.24 does not).
    """
    tower = find_tower(model)
    if tower is not None and RATIOS in inspect.signature(tower.forward).parameters:
        tower.forward = types.MethodType(_without_padding(tower.forward), tower)


def _without_padding(stock_forward: Callable) -> Callable:
    def forward(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask, **kwargs):
        tensors = pixel_values, aspect_ratio_ids, aspect_ratio_mask  # [B, images, …]; the ratio 0 stands for padding
        real = aspect_ratio_ids > 0
        number = int(real.sum())
        if number in (0, real.numel()):
            return stock_forward(*tensors, **kwargs)
        output = stock_forward(*(tensor[real][:, None] for tensor in tensors), **kwargs)
        features = output.last_hidden_state[:, 0]
        output.last_hidden_state = features.new_zeros(*real.shape, *features.shape[1:]).index_put((real,), features)
        return output

    return forward


def patch_mllama_cross_attention(model: nn.Module) -> None:
    """Add hooks to the cross-attention layers, so that each row sees the slots of its own images only.

    Rows of a batch have as many image slots as the row with the most images. For a token that may see no image (before
    the first one, or in a row without any) transformers' Mllama opens all of these slots, padding included, so the loss
    of the row depends on the other rows (seen in transformers 5.23; this can go once a row's loss in a batch is its
    loss alone, which `tests/parity/test_supervised_loss.py` compares). Here such a token sees the slots of its own
    row's images, as when the row is alone. A row without images gets zeros from these layers: alone, it skips them.
    Does nothing to models without such layers, which are found by the mask of open rows that they take. The attention
    of others, also called `cross_attn`, is within a projector (Aria) or has no such rows (Idefics).
    """
    layers = [layer for layer in model.modules() if OPEN_ROWS in inspect.signature(layer.forward).parameters]
    layers = [layer for layer in layers if isinstance(getattr(layer, "cross_attn", None), nn.Module)]
    if not layers:
        return

    def find_own_slots(body: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get(MASK)  # [B, T, images, tiles], 1 where a token sees a tile
        own_slots = None
        if mask is not None:
            has_image = (mask > 0).any(dim=1).any(dim=2, keepdim=True)
            own_slots = has_image.expand(-1, -1, mask.shape[3]).flatten(1)  # [B, images · tiles]
        for layer in layers:
            layer.own_slots = own_slots

    model.base_model.register_forward_pre_hook(find_own_slots, with_kwargs=True)
    for layer in layers:
        layer.register_forward_pre_hook(_close_other_slots, with_kwargs=True)
        layer.cross_attn.register_forward_hook(_zero_rows_without_images)


def _close_other_slots(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    own, mask = layer.own_slots, kwargs.get(MASK)  # mask [B, 1, T, images · tiles · patches], added to the scores
    layer.cross_attn.has_image = None if own is None else own.any(dim=1)
    if own is None or mask is None:
        return args, kwargs
    own = own.repeat_interleave(mask.shape[-1] // own.shape[1], dim=1)[:, None, None]
    closed = mask.masked_fill((kwargs[OPEN_ROWS] == 0) & ~own, torch.finfo(mask.dtype).min)
    return args, {**kwargs, MASK: closed}


def _zero_rows_without_images(attention: nn.Module, args: tuple, output: tuple) -> tuple:
    if attention.has_image is None:
        return output
    return (output[0] * attention.has_image[:, None, None], *output[1:])
