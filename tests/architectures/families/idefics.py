"""Idefics, SmolVLM."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, sub
from architectures.styles import idefics
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROWS = tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))


@arch("idefics2")
def idefics2(name):
    style = idefics()
    tok = tokenizer(style, ("<fake_token_around_image>", "<image>"))
    proc = T.Idefics2Processor(
        T.Idefics2ImageProcessor(size=dict(shortest_edge=24, longest_edge=48), do_image_splitting=False),
        tok,
        image_seq_len=4,
        chat_template=style.jinja(),
    )
    vision = small(T.Idefics2VisionConfig, image_size=48, patch_size=8)
    return (
        T.Idefics2Config(
            text_config=small(T.MistralConfig, tok, sliding_window=None).to_dict(),
            vision_config=vision.to_dict(),
            perceiver_config=small(T.models.idefics2.configuration_idefics2.Idefics2PerceiverConfig).to_dict(),
            image_token_id=ids(tok, "<image>")[0],
        ),
        proc,
        style,
    )


@arch("idefics3", "smolvlm")
def idefics3(name):
    style = idefics(start="<|im_start|>")
    kind = CONFIG_MAPPING[name]
    tok = tokenizer(style, ("<fake_token_around_image>", "<image>", "<global-img>", "<video>", *ROWS))
    image = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    if name == "idefics3":
        proc = T.Idefics3Processor(T.Idefics3ImageProcessor(**image), tok, image_seq_len=4, chat_template=style.jinja())
    else:
        proc = T.SmolVLMProcessor(
            T.SmolVLMImageProcessor(**image),
            tok,
            T.SmolVLMVideoProcessor(**image),
            image_seq_len=4,
            chat_template=style.jinja(),
        )
    vision = small(sub(kind, "vision_config"), image_size=32, patch_size=8)
    return (
        kind(
            text_config=small(T.LlamaConfig, tok).to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=ids(tok, "<image>")[0],
            scale_factor=2,
        ),
        proc,
        style,
    )


@arch("idefics")
def idefics1(name):
    style = idefics("<image>")
    tok = tokenizer(style, ("<fake_token_around_image>", "<image>"), bos="<s>")
    proc = T.IdeficsProcessor(T.IdeficsImageProcessor(image_size=32), tok, image_size=32)
    proc.chat_template = style.jinja()
    vision = small(T.models.idefics.configuration_idefics.IdeficsVisionConfig, image_size=32, patch_size=8)
    return (
        small(T.IdeficsConfig, tok, vision_config=vision.to_dict(), cross_layer_interval=1, additional_vocab_size=0),
        proc,
        style,
    )
