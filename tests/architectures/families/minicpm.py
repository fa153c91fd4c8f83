"""Kimi and MiniCPM."""

import transformers as T
from architectures.families.qwen import LINEAR
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, sub
from architectures.styles import chatml, kimi
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@arch("kimi_k25")
def kimi_k25(name):
    style = kimi("<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n")
    named = dict(image_token="<|media_pad|>", video_token="<|kimi_k25_video_placeholder|>")
    tok = tokenizer(style, ("<|media_begin|>", "<|media_content|>", "<|media_end|>"), **named)
    proc = T.Kimi_K25Processor(
        T.Kimi_K25ImageProcessor(patch_size=4, size=dict(max_height=64, max_width=64), max_patches=256),
        tok,
        T.Kimi_K25VideoProcessor(patch_size=4),
        chat_template=style.jinja(),
    )
    text = small(T.DeepseekV3Config, tok, num_key_value_heads=4, head_dim="drop", num_nextn_predict_layers=0)
    vision = small(
        T.models.kimi_k25.configuration_kimi_k25.Kimi_K25VisionConfig, patch_size=4, pos_emb_height=16, pos_emb_width=16
    )
    image, video, start, end = ids(
        tok, "<|media_pad|>", "<|kimi_k25_video_placeholder|>", "<|media_begin|>", "<|media_end|>"
    )
    return (
        T.Kimi_K25Config(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_hidden_size=64,
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        ),
        proc,
        style,
    )


@arch("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
def minicpm(name):
    kind = CONFIG_MAPPING[name]
    named = dict(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        image_start_token="<image>",
        image_end_token="</image>",
        slice_start_token="<slice>",
        slice_end_token="</slice>",
        image_id_start_token="<image_id>",
        image_id_end_token="</image_id>",
    )
    style = chatml("<|image_pad|>")
    tok = tokenizer(style, **named)
    prefix = {"minicpm_ocr": "MiniCPMOcr"}.get(name, "MiniCPMV4_6")
    own = {"minicpm_ocr": "MiniCPMOcr", "minicpmv4_6": "MiniCPMV4_6", "minicpmv4_7": "MiniCPMV4_7"}[name]
    sizes = dict(patch_size=4, scale_resolution=32, max_slice_nums=4)
    proc = getattr(T, f"{own}Processor")(
        getattr(T, f"{prefix}ImageProcessor")(**sizes),
        getattr(T, f"{prefix}VideoProcessor")(**sizes),
        tok,
        chat_template=style.jinja(),
    )
    text = small(
        T.Qwen3_5TextConfig,
        tok,
        layer_types=LINEAR,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    vision = small(sub(kind, "vision_config"), image_size=32, patch_size=4, num_hidden_layers=3, insert_layer_id=1)
    own_ids = (
        dict(
            zip(
                ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id"),
                [*ids(tok, "<image>", "</image>", "<slice>", "</slice>"), tok.encode("\n")[0]],
                strict=False,
            )
        )
        if name == "minicpmv4_7"
        else {}
    )
    image, video = ids(tok, "<|image_pad|>", "<|video_pad|>")
    return (
        kind(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            insert_layer_id=1,
            image_token_id=image,
            video_token_id=video,
            patch_size=4,
            **(dict(image_size=32) if name != "minicpm_ocr" else {}),
            **own_ids,
        ),
        proc,
        style,
    )
