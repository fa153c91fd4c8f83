"""ERNIE, PaddleOCR, LFM, Hunyuan, VideoLLaMA, MiniMax."""

import transformers as T
from architectures.families.qwen import QWEN_IMAGE, QWEN_SPECIAL, ROPE
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square, sub
from architectures.styles import chatml, ernie, hunyuan
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@arch("ernie4_5_vl_moe")
def ernie4_5(name):
    named = dict(
        image_token="<|IMAGE_PLACEHOLDER|>",
        image_end_token="<|IMAGE_END|>",
        image_start_token="<|IMAGE_START|>",
        video_token="<|VIDEO_PLACEHOLDER|>",
        video_end_token="<|VIDEO_END|>",
        video_start_token="<|VIDEO_START|>",
    )
    style = ernie("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    tok = tokenizer(style, **named)
    sizes = dict(patch_size=4, merge_size=2, size=dict(shortest_edge=64, longest_edge=4096))
    proc = T.Ernie4_5_VLMoeProcessor(
        T.Ernie4_5_VLMoeImageProcessor(**sizes),
        tok,
        T.Ernie4_5_VLMoeVideoProcessor(draw_on_frames=False, font="", **sizes),
        chat_template=style.jinja(),
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    text = small(
        T.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe.Ernie4_5_VLMoeTextConfig,
        tok,
        moe_intermediate_size=[32, 16],
        mlp_layer_types=["dense", "sparse"],
        rope_parameters=rope,
        moe_num_shared_experts=1,
        head_dim="drop",
    )
    vision = small(T.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe.Ernie4_5_VLMoeVisionConfig, patch_size=4)
    i, ie, s, v, ve, vs = ids(tok, *named.values())
    return (
        T.Ernie4_5_VLMoeConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=i,
            image_end_token_id=ie,
            image_start_token_id=s,
            video_token_id=v,
            video_end_token_id=ve,
            video_start_token_id=vs,
        ),
        proc,
        style,
    )


@arch("paddleocr_vl")
def paddleocr(name):
    named = dict(
        image_token="<|IMAGE_PLACEHOLDER|>",
        vision_start="<|IMAGE_START|>",
        vision_end="<|IMAGE_END|>",
        video_token="<|video_pad|>",
    )
    style = ernie("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    tok = tokenizer(style, **named)
    proc = T.PaddleOCRVLProcessor(
        T.PaddleOCRVLImageProcessor(patch_size=4, merge_size=2, size=dict(shortest_edge=64, longest_edge=4096)),
        tok,
        chat_template=style.jinja(),
    )
    text = small(T.PaddleOCRTextConfig, tok, rope_parameters=ROPE)
    vision = small(T.PaddleOCRVisionConfig, image_size=32, patch_size=4)
    i, s, e, v = ids(tok, *named.values())
    return (
        T.PaddleOCRVLConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=i,
            vision_start_token_id=s,
            vision_end_token_id=e,
            video_token_id=v,
        ),
        proc,
        style,
    )


@arch("lfm2_vl")
def lfm2_vl(name):
    style = chatml("<image>", bos="<|startoftext|>")
    named = dict(
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )
    tok = tokenizer(style, tuple(f"<|img_row_{i}_col_{j}|>" for i in range(1, 5) for j in range(1, 5)), **named)
    image = T.Lfm2VlImageProcessor(
        encoder_patch_size=4,
        tile_size=32,
        min_image_tokens=4,
        max_image_tokens=16,
        max_tiles=4,
        downsample_factor=2,
        size=square(32),
        max_num_patches=64,
    )
    proc = T.Lfm2VlProcessor(image, tok, chat_template=style.jinja())
    text = small(
        T.Lfm2Config,
        tok,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        block_ff_dim=64,
        full_attn_idxs="drop",
    )
    vision = small(T.Siglip2VisionConfig, patch_size=4, num_patches=64, vision_use_head=False)
    return (
        T.Lfm2VlConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=ids(tok, "<image>")[0],
            downsample_factor=2,
        ),
        proc,
        style,
    )


