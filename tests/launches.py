"""Launches of two real processes on the CPU, or of four."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANKS = str(Path(__file__).parent / "distributed" / "ranks.py")
FIXTURES = {
    "ddp": "accelerate_ddp.yaml",
    "fsdp": "accelerate_fsdp_defaults.yaml",
    "hybrid": "accelerate_fsdp_hybrid.yaml",
}
# Two copies of the model, each of which two processes of this machine shard.
HYBRID = ["--num_machines=1", "--parallelism_config_dp_replicate_size=2", "--parallelism_config_dp_shard_size=2"]
PROCESSES = {"ddp": 2, "fsdp": 2, "hybrid": 4}


def start(strategy: str, arguments: list[str], **environ: str) -> subprocess.Popen:
    """`accelerate launch` of the strategy's processes; under `fsdp` and `hybrid` they really shard, see ranks.py."""
    config = str(ROOT / "fixtures" / FIXTURES[strategy])
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={PROCESSES[strategy]}"]
    command += ["--main_process_port=0", *(HYBRID if strategy == "hybrid" else [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environ  # of this checkout, whichever is installed
    environment |= {} if strategy == "ddp" else {"FSDP_ON_CPU": "1"}
    return subprocess.Popen(
        [*command, f"--config_file={config}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcomes(folder: Path, processes: int = 2) -> list[str]:
    """How each rank ended the job with this output_dir."""
    return [Path(f"{folder}-outcome-{rank}").read_text() for rank in range(processes)]


def run_jobs(strategy: str, jobs: list[dict], folder: Path) -> str:
    """Run every job on the strategy's processes, one after the other in one launch. Returns what was printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    process = start(strategy, [RANKS, str(folder / "jobs.json")])
    try:
        printed, _ = process.communicate(timeout=1500)
    finally:
        process.kill()
    assert process.returncode == 0, printed[-6000:]
    return printed
