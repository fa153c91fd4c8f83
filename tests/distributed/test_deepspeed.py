"""Two processes under DeepSpeed ZeRO-3, on the CPU, train the very model that one process trains.

DeepSpeed is installed once, beside the other packages, into `.deepspeed` (25 MB). At its first start it builds an
operator there, which takes half a minute.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child_runs import final_weights
from launches import DEEPSPEED, EXAMINED, LORA, outcomes, run_jobs

import tuning

pytestmark = pytest.mark.slow

# deepspeed, and what it imports that we do not; none of them may bring another PyTorch.
PACKAGES = (
    "deepspeed==0.19.8",
    "einops==0.8.2",
    "hjson==3.1.0",
    "msgpack==1.2.4",
    "ninja==1.13.2",
    "py-cpuinfo==9.0.0",
)
FORTY_POSITIONS = {"constants": {"tuning.model.loss.MAX_LOGITS": 20_000}}  # of a vocabulary of about 500
# In sequential order the first process has text only where the second has images, and the other way round.
ARRANGED = {"train_sampling_strategy": "sequential"}
CASES = {
    "full": ("granite_vision", FORTY_POSITIONS | EXAMINED | ARRANGED),
    "tied head": ("llava15", FORTY_POSITIONS | EXAMINED),
    "lora": ("llava15", FORTY_POSITIONS | LORA),
    "cross attention": ("mllama", EXAMINED),
    "cross attention lora": ("mllama", LORA | ARRANGED),
    "padded, checkpointed": ("granite_vision", {"padding_free": False, "gradient_checkpointing": True}),
    "frozen": ("granite_vision", {"freeze_vision_tower": True, "projector_learning_rate": 0.01}),
}
FAULTY = {
    "nan": {"fault": {"rank": 1, "kind": "nan"}},
    "moved": {"fault": {"rank": 1, "kind": "frozen"}, "freeze_vision_tower": True},
    "save": {"fault": {"rank": 0, "kind": "save"}},
    "stopped": {"fault": {"rank": 1, "kind": "signal"}},
    "stopped lora": {"fault": {"rank": 1, "kind": "signal"}, **LORA},
}
SAVED = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 4}
RESUMED = ("stopped", "stopped lora")


@pytest.fixture(scope="module")
def deepspeed():
    """DeepSpeed in `.deepspeed`, made where it is missing or where another version is wanted."""
    if not shutil.which("g++"):
        pytest.skip("DeepSpeed builds an operator, and there is no g++.")
    stamp, made_of = DEEPSPEED / "made_of", "\n".join([sys.version, torch.__version__, *PACKAGES])
    if stamp.exists() and stamp.read_text() == made_of:
        return
    shutil.rmtree(DEEPSPEED, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    command = [*pip, "--target", str(DEEPSPEED), *PACKAGES]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if made.returncode:
        shutil.rmtree(DEEPSPEED, ignore_errors=True)
        pytest.skip(f"DeepSpeed cannot be installed: {made.stderr.strip().splitlines()[-1:]}")
    stamp.write_text(made_of)


def make_job(models, rows, folder: Path, size: int, layout: str = "granite_vision", **changes) -> dict:
    return {
        "model_name_or_path": str(models[layout]),
        "training_data_path": str(rows),
        "validation_data_path": str(rows),
        "output_dir": str(folder),
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_samples": 0,
        **changes,
    }


@pytest.fixture(scope="module")
def two_processes(deepspeed, models, mixed_rows, tmp_path_factory):
    """The folder of the runs, and what they printed. Those that were stopped go on in processes of their own."""
    root = tmp_path_factory.mktemp("zero3")
    jobs = {
        name: make_job(models, mixed_rows, root / name, 4, layout, **changes)
        for name, (layout, changes) in CASES.items()
    }
    jobs |= {name: make_job(models, mixed_rows, root / name, 4, **SAVED, **changes) for name, changes in FAULTY.items()}
    printed = run_jobs("zero3", list(jobs.values()), root)
    ends = {name: outcomes(root / name) for name in FAULTY}
    printed += run_jobs("zero3", [jobs[name] | {"fault": None} for name in RESUMED], root)
    return root, printed, ends


def read_log(folder: Path) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "eval_loss", "eval_token_f1", "supervised_tokens")
    lines = [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in names if name in line} for line in lines]


def assert_same_run(folder: Path, expected: Path) -> None:
    weights, reference = (final_weights({"output_dir": one}) for one in (folder, expected))
    torch.testing.assert_close(weights, reference, rtol=0, atol=1e-5)
    assert read_log(folder) == [pytest.approx(line, rel=1e-4) for line in read_log(expected)]


@pytest.mark.parametrize("case", CASES)
def test_zero3_trains_and_answers_as_one_process_does(case, two_processes, models, mixed_rows, tmp_path, capsys):
    folder, (layout, changes) = two_processes[0] / case, CASES[case]
    options = {name: value for name, value in changes.items() if name != "constants"}
    tuning.train(make_job(models, mixed_rows, tmp_path / "one", 8, layout, **options))
    assert outcomes(folder) == ["done", "done"]
    assert_same_run(folder, tmp_path / "one")
    if "report_samples" in changes:
        answers, expected = ((one / "sample_predictions.jsonl").read_text() for one in (folder, tmp_path / "one"))
        assert answers == expected
        assert {line["step"] for line in map(json.loads, answers.splitlines())} == {0, 3, 4}
    lines = [line for line in capsys.readouterr().out.splitlines() if "Self-check" in line or " back: " in line]
    assert len(lines) == 2
    for line in lines:
        assert line.replace(str(tmp_path / "one"), str(folder)) in two_processes[1]


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_was_stopped_goes_on(case, two_processes, models, mixed_rows, tmp_path):
    root, printed, ends = two_processes
    assert all("Stopped by" in end and "after step 3 of 4" in end for end in ends[case])
    assert f"Continuing from {root / case / 'checkpoint-3'}" in printed
    assert outcomes(root / case) == ["done", "done"]
    options = {name: value for name, value in FAULTY[case].items() if name != "fault"}
    tuning.train(make_job(models, mixed_rows, tmp_path / "one", 8, **SAVED, **options))
    assert_same_run(root / case, tmp_path / "one")


def test_a_loss_that_is_no_number_ends_the_run(two_processes):
    first, second = two_processes[2]["nan"]
    assert first == "RunEnded: "
    assert "the loss became nan at step 3" in second


def test_a_frozen_weight_that_moved_ends_the_run(two_processes):
    first, second = two_processes[2]["moved"]
    assert first == "RunEnded: "
    assert "self-check: the vision tower is frozen, but changed in step 1" in second


def test_a_saved_model_that_is_not_the_trained_one_ends_the_run(two_processes):
    first, second = two_processes[2]["save"]
    assert "is not the one that was trained: 1 of" in first
    assert second == "RunEnded: "
