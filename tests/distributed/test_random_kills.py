"""Two processes, of which one or both are killed at random moments: the same command ends where a whole run does."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from child_runs import assert_same_run
from two_processes import finish_two, kill_one, start_two

from tuning.training.checkpoint_files import is_complete, list_checkpoints

pytestmark = pytest.mark.slow
KILLS, STEPS = 20, 200
DDP = {"FSDP_VERSION": "", "ACCELERATE_USE_FSDP": "false"}


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [("DDP", DDP), ("FSDP", {}), ("FSDP, sharded", {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"})],
)
def test_twenty_kills_of_one_process_or_both_change_nothing(
    strategy, settings, fsdp_settings, models, mixed_rows, tmp_path
):
    options = {
        "model_name_or_path": str(models["llava15"]),
        "training_data_path": str(mixed_rows),
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "save_steps": 5,
        "save_total_limit": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "dataloader_num_workers": 0,
        "report_samples": 0,
        "use_cpu": True,
    }
    chance, settings = random.Random(strategy), fsdp_settings | settings
    runs = {name: {**options, "output_dir": str(tmp_path / name / "out")} for name in ("whole", "killed")}

    def start(name: str):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "options.json").write_text(json.dumps(runs[name]))
        return start_two(["train", str(folder / "options.json")], folder, settings)

    assert finish_two(start("whole")) == [0, 0]
    begun = []
    for target in sorted(chance.choices(range(1, STEPS - 5), k=KILLS)):
        processes = start("killed")
        wait_for_step(processes, tmp_path / "killed", target)
        time.sleep(chance.uniform(0, 0.3))
        for process in (victims := chance.choice([processes[:1], processes[1:], processes])):
            kill_one(process)
        began = time.monotonic()
        codes = finish_two(processes, seconds=30)
        assert None not in codes, "the other process waits"
        assert time.monotonic() - began < 30
        assert [process.exitcode for process in victims] == [-signal.SIGKILL] * len(victims)
        begun.append(last_complete(tmp_path / "killed" / "out"))
    assert begun == sorted(begun)
    assert len(set(begun)) > 5  # they were killed all over the run
    assert finish_two(start("killed")) == [0, 0], (tmp_path / "killed" / "rank-0.log").read_text()[-3000:]
    assert_same_run(runs["killed"], runs["whole"])


def wait_for_step(processes, folder: Path, step: int) -> None:
    """Until this step is logged, by this run or by one before it, and this run trains.

    Before that its processes find each other: one that is alone then waits as long as PyTorch does, unless a launcher
    ends it.
    """
    log, began, until = folder / "out" / "training_logs.jsonl", time.time(), time.monotonic() + 120
    while not (log.exists() and log.stat().st_mtime > began and f'"step": {step},' in log.read_text()):
        assert all(process.is_alive() for process in processes), (folder / "rank-0.log").read_text()[-3000:]
        assert time.monotonic() < until, "the run hangs"
        time.sleep(0.01)


def last_complete(output_dir: Path) -> int:
    complete = [folder for folder in list_checkpoints(output_dir) if is_complete(folder)]
    return max((int(folder.name.split("-")[1]) for folder in complete), default=0)
