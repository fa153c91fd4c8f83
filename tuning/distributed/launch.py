"""One process or many: starts `accelerate launch` where a config asks for several, and explains how it ended."""

import difflib
import logging
import os
import re
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
from transformers import TrainingArguments

from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.distributed.fsdp import STRATEGY_IS_OURS, disable_fsdp_on_cpu
from tuning.distributed.watch import watch_processes
from tuning.errors import RunEnded, UserError, first_line
from tuning.exit_codes import EXIT_INTERNAL_ERROR, EXIT_STOPPED, LAUNCHED, claim_file, was_launched
from tuning.machine import count_gpus

PACKAGE = Path(__file__).parents[1]
SCRIPT = PACKAGE / "sft_trainer.py"
FIXTURES = PACKAGE / "fixtures"
FSDP_SETTINGS = FIXTURES / "accelerate_fsdp_defaults.yaml"
DDP_SETTINGS = FIXTURES / "accelerate_ddp.yaml"
ALREADY_PRINTED = (1, EXIT_STOPPED, EXIT_INTERNAL_ERROR)  # exit codes of a process that has printed why it ended
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


def check_launcher(config: RunConfig) -> None:
    """Raises `UserError` where a config asks for several processes and nothing started them, or they are not connected.

    One process cannot become several by itself: `tuning.train` runs in the process that calls it.
    """
    processes = config.run.accelerate_launch_args.get("num_processes", 1)
    check_processes(config.training.world_size)
    if config.training.fsdp and config.training.world_size == 1:
        raise UserError(
            where=f"fsdp {config.training.fsdp}",
            problem="shards a model over several processes, and there is one.",
            fix='Set accelerate_launch_args, such as {"num_processes": 2}, or remove fsdp.',
        )
    if str(processes) != "1" and not was_launched():
        raise UserError(
            where="accelerate_launch_args",
            problem=f"num_processes {processes} needs a launcher.",
            fix=f"Run accelerate launch --num_processes={processes} tuning/sft_trainer.py with the same options.",
        )


def check_processes(world_size: int) -> None:
    """Raises `UserError` unless this process is connected to as many as its environment asks for."""
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if expected != world_size:
        raise UserError(
            where=f"WORLD_SIZE {expected}",
            problem=f"the processes are not connected: this one knows of {world_size}. Each would do all of the work.",
            fix="Start them with accelerate launch or torchrun, on devices that can be connected, or unset WORLD_SIZE.",
        )


def make_parser() -> Any:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def launch(launch_args: Mapping[str, Any], program: Sequence[str], *, settings: Path = FSDP_SETTINGS) -> None:
    """Run a program in the processes that `launch_args` ask for, and wait for their end.

    `program`: a script, or `-m` and a module, and its arguments. `settings`: the default `config_file`. SIGTERM and
    SIGUSR1 are forwarded to the processes. Raises `UserError` for options that contradict each other, and `RunEnded`
    with the exit code of the first process that failed. Its message is empty where that process has printed why.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = make_parser()
    flags = launch_flags(launch_args, parser, settings)
    parsed = parser.parse_args([*flags, *program])
    if parsed.cpu and (parsed.num_processes or 1) > 1:
        raise UserError(
            where="accelerate_launch_args use_cpu",
            problem=f"accelerate starts one process with it, not {parsed.num_processes}.",
            fix="Set use_cpu true outside of accelerate_launch_args, as an option of the run.",
        )
    parsed.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's option; we forward the others
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with forward_signals(parsed.training_script) as forwarded, mark_as_launched(strategy_is_ours(launch_args)):
            launch_command(parsed)
    except SignalException as error:  # Ctrl-C, or a terminal that is gone
        raise RunEnded("" if has_printed_error() else "Interrupted.", 128 + error.sigval) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise explain_exit(failure.exitcode, f"process {rank} (pid {failure.pid})", forwarded) from error
    except subprocess.CalledProcessError as error:
        raise explain_exit(error.returncode, "the process", forwarded) from error
    except ValueError as error:  # options that contradict each other
        raise UserError(
            where="accelerate_launch_args",
            problem=f"accelerate refuses these options: {first_line(error)}.",
            fix="accelerate launch --help describes them.",
        ) from error


def strategy_is_ours(launch_args: Mapping[str, Any]) -> bool:
    """Whether the user has named neither a file nor anything of FSDP, so that the run may choose DDP."""
    return not any(re.search("config_file|fsdp|parallelism_config", name) for name in launch_args)


def launch_flags(launch_args: Mapping[str, Any], parser: Any, settings: Path = FSDP_SETTINGS) -> list[str]:
    """`launch_args` as words of a command line. `settings` fill in the rest, unless they name a `config_file`."""
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


def has_printed_error() -> bool:
    """Whether one of the processes that this one launched has printed why the run ended."""
    file = claim_file(os.getpid())
    found = file.exists()
    file.unlink(missing_ok=True)
    return found


def explain_exit(exit_code: int, who: str, forwarded: Sequence[int] = ()) -> RunEnded:
    """How a run with a failed process ends. `forwarded`: signals that were forwarded to the processes."""
    if has_printed_error() or exit_code in ALREADY_PRINTED:
        return RunEnded("", exit_code if exit_code in ALREADY_PRINTED else EXIT_INTERNAL_ERROR)
    if -exit_code in forwarded:  # it was not training yet
        return RunEnded(f"Stopped by {signal.Signals(-exit_code).name} before the first step.", EXIT_STOPPED)
    how = f"was ended by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    advice = {
        -signal.SIGKILL: " Often the machine has run out of memory.",
        -signal.SIGABRT: " Often it waited for another process until ddp_timeout was over.",
    }.get(exit_code, "")
    return RunEnded(
        f"The run ended early: {who} {how}.{advice} Run the same command again to continue.",
        EXIT_INTERNAL_ERROR,
    )


@contextmanager
def mark_as_launched(may_choose: bool) -> Iterator[None]:
    """Tell the processes that are started inside that they were launched, and whether they choose DDP or FSDP."""
    os.environ |= {LAUNCHED: "1", STRATEGY_IS_OURS: str(int(may_choose))}
    try:
        yield
    finally:
        del os.environ[LAUNCHED], os.environ[STRATEGY_IS_OURS]


@contextmanager
def forward_signals(program: str) -> Iterator[list[signal.Signals]]:
    """Forward signals to stop to the processes, which save and end while this one waits. Yields those forwarded.

    `program`: a word in the command line of those processes, and of no other child: their script or module.
    """
    forwarded: list[signal.Signals] = []

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append(signal.Signals(number))
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # it has just ended
                if program in child.cmdline():
                    child.send_signal(number)

    before: dict[signal.Signals, Callable | int | None] = {n: signal.signal(n, forward) for n in FORWARDED}
    try:
        yield forwarded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def configure_libraries(training: TrainingArguments) -> None:
    """Correct what the libraries would do with processes without a GPU, with timeouts, and with progress bars."""
    if disable_fsdp_on_cpu():
        print0("FSDP needs GPUs, and there are none: every process trains a full copy of the model (DDP).")
    if dist.is_initialized() and training.use_cpu:  # transformers applies ddp_timeout to accelerators only
        dist.group.WORLD.set_timeout(training.ddp_timeout_delta)
    watch_processes()
    if training.disable_tqdm:  # the trainer hides its own bar only
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
