"""A process that is lost is named, also when it is still ending."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tuning.distributed.processes import Processes
from tuning.errors import RunEnded


def beside(pid: int) -> Processes:
    """This process as rank 0 of two; rank 1 is the process `pid` of this machine."""

    class TwoProcesses(Processes):
        def _all_gather(self, mine: torch.Tensor) -> torch.Tensor:
            other = mine.clone()
            other[0, 1] = pid
            return torch.cat([mine, other])

    return TwoProcesses(SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu")))


@pytest.fixture
def other_process():
    """Starts a process that ends by itself after some seconds."""
    started = []

    def start(seconds: float) -> int:
        started.append(subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"]))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_process_whose_connection_closes_before_it_has_ended_is_named_as_gone(other_process):
    pid = other_process(0.5)
    with pytest.raises(RunEnded, match=rf"process 1 \(pid {pid}\) is gone"), beside(pid).name_lost_process():
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("code", [1, 203])
def test_a_process_ends_with_the_code_of_the_one_that_failed(code, monkeypatch):
    processes = beside(1)
    monkeypatch.setattr(processes, "_all_gather", lambda mine: torch.tensor([[0, 5], [code, 6]]))
    with pytest.raises(RunEnded) as ended:
        processes.raise_on_all_ranks(None, 5)
    assert (ended.value.message, ended.value.exit_code) == ("", code)
    monkeypatch.setattr(processes, "_all_gather", lambda mine: torch.cat([mine, torch.tensor([[0, 6]])]))
    assert processes.raise_on_all_ranks(None, 5).tolist() == [[5], [6]]


def test_a_process_that_lives_is_named_with_its_state(other_process, monkeypatch):
    monkeypatch.setattr("tuning.distributed.processes._EXIT_SECONDS", 0.2)
    pid = other_process(60)
    stopped = pytest.raises(RunEnded, match=rf"no answer: process 1 \(pid {pid}\) is \w+\. Timed out")
    with stopped, beside(pid).name_lost_process():
        raise RuntimeError("Timed out waiting 5000ms")


def test_an_error_that_has_nothing_to_do_with_processes_passes(other_process):
    with pytest.raises(RuntimeError, match="shapes differ"), beside(other_process(60)).name_lost_process():
        raise RuntimeError("shapes differ")
