"""A loss in many chunks, a different number on each of two processes, with a head that is tied to the embeddings."""

from pathlib import Path

import pytest
import torch
from launches import outcomes, run_jobs
from safetensors.torch import load_file

import tuning

FEW_POSITIONS = {"tuning.training.loss.LOGITS_AT_ONCE": 5000}
CASES = {"all tokens": {"assistant_only_loss": False}, "answers": {}}


def make_job(models, rows, folder: Path, case: str, size: int) -> dict:
    options = {"model_name_or_path": str(models["granite_vision"]), "training_data_path": str(rows)}
    options |= {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    options |= {"output_dir": str(folder), "save_strategy": "no", "dataloader_num_workers": 0, "report_samples": 0}
    return options | {"per_device_train_batch_size": size} | CASES[case]


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_processes(request, tmp_path_factory, models, mixed_rows):
    root = tmp_path_factory.mktemp(f"chunks-{request.param}")
    jobs = [make_job(models, mixed_rows, root / case, case, 4) | {"constants": FEW_POSITIONS} for case in CASES]
    run_jobs(request.param, jobs, root)
    return root


@pytest.mark.parametrize("case", CASES)
def test_two_processes_in_chunks_train_what_one_does_at_once(case, two_processes, models, mixed_rows, tmp_path):
    alone = tuning.train(make_job(models, mixed_rows, tmp_path / "alone", case, 8)).model_dir
    assert outcomes(two_processes / case) == ["done", "done"]
    weights = [load_file(folder / "model.safetensors") for folder in (two_processes / case, alone)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
