"""Rows that are as different as rows can be, and the settings of a launcher."""

import json
import subprocess
import sys

import pytest
from launches import FIXTURES, ROOT
from PIL import Image

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


@pytest.fixture(scope="session")
def fsdp_settings(tmp_path_factory):
    """What accelerate's launcher sets in the environment of its processes."""
    file = tmp_path_factory.mktemp("environment") / "environment.json"
    script = file.with_suffix(".py")
    script.write_text(f"import json, os; json.dump(dict(os.environ), open({str(file)!r}, 'w'))")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--main_process_port=0"]
    command += [f"--config_file={ROOT / 'fixtures' / FIXTURES['fsdp']}", str(script)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(file.read_text())
    return {name: value for name, value in found.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
