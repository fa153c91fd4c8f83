"""What all benchmarks share: children that are measured, and one JSON line a run with where it was measured."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class ChildFailed(RuntimeError):
    """A measured process ended badly; its last words are the message."""


def describe_environment() -> dict[str, Any]:
    """The commit (with `+` where files differ from it), the machine and the versions that decide a figure."""
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
    """One run as one JSON line on stdout."""
    print(json.dumps({"benchmark": benchmark, **figures, **environment}), flush=True)


def say(text: str) -> None:
    """Progress, on stderr: stdout holds the JSON lines alone."""
    print(text, file=sys.stderr, flush=True)


def run_child(script: str, spec: Mapping[str, Any], folder: Path, *, paths: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Run `benchmarks/<script> <spec file> <result file>` in a process of its own and return what it wrote.

    `paths` come first on its PYTHONPATH: where a peer is installed. Raises `ChildFailed`.
    """
    spec_file, result_file = folder / "spec.json", folder / "result.json"
    spec_file.write_text(json.dumps(spec))
    result_file.unlink(missing_ok=True)
    search = os.pathsep.join(map(str, (*paths, ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), str(spec_file), str(result_file)],
        env={**os.environ, "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode or not result_file.exists():
        raise ChildFailed(f"{script} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return json.loads(result_file.read_text())


def peak_rss_bytes() -> int:
    """Most memory this process has held resident.

    Linux counts it in `VmHWM`; `getrusage` would begin with what the process had that started this one.
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
