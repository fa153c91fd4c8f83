"""Muse."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids
from architectures.styles import llama3

SEEN = (
    *("<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>"),
    *("<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>"),
)


@arch("muse_glimmer")
def muse_glimmer(name):
    style = llama3("<|patch|>", ("<|header_start|>", "<|header_end|>", "<|eot|>"))
    tok = tokenizer(style, SEEN)
    sizes = dict(patch_size=4, merge_size=2)
    proc = T.MuseGlimmerProcessor(
        T.MuseGlimmerImageProcessor(**sizes), T.MuseGlimmerVideoProcessor(**sizes), tok, chat_template=style.jinja()
    )
    text = small(
        T.MuseGlimmerTextConfig, tok, layer_types=["sliding_attention", "full_attention"], layer_rope_theta=[10000.0, 0]
    )
    vision = small(
        T.MuseGlimmerVisionConfig,
        patch_size=4,
        pos_emb_height=8,
        pos_emb_width=8,
        layer_types=["window_attention", "full_attention"],
        max_position_embeddings=64,
    )
    image, video = ids(tok, "<|patch|>", "<|video|>")
    return (
        T.MuseGlimmerConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=image,
            video_token_id=video,
            out_hidden_size=256,
        ),
        proc,
        style,
    )


@arch("muse_spark")
def muse_spark(name):
    style = llama3("<|patch|>", ("<|header_start|>", "<|header_end|>", "<|eot|>"))
    tok = tokenizer(style, (*SEEN, "<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>"))
    sizes = dict(patch_size=4, merge_size=2)
    proc = T.MuseSparkProcessor(
        T.MuseGlimmerImageProcessor(**sizes),
        T.MuseGlimmerVideoProcessor(**sizes),
        tok,
        T.MuseSparkFeatureExtractor(),
        chat_template=style.jinja(),
    )
    text = small(
        T.MuseSparkTextConfig,
        tok,
        layer_types=["sliding_attention", "full_attention"],
        layer_rope_theta=[10000.0, 0],
        mlp_layer_types=["dense", "sparse"],
        moe_hidden_size=64,
    )
    vision = small(
        T.MuseSparkVisionConfig,
        patch_size=4,
        pos_emb_height=8,
        pos_emb_width=8,
        layer_types=["window_attention", "full_attention"],
        max_position_embeddings=64,
    )
    ear = T.MuseSparkAudioConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], out_hidden_size=64)
    image, video, audio = ids(tok, "<|patch|>", "<|video|>", "<|audio|>")
    return (
        T.MuseSparkConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            audio_config=ear.to_dict(),
            image_token_id=image,
            video_token_id=video,
            audio_token_id=audio,
            out_hidden_size=256,
        ),
        proc,
        style,
    )
