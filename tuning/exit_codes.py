"""How a command ends: its exit code, and which process of a launch may say why."""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tuning.console import _close_progress_bars, tell
from tuning.errors import RunEnded, UserError

EXIT_OK = 0
EXIT_USER_ERROR = 1
EXIT_STOPPED = 143
EXIT_INTERNAL_ERROR = 203
LAUNCHED = "VLM_TUNING_LAUNCHED"


@contextmanager
def on_interrupt_say(words: Callable[[], str]) -> Iterator[None]:
    """Let the end by Ctrl-C of what is inside say, in `words` asked for then, what is left of it."""
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
    """Run `command` and turn how it ended into an exit code; the only place that catches every exception.

    0: done. 1: `UserError`, one message on standard error. 143, 203: `RunEnded`. 203: anything else, with its
    traceback. Of the processes of a launch only the first to fail speaks: the others fail for its sake. With the
    environment variable `TERMINATION_LOG_FILE` set, the message is also written to that file.
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
        if not message:  # another process speaks, and should have the last word
            _close_progress_bars(silently=True)
    except KeyboardInterrupt as interrupt:
        message, code = f"Interrupted. {interrupt}".strip(), 130
    except SystemExit as exit_request:
        return exit_request.code if isinstance(exit_request.code, int) else EXIT_OK
    except Exception as error:
        trace = traceback.format_exc()
        message, code = f"Internal error: {type(error).__name__}: {error}", EXIT_INTERNAL_ERROR
    else:
        return EXIT_OK
    if message and claim_error_output():
        tell(message, trace)
    return code


def _interrupt_once(*_: object) -> None:
    """Ctrl-C reaches a process twice: from the terminal, and from the launcher that passes it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def was_launched() -> bool:
    """Whether a launcher has started this process. `tuning.launch` leaves a mark: accelerate sets nothing for a single
    process. RANK and WORLD_SIZE alone say nothing: Kubeflow sets them where a launcher is still to be started.
    """
    return "LOCAL_RANK" in os.environ or LAUNCHED in os.environ


def claim_error_output() -> bool:
    """Whether this process is the first of its launch on this machine to ask; always true for a process alone."""
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
    except (OSError, psutil.Error):  # there is no such file: better twice than never
        return True
    return True


def claim_file(launcher: int) -> Path:
    """The file by which the processes started by `launcher` (its process id) know that one of them has spoken."""
    started = psutil.Process(launcher).create_time()
    return Path(tempfile.gettempdir(), f"vlm-tuning-{launcher}-{started:.2f}")
