"""Nemotron and Inkling."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, sub
from architectures.styles import chatml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@arch("nemotron_h_omni")
def nemotron_h_omni(name):
    style = chatml("<image>")
    tok = tokenizer(
        style,
        ("<so_embedding>", "<so_start>", "<so_end>"),
        image_token="<image>",
        video_token="<video>",
        image_start_token="<img>",
        image_end_token="</img>",
    )
    proc = T.NemotronH_Omni_Reasoning_V3Processor(
        T.NemotronH_Omni_Reasoning_V3ImageProcessor(patch_size=8, min_num_patches=4, max_num_patches=64),
        T.NemotronH_Omni_Reasoning_V3VideoProcessor(patch_size=8),
        tok,
        T.ParakeetFeatureExtractor(),
        chat_template=style.jinja(),
    )
    text = small(
        T.NemotronHConfig,
        tok,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_hidden_layers="drop",
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        moe_shared_expert_intermediate_size=32,
        use_mamba_kernels=False,
    )
    vision = small(
        T.RadioConfig,
        video_temporal_patch_size=2,
        patch_size=8,
        image_size=32,
        max_img_size=64,
        num_key_value_heads="drop",
    )
    image, video, audio = ids(tok, "<image>", "<video>", "<so_embedding>")
    return (
        CONFIG_MAPPING[name](
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            vision_hidden_size=64,
            projector_hidden_size=64,
            image_token_id=image,
            video_token_id=video,
            audio_token_id=audio,
        ),
        proc,
        style,
    )


@arch("inkling2", "inkling2_loop", "inkling_mm_model")
def inkling(name):
    kind = CONFIG_MAPPING[name]
    style = chatml("<|image|>")
    tok = tokenizer(style, ("<|image_start|>", "<|audio_start|>"), image_token="<|image|>", audio_token="<|audio|>")
    own = dict(
        layer_types=["hybrid_sliding", "hybrid"],
        unpadded_vocab_size=len(tok),
        vocab_size=len(tok) + 16,
        d_rel=4,
        rel_extent=64,
    )
    image, audio, image_start, audio_start = ids(tok, "<|image|>", "<|audio|>", "<|image_start|>", "<|audio_start|>")
    if name == "inkling_mm_model":
        proc = T.InklingProcessor(
            T.InklingFeatureExtractor(),
            T.InklingImageProcessor(),
            tok,
            chat_template=style.jinja(),
            image_token="<|image|>",
            audio_token="<|audio|>",
            image_bos_token="<|image_start|>",
            audio_bos_token="<|audio_start|>",
        )
        text = small(sub(kind, "text_config"), tok, mlp_layer_types=["dense", "sparse"], n_shared_experts=1, **own)
        vision = small(sub(kind, "vision_config"), text_hidden_size=64, n_layers=4)
        return (
            kind(
                text_config=text.to_dict(),
                vision_config=vision.to_dict(),
                audio_config=sub(kind, "audio_config")(text_hidden_size=64, mel_vocab_size=16).to_dict(),
                image_token_id=image,
                audio_token_id=audio,
                image_bos_token_id=image_start,
                audio_bos_token_id=audio_start,
            ),
            proc,
            style,
        )
    proc = T.Inkling2Processor(T.Inkling2ImageProcessor(), tok, chat_template=style.jinja(), image_token="<|image|>")
    own |= (
        dict(
            loop_layer_index_start=1,
            loop_layer_index_end=2,
            loop_num_passes=2,
            loop_gate_rank=8,
            num_hidden_layers=3,
            layer_types=["hybrid_sliding", "hybrid", "hybrid"],
        )
        if "loop" in name
        else {}
    )
    text = small(sub(kind, "text_config"), tok, n_layers_per_attn_res_block=1, **own)
    vision = small(sub(kind, "vision_config"), posemb_grid_size=8, projection_hidden_dim=64, text_hidden_size=64)
    return kind(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=image), proc, style
