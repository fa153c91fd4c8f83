"""Tiny base models as they are published: this runs under transformers 4, whose names and settings they have.

`python published.py FOLDER [NAME …]` writes each model into a folder of its own. Heads have 32 numbers: engines take
no fewer. A tower's layers are wider inside than outside: llama.cpp takes the one for the other where both are equal.
"""

import json
import sys
from pathlib import Path

import tiny_models
import torch
import transformers as T
from architectures.families.idefics import ROWS
from architectures.families.qwen import QWEN_IMAGE, QWEN_SPECIAL
from architectures.pieces import fill, tokenizer
from architectures.styles import chatml, gemma, idefics
from tokenizers import normalizers, pre_tokenizers

from tuning.demo.tokenizer import train_tokenizer

TEXT = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, rope_theta=500_000.0)
VISION = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2)
SMALL = dict(TEXT, intermediate_size=64, num_hidden_layers=2, head_dim=32, max_position_embeddings=4096)
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
tiny_models._TEXT.update(TEXT)
tiny_models._VISION.update(VISION)


def of_tokenizer(tok) -> dict:
    return {"vocab_size": len(tok)} | {name: getattr(tok, name) for name in ("bos_token_id", "eos_token_id")}


def as_class(kind: type, tok, named: dict):
    """A tokenizer as one of its family's class. `named`: attribute → token."""
    names = ("unk_token", "pad_token", "bos_token", "eos_token", "model_max_length")
    settings = {name: tok.init_kwargs.get(name) for name in names}
    return kind(tokenizer_object=tok.backend_tokenizer, extra_special_tokens=named, **settings)


def qwen2_5_vl():
    style = chatml(QWEN_IMAGE)
    tok = as_class(T.Qwen2TokenizerFast, tokenizer(style, **QWEN_SPECIAL), QWEN_SPECIAL)
    size = {"shortest_edge": 784, "longest_edge": 50176}
    sizes = dict(patch_size=14, merge_size=2, min_pixels=784, max_pixels=50176, size=size)
    image, video = T.Qwen2VLImageProcessorFast(**sizes), T.Qwen2VLVideoProcessor(**sizes)
    processor = T.Qwen2_5_VLProcessor(image, tok, video, chat_template=style.jinja())
    text = SMALL | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "tie_word_embeddings": True}
    vision = dict(depth=4, hidden_size=64, num_heads=2, intermediate_size=96, out_hidden_size=64)
    image_id, video_id, start, end = tok.convert_tokens_to_ids(list(QWEN_SPECIAL.values()))
    tokens = dict(image_token_id=image_id, video_token_id=video_id, vision_start_token_id=start)
    config = T.Qwen2_5_VLConfig(
        **text,
        **of_tokenizer(tok),
        **tokens,
        vision_end_token_id=end,
        vision_config={**vision, "fullatt_block_indexes": [1, 3]},
    )
    return config, processor


def gemma3():
    style = gemma("<start_of_image>")
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *style.specials, *named.values()]
    tokens = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    tok = train_tokenizer(tiny_models.CORPUS, special_tokens=special, sentencepiece=True, **tokens)
    tok.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")  # Gemma's adds no blank before a text
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tok = as_class(T.GemmaTokenizerFast, tok, named)
    tok.add_tokens(["\n" * number for number in range(1, 5)])  # vLLM asks for them
    image = T.Gemma3ImageProcessor(size={"height": 32, "width": 32}, do_pan_and_scan=False)
    processor = T.Gemma3Processor(image, tok, image_seq_length=4, chat_template=style.jinja())
    layers = ["sliding_attention"] * 5 + ["full_attention"]  # llama.cpp knows no other pattern
    text = SMALL | {"sliding_window": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 6, "layer_types": layers}
    vision = dict(VISION, num_hidden_layers=2, image_size=32, patch_size=4, vision_use_head=False)
    image_id, boi, eoi = tok.convert_tokens_to_ids(list(named.values()))
    config = T.Gemma3Config(
        text_config={**text, **of_tokenizer(tok)},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=image_id,
        boi_token_index=boi,
        eoi_token_index=eoi,
        eos_token_id=[tok.eos_token_id, tok.convert_tokens_to_ids("<end_of_turn>")],
    )
    return config, processor


def smolvlm():
    style = idefics(start="<|im_start|>")
    tok = tokenizer(style, ("<fake_token_around_image>", "<image>", "<global-img>", "<video>", *ROWS))
    sizes = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    image, video = T.SmolVLMImageProcessor(**sizes), T.SmolVLMVideoProcessor(**sizes)
    processor = T.SmolVLMProcessor(image, tok, video, image_seq_len=4, chat_template=style.jinja())
    vision = dict(VISION, num_hidden_layers=2, image_size=32, patch_size=8)
    text = {**SMALL, **of_tokenizer(tok), "pad_token_id": tok.pad_token_id, "model_type": "llama"}
    image_id = tok.convert_tokens_to_ids("<image>")
    return T.SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=image_id, scale_factor=2), processor


def mllama():
    config, processor = tiny_models._BUILDERS["mllama"]()
    config.text_config.rope_scaling = {**ROPE, "original_max_position_embeddings": 2048}
    return config, processor


BUILDERS = {**tiny_models._BUILDERS, "mllama": mllama, "qwen2_5_vl": qwen2_5_vl, "gemma3": gemma3, "smolvlm": smolvlm}


def save(name: str, folder: Path, shard: str = "400KB") -> None:
    """Write a model in several files, each of at most `shard`."""
    config, processor = BUILDERS[name]()
    torch.manual_seed(0)
    model = fill(T.AutoModelForImageTextToText.from_config(config))
    for weight, parameter in model.named_parameters():
        if weight.endswith(("attn_gate", "mlp_gate", "gate_attn", "gate_ffn")):  # Mllama's are closed at first
            torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    processor.save_pretrained(folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    settings["architectures"] = [type(model).__name__]  # save_pretrained puts Qwen's into the settings of its text
    file.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    for wanted in sys.argv[2:] or BUILDERS:
        save(wanted, Path(sys.argv[1], wanted))