@arch("hunyuan_vl")
def hunyuan_vl(name):
    style = hunyuan("<｜hy_place▁holder▁no▁100｜><｜hy_place▁holder▁no▁102｜><｜hy_place▁holder▁no▁101｜>")
    named = dict(
        image_token="<｜hy_place▁holder▁no▁102｜>",
        image_start_token="<｜hy_place▁holder▁no▁100｜>",
        image_end_token="<｜hy_place▁holder▁no▁101｜>",
    )
    tok = tokenizer(style, ("<newline>",), **named)
    proc = T.HunYuanVLProcessor(
        T.HunYuanVLImageProcessor(patch_size=4, merge_size=2, size=dict(shortest_edge=64, longest_edge=4096)),
        tok,
        chat_template=style.jinja(),
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
    text = small(T.HunYuanVLTextConfig, tok, rope_parameters=rope, head_dim=16)
    vision = small(
        T.HunYuanVLVisionConfig,
        patch_size=4,
        img_max_token_num=256,
        max_image_size=64,
        min_image_size=8,
        max_vit_seq_len=256,
        text_hidden_size=64,
    )
    i, s, e = ids(tok, *named.values())
    return (
        T.HunYuanVLConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=i,
            im_start_id=s,
            im_end_id=e,
            im_newline_id=ids(tok, "<newline>")[0],
        ),
        proc,
        style,
    )


@arch("hy_v4_vl")
def hy_v4_vl(name):
    text = dict(
        layer_types=["indexed_attention"] * 2,
        mlp_layer_types=["dense", "sparse"],
        indexer_types=["full"] * 2,
        num_key_value_heads=4,
        head_dim=8,
        hc_mult=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    )
    kind = CONFIG_MAPPING[name]
    style = hunyuan(QWEN_IMAGE)
    tok = tokenizer(style, **QWEN_SPECIAL)
    sizes = dict(patch_size=4, merge_size=2, size=dict(shortest_edge=64, longest_edge=4096))
    proc = T.HYV4VLProcessor(
        T.HYV4VLImageProcessor(**sizes), tok, T.HYV4VLVideoProcessor(**sizes), chat_template=style.jinja()
    )
    image, video, *_ = ids(tok, *QWEN_SPECIAL.values())
    return (
        kind(
            text_config=small(sub(kind, "text_config"), tok, **text).to_dict(),
            vision_config=small(sub(kind, "vision_config"), patch_size=4, max_image_size=64).to_dict(),
            image_token_id=image,
            video_token_id=video,
        ),
        proc,
        style,
    )


@arch("video_llama_3")
def video_llama_3(name):
    style = chatml("<|image_pad|>\n")
    tok = tokenizer(style, image_token="<|image_pad|>", video_token="<|video_pad|>")
    sizes = dict(patch_size=4, merge_size=2, size=dict(shortest_edge=64, longest_edge=4096))
    proc = T.VideoLlama3Processor(
        T.VideoLlama3ImageProcessor(**sizes), tok, T.VideoLlama3VideoProcessor(**sizes), chat_template=style.jinja()
    )
    image, video = ids(tok, "<|image_pad|>", "<|video_pad|>")
    return (
        T.VideoLlama3Config(
            text_config=small(T.Qwen2Config, tok).to_dict(),
            vision_config=small(T.VideoLlama3VisionConfig, patch_size=4).to_dict(),
            image_token_id=image,
            video_token_id=video,
        ),
        proc,
        style,
    )


@arch("minimax_m3_vl")
def minimax(name):
    kind = CONFIG_MAPPING[name]
    cls = T.MiniMaxM3VLProcessor
    style = chatml(cls.IMAGE_TOKEN)
    tok = tokenizer(style, (cls.IMAGE_TOKEN, cls.VIDEO_TOKEN, cls.VISION_START_TOKEN, cls.VISION_END_TOKEN))
    sizes = dict(patch_size=4, merge_size=2, temporal_patch_size=2, size=dict(shortest_edge=64, longest_edge=4096))
    proc = cls(
        T.MiniMaxM3VLImageProcessor(**sizes), tok, T.MiniMaxM3VLVideoProcessor(**sizes), chat_template=style.jinja()
    )
    text = small(
        sub(kind, "text_config"),
        tok,
        mlp_layer_types=["dense", "sparse"],
        layer_types=["full_attention"] * 2,
        dense_intermediate_size=64,
        shared_intermediate_size=32,
        rotary_dim=8,
    )
    vision = small(sub(kind, "vision_config"), image_size=32, patch_size=4, rope_parameters="drop")
    image, video = ids(tok, cls.IMAGE_TOKEN, cls.VIDEO_TOKEN)
    return (
        kind(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_index=image,
            video_token_index=video,
            projector_hidden_size=64,
        ),
        proc,
        style,
    )
