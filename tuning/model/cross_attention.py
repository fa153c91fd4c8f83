"""Cross-attention models: rows without an image must not see the images of other rows' places."""

from torch import nn

MASK = "full_text_row_masked_out_mask"


def keep_text_rows_apart(model: nn.Module) -> None:
    """Let cross-attention add nothing to rows without an image, as when such a row is alone.

    In a batch with images, transformers' Mllama gives a row without one a filler, unmasks it (a row of the mask that is
    all closed becomes all open), and adds what the attention finds there; alone, the row skips these layers. Layers
    are known by their `cross_attn`; their mask `[B, 1, T, 1]` is 0 where a token may see no image.
    """
    for layer in model.modules():
        if isinstance(getattr(layer, "cross_attn", None), nn.Module):
            layer.register_forward_pre_hook(_remember_mask, with_kwargs=True)
            layer.cross_attn.register_forward_hook(_silence_text_rows)


def _remember_mask(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    layer.cross_attn.text_row_mask = kwargs.get(MASK)


def _silence_text_rows(attention: nn.Module, args: tuple, output: tuple) -> tuple:
    mask = attention.text_row_mask
    if mask is None:
        return output
    has_image = (mask[:, 0] != 0).any(dim=1, keepdim=True)  # [B, 1, 1]
    return (output[0] * has_image, *output[1:])
