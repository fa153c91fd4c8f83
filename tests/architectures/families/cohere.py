"""Cohere."""

import transformers as T
from architectures.families.gemma import SIGLIP
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square
from architectures.styles import cohere

COHERE_SPECIAL = (
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_PATCH|>",
    "<|IMG_LINE_BREAK|>",
    "TILE_GLOBAL",
    *(f"TILE_{i}" for i in range(1, 13)),
)


@arch("aya_vision")
def aya_vision(name):
    style = cohere("<image>")
    tok = tokenizer(style, ("<image>", *COHERE_SPECIAL, "TILE"))
    proc = T.AyaVisionProcessor(
        T.GotOcr2ImageProcessor(size=square(32), crop_to_patches=True, max_patches=4),
        tok,
        patch_size=8,
        img_size=32,
        downsample_factor=2,
        chat_template=style.jinja(),
    )
    text = small(T.Cohere2Config, tok, layer_types=["sliding_attention", "full_attention"], logit_scale=0.25)
    return (
        T.AyaVisionConfig(
            text_config=text.to_dict(),
            vision_config=small(T.SiglipVisionConfig, **SIGLIP, vision_use_head=False).to_dict(),
            image_token_index=ids(tok, "<|IMG_PATCH|>")[0],
            downsample_factor=2,
        ),
        proc,
        style,
    )


@arch("cohere2_vision")
def cohere2_vision(name):
    style = cohere("<|IMG_PATCH|>")
    tok = tokenizer(
        style,
        boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>",
        image_token="<|IMG_PATCH|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )
    proc = T.Cohere2VisionProcessor(
        T.Cohere2VisionImageProcessor(
            size=square(32), patch_size=2, max_patches=4
        ),  # its patch_size: the root of tokens a tile
        tok,
        chat_template=style.jinja(),
    )
    text = small(T.Cohere2Config, tok, layer_types=["sliding_attention", "full_attention"], logit_scale=0.25)
    return (
        T.Cohere2VisionConfig(
            text_config=text.to_dict(),
            vision_config=small(T.SiglipVisionConfig, **SIGLIP, vision_use_head=False).to_dict(),
            image_token_id=ids(tok, "<|IMG_PATCH|>")[0],
            downsample_factor=2,
            alignment_intermediate_size=64,
        ),
        proc,
        style,
    )
