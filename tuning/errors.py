"""What went wrong, for whom: errors the user can mend, and the exit codes of every command."""

import functools
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

EXIT_OK = 0
EXIT_USER_ERROR = 1
EXIT_STOPPED = 143
EXIT_INTERNAL_ERROR = 203
LAUNCHED = "VLM_TUNING_LAUNCHED"


class UserError(Exception):
    """The user's input is at fault: `where` (file, row, field), what the `problem` is, and how to `fix` it.

    Shown as one message in that order, without a traceback. Every other exception keeps its traceback. Errors of a row
    also have the `field` they were found in, and a `kind`, by which a report groups them.
    """

    def __init__(self, *, problem: str, where: str = "", fix: str = "", field: str = "", kind: str = ""):
        super().__init__(problem)
        self.where, self.problem, self.fix = where, problem, fix
        self.field, self.kind = field, kind

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f" {self.fix}" if self.fix else ""
        return f"{place}{self.problem}{advice}"

    def __reduce__(self):  # exceptions pickle their positional arguments, and there are none
        return functools.partial(UserError, **vars(self)), ()

    def with_field(self, field: str) -> "UserError":
        """The same error, found in `field` if it does not name a field yet."""
        return UserError(**{**vars(self), "field": self.field or field})


class RunEnded(Exception):
    """A run that ended early for a reason outside of the program: a signal, another process, the machine.

    Shown as `message` without a traceback, or not at all where it is empty; the command ends with `exit_code`.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.message, self.exit_code = message, exit_code


@contextmanager
def blame_field(name: str):
    """Name the field `name` in every `UserError` raised inside that names none."""
    try:
        yield
    except UserError as error:
        raise error.with_field(name) from error.__cause__


@contextmanager
def tell_what_is_kept(words: Callable[[], str]) -> Iterator[None]:
    """Let the end by Ctrl-C of what is inside say, in `words` asked for then, what is left of it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(words()) from None


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
    if message and claim_to_speak():
        tell(message, trace)
    return code


def _interrupt_once(*_: object) -> None:
    """Ctrl-C reaches a process twice: from the terminal, and from the launcher that passes it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def tell(message: str, trace: str = "") -> None:
    """Print the last words of a run, and write `message` to `TERMINATION_LOG_FILE`, if that is set."""
    _close_progress_bars()
    other_bar = "\n" if os.environ.get("RANK", "0") != "0" else ""  # the first process's, which may have no end
    print(other_bar + trace + message, file=sys.stderr, flush=True)
    if log_file := os.environ.get("TERMINATION_LOG_FILE"):
        with open(log_file, "w", encoding="utf-8") as file:
            file.write(message + "\n")


def was_launched() -> bool:
    """Whether a launcher has started this process. `tuning.launch` leaves a mark: accelerate sets nothing for a single
    process. RANK and WORLD_SIZE alone say nothing: Kubeflow sets them where a launcher is still to be started.
    """
    return "LOCAL_RANK" in os.environ or LAUNCHED in os.environ


def claim_to_speak() -> bool:
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


def _close_progress_bars(*, silently: bool = False) -> None:
    """End the lines of tqdm's bars, so that a message has a line of its own; `silently`: without drawing them again."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.leave = bar.leave and not silently
            bar.disable = bar.disable or silently
            bar.close()
