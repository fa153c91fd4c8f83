"""Shared by all benchmarks: run a measured process, and print a JSON line per run with commit, machine and versions."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class ChildFailed(RuntimeError):
    """A measured process failed; the message is the end of its output."""


def describe_environment() -> dict[str, Any]:
    """The commit (with `+` where files differ from it), the machine, and the versions that a result depends on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "commit": _commit(),
        "cores": cores,
        "load": round(os.getloadavg()[0], 1),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **versions,
    }


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", "tuning", "benchmarks/*.py"], capture_output=True)
    return (commit or "unknown") + ("+" if changed.stdout else "")


def print_line(benchmark: str, environment: Mapping[str, Any], **figures: Any) -> None:
    """Print one run as a JSON line on stdout."""
    print(json.dumps({"benchmark": benchmark, **figures, **environment}), flush=True)


def print0(text: str) -> None:
    """Print progress on stderr: stdout has the JSON lines only."""
    print(text, file=sys.stderr, flush=True)


def run_child(
    script: str,
    spec: Mapping[str, Any],
    folder: Path,
    *,
    paths: tuple[Path, ...] = (),
    watched: Path | None = None,
) -> dict[str, Any]:
    """Run `benchmarks/<script> <spec file> <result file>` in its own process and return the result it wrote.

    `paths` come first on its PYTHONPATH, for an installed peer. With `watched`, the result also has `started` and
    `seconds_to_file`, the time from there until that file was not empty. Raises `ChildFailed`.
    """
    spec_file, result_file, output_file = folder / "spec.json", folder / "result.json", folder / "output.txt"
    spec_file.write_text(json.dumps(spec))
    result_file.unlink(missing_ok=True)
    search = os.pathsep.join(map(str, (*paths, ROOT, ROOT / "tests")))
    command = [sys.executable, str(ROOT / "benchmarks" / script), str(spec_file), str(result_file)]
    with open(output_file, "w") as output:
        started = time.time()
        child = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": search}, stdout=output, stderr=subprocess.STDOUT
        )
        appeared = _wait_for(watched, child) - started if watched else None
        child.wait()
    if child.returncode or not result_file.exists():
        raise ChildFailed(f"{script} ended with {child.returncode}:\n{output_file.read_text()[-4000:]}")
    timing = {"started": started, "seconds_to_file": appeared} if watched else {}
    return {**json.loads(result_file.read_text()), **timing}


def _wait_for(file: Path, child: subprocess.Popen) -> float:
    while child.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.01)
    return time.time()


def peak_rss_bytes() -> int:
    """The most resident memory that this process has held.

    Linux counts it in `VmHWM`; `getrusage` would include the memory of the parent process at the start.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def median(values: list[float]) -> float:
    return float(statistics.median(values))
