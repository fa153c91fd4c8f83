"""Measure the peak memory of merging an adapter and checking the merged weights, for base models of several sizes.

    python benchmarks/export_memory.py [--layers 4 16]

The base is a random LLaVA-1.5 layout in bfloat16 with 2048 features and a vocabulary of 32768, stored in files of
400 MB. The adapter has rank 16 on every linear layer. `beyond_imports_gb` is the peak minus the peak after the imports.
Logits are not compared, because that would need the whole model. Prints a JSON line for each model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from record import describe_environment, peak_rss_bytes, print0, print_line
from workloads import make_config_and_processor

TEXT = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8}


def save_base_and_adapter(folder: Path, layers: int) -> int:
    """Write both, and return the bytes of the base model's weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    config, processor = make_config_and_processor("llava15", "tiny", 32768)
    for name, value in {**TEXT, "num_hidden_layers": layers, "head_dim": 128}.items():
        setattr(config.text_config, name, value)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="400MB")
    processor.save_pretrained(folder / "base")
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))


def merge(folder: Path) -> None:
    """Merge in this process, and print its peak memory before and after."""
    from tuning.commands import export

    before = peak_rss_bytes()
    export.compare = lambda *_: None
    words = ["--adapter", folder / "adapter", "--base", folder / "base", "--output", folder / "merged"]
    assert export.main([str(word) for word in words]) == 0
    print(json.dumps([before, peak_rss_bytes()]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.merge:
        merge(arguments.merge)
        return
    environment = describe_environment()
    for layers in arguments.layers:
        print0(f"{layers} layers …")
        with tempfile.TemporaryDirectory() as folder:
            size = save_base_and_adapter(Path(folder), layers)
            command = [sys.executable, __file__, "--merge", folder]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        before, peak = json.loads(child.stdout.splitlines()[-1])
        figures = {"base_gb": size / 1e9, "peak_memory_gb": peak / 1e9, "beyond_imports_gb": (peak - before) / 1e9}
        print_line("export_memory", environment, layers=layers, **{name: round(gb, 3) for name, gb in figures.items()})


if __name__ == "__main__":
    main()
