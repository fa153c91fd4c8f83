"""Qwen's line, and what took over its pictures: patches in a row, `image_grid_thw`, positions in three dimensions."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, sub
from architectures.styles import chatml, cohere, exaone
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
ROPE_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
QWEN_SPECIAL = dict(
    image_token="<|image_pad|>",
    video_token="<|video_pad|>",
    vision_bos_token="<|vision_start|>",
    vision_eos_token="<|vision_end|>",
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
LINEAR = ["linear_attention", "full_attention"]


def qwen(
    name,
    text,
    vision,
    processor="Qwen3VLProcessor",
    video="Qwen3VLVideoProcessor",
    patch=4,
    style=None,
    ids_of=True,
    image="Qwen2VLImageProcessor",
    **top,
):
    kind = CONFIG_MAPPING[name]
    style = style or chatml(QWEN_IMAGE)
    tok = tokenizer(style, **QWEN_SPECIAL)
    size = dict(shortest_edge=64, longest_edge=4096)
    sizes = dict(patch_size=patch, merge_size=2, temporal_patch_size=2, size=size)
    proc = getattr(T, processor)(
        getattr(T, image)(**{k: v for k, v in sizes.items() if k != "temporal_patch_size" or "Cosmos" not in image}),
        tok,
        getattr(T, video)(**{k: v for k, v in sizes.items() if k != "temporal_patch_size" or "Cosmos" not in video}),
        chat_template=style.jinja(),
    )
    image_id, video_id, start, end = ids(tok, *QWEN_SPECIAL.values())
    text_config = small(sub(kind, "text_config"), tok, **text)
    vision_config = small(sub(kind, "vision_config"), patch_size=patch, **vision)
    own = dict(image_token_id=image_id, video_token_id=video_id)
    own |= dict(vision_start_token_id=start, vision_end_token_id=end) if ids_of else {}
    return kind(text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), **own, **top), proc, style


@arch("qwen2_vl")
def qwen2_vl(name):
    return qwen(
        "qwen2_vl",
        dict(rope_parameters=ROPE),
        dict(hidden_size=64, embed_dim=64, mlp_ratio=2),
        "Qwen2VLProcessor",
        "Qwen2VLVideoProcessor",
    )


@arch("qwen2_5_vl")
def qwen2_5_vl(name):
    return qwen(
        "qwen2_5_vl",
        dict(rope_parameters=ROPE),
        dict(window_size=16, fullatt_block_indexes=[1]),
        "Qwen2_5_VLProcessor",
        "Qwen2VLVideoProcessor",
    )


@arch("qwen3_vl", "qwen3_vl_moe")
def qwen3_vl(name="qwen3_vl"):
    return qwen(name, dict(rope_parameters=ROPE), dict(num_position_embeddings=64, deepstack_visual_indexes=[0]))


@arch("qwen3_5", "qwen3_5_moe")
def qwen3_5(name="qwen3_5"):
    return qwen(name, dict(rope_parameters=ROPE_HALF, layer_types=LINEAR), dict(num_position_embeddings=64))


@arch("qwen4_exp")
def qwen4_exp(name):
    text = dict(
        rope_parameters=ROPE,
        layer_types=["linear_attention", "indexed_attention"],
        hc_count=2,
        hc_lowrank=8,
        ple_embed_dim=16,
        ngram_vocab_size_base=64,
        split_ngram_parts=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=64,
        indexer_compress_ratio=4,
        heads_per_ngram=2,
    )
    return qwen(name, text, dict(num_position_embeddings=64))


@arch("cohere_compass")
def cohere_compass(name):
    style = cohere("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>")
    kind = CONFIG_MAPPING[name]
    tok = tokenizer(style, ("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"))
    sizes = dict(patch_size=4, merge_size=2, temporal_patch_size=2, size=dict(shortest_edge=64, longest_edge=4096))
    proc = T.CohereCompassProcessor(
        T.Qwen2VLImageProcessor(**sizes), tok, T.Qwen3VLVideoProcessor(**sizes), chat_template=style.jinja()
    )
    image, video, start, end = ids(tok, "<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>")
    text = small(sub(kind, "text_config"), tok, rope_parameters={"full_attention": ROPE}, logit_scale=0.25)
    vision = small(sub(kind, "vision_config"), patch_size=4, num_position_embeddings=64, deepstack_visual_indexes=[0])
    return (
        kind(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        ),
        proc,
        style,
    )


@arch("exaone4_5")
def exaone4_5(name):
    return qwen(
        name,
        dict(layer_types=["sliding_attention", "full_attention"], head_dim="drop"),
        dict(window_size=16, fullatt_block_indexes=[1]),
        "Exaone4_5_Processor",
        "Qwen2VLVideoProcessor",
        style=exaone("<vision>" and QWEN_IMAGE),
        ids_of=False,
    )


@arch("hyperclovax_vision_v2")
def hyperclovax(name):
    return qwen(
        name,
        dict(logits_scaling=2.0),
        dict(window_size=16, fullatt_block_indexes=[1]),
        "HyperCLOVAXVisionV2Processor",
        "Qwen2VLVideoProcessor",
        ids_of=False,
    )


@arch("lfm3_vl")
def lfm3_vl(name):
    text = dict(layer_types=["conv", "full_attention"], num_hidden_layers=2)
    return qwen(
        name,
        text,
        dict(layer_types=["conv", "full_attention"], num_hidden_layers=2),
        "Lfm3VlProcessor",
        "Qwen3VLVideoProcessor",
    )


@arch("cosmos3_edge")
def cosmos3_edge(name):
    return qwen(
        name,
        dict(rope_parameters=ROPE),
        dict(num_patches=64),
        "Cosmos3EdgeProcessor",
        "Cosmos3EdgeVideoProcessor",
        image="Cosmos3EdgeImageProcessor",
    )


@arch("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
def qwen_omni(name):
    kind = CONFIG_MAPPING[name]
    named = QWEN_SPECIAL | dict(
        audio_token="<|audio_pad|>", audio_bos_token="<|audio_start|>", audio_eos_token="<|audio_end|>"
    )
    style = chatml(QWEN_IMAGE)
    tok = tokenizer(style, **named)
    sizes = dict(patch_size=4, merge_size=2, temporal_patch_size=2, size=dict(shortest_edge=64, longest_edge=4096))
    processor = T.Qwen2_5OmniProcessor if "2_5" in name else T.Qwen3OmniMoeProcessor
    proc = processor(
        T.Qwen2VLImageProcessor(**sizes),
        T.Qwen2VLVideoProcessor(**sizes),
        T.WhisperFeatureExtractor(feature_size=128),
        tok,
        chat_template=style.jinja(),
    )
    image, video, _, _, audio, audio_start, audio_end = ids(tok, *named.values())
    vision = (
        dict(window_size=16, fullatt_block_indexes=[1])
        if "2_5" in name
        else dict(num_position_embeddings=64, deepstack_visual_indexes=[0])
    )
    ear = dict(encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=64, d_model=64, output_dim=64) | (
        {} if "2_5" in name else dict(downsample_hidden_size=16)
    )
    parts = dict(
        text_config=small(sub(kind, "text_config"), tok, rope_parameters=ROPE).to_dict(),
        vision_config=small(sub(kind, "vision_config"), patch_size=4, **vision).to_dict(),
        audio_config=sub(kind, "audio_config")(**ear).to_dict(),
    )
    own = (
        dict(audio_token_index=audio, image_token_index=image, video_token_index=video, audio_end_token_id=audio_end)
        if "2_5" in name
        else dict(audio_token_id=audio, image_token_id=image, video_token_id=video)
    )
    return (
        kind(**parts, **own, audio_start_token_id=audio_start, vision_start_token_id=ids(tok, "<|vision_start|>")[0]),
        proc,
        style,
    )
