"""Launches of two real processes on the CPU, and rows that are as different as rows can be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
RANKS = str(Path(__file__).with_name("ranks.py"))
FIXTURES = {"ddp": "accelerate_ddp.yaml", "fsdp": "accelerate_fsdp_defaults.yaml"}
TEXT, ONE, TWO = 0, 1, 2
# 19 rows: two whole batches of 8, of which one process gets text only at first, and a last one of 3.
IMAGES_OF_ROWS = [*[TEXT] * 4, ONE, TWO, ONE, ONE, TWO, TEXT, ONE, TEXT, ONE, ONE, TWO, TEXT, TEXT, ONE, TEXT]


@pytest.fixture(scope="session")
def mixed_rows(tmp_path_factory):
    """Rows with no, one or two images of several sizes, with answers of two to a hundred words."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = []
    for number, images in enumerate(IMAGES_OF_ROWS):
        files = [f"{number}-{index}.png" for index in range(images)]
        for index, file in enumerate(files):
            Image.new("RGB", [(40, 40), (90, 30), (30, 80)][number % 3], (9 * number, 80 * index, 120)).save(
                folder / file
            )
        question = [{"type": "image"} for _ in files] + [{"type": "text", "text": f"How many are there? {number}"}]
        answer = "There are three of them." + " One, two, three." * (number * 7 % 23)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "images": files}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    text_only = [line for line, images in zip(lines, IMAGES_OF_ROWS, strict=True) if not images]
    (folder / "text_only.jsonl").write_text("\n".join((text_only * 3)[:19]) + "\n")
    return folder / "rows.jsonl"


def start(strategy: str, arguments: list[str], **environ: str) -> subprocess.Popen:
    """`accelerate launch` of two processes; under `fsdp` they really shard, see ranks.py."""
    config = str(ROOT / "fixtures" / FIXTURES[strategy])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environ
    environment |= {"FSDP_ON_CPU": "1"} if strategy == "fsdp" else {}
    return subprocess.Popen(
        [*command, f"--config_file={config}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcomes(folder: Path) -> list[str]:
    """How each rank ended the job with this output_dir."""
    return [Path(f"{folder}-outcome-{rank}").read_text() for rank in range(2)]


def run_jobs(strategy: str, jobs: list[dict], folder: Path) -> str:
    """Run every job on two processes, one after the other in one launch. Returns what was printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    process = start(strategy, [RANKS, str(folder / "jobs.json")])
    try:
        printed, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, printed[-6000:]
    return printed
