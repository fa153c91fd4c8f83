"""Pixtral, Mistral and what uses their pictures."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square, sub
from architectures.styles import chatml, mistral
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@arch("llava+pixtral")
def pixtral(name):
    style = mistral("[IMG]")
    tok = tokenizer(style, ("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    proc = T.PixtralProcessor(
        T.PixtralImageProcessor(patch_size=square(8), size={"longest_edge": 64}),
        tok,
        patch_size=8,
        chat_template=style.jinja(),
    )
    return (
        T.LlavaConfig(
            text_config=small(T.MistralConfig, tok, sliding_window=None).to_dict(),
            vision_config=small(T.PixtralVisionConfig, image_size=64, patch_size=8).to_dict(),
            image_token_index=ids(tok, "[IMG]")[0],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        proc,
        style,
    )


@arch("mistral3")
def mistral3(name):
    style = mistral("[IMG]")
    tok = tokenizer(style, ("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    proc = T.PixtralProcessor(
        T.PixtralImageProcessor(patch_size=square(8), size={"longest_edge": 64}),
        tok,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=style.jinja(),
    )
    return (
        T.Mistral3Config(
            text_config=small(T.MistralConfig, tok, sliding_window=None).to_dict(),
            vision_config=small(T.PixtralVisionConfig, image_size=64, patch_size=8).to_dict(),
            image_token_index=ids(tok, "[IMG]")[0],
            spatial_merge_size=2,
        ),
        proc,
        style,
    )


@arch("mistral_large4")
def mistral_large4(name):
    style = mistral("[IMG]")
    tok = tokenizer(style, ("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    proc = T.PixtralProcessor(
        T.PixtralImageProcessor(patch_size=square(8), size={"longest_edge": 64}),
        tok,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=style.jinja(),
    )
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
            vision_config=small(T.PixtralVisionConfig, image_size=64, patch_size=8).to_dict(),
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
            vision_config=small(T.PixtralVisionConfig, image_size=64, patch_size=8).to_dict(),
            image_token_id=ids(tok, "<|image_pad|>")[0],
            spatial_merge_size=2,
        ),
        proc,
        style,
    )
