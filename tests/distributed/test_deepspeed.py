"""DeepSpeed ZeRO-3 through accelerate, where DeepSpeed is installed; it builds an operator at its first start."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from launches import ROOT
from transformers import AutoModelForImageTextToText

import tuning

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed."),
]


def test_zero3_trains_and_continues_what_one_process_does(models, mixed_rows, tmp_path):
    options = {
        "model_name_or_path": str(models["granite_vision"]),
        "training_data_path": str(mixed_rows),
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "report_samples": 0,
    }
    alone = tuning.train({**options, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 8}).model_dir
    fixture = (ROOT / "fixtures" / "accelerate_deepspeed_zero3.yaml").read_text()
    (tmp_path / "zero3.yaml").write_text(fixture.replace("mixed_precision: bf16", 'mixed_precision: "no"'))
    together = tmp_path / "two"
    changes = {"output_dir": str(together), "per_device_train_batch_size": 4, "use_cpu": True}
    (tmp_path / "config.json").write_text(json.dumps({**options, **changes}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
    command += ["--config_file", str(tmp_path / "zero3.yaml"), str(ROOT / "tuning" / "sft_trainer.py")]
    for interrupted in (False, True):
        if interrupted:  # as after its checkpoint of step 2
            (together / ".complete").unlink()
            (together / "checkpoint-4" / "trainer_state.json").unlink()
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [*command, str(tmp_path / "config.json")], env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("Continuing from" in done.stdout) == interrupted
        weights, expected = (
            dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters()) for folder in (together, alone)
        )
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-4)
