"""Two processes, with DDP or FSDP2, train the very model that one process trains."""

import json
from pathlib import Path

import pytest
import torch
from distributed.conftest import run_jobs
from safetensors.torch import load_file
from tiny_models import LAYOUTS

import tuning

LORA = {
    "peft_method": "lora",
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "r": 4,
    "lora_dropout": 0.0,
    "freeze_vision_tower": False,
    "modules_to_save": ["multi_modal_projector"],
}
METHODS = {"full": {}, "lora": LORA}
SPLITS = {"2x4": (4, 1), "2x2x2": (2, 2)}
# SGD: Adam's first steps have the size of the learning rate whatever the gradient, and would hide its scale.
COMMON = {"optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "num_train_epochs": 2, "save_strategy": "no"}
CASES = [(layout, method) for layout in LAYOUTS for method in METHODS]


def make_job(models, rows, folder: Path, layout: str, method: str, size: int, steps: int, **changes) -> dict:
    return {
        "model_name_or_path": str(models[layout]),
        "training_data_path": str(rows),
        "validation_data_path": str(rows),
        "output_dir": str(folder),
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "gradient_accumulation_steps": steps,
        "dataloader_num_workers": 0,
        **COMMON,
        **METHODS[method],
        **changes,
    }


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def losses_of(folder: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in ("loss", "eval_loss", "supervised_tokens")}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, models, mixed_rows):
    """Case → folder of its run on this process alone, in batches of eight."""
    root = tmp_path_factory.mktemp("one")
    for layout, method in CASES:
        tuning.train(make_job(models, mixed_rows, root / f"{layout}-{method}", layout, method, 8, 1))
    return root


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_processes(request, tmp_path_factory, models, mixed_rows):
    """Folder with the same runs on two processes, in both splits."""
    root = tmp_path_factory.mktemp(request.param)
    jobs = [
        make_job(models, mixed_rows, root / f"{layout}-{method}-{split}", layout, method, *SPLITS[split])
        for layout, method in CASES
        for split in SPLITS
    ]
    run_jobs(request.param, jobs, root)
    return root


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("layout", "method"), CASES)
def test_two_processes_train_what_one_does(layout, method, split, one_process, two_processes):
    alone, together = one_process / f"{layout}-{method}", two_processes / f"{layout}-{method}-{split}"
    expected, found = losses_of(alone), losses_of(together)
    assert len(expected["loss"]) == 6  # two epochs of 8 + 8 + 3 rows
    assert found["supervised_tokens"] == expected["supervised_tokens"]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["eval_loss"], expected["eval_loss"], rtol=1e-5, atol=0)
    weights, reference = weights_of(together), weights_of(alone)
    torch.testing.assert_close(weights, reference, rtol=0, atol=1e-4)
    assert (together / ".complete").exists()
