"""Apertus and dots: architectures that also hear. Only their eyes are used here."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, sub
from architectures.styles import chatml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@arch("apertus1p5")
def apertus1p5(name):
    """Pictures are discrete codes with embeddings of their own, which the head does not have."""
    kind = CONFIG_MAPPING[name]
    named = dict(
        image_token="<|image|>",
        audio_token="<|audio|>",
        boi_token="<|img_start|>",
        eoi_token="<|img_end|>",
        image_wrapper_token="<|img_token_start|>",
        eol_token="<|img_end_of_row|>",
        boa_token="<|audio_start|>",
        eoa_token="<|audio_end|>",
    )
    style = chatml("<|image|>")
    tok = tokenizer(style, **named)
    words, codes = len(tok), 32
    image_processor = T.Apertus1p5ImageProcessor(size={"min_pixels": 256, "max_pixels": 4096}, spatial_factor=4)
    proc = T.Apertus1p5Processor(image_processor, T.WavTokenizerFeatureExtractor(), tok, chat_template=style.jinja())
    audio = sub(kind, "audio_config")()
    vision = dict(codebook_size=codes, embed_dim=8, latent_channels=8, base_channels=32, channel_multiplier=[1, 1, 1])
    vision |= dict(num_res_blocks=1, attn_resolutions=[16], resolution=64)
    text = small(sub(kind, "text_config"), tok, vocab_size=words + codes + audio.codebook_size, output_vocab_size=words)
    image, sound = ids(tok, "<|image|>", "<|audio|>")
    return (
        kind(
            text_config=text.to_dict(),
            vision_config=vision,
            audio_config=audio.to_dict(),
            image_token_id=image,
            audio_token_id=sound,
            image_token_offset=words,
            audio_token_offset=words + codes,
        ),
        proc,
        style,
    )


@arch("dots3_note")
def dots3_note(name):
    kind = CONFIG_MAPPING[name]
    style = chatml("<|img|><|imgpad|><|endofimg|>")
    tok = tokenizer(style, ("<|img|>", "<|endofimg|>", "<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>"))
    sizes = dict(patch_size=4, merge_size=2, temporal_patch_size=1, size=dict(shortest_edge=64, longest_edge=4096))
    proc = T.Dots3NoteProcessor(
        T.Qwen2VLImageProcessor(**sizes),
        tok,
        T.Qwen3VLVideoProcessor(**sizes),
        T.Dots3NoteFeatureExtractor(),
        chat_template=style.jinja(),
    )
    heads = dict(num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, head_dim=16)
    window = heads | dict(qk_nope_head_dim=8, v_head_dim=16, qk_rope_head_dim=8)
    text = small(
        sub(kind, "text_config"),
        tok,
        layer_types=["indexed_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse"],
        shared_experts_intermediate_size=32,
        **heads,
        **{f"swa_{setting}": value for setting, value in window.items()},
    )
    vision = small(
        sub(kind, "vision_config"),
        patch_size=4,
        mlp_layer_types=["dense", "sparse"],
        per_layer_config={"1": {"num_local_experts": 4, "num_experts_per_tok": 2}},
        adapter_in_dim=64,
        adapter_out_dim=64,
    )
    audio = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    audio |= dict(downsample_hidden_size=8, adapter_input_size=64, adapter_out_dim=64)
    image, video, sound = ids(tok, "<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>")
    return (
        kind(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            audio_config=audio,
            image_token_id=image,
            video_token_id=video,
            audio_token_id=sound,
        ),
        proc,
        style,
    )
