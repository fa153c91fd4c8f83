"""Models of other families than LLaVA's: published patches, windows, tiles and vocabularies, with few thin layers."""

from dataclasses import dataclass
from typing import Any

import record  # noqa: F401 - puts tests/, with the styles of chats, on the path

GENERATION = "{% generation %}", "{% endgeneration %}"
WORDS = [
    *("the", "a", "red", "green", "small", "large", "square", "circle", "stands", "below", "above", "beside", "on"),
    *("of", "chart", "shows", "sales", "in", "year"),
]
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
GEMMA_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SMOLVLM_TOKENS = [
    *("<fake_token_around_image>", "<image>", "<global-img>", "<video>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]


@dataclass(frozen=True)
class Scale:
    """How thin a model is. Tower and decoder have the same `width`, `layers` and `heads`.

    `vocabulary`: None for the published one. `small_pictures`: 32 pixels instead of the published image settings.
    """

    width: int
    layers: int
    heads: int
    vocabulary: int | None = None
    small_pictures: bool = False

    @property
    def head(self) -> int:
        return self.width // self.heads

    def text(self, vocabulary: int, tokenizer: Any) -> dict:
        """Arguments that the language models of all families take."""
        return {
            **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
            "vocab_size": self.vocabulary or vocabulary,
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": max(1, self.heads // 2),
            "tie_word_embeddings": True,
        }

    @property
    def tower(self) -> dict:
        """Arguments that the towers of all families but Qwen's take."""
        return {
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }


SCALES = {
    "20m": Scale(256, 4, 4),  # 6 to 9 million parameters, and the embeddings of the published vocabulary
    "pictures": Scale(16, 4, 1, vocabulary=1024),
    "tests": Scale(64, 4, 4, vocabulary=1024, small_pictures=True),
}


def make_tokenizer(special_tokens: list[str], end: str, **named: str):
    """A tokenizer in which each of WORDS is one token, at the start of a text and after a space."""
    from tuning.demo.tokenizer import train_tokenizer

    texts = [*WORDS, " ".join(["", *WORDS]), "A chat between a curious user and an artificial intelligence assistant."]
    return train_tokenizer(
        texts,
        special_tokens=special_tokens,
        bos_token=special_tokens[0],
        eos_token=end,
        pad_token=end,
        extra_special_tokens=named,
    )


def style_tokenizer(style: Any, more: list[str] | None = None, **named: str):
    """The tokenizer for chats of this style. `named`: attribute → token."""
    first = [style.bos] if style.bos else []
    return make_tokenizer(
        list(dict.fromkeys([*first, *style.specials, *(more or []), *named.values()])), style.end, **named
    )


def mark_answers(style: Any) -> str:
    """The chat template of this style, with marks around answers and what ends them."""
    from architectures.styles import quote

    start, end = GENERATION
    before, role, rest = style.jinja().rpartition("m['role'] == 'assistant' %}")
    after = style.turns["assistant"][1]
    words, closing = "{{ words(m['content']) }}", f"{{{{ {quote(after)} }}}}"
    assert words + closing in rest
    tail = f"{{{{ {quote(after.removeprefix(style.end))} }}}}" if after != style.end else ""
    return before + role + rest.replace(words + closing, f"{start}{words}{{{{ {quote(style.end)} }}}}{end}{tail}", 1)


def tokens_of(tokenizer: Any, **names: str) -> dict[str, int]:
    """Argument of a configuration → the id of the token with this name."""
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen(scale: Scale, kind: str, processor: str, video: str, text: dict, vision: dict, *, patch: int, pixels: dict):
    """`kind` is the model type. `pixels`: the fewest and most pixels of a picture."""
    import transformers
    from architectures.styles import chatml
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    style = chatml("<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer = style_tokenizer(style, **QWEN_TOKENS)
    factor = (2 * patch) ** 2
    size = {"shortest_edge": factor, "longest_edge": 16 * factor} if scale.small_pictures else pixels
    mean = {} if patch == 14 else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    patches = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": size, **mean}
    made = getattr(transformers, processor)(
        transformers.Qwen2VLImageProcessor(**patches),
        tokenizer,
        getattr(transformers, video)(**patches),
        chat_template=mark_answers(style),
    )
    tower = {
        "depth": scale.layers,
        "hidden_size": scale.width,
        "intermediate_size": 2 * scale.width,
        "num_heads": scale.heads,
        "out_hidden_size": scale.width,
        "patch_size": patch,
    }
    config = CONFIG_MAPPING[kind](
        text_config={**scale.text(151936, tokenizer), "max_position_embeddings": 128000, **text},
        vision_config={**tower, **vision},
        tie_word_embeddings=True,
        **tokens_of(
            tokenizer,
            image_token_id="<|image_pad|>",
            video_token_id="<|video_pad|>",
            vision_start_token_id="<|vision_start|>",
            vision_end_token_id="<|vision_end|>",
        ),
    )
    return config, made


def mrope(head: int, theta: float, **more: Any) -> dict:
    """Rotary embeddings in three dimensions, of which the published models give time a quarter or a third."""
    third = head // 2 // 3
    sections = [head // 2 - 2 * third, third, third]
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, **more}


def qwen2_5_vl(scale: Scale):
    """https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/config.json"""
    return qwen(
        scale,
        "qwen2_5_vl",
        "Qwen2_5_VLProcessor",
        "Qwen2VLVideoProcessor",
        {"rope_parameters": mrope(scale.head, 1e6)},
        {"window_size": 112, "fullatt_block_indexes": [scale.layers - 1]},
        patch=14,
        pixels={"shortest_edge": 3136, "longest_edge": 12845056},
    )


def qwen3_vl(scale: Scale):
    """https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct/blob/main/config.json"""
    return qwen(
        scale,
        "qwen3_vl",
        "Qwen3VLProcessor",
        "Qwen3VLVideoProcessor",
        {"head_dim": scale.head, "rope_parameters": mrope(scale.head, 5e6, mrope_interleaved=True)},
        {"num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1, 2]},
        patch=16,
        pixels={"shortest_edge": 65536, "longest_edge": 16777216},
    )


def qwen3_5(scale: Scale):
    """https://huggingface.co/Qwen/Qwen3.5-0.8B/blob/main/config.json: three linear layers to one of full attention."""
    rotated = scale.head // 4
    text = {
        "vocab_size": scale.vocabulary or 248320,
        "head_dim": scale.head,
        "rope_parameters": mrope(rotated, 1e7, mrope_interleaved=True, partial_rotary_factor=0.25),
        "layer_types": [*["linear_attention"] * (scale.layers - 1), "full_attention"],
        "linear_key_head_dim": 2 * scale.head,
        "linear_value_head_dim": 2 * scale.head,
        "linear_num_key_heads": scale.heads,
        "linear_num_value_heads": scale.heads,
    }
    return qwen(
        scale,
        "qwen3_5",
        "Qwen3VLProcessor",
        "Qwen3VLVideoProcessor",
        text,
        {"num_position_embeddings": 2304},
        patch=16,
        pixels={"shortest_edge": 65536, "longest_edge": 16777216},
    )


def gemma3(scale: Scale):
    """https://huggingface.co/google/gemma-3-4b-it/blob/main/config.json, with all six kinds of layers or the last."""
    import transformers
    from architectures.registry import square
    from architectures.styles import gemma

    style = gemma("<start_of_image>")
    tokenizer = style_tokenizer(style, **GEMMA_TOKENS)
    side, patch, tokens = (32, 8, 4) if scale.small_pictures else (896, 14, 256)
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=square(side), image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer,
        image_seq_length=tokens,
        chat_template=mark_answers(style),
    )
    text = {
        **scale.text(262208, tokenizer),
        "num_hidden_layers": 6,
        "head_dim": scale.head,
        "query_pre_attn_scalar": scale.head,
        "sliding_window": 1024,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**scale.tower, "image_size": side, "patch_size": patch, "vision_use_head": False},
        mm_tokens_per_image=tokens,
        tie_word_embeddings=True,
        **tokens_of(
            tokenizer,
            image_token_index="<image_soft_token>",
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
        ),
    )
    return config, processor


def internvl(scale: Scale):
    """https://huggingface.co/OpenGVLab/InternVL3_5-1B-HF/blob/main/config.json"""
    import transformers
    from architectures.registry import square
    from architectures.styles import chatml

    style = chatml("<IMG_CONTEXT>\n")
    tokenizer = style_tokenizer(style, **INTERNVL_TOKENS)
    side, patch, tokens, most = (32, 8, 4, 4) if scale.small_pictures else (448, 14, 256, 12)
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=square(side), crop_to_patches=True, max_patches=most),
        tokenizer,
        transformers.InternVLVideoProcessor(size=square(side)),
        image_seq_length=tokens,
        chat_template=mark_answers(style),
    )
    text = {
        "model_type": "qwen3",
        **scale.text(151936, tokenizer),
        "head_dim": scale.head,
        "max_position_embeddings": 40960,
    }
    config = transformers.InternVLConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        vision_config={**scale.tower, "image_size": [side, side], "patch_size": [patch, patch], "attention_bias": True},
        image_seq_length=tokens,
        **tokens_of(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    return config, processor


def smolvlm2(scale: Scale):
    """https://huggingface.co/HuggingFaceTB/SmolVLM2-500M-Video-Instruct/blob/main/config.json"""
    import transformers
    from architectures.styles import idefics

    style = idefics(start="<|im_start|>")
    tokenizer = style_tokenizer(style, SMOLVLM_TOKENS)
    side, patch, factor = (32, 8, 2) if scale.small_pictures else (512, 16, 4)
    edges = {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**edges),
        tokenizer,
        transformers.SmolVLMVideoProcessor(**edges),
        image_seq_len=(side // patch // factor) ** 2,
        chat_template=mark_answers(style),
    )
    text = {
        "model_type": "llama",
        **scale.text(49280, tokenizer),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    }
    config = transformers.SmolVLMConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
        vision_config={**scale.tower, "image_size": side, "patch_size": patch},
        scale_factor=factor,
        tie_word_embeddings=True,
        **tokens_of(tokenizer, image_token_id="<image>"),
    )
    return config, processor


BUILDERS = {function.__name__: function for function in (qwen2_5_vl, qwen3_vl, qwen3_5, gemma3, internvl, smolvlm2)}
