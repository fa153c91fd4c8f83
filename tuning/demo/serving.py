"""Serves a model with vLLM, where it is installed."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from tuning.errors import RunEnded
from tuning.exit_codes import EXIT_INTERNAL_ERROR

ENVIRONMENT = Path(".vllm")  # what `make serving` makes
PATIENCE = 300  # seconds
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16")
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def find_vllm() -> Path | None:
    """The Python that has vLLM: that of `make serving`, or this one; None without it."""
    own = ENVIRONMENT / "bin" / "python"
    if (ENVIRONMENT / "ready").exists() and own.exists():
        return own
    return Path(sys.executable) if importlib.util.find_spec("vllm") else None


@contextlib.contextmanager
def serve(python: Path, model: Path, name: str, log: Path, *, options: Sequence[str] = ()) -> Iterator[str]:
    """Serve `model` under `name`; gives the address of the API. `log`: a file for what the server prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", name]
    command = [*map(str, words), "--host", "127.0.0.1", "--port", str(port), *OPTIONS, *options]
    print(f"\n$ vllm serve {' '.join(command[4:])}", flush=True)
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **VARIABLES})
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until a server answers. Raises `RunEnded` if it has ended, or takes longer than `PATIENCE`."""
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(address).status_code == 200:
                return
        time.sleep(0.5)
    raise RunEnded(f"vLLM does not serve the model. {log} has what it printed.", EXIT_INTERNAL_ERROR)
