"""Hybrid FSDP2: four processes, two copies of the model that two of them shard, train what one process trains."""

import json
from pathlib import Path

import pytest
import torch
from launches import outcomes, run_jobs
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import tuning
from tuning.files import SHARDED_MODEL, SHARDED_OPTIMIZER
from tuning.training.checkpoint_files import list_checkpoints

pytestmark = pytest.mark.slow
LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_dropout": 0.0}
METHODS = {"full": {}, "lora": LORA}
COMMON = {"optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "max_steps": 6, "save_steps": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, models, mixed_rows):
    """Folder with each method's run on `one` process and on four, and with one that continues from its middle."""
    root = tmp_path_factory.mktemp("hybrid")

    def job(name: str, size: int, **changes) -> dict:
        options = {"model_name_or_path": str(models["llava15"]), "training_data_path": str(mixed_rows)}
        options |= {"output_dir": str(root / name), "per_device_train_batch_size": size, "use_cpu": True}
        options |= {"max_images_per_sample": 1, "dataloader_num_workers": 0, "report_samples": 0}
        return {**options, **COMMON, **changes}

    jobs = [job(f"four {method}", 2, **changes) for method, changes in METHODS.items()]
    middle = str(root / "four full" / "checkpoint-3")
    jobs.append(job("four continued", 2, resume_from_checkpoint=middle))
    jobs.append(job("four half", 2, dtype="bfloat16", optim="adamw_torch", max_steps=1, save_steps=1))
    (root / "printed").write_text(run_jobs("hybrid", jobs, root))
    for method, changes in METHODS.items():
        tuning.train(job(f"one {method}", 8, **changes))
    return root


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("method", METHODS)
def test_four_processes_train_what_one_does(runs, method):
    assert outcomes(runs / f"four {method}", 4) == ["done"] * 4
    assert losses(runs / f"four {method}") == pytest.approx(losses(runs / f"one {method}"), rel=1e-5)
    assert (runs / f"four {method}" / ".complete").exists()


def test_a_run_continues_from_a_sharded_checkpoint(runs):
    assert (list_checkpoints(runs / "four full")[0] / SHARDED_MODEL).is_dir()
    assert outcomes(runs / "four continued", 4) == ["done"] * 4
    assert losses(runs / "four continued") == pytest.approx(losses(runs / "one full")[3:], rel=1e-5)


def stored_numbers(folder: Path) -> dict[torch.dtype, int]:
    """How many numbers of each dtype the tensors of a sharded folder have, but for the counts of steps."""
    found: dict[torch.dtype, int] = {}
    for tensor in FileSystemReader(folder).read_metadata().state_dict_metadata.values():
        if isinstance(tensor, TensorStorageMetadata) and tensor.size:
            dtype = tensor.properties.dtype
            found[dtype] = found.get(dtype, 0) + tensor.size.numel()
    return found


def test_a_sharded_checkpoint_has_the_bytes_of_the_page(runs):
    """docs/plan-a-large-run.md: trained weights and two averages in float32, frozen weights in 16 bits."""
    assert outcomes(runs / "four half", 4) == ["done"] * 4
    (checkpoint,) = list_checkpoints(runs / "four half")
    model, optimizer = (stored_numbers(checkpoint / name) for name in (SHARDED_MODEL, SHARDED_OPTIMIZER))
    assert set(model) == {torch.float32, torch.bfloat16}
    assert optimizer == {torch.float32: 2 * model[torch.float32]}
