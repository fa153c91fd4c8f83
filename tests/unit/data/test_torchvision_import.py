"""A torchvision built for another PyTorch is made usable; one that is broken is named, with the one to install."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
LIKE_TORCHVISION = """
import torch
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): ...
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold): ...
"""


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python with the torchvision in `folder`."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def make_torchvision(tmp_path):
    """Writes a package named torchvision whose compiled library does not load."""

    def make(code: str) -> Path:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(code)
        (tmp_path / "torchvision" / "_C.so").write_bytes(b"built for another PyTorch")
        return tmp_path

    return make


def test_its_operators_are_defined_before_it_is_imported(make_torchvision):
    folder = make_torchvision(LIKE_TORCHVISION)
    done = run_python(folder, "-c", "import torchvision")
    assert "operator torchvision::nms does not exist" in done.stderr
    code = "import tuning, torchvision, torch; print(torch.ops.torchvision.nms); "
    code += "from tuning.data.torchvision_import import describe_torchvision; print(describe_torchvision())"
    done = run_python(folder, "-c", code)
    assert done.returncode == 0, done.stderr
    operator, sentence = done.stdout.splitlines()
    assert operator == "torchvision.nms"
    assert "was built for another PyTorch than" in sentence


def test_to_ask_whether_it_is_there_imports_nothing(make_torchvision):
    code = "import tuning, sys, importlib.util as u; print(bool(u.find_spec('torchvision')), 'torch' in sys.modules)"
    assert run_python(make_torchvision(BROKEN), "-c", code).stdout.strip() == "True False"


def test_a_broken_one_ends_a_command_with_the_version_that_fits(make_torchvision):
    done = run_python(make_torchvision(BROKEN), "-m", "tuning.cli", "check", "--training_data_path", "rows.jsonl")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cannot be imported beside PyTorch 2." in done.stderr
    assert 'Run pip install "torchvision==0.' in done.stderr


def test_the_installed_one_processes_pictures_when_a_script_is_run_by_path(tmp_path):
    """A script by path imports transformers, and so torchvision, first of all."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tuning" / "sft_trainer.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    code = """
import tuning, json
from PIL import Image
from transformers import Qwen2VLImageProcessor
made = Qwen2VLImageProcessor()(Image.new("RGB", (112, 84)), return_tensors="pt")
print(json.dumps(made["image_grid_thw"].tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert json.loads(done.stdout) == [[1, 6, 8]], done.stderr
