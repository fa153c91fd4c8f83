"""GLM."""

import transformers as T
from architectures.families.qwen import ROPE
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, sub
from architectures.styles import glm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def glm_family(name, processor, image_processor, video, text, vision):
    kind = CONFIG_MAPPING[name]
    style = glm("<|begin_of_image|><|image|><|end_of_image|>")
    named = dict(image_token="<|image|>", video_token="<|video|>")
    more = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    tok = tokenizer(style, more, bos="", **named)
    sizes = dict(patch_size=4, merge_size=2, temporal_patch_size=2, size=dict(shortest_edge=64, longest_edge=4096))
    proc = getattr(T, processor)(
        getattr(T, image_processor)(**sizes), tok, getattr(T, video)(**sizes), chat_template=style.jinja()
    )
    image, video_id, a, b, c, d = ids(tok, *named.values(), *more)
    text_config = small(sub(kind, "text_config"), tok, **text)
    vision_config = small(sub(kind, "vision_config"), patch_size=4, image_size=32, **vision)
    return (
        kind(
            text_config=text_config.to_dict(),
            vision_config=vision_config.to_dict(),
            image_token_id=image,
            video_token_id=video_id,
            image_start_token_id=a,
            image_end_token_id=b,
            video_start_token_id=c,
            video_end_token_id=d,
        ),
        proc,
        style,
    )


GLM_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}


@arch("glm4v", "glm4v_moe")
def glm4v(name):
    return glm_family(
        name, "Glm4vProcessor", "Glm4vImageProcessor", "Glm4vVideoProcessor", dict(rope_parameters=GLM_ROPE), {}
    )


@arch("glm46v", "glmga")
def glm46v(name):
    return glm_family(
        name, "Glm46VProcessor", "Glm46VImageProcessor", "Glm46VVideoProcessor", dict(rope_parameters=GLM_ROPE), {}
    )


@arch("glm_ocr")
def glm_ocr(name):
    return glm_family(
        name, "Glm46VProcessor", "Glm46VImageProcessor", "Glm46VVideoProcessor", dict(rope_parameters=ROPE), {}
    )


@arch("glm5_next")
def glm5_next(name):
    text = dict(
        layer_types=["linear_attention", "indexed_attention"],
        mlp_layer_types=["dense", "sparse"],
        indexer_types=["full", "full"],
        qk_rope_head_dim=0,
        qk_nope_head_dim=16,
        head_dim="drop",
        num_key_value_heads=4,
        linear_head_dim=16,
        linear_num_heads=4,
        hc_mult=2,
    )
    return glm_family(
        name,
        "Glm5NextProcessor",
        "Glm46VImageProcessor",
        "Glm46VVideoProcessor",
        text,
        dict(projection_intermediate_size=64),
    )
