"""Runs under llm-compressor's transformers: a quantised model beside the one that it was made of.

`python open_quantised.py MODEL QUANTISED`. Prints a JSON line: the kept and the quantised layers, the largest logit and
the largest difference of the logits, and the largest error of a layer's weight, relative to its largest number.
Kept means to 1e-6: to Gemma's norms llm-compressor adds 1, and takes it away again.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText


def read(folder: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no mapping
    return tensors


before, after = read(sys.argv[1]), read(sys.argv[2])
quantised = [key for key in before if f"{key}_scale" in after]
errors = [
    (after[key].float() * after[f"{key}_scale"].float() - before[key].float()).abs().max() / before[key].abs().max()
    for key in quantised
]
ids = torch.arange(10, 30).unsqueeze(0)
with torch.no_grad():
    expected, found = (
        AutoModelForImageTextToText.from_pretrained(folder)(input_ids=ids).logits for folder in sys.argv[1:3]
    )
result = {
    "quantised": quantised,
    "kept": [key for key in before if key not in quantised and torch.allclose(before[key], after[key], 0, 1e-6)],
    "weight_error": float(max(errors)),
    "largest": float(expected.abs().max()),
    "difference": float((found - expected).abs().max()),
}
print(json.dumps(result))
