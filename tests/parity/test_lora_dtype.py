"""LoRA matrices in 16 bits, with float32 copies in the optimizer, train as float32 ones do."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tuning


@pytest.fixture
def run(make_options, tmp_path):
    def start(name: str, **changes) -> tuple[list[float], dict[str, torch.Tensor]]:
        lora = {"peft_method": "lora", "target_modules": "all-linear", "lora_dropout": 0.0, "dtype": "bfloat16"}
        folder = tmp_path / name
        steps = {"max_steps": 40, "lr_scheduler_type": "constant", "output_dir": str(folder)}
        tuning.train(make_options("llava15", **lora, **steps | {"learning_rate": 2e-3} | changes))
        lines = map(json.loads, (folder / "training_logs.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line]
        return losses, load_file(folder / "adapter_model.safetensors")

    return start


def test_the_loss_curve_stays_the_same(run):
    expected, whole = run("float32")
    found, half = run("auto", lora_dtype="auto")
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=0.02)


def test_small_steps_reach_matrices_through_their_float32_copies(run):
    """A step of 2e-5 is less than bfloat16 shows of a number of 0.1; forty of them are not."""
    small = {"learning_rate": 2e-5, "lora_dtype": "auto"}
    _, expected = run("float32", **{**small, "lora_dtype": "float32"})
    _, found = run("copies", **small)
    _, lost = run("none", **small, keep_master_weights=False)

    def distance(weights):
        names = [name for name in expected if "lora_A" in name]
        return sum((weights[name].float() - expected[name]).abs().sum().item() for name in names)

    assert distance(found) < 0.5 * distance(lost)


def test_a_run_with_them_resumes(run, make_options, tmp_path):
    half = {"lora_dtype": "auto", "max_steps": 6, "save_steps": 3}
    _, whole = run("whole", **half)
    run("again", **half)
    (tmp_path / "again" / ".complete").unlink()
    (tmp_path / "again" / "checkpoint-6" / "trainer_state.json").unlink()
    _, resumed = run("again", **half)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
