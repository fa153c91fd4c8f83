"""A data worker's death is told from other errors."""

from multiprocessing import Pipe, reduction

import pytest

from tuning.distributed.failures import name_killed_worker
from tuning.errors import UserError


def test_a_worker_that_dies_while_it_sends_is_named():
    """PyTorch hands on the error of the closed pipe where the system still lists the worker."""
    here, there = Pipe()
    there.close()
    told = "a process that reads data ended before it had sent all of a batch"
    with pytest.raises(UserError, match=told), name_killed_worker():
        here.recv()


def test_so_is_one_that_dies_before_it_sends_the_memory_of_a_tensor():
    here, there = Pipe()
    there.close()
    with pytest.raises(UserError, match="ended before it had sent all of a batch"), name_killed_worker():
        reduction.recv_handle(here)


def test_so_is_one_that_ends_while_a_library_is_at_work():
    """PyTorch raises it wherever the main process is, also where a library turns it into an error of its own."""

    def load() -> None:
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        except RuntimeError as error:
            raise OSError("no processor can be loaded") from error

    with pytest.raises(UserError, match=r"\(pid 7\) is killed by signal: Killed\."), name_killed_worker():
        load()


def test_so_is_one_that_the_thread_for_pinned_memory_met():
    with pytest.raises(UserError, match="ended before it had sent all of a batch"), name_killed_worker():
        raise RuntimeError("Pin memory thread exited unexpectedly")  # as PyTorch's data loader words it


@pytest.mark.parametrize("error", [EOFError("a short file"), ConnectionResetError("the Hub"), RuntimeError("shapes")])
def test_other_errors_keep_their_name(error):
    with pytest.raises(type(error), match=str(error)), name_killed_worker():
        raise error
