"""A data worker's death is told from other errors."""

from multiprocessing import Pipe

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


def test_so_is_one_that_the_thread_for_pinned_memory_met():
    with pytest.raises(UserError, match="ended before it had sent all of a batch"), name_killed_worker():
        raise RuntimeError("Pin memory thread exited unexpectedly")  # as PyTorch's data loader words it


@pytest.mark.parametrize("error", [EOFError("a short file"), ConnectionResetError("the Hub"), RuntimeError("shapes")])
def test_other_errors_keep_their_name(error):
    with pytest.raises(type(error), match=str(error)), name_killed_worker():
        raise error
