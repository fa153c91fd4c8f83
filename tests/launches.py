"""Launches of two real processes on the CPU, or of four."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANKS = str(Path(__file__).parent / "distributed" / "ranks.py")
FIXTURES = {
    "ddp": "accelerate_ddp.yaml",
    "fsdp": "accelerate_fsdp_defaults.yaml",
    "hybrid": "accelerate_fsdp_hybrid.yaml",
    "zero3": "accelerate_deepspeed_zero3.yaml",
}
# Two copies of the model, each of which two processes of this machine shard.
HYBRID = ["--num_machines=1", "--parallelism_config_dp_replicate_size=2", "--parallelism_config_dp_shard_size=2"]
PROCESSES = {"ddp": 2, "fsdp": 2, "hybrid": 4, "zero3": 2}
DEEPSPEED = ROOT / ".deepspeed"
LORA = {
    "peft_method": "lora",
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "r": 4,
    "lora_dropout": 0.0,
    "freeze_vision_tower": False,
    "modules_to_save": ["multi_modal_projector"],
}
# Five rows for two processes: one has a batch that the other lacks, and rows without images meet rows with some.
EXAMINED = {"eval_generate_rows": 5, "eval_metrics": "token_f1", "eval_max_new_tokens": 6, "report_samples": 3}


def start(strategy: str, arguments: list[str], **environ: str) -> subprocess.Popen:
    """`accelerate launch` of the strategy's processes; all but those of `ddp` really shard, see ranks.py.

    `zero3` needs the fixture `deepspeed`.
    """
    config = str(ROOT / "fixtures" / FIXTURES[strategy])
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={PROCESSES[strategy]}"]
    command += ["--main_process_port=0", *(HYBRID if strategy == "hybrid" else [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environ  # of this checkout, whichever is installed
    environment |= {"FSDP_ON_CPU": "1"} if strategy in ("fsdp", "hybrid") else {}
    if strategy == "zero3":
        command.append("--mixed_precision=no")
        environment |= on_deepspeed(environment)
    return subprocess.Popen(
        [*command, f"--config_file={config}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def on_deepspeed(environ: Mapping[str, str]) -> dict[str, str]:
    """What a process needs to import DeepSpeed, and to build its operator for the CPU at its first start."""
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(DEEPSPEED)]),
        "PATH": os.pathsep.join([str(DEEPSPEED / "bin"), environ["PATH"]]),  # ninja
        "TORCH_EXTENSIONS_DIR": str(DEEPSPEED / "operators"),
        "DS_ACCELERATOR": "cpu",
    }


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
