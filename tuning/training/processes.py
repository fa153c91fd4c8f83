"""What the processes of a run tell each other, so that they go on, stop or fail together."""

import os
import socket
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from accelerate import Accelerator

from tuning.errors import EXIT_INTERNAL_ERROR, EXIT_USER_ERROR, RunEnded


class Processes:
    """The processes of a run. Every method but `blame_lost` must be called by all of them, in the same order."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number, self.rank = accelerator.num_processes, accelerator.process_index
        self._places = self.share([zlib.crc32(socket.gethostname().encode()), os.getpid()]).tolist()

    def share(self, numbers: Sequence[int]) -> torch.Tensor:
        """Every process's whole numbers, `[processes, numbers]`, on this process's device."""
        mine = torch.tensor([list(numbers)], dtype=torch.int64, device=self.accelerator.device)
        return self.accelerator.gather(mine) if self.number > 1 else mine

    def fail_together(self, error: Exception | None) -> None:
        """Raise `error` where there is one, and end the other processes without a word of their own."""
        failed = self.share([error is not None])[:, 0] if self.number > 1 else None
        if error is not None:
            raise error
        if failed is not None and failed.any():
            raise RunEnded("", EXIT_USER_ERROR)

    @contextmanager
    def blame_lost(self) -> Iterator[None]:
        """Turn the failure of talking to a process that is gone into a message that names it."""
        try:
            yield
        except RuntimeError as error:  # DistBackendError and gloo's own are RuntimeErrors
            lost = [rank for rank in range(self.number) if not self._is_alive(rank)]
            words = str(error).lower()
            if self.number == 1 or not (lost or any(word in words for word in _TALKING)):
                raise
            who = ", ".join(f"process {rank} (pid {self._places[rank][1]})" for rank in lost)
            raise RunEnded(
                f"{who} ended unexpectedly; often the machine had no memory left."
                if lost
                else f"another process did not answer: {str(error).splitlines()[0]}",
                EXIT_INTERNAL_ERROR,
            ) from error

    def _is_alive(self, rank: int) -> bool:
        """Of processes on other machines nothing is known: they count as alive."""
        host, pid = self._places[rank]
        if rank == self.rank or host != self._places[self.rank][0]:
            return True
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


_TALKING = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe", "nccl", "gloo")
