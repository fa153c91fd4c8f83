"""What one process meets, all of them end for, with one message; and launchers whose processes die."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from launches import ROOT, outcomes, run_jobs

from tuning.training.checkpoint_files import is_complete, list_checkpoints

SHORT = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "dataloader_num_workers": 0, "optim": "sgd"}
SHORT |= {"report_samples": 0}
SCRIPT = str(ROOT / "tuning" / "sft_trainer.py")


@pytest.fixture(scope="module")
def make_job(models, mixed_rows):
    def make(folder: Path, **changes) -> dict:
        return {
            "model_name_or_path": str(models["granite_vision"]),
            "training_data_path": str(mixed_rows),
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            **SHORT,
            **changes,
        }

    return make


@pytest.fixture(scope="module")
def bad_rows(mixed_rows, tmp_path_factory):
    """Rows of which number 10 is bad: in sequential order it is the second process's in the third step."""
    lines = mixed_rows.read_text().splitlines()
    lines[10] = lines[10].replace('"assistant"', '"wizard"')
    file = mixed_rows.parent / "bad.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def many_bad_rows(mixed_rows):
    """Rows of which 12 of 19 are bad: more than half of all, fewer than half of all on each of two processes."""
    lines = mixed_rows.read_text().splitlines()
    for number in range(4, 16):
        lines[number] = lines[number].replace('"assistant"', '"wizard"')
    file = mixed_rows.parent / "many_bad.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module", params=[pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def ended(request, make_job, bad_rows, many_bad_rows, tmp_path_factory):
    """Folder with runs of which one process met a fault, and runs that go on after it."""
    root = tmp_path_factory.mktemp(f"faults-{request.param}")
    bad = {"training_data_path": str(bad_rows), "train_sampling_strategy": "sequential"}
    jobs = [
        make_job(root / "whole"),
        make_job(root / "nan", fault={"rank": 1, "kind": "nan"}),
        make_job(root / "row", **bad),
        make_job(root / "validation", validation_data_path=str(bad_rows), eval_strategy="steps", eval_steps=1),
        make_job(root / "signal", fault={"rank": 1, "kind": "signal"}),
        make_job(root / "signal"),
        make_job(root / "disk", fault={"rank": 0, "kind": "disk"}),
        make_job(root / "disk"),
        make_job(root / "few bad", **bad, on_bad_row="skip", max_bad_fraction=0.1),
        make_job(root / "frozen", fault={"rank": 1, "kind": "frozen"}, freeze_vision_tower=True),
        make_job(root / "many bad", training_data_path=str(many_bad_rows), on_bad_row="skip", max_bad_fraction=0.5),
        make_job(root / "save", fault={"rank": 0, "kind": "save"}),
    ]
    (root / "printed").write_text(run_jobs(request.param, jobs[:5] + jobs[6:7] + jobs[8:], root))
    first = {name: outcomes(root / name) for name in ("nan", "row", "validation", "signal", "disk")}
    left = {name: [f.name for f in list_checkpoints(root / name) if is_complete(f)] for name in first}
    run_jobs(request.param, [jobs[5], jobs[7]], root)
    return root, first, left


def test_a_number_that_is_none_ends_all_and_names_the_rows_of_its_process(ended):
    _, first, left = ended
    assert first["nan"][0] == "RunEnded: "
    assert first["nan"][1].startswith("UserError: ")
    assert "the loss became nan at step 3, before the optimizer's step" in first["nan"][1]
    assert left["nan"] == ["checkpoint-2"]


def test_a_bad_row_ends_all_and_is_named_once(ended):
    _, first, _ = ended
    assert first["row"][0] == "RunEnded: "
    assert "bad.jsonl, row 10, field 'messages'" in first["row"][1]


def test_a_bad_validation_row_ends_all_and_is_named_once(ended):
    _, first, _ = ended
    assert sorted(words.partition(":")[0] for words in first["validation"]) == ["RunEnded", "UserError"]
    assert "bad.jsonl, row 10" in "".join(first["validation"])


def test_a_signal_to_one_process_stops_all_after_the_same_step(ended):
    root, first, left = ended
    assert all("after step 3 of 6" in words for words in first["signal"])
    assert "Stopped by SIGTERM" in first["signal"][1]
    assert left["signal"] == ["checkpoint-2", "checkpoint-3"]
    assert losses(root / "signal") == pytest.approx(losses(root / "whole"), rel=1e-6)
    assert outcomes(root / "signal") == ["done", "done"]


def test_a_full_disk_of_the_process_that_writes_ends_all(ended):
    root, first, left = ended
    assert "checkpoint-4: cannot be written: No space left on device" in first["disk"][0]
    assert first["disk"][1] == "RunEnded: "
    assert left["disk"] == ["checkpoint-2"]
    assert losses(root / "disk") == pytest.approx(losses(root / "whole"), rel=1e-6)


def test_bad_rows_are_counted_over_all_processes(ended):
    root, _, _ = ended
    assert outcomes(root / "few bad") == ["done", "done"]
    lines = [json.loads(line) for line in (root / "few bad" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [10]
    assert all("of 19 rows are bad, more than max_bad_fraction 0.5" in words for words in outcomes(root / "many bad"))


def test_a_saved_model_that_is_not_the_trained_one_ends_all(ended):
    root, _, _ = ended
    first, second = outcomes(root / "save")
    assert re.search(r"RunEnded: The model saved in .*save is not the one .*: 1 of \d+ tensors differ, by up to", first)
    assert second == "RunEnded: "
    assert not (root / "save" / ".complete").exists()


def test_all_check_themselves_and_end_where_one_has_moved_a_frozen_part(ended):
    root, _, _ = ended
    assert (
        "Self-check: training moves the vision tower and the projector and the language model."
        in (root / "printed").read_text()
    )
    first, second = outcomes(root / "frozen")
    assert first == "RunEnded: "
    assert "the vision tower is frozen, but changed in step 1 (first: " in second


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "training_logs.jsonl").read_text().splitlines()]


class Launched:
    """A command that starts two processes, and what it prints."""

    def __init__(self, command: list[str], folder: Path):
        self.log, self.started = folder / "log", list[psutil.Process]()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        self.started = sorted((c for c in children if SCRIPT in c.cmdline()), key=lambda child: child.environ()["RANK"])
        return self.started

    def finish(self, timeout: float = 400) -> tuple[int, str]:
        try:
            code = self.process.wait(timeout)
        finally:
            self.process.kill()
            for process in self.started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        return code, self.log.read_text()


def wait_for_step(folder: Path, step: int) -> None:
    log, until = folder / "training_logs.jsonl", time.monotonic() + 400
    while not (log.exists() and len(log.read_text().splitlines()) >= step):
        assert time.monotonic() < until, "training does not begin"
        time.sleep(0.1)


@pytest.fixture
def train(make_job, tmp_path):
    """Start `vlm-tuning train` on two processes."""

    def start(**changes) -> Launched:
        options = make_job(tmp_path / "out", accelerate_launch_args={"num_processes": 2}, **changes)
        (tmp_path / "config.json").write_text(json.dumps(options))
        return Launched([sys.executable, "-m", "tuning.cli", "train", str(tmp_path / "config.json")], tmp_path)

    return start


def test_vlm_tuning_train_starts_the_processes_and_marks_the_end(train, tmp_path):
    code, said = train().finish()
    assert code == 0, said
    assert said.count("Done: ") == 1
    assert "Batches are padding-free." in said
    assert "FSDP needs GPUs, and there are none" in said
    assert (tmp_path / "out" / ".complete").exists()


def test_an_error_of_a_process_is_one_message_and_exit_code_1(train, bad_rows):
    code, said = train(training_data_path=str(bad_rows), train_sampling_strategy="sequential").finish()
    assert code == 1
    assert "Traceback" not in said
    assert said.count("Error: ") == 1
    assert "bad.jsonl, row 10, field 'messages'" in said.splitlines()[-1]


def test_a_signal_to_the_launcher_saves_and_stops_all(train, tmp_path):
    launched = train(max_steps=100_000, save_steps=100_000)
    wait_for_step(tmp_path / "out", 3)
    launched.process.send_signal(signal.SIGTERM)
    code, said = launched.finish()
    assert code == 143
    assert "Traceback" not in said
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    assert f"{checkpoint} is complete. Run the same command again to continue." in said


def test_ctrl_c_ends_all_and_one_says_what_is_kept(train, tmp_path):
    launched = train(max_steps=100_000, save_steps=100_000)
    wait_for_step(tmp_path / "out", 3)
    for process in (launched.process, *launched.ranks()):  # a terminal sends it to all
        process.send_signal(signal.SIGINT)
    code, said = launched.finish()
    assert code == 130, said
    assert "Traceback" not in said
    assert said.count("Interrupted. The same command would start again: no checkpoint was written yet") == 1


def test_a_process_that_dies_is_named_and_the_others_end(train, tmp_path):
    launched = train(max_steps=100_000, save_steps=100_000)
    wait_for_step(tmp_path / "out", 3)
    victim = launched.ranks()[1]
    victim.kill()
    code, said = launched.finish()
    assert code == 203
    # Whoever notices first says so: the other process, by its lost connection, or the launcher, which then ends it.
    assert re.search(
        rf"process 1 \(pid {victim.pid}\) (is gone|was ended by SIGKILL)\. Often the machine has run", said
    )
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_after_the_time_out(train, tmp_path):
    launched = train(max_steps=100_000, save_steps=100_000, ddp_timeout=5)
    wait_for_step(tmp_path / "out", 3)
    launched.ranks()[1].suspend()
    started = time.monotonic()
    code, said = launched.finish(90)
    assert time.monotonic() - started < 60  # 5 s, and torchrun's 30 s before it kills what does not end
    assert code == 203
    assert re.search(r"no answer: process 1 \(pid \d+\) is stopped\. .*Timed out waiting 5000ms", said)


def test_accelerate_launch_with_the_fixture(make_job, tmp_path):
    flags = [f"--{name}={value}" for name, value in make_job(tmp_path / "out").items()]
    fixture = str(ROOT / "fixtures" / "accelerate_fsdp_defaults.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
    code, said = Launched([*command, "--config_file", fixture, SCRIPT, *flags, "--use_cpu=true"], tmp_path).finish()
    assert code == 0, said
    assert (tmp_path / "out" / ".complete").exists()
