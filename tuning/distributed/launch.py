"""One process or many: starts `accelerate launch` where a config asks for several, and says how it ended."""

import difflib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import psutil
import torch.distributed as dist
import transformers
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import TrainingArguments

from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.distributed.fsdp import disable_fsdp_on_cpu
from tuning.errors import RunEnded, UserError
from tuning.exit_codes import EXIT_INTERNAL_ERROR, EXIT_STOPPED, LAUNCHED, claim_file, was_launched
from tuning.machine import count_gpus

PACKAGE = Path(__file__).parents[1]
SCRIPT = PACKAGE / "sft_trainer.py"
FIXTURES = PACKAGE / "fixtures"
DEFAULTS = FIXTURES / "accelerate_fsdp_defaults.yaml"
WHOLE_COPIES = FIXTURES / "accelerate_ddp.yaml"
ALREADY_PRINTED = (1, EXIT_STOPPED, EXIT_INTERNAL_ERROR)  # exit codes of a process that has said why
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def choose_launch_options(launch_args: Mapping[str, Any], *, all_gpus: bool) -> dict[str, Any]:
    """The options of `accelerate launch` for a run; empty where it needs one process and no launcher.

    `all_gpus`: without `num_processes`, use every local GPU, if there are several. Raises `UserError` for an option
    that `accelerate launch` lacks.
    """
    if was_launched():
        return {}
    if launch_args:
        launch_flags(launch_args, make_parser())
    launch = dict(launch_args)
    if {"config_file", "num_machines"} & launch.keys():
        return launch
    if "num_processes" not in launch and (launch or all_gpus):
        launch["num_processes"] = max(1, count_gpus())
    return launch if str(launch.get("num_processes", 1)) != "1" else {}


def check_processes(number: int) -> None:
    """Raises `UserError` where processes have not found each other: this one knows of `number`, itself included."""
    told = int(os.environ.get("WORLD_SIZE", "1"))
    if told != number:
        raise UserError(
            where=f"WORLD_SIZE {told}",
            problem=f"there should be {told} processes, but this one knows of {number}; each would do all of the work.",
            fix="Start them with accelerate launch or torchrun, on devices that can be connected, or unset WORLD_SIZE.",
        )


