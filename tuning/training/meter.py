"""Speed and memory of the optimizer steps since the last log line."""

import re
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Meter:
    """Counts between two log lines. Logging, evaluation and saving are outside the measured time."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    _started: float = field(default_factory=time.perf_counter)

    def begin_step(self) -> None:
        """The step begins with fetching its batches."""
        self._started = time.perf_counter()

    def data_arrived(self, tokens: int, supervised_tokens: int) -> None:
        self.waited += time.perf_counter() - self._started
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens

    def end_step(self) -> None:
        self.seconds += time.perf_counter() - self._started
        self.steps += 1

    def report(self) -> dict[str, float]:
        """The figures of this process since the last report, which starts the count anew.

        `step_seconds`: mean wall seconds of an optimizer step. `tokens_per_second`: real tokens, padding excluded.
        `supervised_tokens`: how many were trained. `data_wait_share`: share of the time spent waiting for batches.
        `peak_memory_gb`: GB (10⁹ bytes), most allocated by PyTorch on CUDA, else most resident memory.
        """
        seconds = max(self.seconds, 1e-9)
        figures = {
            "step_seconds": self.seconds / max(self.steps, 1),
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens": self.supervised_tokens,
            "data_wait_share": self.waited / seconds,
            "peak_memory_gb": peak_memory_bytes() / 1e9,
        }
        self.steps = self.tokens = self.supervised_tokens = 0
        self.seconds = self.waited = 0.0
        return figures


def peak_memory_bytes() -> int:
    """Most memory this process has held: allocated on CUDA where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux: its ru_maxrss begins with what the parent process held
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
