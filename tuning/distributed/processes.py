"""The processes of a run: they exchange numbers, fail together, and name a process that was lost."""

import atexit
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from tuning.distributed.watch import announce_failure
from tuning.errors import RunEnded, UserError
from tuning.exit_codes import EXIT_INTERNAL_ERROR, EXIT_USER_ERROR

T = TypeVar("T")


class Processes:
    """The processes of a run. All of them must call every method but `name_lost_process`, in the same order."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number, self.rank = accelerator.num_processes, accelerator.process_index
        self._group = make_cpu_group(accelerator) if self.number > 1 else None
        self._places = self.all_gather_ints([zlib.crc32(socket.gethostname().encode()), os.getpid()]).tolist()

    def all_gather_ints(self, numbers: Sequence[int]) -> torch.Tensor:
        """The integers of every process, `[processes, numbers]`, on the CPU."""
        return self._all_gather(torch.tensor([list(numbers)], dtype=torch.int64))

    def sum_floats(self, *numbers: float) -> list[float]:
        """Each number, summed over the processes in float64."""
        return self._all_gather(torch.tensor([numbers], dtype=torch.float64)).sum(dim=0).tolist()

    def _all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Rows `[1, N]` of every process as `[processes, N]`. No process waits for its device."""
        if self.number == 1:
            return mine
        gathered = mine.new_empty(self.number, *mine.shape[1:])
        dist.all_gather_into_tensor(gathered, mine, group=self._group)
        return gathered

    def raise_on_all_ranks(self, error: Exception | None, *numbers: int) -> torch.Tensor:
        """Raise this process's `error`; on the others a `RunEnded` without a message, with the same exit code.

        If no process has an error, returns what `all_gather_ints(numbers)` does, in the same message.
        """
        exit_code = error.exit_code if isinstance(error, RunEnded) else EXIT_USER_ERROR
        shared = self.all_gather_ints([exit_code if error else 0, *numbers])
        if error is not None:
            raise error
        if self.number > 1 and (exit_code := int(shared[:, 0].max())):
            raise RunEnded("", exit_code)
        return shared[:, 1:]

    def any_failed(self, error: Exception | None, *, together: bool) -> bool:
        """Whether a process has met an error in what all of them did.

        `together`: they waited for each other in there. Then the others never come here if this one failed alone: it
        raises its error after some seconds, which ends the run.
        """
        failed = torch.tensor([[int(error is not None)]])
        if error is None or not together or self.number == 1:
            return bool(self._all_gather(failed).any())
        gathered = failed.new_empty(self.number, 1)
        work = dist.all_gather_into_tensor(gathered, failed, group=self._group, async_op=True)
        try:
            work.wait(timedelta(seconds=_ALONE_SECONDS))
        except RuntimeError:  # what gloo raises when the time is over
            raise error from None
        return True

    @contextmanager
    def name_lost_process(self) -> Iterator[None]:
        """Turn an error of communication into a `RunEnded` that names the process which is gone or does not answer."""
        try:
            yield
        except RuntimeError as error:  # DistBackendError and gloo's own are RuntimeErrors
            text = str(error).lower()
            communication = any(words in text for words in _COMMUNICATION)
            others = self._states_of_others(wait=_EXIT_SECONDS if communication else 0)
            lost = {rank: state for rank, state in others.items() if state == GONE}
            if not others or not (lost or communication):
                raise
            named = ", ".join(
                f"process {rank} (pid {self._places[rank][1]}) is {state}" for rank, state in (lost or others).items()
            )
            reason = f"{named}. Often the machine has run out of memory." if lost else f"no answer: {named}. {error}"
            advice = "Run the same command again to continue from the last checkpoint."
            raise RunEnded(f"Training ended at process {self.rank}: {reason} {advice}", EXIT_INTERNAL_ERROR) from error

    def _states_of_others(self, wait: float) -> dict[int, str]:
        """The state of each other process; waits up to `wait` seconds for one to be gone.

        A process that was killed closes its connections a moment before the system lists it as ended.
        """
        deadline = time.monotonic() + wait
        while True:
            states = {rank: self._state_of(rank) for rank in range(self.number) if rank != self.rank}
            if not states or GONE in states.values() or time.monotonic() >= deadline:
                return states
            time.sleep(0.1)

    def _state_of(self, rank: int) -> str:
        host, pid = self._places[rank]
        if host != self._places[self.rank][0]:
            return "on another machine"
        try:
            status = psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            return GONE
        return GONE if status == psutil.STATUS_ZOMBIE else status


def make_cpu_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """A group in which processes exchange numbers of the host, with the time-out of the default group.

    In the device's group, each exchange would wait until the device has done all its work. In that of FSDP and DDP, a
    process that left their work with an error would take its messages for theirs.
    """
    if not dist.is_initialized():
        return None
    options = getattr(dist.group.WORLD._get_backend(accelerator.device), "options", None)
    return dist.new_group(backend="gloo", timeout=getattr(options, "_timeout", None))


def decide_on_first_process(decide: Callable[[], T]) -> T:
    """What the first process decides. The others wait for it, and end without a message where it meets a bad row."""
    decided, error = list[T](), None
    if PartialState().is_main_process:
        try:
            decided = [decide()]
        except UserError as found:
            error = found
    (decided,) = broadcast_object_list([decided])
    if error or not decided:
        raise error or RunEnded("", EXIT_USER_ERROR)
    return decided[0]


GONE = "gone"
_EXIT_SECONDS = 5.0
_ALONE_SECONDS = 10.0
_COMMUNICATION = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe", "nccl", "gloo")


def exit_process(exit_code: int) -> NoReturn:
    """End this process, and tell the others. With several processes, exit without interpreter shutdown.

    gloo's threads may still be freeing the tensors of the last message. For that they take Python's lock, and that
    aborts a process whose interpreter is shutting down: "terminate called without an active exception", exit code -6.
    """
    if not dist.is_initialized():
        sys.exit(exit_code)
    announce_failure(exit_code)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # what sys.exit would run; there is no public way
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
