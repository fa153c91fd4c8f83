"""Whatever ends a run early, the same command goes on and ends where an uninterrupted run does."""

import errno
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from child_runs import (
    HANGS,
    assert_same_run,
    final_weights,
    finish,
    kill,
    read_losses,
    run_in_child,
    small_disk,
    start_run,
)
from safetensors.torch import load_file

import tuning
from tuning import sft_trainer
from tuning.data import encode
from tuning.distributed.interruption import Interruption
from tuning.errors import RunEnded, UserError
from tuning.exit_codes import EXIT_STOPPED
from tuning.files import OPTIMIZER_FILE, STATE_FILE
from tuning.training import checkpoint_files, checkpointing
from tuning.training.checkpointing import ResumableTrainer
from tuning.training.trainer import SupervisedTrainer

# LoRA with dropout: data order, dropout, optimizer and schedule all have to be where they were.
LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_dropout": 0.3}
SHORT = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, "save_total_limit": 2}


@pytest.fixture(scope="module")
def whole(models, rows, tmp_path_factory):
    """The options of a run of six steps that nothing interrupts."""
    options = {
        "model_name_or_path": str(models["llava15"]),
        "training_data_path": str(rows),
        "output_dir": str(tmp_path_factory.mktemp("whole") / "out"),
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "report_samples": 0,
        **LORA,
        **SHORT,
    }
    tuning.train(options)
    return options


@pytest.fixture
def options(whole, tmp_path):
    return {**whole, "output_dir": str(tmp_path / "out")}


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner: object, name: str, count: int, *, after: bool = False):
    """Kill this process at the `count`-th call of a function, or just after it."""

    def prepare() -> None:
        function, calls = getattr(owner, name), []

        def counted(*args, **kwargs):
            calls.append(None)
            if len(calls) == count and not after:
                die()
            result = function(*args, **kwargs)
            if len(calls) == count:
                die()
            return result

        setattr(owner, name, counted)

    return prepare


def die_in_deletion(count: int):
    """Kill this process before the `count`-th folder that `checkpoint_files` deletes; others delete folders, too."""

    def prepare() -> None:
        checkpoint_files.shutil = SimpleNamespace(**vars(shutil))
        die_at(checkpoint_files.shutil, "rmtree", count)()

    return prepare


