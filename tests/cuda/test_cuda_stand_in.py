"""Training on CUDA without a GPU: PyTorch's CUDA build over a runtime whose kernels do nothing, with the CPU's numbers.

What it shows: crashes that only CUDA has, which attention kernels are taken, where the host waits for the device. What
it cannot show: what kernels compute, time, memory limits, NCCL, cuDNN, CUDA graphs, compiled code.

The environment is made once, in `.cuda_stand_in` (5.2 GB, two minutes). `pytest tests/cuda -m slow -k NAME -s` prints
what a run saw.
"""

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from architectures.case import Case
from launches import FIXTURES, ROOT
from tiny_models import save_layout
from transformers import AutoModelForImageTextToText

import tuning
from tuning.files import SHARDED_MODEL

HERE = Path(__file__).parent
ENVIRONMENT = ROOT / ".cuda_stand_in"
PYTHON = ENVIRONMENT / "bin" / "python"
MOST_WAITS = 12
"""Of the host for the device in a step: for its losses, and for what it logs. None grows with layers or pictures."""
FLASH, PACKED, MASKED = (
    "_scaled_dot_product_flash_attention bfloat16",
    "_varlen_attn_backward bfloat16",
    "_scaled_dot_product_efficient_attention_backward bfloat16",
)
LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "gradient_checkpointing": True}
HALF = {"fp16": True}
RUNS = {  # model, dtype of its checkpoint, options, how it is launched, kernels that must be taken
    "full": ("granite_vision", "bfloat16", {}, "", {FLASH, PACKED}),
    "LoRA, checkpointing": ("llava15", "bfloat16", LORA, "", {FLASH, PACKED}),
    "no compiler": ("mllama", "bfloat16", {}, "no compiler", {MASKED}),
    "fp16 of bfloat16": ("granite_vision", "bfloat16", HALF, "", {PACKED.replace("bfloat16", "float16")}),
    "fp16 of float16": ("llava15", "float16", HALF, "", {PACKED.replace("bfloat16", "float16")}),
    "FSDP2": ("granite_vision", "bfloat16", {}, "fsdp", {FLASH, PACKED}),
    "FSDP2, sharded": ("granite_vision", "bfloat16", {"save_steps": 2}, "fsdp sharded", {FLASH, PACKED}),
    "DDP": ("granite_vision", "bfloat16", {}, "ddp", {FLASH, PACKED}),
    "Qwen2.5-VL": ("qwen2_5_vl", "bfloat16", {}, "", {PACKED}),
    "Gemma 3": ("gemma3", "bfloat16", {}, "", {FLASH, MASKED}),
}
WAITS_OF_DDP = 8
"""In each of the first ten steps DDP times its own work."""
WAITS_OF_QWEN = 3
"""Its tower puts patches in the order of its windows, by indices on the CPU."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def stand_in():
    """The environment, made where it is missing or something that it is made of has changed."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("gcc"):
        pytest.skip("the CUDA stand-in needs Linux on x86-64 and gcc")
    parts = [*sorted(HERE.glob("*.[cs]*")), ROOT / "pyproject.toml"]
    made_of = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    stamp = ENVIRONMENT / "made_of"
    if not stamp.exists() or stamp.read_text() != made_of:
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        command = ["bash", HERE / "setup.sh", ENVIRONMENT]
        made = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True)
        if made.returncode:
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            pytest.skip(f"the CUDA stand-in cannot be made: {made.stderr.decode().strip().splitlines()[-1:]}")
        stamp.write_text(made_of)
    return PYTHON


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, rows):
    """Name and dtype → folder of the tiny model, and a file of rows for it."""

    @functools.cache
    def make(name: str, dtype: str) -> tuple[str, str]:
        root = tmp_path_factory.mktemp(f"{name}-{dtype}")
        if name not in ("qwen2_5_vl", "gemma3"):
            return str(save_layout(name, root, dtype=getattr(torch, dtype))), str(rows)
        folder = Case.make(name, root).folder
        AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(folder)
        return str(folder), str(folder / "rows.jsonl")

    return make


def find_fixture(launch: str) -> str | None:
    """The file of fixtures/ that two processes are launched with; None for one process."""
    return FIXTURES.get(launch.partition(" ")[0])


