"""The README's commands do what it says."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import save_layout

from tuning.commands.chat import ChatArguments
from tuning.config.parse import read_command

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def find_command(name: str) -> str:
    lines = (line for block in blocks("bash") for line in block.splitlines())
    return next(line for line in lines if line.startswith(f"vlm-tuning {name} --"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder in which the README's paths exist: a tiny model in place of the published one."""
    folder = tmp_path_factory.mktemp("readme")
    save_layout("granite_vision", folder / "ibm-granite" / "granite-vision-3.2-2b")
    row = blocks("json")[1]
    (folder / "my_data").mkdir()
    (folder / "my_data" / "train.jsonl").write_text(row * 4)
    Image.new("RGB", (60, 40), "orange").save(folder / "my_data" / "cat.png")
    config = {**json.loads(blocks("json")[0]), "output_dir": "from_file", "num_train_epochs": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)


def test_flags_train_a_model_that_loads(workspace):
    command = next(line for block in blocks("bash") for line in block.splitlines() if "sft_trainer.py" in line)
    words = [
        word.replace("tuning/sft_trainer.py", str(ROOT / "tuning/sft_trainer.py")) for word in shlex.split(command)
    ]
    result = run([sys.executable, *words[1:], "--num_train_epochs", "1"], workspace)
    assert result.returncode == 0, result.stderr
    assert (workspace / "my_model" / "model.safetensors").exists()


def test_the_config_file_trains_through_the_command(workspace):
    assert "vlm-tuning train config.json" in "".join(blocks("bash"))
    result = run([sys.executable, "-m", "tuning.cli", "train", "config.json"], workspace)
    assert result.returncode == 0, result.stderr
    assert (workspace / "from_file" / ".complete").exists()


def test_the_config_file_trains_on_two_processes(workspace):
    line = next(line for line in "\n".join(blocks("bash")).splitlines() if line.startswith("accelerate launch"))
    words = [re.sub("^(tuning|fixtures)/", f"{ROOT}/\\1/", word) for word in line.split()]
    flags = ["--output_dir", "from_two", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags[2:], *words[2:], *flags[:2]]
    result = run(command, workspace)
    assert result.returncode == 0, result.stderr
    assert (workspace / "from_two" / ".complete").exists()


def test_the_check_writes_its_page(workspace):
    assert "vlm-tuning check config.json" in "".join(blocks("bash"))
    result = run([sys.executable, "-m", "tuning.cli", "check", "config.json"], workspace)
    assert result.returncode == 0, result.stderr
    assert "No problems." in result.stdout
    assert (workspace / "from_file" / "check.html").exists()


def test_the_speed_of_a_check_can_be_measured(workspace):
    assert "python benchmarks/check_speed.py" in README
    result = run([sys.executable, str(ROOT / "benchmarks" / "check_speed.py"), "--rows", "300"], workspace)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["rows"] == 300


def test_the_python_lines_run(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    (snippet,) = blocks("python")
    names: dict = {}
    config = json.loads(Path("config.json").read_text()) | {"output_dir": "from_python"}
    Path("config.json").write_text(json.dumps(config))
    exec(snippet, names)
    assert names["result"].global_step == 1
    assert names["result"].model_dir == Path("from_python")


@pytest.mark.slow
def test_a_model_is_scored_beside_its_base(workspace):
    line = next(
        line for block in blocks("bash") for line in block.splitlines() if line.startswith("vlm-tuning predict")
    )
    if not (workspace / "my_model").exists():
        test_flags_train_a_model_that_loads(workspace)
    result = run([sys.executable, "-m", "tuning.cli", *shlex.split(line)[1:], "--max_new_tokens", "8"], workspace)
    assert result.returncode == 0, result.stderr
    scores = json.loads((workspace / "predictions.scores.json").read_text())["scores"]
    assert list(scores) == ["prediction", "compared"]
    assert list(scores["compared"]) == ["exact_match", "anls"]


@pytest.mark.slow
def test_an_adapter_becomes_a_model_of_its_own(workspace):
    config = json.loads((workspace / "config.json").read_text())
    changes = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "output_dir": "my_adapter"}
    (workspace / "lora.json").write_text(json.dumps(config | changes))
    assert run([sys.executable, "-m", "tuning.cli", "train", "lora.json"], workspace).returncode == 0
    line = find_command("export")
    result = run([sys.executable, "-m", "tuning.cli", *shlex.split(line)[1:]], workspace)
    assert result.returncode == 0, result.stderr
    assert "first choices agree" in result.stdout
    assert (workspace / "merged" / "model.safetensors").exists()


def test_the_chat_is_called_as_written():
    line = find_command("chat")
    options = read_command(shlex.split(line)[2:], ChatArguments)
    assert (options.model_name_or_path, options.compare) == ("merged", "ibm-granite/granite-vision-3.2-2b")


def test_help_lists_every_option(workspace):
    result = run([sys.executable, "-m", "tuning.cli", "train", "--help"], workspace)
    assert result.returncode == 0
    assert "--target_modules" in result.stdout
    assert "learning_rate" in result.stdout


def test_the_demo_reaches_its_figures(tmp_path):
    result = run([sys.executable, "-m", "tuning.cli", "demo", "--output_dir", str(tmp_path / "demo_output")], tmp_path)
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout.splitlines()[-1])
    assert list(scores) == ["before", "after", "lora_before", "lora_after"]
    assert scores["before"] <= 0.2
    assert scores["after"] >= 0.95
    assert scores["lora_before"] <= 0.6
    assert scores["lora_after"] >= 0.90
    page = (tmp_path / "demo_output" / "index.html").read_text()
    assert page.count("data:image/png") == 48
    assert str(tmp_path / "demo_output" / "index.html") in result.stdout
    links = re.findall(r'href="([^"]*)"', page)
    assert {"full/report.html", "lora/report.html", "odd_or_even/predictions.html"} <= set(links)
    assert all((tmp_path / "demo_output" / link).is_file() for link in links)