MOMENTS = {
    "in the first step": (die_at(SupervisedTrainer, "training_step", 1), None),
    "in a later step": (die_at(SupervisedTrainer, "training_step", 4), 2),
    "before the model is written": (die_at(ResumableTrainer, "_write_model", 2), 2),
    "before the optimizer is written": (die_at(ResumableTrainer, "_write_training_state", 2), 2),
    "with half of the optimizer written": (die_at(checkpointing, "_save_tensors", 4), 2),
    "before the last file": (die_at(ResumableTrainer, "_write_trainer_state", 2), 2),
    "before the checkpoint has its name": (die_at(checkpointing, "commit_checkpoint", 2), 2),
    "when the checkpoint has its name": (die_at(checkpointing, "commit_checkpoint", 2, after=True), 4),
    "before an old checkpoint is deleted": (die_in_deletion(1), 6),
    "when an old checkpoint is no longer one": (die_in_deletion(2), 6),
    "before the final model is saved": (die_at(ResumableTrainer, "save_final", 1), 6),
    "before the final model is in its place": (die_at(checkpointing, "move_into_place", 1), 6),
    "before the run is marked as complete": (die_at(checkpointing, "move_into_place", 1, after=True), 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_goes_on(moment, whole, options):
    prepare, continued = MOMENTS[moment]
    assert run_in_child(options, prepare)[0] == -signal.SIGKILL
    output_dir = Path(options["output_dir"])
    left = sorted(folder.name for folder in output_dir.glob(".*-checkpoint-*"))
    code, said = run_in_child(options)
    assert code == 0, said
    assert all(f"{output_dir / name} was not written completely and is ignored" in said for name in left)
    assert ("checkpoint-" in said) == (continued is not None)
    assert continued is None or f"checkpoint-{continued}" in said
    assert_same_run(options, whole)
    assert {folder.name for folder in output_dir.glob("*checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_kills_at_random_moments_change_nothing(workers, whole, tmp_path):
    long = {**whole, "max_steps": 600, "save_steps": 5, "dataloader_num_workers": workers}
    reference, options = ({**long, "output_dir": str(tmp_path / name / "out")} for name in ("reference", "killed"))
    for run in (reference, options):
        Path(run["output_dir"]).parent.mkdir()
    assert run_in_child(reference)[0] == 0
    chance, steps = random.Random(workers), []
    # Five of the twenty come as early as a run before was killed: at any moment of its start.
    logged = sorted([*(targets := chance.sample(range(1, 590), 15)), *chance.sample(targets, 5)])
    for target in logged:
        process = start_run(options)
        wait_for_log(process, options, target)
        time.sleep(chance.uniform(0, 0.3))
        kill(process)
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed twenty times"
        complete = [
            f for f in checkpoint_files.list_checkpoints(Path(options["output_dir"])) if checkpoint_files.is_complete(f)
        ]
        steps.append(int(complete[-1].name.split("-")[1]) if complete else 0)
    assert steps == sorted(steps)
    assert len(set(steps)) > 5  # they were killed all over the run
    assert run_in_child(options)[0] == 0
    assert_same_run(options, reference)


def wait_for_log(process, options: dict, step: int) -> None:
    """Wait until a run, or the one before it in the same folder, has logged a step."""
    log, deadline = Path(options["output_dir"], "training_logs.jsonl"), time.monotonic() + HANGS
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.is_alive(), (log.parents[1] / "run.log").read_text()
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.01)


def signal_itself(number: signal.Signals):
    """What prepares a run to be signalled in its third step."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
        step = SupervisedTrainer.training_step

        def signalled(trainer, *args, **kwargs):
            if trainer.state.global_step == 2:
                os.kill(os.getpid(), number)
            return step(trainer, *args, **kwargs)

        SupervisedTrainer.training_step = signalled

    return prepare


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(number, whole, options):
    code, said = run_in_child(options, signal_itself(number))
    assert code == EXIT_STOPPED
    assert f"Stopped by {number.name} after step 3 of 6" in said.splitlines()[-1]
    assert f"{options['output_dir']}/checkpoint-3 is complete. Run the same command again" in said
    assert not Path(options["output_dir"], ".complete").exists()
    assert run_in_child(options)[0] == 0
    assert_same_run(options, whole)


@pytest.mark.parametrize(
    ("save_steps", "kept"),
    [(2, "resume from {}/checkpoint-2."), (6, "start again: no checkpoint was written yet (save_steps).")],
)
def test_ctrl_c_ends_a_run_at_once_and_says_what_is_kept(save_steps, kept, options):
    code, said = run_in_child({**options, "save_steps": save_steps}, signal_itself(signal.SIGINT))
    assert code == 130
    assert said.splitlines()[-1] == f"Interrupted. The same command would {kept.format(options['output_dir'])}"


def test_a_second_run_in_the_same_place_is_refused_while_the_first_is_at_work(options, monkeypatch, capsys):
    process = start_run({**options, "max_steps": 10_000, "save_steps": 10_000})
    wait_for_log(process, options, 1)
    monkeypatch.setattr(checkpoint_files, "LOCK_PATIENCE", 1)
    with pytest.raises(RunEnded, match=f"Another run is still at work in {options['output_dir']}"):
        tuning.train(options)
    assert f"Another run is at work in {options['output_dir']}" in capsys.readouterr().out
    kill(process)
    assert tuning.train(options).global_step == 6


def test_a_run_does_not_go_on_from_what_another_has_done_meanwhile(options, monkeypatch):
    plan = sft_trainer.plan_model

    def plan_slowly(*args):
        monkeypatch.undo()
        tuning.train(options)
        return plan(*args)

    monkeypatch.setattr(sft_trainer, "plan_model", plan_slowly)
    with pytest.raises(RunEnded, match=r"Another run was at work in .* until now"):
        tuning.train(options)
    assert Path(options["output_dir"], ".complete").exists()


def test_a_signal_to_every_process_of_a_job_leaves_the_data_workers_their_work(whole, options):
    options = {**options, "dataloader_num_workers": 2, "max_steps": 300, "save_steps": 300}
    process = start_run(options)
    wait_for_log(process, options, 4)
    os.killpg(process.pid, signal.SIGTERM)
    code, said = finish(process, options)
    assert code == EXIT_STOPPED, said
    assert "Stopped by SIGTERM" in said.splitlines()[-1]


def test_a_time_limit_ends_a_run_in_time(whole, options):
    with pytest.raises(RunEnded, match="Stopped by save_before_walltime after step 1 of 6") as ended:
        tuning.train({**options, "save_before_walltime": 0.001})
    assert ended.value.exit_code == EXIT_STOPPED
    tuning.train(options)
    assert_same_run(options, whole)


def test_steps_that_are_done_open_no_image_again(options, monkeypatch):
    with pytest.raises(RunEnded):
        tuning.train({**options, "save_before_walltime": 0.001, "max_steps": 6})
    opened, load_image = [], encode.load_image
    monkeypatch.setattr(encode, "load_image", lambda *args: opened.append(args) or load_image(*args))
    tuning.train(options)
    first_rows, steps_left, batch = 4, 5, 2
    assert len(opened) == first_rows + steps_left * batch


def assert_nothing_is_broken(options: dict) -> None:
    output_dir = Path(options["output_dir"])
    assert [folder.name for folder in output_dir.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert checkpoint_files.is_complete(output_dir / "checkpoint-2")
    assert not (output_dir / ".complete").exists()


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(whole, tmp_path):
    with small_disk(tmp_path / "disk", megabytes=30) as disk:
        options = {**whole, "output_dir": str(disk / "out"), "save_total_limit": 5}

        def prepare() -> None:
            save = ResumableTrainer._write_model

            def fill(trainer, folder):
                if trainer.state.global_step == 4:
                    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
                save(trainer, folder)

            ResumableTrainer._write_model = fill

        code, said = run_in_child(options, prepare)
        assert code == 1
        assert "Traceback" not in said
        last = said.splitlines()[-1]
        assert "checkpoint-4: cannot be written: No space left on device" in last
        assert "save_total_limit" in last
        assert f"continues from {disk}/out/checkpoint-2" in last
        assert_nothing_is_broken(options)
        (disk / "filler").unlink()
        assert run_in_child(options)[0] == 0
        assert_same_run(options, whole)


@pytest.mark.parametrize("writer", ["_write_model", "_write_training_state", "_write_trainer_state"])
def test_a_file_that_cannot_be_written_leaves_the_checkpoint_before_it(writer, whole, options):
    def prepare() -> None:
        write = getattr(ResumableTrainer, writer)

        def limited(trainer, *args):
            if trainer.state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            try:
                write(trainer, *args)
            finally:  # the log is a file, too
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        setattr(ResumableTrainer, writer, limited)

    code, said = run_in_child(options, prepare)
    assert code == 1, said
    assert "checkpoint-4: cannot be written" in said
    assert_nothing_is_broken(options)
    assert run_in_child(options)[0] == 0
    assert_same_run(options, whole)


def test_a_read_only_output_is_named_before_anything_is_trained(whole, tmp_path):
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(UserError, match="cannot be written: Read-only file system"):
            tuning.train({**whole, "output_dir": str(disk / "out")})


def test_a_killed_data_worker_is_named(options):
    def prepare() -> None:
        encode_row = encode.Encoder.encode

        def killed(encoder, row):
            return die() if row.number == 9 else encode_row(encoder, row)

        encode.Encoder.encode = killed

    code, said = run_in_child({**options, "dataloader_num_workers": 1, "max_steps": 8}, prepare)
    assert_worker_is_named(code, said)


def test_a_data_worker_whose_end_the_system_tells_late_is_named_once(options):
    """Its connection is closed first. PyTorch's second error came while the run ended, and was taken for another."""

    def prepare() -> None:
        main, answer_challenge = os.getpid(), multiprocessing.connection.answer_challenge

        def reset(*args):
            if os.getpid() != main:
                return answer_challenge(*args)
            for worker in multiprocessing.active_children():
                threading.Timer(0.1, worker.kill).start()
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

        multiprocessing.connection.answer_challenge = reset

    code, said = run_in_child({**options, "dataloader_num_workers": 1}, prepare)
    assert_worker_is_named(code, said)
    assert "is killed by signal: Killed" in said.splitlines()[-1]


def test_a_data_worker_that_dies_during_a_save_is_not_taken_for_a_broken_checkpoint(options):
    """PyTorch raises its error wherever the main process is: here, where it reads a checkpoint back."""

    def prepare() -> None:
        read = checkpointing.find_tensor_fault

        def kill_worker_and_read(*args):
            for worker in multiprocessing.active_children():
                worker.kill()
            time.sleep(HANGS)  # until the system tells this process
            return read(*args)

        checkpointing.find_tensor_fault = kill_worker_and_read

    code, said = run_in_child({**options, "dataloader_num_workers": 1}, prepare)
    assert "is killed by signal: Killed" in said
    assert_worker_is_named(code, said)


def assert_worker_is_named(code: int, said: str) -> None:
    assert code == 1, said
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("Error: dataloader_num_workers: a process that reads data ")
    assert "use fewer workers" in last


def test_no_memory_is_explained_by_the_tokens_and_what_helps(options, monkeypatch):
    step = SupervisedTrainer.compute_loss

    def greedy(trainer, *args, **kwargs):
        torch.empty(2**60, dtype=torch.uint8)  # a real failure of the allocator
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(SupervisedTrainer, "compute_loss", greedy)
    with pytest.raises(UserError) as error:
        tuning.train({**options, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    words = str(error.value)
    assert "the CPU has no memory left in step 1, on batches of " in words
    helps = ["per_device_train_batch_size 2 with gradient_accumulation_steps 4", "gradient_checkpointing true"]
    places = [words.find(help) for help in [*helps, "a lower max_seq_length"]]
    assert -1 not in places
    assert places == sorted(places)


def test_gpu_memory_is_explained_too(options, monkeypatch):
    def greedy(trainer, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(SupervisedTrainer, "compute_loss", greedy)
    with pytest.raises(UserError, match=r"no memory left in step 1, on batches of [\d,]+ tokens"):
        tuning.train({**options, "per_device_train_batch_size": 1, "gradient_checkpointing": True})


def test_gradients_that_are_no_numbers_end_a_run_before_they_reach_the_weights(options, monkeypatch):
    def broken(trainer, *args, **kwargs):
        loss = compute_loss(trainer, *args, **kwargs)
        trained = next(p for p in trainer.model.parameters() if p.requires_grad)
        return loss + (trained.sum() * 0).sqrt() * 0  # its value is 0, its gradient 0 · ∞

    compute_loss = SupervisedTrainer.compute_loss
    monkeypatch.setattr(SupervisedTrainer, "compute_loss", broken)
    with pytest.raises(UserError, match=r"row \d+: the gradients became nan at step 1, before"):
        tuning.train(options)
    assert not list(Path(options["output_dir"]).glob("checkpoint-*"))


def test_the_only_complete_checkpoint_is_never_deleted(options, tmp_path):
    for name, complete in (("checkpoint-2", True), ("checkpoint-9", False)):
        (tmp_path / name).mkdir()
        if complete:
            (tmp_path / name / STATE_FILE).write_text("{}")
    checkpoint_files.remove_oldest(tmp_path, 1, keep=set())
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-9"]


def test_a_checkpoint_without_an_optimizer_is_said_to_have_none(options, capsys):
    tuning.train({**options, "save_only_model": True, "max_steps": 2})
    tuning.train({**options, "save_only_model": True, "max_steps": 4})
    assert "holds no state of the optimizer" in capsys.readouterr().out
    assert [step for step, _ in read_losses(options)] == [1, 2, 3, 4]
    lines = [json.loads(line) for line in Path(options["output_dir"], "training_logs.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "loss" in line][2] < 1e-3  # the schedule goes on


@pytest.mark.parametrize("changes", [{"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}])
def test_another_number_of_rows_a_step_is_refused_on_resume(changes, options):
    with pytest.raises(RunEnded):
        tuning.train({**options, "save_before_walltime": 0.001})
    with pytest.raises(UserError, match="× processes × gradient_accumulation_steps was 2, is 4"):
        tuning.train({**options, **changes})


def test_the_same_rows_in_other_batches_go_on(options):
    options = {**options, "lora_dropout": 0.0}
    reference = {**options, "output_dir": options["output_dir"] + "-reference"}
    tuning.train(reference)
    with pytest.raises(RunEnded):
        tuning.train({**options, "save_before_walltime": 0.001})
    tuning.train({**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})
    assert [step for step, _ in read_losses(options)] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(read_losses(options), read_losses(reference), rtol=1e-5, atol=1e-5)


BEST = {
    "eval_strategy": "steps",
    "load_best_model_at_end": True,
    "save_total_limit": 1,
    "lr_scheduler_type": "constant",
}


def test_a_stopped_run_keeps_its_last_checkpoint_beside_the_best(options, rows, monkeypatch):
    changes = {**BEST, "eval_steps": 1, "save_steps": 1, "validation_data_path": str(rows), "learning_rate": 0.5}
    monkeypatch.setattr(Interruption, "check", lambda interruption: "a test" if len(read_losses(options)) == 3 else "")
    with pytest.raises(RunEnded, match="checkpoint-4 is complete"):
        tuning.train({**options, **changes})
    left = {folder.name for folder in checkpoint_files.list_checkpoints(Path(options["output_dir"]))}
    state = json.loads(Path(options["output_dir"], "checkpoint-4", STATE_FILE).read_text())
    assert left == {"checkpoint-4", Path(state["best_model_checkpoint"]).name}
    assert len(left) == 2


def test_the_best_of_the_saved_models_is_the_final_one_where_a_better_was_not_saved(options, rows, monkeypatch):
    losses = {2: 3.0, 4: 2.0, 6: 1.0, 8: 4.0}

    def evaluate(trainer, *args, **kwargs):
        metrics = {"eval_loss": losses[trainer.state.global_step]}
        trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    monkeypatch.setattr(SupervisedTrainer, "evaluate", evaluate)
    changes = {**BEST, "eval_steps": 2, "save_steps": 4, "max_steps": 8, "validation_data_path": str(rows)}
    tuning.train({**options, **changes})
    folder = Path(options["output_dir"])
    expected = load_file(folder / "checkpoint-4" / "adapter_model.safetensors")
    found = final_weights(options)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_rates_that_are_new_on_resume_are_refused(options):
    full = {**options, "peft_method": None}
    full = {name: value for name, value in full.items() if name not in LORA} | {"peft_method": "none"}
    with pytest.raises(RunEnded):
        tuning.train({**full, "save_before_walltime": 0.001})
    with pytest.raises(UserError, match=r"has \d groups of parameters, this run has \d.*vision_tower_learning_rate"):
        tuning.train({**full, "vision_tower_learning_rate": 1e-5})


def test_memory_that_the_optimizer_lacks_is_explained(options, monkeypatch):
    def greedy(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", greedy)
    with pytest.raises(UserError, match="no memory left in step 1, on batches of"):
        tuning.train(options)


def test_a_checkpoint_whose_optimizer_goes_by_number_alone_goes_on(whole, options):
    with pytest.raises(RunEnded):
        tuning.train({**options, "save_before_walltime": 0.001})
    file = Path(options["output_dir"], "checkpoint-1", OPTIMIZER_FILE)
    state = torch.load(file)
    del state["names"]  # as the stock trainer writes it
    torch.save(state, file)
    tuning.train(options)
    assert_same_run(options, whole)


def test_an_optimizer_of_other_parameters_is_refused(options):
    with pytest.raises(RunEnded):
        tuning.train({**options, "save_before_walltime": 0.001})
    file = Path(options["output_dir"], "checkpoint-1", OPTIMIZER_FILE)
    state = torch.load(file)
    state["names"][0] = "another"
    torch.save(state, file)
    with pytest.raises(UserError, match="holds the state of other parameters than are trained now"):
        tuning.train(options)
