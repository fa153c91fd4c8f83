"""Environments of what opens the saved models, and what the tests save for them."""

import functools
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launches import ROOT
from peft import PeftModel
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import tuning
from tuning import cli
from tuning.model.mllama import patch_mllama_cross_attention

HERE = Path(__file__).parent
ADAPTED = {"peft_method": "lora", "target_modules": "all-linear", "r": 4}
METHODS = {
    "full": {},
    "language model": ADAPTED,
    "all parts": {**ADAPTED, "freeze_vision_tower": False, "freeze_multi_modal_projector": False},
}


def make_environment(name: str) -> Path:
    """The Python of an environment of setup.sh. It is made once, in a hidden folder of the project."""
    folder = ROOT / f".{name}"
    if not (folder / "ready").exists():
        subprocess.run(["bash", str(HERE / "setup.sh"), name, str(folder)], check=True, cwd=ROOT)
    return folder / "bin" / "python"


def environ() -> dict[str, str]:
    """For another Python: the project, its tests, and torchvision's import made to work."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE / "start")))}


def run_in(python: Path, script: str, *words: object) -> list[dict]:
    """Run a script of this folder in another environment: the JSON lines that it prints."""
    command = [str(python), str(HERE / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ(), check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="session")
def transformers4() -> Path:
    return make_environment("transformers4")


@pytest.fixture(scope="session")
def published(transformers4, tmp_path_factory) -> Path:
    """A folder with a tiny base model of each name, as transformers 4 writes it."""
    folder = tmp_path_factory.mktemp("published")
    run_in(transformers4, "published.py", folder)
    return folder


@dataclass(frozen=True)
class Saved:
    """What was saved: a model, or an adapter of `base`. `question`: the text and the picture of a row."""

    name: str
    folder: Path
    base: Path | None
    text: str
    picture: Path

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The row as training reads it."""
        processor = AutoProcessor.from_pretrained(self.folder)
        return dict(processor(text=self.text, images=[Image.open(self.picture)], return_tensors="pt"))

    def load(self):
        model = AutoModelForImageTextToText.from_pretrained(self.base or self.folder, dtype=torch.float32)
        patch_mllama_cross_attention(model)
        return (PeftModel.from_pretrained(model, self.folder) if self.base else model).eval()

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.load()(**self.inputs).logits.float()

    def job(self, folder: Path) -> dict:
        """What open_saved.py needs to open it."""
        inputs, out = folder / "inputs.safetensors", folder / "logits.safetensors"
        save_file({name: value.contiguous() for name, value in self.inputs.items()}, inputs)
        places = {"folder": self.folder, "base": self.base, "picture": self.picture, "inputs": inputs, "out": out}
        return {name: value and str(value) for name, value in places.items()} | {"text": self.text}


@pytest.fixture(scope="session")
def save(published, rows, tmp_path_factory) -> Callable[[str], dict[str, Saved]]:
    """All that training and export write of a base, once: what → `Saved`."""

    @functools.cache
    def train(name: str) -> dict[str, Saved]:
        root, base, picture = tmp_path_factory.mktemp(name), published / name, rows.parent / "square.png"
        Image.open(rows.parent / "1.png").resize((32, 32)).save(picture)  # towers take it as it is
        options = {
            "model_name_or_path": str(base),
            "training_data_path": str(rows),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "dataloader_num_workers": 0,
            "report_samples": 0,
            "max_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        folders = dict[str, tuple[Path, Path | None]]()
        for method, changes in METHODS.items():
            out = root / method.replace(" ", "_")
            tuning.train({**options, **changes, "output_dir": str(out)})
            folders[method] = (out, base if changes else None)
            folders[f"{method}: checkpoint"] = (out / "checkpoint-1", base if changes else None)
        merged = root / "merged"
        assert cli.main(["export", "--adapter", str(root / "all_parts"), "--output", str(merged)]) == 0
        folders["merged"] = (merged, None)
        question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour is it?"}]}]
        text = AutoProcessor.from_pretrained(base).apply_chat_template(question, add_generation_prompt=True)
        return {what: Saved(name, *places, text, picture) for what, places in folders.items()}

    return train
