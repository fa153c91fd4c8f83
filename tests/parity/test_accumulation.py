"""How a global batch is cut into micro-batches changes neither the losses nor the weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tuning

SPLITS = {"1 x 8": (1, 8), "4 x 2": (4, 2)}


def train(options: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    tuning.train(options)
    folder = Path(options["output_dir"])
    log = [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]
    return [line["loss"] for line in log], load_file(folder / "model.safetensors")


@pytest.mark.parametrize("layout", ["granite_vision", "llava16_mistral", "mllama"])
def test_micro_batches_of_any_size_train_the_same_model(layout, make_options, tmp_path):
    # SGD: Adam's first steps have the size of the learning rate whatever the gradient, and would hide its scale.
    common = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "save_strategy": "no", "max_grad_norm": 0.0}
    batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    losses, weights = train(make_options(layout, **common, **batches, output_dir=str(tmp_path / "whole")))
    assert len(losses) == 2
    start = load_file(make_options(layout)["model_name_or_path"] + "/model.safetensors")
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3
    for name, (size, steps) in SPLITS.items():
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        split_losses, split_weights = train(make_options(layout, **common, **batches, output_dir=str(tmp_path / name)))
        torch.testing.assert_close(split_losses, losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(split_weights, weights, rtol=1e-5, atol=1e-5)
