"""The two exceptions that end a command without a traceback, and the guards that turn others into words."""

import functools
import logging
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
DEVICE_FAULTS = ("CUDA error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "NCCL error", "HIP error")
REFUSED = ("no kernel image", "invalid device function", "_STATUS_NOT_SUPPORTED")
DEVICE_ERRORS = {"AcceleratorError", "DistError"}  # PyTorch's classes by name: this file does not import it
DEAD_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)([^.]*)")  # PyTorch's words
RECEIVING = {"multiprocessing.connection", "multiprocessing.reduction"}  # where a process reads what another has sent


class UserError(Exception):
    """The user's input is at fault: `where` (file, row, option), what the `problem` is, and how to `fix` it.

    Printed as one message in that order, without a traceback. Every other exception keeps its traceback. An error of a
    row also names the `field` it was found in and a `kind`, by which a report groups such errors.
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
    """A run ended early for a reason outside of the program: a signal, another process, the machine.

    The command prints `message` without a traceback, or nothing if it is empty, and ends with `exit_code`.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.message, self.exit_code = message, exit_code


@contextmanager
def error_field(name: str) -> Iterator[None]:
    """Name the field `name` in every `UserError` raised inside that names none."""
    try:
        yield
    except UserError as error:
        raise error.with_field(name) from error.__cause__


@contextmanager
def writing(where: object, fix: str = "Make room, check the permissions, or give another place.") -> Iterator[None]:
    """Turn an `OSError` raised inside into a `UserError`: `where` (a file, an option and its folder) cannot be written.

    Only the user can make room or change permissions. Nothing inside may read files or use the network:
    those fail with an `OSError`, too.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(where=str(where), problem=f"cannot be written: {reason}.", fix=fix) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop, or the name of its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def describe_failure(error: BaseException) -> str:
    """An error of another library in one line, such as `TypeError: unsupported operand`."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out. CUDA has an exception of its own, the CPU's allocator only a text."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def is_device_fault(error: BaseException) -> bool:
    """Whether a GPU or the messages between processes failed. No later call of this process can be trusted then.

    PyTorch raises `AcceleratorError` for what a CUDA call returns, and a plain `RuntimeError` for cuBLAS and cuDNN. A
    kernel that was not built for this GPU, or a call that a library refuses, leaves the device as it was.
    """
    if any(words in str(error) for words in REFUSED):
        return False
    is_one = any(kind.__name__ in DEVICE_ERRORS for kind in type(error).__mro__)
    return is_one or any(words in str(error) for words in DEVICE_FAULTS)


def find_dead_worker(error: BaseException | None) -> re.Match | None:
    """PyTorch's words for the end of a data worker, in an error or in those that led to it.

    PyTorch raises them in the main process at once, wherever that is: in a step, a save, another library.
    """
    while error is not None:
        if found := DEAD_WORKER.search(str(error)):
            return found
        error = error.__cause__ or error.__context__
    return None


def describe_dead_worker(error: Exception) -> str:
    """What happened to a process that reads data, if its end is the cause of an error; "" if it is not."""
    if found := find_dead_worker(error):
        return f"a process that reads data (pid {found[1].strip()}) {found[2].strip()}."
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    is_closed = isinstance(error, (OSError, EOFError)) and modules & RECEIVING  # PyTorch takes the process for alive
    if is_closed or "Pin memory thread exited" in str(error):
        return "a process that reads data ended before it had sent all of a batch."
    return ""


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """How an optional step ended: with a `value`, or with the `error` that stopped it."""

    value: T | None = None
    error: Exception | None = None


def try_optional(action: Callable[[], T], *, catch_user_errors: bool = False) -> Attempt[T]:
    """Run an optional step whose failure the caller reports instead of ending the run.

    Such a step runs the code of a model, a processor or a tracker that we have never seen, and any exception may come
    out of it. `UserError`, `RunEnded`, running out of memory, a fault of the device and a data worker that ended still
    end the run. `catch_user_errors`: the caller reports a `UserError` as well. Set the log level DEBUG to see the
    traceback.
    """
    try:
        return Attempt(value=action())
    except RunEnded:
        raise
    except Exception as error:
        is_users = isinstance(error, UserError) and not catch_user_errors
        if is_users or is_out_of_memory(error) or is_device_fault(error) or find_dead_worker(error):
            raise
        logging.getLogger(__name__).debug("An optional step failed.", exc_info=error)
        return Attempt(error=error)
