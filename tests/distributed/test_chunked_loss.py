"""A loss in many chunks, a different number on each of two processes, with heads of their own and tied ones."""

import json
from pathlib import Path

import pytest
import torch
from child_runs import final_weights
from launches import outcomes, run_jobs

import tuning

FORTY_POSITIONS = {"tuning.model.loss.MAX_LOGITS": 20_000}  # of a vocabulary of about 500
LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_dropout": 0.0}
METHODS = {"full": {}, "lora": LORA, "all tokens": {"assistant_only_loss": False}}
CASES = {f"{layout} {method}": (layout, method) for layout in ("granite_vision", "llava15") for method in METHODS}


@pytest.fixture(scope="module")
def short_and_long(rows):
    """Sixteen rows: of eight that make a step, the first process gets four of a word, and the other long ones; then
    the other way round.
    """
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["messages"][1]["content"] = "Red." if number < 4 or number >= 12 else "Red, and then green. " * 12
    path = rows.with_name("short_and_long.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_job(models, rows, folder: Path, case: str, size: int) -> dict:
    layout, method = CASES[case]
    options = {"model_name_or_path": str(models[layout]), "training_data_path": str(rows)}
    options |= {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    options |= {"output_dir": str(folder), "save_strategy": "no", "dataloader_num_workers": 0, "report_samples": 0}
    return options | {"per_device_train_batch_size": size} | METHODS[method]


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_processes(request, tmp_path_factory, models, short_and_long):
    root = tmp_path_factory.mktemp(f"chunks-{request.param}")
    jobs = [make_job(models, short_and_long, root / case, case, 4) | {"constants": FORTY_POSITIONS} for case in CASES]
    run_jobs(request.param, jobs, root)
    return root


@pytest.mark.parametrize("case", CASES)
def test_two_processes_in_chunks_train_what_one_does_at_once(case, two_processes, models, short_and_long, tmp_path):
    alone = tuning.train(make_job(models, short_and_long, tmp_path / "alone", case, 8)).model_dir
    assert outcomes(two_processes / case) == ["done", "done"]
    weights = [final_weights({"output_dir": folder}) for folder in (two_processes / case, alone)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
