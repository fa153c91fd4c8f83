"""Gemma and PaliGemma."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square, sub
from architectures.styles import Style, gemma, gemma4
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

GEMMA_SPECIAL = dict(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
SIGLIP = dict(image_size=32, patch_size=8)


@arch("gemma3")
def gemma3(name):
    style = gemma("<start_of_image>")
    tok = tokenizer(style, **GEMMA_SPECIAL)
    proc = T.Gemma3Processor(
        T.Gemma3ImageProcessor(size=square(32), do_pan_and_scan=False),
        tok,
        image_seq_length=4,
        chat_template=style.jinja(),
    )
    text = small(T.Gemma3TextConfig, tok, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"])
    image, boi, eoi = ids(tok, *GEMMA_SPECIAL.values())
    return (
        T.Gemma3Config(
            text_config=text.to_dict(),
            vision_config=small(T.SiglipVisionConfig, **SIGLIP, vision_use_head=False).to_dict(),
            mm_tokens_per_image=4,
            image_token_index=image,
            boi_token_index=boi,
            eoi_token_index=eoi,
        ),
        proc,
        style,
    )


@arch("gemma3n")
def gemma3n(name):
    named = GEMMA_SPECIAL | dict(
        audio_token="<audio_soft_token>", boa_token="<start_of_audio>", eoa_token="<end_of_audio>"
    )
    style = gemma("<image_soft_token>")
    tok = tokenizer(style, **named)
    size = 64
    proc = T.Gemma3nProcessor(
        T.Gemma3nAudioFeatureExtractor(),
        T.SiglipImageProcessor(size=square(size), image_mean=[0, 0, 0], image_std=[1, 1, 1]),
        tok,
        chat_template=style.jinja(),
        image_seq_length=256,
        audio_seq_length=4,
    )
    n = len(tok)
    text = small(
        T.Gemma3nTextConfig,
        tok,
        num_hidden_layers=2,
        intermediate_size=[64, 64],
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
        vocab_size_per_layer_input=n,
        altup_num_inputs=2,
    )
    vision = T.Gemma3nVisionConfig(
        architecture="mobilenetv5_300m_enc",
        hidden_size=2048,
        model_args=dict(channel_multiplier=0.125),
        vocab_size=8,
        vocab_offset=n,
    )
    audio = T.Gemma3nAudioConfig(
        vocab_size=8,
        vocab_offset=n + 8,
        hidden_size=32,
        conf_num_attention_heads=4,
        conf_num_hidden_layers=1,
        sscp_conv_channel_size=[8, 4],
    )
    image, boi, eoi, au, boa, eoa = ids(tok, *named.values())
    return (
        T.Gemma3nConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            audio_config=audio.to_dict(),
            vision_soft_tokens_per_image=256,
            audio_soft_tokens_per_image=4,
            image_token_id=image,
            boi_token_id=boi,
            eoi_token_id=eoi,
            audio_token_id=au,
            boa_token_id=boa,
            eoa_token_id=eoa,
        ),
        proc,
        style,
    )


GEMMA4_SPECIAL = dict(
    image_token="<|image|>",
    boi_token="<|image>",
    eoi_token="<image|>",
    audio_token="<|audio|>",
    boa_token="<|audio>",
    eoa_token="<audio|>",
)


GEMMA4_VARIANTS = {
    "vision": dict(use_bidirectional_attention="vision"),
    "moe": dict(
        use_bidirectional_attention="vision",
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
    ),
    "e2b": dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    ),
}


@arch("gemma4", "gemma4_unified", "gemma4+vision", "gemma4+e2b", "gemma4+moe")
def gemma4_(name):
    name, _, variant = name.partition("+")
    kind = CONFIG_MAPPING[name]
    own = GEMMA4_VARIANTS.get(variant, {})
    style = gemma4("<|image|>")
    tok = tokenizer(style, ("<|video|>",), **GEMMA4_SPECIAL)
    image_processor = (
        T.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
        if name == "gemma4"
        else T.Gemma4UnifiedImageProcessor(patch_size=4, max_soft_tokens=70)
    )
    extractor = T.Gemma4AudioFeatureExtractor() if name == "gemma4" else T.Gemma4UnifiedAudioFeatureExtractor()
    video = T.Gemma4VideoProcessor(patch_size=4) if name == "gemma4" else T.Gemma4UnifiedVideoProcessor(patch_size=4)
    proc = getattr(T, "Gemma4Processor" if name == "gemma4" else "Gemma4UnifiedProcessor")(
        extractor, image_processor, tok, video, chat_template=style.jinja(), image_seq_length=70
    )
    own = (
        dict(
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=30.0,
            per_layer_config={"1": {"head_dim": 16}},
        )
        | (dict(vocab_size_per_layer_input=len(tok)) if name == "gemma4" else {})
        | own
    )
    text = small(sub(kind, "text_config"), tok, **own)
    vision = small(
        kind.sub_configs["vision_config"]
        if kind.sub_configs["vision_config"].__name__ != "AutoConfig"
        else T.Gemma4VisionConfig,
        patch_size=4,
        **(dict(pooling_kernel_size=2, position_embedding_size=256) if name == "gemma4" else {}),
    )
    image, boi, eoi, au, boa, eoa = ids(tok, *GEMMA4_SPECIAL.values())
    return (
        kind(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            audio_config=None,
            image_token_id=image,
            boi_token_id=boi,
            eoi_token_id=eoi,
            audio_token_id=au,
            boa_token_id=boa,
            eoa_token_index=eoa,
            video_token_id=ids(tok, "<|video|>")[0],
        ),
        proc,
        style,
    )


@arch("paligemma")
def paligemma(name):
    """Fine-tuned on prompt/answer pairs; its processor writes bos behind the images, and a line break at the end."""

    style = Style(
        "",
        {"user": ("", ""), "assistant": ("", "<eos>")},
        "<eos>",
        "<image>",
        images_first=True,
        specials=("<eos>",),
        has_system=False,
    )
    tok = tokenizer(style, bos="<bos>", image_token="<image>")
    proc = T.PaliGemmaProcessor(T.SiglipImageProcessor(size=square(32)), tok, chat_template=style.jinja())
    proc.image_processor.image_seq_length = 16
    text = small(T.GemmaConfig, tok)
    vision = small(T.SiglipVisionConfig, **SIGLIP, vision_use_head=False, projection_dim=64)
    return (
        T.PaliGemmaConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=64,
            hidden_size=64,
            image_token_index=ids(tok, "<image>")[0],
        ),
        proc,
        style,
        dict(needs_image=True, system=False, multi=False),
    )
