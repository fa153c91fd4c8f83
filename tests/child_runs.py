"""Runs in child processes that can be killed, and places on disk that run full."""

import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tqdm.std import tqdm

from tuning import sft_trainer

HANGS = 600  # seconds after which a run is taken for one that hangs
FORK = multiprocessing.get_context("fork")  # what is imported here need not be imported again in every child


def start_run(options: dict, prepare: Callable[[], None] = lambda: None) -> multiprocessing.Process:
    """Start `sft_trainer.py` with options in a child, after `prepare` in there; its output goes to run.log."""
    folder = Path(options["output_dir"]).parent
    config = folder / f"{Path(options['output_dir']).name}.json"
    config.write_text(json.dumps(options))

    def child() -> None:
        os.setsid()  # a group of its own: killing it takes its data workers along
        sys.stdout = sys.stderr = open(folder / "run.log", "w", buffering=1)  # noqa: SIM115
        faulthandler.register(signal.SIGQUIT, file=sys.stderr)
        torch.set_num_threads(1)
        give_progress_bars_their_own_lock()
        prepare()
        code = sft_trainer.main([str(config)])
        os._exit(code)

    process = FORK.Process(target=child)
    process.start()
    return process


def give_progress_bars_their_own_lock() -> None:
    """Forked processes share tqdm's lock, and one that was killed while it held it would block all that follow."""
    kinds = [tqdm]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if "_lock" in vars(kind):
            kind.set_lock(threading.RLock())


def finish(process: multiprocessing.Process, options: dict) -> tuple[int, str]:
    """Exit code and output of a run; the code is negative where a signal ended it."""
    process.join(HANGS)
    hangs = process.exitcode is None
    if hangs:
        os.kill(process.pid, signal.SIGQUIT)  # it says where it hangs
        process.join(5)
        kill(process)
    said = (Path(options["output_dir"]).parent / "run.log").read_text()
    assert not hangs, said
    return process.exitcode, said


def kill(process: multiprocessing.Process) -> None:
    """Kill a run and its data workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has just begun: there is no group of its own yet, and no worker
        process.kill()
    process.join()


def run_in_child(options: dict, prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    return finish(start_run(options, prepare), options)


def final_weights(options: dict) -> dict[str, torch.Tensor]:
    folder = Path(options["output_dir"])
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def assert_same_run(options: dict, expected: dict) -> None:
    """Final weights, bit by bit, and the loss of every step."""
    found, reference = final_weights(options), final_weights(expected)
    assert found.keys() == reference.keys()
    assert [name for name in reference if not torch.equal(found[name], reference[name])] == []
    assert read_losses(options) == read_losses(expected)


def read_losses(options: dict) -> list[tuple[int, float]]:
    lines = (Path(options["output_dir"]) / "training_logs.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line]


@contextmanager
def small_disk(folder: Path, megabytes: float):
    """A file system of its own at `folder`, of so many MB (10⁶ bytes); it needs root."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1e6)}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
