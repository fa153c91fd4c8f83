"""Makes and saves a tiny random checkpoint of an architecture."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures.pieces import fill
from architectures.registry import ARCHS
from architectures.styles import Style
from transformers import AutoModelForImageTextToText, PreTrainedConfig

for file in sorted(Path(__file__).parent.glob("families/*.py")):
    importlib.import_module(f"architectures.families.{file.stem}")


@dataclass(frozen=True)
class Family:
    """What `registry` builds for an architecture, by name."""

    config: PreTrainedConfig
    processor: Any
    style: Style
    single: bool = False
    needs_image: bool = False
    system: bool = True
    multi: bool = True


def build(name: str) -> Family:
    config, processor, style, *options = ARCHS[name](name)
    return Family(config, processor, style, **(options[0] if options else {}))


def save(name: str, folder: Path, *, weights: bool = True) -> Family:
    """Save a checkpoint of the architecture into `folder`, with random weights, or without any."""
    family = build(name)
    if not weights:
        family.config.save_pretrained(folder)
        family.processor.save_pretrained(folder)
        return family
    torch.manual_seed(0)
    model = fill(AutoModelForImageTextToText.from_config(family.config, dtype=torch.float32))
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return family
