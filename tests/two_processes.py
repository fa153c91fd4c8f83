"""A command in two processes of one run, forked from this one, so that they begin at once; without a launcher."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState
from child_runs import FORK
from distributed.ranks import shard_on_cpu
from huggingface_hub import constants

from tuning import cli
from tuning.distributed.processes import exit_process
from tuning.exit_codes import claim_file

Processes = list[multiprocessing.Process]


def start_two(
    words: list[str], folder: Path, settings: dict[str, str], prepare: Callable[[int], None] = lambda rank: None
) -> Processes:
    """Start `vlm-tuning` with `words` in two processes, with `settings` of a launcher in their environment.

    Each calls `prepare` with its rank first, and prints to `rank-RANK.log` in `folder`.
    """
    claim_file(os.getpid()).unlink(missing_ok=True)
    with socket.socket() as any_free:
        any_free.bind(("localhost", 0))
        port = str(any_free.getsockname()[1])

    def child(rank: int) -> None:
        os.setsid()
        sys.stdout = sys.stderr = open(folder / f"rank-{rank}.log", "a", buffering=1)  # noqa: SIM115
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ.update(settings | places | {"MASTER_ADDR": "localhost", "MASTER_PORT": port})
        AcceleratorState._reset_state(reset_partial_state=True)  # of runs in the process that was forked
        if "HF_ENDPOINT" in settings:
            constants.HF_HUB_OFFLINE, constants.ENDPOINT = False, settings["HF_ENDPOINT"]
        if settings.get("FSDP_VERSION"):
            shard_on_cpu()
        prepare(rank)
        exit_process(cli.main(words))

    processes = [FORK.Process(target=child, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def finish_two(processes: Processes, seconds: float = 120) -> list[int | None]:
    """The exit codes of both; None where a process had to be killed after so many seconds."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        kill_one(process)
    return codes


def kill_one(process: multiprocessing.Process) -> None:
    """Kill a process and its data workers, if it is still there."""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            process.kill()
    process.join()


def run_two(
    words: list[str], folder: Path, settings: dict[str, str], prepare: Callable[[int], None]
) -> tuple[list[int | None], list[str], float]:
    """Run a command in two processes: their exit codes, what they print, and how long they took."""
    began = time.monotonic()
    codes = finish_two(start_two(words, folder, settings, prepare))
    return codes, [(folder / f"rank-{rank}.log").read_text() for rank in range(2)], time.monotonic() - began
