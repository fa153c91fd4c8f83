"""Pixtral, Mistral and what uses their pictures."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square, sub
from architectures.styles import chatml, mistral
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VISION = small(T.PixtralVisionConfig, image_size=64, patch_size=8).to_dict()


def with_pixtral(**merge):
    """A tokenizer, a processor and a style of chat with Pixtral's pictures."""
    style = mistral("[IMG]")
    tok = tokenizer(style, ("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    pictures = T.PixtralImageProcessor(patch_size=square(8), size={"longest_edge": 64})
    return tok, T.PixtralProcessor(pictures, tok, patch_size=8, chat_template=style.jinja(), **merge), style


@arch("llava+pixtral")
def pixtral(name):
    tok, proc, style = with_pixtral()
    return (
        T.LlavaConfig(
            text_config=small(T.MistralConfig, tok, sliding_window=None).to_dict(),
            vision_config=VISION,
            image_token_index=ids(tok, "[IMG]")[0],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        proc,
        style,
    )


@arch("mistral3")
def mistral3(name):
    tok, proc, style = with_pixtral(spatial_merge_size=2)
    return (
        T.Mistral3Config(
            text_config=small(T.MistralConfig, tok, sliding_window=None).to_dict(),
            vision_config=VISION,
            image_token_index=ids(tok, "[IMG]")[0],
            spatial_merge_size=2,
        ),
        proc,
        style,
    )


@arch("mistral_large4")
def mistral_large4(name):
    tok, proc, style = with_pixtral(spatial_merge_size=2)
    kind = CONFIG_MAPPING[name]
    text = small(
        sub(kind, "text_config"),
        tok,
        layer_types=["indexed_attention"] * 2,
        mlp_layer_types=["dense", "sparse"],
        indexer_types=["full"] * 2,
        no_rope_layers=[1, 0],
        kv_source_layers=[0, 1],
        num_key_value_heads=4,
        head_dim=8,
    )
    return (
        kind(
            text_config=text.to_dict(),
            vision_config=VISION,
            image_token_index=ids(tok, "[IMG]")[0],
            spatial_merge_size=2,
        ),
        proc,
        style,
    )


@arch("lighton_ocr")
def lighton_ocr(name):
    named = dict(image_token="<|image_pad|>", image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>")
    style = chatml("<|image_pad|>")
    tok = tokenizer(style, **named)
    proc = T.LightOnOcrProcessor(
        T.PixtralImageProcessor(patch_size=square(8), size={"longest_edge": 64}),
        tok,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=style.jinja(),
    )
    return (
        T.LightOnOcrConfig(
            text_config=small(T.Qwen3Config, tok).to_dict(),
            vision_config=VISION,
            image_token_id=ids(tok, "<|image_pad|>")[0],
            spatial_merge_size=2,
        ),
        proc,
        style,
    )
