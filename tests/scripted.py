"""Tiny models whose answer is known: each token is followed by the next of a script, whatever came before it."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import build_model, build_processor


def script_head(model, tokenizer, prompt_end: str, words: str) -> torch.Tensor:
    """Weights of the head, `[vocabulary, hidden]`, by which `words` and the end token follow `prompt_end`."""
    ids = tokenizer(prompt_end + words, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    start = len(tokenizer(prompt_end, add_special_tokens=False)["input_ids"]) - 1
    script = ids[start:]
    assert len(set(script)) == len(script), f"a token is twice in {tokenizer.convert_ids_to_tokens(script)}"
    embedded = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)
    head = torch.zeros_like(model.get_output_embeddings().weight)
    head[script[1:]] = embedded[script[:-1]] * 10
    return head


def save_scripted(folder: Path, words: str, *, adapter_words: str = "", adapter_folder: Path | None = None) -> Path:
    """Save a LLaVA-1.5 that always answers `words`, and an adapter on it that always answers `adapter_words`."""
    model, processor = build_model("llava15"), build_processor("llava15")
    for layer in model.get_decoder().layers:  # they add nothing: a token's state is its embedding
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    head = script_head(model, processor.tokenizer, "ASSISTANT:", words)
    model.get_output_embeddings().weight.data.copy_(head)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if adapter_folder:
        change = script_head(model, processor.tokenizer, "ASSISTANT:", adapter_words) - head
        adapted = get_peft_model(model, LoraConfig(r=32, lora_alpha=32, target_modules=["lm_head"]))
        lora = adapted.get_output_embeddings()
        lora.lora_A["default"].weight.data.copy_(torch.eye(32))
        lora.lora_B["default"].weight.data.copy_(change)
        adapted.peft_config["default"].base_model_name_or_path = str(folder)
        adapted.save_pretrained(adapter_folder)
    return folder
