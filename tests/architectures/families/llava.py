"""LLaVA and its kin."""

import transformers as T
from architectures.families.gemma import SIGLIP
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square
from architectures.styles import chatml, vicuna
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CLIP = dict(image_size=32, patch_size=8)
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def clip_processor(name, **more):
    return getattr(T, name)(size={"shortest_edge": 32}, crop_size=square(32), **more)


@arch("llava", "vipllava")
def llava(name):
    style = vicuna()
    tok = tokenizer(style, bos="<s>", image_token="<image>")
    proc = T.LlavaProcessor(
        clip_processor("CLIPImageProcessor"),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=style.jinja(),
    )
    more = (
        dict(vision_feature_layer=-2, vision_feature_select_strategy="default")
        if name == "llava"
        else dict(vision_feature_layers=[-2, -1])
    )
    kind = CONFIG_MAPPING[name]
    return (
        kind(
            text_config=small(T.LlamaConfig, tok).to_dict(),
            vision_config=small(T.CLIPVisionConfig, **CLIP).to_dict(),
            image_token_index=ids(tok, "<image>")[0],
            **more,
        ),
        proc,
        style,
        dict(single=name == "llava"),
    )


@arch("llava_next")
def llava_next(name):
    style = vicuna()
    tok = tokenizer(style, bos="<s>", image_token="<image>")
    proc = T.LlavaNextProcessor(
        clip_processor("LlavaNextImageProcessor", image_grid_pinpoints=PINPOINTS),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=style.jinja(),
    )
    return (
        T.LlavaNextConfig(
            text_config=small(T.LlamaConfig, tok).to_dict(),
            vision_config=small(T.CLIPVisionConfig, **CLIP).to_dict(),
            image_token_index=ids(tok, "<image>")[0],
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_grid_pinpoints=PINPOINTS,
        ),
        proc,
        style,
    )


@arch("llava_next_video")
def llava_next_video(name):
    style = vicuna()
    tok = tokenizer(style, bos="<s>", image_token="<image>", video_token="<video>")
    proc = T.LlavaNextVideoProcessor(
        T.LlavaNextVideoVideoProcessor(size={"shortest_edge": 32}, crop_size=square(32)),
        clip_processor("LlavaNextImageProcessor", image_grid_pinpoints=PINPOINTS),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=style.jinja(),
    )
    image, video = ids(tok, "<image>", "<video>")
    return (
        T.LlavaNextVideoConfig(
            text_config=small(T.LlamaConfig, tok).to_dict(),
            vision_config=small(T.CLIPVisionConfig, **CLIP).to_dict(),
            image_token_index=image,
            video_token_index=video,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_grid_pinpoints=PINPOINTS,
        ),
        proc,
        style,
    )


@arch("llava_onevision")
def llava_onevision(name):
    style = chatml("<image>\n", images_first=True)
    tok = tokenizer(style, image_token="<image>", video_token="<video>")
    proc = T.LlavaOnevisionProcessor(
        T.LlavaOnevisionImageProcessor(size=square(32), image_grid_pinpoints=PINPOINTS),
        tok,
        T.LlavaOnevisionVideoProcessor(size=square(32)),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=style.jinja(),
    )
    image, video = ids(tok, "<image>", "<video>")
    return (
        T.LlavaOnevisionConfig(
            text_config=small(T.Qwen2Config, tok).to_dict(),
            vision_config=small(T.SiglipVisionConfig, **SIGLIP, vision_use_head=False).to_dict(),
            image_token_index=image,
            video_token_index=video,
            image_grid_pinpoints=PINPOINTS,
        ),
        proc,
        style,
    )


@arch("video_llava")
def video_llava(name):
    style = vicuna()
    tok = tokenizer(style, bos="<s>", image_token="<image>", video_token="<video>")
    proc = T.VideoLlavaProcessor(
        T.VideoLlavaImageProcessor(size={"shortest_edge": 32}, crop_size=square(32)),
        T.VideoLlavaVideoProcessor(size={"shortest_edge": 32}, crop_size=square(32)),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=style.jinja(),
    )
    image, video = ids(tok, "<image>", "<video>")
    return (
        T.VideoLlavaConfig(
            text_config=small(T.LlamaConfig, tok).to_dict(),
            vision_config=small(T.CLIPVisionConfig, **CLIP).to_dict(),
            image_token_index=image,
            video_token_index=video,
            vision_feature_layer=-2,
        ),
        proc,
        style,
    )
