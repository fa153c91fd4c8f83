"""A frozen vision tower on two processes, which have different numbers of images at every step."""

from pathlib import Path

import pytest
import torch
from launches import outcomes, run_jobs
from safetensors.torch import load_file
from tiny_models import IMAGE_SIZE

import tuning

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_dropout": 0.0}
# Chunks of two tiles, so that the processes would run their layers a different number of times.
TWO_TILES = {"tuning.model.vision_tower.CHUNK_PIXELS": 2 * IMAGE_SIZE**2}
COMMON = {"constants": TWO_TILES, "optim": "sgd", "learning_rate": 0.1, "save_strategy": "no"}
COMMON |= {"dataloader_num_workers": 0, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
CASES = {
    "lora": ("granite_vision", LORA),
    "lora checkpointed": ("llava_next_vicuna", LORA | {"gradient_checkpointing": True}),
    "full": ("granite_vision", {"freeze_vision_tower": True}),
    "cached": ("granite_vision", LORA),
}


def make_job(models, rows, folder: Path, case: str, size: int) -> dict:
    layout, changes = CASES[case]
    options = {"model_name_or_path": str(models[layout]), "training_data_path": str(rows), "output_dir": str(folder)}
    return options | {"per_device_train_batch_size": size} | COMMON | changes


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_processes(request, tmp_path_factory, models, mixed_rows):
    root = tmp_path_factory.mktemp(request.param)
    jobs = [make_job(models, mixed_rows, root / case, case, 4) for case in CASES]
    jobs[-1]["cache_vision_features"] = str(root / "features")
    run_jobs(request.param, jobs, root)
    return root


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_a_frozen_tower_train_what_one_does(case, two_processes, models, mixed_rows, tmp_path):
    if case == "cached" and two_processes.name.startswith("fsdp"):
        assert all("FSDP and DeepSpeed need every process" in text for text in outcomes(two_processes / case))
        assert not (two_processes / "features").exists()
        return
    job = make_job(models, mixed_rows, tmp_path / "alone", case, 8)
    del job["constants"]
    alone = tuning.train(job).model_dir
    assert outcomes(two_processes / case) == ["done", "done"]
    torch.testing.assert_close(weights_of(two_processes / case), weights_of(alone), rtol=0, atol=1e-5)
    if case == "cached":
        assert list((two_processes / "features").rglob("*.safetensors"))
