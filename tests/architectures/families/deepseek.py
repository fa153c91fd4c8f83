"""DeepSeek and Janus."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square
from architectures.styles import deepseek
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@arch("deepseek_vl", "deepseek_vl_hybrid")
def deepseek_vl(name):
    style = deepseek("<image_placeholder>")
    tok = tokenizer(style, image_token="<image_placeholder>")
    token = ids(tok, "<image_placeholder>")[0]
    text, vision = (
        small(T.LlamaConfig, tok),
        small(T.SiglipVisionConfig, image_size=32, patch_size=8, vision_use_head=False),
    )
    if name == "deepseek_vl":
        proc = T.DeepseekVLProcessor(
            T.DeepseekVLImageProcessor(size=square(32)), tok, num_image_tokens=16, chat_template=style.jinja()
        )
        return (
            T.DeepseekVLConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=token),
            proc,
            style,
        )
    proc = T.DeepseekVLHybridProcessor(
        T.DeepseekVLHybridImageProcessor(size=square(32), high_res_size=square(64)),
        tok,
        num_image_tokens=16,
        chat_template=style.jinja(),
    )
    high = small(
        T.SamVisionConfig,
        image_size=64,
        patch_size=4,
        global_attn_indexes=[1],
        window_size=4,
        output_channels=16,
        num_pos_feats=16,
        scale=64,
    )
    return (
        T.DeepseekVLHybridConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            high_res_vision_config=high.to_dict(),
            image_token_id=token,
        ),
        proc,
        style,
    )


@arch("deepseek_ocr2", "unlimited_ocr")
def deepseek_ocr2(name):
    kind = CONFIG_MAPPING[name]
    style = deepseek("<image>\n", names=("<|User|>", "<|Assistant|>"))
    tok = tokenizer(style, ("<|User|>", "<|Assistant|>"), image_token="<image>")
    prefix = "DeepseekOcr2" if name == "deepseek_ocr2" else "UnlimitedOcr"
    image = getattr(T, f"{prefix}ImageProcessor")(
        **(
            dict(size=square(1024), tile_size=768) if name == "deepseek_ocr2" else dict(size=square(128), tile_size=128)
        ),
        max_patches=4,
    )
    proc = getattr(T, f"{prefix}Processor")(
        image, tok, patch_size=4 if False else 16, downsample_ratio=4, chat_template=style.jinja()
    )
    vk = kind.sub_configs["vision_config"]
    sam = small(
        vk.sub_configs["sam_config"],
        image_size=1024 if name == "deepseek_ocr2" else 128,
        patch_size=16,
        global_attn_indexes=[] if name == "deepseek_ocr2" else [1],
        window_size=4,
        output_channels=16,
        downsample_channels=[32, 64],
    )
    enc = small(
        vk.sub_configs["encoder_config"], **({} if name == "deepseek_ocr2" else dict(image_size=32, patch_size=8))
    )
    text = small(kind.sub_configs["text_config"], tok, mlp_layer_types=["dense", "sparse"], num_experts_per_tok=2)
    return (
        kind(
            text_config=text.to_dict(),
            vision_config=dict(sam_config=sam.to_dict(), encoder_config=enc.to_dict()),
            image_token_id=ids(tok, "<image>")[0],
        ),
        proc,
        style,
    )


@arch("janus")
def janus(name):
    style = deepseek("<image_placeholder>", names=("<|User|>", "<|Assistant|>"))
    named = dict(image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
    tok = tokenizer(style, ("<|User|>", "<|Assistant|>"), **named)
    proc = T.JanusProcessor(
        T.JanusImageProcessor(size=square(32)), tok, num_image_tokens=16, chat_template=style.jinja()
    )
    vision = small(
        T.JanusVisionConfig, image_size=32, patch_size=8, num_image_tokens=16, mlp_ratio=2.0, projection_dim=64
    )
    vq = T.JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=32,
        latent_channels=8,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        num_patches=4,
        projection_dim=64,
        image_token_embed_dim=64,
    )
    return (
        T.JanusConfig(
            text_config=small(T.LlamaConfig, tok).to_dict(),
            vision_config=vision.to_dict(),
            vq_config=vq.to_dict(),
            image_token_id=ids(tok, "<image_placeholder>")[0],
        ),
        proc,
        style,
    )