def train_on_stand_in(python: Path, folder: Path, options: dict, launch: str) -> list[dict]:
    """What each process saw."""
    folder.mkdir()
    (folder / "options.json").write_text(json.dumps(options | {"output_dir": str(folder / "out")}))
    command, fixture = [str(python)], find_fixture(launch)
    if fixture:
        command += ["-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
        command.append(f"--config_file={ROOT / 'fixtures' / fixture}")
        command += ["--fsdp_state_dict_type=SHARDED_STATE_DICT"] * launch.endswith("sharded")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NULL_CUDA_DEVICES": "2" if fixture else "1"}
    if launch == "no compiler":
        environment |= {"PATH": "", "TRITON_CACHE_DIR": str(folder / "triton")}
    command += [str(HERE / "run.py"), str(folder / "options.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(file.read_text()) for file in sorted(folder.glob("result-*.json"))]


def train_on_cpu(folder: Path, options: dict, launch: str) -> list[float]:
    """The losses of the same steps in this process, with as many rows in each."""
    size = options["per_device_train_batch_size"] * (2 if find_fixture(launch) else 1)
    changes = {"use_cpu": True, "output_dir": str(folder), "per_device_train_batch_size": size}
    if options.get("fp16"):
        changes |= {"fp16": False, "dtype": "float32"}
    tuning.train(options | changes)
    log = (folder / "training_logs.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, log) if "loss" in line]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_cuda_has_the_losses_of_the_cpu(name, stand_in, checkpoint, tmp_path):
    model, dtype, changes, launch, kernels = RUNS[name]
    folder, rows = checkpoint(model, dtype)
    options = {"model_name_or_path": folder, "training_data_path": rows, "max_steps": 3, "learning_rate": 1e-3}
    options |= {"per_device_train_batch_size": 4, "logging_steps": 1, "dataloader_num_workers": 0, "report_samples": 0}
    options |= changes
    results = train_on_stand_in(stand_in, tmp_path / "cuda", options, launch)
    assert len(results) == (2 if find_fixture(launch) else 1)
    assert (tmp_path / "cuda" / "out" / "checkpoint-2" / SHARDED_MODEL).is_dir() == launch.endswith("sharded")
    expected = train_on_cpu(tmp_path / "cpu", options, launch)
    for result in results:
        print(json.dumps(result, indent=1))
        assert result["losses"] == pytest.approx(expected, rel=1e-3)
        assert len(result["losses"]) == 3
        assert kernels <= result["attention"].keys()
        waits = Counter(result["waits"])
        if launch.endswith("sharded"):  # its last step is one that saves
            waits = Counter({place: n for place, n in waits.items() if not re.search("checkpointing|read_back", place)})
        allowed = MOST_WAITS + WAITS_OF_DDP * (launch == "ddp") + WAITS_OF_QWEN * (name == "Qwen2.5-VL")
        assert waits.total() <= allowed, waits


def test_waits_do_not_grow_with_layers_pictures_or_tokens(stand_in, checkpoint, tmp_path):
    folder, rows = checkpoint("granite_vision", "bfloat16")
    options = {"model_name_or_path": folder, "training_data_path": rows, "max_steps": 2, "logging_steps": 1}
    options |= {"dataloader_num_workers": 0, "report_samples": 0, "verify_save": False}
    seen = []
    for size in (1, 8):
        run = tmp_path / str(size)
        (result,) = train_on_stand_in(stand_in, run, options | {"per_device_train_batch_size": size}, "")
        seen.append(result["waits"])
    assert seen[0] == seen[1]


def test_predict_shares_the_layers_of_a_model_out_over_two_gpus(stand_in, checkpoint, tmp_path):
    folder, rows = checkpoint("llava15", "bfloat16")
    words = ["predict", "--model_name_or_path", folder, "--data_path", rows, "--max_new_tokens", "8", "--max_rows", "4"]
    runs = {"one": ["--accelerate_launch_args", '{"num_processes": 1}'], "two": ["--device_map", "balanced"]}
    answers = []
    for name, more in runs.items():
        command = [str(stand_in), str(HERE / "run.py"), *words, "--output", str(tmp_path / f"{name}.jsonl"), *more]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "NULL_CUDA_DEVICES": "2"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        assert ("The layers of the model are on cuda:0, cuda:1." in done.stdout) == (name == "two")
        lines = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        answers.append([line["prediction"] for line in lines])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 4
