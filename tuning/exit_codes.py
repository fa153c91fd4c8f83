"""How a command ends: its exit code, and which process of a launch may print why."""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tuning.console import close_progress_bars, print_error
from tuning.errors import RunEnded, UserError, describe_dead_worker

EXIT_OK = 0
EXIT_USER_ERROR = 1
EXIT_STOPPED = 143
EXIT_INTERNAL_ERROR = 203
LAUNCHED = "VLM_TUNING_LAUNCHED"


@contextmanager
def on_interrupt_say(words: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, add `words()` to the interrupt message."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(words()) from None


def run_command(
    run: Callable[[list[str]], object], describe: Callable[[], str], argv: Sequence[str] | None = None
) -> int:
    """Run a command with the words of its command line (default: this process's) and return its exit code.

    If --help is among them, print what `describe` returns instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(describe())
        return EXIT_OK
    return exit_code_of(lambda: run(arguments))


def exit_code_of(command: Callable[[], object]) -> int:
    """Run `command` and turn how it ended into an exit code. This is where every exception is caught.

    0: done. 1: `UserError`, or a data worker that ended: one message on standard error. 130: Ctrl-C. 143, 203:
    `RunEnded`. 203: anything else, with its traceback. Only the first failing process of a launch prints its error: the
    others fail as a result. The message also goes to the file that the environment variable `TERMINATION_LOG_FILE`
    names.
    """
    trace = ""
    if was_launched():
        signal.signal(signal.SIGINT, _interrupt_once)
    try:
        command()
    except UserError as error:
        message, code = f"Error: {error}", EXIT_USER_ERROR
    except RunEnded as error:
        message, code = error.message, error.exit_code
        if not message:  # another process prints the error, which should be the last line
            close_progress_bars(redraw=False)
    except KeyboardInterrupt as interrupt:
        message, code = f"Interrupted. {interrupt}".strip(), 130
    except SystemExit as exit_request:
        return exit_request.code if isinstance(exit_request.code, int) else EXIT_OK
    except Exception as error:
        if dead := describe_dead_worker(error):
            message = f"Error: {dead} Often the machine has run out of memory: run it where more is free."
            code = EXIT_USER_ERROR
        else:
            trace = traceback.format_exc()
            message, code = f"Internal error: {type(error).__name__}: {error}", EXIT_INTERNAL_ERROR
    else:
        return EXIT_OK
    if message and claim_error_output():
        print_error(message, trace)
    return code


def _interrupt_once(*_: object) -> None:
    """Ignore the second of two signals: Ctrl-C comes from the terminal, and again from the launcher."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def was_launched() -> bool:
    """Whether a launcher has started this process.

    Our own launcher marks its processes, because accelerate sets no variable for a single one. RANK and WORLD_SIZE are
    no proof: Kubeflow sets them before a launcher is started.
    """
    return "LOCAL_RANK" in os.environ or LAUNCHED in os.environ


def claim_error_output() -> bool:
    """Whether this process may print why it ends: of each launch, the first process on this machine that asks.

    A process without a launcher always may.
    """
    if "LOCAL_RANK" not in os.environ:
        return True
    for file in Path(tempfile.gettempdir()).glob("vlm-tuning-[0-9]*-[0-9]*"):
        with suppress(OSError, ValueError):
            if not psutil.pid_exists(int(file.name.split("-")[2])):  # its launcher is gone
                file.unlink()
    try:
        claim_file(os.getppid()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except (OSError, psutil.Error):  # no place for the file: better to print twice than never
        return True
    return True


def claim_file(launcher: int) -> Path:
    """The file that exists once a process started by `launcher` (its process id) has printed its error."""
    started = psutil.Process(launcher).create_time()
    return Path(tempfile.gettempdir(), f"vlm-tuning-{launcher}-{started:.2f}")