def make_parser() -> Any:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def launch(launch_args: Mapping[str, Any], program: Sequence[str], *, settings: Path = DEFAULTS) -> None:
    """Run a program in the processes that `launch_args` ask for, and wait for their end.

    `program`: a script, or `-m` and a module, and its arguments. `settings`: the default `config_file`.
    Raises `UserError` for options that do not go together, and `RunEnded` with the exit code of the first process that
    failed: silent where that process has said why, else with who it was and how it ended. SIGTERM and SIGUSR1 are
    passed on to the processes.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = make_parser()
    flags = launch_flags(launch_args, parser, settings)
    parsed = parser.parse_args([*flags, *program])
    if parsed.cpu and (parsed.num_processes or 1) > 1:
        what = f"accelerate starts one process with it, not {parsed.num_processes}."
        raise UserError(
            where="accelerate_launch_args use_cpu", problem=what, fix="Put use_cpu true beside accelerate_launch_args."
        )
    parsed.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's option; the others are ours to pass on
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with passing_on_signals(parsed.training_script) as passed_on, mark_as_launched():
            launch_command(parsed)
    except SignalException as error:  # Ctrl-C, or a terminal that is gone
        raise RunEnded("" if has_spoken() else "Interrupted.", 128 + error.sigval) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ended(failure.exitcode, f"process {rank} (pid {failure.pid})", passed_on) from error
    except subprocess.CalledProcessError as error:
        raise ended(error.returncode, "the process", passed_on) from error
    except ValueError as error:  # options that do not go together
        raise UserError(where="accelerate_launch_args", problem=str(error).splitlines()[0]) from error


def launch_flags(launch_args: Mapping[str, Any], parser: Any, settings: Path = DEFAULTS) -> list[str]:
    """`launch_args` as words of a command line. Without a `config_file`, the shipped `settings` fill the rest."""
    known = {action.dest: action for action in parser._actions}
    flags = []
    if "config_file" not in launch_args:
        flags = [f"--config_file={settings}", "--main_process_port=0"]  # 0: any that is free
        if "num_machines" in launch_args or "main_process_port" in launch_args:
            flags.pop()
    for name, value in launch_args.items():
        action = known.get({"use_cpu": "cpu"}.get(name, name))
        if action is None:
            near = difflib.get_close_matches(name, list(known), n=1)
            raise UserError(
                where="accelerate_launch_args",
                problem=f"{name}: accelerate launch has no such option.",
                fix=f"Did you mean {near[0]}?" if near else "accelerate launch --help lists them.",
            )
        flag = action.option_strings[0]
        if action.nargs == 0:
            flags += [flag] if value not in (False, None, "false") else []
        elif value is not None:
            flags.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return flags


def has_spoken() -> bool:
    """Whether one of the processes that this one has launched has said why the run ended."""
    spoken = claim_file(os.getpid())
    found = spoken.exists()
    spoken.unlink(missing_ok=True)
    return found


def ended(exit_code: int, who: str, passed_on: Sequence[int] = ()) -> RunEnded:
    """How a run with a failed process ends. `passed_on`: signals that the processes were sent."""
    if has_spoken() or exit_code in ALREADY_PRINTED:
        return RunEnded("", exit_code if exit_code in ALREADY_PRINTED else EXIT_INTERNAL_ERROR)
    if -exit_code in passed_on:  # it was not training yet
        return RunEnded(f"Stopped by {signal.Signals(-exit_code).name} before a first step.", EXIT_STOPPED)
    how = f"was ended by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    advice = {
        -signal.SIGKILL: " Often the machine had no memory left.",
        -signal.SIGABRT: " Often it waited in vain for another one (ddp_timeout).",
    }.get(exit_code, "")
    return RunEnded(
        f"The run ended early: {who} {how}.{advice} Run the same command again to continue.",
        EXIT_INTERNAL_ERROR,
    )


@contextmanager
def mark_as_launched() -> Iterator[None]:
    """Let the processes that are started know that they were; see `was_launched`."""
    os.environ[LAUNCHED] = "1"
    try:
        yield
    finally:
        del os.environ[LAUNCHED]


@contextmanager
def passing_on_signals(program: str) -> Iterator[list[signal.Signals]]:
    """Pass signals to stop on to the processes, which save and end; this one waits for them. Yields those signals.

    `program`: a word in the command line of those processes, and of no other child: their script or module.
    """
    passed_on: list[signal.Signals] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.append(signal.Signals(number))
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # it has just ended
                if program in child.cmdline():
                    child.send_signal(number)

    before: dict[signal.Signals, Callable | int | None] = {n: signal.signal(n, pass_on) for n in FORWARDED}
    try:
        yield passed_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def configure_libraries(training: TrainingArguments) -> None:
    """Say and mend what the libraries would do by themselves with this machine's devices, and with progress bars.

    Without a launcher a run uses one device: `nn.DataParallel`, transformers' choice, is slow and wrong here.
    """
    if disable_fsdp_on_cpu():
        print0("FSDP shards over accelerators, and there is none: the processes train whole copies of the model (DDP).")
    if dist.is_initialized() and training.use_cpu:  # transformers passes ddp_timeout on for accelerators only
        _set_pg_timeout(training.ddp_timeout_delta)
    if training.n_gpu > 1:
        print0(
            f"Using one of {training.n_gpu} GPUs. To use all: vlm-tuning train …, or accelerate launch"
            f" --num_processes={training.n_gpu} --config_file fixtures/accelerate_fsdp_defaults.yaml"
            " tuning/sft_trainer.py …"
        )
        training._n_gpu = 1
    if training.disable_tqdm:  # the trainer hides its own bar only
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def check_launcher(config: RunConfig) -> None:
    """One process cannot become several by itself, and several must know of each other."""
    processes = config.run.accelerate_launch_args.get("num_processes", 1)
    check_processes(config.training.world_size)
    if str(processes) != "1" and not was_launched():
        raise UserError(
            where="accelerate_launch_args",
            problem=f"num_processes {processes} needs a launcher.",
            fix=f"Run accelerate launch --num_processes={processes} tuning/sft_trainer.py with the same options.",
        )
