"""The commands of the documentation do what it says: a tiny model stands in for the published one."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from docs_text import PROSE, ROOT, blocks, commands, why_not_run
from PIL import Image
from served_models import PlainModel, scripted_server
from tiny_models import save_layout

from tuning import cli

QUICKSTART = ROOT / "docs" / "quickstart.md"
BASE = "ibm-granite/granite-vision-3.2-2b"
SERVER = "http://localhost:8000/v1"
OUTPUTS = {"train": "--output_dir", "check": "--output_dir", "predict": "--output"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The folder in which a reader of the quickstart works: a model, pictures, and the files that the page shows."""
    folder = tmp_path_factory.mktemp("docs")
    save_layout("granite_vision", folder / BASE)
    (folder / "my_data" / "images").mkdir(parents=True)
    for name in ("cat", "dog", "cow", "owl"):
        Image.new("RGB", (60, 40), "orange").save(folder / "my_data" / "images" / f"{name}.png")
    text = QUICKSTART.read_text(encoding="utf-8")
    files = re.findall(r"Save this as `(.*?)`:\n\n```json\n(.*?)```", text, flags=re.DOTALL)
    files.append(("config.json", blocks(ROOT / "README.md", "json")[0]))
    assert [name for name, _ in files] == ["lora.json", "full.json", "config.json"]
    files.append(("questions.csv", "question,answer,image\nWhich animal is it?,A cat.,my_data/images/cat.png\n"))
    for name, content in files:
        (folder / name).write_text(content, encoding="utf-8")
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find the <ref-object>."}]}
    row = {"messages": [question, {"role": "assistant", "content": "<bbox>"}], "images": ["images/cat.png"]}
    row |= {"objects": {"ref": ["cat"], "bbox": [[10, 10, 50, 30]]}}
    (folder / "my_data" / "boxes.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return folder


def run(command: str, folder: Path) -> int:
    """Run a command of the documentation in `folder`; returns its exit code."""
    words = shlex.split(command)
    if words[:2] == ["vlm-tuning", "chat"]:
        return chat(words[2:], folder)
    if words[0] == "vlm-tuning":
        with contextlib.chdir(folder):
            return cli.main(words[1:])
    assert words[:2] == ["accelerate", "launch"]
    words = [word.replace("fixtures/", f"{ROOT}/fixtures/") for word in words[2:]]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(launch, cwd=folder, env=environment, timeout=600).returncode


def chat(flags: list[str], folder: Path) -> int:
    """Start the chat, and end it with Ctrl-C when its page is there; returns its exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tuning.cli", "chat", *flags, f"--port={port}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if f"http://127.0.0.1:{port}" in line:
                process.send_signal(signal.SIGINT)
        assert any(f"http://127.0.0.1:{port}" in line for line in printed), "".join(printed)
        return process.wait(timeout=120)


@pytest.fixture(scope="module")
def finished(workspace):
    """The workspace after the quickstart: its scripts and commands, in the order of the page."""
    steps = re.findall(r"^```(python|bash)\n(.*?)^```", QUICKSTART.read_text(encoding="utf-8"), flags=re.M | re.S)
    for language, block in steps:
        if language == "python":
            with contextlib.chdir(workspace):
                exec(block, {})
            continue
        for command in block.splitlines():
            if not why_not_run(command):
                assert run(command, workspace) == 0, command
    return workspace


def test_the_quickstart_ends_with_a_model_scores_and_a_merged_model(finished):
    assert (finished / "my_adapter" / "adapter_model.safetensors").exists()
    assert (finished / "my_adapter" / "check.html").exists()
    assert (finished / "my_adapter" / "report.html").exists()
    assert (finished / "predictions.html").exists()
    scores = json.loads((finished / "predictions.scores.json").read_text())["scores"]
    assert {field: list(values) for field, values in scores.items()} == {
        "prediction": ["exact_match", "token_f1"],
        "compared": ["exact_match", "token_f1"],
    }
    assert (finished / "merged" / "model.safetensors").exists()
    assert (finished / "my_model" / ".complete").exists()


@pytest.fixture(scope="module")
def server(finished):
    """The address of a server with the base and the adapter of the quickstart."""
    model = PlainModel(finished / BASE, adapter=finished / "my_adapter")
    with scripted_server(model.answer, models=("base", "tuned"), pages={"/version": {"version": "0"}}) as url:
        yield url


def other_commands() -> list[str]:
    """Commands of all pages that are run, but for those of the quickstart."""
    done = {*commands(QUICKSTART)}
    every = [command for page in PROSE for command in commands(page) if not why_not_run(command)]
    return [command for command in dict.fromkeys(every) if command not in done]


@pytest.mark.parametrize("command", other_commands())
def test_a_command_of_the_docs(command, finished, request):
    number = other_commands().index(command)
    if SERVER in command:
        command = command.replace(SERVER, request.getfixturevalue("server"))
    kind = shlex.split(command)[1]
    if kind in OUTPUTS and OUTPUTS[kind] not in shlex.split(command):
        command += f" {OUTPUTS[kind]} out_{number}"
    assert run(command, finished) == 0
