"""Merged models for the tests of other engines."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from tuning import cli

ADAPTED = ("q_proj", "v_proj")


def merge(base: Path, folder: Path) -> Path:
    """Merge a random adapter of language model and vision tower into `base`, by the command; returns the new folder."""
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=4, target_modules=list(ADAPTED), init_lora_weights=False)).save_pretrained(
        folder / "adapter"
    )
    words = ["export", "--adapter", str(folder / "adapter"), "--base", str(base), "--output", str(folder / "merged")]
    assert cli.main(words) == 0
    return folder / "merged"
